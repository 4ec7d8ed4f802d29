"""Names the thing that a user brings: by its first bytes, by what is in a folder, by the names of its tensors.

Readers ask when they meet something else than they expect, so that a message names it and the command that helps.
Nothing is parsed and nothing is unpickled here.
"""

from cosmos_export.kinds.contents import (
    HEAD_BYTES,
    SAFETENSORS,
    TAR,
    Thing,
    fetch,
    of_bytes,
    of_file,
    placeholder,
)
from cosmos_export.kinds.folders import of_folder, snapshot_of
from cosmos_export.kinds.names import of_names

__all__ = [
    "HEAD_BYTES",
    "SAFETENSORS",
    "TAR",
    "Thing",
    "fetch",
    "of_bytes",
    "of_file",
    "of_folder",
    "of_names",
    "placeholder",
    "snapshot_of",
]
