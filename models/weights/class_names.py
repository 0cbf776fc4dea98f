"""Class names for weights that come without any."""

from __future__ import annotations

from pathlib import Path

from cfg.plan import HERE, Plan
from utils.errors import UserError
from utils.listing import read_lines

COCO_NAMES = HERE / "coco.names"  # as COCO spells them: "motorcycle", where darknet's own file says "motorbike"


def class_names(plan: Plan, file: Path | None = None) -> tuple[tuple[str, ...], str]:
    """Return one name per class, and where they come from: `file` (one name a line), or what the count suggests.

    Raises UserError if `file` has another number of names than the plan has classes.
    """
    if file is not None:
        names = read_lines(file)
        if len(names) != plan.classes:
            raise UserError(f"{file}: has {len(names)} names, {plan.path} has {plan.classes} classes")
        return tuple(names), f"from {file}"
    coco = read_lines(COCO_NAMES)
    if len(coco) == plan.classes:
        return tuple(coco), "COCO's, because there are 80 classes; --names FILE gives others"
    return made_up_names(plan.classes), "class 0, class 1 ...; --names FILE gives others"


def made_up_names(classes: int) -> tuple[str, ...]:
    """Return "class 0", "class 1" ...: also the names in a .data file without names."""
    return tuple(f"class {label}" for label in range(classes))
