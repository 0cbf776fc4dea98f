"""Population statistics: of all images, whatever the cut, and the very ones that hold in inference."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from cfg.plan import load_plan
from models.blocks import ConvNormAct
from models.network import Network
from models.norms.factory import norm_factory
from models.norms.options import NormOptions
from models.norms.recalibrate import recalibrate
from models.norms.running_stats import norms_with_statistics
from models.norms.table import NORMS
from tests.models.norms.kinds import KINDS
from utils.errors import UserError

WITHOUT = [norm for norm, spec in NORMS.items() if not spec.has_running_statistics]
KINDS_WITH = [kind for kind, options in KINDS.items() if options.spec.has_running_statistics]
CUTS = ((16,), (2, 2, 4, 8), (1,) * 16, (13, 3))


def chain(kind: str, dtype: torch.dtype = torch.float64) -> nn.Sequential:
    """Three blocks; the second one has groups and a stride."""
    make, norm = ConvNormAct.make, norm_factory(KINDS[kind])
    blocks = nn.Sequential(
        make(3, 8, 3, padding=1, norm=norm, activation=nn.Mish()),
        make(8, 8, 3, stride=2, groups=2, norm=norm, activation=nn.LeakyReLU(0.1)),
        make(8, 6, 1, norm=norm, activation=nn.Identity()),
    ).to(dtype)
    for block in blocks:
        nn.init.uniform_(block.norm.weight, 0.5, 1.5)
        nn.init.uniform_(block.norm.bias, -0.5, 0.5)
    return blocks


def make_images(count: int = 16, side: int = 9, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """Of different brightness and contrast."""
    strength = torch.linspace(0.2, 2, count, dtype=dtype).view(-1, 1, 1, 1)
    return torch.rand(count, 3, side, side, dtype=dtype) * strength + strength


def statistics(network: nn.Module) -> dict[str, torch.Tensor]:
    return {name: b.clone() for name, b in network.named_buffers() if name.endswith(("running_mean", "running_var"))}


def by_hand(blocks: nn.Sequential, images: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(mean, unbiased variance) that each norm of plain batch norms should have: all images, layer after layer."""
    found, x = [], images
    for block in blocks:
        rows = block.conv(x).transpose(0, 1).flatten(1)
        mean, var = rows.mean(1), rows.var(1)
        found.append((mean, var))
        hat = (rows - mean[:, None]) / (var[:, None] + block.norm.eps).sqrt()
        rows = hat * block.norm.weight[:, None] + block.norm.bias[:, None]
        x = block.act(rows.view(rows.shape[0], len(images), *block.conv(x).shape[2:]).transpose(0, 1))
    return found


@torch.no_grad()
def test_the_statistics_are_those_of_all_images_layer_after_layer():
    blocks, images = chain("bn"), make_images()
    recalibrate(blocks, list(images.split(5)))
    for block, (mean, var) in zip(blocks, by_hand(blocks, images), strict=True):
        torch.testing.assert_close(block.norm.running_mean, mean, rtol=1e-11, atol=1e-12)
        torch.testing.assert_close(block.norm.running_var, var, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS_WITH)
@torch.no_grad()
def test_however_the_images_are_cut(kind):
    images, seen = make_images(), []
    for cut in CUTS:
        torch.manual_seed(3)
        blocks = chain(kind)
        recalibrate(blocks, list(images.split(cut)))
        seen.append(statistics(blocks))
    assert not torch.equal(seen[0]["1.norm.running_var"], torch.ones(8, dtype=torch.float64))
    for other in seen[1:]:
        torch.testing.assert_close(other, seen[0], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@torch.no_grad()
def test_however_the_images_are_cut_for_a_whole_network(dtype):
    plan, images, seen = load_plan("yolov4-pico", classes=2, input_hw=(32, 32)), make_images(side=32, dtype=dtype), []
    network = Network(plan, norm_factory(NormOptions())).to(dtype)
    for cut in CUTS[1:3]:
        recalibrate(network, list(images.split(cut)))
        seen.append(statistics(network))
    tolerance = 1e-9 if dtype == torch.float64 else 1e-3
    torch.testing.assert_close(seen[0], seen[1], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("norm", [norm for norm in NORMS if norm not in WITHOUT])
@torch.no_grad()
def test_they_are_what_inference_sees_at_every_norm_of_a_network(norm):
    network = Network(load_plan("yolov4-pico", classes=2, input_hw=(32, 32)), norm_factory(NormOptions(norm=norm)))
    network.double().eval()
    images = make_images(8, side=32)
    recalibrate(network, list(images.split(3)))
    inputs = {}
    for name, module in norms_with_statistics(network).items():
        module.register_forward_pre_hook(lambda _, args, name=name: inputs.update({name: args[0]}))
    network(images)
    assert len(inputs) == 21
    for name, module in norms_with_statistics(network).items():
        rows = inputs[name].transpose(0, 1).flatten(1)
        mean, var = (rows.mean(1), rows.var(1)) if norm != "mabn" else (0 * rows[:, 0], rows.square().mean(1))
        torch.testing.assert_close(module.running_mean, mean, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(module.running_var, var, rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_a_norm_out_of_the_order_of_execution_is_found():
    class Backwards(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.later, self.earlier = nn.BatchNorm2d(3), nn.BatchNorm2d(3)

        def forward(self, x):
            return self.later(self.earlier(x))

    network, images = Backwards().double(), make_images()
    recalibrate(network, [images])
    torch.testing.assert_close(network.later.running_mean, torch.zeros(3).double(), rtol=0, atol=1e-10)
    torch.testing.assert_close(network.earlier.running_mean, images.mean((0, 2, 3)))


def test_whole_numbers_are_pixels():
    images = torch.randint(0, 256, (6, 3, 8, 8), dtype=torch.uint8)
    seen = []
    for given in (images, images.float() / 255):
        torch.manual_seed(3)
        network = chain("bn", torch.float32)
        recalibrate(network, [given])
        seen.append(statistics(network))
    torch.testing.assert_close(seen[0], seen[1])
    assert seen[0]["0.norm.running_mean"].abs().max() < 10


def test_nothing_else_changes():
    network = chain("cmbn-weights")
    network.train()
    network[1].norm.eval()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items() if "running" not in name}
    modes = [module.training for module in network.modules()]
    recalibrate(network, [make_images()])
    assert [module.training for module in network.modules()] == modes
    assert all(torch.equal(tensor, network.state_dict()[name]) for name, tensor in before.items())
    assert not any(module._forward_pre_hooks for module in network.modules())


def test_a_forward_that_fails_leaves_no_hook():
    network = chain("bn")
    with pytest.raises(RuntimeError):
        recalibrate(network, [torch.zeros(1, 5, 9, 9, dtype=torch.float64)])
    assert not any(module._forward_pre_hooks for module in network.modules())


@pytest.mark.parametrize("kind", WITHOUT)
def test_a_network_without_batch_statistics_is_refused(kind):
    blocks = ConvNormAct.make(3, 8, 3, norm=norm_factory(NormOptions(norm=kind)), activation=nn.Identity())
    with pytest.raises(UserError, match="no norm with running statistics"):
        recalibrate(blocks, [make_images(dtype=torch.float32)])


def test_no_image_is_refused():
    with pytest.raises(UserError, match="there is no image"):
        recalibrate(chain("bn"), [])
