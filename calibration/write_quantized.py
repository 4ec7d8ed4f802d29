"""Writes a quantized checkpoint in the published ModelOpt layout, one linear in memory at a time.

Linears of the chosen towers are stored in one scheme with their scales beside them; every other tensor of the
transformer goes over byte by byte, and every other file of the checkpoint is copied or hard-linked, so that the result
is a whole checkpoint. ModelOpt's own ``modelopt_state.pth`` is a pickle and is neither read nor written.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cosmos_export import stamps
from cosmos_export.calibration.formats import layout_of, quantized_weight
from cosmos_export.calibration.table import LINEAGE_FILE, ScaleTable
from cosmos_export.calibration.weights import read_tensor
from cosmos_export.checkpoint import Checkpoint, ExpectedTensor, Tower
from cosmos_export.checkpoint.identity import chunks_of
from cosmos_export.checkpoint.layout import QUANTIZED_DTYPE
from cosmos_export.checkpoint.output import give_back, new_directory, require_space
from cosmos_export.checkpoint.quantization import FIRST_LAST_THREE
from cosmos_export.checkpoint.reader import WEIGHT_STEMS
from cosmos_export.checkpoint.safetensors_writer import TensorHeader, write_json, write_shards
from cosmos_export.checkpoint.shards import INDEX_SUFFIX, PICKLES
from cosmos_export.checkpoint.strict_json import optional_object, read_object
from cosmos_export.diagnostics import UnsupportedError, UserError
from cosmos_export.precision.layout import LinearInputs, Rounding
from cosmos_export.precision.schemes import SCHEMES
from cosmos_export.progress import Progress, Silent
from cosmos_export.release import VERSION

SHARD_SIZE = 5_000_000_000
QUANT_FILE = "hf_quant_config.json"
LINEAGE_COPY = f"calibration_{LINEAGE_FILE}"
ROOT_INDEX = f"{WEIGHT_STEMS['vision_encoder']}.safetensors{INDEX_SUFFIX}"
_WRITTEN = (ROOT_INDEX, QUANT_FILE, LINEAGE_COPY)
"""Files at the root that are those of the new checkpoint."""
_TASK = "quantize"
_SPARE_BYTES = 4 << 20
_IGNORED = (
    "embed_tokens", "lm_head", "proj_in", "proj_out", "time_embedder*", "audio_proj_in", "audio_proj_out",
    "action_proj_in", "action_proj_out", "model.visual*", "visual*",
)  # fmt: skip
"""Modules that are never quantized, as the published revision lists them."""


@dataclass(frozen=True)
class QuantizeOptions:
    """A request of `quantize`. ``policy``: steps and tower with 16-bit activations; a distilled one has none."""

    kind: str
    """A scheme that has a layout: one of `calibration.formats.FORMATS`."""
    towers: tuple[Tower, ...] = (Tower.REASONER, Tower.GENERATOR)
    rounding: Rounding = "exact"
    policy: bool = True
    link: bool = False
    """Hard links instead of copies of the files that stay as they are."""
    shard_size: int = SHARD_SIZE


@dataclass(frozen=True)
class QuantizeResult:
    """The result of `quantize`."""

    quantized: int
    kept: int
    size_bytes: int
    """Size of the transformer's files."""
    policy: bool
    buildable: bool
    """Whether `build` reads the format."""


def write_quantized_checkpoint(
    checkpoint: Checkpoint,
    table: ScaleTable,
    output: Path,
    options: QuantizeOptions,
    *,
    force: bool = False,
    progress: Progress | None = None,
) -> QuantizeResult:
    """Write ``output``; it appears when it is complete. The table's checkpoint is checked by the caller.

    CX312: the table lacks a range; CX330: the checkpoint cannot be quantized so; CX331: NaN in a weight; CX333:
    ``output`` exists; CX334: no room.
    """
    require_output(output, force)
    chosen = _chosen(checkpoint, options)
    _require_room_for_table(table, chosen, options.kind)
    inputs = {name: _inputs(table, name.removesuffix(".weight"), options.kind) for name in chosen}
    specs = list(_specs(checkpoint, chosen, inputs, options.kind))
    size = sum(spec.size_bytes for spec in specs)
    require_space(output, size + _SPARE_BYTES, "CX334", "the quantized checkpoint", "another disk, or fewer --towers")
    with_policy = layout_of(options.kind).step_policy and options.policy and has_step_policy(checkpoint)
    with new_directory(output, force) as folder:
        transformer = folder / "transformer"
        transformer.mkdir()
        with stamps.unchanged("quantization", checkpoint.inputs):
            producer = _Producer(checkpoint, inputs, options, progress or Silent(), size)
            stem = WEIGHT_STEMS["transformer"]
            weight_map = write_shards(transformer, stem, specs, producer.produce, options.shard_size)
            producer.close()
            config = read_object(checkpoint.components["transformer"] / "config.json")
            config["quantization_config"] = quantization_config(checkpoint, chosen, options, with_policy)
            write_json(transformer / "config.json", config)
            write_json(
                folder / QUANT_FILE, {"quant_method": "modelopt", "quant_algo": layout_of(options.kind).algorithm}
            )
            write_json(folder / LINEAGE_COPY, {"checkpoint": table.checkpoint, **table.lineage})
            _write_root_index(checkpoint, folder, weight_map)
            if not options.link:
                _take_rest(checkpoint, folder, _copy)
        if options.link:  # which changes the files' number of links, and so their state
            _take_rest(checkpoint, folder, _link)
    buildable = layout_of(options.kind).tensors(1, 1)["weight"][0] == QUANTIZED_DTYPE
    return QuantizeResult(len(chosen), len(checkpoint.expected) - len(chosen), size, with_policy, buildable)


def has_step_policy(checkpoint: Checkpoint) -> bool:
    """Whether the published FP8 revision of such a checkpoint mixes steps: distilled and text-to-image ones do not."""
    return checkpoint.distilled_sigmas is None and "text2image" not in checkpoint.variant


def require_output(output: Path, force: bool) -> None:
    """Nothing is at ``output``, or with ``force`` nothing but a checkpoint; CX333."""
    give_back(output)
    if not os.path.lexists(output):
        return
    if not force:
        raise UserError("CX333", f"{output} exists", "choose another directory, or --force to replace it")
    if output.is_symlink() or not (output / "transformer").is_dir():
        raise UserError("CX333", f"{output} exists and is not a checkpoint directory", "choose another directory")


def _chosen(checkpoint: Checkpoint, options: QuantizeOptions) -> dict[str, ExpectedTensor]:
    """The weights to quantize, by name; CX330 where one cannot be."""
    if checkpoint.quantization is not None:
        raise UnsupportedError(
            "CX330", f"{checkpoint.root} is quantized ({checkpoint.precision})", "start from its bf16 revision"
        )
    chosen = {
        name: tensor for name, tensor in checkpoint.expected.items() if tensor.linear and tensor.tower in options.towers
    }
    if not chosen:
        raise UserError("CX330", "no tower is chosen", "--towers reasoner,generator")
    for name, tensor in chosen.items():
        if problem := layout_of(options.kind).refusal(tensor.shape):
            raise UnsupportedError("CX330", f"{name} cannot be {options.kind}: {problem}", "another --format")
    return chosen


def _require_room_for_table(table: ScaleTable, chosen: Mapping[str, ExpectedTensor], kind: str) -> None:
    """CX330: INT4 would take the pre-scales of SVDQuant, which are for what is left beside its low-rank parts."""
    parts = [name for name in chosen if name.removesuffix(".weight") in table.low_rank]
    if SCHEMES[kind].pre_scaled and parts:
        raise UnsupportedError(
            "CX330",
            f"the scale table has low-rank parts of {len(parts)} linears ({parts[0]}, …), and the layout of a "
            "quantized checkpoint has no place for them",
            "`build --recipe int4 --calibration` with this table keeps them; for a checkpoint, calibrate with "
            "`--algorithm awq`",
        )


def _inputs(table: ScaleTable, linear: str, kind: str) -> LinearInputs:
    """The parts of the table that the scheme has a place for."""
    pre = table.pre_scales.get(linear) if SCHEMES[kind].pre_scaled else None
    return LinearInputs(
        table.input_amax(linear) if SCHEMES[kind].calibrated else None,
        None if pre is None else torch.from_numpy(pre.copy()),
    )


# -- tensors ----------------------------------------------------------------------------------------------------------


def _specs(
    checkpoint: Checkpoint, chosen: Mapping[str, ExpectedTensor], inputs: Mapping[str, LinearInputs], kind: str
) -> Iterator[TensorHeader]:
    """Every tensor of the new transformer, the scales of a linear after its weight."""
    for name in checkpoint.expected:
        entry = checkpoint.tensors[name]
        if name not in chosen:
            yield TensorHeader(name, entry.dtype, entry.shape)
            continue
        module, (rows, columns) = name.removesuffix("weight"), entry.shape
        for leaf, (dtype, shape) in layout_of(kind).tensors(rows, columns).items():
            yield TensorHeader(module + leaf, dtype, shape)
        if inputs[name].pre_scale is not None:
            yield TensorHeader(f"{module}pre_quant_scale", entry.dtype, (columns,))


class _Producer:
    """Bytes of each tensor in the order of the file; a linear is quantized when its weight is asked for."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        inputs: Mapping[str, LinearInputs],
        options: QuantizeOptions,
        progress: Progress,
        size: int,
    ) -> None:
        self._checkpoint, self._inputs, self._options, self._progress = checkpoint, inputs, options, progress
        self._pending: dict[str, torch.Tensor] = {}
        self._written = 0
        progress.begin(_TASK, size)

    def produce(self, spec: TensorHeader) -> Iterable[bytes | memoryview]:
        if spec.name in self._inputs:
            self._pending = self._quantized(spec.name)
        own = self._pending.pop(spec.name, None)
        chunks = chunks_of(self._checkpoint.tensors[spec.name]) if own is None else self._own(own)
        for chunk in chunks:
            self._written += len(chunk)
            yield chunk
        self._progress.update(_TASK, self._written)

    def close(self) -> None:
        self._progress.end(_TASK)

    def _quantized(self, name: str) -> dict[str, torch.Tensor]:
        weight = read_tensor(self._checkpoint.tensors[name])
        try:
            tensors = quantized_weight(self._options.kind, weight, self._inputs[name], self._options.rounding)
        except UserError as error:
            raise UserError(error.code, f"{name}: {error.message}", error.hint) from error
        module = name.removesuffix("weight")
        return {module + leaf: tensor for leaf, tensor in tensors.items()}

    @staticmethod
    def _own(tensor: torch.Tensor) -> Iterator[memoryview]:
        yield tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data


# -- configuration ----------------------------------------------------------------------------------------------------


def quantization_config(
    checkpoint: Checkpoint, chosen: Mapping[str, ExpectedTensor], options: QuantizeOptions, with_policy: bool
) -> dict[str, Any]:
    """``quantization_config`` of ``transformer/config.json``, with the keys of the published revision."""
    kept = [name.removesuffix(".weight") for name, t in checkpoint.expected.items() if t.linear and name not in chosen]
    ignored, layout = [*_IGNORED, *kept], layout_of(options.kind)
    config: dict[str, Any] = {
        "quant_method": "modelopt",
        "quant_algo": layout.algorithm,
        "quant_type": layout.types,
        "weight_only": SCHEMES[options.kind].weight_only,
        "config_groups": {"group_0": _group(options.kind)},
        "ignore": ignored,
        "modules_to_not_convert": ignored,
        "producer": {"name": "cosmos-export", "version": VERSION, **_rounding(options)},
    }
    return config | ({"runtime": {"diffusion_step_policy": dict(FIRST_LAST_THREE)}} if with_policy else {})


def _rounding(options: QuantizeOptions) -> dict[str, str]:
    """The rounding that was chosen, where there is a choice."""
    return {"fp8_rounding": options.rounding} if len(layout_of(options.kind).roundings) > 1 else {}


def _group(kind: str) -> dict[str, Any]:
    numbers = {"dynamic": False, **layout_of(kind).numbers}
    read = {} if SCHEMES[kind].weight_only else {"input_activations": numbers}
    return {**read, "weights": dict(numbers), "targets": ["Linear"]}


# -- the rest of the checkpoint ---------------------------------------------------------------------------------------


def _take_rest(checkpoint: Checkpoint, folder: Path, take: Callable[[Path, Path], None]) -> None:
    """Every file except the transformer's weights and configuration, what is written anew, and what is never opened:
    pickles."""
    weights = {*checkpoint.weight_files(), *checkpoint.folded_files}
    weights |= {path.with_name("adapter_config.json") for path in checkpoint.folded_files}
    stem = WEIGHT_STEMS["transformer"]
    for path in _files(checkpoint):
        relative = path.relative_to(checkpoint.root)
        written_anew = path in weights or (
            relative.parts[0] == "transformer"
            and (path.name == "config.json" or path.name.startswith(f"{stem}.safetensors"))
        )
        if written_anew or path.suffix in PICKLES or relative.as_posix() in _WRITTEN:
            continue
        target = folder / relative
        target.parent.mkdir(parents=True, exist_ok=True)
        take(path, target)


def _files(checkpoint: Checkpoint) -> Iterator[Path]:
    """Regular files at the root and in the folders that are no hidden ones."""
    for directory, folders, names in os.walk(checkpoint.root):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            path = Path(directory, name)
            if not name.startswith(".") and path.is_file():
                yield path


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source.resolve(), target)
    except OSError:  # another file system
        _copy(source, target)


def _copy(source: Path, target: Path) -> None:
    with stamps.unchanged("quantization", stamps.Inputs("the checkpoint", (source,))):
        shutil.copyfile(source, target)


def _write_root_index(checkpoint: Checkpoint, folder: Path, weight_map: Mapping[str, str]) -> None:
    """The index transformers reads the reasoner from, with the new shards and scales; none where there was none."""
    old = optional_object(checkpoint.root / ROOT_INDEX)
    if old is None:
        return
    entries: dict[str, str] = {
        name: file for name, file in old.get("weight_map", {}).items() if not file.startswith("transformer/")
    }
    listed = set(old.get("weight_map", {}))
    for name, file in weight_map.items():
        module, _, _ = name.rpartition(".")
        if name in listed or f"{module}.weight" in listed:
            entries[name] = f"transformer/{file}"
    sizes: dict[str, int] = {}
    for path in {folder / file for file in entries.values()}:
        sizes |= {entry.name: entry.size_bytes for entry in _entries(path)}
    total = sum(sizes.get(name, 0) for name in entries)
    write_json(folder / ROOT_INDEX, {"metadata": {"total_size": total}, "weight_map": dict(sorted(entries.items()))})


def _entries(path: Path) -> Iterable[Any]:
    from cosmos_export.checkpoint.safetensors_header import read_header

    return read_header(path).tensors.values() if path.is_file() else ()
