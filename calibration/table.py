"""The scale table: what calibration found of a checkpoint's activations, and of which data.

A directory with ``scales.safetensors`` (the numbers) and ``lineage.json`` (where they come from, with the hash of the
former and of itself). Nothing in it is a weight, and nothing in it depends on the format that will be made of it: an
observed range becomes a scale of FP8 or of NVFP4 by a division. Reading fails closed.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from types import MappingProxyType
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from cosmos_export import files, kinds
from cosmos_export.bundle.strict import DIGEST, StrictError, check_seal, parse_object, seal
from cosmos_export.checkpoint import Checkpoint, checkpoint_identity
from cosmos_export.checkpoint.output import give_back, new_directory
from cosmos_export.checkpoint.safetensors_header import TensorEntry, read_header
from cosmos_export.checkpoint.safetensors_writer import TensorHeader, encode_header
from cosmos_export.diagnostics import UserError, shown
from cosmos_export.progress import Progress
from cosmos_export.stamps import Inputs, unchanged

SCALES_FILE, LINEAGE_FILE, RECIPE_FILE = "scales.safetensors", "lineage.json", "recipe.toml"
VERSION = 2

_INPUT, _PRE = ".input_amax", ".pre_quant_scale"
_DOWN, _UP = ".low_rank_down", ".low_rank_up"
_ATTENTION = re.compile(r".+\.attention\.(reasoner|generator)\.[qkv]_amax")
_IDENTITY = re.compile(r"[0-9a-f]{64}")
_CALIBRATE = "make one with `cosmos-export calibrate`"

PreScale = NDArray[np.float32]
"""[K]: factor of each input channel of a linear before it is quantized (AWQ); the weight is divided by it."""


@dataclass(frozen=True)
class ScaleTable:
    """Ranges of activations of one checkpoint.

    Keys of ``amax`` are those of the file: ``<linear>.input_amax``, where a linear has the name of its weight without
    ``.weight`` (``layers.0.self_attn.add_q_proj``), and ``<layer>.attention.<tower>.q_amax`` (``k_amax``, ``v_amax``)
    of what enters attention after norm and rotation: of the generator, q of its own rows and k and v of all rows it
    attends to. Each is the largest |x| that is to be representable, margin included. Keys of ``pre_scales`` are
    linears.
    """

    amax: Mapping[str, float]
    pre_scales: Mapping[str, PreScale]
    checkpoint: str
    """`checkpoint_identity` of the checkpoint that was calibrated."""
    lineage: Mapping[str, Any] = field(default_factory=dict)
    """Data, settings and coverage, as ``lineage.json`` has them."""
    low_rank: Mapping[str, tuple[PreScale, PreScale]] = field(default_factory=dict)
    """Parts of low rank by linear: ``down`` [rank, K] and ``up`` [N, rank]; up · down of the scaled weight stays in 16
    bit (SVDQuant)."""
    recipe: str = ""
    """The text of ``recipe.toml``, of a search that chose schemes; it is for `build --recipe`, and not read back."""
    scales_sha256: str = field(default="", compare=False)
    """The digest of ``scales.safetensors``, of a table that was read."""
    document: bytes = field(default=b"", compare=False, repr=False)
    """``lineage.json`` as it was read."""
    stored: Mapping[str, TensorEntry] = field(default_factory=dict, compare=False, repr=False)
    """Where the tensors of ``scales.safetensors`` are in the file, of a table that was read."""

    def __post_init__(self) -> None:
        for key, value in self.amax.items():
            if not (key.endswith(_INPUT) or _ATTENTION.fullmatch(key)):
                _damaged(f"{shown(key)} is not a range")
            if not (math.isfinite(value) and value > 0):
                _damaged(f"{key} = {value}; a range is a finite number above 0")
        for linear, scale in self.pre_scales.items():
            if scale.ndim != 1 or scale.dtype != np.float32 or not (np.isfinite(scale).all() and (scale > 0).all()):
                _damaged(f"{linear}{_PRE} is not a row of finite float32 numbers above 0")
            if linear + _INPUT not in self.amax:
                _damaged(f"{linear} has a pre-scale and no range")
        for linear, (down, up) in self.low_rank.items():
            if linear not in self.pre_scales or down.ndim != 2 or up.ndim != 2 or down.shape[0] != up.shape[1]:
                _damaged(f"{linear} has a part of low rank that does not fit")
        if not _IDENTITY.fullmatch(self.checkpoint):
            _damaged(f"the checkpoint's identity {shown(self.checkpoint)} is not a SHA-256")

    def input_amax(self, linear: str) -> float:
        """Range of the input of ``linear``; CX312 where the table has none."""
        key = linear + _INPUT
        if key not in self.amax:
            raise UserError(
                "CX312", f"the scale table has no {key}", "calibrate with the towers and modes of the recipe"
            )
        return self.amax[key]


def require_checkpoint(table: ScaleTable, checkpoint: Checkpoint, progress: Progress | None = None) -> None:
    """``table`` was made of exactly these weights, or CX311. Hashes the checkpoint, so call it once."""
    linears = {f"{name.removesuffix('.weight')}" for name, tensor in checkpoint.expected.items() if tensor.linear}
    known = {key.removesuffix(_INPUT) for key in table.amax if key.endswith(_INPUT)} | set(table.pre_scales)
    if known - linears:
        _stale(f"it has a range of {sorted(known - linears)[0]}, which this checkpoint does not have")
    for linear, scale in table.pre_scales.items():
        width = checkpoint.expected[f"{linear}.weight"].shape[1]
        if scale.shape != (width,):
            _stale(f"the pre-scale of {linear} has {scale.size} channels, its weight has {width}")
    for linear, (down, up) in table.low_rank.items():
        if (up.shape[0], down.shape[1]) != checkpoint.expected[f"{linear}.weight"].shape:
            _stale(f"the part of low rank of {linear} is not of its weight's shape")
    found = checkpoint_identity(checkpoint, progress)
    if found != table.checkpoint:
        _stale(f"it is of the checkpoint {table.checkpoint[:12]}…, this one is {found[:12]}…")


def _stale(what: str) -> NoReturn:
    raise UserError("CX311", f"the scale table is of another checkpoint: {what}", "calibrate this checkpoint")


# -- files ------------------------------------------------------------------------------------------------------------


def write_scale_table(table: ScaleTable, directory: Path, *, force: bool = False) -> None:
    """Write ``directory``, whole or not at all. CX313: it exists (``force`` replaces a scale table)."""
    require_output(directory, force)
    with new_directory(directory, force) as folder:
        tensors: dict[str, NDArray[np.float32]] = {
            key: np.asarray(value, dtype="<f4") for key, value in sorted(table.amax.items())
        }
        tensors |= {f"{name}{_PRE}": scale for name, scale in sorted(table.pre_scales.items())}
        for name, (down, up) in sorted(table.low_rank.items()):
            tensors |= {f"{name}{_DOWN}": down, f"{name}{_UP}": up}
        specs = [TensorHeader(name, "F32", value.shape) for name, value in tensors.items()]
        parts = (tensors[spec.name].astype("<f4").tobytes() for spec in specs)
        digest = _write(folder / SCALES_FILE, chain([encode_header(specs)], parts))
        if table.recipe:
            _write(folder / RECIPE_FILE, [table.recipe.encode()])
        lineage = {
            "format": "cosmos-export scale table",
            "version": VERSION,
            "checkpoint": table.checkpoint,
            "scales_sha256": digest,
            "lineage": dict(table.lineage),
        }
        _write(folder / LINEAGE_FILE, [seal(lineage)])


def require_output(directory: Path, force: bool) -> None:
    """Nothing is at ``directory``, or with ``force`` nothing but a scale table; CX313."""
    give_back(directory)
    if not os.path.lexists(directory):
        return
    if not force:
        raise UserError("CX313", f"{directory} exists", "choose another directory, or --force to replace it")
    ours = directory.is_dir() and not directory.is_symlink() and (directory / LINEAGE_FILE).is_file()
    if not ours:
        raise UserError("CX313", f"{directory} exists and is not a scale table", "choose another directory")


def read_scale_table(directory: Path) -> ScaleTable:
    """`_read` of files that do not change while they are read."""
    with unchanged("its reading", Inputs("the scale table", (), (directory,))):
        return _read(directory)


def _read(directory: Path) -> ScaleTable:
    """The table in ``directory``. CX310: it is none, or damaged, or of another version; CX1xx: a file is unreadable."""
    if not (directory / LINEAGE_FILE).is_file():
        kind = kinds.of_folder(directory) if directory.is_dir() else kinds.of_file(directory)
        if kind is not None:
            raise UserError("CX310", f"{directory} is not a scale table: it is {kind.what}", _CALIBRATE)
        raise UserError("CX310", f"{directory} is not a scale table: it has no {LINEAGE_FILE}", _CALIBRATE)
    document, data = _read_lineage(directory / LINEAGE_FILE)
    if not isinstance(document["lineage"], dict) or not isinstance(document["checkpoint"], str):
        _damaged(f"{LINEAGE_FILE} does not say what was calibrated")
    file = directory / SCALES_FILE
    header = read_header(file)
    with files.opened(file) as opened:
        digest = hashlib.file_digest(opened, "sha256").hexdigest()
    if digest != document["scales_sha256"]:
        _damaged(f"{SCALES_FILE} is not the file that {LINEAGE_FILE} belongs to")
    amax: dict[str, float] = {}
    pre_scales: dict[str, PreScale] = {}
    low_rank: dict[str, dict[str, PreScale]] = defaultdict(dict)
    for name, entry in header.tensors.items():
        if entry.dtype != "F32":
            _damaged(f"{name} has the type {entry.dtype}; all numbers of a table are F32")
        if name.endswith(_PRE):
            pre_scales[name.removesuffix(_PRE)] = np.array(entry.array(), dtype=np.float32)
        elif name.endswith((_DOWN, _UP)):
            linear, part = name.rsplit(".", 1)
            low_rank[linear][f".{part}"] = entry.array()
        elif entry.shape == ():
            amax[name] = float(entry.array())
        else:
            _damaged(f"{name} has the shape {list(entry.shape)}; a range is one number")
    halves = [linear for linear, parts in low_rank.items() if len(parts) != 2]
    if halves:
        _damaged(f"{halves[0]} has one half of a part of low rank")
    return ScaleTable(
        MappingProxyType(amax),
        MappingProxyType(pre_scales),
        document["checkpoint"],
        MappingProxyType(document["lineage"]),
        MappingProxyType({linear: (parts[_DOWN], parts[_UP]) for linear, parts in low_rank.items()}),
        scales_sha256=digest,
        document=data,
        stored=header.tensors,
    )


def _read_lineage(path: Path) -> tuple[dict[str, Any], bytes]:
    """The sealed document in ``path``, and its bytes. It belongs to the numbers, and none of it was changed."""
    try:
        data = files.read_bytes(path)
    except OSError as error:
        raise UserError("CX310", f"cannot read {path}: {files.reason(error)}", _CALIBRATE) from error
    try:
        document = parse_object(data)
        if document.get("version") != VERSION or isinstance(document["version"], bool):
            _damaged(f"version {shown(document.get('version'))}; this cosmos-export reads {VERSION}")
        if document.keys() != {"format", "version", "checkpoint", "scales_sha256", "lineage", DIGEST}:
            _damaged(f"{LINEAGE_FILE} has the keys {shown(sorted(document))}")
        check_seal(document, data)
    except StrictError as error:
        _damaged(f"{LINEAGE_FILE}: {error}")
    return document, data


def _write(path: Path, parts: Iterable[bytes]) -> str:
    """The SHA-256 of what was written."""
    digest = hashlib.sha256()
    with path.open("wb") as file:
        for part in parts:
            digest.update(part)
            file.write(part)
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest()


def _damaged(what: str) -> NoReturn:
    raise UserError("CX310", f"not a scale table: {what}", _CALIBRATE)
