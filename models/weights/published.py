"""Weights that are known by name: darknet's own, and others' whose network is darknet's language."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from models.weights.download import PublishedFile, fetch
from utils.errors import UserError


@dataclass(frozen=True, kw_only=True, slots=True)
class PublishedWeights:
    """A .weights file, or the first layers of one, and its network.

    cfg: the name of one in cfg/, a file to download, or the address of one whose SHA-512 nobody has published.
    """

    file: PublishedFile
    cfg: str | PublishedFile

    @property
    def network(self) -> str:
        return Path(self.cfg if isinstance(self.cfg, str) else self.cfg.name).stem

    @property
    def needs_cfg(self) -> bool:
        """Whether the user has to get the cfg."""
        return isinstance(self.cfg, str) and self.cfg.startswith("https:")


_V4 = "https://github.com/AlexeyAB/darknet/releases/download/darknet_yolo_v3_optimal/"
_TINY = "https://github.com/AlexeyAB/darknet/releases/download/darknet_yolo_v4_pre/"
_V3 = "https://pjreddie.com/media/files/"
_V3_CFG = "https://github.com/AlexeyAB/darknet/blob/master/cfg/"
_FASTEST = "https://raw.githubusercontent.com/dog-qiuqiu/Yolo-Fastest/master/ModelZoo/yolo-fastest-1.1_coco/"


def _file(address: str, size_bytes: int, sha512: str) -> PublishedFile:
    return PublishedFile(address=address, sha512=sha512, size_bytes=size_bytes)


def _weights(cfg: str | PublishedFile, address: str, size_bytes: int, sha512: str) -> PublishedWeights:
    return PublishedWeights(file=_file(address, size_bytes, sha512), cfg=cfg)


# SHA-512 of darknet's files: microsoft/vcpkg, ports/darknet/portfile.cmake; sizes follow from their cfgs. Of
# yolo-fastest nobody has published any: these are of the files as they were in its repository in 2026.
_ALL = (
    _weights(
        "yolov4",
        f"{_V4}yolov4.weights",
        257_717_640,
        "77f779c58df67975b187cfead99c1e62d72c57e76c3715e35b97a1c7aba1c7b0"
        "92be97ffb17907099543ac3957085a0fe9688df4a653ea62dfe8322afca53e40",
    ),
    _weights(
        "yolov4",
        f"{_V4}yolov4.conv.137",
        170_038_676,
        "d146a61762bf6ef91deb6c627ede475f63b3975fbeeb1ff5e0949470b29be8fc"
        "28ee81280041937e7ded49679276fbabacdb92d02fa246cc622853633fd3d992",
    ),
    _weights(
        "yolov4-tiny",
        f"{_TINY}yolov4-tiny.weights",
        24_251_276,
        "804ca2ab8e3699d31c95bf773d22f901f186703487c7945f30dc2dbb80879479"
        "3362cb6f5da5cd0b4b83f820c8565a3cba22fafa069ee6ca2a925677137d95f4",
    ),
    _weights(
        "yolov4-tiny",
        f"{_TINY}yolov4-tiny.conv.29",
        19_789_716,
        "318e47f4bdf43b7f4eff8f3669bc9ba66cd7bd8ffb31df5bc1978682c85fec8e"
        "63a8349958022fd933cc676cbf5241953f2181bf4d1789f7cf9d371e012e3e49",
    ),
    _weights(
        f"{_V3_CFG}yolov3.cfg",
        f"{_V3}yolov3.weights",
        248_007_048,
        "293c70e404ff0250d7c04ca1e5e053fc21a78547e69b5b329d34f25981613e59"
        "b982d93fff2c352915ef7531d6c3b02a9b0b38346d05c51d6636878d8883f2c1",
    ),
    _weights(
        f"{_V3_CFG}yolov3-tiny.cfg",
        f"{_V3}yolov3-tiny.weights",
        35_434_956,
        "981a56459515f727bb7b3d3341b95f4117499b6726eab2798e1c3e524de1ee8e"
        "d0d954c11b27bbbb926da2cc955526a194eddf69c55d65923994ab2e8af07042",
    ),
    _weights(
        f"{_V3_CFG}yolov3.cfg",
        f"{_V3}darknet53.conv.74",
        162_482_580,
        "8983e1c129e2d6e8e3da0cc0781ecb7a07813830ef5a87c24b53100df6a5f23d"
        "b6c6e6a402aec78025a93fe060b75d1958f1b8f7439a04b54a3f19c81e2ae99b",
    ),
    _weights(
        _file(
            f"{_FASTEST}yolo-fastest-1.1.cfg",
            9_685,
            "1f4336ebb455b38cdcf53dac55c4ced8ab6c5cf668964fea9f3aacae93995590"
            "2a9b7b66cc463df1b32600908f142e9d9f82a542a04d96b97f17b7a8ba12da7d",
        ),
        f"{_FASTEST}yolo-fastest-1.1.weights",
        1_384_268,
        "1e8ac4703fbad498aff118e82d9f8e286c66f767e91f88aa3bdc1b39a65421fe"
        "d65ab3c5dfa018ece06f3c3b2255d139f9d8704cadce96cd1eb4ef8a55af00a4",
    ),
    _weights(
        _file(
            f"{_FASTEST}yolo-fastest-1.1-xl.cfg",
            9_696,
            "05d536990f81357ea0f54ff0adb9b62f97a73fa23a5528c468f11b2eb71336ba"
            "516de98611980676b78323a65b27fb5505169cb195a6037d45729d4a9e793c41",
        ),
        f"{_FASTEST}yolo-fastest-1.1-xl.weights",
        3_693_964,
        "6a1c8f1da62bc2531883e9efc9073ee142cb6cfc56535ddc9d59411b7e22c3d7"
        "6c1f24a0e04c676860b59b40cbf832a5891cbf9fff396b6749982379d633062b",
    ),
)

# By what is typed: yolov4, yolov4.conv.137.
PUBLISHED = {weights.file.name.removesuffix(".weights"): weights for weights in _ALL}


def find_weights(name: str, cfg: str | None) -> tuple[str, str | None]:
    """Return the path of what `--weights` names, and the cfg: what was typed, else that of the name.

    A file comes first, `yolov4` or `yolov4.weights` in the current folder; then the cache; then a download. What is no
    known name is returned as it is. Raises UserError for a name whose cfg has to be typed, and as `fetch`.
    """
    published = PUBLISHED.get(name.removesuffix(".weights"))
    if published is None or (name != published.file.name and Path(name).is_file()):
        return name, cfg
    if cfg is None and published.needs_cfg:
        raise UserError(
            f"{name}: its network is not among ours: download {published.cfg} and add --cfg {published.network}.cfg"
        )
    path = Path(published.file.name)
    if not path.is_file():
        path = fetch(published.file)
    if cfg is None:
        cfg = published.cfg if isinstance(published.cfg, str) else str(fetch(published.cfg))
    return str(path), cfg
