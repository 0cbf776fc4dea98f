"""TorchScript files: a trace of the graph, in a zip archive with our metadata as an extra file."""

from __future__ import annotations

import io
import re
import warnings
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from models.export.graph import ExportGraph
from models.export.metadata import KEY, Metadata
from models.export.onnx_file import example_images
from models.network import Network
from utils.atomic_file import atomic_write
from utils.errors import UserError

MAX_CODE_BYTES = 16 * 2**20
# A trace of a network calls torch's functions on tensors, one after the other. It reads and writes no files, calls no
# registered operators, has no loops, and nothing that would run while it is loaded.
_FOREIGN_CODE = re.compile(
    r"\btorch\.(?:save|load|from_file)\b|\bops\.(?!prim\b)\w+|\b__[gs]etstate__|^\s*(?:while|for)\b", re.MULTILINE
)


def make_torchscript(network: Network, metadata: Metadata, *, is_frozen: bool = True) -> Any:
    """Return the torch.jit.ScriptModule of a folded network, in the precision of its parameters.

    is_frozen: parameters become constants of one flat function, for speed.
    """
    graph = ExportGraph(network, decoded=metadata.outputs != "heads", is_dynamic=metadata.is_dynamic).eval()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is deprecated
        images = (example_images(metadata),)
        trace = torch.jit.trace(graph, images, check_trace=False)  # type: ignore[no-untyped-call]
        return torch.jit.freeze(trace) if is_frozen else trace


def write_torchscript(path: Path, module: Any, metadata: Metadata) -> list[Path]:
    content = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is deprecated
        torch.jit.save(module, content, _extra_files={KEY: metadata.to_json()})
    with atomic_write(path) as file:
        file.write(content.getvalue())
    return [path]


def open_torchscript(path: Path) -> tuple[Metadata, Callable[[np.ndarray], list[np.ndarray]]]:
    """Open a file of ours with torch. Raises UserError if it is damaged, foreign, or reaches beyond tensors."""
    metadata = _checked_metadata(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it is deprecated
            module = torch.jit.load(str(path), map_location="cpu").eval()  # type: ignore[no-untyped-call]
    except Exception as error:  # torch's
        raise UserError(f"{path}: torch cannot open it ({type(error).__name__})") from error
    return metadata, lambda images: [output.numpy() for output in module(torch.from_numpy(images))]


def _checked_metadata(path: Path) -> Metadata:
    try:
        with zipfile.ZipFile(path) as archive:
            # torch compresses code only, so nothing else can unfold to more than the file has.
            unfolded = sum(entry.file_size for entry in archive.infolist() if entry.compress_type != zipfile.ZIP_STORED)
            if unfolded > MAX_CODE_BYTES:
                raise UserError(f"{path}: its code would unfold to {unfolded} bytes: it is not opened")
            if damaged := archive.testzip():
                raise UserError(f"{path}: is damaged, the checksum of {damaged} is wrong; use another copy")
            texts = {
                entry.filename.partition("/")[2]: archive.read(entry).decode("utf-8", "replace")
                for entry in archive.infolist()
                if "/code/" in entry.filename or entry.filename.endswith(f"/extra/{KEY}")
            }
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError, zlib.error) as error:
        raise UserError(f"{path}: is no TorchScript file, or damaged ({error})") from error
    metadata = Metadata.from_json(texts.pop(f"extra/{KEY}", None), path)
    for text in texts.values():
        if found := _FOREIGN_CODE.search(text):
            what = found[0].strip()
            raise UserError(f"{path}: its code has '{what}', which export.py does not write: it is not opened")
    return metadata
