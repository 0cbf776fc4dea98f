"""Which optimizer, and the numbers that go with it."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cfg.net import NetSpec
from cfg.plan import load_plan, parse_plan
from engine.build import make_schedule
from engine.job import Job, parse_job
from engine.recipe import (
    BATCH,
    FINE_TUNING_RATE,
    KNOWN_RATE,
    LONG,
    SCRATCH_RATE,
    SHORT,
    adamw_recipe,
    choose_optimizer,
    fewest_parts,
    has_fixed_statistics,
    planned_steps,
    usual_steps,
)
from models.network import Network
from models.norms.factory import norm_factory
from models.norms.options import NormOptions, resolve_norm
from models.stored_network import make_checkpoint
from options import OptimOptions, TrainOptions
from tests.e2e.conftest import TOY_CFG


@pytest.fixture
def parse(scenes: Path, toy_cfg: str):
    return lambda *flags: parse_job(["--data", str(scenes), "--cfg", toy_cfg, *flags])


def chosen(job: Job) -> tuple[str, bool]:
    """The optimizer, and whether it was `auto` that chose it."""
    return job.options.optim.optimizer, "optimizer" in job.reasons


@pytest.mark.parametrize(
    ("flags", "optimizer"),
    [
        ([], "adamw"),
        (["--epochs", "12"], "adamw"),
        (["--loss", "darknet"], "sgd"),
        (["--momentum", "0.95"], "sgd"),
        (["--max-steps", str(LONG - 1)], "adamw"),
        (["--max-steps", str(LONG)], "sgd"),
        (["--cfg", "yolov4-tiny"], "adamw"),  # two million steps, but for COCO
        (["--cfg", "yolov4-tiny", "--max-steps", "2000200"], "sgd"),
        (["--cfg", "yolov4-tiny", "--time-budget", "1h"], "adamw"),
        (["--epochs", str(LONG // 4)], "sgd"),  # an epoch is 4 batches of the cfg's
    ],
)
def test_auto_chooses_and_says_so(parse, flags: list[str], optimizer: str) -> None:
    assert chosen(parse(*flags)) == (optimizer, True)
    assert chosen(parse("--optimizer", optimizer, *flags)) == (optimizer, False)


def test_adamw_takes_no_schedule_of_the_cfg_and_sgd_all_of_it(parse) -> None:
    adamw, sgd = (parse("--optimizer", optimizer).options.optim for optimizer in ("adamw", "sgd"))
    assert (adamw.lr_policy, adamw.learning_rate) == ("cosine", 0.006)
    assert (sgd.lr_policy, sgd.learning_rate) == ("constant", 0.005)


@pytest.mark.parametrize("name", ["yolov4-tiny", "yolov4-pico"])
@pytest.mark.parametrize("policy", [[], ["--lr-policy", "steps"]])
def test_the_schedule_of_a_cfg_is_replaced_or_typed_again(scenes: Path, name: str, policy: list[str]) -> None:
    job = parse_job(["--data", str(scenes), "--cfg", name, "--epochs", "9", *policy])
    assert make_schedule(job.options, job.plan, total_steps=90).policy == (policy or ["", "cosine"])[1]


def test_what_is_typed_goes_before_the_recipe(parse) -> None:
    optim = parse(
        "--learning-rate", "0.01", "--lr-policy", "poly", "--batch-size", "8", "--subdivisions", "4"
    ).options.optim
    assert (optim.learning_rate, optim.lr_policy, optim.batch_size, optim.subdivisions) == (0.01, "poly", 8, 4)


@pytest.mark.parametrize(
    ("batch", "subdivisions", "expected"),
    [
        (64, 8, (16, 2)),  # yolov4's: eight images in a forward
        (64, 1, (16, 1)),
        (32, 1, (16, 1)),
        (16, 4, (16, 4)),
        (4, 2, (4, 2)),
        (1, 1, (16, 1)),  # written for detection
        (64, 64, (16, 16)),
    ],
)
def test_a_forward_has_at_most_the_images_of_the_cfg(
    scenes: Path, tmp_path: Path, batch: int, subdivisions: int, expected: tuple[int, int]
) -> None:
    path = tmp_path / "other.cfg"
    path.write_text(
        TOY_CFG.replace("batch=4", f"batch={batch}").replace("subdivisions=2", f"subdivisions={subdivisions}")
    )
    optim = parse_job(["--data", str(scenes), "--cfg", str(path)]).options.optim
    assert (optim.batch_size, optim.subdivisions) == expected


@pytest.mark.parametrize(
    ("images", "cfg_steps", "steps", "optimizer"),
    [
        (205, 500_500, 3843, "adamw"),  # 300 epochs
        (12, 500_500, 1000, "adamw"),
        (205, 1000, 1000, "adamw"),
        (118_000, 500_500, 500_500, "sgd"),
        (5000, 500_500, 93_750, "adamw"),
    ],
)
def test_without_a_typed_length_a_cfg_made_for_coco_is_cut(
    images: int, cfg_steps: int, steps: int, optimizer: str
) -> None:
    optim = OptimOptions(max_steps=cfg_steps, batch_size=16)
    assert usual_steps(optim, images) == steps
    assert choose_optimizer(TrainOptions(optim=optim), {}, images)[0] == optimizer


@pytest.mark.parametrize(
    ("images", "length", "batch"),
    [
        (205, {"epochs": 12}, 8),
        (205, {"epochs": 40}, 8),
        (205, {"epochs": 100}, 16),
        (205, {"max_steps": 20}, 16),  # as many steps whatever the batch
        (SHORT * 16, {"epochs": 1}, 16),
        (SHORT * 16 - 1, {"epochs": 1}, 8),
    ],
)
def test_few_steps_make_a_smaller_batch(images: int, length: dict[str, int], batch: int) -> None:
    net = NetSpec(width=32, height=32, batch=64, subdivisions=8)
    options = TrainOptions(optim=OptimOptions(batch_size=64, subdivisions=8, **length))
    assert adamw_recipe(options, {}, net, images)["batch_size"] == batch


def test_typed_subdivisions_that_do_not_divide_the_batch_raise_it(parse) -> None:
    assert parse("--subdivisions", "32").options.optim.batch_size == 32
    assert parse("--subdivisions", "3").options.optim.batch_size == 6


@given(batch=st.integers(1, 256))
@pytest.mark.parametrize(("weights", "rate"), [(None, SCRATCH_RATE), ("some.pt", FINE_TUNING_RATE)])
def test_the_rate_follows_the_root_of_the_batch(weights: str | None, rate: float, batch: int) -> None:
    options = TrainOptions(weights=weights, optim=OptimOptions(batch_size=batch))
    recipe = adamw_recipe(options, {"batch_size": batch}, NetSpec(width=32, height=32, batch=64, subdivisions=8), 256)
    assert recipe["learning_rate"] == pytest.approx(rate * (batch / BATCH) ** 0.5, rel=0.005)
    assert batch % recipe["subdivisions"] == 0 and batch // recipe["subdivisions"] <= 8


def test_a_set_smaller_than_a_batch_has_the_rate_of_the_batches_it_makes() -> None:
    net = NetSpec(width=32, height=32, batch=64, subdivisions=8)
    rates = [adamw_recipe(TrainOptions(), {"batch_size": 16}, net, images)["learning_rate"] for images in (1, 4, 16)]
    assert rates == [SCRATCH_RATE / 4, SCRATCH_RATE / 2, SCRATCH_RATE]


@given(images=st.integers(1, 300), most_images=st.integers(1, 300))
def test_fewest_parts_divide_and_fit(images: int, most_images: int) -> None:
    parts = fewest_parts(images, most_images=most_images)
    assert images % parts == 0 and images // parts <= most_images
    assert not any(images % fewer == 0 and images // fewer <= most_images for fewer in range(1, parts))


@given(images=st.integers(1, 1000), batch=st.integers(1, 64), epochs=st.integers(1, 50))
def test_planned_steps_are_whole_batches(images: int, batch: int, epochs: int) -> None:
    steps = planned_steps(OptimOptions(epochs=epochs, batch_size=batch), images)
    assert steps == epochs * max(1, images // batch)
    assert planned_steps(OptimOptions(max_steps=7, batch_size=batch), images) == 7


@pytest.mark.parametrize(
    ("classes", "rate"), [(tuple(map(str, range(10))), KNOWN_RATE), (tuple(map(str, range(9))), FINE_TUNING_RATE)]
)
def test_weights_that_know_all_classes_are_changed_gently(
    scenes: Path, toy_cfg: str, tmp_path: Path, classes: tuple[str, ...], rate: float
) -> None:
    plan, norm = load_plan(toy_cfg, classes=len(classes)), resolve_norm(NormOptions())
    weights = Network(plan, norm_factory(norm)).state_dict()
    make_checkpoint(plan, norm, weights, class_names=classes, letterbox=True).to_file(tmp_path / "w.pt")
    job = parse_job(["--data", str(scenes), "--weights", str(tmp_path / "w.pt"), "--batch-size", "16"])
    assert job.options.optim.learning_rate == rate


@pytest.mark.parametrize(
    ("norm", "is_fixed"),
    [
        (NormOptions(norm="bn"), False),
        (NormOptions(norm="frozen"), True),
        (NormOptions(norm="frozen", norm_heads="cbn"), True),
        (NormOptions(norm="cbn", norm_eval=True), True),
        (NormOptions(norm="gn", norm_heads="cbn"), False),
        (NormOptions(norm="auto"), False),
    ],
)
def test_the_rate_is_lower_where_a_part_has_fixed_statistics(norm: NormOptions, is_fixed: bool):
    text = "[net]\nwidth=32\nheight=32\n[conv]\nbatch_normalize=1\nfilters=8\n"
    assert has_fixed_statistics(norm, parse_plan(text, path="a.cfg")) == is_fixed
    assert has_fixed_statistics(NormOptions(), parse_plan(text + "norm=frozen\n", path="a.cfg"))
    options, net = TrainOptions(weights="x.pt"), NetSpec(width=32, height=32)
    rates = [adamw_recipe(options, {}, net, 256, fixed_statistics=fixed)["learning_rate"] for fixed in (False, True)]
    assert rates[1] == pytest.approx(rates[0] / 4)
