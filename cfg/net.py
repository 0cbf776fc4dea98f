"""The [net] section: input size, optimizer, schedule and augmentation.

Keys and defaults: darknet `parser.c`, parse_net_options.
"""

from __future__ import annotations

from dataclasses import dataclass

from cfg.parse import Section
from cfg.spec import MAX_SIDE_PX, key, read_keys

MAX_RATE = 1000  # of learning and decay; far above what any training survives
POLICIES = ("constant", "step", "steps", "exp", "poly", "sig", "sigmoid", "sgdr")


@dataclass(frozen=True, kw_only=True, slots=True)
class NetSpec:
    """Everything in a cfg but its layers."""

    width: int = key(int, low=1, high=MAX_SIDE_PX)
    height: int = key(int, low=1, high=MAX_SIDE_PX)
    channels: int = key(3, low=1, high=1024)
    batch: int = key(1, low=1, high=65_536)
    subdivisions: int = key(1, low=1, high=65_536)

    learning_rate: float = key(0.001, low=0, high=MAX_RATE)
    learning_rate_min: float = key(1e-5, low=0, high=MAX_RATE)
    momentum: float = key(0.9, low=0, high=1)
    decay: float = key(0.0001, low=0, high=MAX_RATE)
    ema_alpha: float = key(0.0, low=0, high=1)
    max_batches: int = key(0)

    policy: str = key("constant", choices=POLICIES)
    burn_in_steps: int = key(0, "burn_in")
    power: float = key(4.0)
    steps: tuple[int, ...] = ()
    scales: tuple[float, ...] = ()
    step: int = key(1, low=1)
    scale: float = key(1.0)
    gamma: float = key(1.0)
    sgdr_cycle: int = 0
    sgdr_mult: float = key(2.0, low=0)

    angle: float = key(0.0)
    saturation: float = key(1.0, low=0)
    exposure: float = key(1.0, low=0)
    hue: float = key(0.0, low=0, high=1)
    flip: bool = key(True)
    mixup: bool = key(False)
    mosaic: bool = key(False)
    mosaic_bound: bool = key(False)
    letter_box: bool = key(False)
    resize_step: int = key(32, low=1, high=1024)
    optimized_memory: int = key(0, low=0)

    @property
    def input_hw(self) -> tuple[int, int]:
        """(height, width) in pixels."""
        return self.height, self.width

    @classmethod
    def read(cls, section: Section) -> NetSpec:
        """Read the section. Raises CfgError."""
        values = read_keys(cls, section)
        values["policy"] = values["policy"].replace("sigmoid", "sig")
        values["steps"] = section.integers("steps")
        values["scales"] = section.numbers("scales")
        values["sgdr_cycle"] = section.integer("sgdr_cycle", values["max_batches"])
        net = cls(**values)
        net._check(section)
        _accept_other_keys(section)
        return net

    def _check(self, section: Section) -> None:
        if self.subdivisions > self.batch:
            raise section.error(f"subdivisions={self.subdivisions} is more than batch={self.batch}", "subdivisions")
        if self.policy == "steps" and len(self.steps) != len(self.scales):
            raise section.error(f"{len(self.steps)} steps but {len(self.scales)} scales", "steps")
        if list(self.steps) != sorted(self.steps):
            raise section.error("steps must ascend", "steps")
        if self.policy == "poly" and self.max_batches == 0:
            raise section.error("policy=poly needs max_batches", "policy")
        if self.policy == "sgdr" and self.sgdr_cycle == 0:
            raise section.error("policy=sgdr needs sgdr_cycle or max_batches", "policy")


def _accept_other_keys(section: Section) -> None:
    # Bookkeeping of darknet itself, and keys that only its classifiers and recurrent networks read.
    section.ignore("inputs", "aspect", "min_crop", "max_crop", "label_smooth_eps", "seq_scales")
    section.ignore("augment_speed", "sequential_subdivisions", "loss_scale")
    section.ignore("workspace_size_limit_MB", "try_fix_nan", "max_chart_loss", "use_cuda_graph")
    section.ignore("show_receptive_field", "B1", "B2", "eps")
    section.ignore("contrastive_jit_flip", "contrastive_color")
    section.warn_unless(time_steps=1, track=0)
    section.warn_unless(adam=0, blur=0, gaussian_noise=0, dynamic_minibatch=0)
    section.warn_unless("is for darknet's classifiers", cutmix=0)
    section.warn_unless(adversarial_lr=0, attention=0, contrastive=0, unsupervised=0, equidistant_point=0)
    section.warn_unless(badlabels_rejection_percentage=0, num_sigmas_reject_badlabels=0, weights_reject_freq=0)
