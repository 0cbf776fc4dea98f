"""gradcheck, for every norm whose gradient is the true derivative of something, and what that something is."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from models.norms.bcn import BatchChannelNorm
from models.norms.brn import BatchRenorm
from models.norms.cmbn import CrossMiniBatchNormW, DarknetCrossMiniBatchNorm
from models.norms.contract import ConvAware, ConvView
from models.norms.mabn import MovingAverageNorm
from tests.models.norms.kinds import CORE, KINDS, block, norm_class, of_class, parts
from utils.clock import BatchClock

RENORMED = [kind for kind in KINDS if "gradient=renorm" in KINDS[kind].norm]
# Whose gradients are a choice; each has an oracle in its own file.
CHOSEN = [
    *RENORMED,
    *of_class(DarknetCrossMiniBatchNorm, MovingAverageNorm, BatchRenorm, BatchChannelNorm),
]
TRUE = [kind for kind in KINDS if kind not in CHOSEN]
# To the convolution's weights too, at the first mini-batch of a step, when the past is brought to today's weights.
# CBN's `share` is not of them, because its forward moves the past with the weights and its gradient does not.
TRUE_TO_WEIGHTS = [k for k in TRUE if not k.startswith("cbn") or "weights" in k or k == "cbn-none"]


def warmed_up(kind: str, **settings: object) -> tuple[nn.Module, BatchClock]:
    """Two steps with a history behind it, and the weights moved since; 4 channels to 2, 1 to 2 images of 2x3."""
    module = block(kind, channels=2, **settings)
    clock = BatchClock(module)
    for step in range(2):
        for x in clock.minibatches(parts((2, 1), hw=(2, 3), seed=step)):
            module(x)
        with torch.no_grad():
            module.conv.weight.add_(0.03 * torch.randn_like(module.conv.weight))
        clock.stepped()
    return module, clock


@pytest.mark.parametrize(
    ("kind", "activation"), [*((kind, None) for kind in TRUE), *((kind, nn.Mish()) for kind in TRUE if kind in CORE)]
)
def test_the_gradient_to_the_input_and_the_affine_part_is_true(kind, activation):
    """The moments of earlier mini-batches, of whatever step, held constant."""
    module, clock = warmed_up(kind, activation=activation)
    if module.norm is None:
        pytest.skip("has no norm; the test below has it")
    for x in clock.minibatches(parts((2, 1), hw=(2, 3), seed=9)):
        y = module.conv(x).detach().requires_grad_()
        context = (ConvView(module.conv, x),) if isinstance(module.norm, ConvAware) else ()

        def of(t: Tensor, gamma: Tensor, beta: Tensor, context: tuple = context) -> Tensor:
            parameters = {"weight": gamma, "bias": beta}
            return module.act_of(torch.func.functional_call(module.norm, parameters, (t, *context)))

        module.act_of = nn.Identity() if module.norm_activates else module.act
        assert torch.autograd.gradcheck(of, (y, module.norm.weight, module.norm.bias))


@pytest.mark.parametrize("shape", [(1, 1, 2), (2, 2, 3)], ids=["dense", "grouped"])
@pytest.mark.parametrize("kind", TRUE_TO_WEIGHTS)
def test_the_gradient_to_all_parameters_of_a_block_is_true(kind, shape):
    groups, stride, size = shape
    module, clock = warmed_up(kind, groups=groups, stride=stride, size=size)
    for index, x in enumerate(clock.minibatches(parts((2, 1), hw=(2, 3), seed=9))):
        if index > 0 and issubclass(norm_class(kind), CrossMiniBatchNormW):
            break  # the graph of the first is gone: test_cmbn.py keeps it
        if index > 0 and "weights" in kind:
            break  # compensated at the first mini-batch of a step, and numbers since: test_cbn.py
        names = [name for name, p in module.named_parameters() if p.requires_grad]
        values = [dict(module.named_parameters())[name].detach().clone().requires_grad_() for name in names]
        assert torch.autograd.gradcheck(
            lambda t, *given, names=names: torch.func.functional_call(module, dict(zip(names, given, strict=True)), t),
            (x.requires_grad_(), *values),
        )


def test_the_choices_are_not_true():
    """Else the oracles of the chosen gradients could test nothing: each differs from the derivative somewhere."""
    assert all(KINDS[kind].spec.has_batch_statistics for kind in CHOSEN)
    for kind in CHOSEN:
        module, clock = warmed_up(kind)
        falls = 0
        for x in clock.minibatches(parts((2, 1), hw=(2, 3), seed=9)):
            y = module.conv(x).detach().requires_grad_()
            context = (ConvView(module.conv, x),) if isinstance(module.norm, ConvAware) else ()
            norm = module.norm
            falls += not torch.autograd.gradcheck(
                lambda t, norm=norm, context=context: norm(t, *context), (y,), raise_exception=False
            )
        assert falls > 0, kind
