"""ncnn's files, .ncnn.param and .ncnn.bin, made by pnnx from a TorchScript trace; our metadata lies beside them."""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from models.export.library import library
from models.export.metadata import Metadata
from models.export.onnx_file import example_images
from models.export.torchscript_file import make_torchscript
from models.network import Network
from utils.atomic_file import atomic_write
from utils.errors import UserError


def write_ncnn(stem: Path, network: Network, metadata: Metadata) -> list[Path]:
    """network: folded, float32; with precision float16 weights are stored as such. Raises UserError if pnnx fails."""
    pnnx = library("pnnx")
    files = [stem.with_name(f"{stem.name}.ncnn.{ending}") for ending in ("param", "bin", "json")]
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "network.pt"
        make_torchscript(network, metadata, is_frozen=False).save(str(trace))
        shape = ",".join(map(str, example_images(metadata).shape))
        fp16 = int(metadata.precision == "float16")
        command = [pnnx.EXEC_PATH, str(trace), f"inputshape=[{shape}]", f"fp16={fp16}"]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        made = [trace.with_name(f"network.ncnn.{ending}") for ending in ("param", "bin")]
        if done.returncode or not all(file.is_file() for file in made):
            raise UserError(f"pnnx could not convert the network (exit code {done.returncode}): {done.stderr[-200:]}")
        # Of max pooling's border; ncnn's reader knows no infinity.
        param = made[0].read_text(encoding="utf-8").replace("=-inf", f"={torch.finfo(torch.float32).min:e}")
        for file, content in zip(
            files, (param.encode(), made[1].read_bytes(), metadata.to_json().encode()), strict=True
        ):
            with atomic_write(file) as out:
                out.write(content)
    return files


def open_ncnn(path: Path) -> tuple[Metadata, Callable[[np.ndarray], list[np.ndarray]]]:
    """Open files of ours, named by their .ncnn.json, for `--check`."""
    ncnn = library("ncnn")
    metadata = Metadata.from_json(path.read_text(encoding="utf-8"), path)
    net = ncnn.Net()
    net.opt.num_threads = torch.get_num_threads()
    net.opt.use_fp16_storage = net.opt.use_fp16_packed = net.opt.use_fp16_arithmetic = metadata.precision == "float16"
    param, weights = (path.with_suffix(ending) for ending in (".param", ".bin"))
    if net.load_param(str(param)) or net.load_model(str(weights)):
        raise UserError(f"{param}: ncnn cannot open it")
    names = [name for name in net.output_names() if name.startswith("out")]  # others are of unread halves

    def run(images: np.ndarray) -> list[np.ndarray]:
        with net.create_extractor() as extractor:
            extractor.input("in0", ncnn.Mat(images[0]).clone())
            return [np.array(extractor.extract(name)[1])[None] for name in names]

    return metadata, run
