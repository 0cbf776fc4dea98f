"""Every norm there is, in every variant; and what the tests of this folder build of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from models.blocks import ConvNormAct
from models.norms.batch_stat import BatchStatNorm
from models.norms.contract import ConvAware, ConvView
from models.norms.factory import norm_factory
from models.norms.options import NormOptions
from models.norms.used_weight import used_weight
from utils.clock import BatchClock

# Windows that outlast a batch of two, no burn-in, and whole covariances: so that something happens in a short test.
CMBN = NormOptions(norm="cmbn:positions=0")
CBN = NormOptions(norm="cbn:gradient=share,window=3,burn_in_steps=0,positions=0")
LITE = NormOptions(norm="cbn-lite:window=3,burn_in_steps=0,positions=0,refresh_steps=2")
MABN = NormOptions(norm="mabn:average_images=4")
BRN = NormOptions(norm="brn:burn_in_steps=0,ramp_steps=2,r_max=1.5,d_max=0.5")
CARRIED = NormOptions(norm="cmbn:carry,burn_in_steps=0,positions=0")


def tuned(options: NormOptions, **changes: Any) -> NormOptions:
    """The same norm with other values of its options."""
    return replace(options, norm=str(replace(options.spec, **changes)))


KINDS = {
    "bn": NormOptions(),
    "bn-pooled": NormOptions(norm="bn:running=pooled"),
    "bn-centred": NormOptions(weight_centralization=True),
    "cmbn-weights": CMBN,
    "cmbn-weights-grid": NormOptions(norm="cmbn:positions=6"),
    "cmbn-weights-centred": replace(CMBN, weight_centralization=True),
    "cmbn-share": NormOptions(norm="cmbn:gradient=share", norm_momentum=0.3, norm_eps=1e-3),
    "cmbn-share-sync": NormOptions(norm="cmbn:gradient=share,sync"),
    "cmbn-renorm": NormOptions(norm="cmbn:gradient=renorm"),
    "cmbn-darknet": NormOptions(norm="cmbn:gradient=darknet"),
    "carried": CARRIED,
    "carried-grid": tuned(CARRIED, positions=6),
    "carried-centred": replace(CARRIED, weight_centralization=True),
    "cbn-std": CBN,
    "cbn-std-grid": tuned(CBN, positions=6),
    "cbn-std-batch": tuned(CBN, window=0),
    "cbn-std-sync": tuned(CBN, sync=True),
    "cbn-std-centred": replace(CBN, weight_centralization=True),
    "cbn-std-weights": tuned(CBN, gradient="weights"),
    "cbn-std-weights-centred": replace(tuned(CBN, gradient="weights"), weight_centralization=True),
    "cbn-std-renorm": tuned(CBN, gradient="renorm"),
    "cbn-taylor": tuned(CBN, estimator="taylor"),
    "cbn-taylor-weights": tuned(CBN, estimator="taylor", gradient="weights"),
    "cbn-taylor-renorm": tuned(CBN, estimator="taylor", gradient="renorm"),
    "cbn-none": tuned(CBN, estimator="none"),
    "cbn-none-renorm": tuned(CBN, estimator="none", gradient="renorm"),
    "cbn-lite": LITE,
    "cbn-lite-renorm": tuned(LITE, gradient="renorm"),
    "cbn-lite-batch": tuned(LITE, window=0, refresh_steps=1),
    "mabn": MABN,
    "mabn-uncentred": replace(MABN, weight_centralization=False),
    "brn": BRN,
    "brn-fixed-affine": replace(BRN, norm_freeze_affine=True),
    "gn": NormOptions(norm="gn:groups=2"),
    "ln": NormOptions(norm="ln"),
    "in": NormOptions(norm="in"),
    "frozen": NormOptions(norm="frozen"),
    "syncbn": NormOptions(norm="syncbn"),
    "none": NormOptions(norm="none"),
    "bn-ws": NormOptions(norm="bn:ws"),
    "gn-ws": NormOptions(norm="gn:groups=2,ws"),
    "cmbn-weights-ws": NormOptions(norm="cmbn:positions=0,ws"),
    "carried-ws": tuned(CARRIED, ws=True),
    "cbn-std-ws": tuned(CBN, ws=True),
    "cbn-std-weights-ws": tuned(CBN, gradient="weights", ws=True),
    "mabn-ws": tuned(MABN, ws=True),
    "ghost": NormOptions(norm="ghost:size=2"),
    "bcn": NormOptions(norm="bcn:groups=2", norm_momentum=0.3),
    "evonorm-s0": NormOptions(norm="evonorm-s0:groups=2"),
    "frn": NormOptions(norm="frn"),
}

# Which differ from another kind in nothing that a dtype, a layout or an activation could meet.
TWINS = {
    "bn-centred",
    "cmbn-share-sync",
    "cmbn-weights-centred",
    "carried-centred",
    "cbn-std-batch",
    "cbn-std-sync",
    "cbn-std-centred",
    "cbn-std-weights-centred",
    "cbn-taylor-renorm",
    "cbn-none-renorm",
    "cbn-lite-batch",
    "cbn-lite-renorm",
    "mabn-uncentred",
    "brn-fixed-affine",
    "ln",
    "in",
    "bn-ws",
    "cmbn-weights-ws",
    "carried-ws",
    "cbn-std-ws",
    "cbn-std-weights-ws",
    "mabn-ws",
}
CORE = [kind for kind in KINDS if kind not in TWINS]

DTYPES = {"float64": torch.float64, "float32": torch.float32, "bf16 autocast": torch.float32}
LAYOUTS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}
CONV_SHAPES = [(1, 1, 3), (2, 2, 3), (1, 1, 1), (4, 1, 3)]  # groups, stride, kernel


def block(
    kind: str | NormOptions,
    *,
    groups: int = 1,
    stride: int = 1,
    size: int = 3,
    channels: int = 8,
    dtype: torch.dtype = torch.float64,
    activation: nn.Module | None = None,
) -> ConvNormAct:
    """4 channels to `channels`; the same numbers in it for every kind, however its parameters are named."""
    options = KINDS[kind] if isinstance(kind, str) else kind
    torch.manual_seed(0)
    made = ConvNormAct.make(
        4,
        channels,
        size,
        stride=stride,
        padding=size // 2,
        groups=groups,
        norm=norm_factory(options),
        activation=activation or nn.Identity(),
    ).to(dtype)
    if made.norm is not None:
        with torch.no_grad():
            made.norm.weight.uniform_(0.5, 1.5)
            made.norm.bias.uniform_(-0.5, 0.5)
            if options.spec.name == "frozen":  # as a trained network's
                made.norm.running_mean.uniform_(-0.5, 0.5)
                made.norm.running_var.uniform_(0.5, 1.5)
    return made


def stock_block(kind: str, **settings: object) -> ConvNormAct:
    """`nn.BatchNorm2d` behind the convolution, and at the eps and momentum, that `kind` has."""
    options = norm_factory(KINDS[kind]).options
    return block(
        NormOptions(
            norm="bn:ws" if options.spec.ws else "bn",
            norm_eps=options.norm_eps,
            norm_momentum=options.norm_momentum,
            weight_centralization=options.weight_centralization,
            norm_freeze_affine=options.norm_freeze_affine,
        ),
        **settings,  # type: ignore[arg-type]
    )


def norm_class(kind: str) -> type:
    return type(block(kind).norm)


def of_class(*classes: type) -> list[str]:
    return [kind for kind in KINDS if issubclass(norm_class(kind), classes)]


OWN_ACTIVATION = ["evonorm-s0", "frn"]  # in place of the block's
IMAGE_STATISTICS = [kind for kind, options in KINDS.items() if options.spec.has_image_statistics]
BN_IN_INFERENCE = [k for k, o in KINDS.items() if o.spec.has_running_statistics and k not in IMAGE_STATISTICS]
# Which, never announced, are BN; stock BN and frozen are not of them.
BATCH_STATISTICS = [kind for kind in of_class(BatchStatNorm) if kind not in IMAGE_STATISTICS]
CONV_AWARE = of_class(ConvAware)


def parts(
    sizes: Iterable[int] = (2, 2, 3, 1),
    hw: tuple[int, int] = (5, 4),
    *,
    dtype: torch.dtype = torch.float64,
    seed: int = 1,
    layout: torch.memory_format = torch.contiguous_format,
) -> list[Tensor]:
    """Mini-batches of so many images of 4 channels, of different means and deviations."""
    generator = torch.Generator().manual_seed(seed)
    sizes = tuple(sizes)
    scales = torch.linspace(0.5, 2.0, len(sizes))
    return [
        (torch.randn(n, 4, *hw, generator=generator, dtype=torch.float64) * s + s).to(dtype, memory_format=layout)
        for n, s in zip(sizes, scales, strict=True)
    ]


def noise_like(t: Tensor, seed: int) -> Tensor:
    """In t's dtype and layout, and not from the generator that all share."""
    made = torch.randn(t.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.empty_like(t).copy_(made)


def run_batch(module: nn.Module, clock: BatchClock, batch: list[Tensor]) -> list[Tensor]:
    """Forward only; not a step."""
    return [module(x) for x in clock.minibatches(batch)]


def autocast(dtype: str) -> AbstractContextManager[None]:
    return torch.autocast("cpu", dtype=torch.bfloat16) if dtype == "bf16 autocast" else nullcontext()


def steps(
    module: nn.Module,
    *,
    count: int = 3,
    sizes: Iterable[int] = (2, 1),
    dtype: str = "float64",
    layout: str = "NCHW",
    first_seed: int = 0,
    clock: BatchClock | None = None,
    before_each: Callable[[Tensor], object] | None = None,
) -> Iterator[tuple[Tensor, list[Tensor | None]]]:
    """Train: per mini-batch (output, gradients to x and the parameters); after each batch the weights move.

    before_each: is shown every mini-batch's input once it was announced.
    """
    clock = clock or BatchClock(module)
    for seed in range(first_seed, first_seed + count):
        module.zero_grad()
        batch = parts(sizes, dtype=DTYPES[dtype], seed=seed, layout=LAYOUTS[layout])
        for index, x in enumerate(clock.minibatches(batch)):
            if before_each is not None:
                before_each(x)
            x.requires_grad_()
            before = [None if p.grad is None else p.grad.clone() for p in module.parameters()]
            with autocast(dtype):
                out = module(x)
            out.backward(noise_like(out, 100 * seed + index))
            ours = [
                p.grad if old is None or p.grad is None else p.grad - old
                for p, old in zip(module.parameters(), before, strict=True)
            ]
            yield out.detach(), [x.grad, *(g if g is None else g.clone() for g in ours)]
        with torch.no_grad():
            for p in module.parameters():
                if p.grad is not None:
                    p.add_(p.grad, alpha=-0.01)
        clock.stepped()


def state_of(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers, persistent or not, by name; copies."""
    return {name: t.detach().clone() for name, t in (*module.named_parameters(), *module.named_buffers())}


def assert_same_bits(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    differing = [name for name in ours if not torch.equal(ours[name], theirs[name])]
    assert differing == []


def conv_then_norm(module: ConvNormAct, x: Tensor) -> tuple[Tensor, Tensor]:
    """(y, out): what the norm was given, which will have its gradient, and what it made of it."""
    y = module.conv(x)
    y.retain_grad()
    context = (ConvView(module.conv, x),) if isinstance(module.norm, ConvAware) else ()
    return y, module.norm(y, *context)


def assert_agree(ours: Tensor, oracle: np.ndarray | Tensor, *, relative: float = 1e-12) -> None:
    """To so much of the largest number in `oracle`."""
    ours, oracle = ours.detach().double().numpy(), np.asarray(oracle)
    assert ours.shape == oracle.shape
    assert np.abs(ours - oracle).max() <= relative * np.abs(oracle).max()


def assert_is_graph_of(
    module: ConvNormAct, batch: list[Tensor], reference: Callable[[int], Tensor], *, relative: float = 1e-12
) -> None:
    """Each mini-batch's output, and its gradients to the input, the weights and the affine part, are those of
    `reference(t)`, in whose graph all of these are."""
    for t, x in enumerate(BatchClock(module).minibatches(batch)):
        x.requires_grad_()
        out = module(x)
        g = noise_like(out, t)
        inputs = (x, module.conv.weight, module.norm.weight, module.norm.bias)
        got = torch.autograd.grad(out, inputs, g)
        expected = reference(t)
        assert_agree(out, expected.detach(), relative=relative)
        for mine, theirs in zip(got, torch.autograd.grad(expected, inputs, g), strict=True):
            if theirs.abs().max() > 1e-9:  # a centred filter of one number is 0 and stays so
                assert_agree(mine, theirs, relative=relative)


def normalized_by(norm: BatchStatNorm, y: Tensor, mean: Tensor, var: Tensor) -> Tensor:
    """By autograd, with the norm's affine part."""
    hat = (y - mean.view(1, -1, 1, 1)) * torch.rsqrt(var + norm.eps).view(1, -1, 1, 1)
    return hat * norm.weight.view(1, -1, 1, 1) + norm.bias.view(1, -1, 1, 1)


def cosine_to_filters(module: ConvNormAct) -> Tensor:
    """(C,) between each filter, as it is used, and its gradient."""
    weight, gradient = used_weight(module.conv).detach().flatten(1), module.conv.weight.grad.flatten(1)
    return (weight * gradient).sum(1) / (weight.norm(dim=1) * gradient.norm(dim=1))


def arrays(*tensors: Tensor) -> tuple[np.ndarray, ...]:
    """Copies."""
    return tuple(t.detach().numpy().copy() for t in tensors)
