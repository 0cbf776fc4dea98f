"""Run folders as train.py leaves them, without a training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from tests.evaluation.scenes import SIDE_PX, scene
from utils.draw import write_png

HOSTILE = "</script><img src=x onerror=\"document.title='broken'\">&'|`$x"


def made_run(
    folder: Path, *, seed: int = 0, images: int = 6, names: tuple[str, ...] = ("cat", "dog", HOSTILE), **others: Any
) -> Path:
    """Write a run folder: a scene's images, objects and detections, and what a training of two epochs writes.

    others: rows of ground_truth.json to replace, or `detections`, `metrics`, `settings`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    truth, results = scene(seed, images=images)
    rng = np.random.default_rng(seed)
    for image in truth["images"]:
        image["path"] = str(folder / "images" / image["file_name"])
        write_png(Path(image["path"]), rng.integers(0, 255, (SIDE_PX, SIDE_PX, 3), np.uint8))
    truth["categories"] = [{"id": number, "name": name} for number, name in enumerate(names, start=1)]
    truth["info"] = {"data": HOSTILE, "split": "val", "source": ""}
    at = {"confidence": 0.3, "precision": 0.7, "recall": 0.4, "f1": 0.5}
    metrics = {
        "AP": 0.431,
        "AP50": 0.612,
        "AP_S": -1,
        "AP_M": 0.2,
        "AP_L": 0.3,
        "AP_interval": [0.4, 0.46],
        "thresholds": {**at, "classes": {name: {**at, "confidence": 0.2} for name in names}},
    }
    settings = {"data": [HOSTILE], "cfg": f"cfg/{HOSTILE}.cfg", "norm": "bn", "batch_size": 4, "run_id": "x", "seed": 7}
    files = {"ground_truth": truth | {key: others[key] for key in others.keys() & truth.keys()}}
    files["detections"] = others.get("detections", results.rows())
    files["metrics"], files["settings"] = others.get("metrics", metrics), others.get("settings", settings)
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    rows = ["step,epoch,lr,loss,box,objectness,class,AP,AP50,seconds"]
    rows += [f"{10 * epoch},{epoch},0.01,{9 / epoch},1,2,3,{0.2 * epoch},{0.3 * epoch},5" for epoch in (1, 2)]
    (folder / "results.csv").write_text("\n".join(rows) + "\n", encoding="utf-8")
    health = [f"{e},{10 * e},{layer},{0.1 * layer},{0.2 / e}" for e in (1, 2) for layer in range(3)]
    text = "\n".join(["epoch,step,layer,mean_mismatch,var_mismatch", *health])
    (folder / "norm_health.csv").write_text(text + "\n", encoding="utf-8")
    problems = f"box without area dropped: {HOSTILE}\nbox without area dropped: b.xml\n"
    (folder / "data_problems.txt").write_text(problems, encoding="utf-8")
    return folder
