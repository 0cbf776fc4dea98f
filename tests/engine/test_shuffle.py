"""Images shuffled among two ranks, against one process that runs each rank's assigned images."""

from __future__ import annotations

import copy
import functools
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from cfg.plan import parse_plan
from engine.build import make_forward, make_step
from engine.shuffle import ShuffledForward
from models.network import Network
from models.norms.factory import norm_factory
from models.norms.options import NormOptions
from options import OptimOptions, TrainOptions
from tests.both_ranks import WORLD, of_ranks, on_both_ranks, run_as_rank, verdicts  # noqa: F401
from utils import ranks
from utils.clock import BatchClock
from utils.errors import UserError
from utils.seed import seed_everything
from utils.structures import Batch, Targets

TWO_HEADS = """
[net]
width=16
height=16
[convolutional]
batch_normalize=1
filters=6
size=3
stride=2
pad=1
activation=leaky
[convolutional]
filters=14
activation=linear
[yolo]
mask=0,1
anchors=8,12,16,24
classes=2
[route]
layers=0
[convolutional]
batch_normalize=1
filters=8
size=3
stride=2
pad=1
activation=mish
[convolutional]
filters=14
activation=linear
[yolo]
mask=0,1
anchors=8,12,16,24
classes=2
"""
STEPS = (2, 1, 3)  # mini-batches of each optimizer step
IMAGES = 4  # of each rank in each mini-batch
assert_close = functools.partial(torch.testing.assert_close, rtol=1e-9, atol=1e-10)


def make_network(norm: str) -> Network:
    torch.manual_seed(0)
    return Network(parse_plan(TWO_HEADS, path="two.cfg"), norm_factory(NormOptions(norm=norm))).double().train()


def images_of(rank: int, mini_batch: int) -> Tensor:
    """Of one scene: ranks differ more than the images of one."""
    generator = torch.Generator().manual_seed(100 * mini_batch + rank)
    return torch.randn(IMAGES, 3, 16, 16, generator=generator, dtype=torch.float64) * (1 + 2 * rank) + 3 * rank


def factors(rank: int, mini_batch: int, head: int, like: Tensor) -> Tensor:
    """The gradient of the loss to the logits of an image: its own, wherever it is computed."""
    generator = torch.Generator().manual_seed(1000 + 100 * mini_batch + 10 * head + rank)
    return torch.randn(IMAGES, *like.shape[1:], generator=generator, dtype=torch.float64)


@dataclass(kw_only=True)
class Training:
    """Of each mini-batch: what the network was given, logits by head, the images' gradients; of each step: weights'."""

    given: list[Tensor] = field(default_factory=list)
    logits: list[tuple[Tensor, ...]] = field(default_factory=list)
    image_gradients: list[Tensor] = field(default_factory=list)
    gradients: list[dict[str, Tensor]] = field(default_factory=list)
    network: Network


@functools.cache
def shuffled(norm: str, rank: int, seed: int = 0) -> Training:
    """Train as a page does, on images that stay the property of their rank; steps of plain SGD."""
    network = make_network(norm)
    forward = ShuffledForward(network, seed)
    clock, done, number = BatchClock(forward), Training(network=network), 0
    network.register_forward_pre_hook(lambda module, inputs: done.given.append(inputs[0].detach().clone()))
    for count in STEPS:
        network.zero_grad()
        for _ in clock.minibatches(range(count)):
            images = images_of(rank, number).requires_grad_()
            heads = forward(images)
            loss = sum((h.logits * factors(rank, number, i, h.logits)).sum() for i, h in enumerate(heads))
            loss.backward()
            done.logits.append(tuple(head.logits.detach() for head in heads))
            done.image_gradients.append(images.grad)
            number += 1
        ranks.average_gradients(network.parameters())
        finish_step(done)
        clock.stepped()
    return done


def finish_step(done: Training) -> None:
    done.gradients.append({name: p.grad.clone() for name, p in done.network.named_parameters()})
    with torch.no_grad():
        for parameter in done.network.parameters():
            parameter.sub_(0.02 * parameter.grad)


def origins(given: Tensor, number: int) -> list[tuple[int, int]]:
    """Rank and place of the image that each of the network's inputs is, found by its pixels."""
    own = {(rank, place): image for rank in range(WORLD) for place, image in enumerate(images_of(rank, number))}
    return [next(key for key, image in own.items() if torch.equal(image, pixels)) for pixels in given]


@functools.cache
def defined(norm: str, rank: int) -> list[Training]:
    """The definition: one process trains a network per rank, with equal weights, on what that rank was given."""
    given = [of_ranks(each) for each in shuffled(norm, rank).given]
    trainings = [Training(network=make_network(norm)) for _ in range(WORLD)]
    clocks, number = [BatchClock(each.network) for each in trainings], 0
    for count in STEPS:
        for training in trainings:
            training.network.zero_grad()
        rounds = [clock.minibatches(range(count)) for clock in clocks]
        for _ in zip(*rounds, strict=True):
            logits = {}
            gradients = {}
            for each, training in enumerate(trainings):
                images = given[number][each].clone().requires_grad_()
                at = origins(images, number)
                heads = training.network(images)
                loss = torch.zeros((), dtype=torch.float64)
                for i, head in enumerate(heads):
                    of_each = torch.stack([factors(r, number, i, head.logits)[place] for r, place in at])
                    loss = loss + (head.logits * of_each).sum()
                loss.backward()
                for n, key in enumerate(at):
                    logits[key] = [head.logits[n].detach() for head in heads]
                    gradients[key] = images.grad[n]
            for each, training in enumerate(trainings):
                mine = [logits[each, place] for place in range(IMAGES)]
                training.logits.append(tuple(torch.stack(of_head) for of_head in zip(*mine, strict=True)))
                training.image_gradients.append(torch.stack([gradients[each, place] for place in range(IMAGES)]))
            number += 1
        both = [dict(training.network.named_parameters()) for training in trainings]
        for name in both[0]:
            mean = sum(parameters[name].grad for parameters in both) / WORLD
            for parameters in both:
                parameters[name].grad = mean.clone()
        for training in trainings:
            finish_step(training)
    return trainings


NORMS = ("bn", "cmbn", "cmbn:carry,burn_in_steps=0,positions=0", "cbn:window=3,burn_in_steps=0,positions=0", "gn")


@on_both_ranks(*NORMS)
def test_heads_return_to_their_images_and_are_those_of_the_assignment(rank, case):
    assert_close(shuffled(case, rank).logits, defined(case, rank)[rank].logits)


@on_both_ranks(*NORMS)
def test_gradients_of_weights_and_images_are_those_of_the_definition(rank, case):
    got, want = shuffled(case, rank), defined(case, rank)[rank]
    assert_close(got.gradients, want.gradients)
    assert_close(got.image_gradients, want.image_gradients)


@on_both_ranks(*NORMS)
def test_running_statistics_and_histories_are_those_of_the_images_that_a_rank_was_given(rank, case):
    got, want = shuffled(case, rank).network, defined(case, rank)[rank].network
    assert_close(dict(got.named_buffers()), dict(want.named_buffers()))


@on_both_ranks("bn")
def test_every_image_is_computed_once_and_ranks_have_equal_shares(rank, case):
    for number, own in enumerate(shuffled(case, rank).given):
        assert len(own) == IMAGES
        everyone = [key for given in of_ranks(own) for key in origins(given, number)]
        assert sorted(everyone) == [(r, place) for r in range(WORLD) for place in range(IMAGES)]


def assignments(training: Training) -> list[list[tuple[int, int]]]:
    return [origins(given, number) for number, given in enumerate(training.given)]


@on_both_ranks("bn")
def test_the_assignment_follows_seed_step_and_mini_batch_and_nothing_else(rank, case):
    """Two mini-batches of a step, and the first ones of two steps, are shuffled in different ways; a rerun is equal."""
    first = assignments(shuffled(case, rank))
    assert first[0] != first[1] and first[0] != first[2]
    assert assignments(shuffled("cmbn", rank)) == first
    assert assignments(shuffled(case, rank, seed=1)) != first


@on_both_ranks("bn")
def test_a_clock_that_begins_at_a_later_step_shuffles_as_one_that_came_there(rank, case):
    """As after --resume, without the forwards of before."""
    network, given = make_network(case), []
    forward = ShuffledForward(network, 0)
    network.register_forward_pre_hook(lambda module, inputs: given.append(inputs[0].detach()))
    for index in BatchClock(forward, step=2).minibatches(range(3)):
        forward(images_of(rank, sum(STEPS[:2]) + index))
    assert all(map(torch.equal, given, shuffled(case, rank).given[-3:]))


@on_both_ranks("bn", "cmbn")
def test_bfloat16_heads_return_to_their_images(rank, case):
    """The last convolution alone: its outputs are one image's own."""
    network = make_network(case).float().eval()
    forward = ShuffledForward(network, 0)
    images = images_of(rank, 0).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        heads, alone = forward(images), network(images)
    for got, want in zip(heads, alone, strict=True):
        assert got.logits.dtype == torch.bfloat16 and got.stride_px == want.stride_px
        torch.testing.assert_close(got.logits, want.logits)


@on_both_ranks("bn")
def test_images_of_one_rank_all_may_go_to_another(rank, case):
    """Or none of them: counts of 0 in a message."""
    for step in range(12):
        forward = ShuffledForward(copy.deepcopy(make_network(case)).eval(), 0)
        for _ in BatchClock(forward, step=step).minibatches(range(1)):
            heads = forward(images_of(rank, 0)[:1])
        assert_close(heads[0].logits, forward.network(images_of(rank, 0)[:1])[0].logits)
    assert dist.get_world_size() == WORLD


@on_both_ranks("bn", "cmbn", "cbn:window=3,burn_in_steps=0")
def test_a_batch_that_ran_out_of_memory_is_shuffled_again_as_if_it_had_been_cut_finer_from_the_start(rank, case):
    """Of a job of several ranks the error is the end; --resume goes on from here with finer mini-batches."""
    ends = []
    for is_troubled in (True, False):
        seed_everything(0)
        network = make_network(case).float()
        options = TrainOptions(
            norm=NormOptions(norm=case, shuffle_bn=True), optim=OptimOptions(optimizer="sgd", amp="off")
        )
        step = make_step(options, network, make_forward(options, network), print)
        step.set_rate(0.01)
        batch = batch_of(rank)
        if is_troubled:
            fail = network.layers[-2].register_forward_pre_hook(run_out_of_memory)
            with pytest.raises(UserError, match="go on with --resume and --subdivisions 2"):
                step(batch)
            fail.remove()
        step.recovery.subdivisions = 2
        losses = [step(batch) for _ in range(2)]
        ends.append((losses, [*network.parameters(), *network.buffers()]))
    assert all(map(torch.equal, ends[0][0], ends[1][0]))
    assert all(map(torch.equal, ends[0][1], ends[1][1]))


def run_out_of_memory(module: torch.nn.Module, inputs: tuple[Tensor, ...]) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory")


def batch_of(rank: int) -> Batch:
    """One object an image."""
    corners = torch.arange(IMAGES)[:, None] + torch.tensor([[1.0, 2.0]]) + rank
    return Batch(
        images=images_of(rank, 0).float(),
        targets=Targets(
            boxes=torch.cat((corners, corners + 8), dim=1),
            labels=torch.arange(IMAGES) % 2,
            image_index=torch.arange(IMAGES),
            is_crowd=torch.zeros(IMAGES, dtype=torch.bool),
        ),
        image_ids=tuple(range(IMAGES)),
        paths=("",) * IMAGES,
        placements=(None,) * IMAGES,
    )


if __name__ == "__main__":
    run_as_rank(int(sys.argv[1]), Path(sys.argv[2]))
