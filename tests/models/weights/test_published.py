"""Weights by name: the table, and what comes before what."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from cfg.plan import cfg_names, load_plan
from models.weights import download, published
from models.weights.__main__ import main
from models.weights.download import PublishedFile
from models.weights.layout import stored_layers
from models.weights.published import PUBLISHED, PublishedWeights, find_weights
from utils.errors import UserError

HEADER_BYTES = 20
TOY = b"weights of nobody"


@pytest.fixture(autouse=True)
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a folder of its own, with a cache of its own."""

    def refuse(*_: object) -> None:
        raise AssertionError("nothing is downloaded here")

    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(download, "_download", refuse)


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> PublishedFile:
    """In the cache, and known by the name `toy`; its cfg is in the cache, too."""
    files = {}
    for name, content in (("toy.weights", TOY), ("toy.cfg", b"[net]")):
        digest = hashlib.sha512(content).hexdigest()
        files[name] = PublishedFile(address=f"https://example.org/{name}", sha512=digest, size_bytes=len(content))
        files[name].place.parent.mkdir(parents=True, exist_ok=True)
        files[name].place.write_bytes(content)
    weights = PublishedWeights(file=files["toy.weights"], cfg=files["toy.cfg"])
    monkeypatch.setitem(published.PUBLISHED, "toy", weights)
    return weights.file


# --- the table ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PUBLISHED)
def test_sizes_follow_from_the_cfgs(name, request):
    weights = PUBLISHED[name]
    cfg = weights.network
    if cfg not in cfg_names():
        folder = request.getfixturevalue("shared") / "darknet"
        (cfg,) = (str(path) for path in folder.glob(f"*/{cfg}.cfg"))
    layers = int(name.rpartition(".conv.")[2]) if ".conv." in name else None
    stored = [layer for layer in stored_layers(load_plan(cfg)) if layers is None or layer.node.index < layers]
    assert HEADER_BYTES + sum(layer.loaded_bytes for layer in stored) == weights.file.size_bytes


@pytest.mark.parametrize("name", PUBLISHED)
def test_files_are_named_as_they_are_typed(name):
    weights = PUBLISHED[name]
    files = [file for file in (weights.file, weights.cfg) if isinstance(file, PublishedFile)]
    assert weights.file.name in (name, f"{name}.weights")
    assert all(file.address.startswith("https://") for file in files)
    assert all(len(bytes.fromhex(file.sha512)) == 64 and file.sha512.islower() for file in files)
    assert weights.needs_cfg or isinstance(weights.cfg, PublishedFile) or weights.cfg in cfg_names()
    assert len({other.file.sha512 for other in PUBLISHED.values()}) == len(PUBLISHED)


@pytest.mark.parametrize("name", ["yolo-fastest-1.1", "yolo-fastest-1.1-xl"])
def test_small_files_at_hand_are_the_published_ones(name, shared):
    folder, weights = shared / "darknet" / "real", PUBLISHED[name]
    assert weights.file.is_at(folder / f"{name}.weights") and weights.cfg.is_at(folder / f"{name}.cfg")


def test_the_list(toy, capsys):
    main(["list"])
    said = capsys.readouterr().out.splitlines()
    assert said[1] == "yolov4              yolov4                     257.7 MB"
    assert said[5] == "yolov3              yolov3 (--cfg FILE)        248.0 MB"
    assert said[1 + list(PUBLISHED).index("toy")].endswith(" MB  in the cache")
    assert said[-1].endswith(str(toy.place.parent))


# --- what comes before what -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["toy", "toy.weights"])
def test_the_cache_serves_a_name(name, toy):
    assert find_weights(name, None) == (str(toy.place), str(toy.place.with_suffix(".cfg")))
    assert find_weights(name, "mine.cfg") == (str(toy.place), "mine.cfg")


@pytest.mark.parametrize("name", ["toy", "toy.weights"])
def test_the_current_folder_comes_before_the_cache(name, toy):
    Path("toy.weights").write_bytes(b"mine")
    assert find_weights(name, "mine.cfg") == ("toy.weights", "mine.cfg")
    assert find_weights(name, None) == ("toy.weights", str(toy.place.with_suffix(".cfg")))


def test_a_file_called_like_a_name_is_what_it_is(toy):
    Path("toy").write_bytes(b"PK")
    assert find_weights("toy", None) == ("toy", None)


@pytest.mark.parametrize("name", ["runs/a/best.pt", "weights/toy.weights", "./toy.weights", "toy.pt", "mine", ""])
def test_other_paths_are_left_alone(name, toy):
    assert find_weights(name, None) == (name, None)


def test_a_damaged_file_is_not_served(toy):
    toy.place.write_bytes(TOY[::-1])
    with pytest.raises(AssertionError, match="nothing is downloaded here"):
        find_weights("toy", None)


@pytest.mark.parametrize("name", ["yolov3", "yolov3-tiny", "darknet53.conv.74"])
def test_a_network_that_is_not_ours_is_asked_for_before_a_download(name):
    with pytest.raises(UserError, match=r"is not among ours: download https://\S+\.cfg and add --cfg yolov3\S*\.cfg$"):
        find_weights(name, None)


@pytest.mark.parametrize("command", [["info"], ["partial", "--layers", "1"], ["convert"]])
def test_a_misspelt_name_is_recognized(command, tmp_path):
    target = [] if command == ["info"] else [str(tmp_path / "x.weights")]
    with pytest.raises(UserError, match=r"yolov4-tinny: no such checkpoint .* did you mean 'yolov4-tiny'"):
        main([command[0], "yolov4-tinny", *target, *command[1:]])
