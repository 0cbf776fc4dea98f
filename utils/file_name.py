"""Names of files and folders made of names that strangers chose."""

from __future__ import annotations

import re
from hashlib import blake2b

_LONGEST_BYTES = 200  # of the 255 that systems allow, as others put numbers and endings behind it
_UNSAFE = re.compile(r'[\\/:*?"<>|\x00-\x1f\x7f]')
_RESERVED = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\.|$)", re.IGNORECASE)  # devices of Windows


def as_file_name(name: str) -> str:
    """Return the name as one that every system takes, and that leads to no other folder.

    Separators and the like become `_`. A digest tells apart long names that begin alike.
    """
    safe = _UNSAFE.sub("_", name).rstrip(". ")  # Windows drops these
    safe = "".join(each if each.isprintable() else "_" for each in safe)
    if not safe or safe[0] in ".-~" or _RESERVED.match(safe):
        safe = f"_{safe}"
    if len(safe.encode()) > _LONGEST_BYTES:
        digest = blake2b(name.encode(errors="surrogatepass"), digest_size=4).hexdigest()
        safe = f"{safe.encode()[: _LONGEST_BYTES - 9].decode(errors='ignore')}-{digest}"
    return safe
