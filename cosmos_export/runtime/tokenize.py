"""Text into the token ids a bundle expects, with the tokenizer and the chat template that are in it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from cosmos_export.bundle import PromptRecord
from cosmos_export.diagnostics import UnsupportedError, UserError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

TokenIds = NDArray[np.int64]


class PromptTokenizer:
    """Prompts into ids: the pieces of the chat template around the text, tokenized as one, and the ids that follow."""

    def __init__(self, record: PromptRecord, file: Path) -> None:
        """``file`` is the record's tokenizer. CX603: it cannot be read; CX802: `tokenizers` is not installed."""
        for name, pieces, count in (("plain", record.plain, 2), ("system", record.system, 3)):
            if len(pieces) != count:
                raise UserError(
                    "CX603", f"the bundle's template `{name}` has {len(pieces)} pieces, not {count}", "build it again"
                )
        self._record = record
        self._tokenizer = _load(file)

    def __call__(self, text: str, system: str | None = None) -> TokenIds:
        """int64 [und_len] ids of ``text`` from the user, after the message ``system`` where there is one."""
        if system is None:
            before, after = self._record.plain
            whole = before + text + after
        else:
            before, between, after = self._record.system
            whole = before + system + between + text + after
        ids = self._tokenizer.encode(whole, add_special_tokens=False).ids
        return np.asarray([*ids, *self._record.suffix_ids], dtype=np.int64)


def _load(path: Path) -> Tokenizer:
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise UnsupportedError(
            "CX802", "reading a prompt needs tokenizers, which is not installed", "pip install '.[run]' in the checkout"
        ) from error
    try:
        loaded: Tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises plain Exception for every failure
        raise UserError(
            "CX603", f"{path} is not a tokenizer: {error}", "`cosmos-export bundle verify` tells whether it is damaged"
        ) from error
    return loaded
