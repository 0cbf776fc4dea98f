"""Norms in models of other code bases."""

from __future__ import annotations

import copy
import pickle
import random
import re
import runpy
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torchvision.models import resnet18
from torchvision.models.detection import ssdlite320_mobilenet_v3_large
from torchvision.ops import FrozenBatchNorm2d

from models.norms.adopt import AdoptedClock, adopt
from models.norms.cmbn import CrossMiniBatchNormW
from tests.models.norms.kinds import assert_agree, noise_like
from tests.reference import norms as oracle
from utils.errors import UserError

CARRY = "cmbn:carry,burn_in_steps=0"


# --- models ---------------------------------------------------------------------------------------------------


class Conv(nn.Module):
    """As in the YOLOs of today: convolution, batch norm, SiLU."""

    def __init__(self, c1: int, c2: int, k: int = 1, s: int = 1, g: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(c1, c2, k, s, k // 2, groups=g, bias=False)
        self.bn = nn.BatchNorm2d(c2, eps=1e-3, momentum=0.03)
        self.act = nn.SiLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.bn(self.conv(x)))


class Residual(nn.Module):
    def __init__(self, c: int) -> None:
        super().__init__()
        self.first, self.second = Conv(c, c, 3), Conv(c, c, 3)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(self.first(x))


class Split(nn.Module):
    """Half of the channels through residual blocks, all stages concatenated (C2f)."""

    def __init__(self, c1: int, c2: int, n: int) -> None:
        super().__init__()
        self.enter, self.leave = Conv(c1, c2), Conv((2 + n) * c2 // 2, c2)
        self.blocks = nn.ModuleList(Residual(c2 // 2) for _ in range(n))

    def forward(self, x: Tensor) -> Tensor:
        stages = list(self.enter(x).chunk(2, 1))
        for block in self.blocks:
            stages.append(block(stages[-1]))
        return self.leave(torch.cat(stages, 1))


class Pyramid(nn.Module):
    """Max pools one after the other (SPPF)."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.enter, self.leave, self.pool = Conv(c, c // 2), Conv(2 * c, c), nn.MaxPool2d(5, 1, 2)

    def forward(self, x: Tensor) -> Tensor:
        pooled = [self.enter(x)]
        for _ in range(3):
            pooled.append(self.pool(pooled[-1]))
        return self.leave(torch.cat(pooled, 1))


class Head(nn.Module):
    """Boxes and classes of each level, in convolutions apart."""

    def __init__(self, classes: int, levels: tuple[int, ...]) -> None:
        super().__init__()
        self.boxes = nn.ModuleList(nn.Sequential(Conv(c, 16, 3), nn.Conv2d(16, 64, 1)) for c in levels)
        self.classes = nn.ModuleList(
            nn.Sequential(Conv(c, c, 3, g=c), Conv(c, 16), nn.Conv2d(16, classes, 1)) for c in levels
        )

    def forward(self, features: list[Tensor]) -> list[Tensor]:
        return [torch.cat((b(f), c(f)), 1) for f, b, c in zip(features, self.boxes, self.classes, strict=True)]


class Yolo(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(Conv(3, 8, 3, 2), Conv(8, 16, 3, 2), Split(16, 16, 1))
        self.deep = nn.Sequential(Conv(16, 32, 3, 2), Split(32, 32, 2), Pyramid(32))
        self.merge = Split(48, 16, 1)
        self.head = Head(5, (16, 32))

    def forward(self, x: Tensor) -> list[Tensor]:
        shallow = self.stem(x)
        deep = self.deep(shallow)
        return self.head([self.merge(torch.cat((F.interpolate(deep, scale_factor=2.0), shallow), 1)), deep])


def ssdlite() -> nn.Module:
    model = ssdlite320_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=4)
    model.transform.fixed_size = (64, 64)
    return model


MODELS: dict[str, Callable[[], nn.Module]] = {"resnet18": resnet18, "ssdlite": ssdlite, "yolo": Yolo}
NORMS_IN = {"resnet18": 20, "ssdlite": 70, "yolo": 25}


def make(name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """In training mode, with gammas and betas that are not 1 and 0."""
    torch.manual_seed(0)
    model = MODELS[name]().to(dtype)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.5, 0.5)
    return model.train()


def inputs(name: str, seed: int = 0, *, images: int = 2, dtype: torch.dtype = torch.float32) -> tuple:
    """What the model is called with in training."""
    generator = torch.Generator().manual_seed(seed)
    x = (torch.rand(images, 3, 64, 64, generator=generator, dtype=torch.float64) * (1 + seed)).to(dtype)
    if name != "ssdlite":
        return (x,)
    target = {"boxes": torch.tensor([[5, 8, 40, 50]], dtype=dtype), "labels": torch.tensor([3])}
    return list(x), [target] * images


def loss_of(output: Tensor | list[Tensor] | dict[str, Tensor]) -> Tensor:
    values = output.values() if isinstance(output, dict) else output if isinstance(output, list) else [output]
    return sum((value * noise_like(value, 7)).sum() for value in values)


def gradients(model: nn.Module) -> dict[str, Tensor | None]:
    return {name: parameter.grad for name, parameter in model.named_parameters()}


# --- the models of others ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "norm", "layout"),
    [
        ("resnet18", "cmbn", torch.contiguous_format),
        ("ssdlite", "cmbn", torch.contiguous_format),
        ("yolo", "cmbn", torch.contiguous_format),
        ("yolo", CARRY, torch.channels_last),
        ("yolo", "cmbn:gradient=share", torch.contiguous_format),
        ("yolo", "bn:running=pooled", torch.contiguous_format),
    ],
)
def test_one_mini_batch_is_stock_batch_norm_to_the_bit(name, norm, layout):
    """Outputs and all gradients, in two steps."""
    stock = make(name).to(memory_format=layout)
    model = copy.deepcopy(stock)
    clock = adopt(model, norm, *inputs(name))
    assert len(clock.adopted) == NORMS_IN[name] and not clock.skipped
    for step in range(2):
        args = inputs(name, seed=step, images=4)
        if name != "ssdlite":
            args = (args[0].to(memory_format=layout),)
        expected = stock(*args)
        loss_of(expected).backward()
        for part in clock.minibatches([args]):
            got = model(*part)
            loss_of(got).backward()
        assert torch.equal(loss_of(got), loss_of(expected))
        for (key, ours), theirs in zip(gradients(model).items(), gradients(stock).values(), strict=True):
            assert ours is theirs is None or torch.equal(ours, theirs), key
        with torch.no_grad():
            for net in (model, stock):
                for parameter in net.parameters():
                    if parameter.grad is not None:
                        parameter.sub_(0.01 * parameter.grad)
        clock.stepped()


class Seen:
    """What a norm was given and made of it, one mini-batch after the other, and the gradients of the two."""

    def __init__(self, norm: nn.Module) -> None:
        self.norm, self.affine = norm, [p.detach().numpy().copy() for p in (norm.weight, norm.bias)]
        self.y: list[np.ndarray] = []
        self.out: list[np.ndarray] = []
        self.dy: list[np.ndarray] = []
        self.dout: list[np.ndarray] = []
        norm.register_forward_hook(self.look)

    def look(self, _: nn.Module, args: tuple, out: Tensor) -> None:
        self.y.append(args[0].detach().numpy().copy())
        self.out.append(out.detach().numpy().copy())  # the activation may overwrite it
        if args[0].requires_grad:
            args[0].register_hook(lambda g: self.dy.append(g.numpy().copy()))
            out.register_hook(lambda g: self.dout.append(g.numpy().copy()))


@pytest.mark.parametrize("name", MODELS)
def test_four_mini_batches_are_the_oracles_in_each_layer(name):
    """Two channels of each in the backward, which the oracle computes number by number."""
    model = make(name, torch.float64)
    clock = adopt(model, "cmbn", *inputs(name, dtype=torch.float64))
    seen = [Seen(module) for module in model.modules() if isinstance(module, CrossMiniBatchNormW)]
    for part in clock.minibatches(inputs(name, seed, dtype=torch.float64) for seed in range(4)):
        loss_of(model(*part)).backward()
    assert len(seen) == NORMS_IN[name]
    for of in seen:
        gamma, beta = of.affine
        moments, eps = oracle.cmbn_moments(of.y), of.norm.eps
        affine = [np.zeros(2), np.zeros(2)]
        for t, (mean, var, count) in enumerate(moments):
            expected = oracle.normalized(of.y[t], mean, var, gamma, beta, eps)
            assert_agree(torch.tensor(of.out[t]), expected, relative=1e-9)
            dx, *more = oracle.share_backward(
                of.y[t][:, :2], of.dout[t][:, :2], gamma[:2], mean[:2], var[:2], count[:2], eps
            )
            np.testing.assert_allclose(of.dy[t][:, :2], dx, rtol=1e-7, atol=1e-9 * np.abs(of.dout[t]).max())
            affine = [a + b for a, b in zip(affine, more, strict=True)]
        for parameter, expected in zip((of.norm.weight, of.norm.bias), affine, strict=True):
            np.testing.assert_allclose(parameter.grad[:2].numpy(), expected, rtol=1e-7, atol=1e-9)
        mean, var = oracle.running_by_batch([of.y], of.norm.momentum)
        np.testing.assert_allclose(of.norm.running_mean.numpy(), mean, rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(of.norm.running_var.numpy(), var, rtol=1e-9)


@pytest.mark.parametrize("name", MODELS)
def test_checkpoints_fit_both_ways_and_nothing_else_changed(name):
    stock = make(name)
    for module in list(stock.modules())[5:9]:
        module.requires_grad_(False)
    stock(*inputs(name, images=4))  # so that running statistics are some
    model = copy.deepcopy(stock)
    optimized = set(model.parameters())
    adopt(model, CARRY, *inputs(name))
    ours, theirs = model.state_dict(), stock.state_dict()
    assert list(ours) == list(theirs)
    for key in theirs:
        assert torch.equal(ours[key], theirs[key]) and ours[key].dtype == theirs[key].dtype, key
    assert set(model.parameters()) == optimized
    assert [p.requires_grad for p in model.parameters()] == [p.requires_grad for p in stock.parameters()]
    for before, after in zip(stock.modules(), model.modules(), strict=True):
        if isinstance(before, nn.BatchNorm2d):
            assert isinstance(after, CrossMiniBatchNormW)
            assert (after.eps, after.momentum, after.training) == (before.eps, before.momentum, before.training)
    other = make(name)
    other.load_state_dict(ours, strict=True)
    model.load_state_dict(make(name).state_dict(), strict=True)
    model.load_state_dict(other.state_dict(), strict=True)
    x = inputs(name)[0]
    expected, got = stock.eval()(x), model.eval()(x)
    for a, b in zip(expected, got, strict=True):
        pairs = zip(a.values(), b.values(), strict=True) if isinstance(a, dict) else [(a, b)]
        assert all(torch.equal(p, q) for p, q in pairs)


# --- what tracing leaves alone -------------------------------------------------------------------------------


class Moody(nn.Module):
    """Draws random numbers, counts its forwards and writes to its input."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.drop = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout()
        self.register_buffer("scale", torch.ones(()))
        self.forwards = 0

    def forward(self, x: Tensor, *, factor: float = 1.0) -> Tensor:
        self.forwards += 1
        self.scale.mul_(0.9)
        x.mul_(factor + random.random() + np.random.rand())
        return self.drop(self.bn(self.conv(x)))


def test_the_traced_forward_leaves_no_trace():
    torch.manual_seed(3)
    model, x = Moody(), torch.rand(2, 3, 5, 5)
    before, image, state = copy.deepcopy(model.state_dict()), x.clone(), torch.get_rng_state()
    random.seed(1), np.random.seed(1)
    expected = random.random(), np.random.rand()
    random.seed(1), np.random.seed(1)
    clock = adopt(model, "cmbn", x, factor=2.0)
    assert clock.adopted == ("bn",) and clock.step == 0
    assert (random.random(), np.random.rand()) == expected
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(x, image) and model.forwards == 0 and model.training
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert not model.conv._forward_pre_hooks and not hasattr(x, "maker")


def test_without_inputs_the_same_is_found():
    assert adopt(resnet18(), "cmbn").adopted == adopt(resnet18(), "cmbn", *inputs("resnet18")).adopted


@pytest.mark.parametrize("name", ["ssdlite", "yolo"])
def test_a_model_that_needs_inputs_says_so(name):
    """It goes through a list of images, or of a tensor's chunks."""
    with pytest.raises(UserError, match="cannot be traced without inputs"):
        adopt(make(name), "cmbn")


def test_one_image_in_training_mode_is_enough():
    """Whose last layers have one value per channel."""
    assert len(adopt(make("resnet18"), "cmbn", torch.rand(1, 3, 32, 32)).adopted) == 20


# --- what cannot be adopted ----------------------------------------------------------------------------------


class Activating(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).relu()


class Plain(nn.BatchNorm2d):
    """Another name of it."""


class Standardized(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight / self.weight.std(), self.bias)


class Functional(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, None, None, training=True)


class Obstacles(nn.Module):
    """One of everything; each layer has 3 channels and a 1x1 convolution of its own."""

    def __init__(self) -> None:
        super().__init__()
        names = "good plain twice idle own bare free frozen between inplace volume odd special functional static"
        self.convs = nn.ModuleDict({name: nn.Conv2d(3, 3, 1) for name in names.split()})
        self.good, self.plain, self.twice, self.idle = nn.BatchNorm2d(3), Plain(3), nn.BatchNorm2d(3), nn.BatchNorm2d(3)
        self.own, self.bare, self.frozen = Activating(3), nn.BatchNorm2d(3, affine=False), nn.BatchNorm2d(3).eval()
        self.free = nn.BatchNorm2d(3, track_running_stats=False)
        self.between, self.inplace, self.relu = nn.BatchNorm2d(3), nn.BatchNorm2d(3), nn.ReLU(inplace=True)
        self.volume, self.first = nn.BatchNorm3d(3), nn.BatchNorm2d(3)
        self.odd, self.special = nn.BatchNorm2d(3), nn.BatchNorm2d(3)
        self.convs["special"] = Standardized(3, 3, 1)
        self.up, self.after_up = nn.ConvTranspose2d(3, 3, 1), nn.BatchNorm2d(3)
        self.functional, self.static = Functional(), FrozenBatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        conv = self.convs
        x = self.first(x * 2)
        for name in ("good", "plain", "twice", "own", "bare", "free", "frozen", "special", "functional", "static"):
            x = self.get_submodule(name)(conv[name](x))
        x = self.twice(conv["between"](x))
        x = self.between(conv["between"](x) + 1)
        x = self.inplace(self.relu(conv["inplace"](x)))
        x = self.volume(conv["volume"](x)[:, :, None])[:, :, 0]
        x = self.odd(conv["odd"](conv["odd"](x)))
        return self.after_up(self.up(x))


REASONS = {
    "twice": "runs 2 times in a forward",
    "idle": "does not run in this forward",
    "own": "is a Activating, not an nn.BatchNorm2d",
    "bare": "has no affine parameters or no running statistics",
    "free": "has no affine parameters or no running statistics",
    "frozen": "is frozen: in eval mode, in a model in training mode",
    "between": "follows what is no module's output, not an nn.Conv2d",
    "inplace": "follows relu, a ReLU, not an nn.Conv2d",
    "volume": "is a BatchNorm3d, not an nn.BatchNorm2d",
    "first": "follows what is no module's output, not an nn.Conv2d",
    "odd": "follows convs.odd, which runs 2 times in a forward",
    "special": "follows convs.special, a Standardized, which computes with other numbers than nn.Conv2d",
    "after_up": "follows up, a ConvTranspose2d, not an nn.Conv2d",
    "functional": "calls F.batch_norm, which is no module",
    "static": "is a FrozenBatchNorm2d, not an nn.BatchNorm2d",
}


def test_what_cannot_be_adopted_is_named_and_stays():
    model, x = Obstacles().train(), torch.rand(2, 3, 4, 4)
    model.frozen.eval()
    before = dict(model.named_modules())
    with pytest.warns(UserWarning, match="not cmbn, but as before:") as caught:
        clock = adopt(model, "cmbn", x)
    assert clock.skipped == REASONS
    assert all(f"\n  {name} {reason}" in str(caught[0].message) for name, reason in REASONS.items())
    assert clock.adopted == ("good", "plain")
    after = dict(model.named_modules())
    assert {name for name in before if after[name] is not before[name]} == {"good", "plain"}
    for part in clock.minibatches(x.split(1)):
        model(part).sum().backward()


@pytest.mark.parametrize("norm", ["cmbn:gradient=share", "bn:running=pooled", "brn", "frozen", "syncbn"])
def test_a_norm_that_looks_at_no_convolution_is_adopted_without_one(norm):
    model, x = Obstacles(), torch.rand(2, 3, 4, 4)
    with pytest.warns(UserWarning):
        clock = adopt(model, norm, x)
    assert set(clock.adopted) == {"good", "plain", "between", "inplace", "first", "odd", "special", "after_up"}
    for part in clock.minibatches(x.split(1)):
        model(part).sum().backward()


def test_a_symbolic_trace_names_the_same():
    """But for an activation in place, which it cannot see run: there, too, nothing is adopted."""
    model = Obstacles().train()
    model.frozen.eval()
    with pytest.warns(UserWarning):
        clock = adopt(model, "cmbn")
    assert clock.skipped == REASONS
    assert clock.adopted == ("good", "plain")


class InAList(nn.Module):
    """A model that runs its layers from a list of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.more = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        self.layers = [self.conv, self.bn]

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.more(x)


def test_a_norm_that_another_reference_runs_is_named():
    model, images = InAList(), torch.rand(2, 3, 2, 2)
    before = model.bn
    with pytest.warns(UserWarning, match="bn is run by another reference"):
        clock = adopt(model, "cmbn:gradient=share", images)
    assert clock.adopted == ("more",) and model.bn is before


def test_a_convolution_with_hooks_is_not_taken_for_what_it_computes():
    hooked, normed = (nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)) for _ in range(2))
    hooked[0].register_forward_hook(lambda conv, inputs, y: y + y.relu())
    torch.nn.utils.spectral_norm(normed[0])
    for model in (hooked, normed):
        with pytest.raises(UserError, match="follows 0, which has hooks that may change what it computes"):
            adopt(model, "cmbn", torch.rand(1, 3, 2, 2))


def test_what_comes_in_between_in_training_only_is_noticed_there():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Dropout(), nn.BatchNorm2d(4)).eval()
    clock = adopt(model, "cmbn", torch.rand(1, 3, 2, 2))
    model.train()
    with pytest.raises(UserError, match="call adopt\\(\\) on the model in training mode"):
        for part in clock.minibatches([torch.rand(2, 3, 2, 2)]):
            model(part)


def test_an_activation_in_place_on_the_way_is_seen():
    """The batch norm gets the very tensor that the convolution made, with other numbers in it."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn, self.relu = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(inplace=True)

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            self.relu(y)
            return self.bn(y)

    for args in ((torch.rand(1, 3, 2, 2),), ()):
        with pytest.raises(UserError, match=r"no batch norm of Net can become cmbn\n  bn follows"):
            adopt(Net(), "cmbn", *args)


@pytest.mark.parametrize(
    ("norm", "says"),
    [
        ("gn", "keeps other weights or statistics"),
        ("none", "keeps other weights or statistics"),
        ("mabn", "changes how convolutions use their weights"),
        ("cmbn:ws", "changes how convolutions use their weights"),
        ("auto", "chooses one"),
        ("cmbn:carrry", "no option 'carrry'"),
    ],
)
def test_norms_that_other_models_cannot_have_are_refused(norm, says):
    with pytest.raises(UserError, match=says):
        adopt(Yolo(), norm, *inputs("yolo"))


@pytest.mark.parametrize("model", [nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)])
def test_a_model_without_any_is_refused(model):
    with pytest.raises(UserError, match="can become cmbn"):
        adopt(model, "cmbn", torch.rand(1, 3, 2, 2))


@pytest.mark.parametrize(
    ("model", "says"),
    [
        (nn.DataParallel(nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))), "inside the DataParallel"),
        (torch.compile(nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))), "inside the OptimizedModule"),
        (nn.Sequential(nn.LazyConv2d(3, 1), nn.BatchNorm2d(3)), "run it once before"),
        (nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)).bfloat16(), "1 has parameters in torch.bfloat16"),
    ],
    ids=["wrapped", "compiled", "lazy", "bfloat16"],
)
def test_a_model_at_the_wrong_moment_or_precision_is_refused(model, says):
    dtype = next(model.parameters()).dtype
    with pytest.raises(UserError, match=says):
        adopt(model, "cmbn", torch.rand(1, 3, 2, 2, dtype=dtype))


def test_a_norm_that_runs_without_its_convolution_says_so():
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))
    adopt(model, "cmbn", torch.rand(1, 3, 2, 2))
    with pytest.raises(UserError, match="inputs that take the way of your training"):
        model[1](torch.rand(1, 3, 2, 2))


def test_a_model_in_eval_mode_is_adopted_and_stays_in_it():
    model = make("yolo").eval()
    clock = adopt(model, "cmbn", *inputs("yolo"))
    assert len(clock.adopted) == NORMS_IN["yolo"]
    assert not any(module.training for module in model.modules())


def test_a_batch_norm_with_two_names_is_replaced_under_both():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    model[0].next = model[1]
    adopt(model, "cmbn", torch.rand(1, 3, 2, 2))
    assert model[0].next is model[1] and isinstance(model[1], CrossMiniBatchNormW)


# --- convolutions that our own blocks do not have ------------------------------------------------------------

HISTORIES = {
    "cmbn": "cmbn:positions=0",
    "carried": f"{CARRY},positions=0",
    "cbn": "cbn:window=3,burn_in_steps=0,positions=0",
    "taylor": "cbn:window=3,burn_in_steps=0,positions=0,estimator=taylor",
    "lite": "cbn-lite:window=3,burn_in_steps=0,positions=0,refresh_steps=2",
}
GEOMETRIES = {
    "bias": {"kernel_size": 3, "padding": 1},
    "groups": {"kernel_size": 3, "padding": 1, "groups": 2, "stride": 2},
    "dilation": {"kernel_size": 3, "padding": 2, "dilation": 2},
    "same": {"kernel_size": 3, "padding": "same"},
    "same even": {"kernel_size": (4, 2), "padding": "same", "dilation": (1, 3)},
    "valid": {"kernel_size": 3, "padding": "valid"},
    "reflect": {"kernel_size": 3, "padding": 1, "padding_mode": "reflect"},
    "circular": {"kernel_size": 3, "padding": (2, 0), "padding_mode": "circular", "stride": 2},
    "replicate": {"kernel_size": 3, "padding": "same", "padding_mode": "replicate"},
}


def pair(norm: str, **geometry: object) -> tuple[nn.Sequential, AdoptedClock]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 6, **geometry), nn.BatchNorm2d(6)).double()
    nn.init.uniform_(model[1].weight, 0.5, 1.5)
    return model, adopt(model, norm, torch.rand(1, 4, 7, 8, dtype=torch.float64))


def batch(seed: int = 0, count: int = 4) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.rand(2, 4, 7, 8, generator=generator, dtype=torch.float64) * (t + 1) for t in range(count)]


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_the_gradient_is_that_of_a_graph_that_keeps_all_mini_batches(geometry):
    """To weights and bias; to the latter it is 0, because the norm subtracts it."""
    model, clock = pair("cmbn:positions=0", **GEOMETRIES[geometry])
    conv, norm = model
    parameters = [conv.weight, conv.bias, norm.weight, norm.bias]
    parts = batch()
    for t, x in enumerate(clock.minibatches(parts)):
        out = model(x)
        g = noise_like(out, t)
        got = torch.autograd.grad(out, parameters, g)
        ys = [conv(part) for part in parts[: t + 1]]
        rows = torch.cat([y.transpose(0, 1).flatten(1) for y in ys], dim=1)
        mean, var = rows.mean(1).view(1, -1, 1, 1), rows.var(1, correction=0).view(1, -1, 1, 1)
        affine = norm.weight.view(1, -1, 1, 1), norm.bias.view(1, -1, 1, 1)
        expected = (ys[-1] - mean) * torch.rsqrt(var + norm.eps) * affine[0] + affine[1]
        torch.testing.assert_close(out, expected, rtol=1e-11, atol=1e-11)
        for ours, theirs in zip(got, torch.autograd.grad(expected, parameters, g), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-10)


def train(model: nn.Module, clock: AdoptedClock, *, steps: int = 3) -> list[Tensor]:
    outputs = []
    for step in range(steps):
        model.zero_grad()
        for index, x in enumerate(clock.minibatches(batch(step))):
            out = model(x)
            out.backward(noise_like(out, index))
            outputs.append(out.detach())
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.sub_(0.01 * parameter.grad)
        clock.stepped()
    return outputs


@pytest.mark.parametrize("norm", HISTORIES)
def test_a_bias_before_the_norm_changes_nothing(norm):
    """It is in the running mean. With the gradient `weights` it has none, as before stock batch norm."""
    model, clock = pair(HISTORIES[norm], kernel_size=3)
    other, other_clock = pair(HISTORIES[norm], kernel_size=3)
    with torch.no_grad():
        model[0].bias.copy_(torch.linspace(-3, 3, 6))
        other[0].bias.zero_()
    bias = model[0].bias.detach().clone()
    for ours, theirs in zip(train(model, clock), train(other, other_clock), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(model[1].running_var, other[1].running_var, rtol=1e-9, atol=1e-9)
    if norm == "lite":  # whose gradient `share` holds the past constant
        return
    torch.testing.assert_close(model[0].bias.detach(), bias, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(model[1].running_mean, other[1].running_mean + bias, rtol=1e-9, atol=1e-9)


def test_two_batch_norms_of_one_convolution_each_get_its_input():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.left, self.right = nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.BatchNorm2d(6)

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            return torch.cat((self.left(y), self.right(y)), 1)

    torch.manual_seed(0)
    model = Net().double()
    clock = adopt(model, "cmbn:positions=0", batch()[0])
    assert clock.adopted == ("left", "right")
    single, single_clock = pair("cmbn:positions=0", kernel_size=3)
    single[0].load_state_dict(model.conv.state_dict())
    single[1].load_state_dict(model.left.state_dict())
    for x in clock.minibatches(batch()):
        out = model(x)
        out.backward(noise_like(out[:, :6], 1).repeat(1, 2, 1, 1))
    for x in single_clock.minibatches(batch()):
        out = single(x)
        out.backward(2 * noise_like(out, 1))
    torch.testing.assert_close(model.conv.weight.grad, single[0].weight.grad, rtol=1e-10, atol=1e-10)


# --- copies, wrappers, the end of a forward ------------------------------------------------------------------


def held(model: nn.Module) -> list[object]:
    """What the hooks on convolutions hold."""
    hooks = [hook for module in model.modules() for hook in module._forward_hooks.values()]
    return [hook.__self__.held for hook in hooks]


@pytest.mark.parametrize("norm", HISTORIES)
def test_copies_train_alike_and_apart(norm):
    """deepcopy, as of an EMA, and a pickle of the whole model."""
    model, clock = pair(HISTORIES[norm], kernel_size=3)
    train(model, clock, steps=2)
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    expected = train(model, clock, steps=2)
    assert held(model) == [None]
    for other in copies:
        other_clock = AdoptedClock(other, adopted=(), skipped={})
        other_clock.step = 2
        assert all(torch.equal(*outs) for outs in zip(train(other, other_clock, steps=2), expected, strict=True))


@pytest.mark.parametrize("norm", [CARRY, "cbn:burn_in_steps=0"])
def test_activation_checkpointing_changes_no_bit_and_leaves_no_activation_behind(norm):
    model = make("yolo")
    kept = copy.deepcopy(model)
    clock, kept_clock = adopt(model, norm, *inputs("yolo")), adopt(kept, norm, *inputs("yolo"))
    for part in (model.stem[2], model.deep):
        part.forward = lambda x, run=part.forward: checkpoint(run, x, use_reentrant=False)
    for _ in range(2):
        for net, its_clock in ((model, clock), (kept, kept_clock)):
            for (x,) in its_clock.minibatches([inputs("yolo", seed) for seed in range(3)]):
                loss_of(net(x)).backward()
            its_clock.stepped()
        assert all(torch.equal(a, b) for a, b in zip(gradients(model).values(), gradients(kept).values(), strict=True))
    assert set(held(model)) == set(held(kept)) == {None}


@pytest.mark.parametrize("mode", ["eval", "train", "no_grad"])
def test_no_forward_leaves_its_activations_behind(mode):
    model = make("yolo").train(mode != "eval")
    clock = adopt(model, "cmbn", *inputs("yolo"))
    with torch.set_grad_enabled(mode != "no_grad"):
        model(*inputs("yolo"))  # unannounced: plain batch norm
        for part in clock.minibatches([inputs("yolo")] * 2):
            model(*part)
    assert set(held(model)) == {None}


@pytest.mark.parametrize("norm", ["carried", "cbn"])
def test_it_compiles(norm):
    """In one graph, hooks included, with the numbers of the uncompiled one."""
    model, clock = pair(HISTORIES[norm], kernel_size=3)
    eager, eager_clock = pair(HISTORIES[norm], kernel_size=3)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    for ours, theirs in zip(train(compiled, clock), train(eager, eager_clock), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    torch._dynamo.reset()
    for ours, theirs in zip(model.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    assert held(model) == [None]


def test_it_trains_in_bfloat16_autocast():
    model = make("yolo")
    clock = adopt(model, CARRY, *inputs("yolo"))
    for _ in range(2):
        for part in clock.minibatches([inputs("yolo", seed) for seed in range(3)]):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = loss_of(model(*part))
            loss.backward()
        clock.stepped()
    assert all(torch.isfinite(g).all() for g in gradients(model).values())


def test_without_momentum_running_statistics_average_all_batches():
    """momentum=None, as in nn.BatchNorm2d."""
    model = nn.Sequential(nn.Conv2d(4, 6, 3, bias=False), nn.BatchNorm2d(6, momentum=None)).double()
    clock = adopt(model, "cmbn", batch()[0])
    batches = [batch(seed) for seed in range(12)]
    for parts in batches:
        for x in clock.minibatches(parts):
            model(x)
    ys = [[model[0](x).detach().numpy() for x in parts] for parts in batches]
    mean, var = oracle.running_by_batch(ys, momentum=0)
    np.testing.assert_allclose(model[1].running_mean.numpy(), mean, rtol=1e-10)
    np.testing.assert_allclose(model[1].running_var.numpy(), var, rtol=1e-10)


# --- the page ------------------------------------------------------------------------------------------------


def test_the_example_of_the_page_runs(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Its 20 lines train, and the stock model takes what they saved."""
    (example,) = re.findall(r"```python\n(.*?)```", (root / "docs" / "any-model.md").read_text(), re.S)
    lines = [line for line in example.splitlines() if line and not line.startswith(("import", "from"))]
    assert len(lines) <= 20
    monkeypatch.chdir(tmp_path)
    Path("example.py").write_text(example)
    names = runpy.run_path("example.py")
    assert names["clock"].step == 8 and len(names["clock"].adopted) == 20
    stock = resnet18(num_classes=10)
    stock.load_state_dict(torch.load("resnet18.pt", weights_only=True), strict=True)
    assert stock.bn1.num_batches_tracked == 8
