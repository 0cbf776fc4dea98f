"""Making the norms of a network's convolutions."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

from torch import nn

from cfg.plan import Node, Plan
from models.norms.domains import for_domains
from models.norms.options import NormOptions, resolve_norm
from models.norms.used_weight import CentralizedConv2d, StandardizedConv2d


@dataclass(frozen=True, kw_only=True, slots=True)
class NormFactory:
    """Maker of a convolution's norm (None: a bias instead), by resolved options, for so many domains."""

    options: NormOptions
    domains: int = 1

    def for_layer(self, plan: Plan, node: Node) -> NormFactory:
        """Return the factory of the norm that the layer has, by its part of the network."""
        return replace(self, options=self.options.of_layer(plan, node))

    @property
    def conv_class(self) -> type[nn.Conv2d]:
        """Class of the convolutions to be normalized."""
        if self.options.spec.ws:
            return StandardizedConv2d
        return CentralizedConv2d if self.options.weight_centralization else nn.Conv2d

    def __call__(self, conv: nn.Conv2d) -> nn.Module | None:
        norm = for_domains(
            partial(self._make, conv),
            self.domains,
            own_statistics=self.options.domain_statistics == "own",
            own_affine=self.options.domain_affine == "own",
            channels=conv.out_channels,
        )
        if norm is not None and self.options.norm_freeze_affine:
            for parameter in norm.parameters():
                parameter.requires_grad_(False)
        return norm

    def _make(self, conv: nn.Conv2d) -> nn.Module | None:
        momentum = self.options.norm_momentum
        return self.options.spec.make(conv, eps=self.options.norm_eps, momentum=0.1 if momentum is None else momentum)


def norm_factory(options: NormOptions, plan: Plan | None = None, *, domains: int = 1) -> NormFactory:
    """Return the factory of the resolved options. Raises as `resolve_norm`."""
    return NormFactory(options=resolve_norm(options, plan), domains=domains)
