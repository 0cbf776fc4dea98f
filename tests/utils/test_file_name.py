from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from utils.file_name import as_file_name
from utils.run_folder import free_folder

RESERVED = ["CON", "nul", "aux.txt", "COM1", "lpt9.tar.gz"]
names = st.one_of(st.text(), st.sampled_from([*RESERVED, ".", "..", "../..", "/etc", "C:\\x", "a" * 300, "猫" * 300]))


@given(name=names)
def test_any_name_becomes_one_that_every_system_takes(name: str) -> None:
    safe = as_file_name(name)
    assert safe == Path(safe).name and not set(safe) & set('\\/:*?"<>|')
    assert safe.isprintable() and safe[0] not in ".-~" and safe[-1] not in " ."
    assert safe.partition(".")[0].lower() not in {"con", "nul", "aux", "prn", "com1", "lpt9"}
    assert 0 < len(safe.encode()) < 220
    assert as_file_name(safe) == safe


@pytest.mark.parametrize("name", ["digits-yolov4-pico-cbn", "red box", "红框 é", "v1.2", "a_b-c", "console", "com10"])
def test_a_usual_name_stays(name: str) -> None:
    assert as_file_name(name) == name


def test_long_names_that_begin_alike_stay_apart() -> None:
    assert as_file_name("x" * 300) != as_file_name("x" * 301)


@pytest.mark.parametrize("name", ["../up", "..", "a/b", "nul", "x" * 300, "\x1b[2J", "a\nb"])
def test_a_run_s_folder_lies_under_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert free_folder(None, default=name).parent == Path("runs")
    assert free_folder(None, default=name).is_dir()
    assert [each.name for each in tmp_path.iterdir()] == ["runs"]
