"""One optimizer step, through out-of-memory errors, NaN and Inf."""

from __future__ import annotations

import copy
import math
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cfg.plan import Node, Plan, parse_plan
from engine.amp import MixedPrecision
from engine.not_finite import NotFinite
from engine.oom_recovery import OutOfMemoryRecovery
from engine.step import TrainStep
from engine.training_state import norm_histories
from models.network import Network, parameter_groups
from models.norms.factory import NormFactory, norm_factory
from models.norms.options import NormOptions
from models.yolo.head import RawHead
from models.yolo.loss import LossOptions, LossTerms, YoloLoss
from tests.e2e.conftest import TOY_CFG
from utils.clock import BatchClock
from utils.errors import UserError
from utils.structures import Batch, Targets

WITH_DROPOUT = TOY_CFG.replace("[yolo]", "[yolo]", 1).replace(
    "[convolutional]\nfilters=45", "[dropout]\nprobability=.3\n[convolutional]\nfilters=45"
)


class Stock(NormFactory):
    """torch's own batch norm, whatever the layer."""

    def for_layer(self, plan: Plan, node: Node) -> NormFactory:
        return self

    def __call__(self, conv: nn.Conv2d) -> nn.Module:
        return nn.BatchNorm2d(conv.out_channels)


NORMS: dict[str, NormFactory] = {
    **{name: norm_factory(NormOptions(norm=name)) for name in ("bn", "cmbn", "gn", "mabn")},
    "cbn": norm_factory(NormOptions(norm="cbn:burn_in_steps=0")),
    "domains": norm_factory(NormOptions(norm="cbn:burn_in_steps=0", domain_statistics="own"), domains=2),
    "stock": Stock(options=NormOptions()),
}


def batch_of(images: int, seed: int = 0) -> Batch:
    random = torch.Generator().manual_seed(seed)
    corners = torch.rand(images, 2, generator=random) * 30
    targets = Targets(
        boxes=torch.cat((corners, corners + 8 + 20 * torch.rand(images, 2, generator=random)), 1),
        labels=torch.randint(10, (images,), generator=random),
        image_index=torch.arange(images),
        is_crowd=torch.zeros(images, dtype=torch.bool),
    )
    return Batch(
        images=torch.rand(images, 3, 64, 64, generator=random),
        targets=targets,
        image_ids=tuple(range(images)),
        paths=tuple(f"p{index}.jpg" for index in range(images)),
        placements=(None,) * images,
        domains=tuple(index % 2 for index in range(images)),
    )


def step_of(norm: str, *, subdivisions: int, lines: list[str] | None = None, optimizer: str = "sgd") -> TrainStep:
    torch.manual_seed(0)
    network = Network(parse_plan(WITH_DROPOUT, path="toy.cfg"), NORMS[norm]).train()
    say = (lines if lines is not None else []).append
    groups = parameter_groups(network, weight_decay=5e-4)
    return TrainStep(
        network=network,
        forward=network,
        criterion=YoloLoss(LossOptions()),
        optimizer=(
            torch.optim.AdamW(groups, lr=0.003)
            if optimizer == "adamw"
            else torch.optim.SGD(groups, lr=0.01, momentum=0.9)
        ),
        precision=MixedPrecision("off", torch.device("cpu")),
        clock=BatchClock(network),
        recovery=OutOfMemoryRecovery(network, subdivisions=subdivisions, communicates=False, say=say),
        clip_norm=None,
    )


def run_out_of_memory(step: TrainStep, *, at_mini_batch: int, most_images: int, error: Exception) -> None:
    """From now on, in the middle of the forward of that mini-batch, while it has more images."""
    seen: list[int] = []

    def fail(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if len(inputs[0]) > most_images:
            seen.append(len(inputs[0]))
            if len(seen) % at_mini_batch == 0:
                raise error

    step.network.layers[1].register_forward_pre_hook(fail)


def everything(step: TrainStep) -> dict[str, Any]:
    moments = {
        f"{index}.{name}": value
        for index, state in step.optimizer.state_dict()["state"].items()
        for name, value in state.items()
    }
    return {**step.network.state_dict(), **norm_histories(step.network), **moments, "random": torch.get_rng_state()}


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("norm", NORMS)
def test_after_running_out_of_memory_the_update_is_that_of_finer_mini_batches(norm: str, optimizer: str) -> None:
    """From a state with history: one step is behind both. The optimizer's moments are compared, too."""
    lines: list[str] = []
    troubled = step_of(norm, subdivisions=2, lines=lines, optimizer=optimizer)
    untroubled = step_of(norm, subdivisions=2, optimizer=optimizer)
    ends = []
    for step in (troubled, untroubled):
        torch.manual_seed(1)
        losses = [step(batch_of(4, seed=0))]
        if step is troubled:
            run_out_of_memory(step, at_mini_batch=2, most_images=1, error=torch.OutOfMemoryError("CUDA out of memory"))
        else:
            step.recovery.subdivisions = 4
        losses += [step(batch_of(4, seed=seed)) for seed in (1, 2)]
        ends.append((everything(step), torch.stack(losses)))
    assert troubled.recovery.subdivisions == 4 and "--subdivisions 4" in lines[0]
    (found, found_losses), (expected, expected_losses) = ends
    assert torch.equal(found_losses, expected_losses)
    assert found.keys() == expected.keys()
    for name in expected:
        assert torch.equal(found[name], expected[name]), name


@pytest.mark.parametrize(("images", "tries"), [(8, 3), (6, 3), (5, 1)])
def test_it_tries_until_single_images_and_then_names_the_remedy(images: int, tries: int) -> None:
    """Each time the next number of mini-batches that divides the batch."""
    lines: list[str] = []
    step = step_of("cmbn", subdivisions=1, lines=lines)
    before = copy.deepcopy(step.network.state_dict())
    cpu_error = RuntimeError(
        "[enforce fail at alloc_cpu.cpp:128] . DefaultCPUAllocator: can't allocate memory: you ..."
    )
    run_out_of_memory(step, at_mini_batch=1, most_images=0, error=cpu_error)
    with pytest.raises(UserError, match="one image per forward"):
        step(batch_of(images))
    assert step.recovery.subdivisions == images and len([line for line in lines if "going on" in line]) == tries
    assert step.clock.step == 0
    for name, tensor in step.network.state_dict().items():
        assert torch.equal(tensor, before[name]), name


@pytest.mark.parametrize("place", ["loss", "backward"])
def test_nothing_of_a_failed_attempt_is_in_memory_afterwards(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither when the cache is emptied nor in a later forward; and nothing of a mini-batch in the next forward."""
    step, alive = step_of("cmbn", subdivisions=1), []
    outputs: list[weakref.ref[Tensor]] = []

    def out_of_memory(*_: object) -> None:
        if len(alive) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")

    def count(*_: object) -> None:
        alive.append(sum(output() is not None for output in outputs))

    def after_forward(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        outputs.append(weakref.ref(output))
        if place == "backward":
            output.register_hook(out_of_memory)

    def criterion(heads: Sequence[RawHead], targets: Targets) -> LossTerms:
        if place == "loss":
            out_of_memory()
        return YoloLoss(LossOptions())(heads, targets)

    monkeypatch.setattr(step, "criterion", criterion)
    monkeypatch.setattr("engine.oom_recovery.empty_cache", count)
    step.network.layers[0].register_forward_pre_hook(count)
    for layer in list(step.network.layers)[:4]:
        layer.register_forward_hook(after_forward)
    step(batch_of(4))
    assert step.recovery.subdivisions == 2
    assert alive == [0, 0, 0, 0]


def test_another_error_is_not_taken_for_a_full_memory() -> None:
    step = step_of("bn", subdivisions=1)
    run_out_of_memory(step, at_mini_batch=1, most_images=0, error=RuntimeError("shapes do not match"))
    with pytest.raises(RuntimeError, match="shapes"):
        step(batch_of(2))


def nan_in_label(step: TrainStep, batch: Batch) -> None:
    batch.targets.boxes[2, 1] = math.nan


def nan_in_pixel(step: TrainStep, batch: Batch) -> None:
    batch.images[2, 0, 5, 5] = math.inf


def nan_in_layer(step: TrainStep, batch: Batch) -> None:
    """What the second convolution makes of the third image."""

    def spoil(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        third = batch.images[2:3]
        is_it = torch.tensor([torch.equal(image, third[0]) for image in seen[0]])
        return torch.where(is_it.view(-1, 1, 1, 1), math.nan, output)

    seen: list[Tensor] = []
    step.network.layers[0].register_forward_pre_hook(lambda module, inputs: seen.insert(0, inputs[0]))
    step.network.layers[1].conv.register_forward_hook(spoil)


def nan_in_weights(step: TrainStep, batch: Batch) -> None:
    with torch.no_grad():
        step.network.layers[1].conv.weight[0, 0] = math.nan


def nan_in_gradient(step: TrainStep, batch: Batch) -> None:
    step.network.layers[1].conv.weight.register_hook(lambda gradient: gradient * math.nan)


CORRECT = ": correct that file, and go on from last.pt with --resume$"
DIVERGED = (
    ", the training has diverged: start again with .*--learning-rate auto or --clip-norm 10; or go on from last.pt, .* "
    "look at the images of this batch: p0.jpg, p1.jpg, p2.jpg, p3.jpg$"
)


@pytest.mark.parametrize(
    ("plant", "words"),
    [
        (nan_in_label, f"a box of p2.jpg is not finite{CORRECT}"),
        (nan_in_pixel, f"a pixel of p2.jpg is not finite{CORRECT}"),
        (nan_in_layer, rf"the output of layers.1.conv \(Conv2d\) is not finite for p2.jpg{DIVERGED}"),
        (nan_in_weights, f"the weights layers.1.conv.weight are not finite{DIVERGED}"),
        (nan_in_gradient, f"the gradient of layers.1.conv.weight is not finite{DIVERGED}"),
    ],
)
@pytest.mark.parametrize("norm", ["bn", "cmbn", "gn"])
def test_nan_is_named_before_it_spoils_the_weights(
    norm: str, plant: Callable[[TrainStep, Batch], None], words: str
) -> None:
    step, batch = step_of(norm, subdivisions=2), batch_of(4)
    plant(step, batch)
    before = copy.deepcopy(list(step.network.parameters()))
    with pytest.raises(NotFinite, match=f"^step 1: {words}"):
        step(batch)
    assert step.clock.step == 0
    for now, then in zip(step.network.parameters(), before, strict=True):
        assert torch.equal(now.nan_to_num(), then.nan_to_num())


def test_a_loss_scale_is_lowered_but_not_for_ever() -> None:
    """An overflow of float16 ends with a lower scale, a gradient that is not finite at any scale does not."""
    step, batch = step_of("bn", subdivisions=1), batch_of(2)
    step.precision.scaler = torch.amp.GradScaler("cpu", init_scale=4.0)  # what fp16 has on a GPU
    nan_in_gradient(step, batch)
    before = copy.deepcopy(list(step.network.parameters()))
    for scale in (2, 1, 0.5):
        step(batch)
        assert step.precision.scaler.get_scale() == scale
    with pytest.raises(NotFinite, match=r"step 4: the gradient of layers.1.conv.weight is not finite"):
        step(batch)
    for now, then in zip(step.network.parameters(), before, strict=True):
        assert torch.equal(now, then)


def test_the_gradient_does_not_depend_on_how_the_batch_is_cut() -> None:
    whole, parts = step_of("gn", subdivisions=1), step_of("gn", subdivisions=3)
    for step in (whole, parts):
        step.network.layers[2].p = 0.0  # no dropout
        step(batch_of(4))
    for one, other in zip(whole.network.parameters(), parts.network.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("scale", [None, 1024.0])
@pytest.mark.parametrize("clip_norm", [1e-3, 1e6])
def test_the_norm_of_the_gradient_is_clipped(clip_norm: float, scale: float | None) -> None:
    clipped, plain = step_of("gn", subdivisions=2), step_of("gn", subdivisions=2)
    clipped.clip_norm = clip_norm
    if scale is not None:
        clipped.precision.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    gradients = []
    for step in (clipped, plain):
        torch.manual_seed(1)
        step(batch_of(4))
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in step.network.parameters()]))
    factor = min(1.0, clip_norm / gradients[1].norm().item())
    torch.testing.assert_close(gradients[0], factor * gradients[1], rtol=1e-4, atol=1e-7)
