"""Norms of a network that is trained on images of several domains, such as data sets.

Wu & Johnson 2021, "Rethinking Batch in BatchNorm" (arXiv:2105.07576), section 5: a domain may have mini-batches,
statistics and an affine part of its own. A network is consistent if it is used as it was trained: statistics of
mini-batches of one domain go with running statistics of that domain.

State dicts: `shared.*` is a norm that all domains have in common, `of_domain.N.*` what domain N has of its own. Where
only the statistics are own, all domains' norms use the parameters of domain 0, which are stored once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from models.norms.batch_stat import BatchStatNorm
from models.norms.contract import ActivationAware, ConvAware, ConvView
from utils.clock import BatchAware, Tick, announce_to, end_batch_of, listeners_of
from utils.errors import UserError


class DomainNorm(nn.Module, BatchAware, ConvAware, ActivationAware):
    """One norm, or one affine part after a `shared` norm, per domain. Images are normalized by those of their domain.

    Each domain's norm is told of the mini-batches that have images of it, and called with these images: it computes
    what it would in a training on its domain alone. The order of images stays.

    domains: of the images of a forward. An announcement sets them, also in eval mode, where frozen layers are.
    """

    def __init__(
        self, of_domain: Sequence[nn.Module], shared: nn.Module | None = None, *, own_affine: bool = True
    ) -> None:
        """own_affine: False lets all domains' norms use the parameters of domain 0."""
        super().__init__()
        self.of_domain = nn.ModuleList(of_domain)
        self.shared = shared
        self.own_affine = own_affine
        self._tie()
        self.domains: tuple[int, ...] | int | None = None  # one number: all images are of this domain
        self._in_batch: tuple[int, ...] = ()  # domains with images in the batch

    def forward(self, y: Tensor, view: ConvView) -> Tensor:
        if self.shared is not None:
            y = _called(self.shared, y, view)
        assert self.domains is not None, "nobody has told which domains the images are of"
        domains = (self.domains,) * len(y) if isinstance(self.domains, int) else self.domains
        present = sorted(set(domains))
        if len(present) == 1:
            return _called(self.of_domain[present[0]], y, view)
        # Split and joined image by image: without indices, which the host would have to send to a GPU.
        assert len(domains) == len(y)
        images = y.chunk(len(y))
        normalized: dict[int, Tensor] = {}
        for domain in present:
            mine = [image for image, other in enumerate(domains) if other == domain]
            z = _called(self.of_domain[domain], torch.cat([images[image] for image in mine]), view, mine)
            normalized |= dict(zip(mine, z.chunk(len(mine)), strict=True))
        return torch.cat([normalized[image] for image in range(len(y))])

    def take_over(self, activation: nn.Module) -> bool:
        if self.shared is not None:  # the affine parts come between
            return False
        taken = [isinstance(norm, ActivationAware) and norm.take_over(activation) for norm in self.of_domain]
        self._tie()  # what the norms made for it
        return all(taken)

    def _apply(self, *given: Any, **more: Any) -> DomainNorm:
        """Move to another device or dtype, which may make new parameters."""
        super()._apply(*given, **more)  # type: ignore[no-untyped-call]
        self._tie()
        return self

    def _tie(self) -> None:
        """Give the domains what they share of domain 0's parameters. It alone registers them: they are saved once."""
        for norm in self.of_domain[1:] if not self.own_affine else ():
            for part, first in zip(norm.modules(), self.of_domain[0].modules(), strict=True):
                for name, parameter in first._parameters.items():
                    part._parameters.pop(name, None)
                    part.__dict__[name] = parameter

    @property
    def bias(self) -> nn.Parameter:
        """(C,) that of domain 0. After it was initialized, `begin_alike` makes the others equal."""
        bias = self.of_domain[0].bias
        assert isinstance(bias, nn.Parameter)
        return bias

    def begin_alike(self) -> None:
        """Copy the state of domain 0 to the others."""
        for norm in self.of_domain[1:]:
            norm.load_state_dict(self.of_domain[0].state_dict(), strict=False)

    @property
    def is_listening(self) -> bool:
        return True

    def announce(self, tick: Tick) -> None:
        self.domains = tick.domains[tick.index]
        self._in_batch = tuple(set(chain.from_iterable(tick.domains)))
        announce_to(_listeners(self.shared), tick)
        for domain in self._in_batch:
            if (own := tick.of_domain(domain)) is not None:
                announce_to(_listeners(self.of_domain[domain]), own)

    def batch_ended(self) -> None:
        for norm in (self.shared, *(self.of_domain[domain] for domain in self._in_batch)):
            end_batch_of(_listeners(norm))


def _listeners(norm: nn.Module | None) -> list[BatchAware]:
    return [] if norm is None else listeners_of(norm)


class Affine(nn.Module):
    """gamma and beta (C,), as after a batch norm."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, y: Tensor) -> Tensor:
        # The kernel rounds once, and keeps the dtype of y.
        mean, var = torch.zeros_like(self.bias), torch.ones_like(self.weight)
        return F.batch_norm(y, mean, var, self.weight, self.bias, False, 0.0, 0.0)


def for_domains(
    make: Callable[[], nn.Module | None], count: int, *, own_statistics: bool, own_affine: bool, channels: int
) -> nn.Module | None:
    """Return the norm of `count` domains. make: returns a new norm, or None for a bias in its place.

    Raises UserError where a norm has no affine part that could come after it.
    """
    norm = make()
    if norm is None or count == 1 or not (own_statistics or own_affine):
        return norm
    if isinstance(norm, BatchStatNorm | _BatchNorm) and not own_statistics:
        norm.requires_grad_(False)
        return DomainNorm([Affine(channels) for _ in range(count)], shared=norm)
    if not own_statistics and any(isinstance(part, BatchAware | _BatchNorm) for part in norm.modules()):
        raise UserError(
            f"--domain-affine own: in {type(norm).__name__} the affine part is not its last; take --domain-statistics "
            "own with it"
        )
    norms = [norm, *(made for _ in range(count - 1) if (made := make()) is not None)]
    return DomainNorm(norms, own_affine=own_affine)


def choose(network: nn.Module, domains: tuple[int, ...] | int) -> None:
    """Take the images of the forwards that follow as of these domains, or all as of one, until the next tick."""
    for module in network.modules():
        if isinstance(module, DomainNorm):
            module.domains = domains


def has_domains(state: Mapping[str, Tensor]) -> bool:
    """Return whether this is the state dict of a network with DomainNorms."""
    return any(".of_domain." in name for name in state)


def plain_state(state: Mapping[str, Tensor], domain: int) -> dict[str, Tensor]:
    """Return the state dict of a plain network that computes what the network of `state` does for one domain."""
    plain = {name: tensor for name, tensor in state.items() if not any(part in name for part in (_OWN, _SHARED))}
    for part in (_SHARED, f"{_OWN}0.", f"{_OWN}{domain}."):  # the later ones have less in common
        plain |= {name.replace(part, ".", 1): tensor for name, tensor in state.items() if part in name}
    return plain


def for_all_domains(states: Sequence[Mapping[str, Tensor]], network: nn.Module) -> Mapping[str, Tensor]:
    """Return the state of `network` whose domains compute what plain networks with these states do.

    states: one per domain of the network, or one for all. What the domains share is that of the first.
    """
    added = {}
    for name, module in network.named_modules():
        if not isinstance(module, DomainNorm):
            continue
        for own, tensor in module.state_dict().items():
            part, _, rest = own.removeprefix("of_domain.").partition(".")
            is_fixed = part == "shared" and rest in ("weight", "bias")
            state = states[int(part) if part != "shared" and len(states) > 1 else 0]
            if (source := f"{name}.{rest}") in state:
                added[f"{name}.{own}"] = tensor if is_fixed else state[source]
    return {**states[0], **added}


_OWN, _SHARED = ".of_domain.", ".shared."


def _called(norm: nn.Module, y: Tensor, view: ConvView, images: Sequence[int] | None = None) -> Tensor:
    """Return the norm of y, which are all images of the view, or some."""
    if isinstance(norm, ConvAware):
        return norm(y, view if images is None else view.of_images(images))
    z = norm(y)
    assert isinstance(z, Tensor)
    return z
