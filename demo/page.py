"""The page: an image, thresholds and classes, and beside them what each detector finds."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import gradio as gr
import numpy as np

from demo.candidate_memory import CandidateMemory
from models.detector import Detector
from utils.errors import UserError
from utils.stop import Stop

LOWEST_CONFIDENCE = 0.01
MAX_UPLOAD = "32mb"


def make_page(detectors: Sequence[tuple[str, Detector]]) -> gr.Blocks:
    """Return the page for detectors, each with the name that it is shown under. Their options are where it starts."""
    options = detectors[0][1].options
    thresholds = detectors[0][1].thresholds  # a slider has one value: that for all classes in common
    confidence_at_first = options.confidence if thresholds is None else thresholds.common.confidence
    floor = min(LOWEST_CONFIDENCE, options.confidence)
    quick = [replace(each, predictor=CandidateMemory(each.predictor, floor)) for _, each in detectors]
    class_names = list(dict.fromkeys(name for each in quick for name in each.class_names))

    def show(path: str | None, confidence: float, nms_iou: float, classes: list[str]) -> list[np.ndarray | str | None]:
        if path is None:
            return ["", None] * len(quick)
        try:
            return [part for each in quick for part in find(each, path, confidence, nms_iou, classes)]
        except UserError as error:
            message = str(error).replace(path, os.path.basename(path))
            raise gr.Error(message, print_exception=False) from error

    with gr.Blocks(title="YOLOv4 detections", analytics_enabled=False, fill_width=True) as page, gr.Row():
        with gr.Column(scale=2, min_width=300):
            image = gr.Image(
                type="filepath",
                image_mode=None,
                sources=["upload", "clipboard"],
                label="Image",
                height=300,
                buttons=[],
            )
            confidence = gr.Slider(floor, 1, confidence_at_first, step=0.01, label="Confidence")
            nms_iou = gr.Slider(0, 1, options.nms_iou, step=0.01, label="Overlap (IoU)")
            classes = gr.Dropdown(class_names, value=[], multiselect=True, label="Classes (none chosen: all)")
        results: list[gr.Textbox | gr.Image] = []
        for name, _ in detectors:
            with gr.Column(scale=3, min_width=300):
                results.append(gr.Textbox(label=name, lines=2, interactive=False))
                results.append(gr.Image(show_label=False, interactive=False, format="jpeg", buttons=["fullscreen"]))
        gr.on(
            [image.change, confidence.change, nms_iou.change, classes.change],
            show,
            [image, confidence, nms_iou, classes],
            results,
            show_progress="hidden",
            trigger_mode="always_last",
            api_visibility="private",
        )
    return page


def find(
    detector: Detector, path: str, confidence: float, nms_iou: float, classes: Sequence[str]
) -> tuple[str, np.ndarray]:
    """Return counts by class, and the image, (H, W, 3) uint8 RGB, with what is found drawn into it.

    classes: that are kept, all for (); the detector need not know them. Raises UserError for a file that is no image.
    """
    found = detector(path, confidence=confidence, nms_iou=nms_iou)
    if classes:
        kept = np.isin(found.names, classes)
        found = replace(found, boxes=found.boxes[kept], scores=found.scores[kept], labels=found.labels[kept])
    counts = ", ".join(f"{count} {name}" for name, count in Counter(found.names).most_common())
    return counts or "nothing", found.plot()


def serve(detectors: Sequence[tuple[str, Detector]], *, host: str, port: int) -> None:
    """Serve the page until Ctrl-C or SIGTERM. Raises UserError if the port is taken."""
    page = make_page(detectors)
    with Stop() as stop:
        try:
            page.launch(
                server_name=host,
                server_port=port,
                max_file_size=MAX_UPLOAD,
                theme=gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"]),
                footer_links=[],
                run_history=False,
                share=False,
                ssr_mode=False,
                mcp_server=False,
                quiet=True,
                prevent_thread_lock=True,
            )
        except OSError as error:
            raise UserError(
                f"--port {port}: cannot be listened on at {host}, it may be taken: choose another one"
            ) from error
        print(f"http://{host}:{port}  (Ctrl-C ends it)", flush=True)
        while not stop.requested:
            time.sleep(0.2)
        page.close(verbose=False)
