"""python -m tests.docs [PAGE ...]: type the commands of the pages, in a scratch folder, and say which of them fail.

    make docs-check

The folder has files that are called as the pages' placeholders are: PATH, IMAGES, runs/NAME/best.pt, my.cfg. Trainings
are shortened to two steps. What is not typed is listed with the reason (`--list` lists and types nothing).
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from data.digits import make_digits
from tests.docs.commands import Command, commands, pages

ROOT = Path(__file__).resolve().parent.parent.parent
PATIENCE_S = 600
UNTYPED = (  # what a command has, and why it is not typed here
    (r"^(make|pip|git|source)\b|-m venv", "changes the environment, or is what runs this"),
    (r"rtsp://|best\.pt 0 --show", "needs a camera, or a screen"),
    (r"-m demo", "serves until it is stopped: tests/e2e/test_demo.py"),
    (r"yolov4\.conv\.137|--weights (yolov4|yolov4-tiny)(\.weights)?( |$)", "needs the network, or darknet's weights"),
    (r"gpu\.py|test_on_a_gpu", "is for a GPU: tests/benchmarks/test_gpu.py"),
    (r"-m (benchmarks|tests)\.", "is a benchmark: tests/benchmarks"),
    (r"-m study", "takes hours: tests/study"),
    (r"--track|film\.mp4", "needs a video: tests/test_detect.py"),
    (r"my_norms", "needs the class on the page: tests/e2e/test_norm_choices.py"),
    (r"--precision int8", "needs the packages of the extra export: tests/models/export"),
)
SHORTER = (  # and what of the scratch folder has another name there
    (r"--epochs \d+", "--epochs 1"),
    (r"--time-budget \w+", "--time-budget 20s"),
    (r"--layers \d+", "--layers 20"),
    (r"--classes cat,dog", "--classes 1,2"),
    (r"\b([AB])\.json", r"PATH/\1.json"),
    (r"my\.data", "darknet/obj.data"),
    (r"runs/NAME(?=.* --domain )", "runs/DOMAINS"),
)
# Flags of commands in sentences go with others that the sentence does not repeat; that they are parsed is tested.
IN_A_SENTENCE = "stands in a sentence: parsed only"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pages", nargs="*", type=Path, metavar="PAGE", help="(default: all of them)")
    parser.add_argument("--list", action="store_true")
    typed = parser.parse_args()
    chosen = [page.resolve() for page in typed.pages] or pages(ROOT)
    found = list(dict.fromkeys(command for page in chosen for command in commands(page, ROOT)))
    failed = 0
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        if not typed.list:
            furnish(scratch)
        for command in found:
            why = reason(command)
            start = time.perf_counter()
            wrong = "" if why or typed.list else run(command, scratch)
            outcome = f"({why})" if why else "to be typed" if typed.list else f"{time.perf_counter() - start:.0f} s"
            print(f"{command}\n    {wrong or outcome}", flush=True)
            failed += bool(wrong)
    raise SystemExit(f"{failed} commands failed" if failed else 0)


def reason(command: Command) -> str | None:
    """Return why a command is not typed; None if it is."""
    named = next((why for pattern, why in UNTYPED if re.search(pattern, command.text)), None)
    return named or (None if command.whole else IN_A_SENTENCE)


def furnish(scratch: Path) -> None:
    """Make what the pages' placeholders stand for."""
    counts = {"train": 32, "val": 16, "test": 16}
    for seed, folder in enumerate(("PATH", "A", "B", "FROM")):
        make_digits(scratch / folder, counts=counts, seed=seed, hw=(96, 96))
    for name, split in (("A", "train"), ("B", "val")):
        shutil.copy(scratch / "PATH" / "annotations" / f"instances_{split}.json", scratch / "PATH" / f"{name}.json")
    images = sorted((scratch / "PATH" / "test").glob("*.png"))
    for folder in ("IMAGES", "FOLDER", "shots"):
        shutil.copytree(images[0].parent, scratch / folder)
    for name in ("street.jpg", "aerial.png"):
        shutil.copy(images[0], scratch / name)
    for line in (
        "python train.py --data PATH --max-steps 2 --out runs/NAME",
        "python -m models.weights convert runs/NAME/best.pt my.weights",  # and my.cfg
        "python -m data.convert PATH darknet --to darknet",
        "python train.py --data A B --max-steps 2 --domain-statistics own --out runs/DOMAINS",
    ):
        wrong = run(Command(page="", line=0, text=line, whole=True), scratch)
        assert not wrong, wrong
    for name in ("A", "B"):
        shutil.copytree(scratch / "runs" / "NAME", scratch / "runs" / name)


def run(command: Command, scratch: Path) -> str:
    """Type a command in the scratch folder. Returns what it said if it failed, else ""."""
    words = [sys.executable if word in ("python", "python3") else word for word in shortened(command).words]
    words = [str(ROOT / word) if word.endswith(".py") else word for word in words]
    if words[0] == "torchrun":
        words[:1] = [sys.executable, "-m", "torch.distributed.run"]
    words = [path for word in words for path in (sorted(map(str, scratch.glob(word))) if "*" in word else [word])]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    try:
        done = subprocess.run(
            words, cwd=scratch, env=environment, capture_output=True, text=True, timeout=PATIENCE_S, check=False
        )
    except subprocess.TimeoutExpired:
        return f"took more than {PATIENCE_S} s"
    said = "\n    ".join(f"{done.stdout}\n{done.stderr}".strip().splitlines()[-8:])
    return f"exit code {done.returncode}\n    {said}" if done.returncode else ""


def shortened(command: Command) -> Command:
    """Return the command with two steps, one epoch or little time in place of many, on small images."""
    text = command.text
    for pattern, instead in SHORTER:
        text = re.sub(pattern, instead, text)
    text = text.replace(
        "best.pt my.weights", f"best.pt {Path(command.page).stem}.weights" if command.page else "best.pt my.weights"
    )
    if "train.py" in text and "--resume" not in text:
        text += "" if re.search("--(epochs|time-budget|max-steps)", text) else " --max-steps 2"
        text += "" if "--image-size" in text else " --image-size 96"
        text += " --workers 0"
    return Command(page=command.page, line=command.line, text=text, whole=command.whole)


if __name__ == "__main__":
    main()
