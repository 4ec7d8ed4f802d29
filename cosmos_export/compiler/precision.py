"""The precision of a build: a job's recipe on its program, and what the engines are to contain because of it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import torch

from cosmos_export.calibration.table import ScaleTable, read_scale_table
from cosmos_export.checkpoint import Checkpoint, Tower, quantized_linears
from cosmos_export.checkpoint.safetensors_header import TensorEntry
from cosmos_export.compiler.job import Job
from cosmos_export.diagnostics import InternalError
from cosmos_export.evaluation.gates import wrong_scales
from cosmos_export.ir.dims import product
from cosmos_export.ir.graph import Graph, Node, is_weight, spec_of
from cosmos_export.ir.ops import aten
from cosmos_export.ir.packing import E4M3_MAX
from cosmos_export.ir.program import Program
from cosmos_export.ir.spec import WeightSource
from cosmos_export.passes.insert_quantization import scheme_of
from cosmos_export.passes.options import PassOptions, Ranges
from cosmos_export.precision.sites import GEN, UND
from cosmos_export.targets.onnx.model import gemm_name

_PRE_SCALE, _DOWN, _UP = ".pre_quant_scale", ".low_rank_down", ".low_rank_up"
_INPUT = ".input_amax"
_ATTENTION = re.compile(r".+?(?P<layer>\d+)\.attention\.generator\.(?P<operand>[qkv])_amax")
_TOWERS = {Tower.REASONER: UND, Tower.GENERATOR: GEN}


def pass_options(job: Job) -> PassOptions:
    """Options of the passes of a build."""
    if not job.quantized:
        return PassOptions(job.outputs, schedule=job.schedule, kernels=job.kernels)
    towers = {name: _TOWERS.get(expected.tower, "") for name, expected in job.checkpoint.expected.items()}
    ranges = activation_ranges(job.checkpoint, job.scales)
    return PassOptions(
        job.outputs, job.precision.over_steps, towers, ranges, schedule=job.schedule, kernels=job.kernels
    )


def require_scales(programs: Iterable[Program], checkpoint: Checkpoint, table: Path | None) -> None:
    """CX363: an activation of the quantized ``programs`` is scaled by another range than the one in the scale
    ``table``, or in the ``checkpoint`` where there is none. Both are read again."""
    if table is None:
        linears = {
            name: E4M3_MAX * stored.input_scale
            for name, stored in quantized_linears(checkpoint).items()
            if stored.input_scale is not None
        }
        attention = {}
    else:
        amax = read_scale_table(table).amax
        linears = {key.removesuffix(_INPUT): value for key, value in amax.items() if key.endswith(_INPUT)}
        attention = _attention_ranges(amax)
    wrong = [line for program in programs for line in wrong_scales(program, linears, attention)]
    if wrong:
        raise InternalError("CX363", f"{len(wrong)} scales of activations are not those of their ranges: {wrong[0]}")


def activation_ranges(checkpoint: Checkpoint, scales: ScaleTable | None) -> Ranges:
    """The scale table ``scales``, or without one the scales in the checkpoint, in the words of the pass. Pre-scales
    that are equal become one source."""
    if scales is None:
        return Ranges(_stored_ranges(checkpoint))
    entries = scales.stored
    sources: dict[bytes, WeightSource] = {}
    pre_scales = {}
    for linear, factors in scales.pre_scales.items():
        entry = entries[linear + _PRE_SCALE]
        data = np.ascontiguousarray(factors).tobytes()
        source = sources.setdefault(data, _source(linear + _PRE_SCALE, entry))
        pre_scales[linear] = source
    low_rank = {}
    for linear, (down, _) in scales.low_rank.items():
        data = np.ascontiguousarray(down).tobytes()
        shared = sources.setdefault(data, _source(linear + _DOWN, entries[linear + _DOWN]))
        low_rank[linear] = shared, _source(linear + _UP, entries[linear + _UP])
    return Ranges(scales.amax, pre_scales, low_rank, _attention_ranges(scales.amax))


def _attention_ranges(amax: Mapping[str, float]) -> dict[tuple[int, str], float]:
    """Ranges of the generator's attention, by layer and operand."""
    found = ((_ATTENTION.fullmatch(key), value) for key, value in amax.items())
    return {(int(match["layer"]), match["operand"]): value for match, value in found if match is not None}


def _stored_ranges(checkpoint: Checkpoint) -> dict[str, float]:
    """Ranges that the input scales of a quantized checkpoint say. Exact in float64."""
    linears = quantized_linears(checkpoint)
    return {f"{n}.input_amax": E4M3_MAX * q.input_scale for n, q in linears.items() if q.input_scale is not None}


def _source(key: str, entry: TensorEntry) -> WeightSource:
    return WeightSource(key, Path(entry.file), entry.offset, torch.float32, tuple(entry.shape))


# -- what plans are to contain ----------------------------------------------------------------------------------------


def planned_type(node: Node) -> str | None:
    """Type of the product of the linear ``node``, by its name in engines; None for the model's own type."""
    scheme = scheme_of(node)
    return None if scheme is None else scheme.engine


def planned_types(graph: Graph) -> dict[str, str]:
    """Name of every quantized product of ``graph`` in its model → what it is to compute in."""
    found = {gemm_name(node): planned_type(node) for node in graph.calls(aten.linear.default)}
    return {name: kind for name, kind in found.items() if kind is not None}


def layer_weights(graph: Graph) -> dict[str, int]:
    """Elements of the weight of every linear that is part of a layer, by the name of its product."""
    found = {}
    for node in graph.calls(aten.linear.default):
        weight = node.args[1]
        leaves = [weight] if is_weight(weight) else list(weight.all_input_nodes)
        if any("precision" in leaf.meta for leaf in leaves):
            found[gemm_name(node)] = int(product(spec_of(weight).shape))
    return found
