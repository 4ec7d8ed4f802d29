"""Accounts for every tensor of the transformer's files: part of the model, or not needed for a stated reason."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NoReturn

import numpy as np

from cosmos_export import kinds
from cosmos_export.checkpoint.adapters import MERGE_HINT, is_adapter_key
from cosmos_export.checkpoint.geometry import Geometry
from cosmos_export.checkpoint.layout import (
    QUANTIZED_DTYPE,
    SCALES,
    WEIGHT_DTYPES,
    ExpectedTensor,
    canonical_name,
    leftover_reason,
)
from cosmos_export.checkpoint.quantization import Quantization
from cosmos_export.checkpoint.safetensors_header import TensorEntry, read_exactly
from cosmos_export.diagnostics import UserError

_NAMES_SHOWN = 5
_CHUNK_BYTES = 1 << 24


@dataclass(frozen=True)
class Mapped:
    """The tensors of the model by name (scales beside quantized weights), and every other tensor with its reason."""

    tensors: dict[str, TensorEntry]
    unused: dict[str, str]
    precision: str
    dtype: str


def map_tensors(
    entries: Iterable[TensorEntry],
    expected: Mapping[str, ExpectedTensor],
    geometry: Geometry,
    quantization: Quantization | None,
) -> Mapped:
    """Raises CX114 and CX120 … CX124 when the files and the configuration are not of one model."""
    found, unused = _match(entries, expected, geometry)
    _check_shapes_and_types(found, expected)
    tensors, stray = _take_scales(found, expected, quantization)
    dtype = _dtype(tensors, expected)
    return Mapped(tensors, unused | stray, dtype if quantization is None else quantization.label, dtype)


def _match(
    entries: Iterable[TensorEntry], expected: Mapping[str, ExpectedTensor], geometry: Geometry
) -> tuple[dict[str, TensorEntry], dict[str, str]]:
    """Tensors by expected name, and the reason of each that is not expected. Scales stay under ``module.scale``."""
    found: dict[str, TensorEntry] = {}
    unused: dict[str, str] = {}
    unexpected: list[str] = []
    for entry in sorted(entries, key=lambda entry: (canonical_name(entry.name) != entry.name, entry.name)):
        name = canonical_name(entry.name)
        module, _, leaf = name.rpartition(".")
        scale_of = expected.get(f"{module}.weight") if leaf in SCALES else None
        if name in expected or (scale_of is not None and scale_of.may_be_quantized):
            if name not in found:
                found[name] = entry
            elif _same_bytes(found[name], entry):
                unused[entry.name] = f"identical copy of {found[name].name}"
            else:
                raise UserError(
                    "CX114",
                    f"{found[name].name} and {entry.name} are the same tensor under two names, with different contents",
                    "files of two downloads are mixed: download the folder again",
                )
        elif (reason := leftover_reason(entry.name) or _disabled_head(name, geometry)) is not None:
            unused[entry.name] = reason
        else:
            unexpected.append(entry.name)
    missing = [name for name in expected if name not in found]
    kind = kinds.of_names(unexpected, expected, canonical_name) if unexpected else None
    if kind is not None and not any(map(is_adapter_key, unexpected)):
        code, lacks = ("CX120", f"; {_count(missing, 'tensor')} missing") if missing else ("CX121", "")
        raise UserError(code, f"tensors in transformer/ are {kind.what}: {_some(unexpected)}{lacks}", kind.hint)
    if missing:
        also = f"; not recognised: {_some(unexpected)}" if unexpected else ""
        raise UserError(
            "CX120",
            f"{_count(missing, 'tensor')} of the model missing from transformer/: {_some(missing)}{also}",
            _hint(unexpected)
            or "the configuration and the weights are of different models, or the download is incomplete",
        )
    if unexpected:
        raise UserError(
            "CX121",
            f"{_count(unexpected, 'tensor')} in transformer/ that the model does not have: {_some(unexpected)}",
            _hint(unexpected)
            or "the configuration and the weights are of different models, or this variant is newer than cosmos-export",
        )
    return found, unused


def _hint(unexpected: Iterable[str]) -> str:
    """The hint for tensors that an adapter has left among those of the model; empty where there are none."""
    return f"an adapter is not merged into these weights: {MERGE_HINT}" if any(map(is_adapter_key, unexpected)) else ""


def _disabled_head(name: str, geometry: Geometry) -> str | None:
    for head, enabled in (("action", geometry.action_gen), ("audio", geometry.sound_gen)):
        if not enabled and name.startswith((f"{head}_proj_in.", f"{head}_proj_out.", f"{head}_modality_embed")):
            return f"the configuration turns this head off ({'sound' if head == 'audio' else head}_gen is false)"
    return None


def _check_shapes_and_types(tensors: Mapping[str, TensorEntry], expected: Mapping[str, ExpectedTensor]) -> None:
    for name, want in expected.items():
        entry = tensors[name]
        if entry.shape != want.shape:
            raise UserError(
                "CX122",
                f"{name} in {entry.file.name} has the shape {list(entry.shape)}; "
                f"the configuration needs {list(want.shape)}",
                "the configuration and the weights are of different models",
            )
        if entry.dtype not in WEIGHT_DTYPES and not (entry.dtype == QUANTIZED_DTYPE and want.may_be_quantized):
            legal = (*WEIGHT_DTYPES, QUANTIZED_DTYPE) if want.may_be_quantized else WEIGHT_DTYPES
            raise UserError(
                "CX123",
                f"{name} in {entry.file.name} has the type {entry.dtype}; legal here: {', '.join(legal)}",
                "use the BF16 revision or the published FP8 revision",
            )


def _take_scales(
    found: Mapping[str, TensorEntry], expected: Mapping[str, ExpectedTensor], quantization: Quantization | None
) -> tuple[dict[str, TensorEntry], dict[str, str]]:
    """Each quantized weight has its scales, and only those; scales of a weight that is not quantized are unused."""
    quantized = [name for name in expected if found[name].dtype == QUANTIZED_DTYPE]
    if quantized and quantization is None:
        _bad_scales(
            f"{_count(quantized, 'weight')} in FP8 ({_some(quantized)}), but the configuration has no "
            "quantization_config, so nothing says what the numbers mean"
        )
    if quantization is not None and not quantized:
        _bad_scales("the configuration says FP8, but no weight is")
    needed = SCALES[:1] if quantization is not None and quantization.weight_only else SCALES
    kept = {name: found[name] for name in expected}
    for name in quantized:
        module = name.removesuffix("weight")
        for scale in needed if expected[name].linear else SCALES[:1]:
            entry = found.get(module + scale)
            if entry is None:
                _bad_scales(f"{name} is FP8 but has no {scale}")
            if entry.dtype != "F32" or entry.elements != 1:
                _bad_scales(
                    f"{entry.name} is {entry.dtype} {list(entry.shape)}; the published layout has one F32 number"
                )
            kept[module + scale] = entry
    unused = {
        entry.name: "the scale of a weight that is not quantized" for name, entry in found.items() if name not in kept
    }
    return kept, unused


def _dtype(tensors: Mapping[str, TensorEntry], expected: Mapping[str, ExpectedTensor]) -> str:
    kinds = {tensors[name].dtype for name in expected if not name.startswith("time_embedder.")} - {QUANTIZED_DTYPE}
    return {"BF16": "bf16", "F32": "fp32", "F16": "fp16"}[kinds.pop()] if len(kinds) == 1 else "mixed"


def _same_bytes(a: TensorEntry, b: TensorEntry) -> bool:
    """Compares contents; reached only when a file has a tensor under two names."""
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    for start in range(0, a.size_bytes, _CHUNK_BYTES):
        size = min(_CHUNK_BYTES, a.size_bytes - start)
        if not np.array_equal(
            read_exactly(a.file, a.offset + start, size), read_exactly(b.file, b.offset + start, size)
        ):
            return False
    return True


def _some(names: list[str]) -> str:
    rest = len(names) - _NAMES_SHOWN
    return ", ".join(names[:_NAMES_SHOWN]) + (f" and {rest} more" if rest > 0 else "")


def _count(names: list[str], what: str) -> str:
    return f"{len(names)} {what}{'' if len(names) == 1 else 's'}"


def _bad_scales(what: str) -> NoReturn:
    raise UserError(
        "CX124", what, "use the published revision=fp8, or the BF16 revision and quantize with cosmos-export"
    )
