"""Two ranks with parts of each mini-batch, against one process that has all of it."""

from __future__ import annotations

import copy
import dataclasses
import functools
import sys
from collections.abc import Iterable
from contextlib import nullcontext
from pathlib import Path
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from models.blocks import ConvNormAct
from models.norms import across_ranks
from models.norms.adopt import adopt
from models.norms.factory import norm_factory
from models.norms.moments import Moments
from models.norms.options import NormOptions
from models.norms.recalibrate import recalibrate
from models.recompute import checkpointed
from tests.both_ranks import WORLD, of_ranks, on_both_ranks, run_as_rank, verdicts  # noqa: F401
from tests.models.norms.kinds import tuned
from utils.clock import BatchClock

# --- one story, told by two ranks or by one process ----------------------------------------------------------

WINDOW = "window=5,burn_in_steps=0,positions=0,sync"
KINDS = {
    "syncbn": NormOptions(norm="syncbn"),
    "cmbn-share": NormOptions(norm="cmbn:gradient=share,sync"),
    "cmbn-weights": NormOptions(norm="cmbn:positions=0,sync"),
    "cmbn-carried": NormOptions(norm="cmbn:carry,burn_in_steps=0,positions=0,sync"),
    "cbn-share": NormOptions(norm=f"cbn:gradient=share,{WINDOW}"),
    "cbn-weights": NormOptions(norm=f"cbn:{WINDOW}"),
    "cbn-renorm": NormOptions(norm=f"cbn:gradient=renorm,{WINDOW}"),
    "cbn-none": NormOptions(norm=f"cbn:estimator=none,gradient=share,{WINDOW}"),
    "cbn-taylor": NormOptions(norm=f"cbn:estimator=taylor,{WINDOW}"),
    "cbn-lite": NormOptions(norm=f"cbn-lite:refresh_steps=2,{WINDOW}"),
    "cbn-lite-renorm": NormOptions(norm=f"cbn-lite:refresh_steps=2,gradient=renorm,{WINDOW}"),
}
STEPS = (  # images of rank 0 and rank 1 in each mini-batch: unequal parts, mini-batches and batches
    ((1, 3), (2, 1)),
    ((3, 2),),
    ((1, 1), (2, 5), (4, 1)),
    ((2, 1), (1, 2)),
)


def alone(options: NormOptions) -> NormOptions:
    """The same norm, of a process that knows no others."""
    if options.spec.name == "syncbn":
        return NormOptions(norm="bn:running=pooled")
    return tuned(options, sync=False)


class Net(nn.Module):
    """Two branches of one shape: messages of the one taken for the other's would fit, and be wrong."""

    def __init__(self, options: NormOptions) -> None:
        super().__init__()
        torch.manual_seed(0)
        make = functools.partial(ConvNormAct.make, norm=norm_factory(options), activation=nn.Mish())
        self.stem = make(4, 8, 3, padding=1)
        self.left = make(8, 8, 3, padding=1, groups=2)
        self.right = make(8, 8, 1)
        self.head = make(16, 6, 3, stride=2, padding=1)
        for layer in (self.stem, self.left, self.right, self.head):
            nn.init.uniform_(layer.norm.weight, 0.5, 1.5)
            nn.init.uniform_(layer.norm.bias, -0.5, 0.5)

    def forward(self, x: Tensor) -> Tensor:
        stem = self.stem(x)
        return self.head(torch.cat((self.left(stem), self.right(stem)), dim=1))


class CheckpointedNet(Net):
    """Forwards run again within the backward, and with them their collectives."""

    def forward(self, x: Tensor) -> Tensor:
        stem = checkpointed(self.stem, x, layers=[self.stem])
        sides = [checkpointed(side, stem, layers=[side]) for side in (self.left, self.right)]
        return checkpointed(self.head, torch.cat(sides, dim=1), layers=[self.head])


def make_images(sizes: tuple[int, int], seed: int) -> Tensor:
    """Of both ranks, in rank order; no two of one mean and deviation."""
    count = sum(sizes)
    generator = torch.Generator().manual_seed(seed)
    spread = torch.rand(2, count, 1, 1, 1, generator=generator, dtype=torch.float64) + 0.5
    return torch.randn(count, 4, 6, 5, generator=generator, dtype=torch.float64) * spread[0] + spread[1]


def part_of(union: Tensor, sizes: tuple[int, int], rank: int | None) -> Tensor:
    return union if rank is None else union.split(sizes)[rank]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Story:
    """What a training gave: of each mini-batch, of each step, and in the end."""

    outputs: list[Tensor] = dataclasses.field(default_factory=list)
    input_gradients: list[Tensor] = dataclasses.field(default_factory=list)
    gradients: list[dict[str, Tensor]] = dataclasses.field(default_factory=list)  # by parameter, of all ranks
    running: list[dict[str, Tensor]] = dataclasses.field(default_factory=list)
    net: nn.Module

    def part(self, rank: int) -> Story:
        """What one of two ranks should have had of the whole."""
        sizes = [sizes for batch in STEPS for sizes in batch]
        outputs, gradients = (
            [part_of(union, of, rank) for union, of in zip(unions, sizes, strict=True)]
            for unions in (self.outputs, self.input_gradients)
        )
        return dataclasses.replace(self, outputs=outputs, input_gradients=gradients)


def tell(net: nn.Module, rank: int | None, *, announced: bool = True, parallel: bool = False) -> Story:
    """Train over STEPS as one rank of two, or with rank=None as the only process.

    The loss is the sum over all ranks' elements of g * output. Ranks add up their gradients, or leave it to DDP
    (parallel), so that the weights of both and of the only process take the same steps.
    """
    story, clock, seed = Story(net=net), BatchClock(net), 0
    # A bucket a parameter, so that DDP's messages come between the norms'.
    wrapped = DistributedDataParallel(net, broadcast_buffers=False, bucket_cap_mb=1e-4) if parallel else net
    for batch in STEPS:
        net.zero_grad()
        for index, sizes in enumerate(clock.minibatches(batch) if announced else batch):
            x = part_of(make_images(sizes, seed), sizes, rank).clone().requires_grad_()
            with nullcontext() if not parallel or index + 1 == len(batch) else wrapped.no_sync():
                out = wrapped(x)
                (out * part_of(factors(out, sizes, seed), sizes, rank)).sum().backward()
            story.outputs.append(out.detach())
            story.input_gradients.append(x.grad)
            seed += 1
        used = {name: parameter for name, parameter in net.named_parameters() if parameter.grad is not None}
        for parameter in used.values():
            if parallel:
                parameter.grad.mul_(WORLD)  # DDP has left the mean over ranks
            elif rank is not None:
                dist.all_reduce(parameter.grad)
        story.gradients.append({name: parameter.grad.clone() for name, parameter in used.items()})
        story.running.append({name: value.clone() for name, value in net.state_dict().items() if "running" in name})
        step(used.values())
        clock.stepped()
    return story


def factors(out: Tensor, sizes: tuple[int, int], seed: int) -> Tensor:
    """g, of both ranks' outputs."""
    generator = torch.Generator().manual_seed(1000 + seed)
    return torch.randn(sum(sizes), *out.shape[1:], generator=generator, dtype=torch.float64)


@torch.no_grad()
def step(parameters: Iterable[nn.Parameter]) -> None:
    """Each moves by a twentieth of its length, so that a past without compensation is far off."""
    for parameter in parameters:
        parameter.sub_(0.05 * parameter.norm() * parameter.grad / parameter.grad.norm())


# Told once for all bodies that ask; both ranks tell, and remember, alike.
@functools.cache
def by_two(case: str, rank: int, announced: bool = True) -> Story:
    return tell(Net(KINDS[case]).double(), rank, announced=announced)


@functools.cache
def by_one(case: str, announced: bool = True) -> Story:
    return tell(Net(alone(KINDS[case])).double(), None, announced=announced)


assert_close = functools.partial(torch.testing.assert_close, rtol=1e-8, atol=1e-9)


def assert_same(got: Story, want: Story) -> None:
    assert_close(got.outputs, want.outputs)
    assert_close(got.input_gradients, want.input_gradients)
    assert_close(got.gradients, want.gradients)
    assert_close(got.running, want.running)


# --- with sync, two ranks are one process --------------------------------------------------------------------


@on_both_ranks(*KINDS)
def test_outputs_are_those_of_one_process(rank, case):
    assert_close(by_two(case, rank).outputs, by_one(case).part(rank).outputs)


@on_both_ranks(*KINDS)
def test_input_gradients_are_those_of_one_process(rank, case):
    assert_close(by_two(case, rank).input_gradients, by_one(case).part(rank).input_gradients)


@on_both_ranks(*KINDS)
def test_the_parameters_gradients_add_up_to_those_of_one_process(rank, case):
    assert_close(by_two(case, rank).gradients, by_one(case).gradients)


@on_both_ranks(*KINDS)
def test_running_statistics_are_those_of_one_process(rank, case):
    assert_close(by_two(case, rank).running, by_one(case).running)


@on_both_ranks(*KINDS)
def test_statistics_and_histories_are_the_same_bits_on_both_ranks(rank, case):
    """Or weights that are the same on both would be followed by networks that are not."""
    for name, buffer in by_two(case, rank).net.named_buffers():
        assert torch.equal(*of_ranks(buffer)), name


@on_both_ranks("syncbn", "cmbn-share", "cmbn-weights", "cbn-share", "cbn-lite")
def test_never_announced_two_ranks_are_batch_norm_of_one_process(rank, case):
    assert_same(by_two(case, rank, announced=False), by_one(case, announced=False).part(rank))


@on_both_ranks("syncbn", "cmbn-weights", "cmbn-carried", "cbn-weights", "cbn-lite")
def test_in_ddp_two_ranks_are_one_process(rank, case):
    """Gradients are averaged once per batch, while the norms speak in each mini-batch."""
    assert_same(tell(Net(KINDS[case]).double(), rank, parallel=True), by_one(case).part(rank))


@on_both_ranks("syncbn", "cmbn-weights", "cmbn-carried", "cbn-weights")
def test_forwards_made_again_in_the_backward_change_nothing(rank, case):
    assert_same(tell(CheckpointedNet(KINDS[case]).double(), rank), by_one(case).part(rank))


# --- parts and layers of all kinds ---------------------------------------------------------------------------


def block(options: NormOptions, size: int = 1) -> ConvNormAct:
    torch.manual_seed(0)
    made = ConvNormAct.make(4, 8, size, padding=size // 2, norm=norm_factory(options), activation=nn.Identity())
    nn.init.uniform_(made.norm.weight, 0.5, 1.5)
    return made


@on_both_ranks("syncbn", "cmbn-weights", "cbn-weights")
def test_ranks_may_have_images_of_different_sizes(rank, case):
    """Positions count, not images; down to a rank with one only, which has no variance of its own."""
    shapes = [[(1, 4, 1, 1), (2, 4, 5, 3)], [(1, 4, 7, 6), (1, 4, 2, 2)]]
    parts = [[torch.randn(shape, dtype=torch.float64) for shape in pair] for pair in shapes]
    ours, whole = block(KINDS[case]).double(), block(alone(KINDS[case])).double()
    # To a 1x1 convolution, images are positions in a row.
    unions = [torch.cat([x.transpose(0, 1).flatten(1) for x in pair], dim=1)[None, :, None] for pair in parts]
    for pair, union in zip(BatchClock(ours).minibatches(parts), BatchClock(whole).minibatches(unions), strict=True):
        out, want = ours(pair[rank]), whole(union)
        row = want.split([x.numel() // 4 for x in pair], dim=3)[rank]
        assert_close(out.transpose(0, 1).flatten(1), row[0, :, 0])
        out.square().sum().backward()
        want.square().sum().backward()
    for mine, theirs in zip(ours.parameters(), whole.parameters(), strict=True):
        dist.all_reduce(mine.grad)
        assert_close(mine.grad, theirs.grad)


@on_both_ranks("cmbn-weights")
def test_with_few_positions_the_added_gradient_is_orthogonal_to_each_filter(rank, case):
    """As that of true batch norm is: the covariance of all ranks is scaled to the variance of all ranks."""
    made = block(tuned(KINDS[case], positions=8), size=3).double()
    made.norm.eps = 0.0
    sizes = [(1, 3), (2, 1), (4, 1)]
    for seed, of in enumerate(BatchClock(made).minibatches(sizes)):
        made.zero_grad()
        out = made(part_of(make_images(of, seed), of, rank))
        (out * torch.randn_like(out)).sum().backward()
        dist.all_reduce(made.conv.weight.grad)
        weight, gradient = made.conv.weight.detach().flatten(1), made.conv.weight.grad.flatten(1)
        assert gradient.abs().min() > 0
        assert ((weight * gradient).sum(1) / weight.norm(dim=1) / gradient.norm(dim=1)).abs().max() < 1e-10


class IdleNet(Net):
    """With a layer that is never used, and one whose output is not."""

    def __init__(self, options: NormOptions) -> None:
        super().__init__(options)
        self.unused, self.unseen = block(options), block(options)

    def forward(self, x: Tensor) -> Tensor:
        self.unseen(x)
        return super().forward(x)


@on_both_ranks("syncbn", "cmbn-weights")
def test_layers_without_use_do_not_bring_the_ranks_out_of_step(rank, case):
    net = IdleNet(KINDS[case]).double()
    got, want = tell(net, rank), by_one(case).part(rank)
    assert_close(got.outputs, want.outputs)
    assert_close(got.input_gradients, want.input_gradients)
    assert_close(got.gradients, want.gradients)
    assert net.unused.norm.num_batches_tracked == 0
    assert net.unseen.norm.num_batches_tracked == len(STEPS)


@on_both_ranks("syncbn", "cmbn-share", "cmbn-weights", "cbn-weights", "cbn-renorm", "cbn-lite")
def test_bfloat16_stays_bfloat16_and_float32_statistics_are_the_same_bits(rank, case):
    net = Net(KINDS[case])
    clock = BatchClock(net)
    for batch in STEPS[:2]:
        for seed, sizes in enumerate(clock.minibatches(batch)):
            x = part_of(make_images(sizes, seed), sizes, rank).float().requires_grad_()
            with torch.autocast("cpu", dtype=torch.bfloat16):
                out = net(x)
            assert out.dtype == torch.bfloat16
            out.float().square().sum().backward()
            assert torch.isfinite(out).all() and torch.isfinite(x.grad).all()
        clock.stepped()
    assert all(torch.isfinite(parameter.grad).all() for parameter in net.parameters())
    for name, buffer in net.named_buffers():
        assert buffer.dtype in (torch.float32, torch.long), name
        assert torch.isfinite(buffer).all(), name
        assert torch.equal(*of_ranks(buffer)), name


@on_both_ranks("bfloat16", "float16", "float32")
def test_the_gradient_keeps_its_digits_where_the_mean_is_far_above_the_deviation(rank, case):
    """Terms as large as mean / deviation cancel in it: they may not be rounded to the gradient's precision."""
    dtype, mean = getattr(torch, case), 100
    y = (torch.randn(4, 8, 6, 5) + mean).to(dtype)
    g = (torch.randn(y.shape) + (y.float() - mean)).to(dtype)
    whole, part = y.double().requires_grad_(), y.split((1, 3))[rank].clone().requires_grad_()
    (want,) = torch.autograd.grad(block(alone(KINDS["syncbn"])).double().norm(whole), whole, g.double())
    (got,) = torch.autograd.grad(block(KINDS["syncbn"]).norm(part), part, g.split((1, 3))[rank])
    error = got.double() - want.split((1, 3))[rank]
    assert got.dtype == dtype
    assert error.norm() / want.split((1, 3))[rank].norm() < max(torch.finfo(dtype).eps, 1e-5)


# --- who does not ask for others is left alone ---------------------------------------------------------------


HISTORIES = ("pool_mean", "past_cov", "past_patch", "ring_mean", "ring_cov", "ring_patch", "shared_cov")


@on_both_ranks("cmbn-share", "cmbn-weights", "cmbn-carried", "cbn-share", "cbn-lite")
def test_without_sync_a_rank_waits_for_nobody(rank, case):
    if rank == 0:
        net = Net(alone(KINDS[case])).double()
        assert_same(tell(net, None), by_one(case))


@on_both_ranks("cmbn-share", "cmbn-weights", "cbn-share", "cbn-lite")
def test_without_sync_ranks_have_histories_of_their_own(rank, case):
    net = Net(alone(KINDS[case]))
    x = part_of(make_images((2, 2), 0), (2, 2), rank).float()
    for _ in BatchClock(net).minibatches((x, x)):
        net(x)
        histories = {
            name: b.clone() for name, b in net.named_buffers() if name.endswith(HISTORIES) and b.count_nonzero()
        }
    running = {name: value for name, value in net.state_dict().items() if "running" in name}
    assert len(histories) >= len(running) / 2
    for name, value in (histories | running).items():
        assert not torch.equal(*of_ranks(value)), name


@on_both_ranks(*KINDS)
def test_in_eval_a_rank_waits_for_nobody(rank, case):
    """The one that evaluates while the others wait, or are done with fewer images."""
    net = Net(KINDS[case]).double().eval()
    if rank == 1:
        x = make_images((2, 1), 0)
        assert_close(net(x)[:1], net(x[:1]))
        for part in BatchClock(net).minibatches((x, x)):
            net(part).sum().backward()
        assert all(torch.isfinite(parameter.grad).all() for parameter in net.parameters())


# --- population statistics -----------------------------------------------------------------------------------


@on_both_ranks("syncbn", "bn", "cbn-share")
def test_recalibrated_by_two_ranks_it_has_the_statistics_of_all_images(rank, case):
    """Each rank has its own part of the images, and as many batches as it likes."""
    options = KINDS.get(case, NormOptions())
    ours, whole = (Net(options).double() for _ in range(2))
    images = make_images((3, 5), 0)
    with patch.object(across_ranks, "is_parallel", lambda: False):
        recalibrate(whole, [images])
    with torch.no_grad():
        for norm in (m for m in ours.modules() if hasattr(m, "running_mean")):
            norm.running_mean.fill_(7)  # what was there before leaves no trace
    recalibrate(ours, part_of(images, (3, 5), rank).split(2))
    for name, value in ours.state_dict().items():
        assert_close(value, whole.state_dict()[name])
        assert torch.equal(*of_ranks(value)), name


# --- anybody's model -----------------------------------------------------------------------------------------


@on_both_ranks("cmbn", "cmbn:carry,burn_in_steps=0", "cbn:burn_in_steps=0", "cmbn:sync")
def test_an_adopted_model_trains_in_ddp_as_it_comes(rank, case):
    """It broadcasts rank 0's buffers at each forward, but no histories: gradients are the means of what each rank
    computes by itself."""
    net = nn.Sequential(
        nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 3, 3), nn.BatchNorm2d(3)
    ).double()
    by_itself = copy.deepcopy(net)
    clock, own_clock = (adopt(each, case, make_images((1, 1), 0)) for each in (net, by_itself))
    wrapped = DistributedDataParallel(net)
    for step in range(3):
        parts = [make_images((1, 1), 100 * rank + 10 * step + index) for index in range(3)]
        for index, x in enumerate(clock.minibatches(parts)):
            with wrapped.no_sync() if index < 2 else nullcontext():
                wrapped(x).pow(3).sum().backward()
        for x in own_clock.minibatches(parts):
            by_itself(x).pow(3).sum().backward()
        for ours, own in zip(net.parameters(), by_itself.parameters(), strict=True):
            dist.all_reduce(own.grad)
            assert_close(ours.grad, own.grad / WORLD)
            with torch.no_grad():
                for parameter, gradient in ((ours, ours.grad), (own, own.grad / WORLD)):
                    parameter.sub_(0.01 * gradient)
            ours.grad = own.grad = None
        clock.stepped(), own_clock.stepped()


# --- the messages themselves ---------------------------------------------------------------------------------


def test_a_single_process_is_its_own_union():
    own = Moments.of(torch.randn(2, 3, 4, 5))
    vectors = torch.randn(3), torch.randn(3)
    assert not across_ranks.is_parallel()
    assert across_ranks.pool_over_ranks(own) is own
    assert all(got is sent for got, sent in zip(across_ranks.sum_over_ranks(*vectors), vectors, strict=True))


@on_both_ranks("float32", "float64", "bfloat16")
def test_moments_pooled_over_ranks_are_those_of_the_union(rank, case):
    """In the moments' own precision, and as exactly counted."""
    y = (torch.randn(7, 3, 6, 5, dtype=torch.float64) * 2 + 100).to(getattr(torch, case))
    own, whole = Moments.of(y.split((2, 5))[rank]), Moments.of(y)
    union = across_ranks.pool_over_ranks(own)
    assert union.mean.dtype == union.var.dtype == union.count.dtype == own.mean.dtype
    assert union.count == 7 * 6 * 5
    for got, want in ((union.mean, whole.mean), (union.var, whole.var)):
        torch.testing.assert_close(got, want)
        assert torch.equal(*of_ranks(got))


@on_both_ranks("float32", "float64")
def test_sums_over_ranks_leave_what_was_sent_alone(rank, case):
    sent = [torch.full((3,), 10.0 * (rank + 1) + number, dtype=getattr(torch, case)) for number in range(2)]
    got = across_ranks.sum_over_ranks(*sent)
    assert [vector[0].item() for vector in got] == [30, 32]
    assert [vector[0].item() for vector in sent] == [10 * (rank + 1), 10 * (rank + 1) + 1]
    assert {vector.dtype for vector in got} == {sent[0].dtype}


if __name__ == "__main__":
    run_as_rank(int(sys.argv[1]), Path(sys.argv[2]))
