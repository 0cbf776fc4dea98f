"""How much memory there is: by Linux, by control groups, over ranks."""

from __future__ import annotations

from pathlib import Path

import pytest

from utils.memory import free_memory_bytes

GIB = 2**30


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """With 100 GiB to spare, in no group."""
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/meminfo").write_text(f"MemTotal: 1 kB\nMemAvailable: {100 * 2**20} kB\n")
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    return tmp_path


def group(machine: Path, folder: str, limit: object) -> None:
    """With 3 GiB in use, 2 of them reclaimable page cache."""
    place = machine / "sys/fs/cgroup" / folder
    place.mkdir(parents=True, exist_ok=True)
    for name, value in (("max", limit), ("current", 3 * GIB)):
        (place / f"memory.{name}").write_text(f"{value}\n")
    (place / "memory.stat").write_text(f"anon {GIB}\ninactive_file {2 * GIB}\n")


def test_without_groups_it_is_what_linux_says(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert free_memory_bytes(machine) == 100 * GIB
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert free_memory_bytes(machine) == 25 * GIB


def test_the_tightest_group_above_a_process_counts(machine: Path) -> None:
    (machine / "proc/self/cgroup").write_text("4:cpu:/other\n0::/slurm/job/step\n")
    group(machine, "slurm/job/step", "max")
    assert free_memory_bytes(machine) == 100 * GIB
    group(machine, "slurm/job", 16 * GIB)
    group(machine, "slurm", 64 * GIB)
    group(machine, "slurm/other", 2 * GIB)
    assert free_memory_bytes(machine) == 15 * GIB


def test_a_container_may_see_its_own_group_as_the_root(machine: Path) -> None:
    (machine / "proc/self/cgroup").write_text("0::/\n")
    group(machine, "", 8 * GIB)
    assert free_memory_bytes(machine) == 7 * GIB


def test_a_group_that_is_full_leaves_nothing(machine: Path) -> None:
    (machine / "proc/self/cgroup").write_text("0::/full\n")
    group(machine, "full", GIB // 2)
    assert free_memory_bytes(machine) == 0
