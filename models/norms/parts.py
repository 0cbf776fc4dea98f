"""The parts of a network that have different norms: `--norm` with `--norm-heads`, and a cfg's `norm=`."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby

from cfg.convolution import ConvSpec
from cfg.plan import Plan
from models.norms.options import NormOptions


@dataclass(frozen=True, kw_only=True, slots=True)
class NormPart:
    """The layers that have one norm. options: resolved, of this norm alone. words: "layers 0 to 104", for people."""

    options: NormOptions
    words: str


def norm_parts(options: NormOptions, plan: Plan) -> tuple[NormPart, ...]:
    """Return the parts of a network in order of their first layers. options: resolved."""
    nodes = [node for node in plan.nodes if isinstance(node.spec, ConvSpec) and node.spec.batch_normalize]
    runs = [
        (norm, [node.index for _, node in run])
        for norm, run in groupby(((options.of_layer(plan, node), node) for node in nodes), key=lambda pair: pair[0])
    ]
    return tuple(
        NormPart(options=norm, words=_words([run for other, run in runs if other == norm]))
        for norm in dict.fromkeys(norm for norm, _ in runs)
    )


def parts_in_words(parts: tuple[NormPart, ...]) -> str:
    """frozen in layers 0 to 104, cbn:window=8 in layers 105 to 159"""
    return ", ".join(f"{part.options.norm} in {part.words}" for part in parts)


def _words(runs: list[list[int]]) -> str:
    ranges = [str(run[0]) if len(run) == 1 else f"{run[0]} to {run[-1]}" for run in runs]
    plural = "s" * (len(runs) > 1 or len(runs[0]) > 1)
    return f"layer{plural} {' and '.join(filter(None, [', '.join(ranges[:-1]), ranges[-1]]))}"
