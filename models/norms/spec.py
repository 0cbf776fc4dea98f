"""What a norm's file says about the norm: its options, how it is built, what its statistics are of, its source."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import Field, dataclass, fields, replace
from typing import Any, ClassVar

from torch import nn

from utils.knob import knob


@dataclass(frozen=True, kw_only=True, slots=True)
class Cut:
    """How a batch is cut: images in each of its `subdivisions` mini-batches, per GPU."""

    mini_batch: int
    subdivisions: int

    @property
    def batch(self) -> int:
        return self.mini_batch * self.subdivisions


@dataclass(frozen=True, kw_only=True, slots=True)
class NormSpec(ABC):
    """One choice of `--norm`, with its options.

    Subclasses are frozen dataclasses whose fields are its own options, made with `knob`: typed as `--norm
    NAME:OPTION=VALUE,...`, with the default and the help text written there and nowhere else. `__str__` spells the
    choice with the options that differ from their defaults; `table.parse_norm` reads it back. `__post_init__` may raise
    UserError for options that contradict each other.

    summary: what normalizes a mini-batch in training. source: the publication, or "ours" with a page. normalizes:
    False where there is a bias in place of a norm.
    has_batch_statistics: False for a norm that normalizes by something else than statistics of mini-batches; then
    the flags about those (momentum, freezing) are refused. has_running_statistics: whether inference uses a
    `running_mean` and `running_var`. has_image_statistics: whether it also uses those of the image at hand, so that it
    cannot be merged into the convolution. centralizes_weights: the default of --weight-centralization. weight_options:
    the options of its own without which trained weights would compute another function. ws, the option of all norms,
    is another of those, and about the convolution, so that no norm's constructor gets it.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    source: ClassVar[str]
    normalizes: ClassVar[bool] = True
    has_batch_statistics: ClassVar[bool] = True
    has_running_statistics: ClassVar[bool] = True
    has_image_statistics: ClassVar[bool] = False
    centralizes_weights: ClassVar[bool] = False
    weight_options: ClassVar[tuple[str, ...]] = ()

    ws: bool = knob(False, "standardize the convolution's filters: weight standardization (Qiao et al. 2019)")

    @abstractmethod
    def make(self, conv: nn.Conv2d, *, eps: float, momentum: float) -> nn.Module | None:
        """Return the norm of `conv`'s output; None for a bias instead."""

    def images(self, cut: Cut, *, momentum: float) -> float:
        """Return how many images are behind the statistics in training, where they are pooled the most."""
        return cut.mini_batch

    @property
    def options(self) -> dict[str, Any]:
        """The norm's own options by name, as its constructor takes them."""
        options = {f.name: getattr(self, f.name) for f in own_fields(type(self))}
        return {**options, "burn_in_steps": self.burn_in} if "burn_in_steps" in options else options

    @property
    def is_frozen(self) -> bool:
        """Whether it always normalizes by running statistics, which never move."""
        return self.has_running_statistics and not self.has_batch_statistics

    @property
    def pools(self) -> bool:
        """Whether statistics reach beyond the mini-batch at hand (several GPUs aside)."""
        return self.images(Cut(mini_batch=1, subdivisions=2), momentum=self.default_momentum) > 1

    @property
    def is_synchronized(self) -> bool:
        """Whether statistics are those of all ranks of a torchrun job."""
        return bool(getattr(self, "sync", False))

    def values_per_statistic(self, channels: int, positions: int, *, mini_batch: int) -> int | None:
        """Return over how many values a variance is taken, at worst; None where a single value is fine."""
        return mini_batch * positions

    @property
    def default_momentum(self) -> float:
        """Rate of the running statistics, as in nn.BatchNorm2d."""
        return 0.1

    @property
    def burn_in(self) -> int:
        """Optimizer steps of plain batch norm at the start of training."""
        steps = getattr(self, "burn_in_steps", 0)
        return self.usual_burn_in if steps is None else int(steps)

    @property
    def usual_burn_in(self) -> int:
        """The burn-in of a long training: early weights change too fast for statistics of the past."""
        return 100

    def for_training(self, total_steps: int) -> NormSpec:
        """Return the spec with a burn-in of at most a tenth of the training, unless it has been typed."""
        if getattr(self, "burn_in_steps", 0) is not None or self.burn_in <= total_steps // 10:
            return self
        shorter: dict[str, Any] = {"burn_in_steps": total_steps // 10}
        return replace(self, **shorter)

    @property
    def remark(self) -> str:
        """A sentence for the start of a training: what differs from the published norm."""
        return ""

    def __str__(self) -> str:
        """Spell the choice as it is typed: `cmbn:carry,burn_in_steps=0`."""
        named = [(f.name, getattr(self, f.name), f.default) for f in (*own_fields(type(self)), *fields(NormSpec))]
        parts = [_spelled(name, value) for name, value, default in named if value != default]
        return self.name + (":" + ",".join(parts) if parts else "")


def own_fields(spec: type[NormSpec]) -> tuple[Field[Any], ...]:
    """Return the options that not every norm has."""
    return tuple(f for f in fields(spec) if f.name not in {common.name for common in fields(NormSpec)})


def burn_in_knob() -> Any:
    """Return the knob `burn_in_steps` of a norm that begins as plain batch norm; None: see `for_training`."""
    text = "optimizer steps of plain batch norm at the start (default: 100, or a tenth of a shorter training)"
    return knob(None, text, low=0)


def _spelled(option: str, value: Any) -> str:
    if value is True:
        return option
    if isinstance(value, float) and value == float(f"{value:g}"):
        value = f"{value:g}"
    return f"{option}={'off' if value is False else value}"


def patch_shape(conv: nn.Conv2d) -> tuple[int, int]:
    """Return (groups, numbers in a patch) of the convolution, (G, K)."""
    return conv.groups, conv.weight[0].numel()
