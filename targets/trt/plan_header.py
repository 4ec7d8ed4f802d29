"""The first bytes of a TensorRT plan, as NVIDIA's own `trtexec --getPlanVersionOnly` reads them.

Their places are in the source of TensorRT's samples (samples/common/sampleEngines.cpp): a tag, the version of the
serialization, and for version 0 of it the release that made the plan, in bytes 24 to 27. Nothing else of the header is
documented, and nothing else is read.
"""

from __future__ import annotations

from typing import BinaryIO

from cosmos_export.diagnostics import UserError

_TAG, _TAG_OF_RTX = b"ftrt", b"vtrt"
_HEADER_BYTES = 28
_SERIALIZATION = 0
Version = tuple[int, int, int, int]


def plan_version(stream: BinaryIO, name: str) -> Version | None:
    """The release of TensorRT that made the plan ``name``, which ``stream`` reads from its beginning; None where its
    serialization is one whose layout is not documented. UserError CX430 for bytes that are no plan."""
    data = stream.read(_HEADER_BYTES)
    if data[:4] == _TAG_OF_RTX:
        raise UserError("CX430", f"`{name}` is an engine of TensorRT-RTX, not of TensorRT")
    if len(data) < _HEADER_BYTES or data[:4] != _TAG:
        raise UserError("CX430", f"`{name}` is not a TensorRT engine: no header")
    if int.from_bytes(data[4:8], "little") != _SERIALIZATION:
        return None
    major, minor, patch, build = data[24:28]
    return major, minor, patch, build


def version_problem(found: Version, recorded: str | None) -> str | None:
    """Why an engine of the release ``found`` is not one that the release ``recorded`` in a manifest has built; None: it
    may be, or the manifest records none."""
    text = ".".join(map(str, found))
    if recorded is None or recorded == text:
        return None
    return f"was built by {text}, and the manifest says {recorded}"
