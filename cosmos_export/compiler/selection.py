"""The components of a generation request that a build takes besides the transformer. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

from cosmos_export.checkpoint import Checkpoint
from cosmos_export.checkpoint.codecs import CODECS, CodecPart, codec_tensors
from cosmos_export.diagnostics import UnsupportedError, UserError, shown

TOKENIZER = "tokenizer"
TOKENIZER_FILE = "tokenizer.json"
_CODEC_TYPES = ("BF16", "F32")
COMPONENTS = (*CODECS, TOKENIZER)


def select(asked: Sequence[str] | None, checkpoint: Checkpoint, modalities: Sequence[str]) -> tuple[str, ...]:
    """The components to build, in the order of `COMPONENTS`; None or ``all``: all there are for ``modalities``.

    UserError CX224 for a name that is none, CX225 for a component that cannot be had, CX226 for one that is not of
    this transformer; UnsupportedError CX226 for weights of another type than bf16 and fp32.
    """
    absent = {name: why for name in COMPONENTS if (why := _absence(name, checkpoint, modalities))}
    available = tuple(name for name in COMPONENTS if name not in absent)
    if asked is None or tuple(asked) == ("all",):
        chosen = available
    elif tuple(asked) in ((), ("none",)):
        chosen = ()
    else:
        unknown = [name for name in asked if name not in COMPONENTS]
        if unknown:
            raise UserError(
                "CX224",
                f"component {', '.join(shown(name) for name in unknown)} is not one of {', '.join(COMPONENTS)}",
                "give a list of these, or `all` or `none` alone; the transformer is always built",
            )
        chosen = tuple(name for name in COMPONENTS if name in asked)
        for name in chosen:
            if name in absent:
                raise UserError(
                    "CX225",
                    f"component `{name}` cannot be built: {absent[name]}",
                    f"leave --components out for all there are: {', '.join(available) or 'none'}",
                )
    for name in chosen:
        if name in CODECS:
            _require_fit(name, CODECS[name], checkpoint)
    return chosen


def codec_config(checkpoint: Checkpoint, folder: str) -> dict[str, Any]:
    """The checked ``config.json`` of a codec folder; empty where the checkpoint has no such folder."""
    return dict(checkpoint.codec_configs.get(folder, {}))


def codec_tensors_bytes(checkpoint: Checkpoint, name: str) -> int:
    """Bytes in the checkpoint of what codec ``name`` computes with."""
    return sum(entry.size_bytes for entry in codec_tensors(checkpoint, name).values())


def tokenizer_bytes(checkpoint: Checkpoint, components: Sequence[str]) -> int:
    """Bytes of the tokenizer in a bundle; 0 where it is not among ``components``."""
    if TOKENIZER not in components:
        return 0
    return (checkpoint.components["text_tokenizer"] / TOKENIZER_FILE).stat().st_size


def _absence(name: str, checkpoint: Checkpoint, modalities: Sequence[str]) -> str:
    """Why there is no component ``name`` to be had; empty where there is."""
    if name == TOKENIZER:
        folder = checkpoint.components.get("text_tokenizer")
        if folder is None or not (folder / TOKENIZER_FILE).is_file():
            return f"the checkpoint has no text_tokenizer/{TOKENIZER_FILE}"
        return ""
    part = CODECS[name]
    if part.folder not in checkpoint.components:
        return f"the checkpoint has no {part.folder}/"
    if part.modality not in modalities:
        return f"{part.modality} is not among the modalities {', '.join(modalities)}"
    return ""


def _require_fit(name: str, part: CodecPart, checkpoint: Checkpoint) -> None:
    types = {entry.dtype for entry in codec_tensors(checkpoint, name).values()} - set(_CODEC_TYPES)
    if types:
        raise UnsupportedError(
            "CX226",
            f"{part.folder}/ has {', '.join(sorted(types))} weights; {name} is built from {' or '.join(_CODEC_TYPES)}",
            "leave it out with --components, or restore the published weights",
        )
    key, theirs = part.width
    found, wanted = codec_config(checkpoint, part.folder).get(key), getattr(checkpoint.geometry, theirs)
    if found != wanted:
        _misfit(f"{part.folder}/config.json: {key} = {shown(found)}, the transformer's {theirs} is {wanted}")


def _misfit(what: str) -> NoReturn:
    raise UserError("CX226", what, "the folders are of two models: download the checkpoint again")
