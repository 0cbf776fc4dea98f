"""benchmarks/gpu.py on the pretended GPU: every section runs, keeps what it measured, and stops nothing else."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import agreement, gpu, largest_mini_batch, train_step
from benchmarks.gpu import SECTIONS, TINY, Report, Run, Section
from benchmarks.small_batch.rows import RowFile, read_rows
from options import TrainOptions
from tests.pretend_gpu import CPU, GPU, pretend_gpu
from utils.errors import UserError

OUT_OF_MEMORY = torch.OutOfMemoryError("CUDA out of memory")


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch) -> Iterator[torch.device]:
    with pretend_gpu(monkeypatch):
        yield GPU


def run_until(moment: float) -> Run:
    return Run(device=CPU, typed_device="cpu", scale=TINY, until=moment)


def section_of(*tasks: Callable[[], list[dict[str, Any]]]) -> Section:
    return Section(tasks=lambda run: iter(tasks), show=lambda rows: f"shown {rows}", share=1.0)


def fails() -> list[dict[str, Any]]:
    raise ValueError("no such kernel")


def test_a_dry_run_makes_every_section_and_stores_nothing(
    pretended: torch.device, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys
) -> None:
    monkeypatch.setattr(gpu, "RESULTS", tmp_path)
    gpu.main(["--dry-run"])
    said = capsys.readouterr().out
    assert [f"== {name}" for name in SECTIONS] == [text for text in said.splitlines() if text.startswith("== ")]
    assert "device pretended" in said and "nothing here is a measurement" in said
    assert "cmbn:carry" in said and "recomputed, offloaded" in said and "8 GB: 1 at" in said and "AP50 0." in said
    assert list(tmp_path.iterdir()) == []


def test_without_a_gpu_nothing_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="finds no CUDA GPU here; --dry-run needs none"):
        gpu.main([])


@pytest.mark.slow
def test_it_runs_as_a_file(root: Path, tmp_path: Path) -> None:
    """Python then looks for modules beside it, where another `evaluate` is."""
    command = [sys.executable, str(root / "benchmarks" / "gpu.py"), "--dry-run", "--only", "agreement"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "== agreement" in done.stdout and "== memory" not in done.stdout


def test_a_failure_is_reported_and_stops_neither_its_section_nor_the_others(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys, pretended: torch.device
) -> None:
    sections = {
        "one": section_of(fails, lambda: [{"norm": "bn"}]),
        "two": section_of(lambda: [{"norm": "gn", "ok": False}, {"norm": "ln", "ok": True}]),
    }
    monkeypatch.setattr(gpu, "SECTIONS", sections)
    path = tmp_path / "rows.jsonl"
    with pytest.raises(SystemExit) as ended:
        gpu.main(["--only", "one", "two", "--device", str(pretended), "--out", str(path)])
    assert ended.value.code == 1
    said = capsys.readouterr()
    assert "no such kernel" in said.err
    assert said.out.endswith("failed:\n  one, measurement 1 of 2\n  two, gn, False\n")
    rows = read_rows(path)
    assert [(row["section"], row["norm"]) for row in rows] == [("one", "bn"), ("two", "gn"), ("two", "ln")]
    assert all(row["device"] == "pretended" and {"torch", "cuda", "commit", "total_GB"} <= row.keys() for row in rows)


def test_what_is_measured_is_stored_before_the_next_is_measured(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"

    def stopped() -> list[dict[str, Any]]:
        assert [row["norm"] for row in read_rows(path)] == ["bn"]
        raise KeyboardInterrupt

    with RowFile(path) as file, pytest.raises(KeyboardInterrupt):
        report = Report(common={}, file=file)
        report.measure("one", section_of(lambda: [{"norm": "bn"}], stopped), run_until(float("inf")))
    assert len(read_rows(path)) == 1


def test_a_section_whose_time_is_over_makes_one_measurement_and_says_what_is_left_out(capsys) -> None:
    made: list[int] = []
    tasks = [lambda number=number: made.append(number) or [{"number": number}] for number in range(4)]
    report = Report(common={}, file=None)
    report.measure("late", section_of(*tasks), run_until(float("-inf")))
    assert made == [0] and report.failures == []
    assert "late: its time is over, 3 of 4 measurements are left out" in capsys.readouterr().out


@pytest.mark.parametrize(("only", "ends"), [([], [60, 180, 240]), (["b"], [240]), (["a", "c"], [120, 240])])
def test_sections_share_the_minutes_and_pass_on_what_they_leave(
    only: list[str], ends: list[float], monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    untils: list[float] = []

    def tasks(run: Run) -> Iterator[Any]:
        untils.append(run.until)
        return iter(())

    shares = {"a": 1.0, "b": 2.0, "c": 1.0}
    monkeypatch.setattr(
        gpu, "SECTIONS", {name: Section(tasks=tasks, show=str, share=share) for name, share in shares.items()}
    )
    monkeypatch.setattr(gpu.time, "monotonic", lambda: 0.0)
    args = gpu.parse(["--minutes", "4", "--dry-run"])
    args.only = only or list(shares)
    gpu.run_sections(args, CPU, Report(common={}, file=None))
    assert untils == pytest.approx(ends)


def test_a_step_is_measured_with_as_many_images_as_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[int] = []

    def measure(net: str, side_px: int, ways: list[str], images: int, *others: object) -> list[dict[str, Any]]:
        tried.append(images)
        if images > 2:
            raise OUT_OF_MEMORY
        return [{"way": way, "images": images} for way in ways]

    monkeypatch.setattr(train_step, "measure", measure)
    run = Run(device=CPU, typed_device="cpu", scale=gpu.Scale(), until=0.0)
    assert gpu.beside_eager("yolov4", "bf16", run) == [{"way": "bf16", "images": 2}]
    assert tried == [8, 4, 2]
    assert gpu.beside_eager("yolov4", "eager", run) == [{"way": "eager", "images": 2}]
    monkeypatch.setattr(train_step, "measure", lambda *args: fails())
    with pytest.raises(ValueError, match="no such kernel"):
        gpu.beside_eager("yolov4", "bf16", run)


def test_a_device_is_measured_in_the_ways_it_can_gain_from(
    monkeypatch: pytest.MonkeyPatch, pretended: torch.device
) -> None:
    monkeypatch.setattr(train_step, "cpu_bf16", lambda: "amx_bf16")
    here, there = ({train_step.WAYS[name] for name in train_step.ways_on(each)} for each in (CPU, pretended))
    assert any(way.bf16 for way in here) and not any(way.fp16 or way.offloads for way in here)
    assert any(way.fp16 for way in there) and any(way.offloads for way in there)
    assert not any(way.bf16 for way in there)  # the pretended one has none


def test_paths_are_those_of_where_it_was_typed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The pages run in the checkout."""
    (tmp_path / "set").mkdir()
    monkeypatch.chdir(tmp_path)
    assert gpu.parse(["--data", "set"]).data == str(tmp_path.resolve() / "set")
    assert (gpu.parse([]).data, gpu.parse([]).weights) == ("digits", None)


# Agreement


@pytest.mark.parametrize("part", agreement.PARTS)
def test_a_planted_error_is_a_disagreement(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    trained = agreement.trained

    def off_by_a_thousandth(*args: Any) -> agreement.Found:
        found = trained(*args)
        if len(args) > 3:  # in the precision and memory format of a way
            name = next(iter(found[part]))
            found[part][name] = found[part][name] * 1.001
        return found

    (right, _, *_), honest = agreement.measure("bn", CPU), agreement.lines(agreement.measure("bn", CPU)[:1])
    assert right["ok"] and right["tolerance"] == agreement.TOLERANCE and "ABOVE" not in honest
    monkeypatch.setattr(agreement, "trained", off_by_a_thousandth)
    wrong, *_ = agreement.measure("bn", CPU)
    assert not wrong["ok"] and wrong[part] == pytest.approx(1e-3, rel=0.05)
    assert "ABOVE" in agreement.lines([wrong])


def test_what_is_not_finite_disagrees() -> None:
    expected = {part: {"x": torch.ones(3, dtype=torch.float64)} for part in agreement.PARTS}
    found = {part: {"x": torch.tensor([1.0, float("nan"), 1.0], dtype=torch.float64)} for part in agreement.PARTS}
    assert set(agreement.errors(found, expected).values()) == {float("inf")}
    assert set(agreement.errors(expected, expected).values()) == {0.0}


def test_tf32_is_off_within_and_as_it_was_after() -> None:
    before = torch.backends.cudnn.allow_tf32
    with agreement.without_tf32():
        assert not torch.backends.cudnn.allow_tf32 and not torch.backends.cuda.matmul.allow_tf32
    assert torch.backends.cudnn.allow_tf32 == before


# The largest mini-batch


@pytest.mark.parametrize(("limits", "found"), [((0, 3, 64), [0, 2, 16]), ((1, 1, 9), [1, 1, 8]), ((0, 0, 0), [0] * 3)])
def test_for_each_cap_the_largest_power_of_two_that_fits(
    limits: tuple[int, ...], found: list[int], monkeypatch: pytest.MonkeyPatch, pretended: torch.device
) -> None:
    limit_of, caps, sizes = dict(zip((4, 6, 8), limits, strict=True)), [], []

    def tried(step: object, size: int, side_px: int) -> dict[str, Any] | None:
        sizes.append(size)
        return {"mini_batch": size, "images_per_s": 1.0, "peak_GB": 1.0} if size <= limit_of[caps[-1]] else None

    monkeypatch.setattr(largest_mini_batch, "set_cap", lambda cap, device: caps.append(cap))
    monkeypatch.setattr(largest_mini_batch, "make_training", lambda *args: (None, None))
    monkeypatch.setattr(largest_mini_batch, "tried", tried)
    rows = largest_mini_batch.measure("yolov4-pico", 64, "", pretended, caps_gb=(8, 4, 12, 6), most=16)
    assert [(row["cap_GB"], row["mini_batch"]) for row in rows] == list(zip((4, 6, 8), found, strict=True))
    assert caps == [4, 6, 8, None]  # 12 are more than there are; in the end all is free again
    assert len(sizes) <= 5 + 3  # none that fitted is tried again


def test_no_more_is_offloaded_than_the_host_has_memory_for(
    monkeypatch: pytest.MonkeyPatch, pretended: torch.device
) -> None:
    """It would be killed: page-locked memory cannot be swapped out."""
    monkeypatch.setattr(largest_mini_batch, "free_memory_bytes", lambda: 10 << 30)
    monkeypatch.setattr(largest_mini_batch, "make_training", lambda *args: (None, None))
    monkeypatch.setattr(
        largest_mini_batch, "tried", lambda step, size, side_px: {"mini_batch": size, "host_GB": float(size)}
    )
    rows = largest_mini_batch.measure("yolov4-pico", 64, "offloaded", pretended)
    assert {(row["mini_batch"], row["subdivisions"]) for row in rows} == {(8, 8)}


def test_memory_that_runs_out_in_a_step_is_an_answer_and_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    options = TrainOptions(device="cpu")
    plan = largest_mini_batch.load_plan("yolov4-pico", input_hw=(64, 64))
    step, _ = largest_mini_batch.make_training(options, plan, CPU)
    sizes: list[int] = []

    def fail(error: Exception) -> Callable[..., None]:
        def hook(module: object, inputs: tuple[torch.Tensor, ...]) -> None:
            sizes.append(len(inputs[0]))
            if len(sizes) == 2:
                raise error

        return hook

    hook = step.network.layers[1].register_forward_pre_hook(fail(OUT_OF_MEMORY))
    assert largest_mini_batch.tried(step, 2, 64) is None
    assert sizes == [2, 2]  # the second mini-batch failed, and no finer one was tried
    assert all(parameter.grad is None for parameter in step.network.parameters())
    found = largest_mini_batch.tried(step, 2, 64)
    assert found is not None and found["mini_batch"] == 2 and found["images_per_s"] > 0
    hook.remove()
    sizes.clear()
    step.network.layers[1].register_forward_pre_hook(fail(RuntimeError("no such kernel")))
    with pytest.raises(RuntimeError, match="no such kernel"):
        largest_mini_batch.tried(step, 1, 64)


def test_a_line_says_what_fits() -> None:
    row = {"net": "yolov4", "side_px": 416, "way": "", "flags": "", "precision": "bf16, channels last"}
    rows = [{**row, "cap_GB": 4, "mini_batch": 0}]
    rows += [{**row, "cap_GB": 6, "mini_batch": 8, "images_per_s": 31.25, "peak_GB": 5.012}]
    assert largest_mini_batch.lines(rows) == (
        "yolov4 416 px (no flags) [bf16, channels last]; 4 GB: 0; 6 GB: 8 at 31.2 images/s, peak 5.01 GB"
    )
