"""Text into the token ids a bundle expects, with the tokenizer and the chat template that are in it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from cosmos_export import files
from cosmos_export.bundle import PromptRecord
from cosmos_export.diagnostics import UnsupportedError, UserError, shown

if TYPE_CHECKING:
    from tokenizers import Tokenizer

MAX_TOKENIZER_BYTES = 64 * files.MIB
"""The largest published `tokenizer.json` has about 16 MB."""
_KINDS: Mapping[str, frozenset[str]] = {
    "normalizer": frozenset({"Sequence", "NFC", "NFD", "NFKC", "NFKD"}),
    "pre_tokenizer": frozenset({"Sequence", "Split", "ByteLevel", "Digits"}),
    "post_processor": frozenset({"Sequence", "ByteLevel", "TemplateProcessing"}),
}
"""Parts that the published tokenizers are made of, and those like them that do not make a text longer by more than a
constant factor."""
TokenIds = NDArray[np.int64]


class PromptTokenizer:
    """Prompts into ids: the pieces of the chat template around the text, tokenized as one, and the ids that follow."""

    def __init__(self, record: PromptRecord, data: bytes) -> None:
        """``data`` is the record's tokenizer. CX603: it is none; CX802: `tokenizers` is not installed."""
        for name, pieces, count in (("plain", record.plain, 2), ("system", record.system, 3)):
            if len(pieces) != count:
                raise UserError(
                    "CX603", f"the bundle's template `{name}` has {len(pieces)} pieces, not {count}", "build it again"
                )
        self._record = record
        self._tokenizer = _load(data, record.tokenizer)

    def __call__(self, text: str, system: str | None = None, *, literal: bool = False) -> TokenIds:
        """int64 [und_len] ids of ``text`` from the user, after the message ``system`` where there is one.

        Control tokens in ``text`` are read as such, as by the published pipeline, or with ``literal`` as the characters
        that they are.
        """
        if system is None:
            before, after = self._record.plain
        else:
            first, between, after = self._record.system
            before = first + system + between
        encode = self._literal if literal and self.control_tokens(text) else self._as_published
        return np.asarray([*encode(before, text, after), *self._record.suffix_ids], dtype=np.int64)

    def control_tokens(self, text: str) -> tuple[str, ...]:
        """Tokens of the tokenizer's own, and not of its vocabulary, that stand in ``text``, each once."""
        return tuple(dict.fromkeys(self._control.findall(text))) if self._control is not None else ()

    @cached_property
    def _control(self) -> re.Pattern[str] | None:
        added = sorted((token.content for token in self._tokenizer.get_added_tokens_decoder().values()), key=len)
        return re.compile("|".join(map(re.escape, reversed(added)))) if added else None

    def _as_published(self, before: str, text: str, after: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(before + text + after, add_special_tokens=False).ids
        return ids

    def _literal(self, before: str, text: str, after: str) -> list[int]:
        """Between the template's last token before ``text`` and its first one behind it there is only text. A tokenizer
        splits at control tokens before anything else, so what it makes of the parts is what it makes of the whole."""
        assert self._control is not None
        start = max((found.end() for found in self._control.finditer(before)), default=0)
        end = next((found.start() for found in self._control.finditer(after)), len(after))
        middle = before[start:] + text + after[:end]
        parts = (
            (self._tokenizer, before[:start]),
            (self._without_control, middle),
            (self._tokenizer, after[end:]),
        )
        return [id for one, part in parts for id in one.encode(part, add_special_tokens=False).ids]

    @cached_property
    def _without_control(self) -> Tokenizer:
        """The tokenizer without its control tokens."""
        from tokenizers import Tokenizer

        document = json.loads(self._tokenizer.to_str())
        document |= {"added_tokens": [], "post_processor": None}
        bare: Tokenizer = Tokenizer.from_str(json.dumps(document))
        return bare


def load_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer in ``path``. ValueError as from `parse_tokenizer`, and for a file that cannot be read."""
    try:
        return parse_tokenizer(files.read_bytes(path, MAX_TOKENIZER_BYTES))
    except OSError as error:
        raise ValueError(files.reason(error)) from error


def parse_tokenizer(data: bytes) -> Tokenizer:
    """The tokenizer that ``data`` is, of the kinds whose work grows with the text alone.

    A tokenizer file is a program: a normalizer that replaces one letter by two, forty times in a row, takes more memory
    than there is for a word. ValueError with a phrase for a file that is refused, or that the library cannot read.
    """
    from tokenizers import Tokenizer

    if len(data) > MAX_TOKENIZER_BYTES:
        raise ValueError(f"{len(data):,} bytes; allowed: {MAX_TOKENIZER_BYTES:,}")
    try:
        loaded: Tokenizer = Tokenizer.from_buffer(data)
    except Exception as error:  # the library raises plain Exception for every failure
        raise ValueError(shown(str(error), 300)) from error
    for name, allowed in _KINDS.items():
        part = getattr(loaded, name)
        for kind in () if part is None else _kinds(json.loads(part.__getstate__())):
            if kind not in allowed:
                raise ValueError(f"its {name} `{kind}` is not supported; supported: {', '.join(sorted(allowed))}")
    model = type(loaded.model).__name__
    if model != "BPE":
        raise ValueError(f"its model `{model}` is not supported; supported: BPE")
    if getattr(loaded.model, "dropout", None):
        raise ValueError("its model drops merges at random (dropout)")
    if loaded.padding is not None:
        raise ValueError("it pads every text")
    return loaded


def _kinds(part: Any) -> Iterator[str]:
    """The type of a part of a tokenizer, and those of the parts in it."""
    if isinstance(part, dict):
        if isinstance(part.get("type"), str):
            yield part["type"]
        for name in ("normalizers", "pretokenizers", "processors"):
            for inner in part.get(name, ()):
                yield from _kinds(inner)


def _load(data: bytes, name: str) -> Tokenizer:
    try:
        import tokenizers  # noqa: F401
    except ImportError as error:
        raise UnsupportedError(
            "CX802", "reading a prompt needs tokenizers, which is not installed", "pip install '.[run]' in the checkout"
        ) from error
    try:
        return parse_tokenizer(data)
    except ValueError as error:
        raise UserError(
            "CX603", f"{name} is not a tokenizer: {error}", "`cosmos-export bundle verify` tells whether it is damaged"
        ) from error
