"""Several data sets in one training, from the command line to detections of each."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch

import detect
import evaluate
import train
from data.digits import make_digits
from engine.job import parse_job
from engine.step import TrainStep
from engine.trainer import Trainer
from models.norms.domains import has_domains, plain_state
from models.weights.convert import write_darknet
from models.weights.trained import of_domain
from tests.e2e import children
from tests.e2e.test_ranks import differences, start_two
from utils.checkpoint import Checkpoint
from utils.clock import BatchClock
from utils.errors import UserError
from utils.stop import Stop, Stopped
from utils.structures import Batch

ALL = ("--domain-batches", "one", "--domain-statistics", "own", "--domain-affine", "own")


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Two folders of one name, of 16 and 8 training images."""
    folder = tmp_path_factory.mktemp("two")
    counts = {"train": 16, "val": 4}
    first = make_digits(folder / "one" / "digits", counts=counts, hw=(64, 64), shift=0.0)
    second = make_digits(folder / "other" / "digits", counts={**counts, "train": 8}, hw=(64, 64), seed=1)
    return str(first), str(second)


def flags(two: Sequence[str], cfg: str, run: Path, *more: str) -> list[str]:
    common = ["--data", *two, "--cfg", cfg, "--epochs", "2", "--evals", "2", "--workers", "0", "--device", "cpu"]
    return [*common, "--out", str(run), "--mosaic", "0.5", *more]


def stopped_at(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the training stop after so many steps."""
    whole = TrainStep.__call__

    def run(self: TrainStep, batch: object) -> torch.Tensor:
        if self.clock.step == step:
            raise Stopped
        return whole(self, batch)

    monkeypatch.setattr(TrainStep, "__call__", run)


@pytest.mark.parametrize("more", [ALL, ("--domain-statistics", "own")], ids=["all", "mixed"])
@pytest.mark.parametrize("norm", ["cbn:burn_in_steps=2", "cmbn:carry,burn_in_steps=1"])
def test_a_training_stopped_in_an_epoch_ends_like_one_that_was_not(
    two: tuple[str, str], toy_cfg: str, tmp_path: Path, norm: str, more: Sequence[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train.main(flags(two, toy_cfg, whole, "--norm", norm, *more))
    with monkeypatch.context() as patched:
        stopped_at(4, patched)
        train.main(flags(two, toy_cfg, parts, "--norm", norm, *more))
    assert Checkpoint.from_file(parts / "last.pt").step == 4
    train.main(["--resume", str(parts), "--workers", "0"])
    children.assert_same_training(whole, parts)


@pytest.mark.parametrize(("batches", "most_domains"), [("mixed", 2), ("one", 1)])
def test_a_mini_batch_has_images_of_all_domains_or_of_one(
    two: tuple[str, str],
    toy_cfg: str,
    tmp_path: Path,
    batches: str,
    most_domains: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    announced: list[tuple[int, ...]] = []
    whole = BatchClock.minibatches

    def minibatches(self: BatchClock, parts: list[Batch], domains: list[tuple[int, ...]]) -> Iterator[Batch]:
        announced.extend(domains)
        assert [len(each) for each in domains] == [len(part) for part in parts]
        return whole(self, parts, domains)

    monkeypatch.setattr(BatchClock, "minibatches", minibatches)
    train.main(flags(two, toy_cfg, tmp_path / "run", "--domain-batches", batches))
    assert {domain for domains in announced for domain in domains} == {0, 1}
    assert max(len(set(domains)) for domains in announced) == most_domains
    assert not has_domains(Checkpoint.from_file(tmp_path / "run" / "last.pt").weights)


def test_evaluate_and_detect_take_the_norms_of_the_domain_that_is_named(
    two: tuple[str, str], toy_cfg: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    train.main(flags(two, toy_cfg, run, "--precise-bn", "8", *ALL))
    assert "digits, digits-2: each mini-batch of one" in capsys.readouterr().out
    best, metrics = run / "best.pt", json.loads((run / "metrics.json").read_text())
    expected = {name: stats["AP"] for name, stats in metrics["domains"].items()}
    assert list(expected) == ["digits", "digits-2"] and metrics["AP"] == pytest.approx(sum(expected.values()) / 2)
    common = ["--device", "cpu", "--workers", "0"]
    for name, data in zip(expected, two, strict=True):
        out = tmp_path / name
        batch = ["--batch-size", "2"]  # as in training: float32 sums differ otherwise
        evaluate.main(["--weights", str(best), "--domain", name, "--data", data, "--out", str(out), *common, *batch])
        assert json.loads((out / "metrics.json").read_text())["AP"] == pytest.approx(expected[name], abs=1e-6)
    detect.main(["--weights", str(best), "--domain", "digits", "--out", str(tmp_path / "found"), two[0] + "/val"])
    for page in (evaluate.main, detect.main):
        source = [two[0] + "/val"] if page is detect.main else ["--data", two[0]]
        with pytest.raises(UserError, match="norms of its own for each of digits, digits-2: choose with --domain NAME"):
            page(["--weights", str(best), *source])
        with pytest.raises(UserError, match="there is no domain 'x', it knows digits, digits-2"):
            page(["--weights", str(best), "--domain", "x", *source])
    plain = of_domain(Checkpoint.from_file(run / "best.safetensors"), "digits-2", path="")
    assert not has_domains(plain.weights) and plain.domains == ()
    assert write_darknet(tmp_path / "w.weights", plain, source="")[0].stat().st_size > 1000


def test_weights_with_domains_start_a_training_on_one_data_set_and_back(
    two: tuple[str, str], toy_cfg: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train.main(flags(two, toy_cfg, tmp_path / "two", *ALL))
    train.main(flags(two[:1], toy_cfg, tmp_path / "one", "--weights", str(tmp_path / "two" / "best.pt")))
    assert "0 re-initialized; digits begins with the norms of digits" in capsys.readouterr().out
    again = ("--weights", str(tmp_path / "one" / "best.pt"), *ALL)
    train.main(flags(two, toy_cfg, tmp_path / "again", *again))
    assert "0 re-initialized" in capsys.readouterr().out


def test_weights_with_domains_start_others_by_name(two: tuple[str, str], toy_cfg: str, tmp_path: Path) -> None:
    """In another order, with other switches, and one that they do not know, which begins as the first."""
    third = str(make_digits(tmp_path / "third", counts={"train": 4, "val": 2}, hw=(64, 64), seed=2))
    data = (str(tmp_path / "one"), str(tmp_path / "two"))
    for source, target in zip(two, data, strict=True):
        shutil.copytree(source, target)
    train.main(flags(data, toy_cfg, tmp_path / "before", "--domain-affine", "own"))
    before = Checkpoint.from_file(tmp_path / "before" / "best.pt")
    affine = {name: plain_state(before.weights, domain) for domain, name in enumerate(before.domains)}
    start = ["--weights", str(tmp_path / "before" / "best.pt"), "--domain-statistics", "own", "--domain-affine", "own"]
    job = parse_job(flags((data[1], third, data[0]), toy_cfg, tmp_path / "after", *start))
    run = Trainer(job, tmp_path / "after", Stop())
    started = run.network.state_dict()
    for domain, source in enumerate(("two", "one", "one")):
        plain = plain_state(started, domain)
        torch.testing.assert_close(plain, {key: affine[source][key] for key in plain}, rtol=0, atol=0)
    assert "two begins with the norms of two, third begins with the norms of one" in run.weights_loaded.replace(
        "; ", ", "
    )


def test_a_resume_does_not_exchange_the_norms_of_domains(two: tuple[str, str], toy_cfg: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    data = (str(tmp_path / "a"), str(tmp_path / "b"))
    for source, target in zip(two, data, strict=True):
        shutil.copytree(source, target)
    train.main(flags(data, toy_cfg, run, *ALL))
    with pytest.raises(UserError, match="the data sets in the order a, b; name them in this order"):
        train.main(["--resume", str(run), "--data", *reversed(data), "--epochs", "3"])


def test_a_data_set_is_not_named_twice(two: tuple[str, str], toy_cfg: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="names a data set twice"):
        train.main(flags((two[0], two[0] + "/../digits"), toy_cfg, tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_a_single_data_set_knows_no_domains(two: tuple[str, str], toy_cfg: str, tmp_path: Path) -> None:
    train.main(flags(two[:1], toy_cfg, tmp_path / "run"))
    last = Checkpoint.from_file(tmp_path / "run" / "last.pt")
    assert last.domains == () and not has_domains(last.weights)
    with pytest.raises(UserError, match="there is no domain 'digits', it was trained on one data set"):
        of_domain(last, "digits", path="x")


@pytest.mark.parametrize(
    ("sets", "more", "text"),
    [
        (1, ALL, "--domain-batches is about several data sets"),
        (1, ALL[4:], "--domain-affine is about several data sets"),
        (2, ("--val-data", "x"), "--val-data is for a single --data"),
        (2, ("--compile", *ALL[2:]), "--compile would compile anew"),
        (2, ("--precise-bn", "4", *ALL[4:]), "--precise-bn needs --domain-statistics own"),
        (2, ("--shuffle-bn", *ALL[:2]), "--shuffle-bn goes with neither --domain-batches one"),
        (3, (), "names a data set twice"),
        (2, ("--classes", "x"), "has no class 'x'"),
        (2, ("--classes", "0,1,2,3,4,5,6,7,8,9,x"), "no data set has a class 'x'"),
    ],
)
def test_what_does_not_go_with_domains_is_refused(two, toy_cfg, tmp_path, sets, more, text) -> None:
    with pytest.raises(UserError, match=text):
        train.main(flags([*two, two[0]][:sets], toy_cfg, tmp_path / "run", *more))


def test_two_ranks_of_which_one_lacks_a_domain_are_one_with_the_same_batch(
    two: tuple[str, str], toy_cfg: str, tmp_path: Path
) -> None:
    """Of four images of a batch one or two are of the second domain; group norm needs no other image."""
    alone, together, log = tmp_path / "alone", tmp_path / "together", tmp_path / "log"
    cut = ("--norm", "gn", "--domain-affine", "own", "--batch-size", "4", "--subdivisions", "1", "--ema-decay", "0.5")
    train.main(flags(two, toy_cfg, alone, *cut))
    pair = start_two(flags(two, toy_cfg, together, *cut), log)
    assert [children.ended(child) for child in pair] == [0, 0], log.read_text()[-3000:]
    found = differences(alone, together)
    assert max(found.values()) < 1e-6, {name: value for name, value in found.items() if value >= 1e-6}


def test_ranks_do_not_pool_over_different_domains(two: tuple[str, str], toy_cfg: str, tmp_path: Path) -> None:
    pair = start_two(
        flags(two, toy_cfg, tmp_path / "run", "--norm", "syncbn", "--domain-statistics", "own"), tmp_path / "log"
    )
    assert [children.ended(child) for child in pair] == [2, 2]
    assert "error: --norm syncbn pools over ranks" in (tmp_path / "log").read_text()
