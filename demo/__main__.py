"""A page in the browser to try trained networks: `python -m demo --weights runs/NAME/best.pt`."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, field

from cfg.parse import CfgError
from models.detector import Detector
from models.norms.own import trust_knob
from models.yolo.postprocess import DetectionOptions, DrawnDetectionOptions
from options import DOMAIN, FOREIGN_FLAGS
from utils.errors import UserError
from utils.flags import image_size_knob, parse_flags, resolve
from utils.knob import knob
from utils.page import run_page


@dataclass(frozen=True, kw_only=True, slots=True)
class DemoOptions:
    """python -m demo

    Serve a page to try a network, or two side by side: drop an image, move confidence and overlap, choose classes.
    Nothing leaves this machine, and uploaded images are deleted at the end.
    """

    weights: str = knob(
        MISSING, "checkpoint, darknet's .weights (with --cfg), exported file or published name, as yolov4", unit="FILE"
    )
    compare: str | None = knob(None, "a second one, shown beside it", unit="FILE")
    cfg: str | None = knob(None, "network of .weights files: a darknet .cfg, or the name of one in cfg/")
    compare_cfg: str | None = knob(None, "network of the second one, where it is a .weights file of another cfg")
    names: str | None = knob(None, "class names of .weights files, one per line (default: COCO's 80)", unit="FILE")
    trust: tuple[str, ...] = trust_knob()
    domain: str | None = knob(None, DOMAIN, unit="NAME")
    image_size: tuple[int, int] | None = image_size_knob("network input: 416, or HEIGHTxWIDTH (default: as trained)")
    device: str = knob("auto", "device: auto, cpu, cuda, cuda:1 (or 1), mps")
    host: str = knob("127.0.0.1", "address to listen on; 0.0.0.0 lets other machines in, without a password")
    port: int = knob(7860, "port to listen on", low=1, high=65535)
    detection: DetectionOptions = field(default_factory=DrawnDetectionOptions, metadata={"title": "detections"})

    def load_all(self, *, use_thresholds: bool = False) -> list[tuple[str, Detector]]:
        """Return the files with their detectors; use_thresholds and UserError as of `Detector.load`."""

        def load(file: str, cfg: str | None, names: str | None) -> tuple[str, Detector]:
            detector = Detector.load(
                file,
                cfg=cfg,
                names=names,
                domain=self.domain,
                device=self.device,
                input_hw=self.image_size,
                options=self.detection,
                use_thresholds=use_thresholds,
            )
            return file, detector

        first = load(self.weights, self.cfg, self.names)
        if self.compare is None:
            return [first]
        # Two .weights files may be of one training.
        is_darknet = self.compare.endswith(".weights")
        cfg = self.compare_cfg or (self.cfg if is_darknet else None)
        return [first, load(self.compare, cfg, self.names if is_darknet else None)]


def main(argv: Sequence[str] | None = None) -> None:
    given = parse_flags(DemoOptions, argv, foreign=FOREIGN_FLAGS)
    options = resolve(DemoOptions, given)
    with tempfile.TemporaryDirectory() as uploads:
        os.environ["GRADIO_TEMP_DIR"] = uploads  # which gradio reads when it is imported
        try:
            from demo.page import serve
        except ImportError as error:
            raise UserError(f"the page needs gradio ({error}): run pip install 'gradio>=6.31'") from error
        detectors = options.load_all(use_thresholds="confidence" not in given)
        for _, detector in detectors:
            for origin in detector.origin:
                print(origin)
        serve(detectors, host=options.host, port=options.port)


if __name__ == "__main__":
    run_page(main, CfgError)
