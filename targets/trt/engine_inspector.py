"""Contents of a built TensorRT-RTX engine, read from the file without a GPU.

An engine starts with a 64-byte header and carries its layers as text (tensors, kernels in order, memory regions) and
the CUDA source of generated kernels. The format is not documented: it is decoded for the versions in `KNOWN_VERSIONS`
only, and for others nothing is guessed. A diagnostic, never something to run from.
"""

from __future__ import annotations

import fnmatch
import mmap
import os
import re
import struct
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import BinaryIO

from cosmos_export.diagnostics import UserError

NARROW_SHARE = 0.99
"""Share of the weights planned in 8 or 4 bit that must be multiplied so."""

KNOWN_VERSIONS = frozenset({(1, 7, 1, 116)})

_HEADER_BYTES = 64
_MAGIC = b"vtrt"
_SECTION = b"NGNE"
# Byte 32 of the header, one bit per compute capability.
_CAPABILITY_BITS = ("7.5", "8.0", "8.6", "8.9", "12.0", "12.1")

_TYPES: Mapping[str, str] = {
    "float": "fp32",
    "half": "fp16",
    "bf16": "bf16",
    "fp8_e4m3": "fp8",
    "fp4_e2m1": "fp4",
    "int4": "int4",
    "int8": "int8",
    "FP32": "fp32",
    "FP16": "fp16",
    "BF16": "bf16",
    "E4M3": "fp8",
}
_NARROW = ("fp4", "int4", "fp8", "int8")
_WIDE = ("bf16", "fp16", "fp32")


@dataclass(frozen=True)
class PlanHeader:
    """The fixed part of an engine file."""

    version: tuple[int, int, int, int]
    size_bytes: int
    compute_capabilities: tuple[str, ...]
    """Empty where the version is not one this module knows."""


@dataclass(frozen=True)
class Gemm:
    """One matrix multiplication of the engine."""

    name: str
    nodes: tuple[str, ...]
    """ONNX nodes it was made from."""
    operands: tuple[str, ...]
    """Types of its operands with more than one element, a fused residual included."""
    type: str
    """Type in which the layer computes: ``bf16``, ``fp8``, ``nvfp4`` …; ``fp8-weight``: narrow weight, wide
    activations."""
    scores: bool
    """It reads or writes a matrix whose last dimension is dynamic: a piece of attention that did not fuse."""


@dataclass(frozen=True)
class FusedAttention:
    """One fused attention kernel of the engine."""

    name: str
    type: str
    """Type of its operands."""
    accumulate: str | None
    """Type of the inner products; None where the kernel source was not found."""
    scale: float | None
    """Literal multiplied into the logits."""


@dataclass(frozen=True)
class PlanGraph:
    """The layers of one optimization profile."""

    profile: int
    kernels: int
    attention: tuple[FusedAttention, ...]
    gemms: tuple[Gemm, ...]
    softmax: tuple[str, ...]
    """Kernels that compute a softmax outside a fused attention."""
    dequantize: tuple[str, ...]
    """Kernels that widen a whole static tensor, that is a weight, on every call."""
    activation_bytes: int
    """All device regions for activations at the largest shapes."""
    largest_activation_bytes: int
    allocations: int
    """Buffers allocated while running, beyond the regions."""
    stream_capturable: bool

    def gemm_types(self) -> Counter[str]:
        """How many GEMMs compute in each type."""
        return Counter(gemm.type for gemm in self.gemms)


@dataclass(frozen=True)
class EngineSummary:
    """Result of `inspect_plan`. Without ``graphs``, ``not_inspected`` says why."""

    header: PlanHeader
    graphs: tuple[PlanGraph, ...] = ()
    not_inspected: str | None = None


@dataclass(frozen=True)
class EngineExpectation:
    """Planned contents of an engine."""

    attention: int
    """Fused attention kernels, one per layer; 0 where attention is meant to be decomposed (FP32)."""
    gemm_type: str
    """Type every GEMM computes in, `Gemm.type`, unless a pattern in ``other_gemms`` matches one of its nodes."""
    other_gemms: Mapping[str, str] = field(default_factory=dict)
    """Shell patterns over ONNX node names → type."""
    compute_capability: str | None = None
    profiles: int = 1
    attention_type: str | None = None
    attention_scale: float | None = None
    """The exact logit scale. A kernel may hold it, or 1 where the product went into the kernel before. The literal of
    a narrow kernel holds the quantization scales too and is not compared."""
    layer_weights: Mapping[str, int] = field(default_factory=dict)
    """ONNX nodes that multiply by the weights of layers → elements of the weight."""
    narrow_share: float = 0.0
    """The part of them, by elements, that is meant to be multiplied in 8 or 4 bit."""
    weight_dequantize: bool = False
    """A separate kernel may dequantize weights (weight-only FP8)."""
    max_activation_bytes: int | None = None
    stream_capturable: bool | None = None


def read_header(path: Path) -> PlanHeader:
    """The header of the engine at ``path``; a `UserError` if it is no engine or not a whole one."""
    with path.open("rb") as stream:
        return header_of(stream, path.name)


def header_of(stream: BinaryIO, name: str) -> PlanHeader:
    """The header of the engine ``name`` that ``stream`` reads from its beginning; `UserError` as from `read_header`."""
    data, actual = stream.read(_HEADER_BYTES), os.fstat(stream.fileno()).st_size
    if len(data) < _HEADER_BYTES or data[:4] != _MAGIC:
        raise UserError("CX430", f"`{name}` is not a TensorRT-RTX engine: no header")
    size = struct.unpack_from("<Q", data, 16)[0]
    if size != actual:
        raise UserError("CX430", f"`{name}` has {actual} bytes, its header says {size}", "copy or build it again")
    major, minor, patch, build = data[24:28]
    version = (major, minor, patch, build)
    bits = data[32] if version in KNOWN_VERSIONS else 0
    capabilities = tuple(name for bit, name in enumerate(_CAPABILITY_BITS) if bits >> bit & 1)
    return PlanHeader(version, size, capabilities)


def inspect_engine(path: Path) -> EngineSummary:
    """Read the header and, for a known version, the layers of every profile. The file is mapped, not loaded."""
    header = read_header(path)
    if header.version not in KNOWN_VERSIONS:
        known = ", ".join(".".join(map(str, version)) for version in sorted(KNOWN_VERSIONS))
        found = ".".join(map(str, header.version))
        return EngineSummary(header, not_inspected=f"engines of version {found} are not decoded (known: {known})")
    with path.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
        graphs = tuple(_graph(text, sources) for text, sources in _texts(data))
    if not graphs:
        return EngineSummary(header, not_inspected="the engine carries no plan text")
    return EngineSummary(header, graphs)


def check_engine(summary: EngineSummary, expect: EngineExpectation) -> list[str]:
    """Problems of an engine, one line each; empty if it is as planned. One not inspected is a problem."""
    if summary.not_inspected is not None:
        return [f"plan not inspected: {summary.not_inspected}"]
    problems = []
    capability = expect.compute_capability
    if capability is not None and summary.header.compute_capabilities != (capability,):
        found = ", ".join(summary.header.compute_capabilities) or "none"
        problems.append(f"built for compute capability {found}, expected {capability} alone")
    profiles = sorted({graph.profile for graph in summary.graphs})
    if profiles != list(range(expect.profiles)):
        problems.append(f"contains profiles {profiles}, expected {expect.profiles}")
    for graph in summary.graphs:
        problems += [f"profile {graph.profile}: {problem}" for problem in _graph_problems(graph, expect)]
    return problems


def _graph_problems(graph: PlanGraph, expect: EngineExpectation) -> Iterator[str]:
    if len(graph.attention) != expect.attention:
        yield f"{len(graph.attention)} fused attention kernels, expected {expect.attention}"
    for number, attention in enumerate(graph.attention):
        if expect.attention_type is not None and attention.type != expect.attention_type:
            yield f"attention {number} computes in {attention.type}, planned {expect.attention_type}"
        if attention.accumulate not in (None, "fp32"):
            yield f"attention {number} accumulates in {attention.accumulate}, planned fp32"
        exact, scale = expect.attention_scale, attention.scale
        if exact is None or scale is None or scale == 1 or attention.type not in _WIDE:
            continue
        # A thousandth passes the BF16 rounding of an exact factor, not that of two square roots (0.25 %).
        if abs(scale - exact) > 1e-3 * exact:
            yield f"attention {number} scales logits by {scale:.6g}, exact {exact:.6g}: {scale / exact - 1:+.2%}"
    if expect.attention:
        decomposed = [gemm.name for gemm in graph.gemms if gemm.scores]
        if decomposed:
            yield f"attention fell back to matrix products over stored scores: {_some(decomposed)}"
        if graph.softmax:
            yield f"softmax outside fused attention: {_some(graph.softmax)}"
    wrong: dict[tuple[str, str], list[str]] = {}
    for gemm in graph.gemms:
        others = [kind for pattern, kind in expect.other_gemms.items() if fnmatch.filter(gemm.nodes, pattern)]
        planned = others[0] if others else expect.gemm_type
        if gemm.type != planned and not (gemm.scores and not expect.attention):
            wrong.setdefault((gemm.type, planned), []).append(gemm.name)
    for (kind, planned), names in wrong.items():
        yield f"{len(names)} of {len(graph.gemms)} GEMMs compute in {kind}, planned {planned}: {_some(names)}"
    share = narrow_share(graph, expect.layer_weights)
    if share < NARROW_SHARE * expect.narrow_share:
        yield f"{share:.1%} of the layers' weights are stored in 8 or 4 bit, planned {expect.narrow_share:.1%}"
    if not graph.gemms:
        yield "no GEMM was found"
    if graph.dequantize and not expect.weight_dequantize:
        yield f"whole weights are dequantized on every call: {_some(graph.dequantize)}"
    ceiling = expect.max_activation_bytes
    if ceiling is not None and graph.activation_bytes > ceiling:
        yield f"activations take {graph.activation_bytes} bytes at the largest shapes, planned at most {ceiling}"
    if expect.stream_capturable is not None and graph.stream_capturable != expect.stream_capturable:
        yield f"stream_capturable is {graph.stream_capturable}, planned {expect.stream_capturable}"


def narrow_share(graph: PlanGraph, weights: Mapping[str, int]) -> float:
    """The part of ``weights`` (ONNX node → elements) that the engine multiplies by in 8 or 4 bit; 0 without any."""
    narrow: dict[str, bool] = {}
    for gemm in graph.gemms:
        for name in weights.keys() & set(gemm.nodes):
            narrow[name] = narrow.get(name, True) and gemm.type not in (*_WIDE, "unknown")
    total = sum(weights.values())
    return sum(count for name, count in weights.items() if narrow.get(name)) / total if total else 0.0


def _some(names: tuple[str, ...] | list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


# ---------------------------------------------------------------------------------------------------------------------
# The text


# Version 5 is a whole graph; version 4 texts are single kernels compiled on the device.
_TEXT_START = b"header {\n  version = 5\n"
_ATTENTION = "_gemm_mha"
_KERNELS = ("function", "fully_connected", "runtime_fusion", "corrltn")

_LIST = r'((?:\s*(?:"[^"]*"|-?\d+))*)\s*\}'
_TENSOR = re.compile(r"^  (?:sub_)?tensor=\{ (.*)\}$", re.M)
_NAME = re.compile(r'(?:^|\s)name=(?:"([^"]*)"|(\S+))')
_DIMS = re.compile(r"(?:^|\s)dims=\{" + _LIST)
_TYPE = re.compile(r"\stype=(\w+)")
_OPERATION = re.compile(r"^  ([a-z_]+)=\{ (.*)", re.M)
_INPUTS = re.compile(r"\s(?:input_args|input)=\{" + _LIST)
_OUTPUTS = re.compile(r"\s(?:output_args|output)=\{" + _LIST)
_NODES = re.compile(r"\[ONNX Layer: ([^\]]*)\]")
# One region where every shape is fixed, several where some are not.
_REGION = re.compile(r"^  region = \{ name=devmem(?:_topdown_\d+)? size=(\d+)", re.M)
_PROFILE = re.compile(r"\[profile (\d+)\]")
_BINARY = re.compile(r"\sbinary ?= ?(\d+)")
_SOURCE = re.compile(
    rb"initialize\(DATA_TYPE_(\w+), DATA_TYPE_(\w+), DATA_TYPE_(\w+),[^;]*?\s(-?0x[01](?:\.[0-9a-f]+)?p[+-]\d+)f"
)


@dataclass(frozen=True)
class _Tensor:
    type: str
    dims: tuple[int | None, ...]
    """None: dynamic."""
    constant: bool

    @property
    def matrix(self) -> bool:
        return any(size is None or size > 1 for size in self.dims)


def _texts(data: mmap.mmap) -> Iterator[tuple[str, list[tuple[str, str, str, float]]]]:
    """Each graph text, with what the sources of its attention kernels say (operands, accumulator, scale)."""
    offset, size = struct.unpack_from("<QQ", data, _HEADER_BYTES + 8)
    # The section table follows the header; the first section holds layers and code, the second the weights.
    known = data[_HEADER_BYTES : _HEADER_BYTES + 4] == _SECTION and offset + size <= len(data)
    end = offset + size if known else len(data)
    starts = []
    at = data.find(_TEXT_START, 0, end)
    while at >= 0:
        starts.append(at)
        at = data.find(_TEXT_START, at + 1, end)
    for start, following in pairwise([*starts, end]):
        stop = data.find(b"\0", start, following)
        text = data[start : stop if stop >= 0 else following].decode("utf-8", "replace")
        with memoryview(data) as view:
            found = [
                (match[1].decode(), match[2].decode(), match[3].decode(), float.fromhex(match[4].decode()))
                for match in _SOURCE.finditer(view[stop:following])
            ]
        yield text, found


def _graph(text: str, sources: list[tuple[str, str, str, float]]) -> PlanGraph:
    tensors = dict(_tensors(text))
    main = text[text.find("\nmain {") :].partition("\nshape_main {")[0]
    header = text.partition("\ndescriptors {")[0]
    attention: list[tuple[str, str, int]] = []
    gemms: list[Gemm] = []
    softmax, dequantize = [], []
    kinds: Counter[str] = Counter()
    for match in _OPERATION.finditer(main):
        kind, body = match[1], match[2]
        kinds[kind] += 1
        name = _name(body)
        inputs = [tensors[arg] for arg in _list(_INPUTS, body) if arg in tensors]
        outputs = [tensors[arg] for arg in _list(_OUTPUTS, body) if arg in tensors]
        if kind == "function" and name.startswith(_ATTENTION):
            binary = _BINARY.search(body)
            operand = next((tensor.type for tensor in inputs if tensor.matrix), "unknown")
            attention.append((name, operand, int(binary[1]) if binary else -1))
        elif kind == "fully_connected" or (kind == "runtime_fusion" and "backbone=gemm" in body):
            gemms.append(_gemm(kind, name, body, inputs, outputs))
        elif kind in ("function", "runtime_fusion"):
            # Names list the fused operations: …MaxrSubExpSum… is a softmax.
            if re.search(r"Exp\w*Sum|Softm", name):
                softmax.append(name)
            widens = any(tensor.type in _WIDE and tensor.matrix for tensor in outputs)
            if widens and any(_is_weight(tensor) for tensor in inputs):
                dequantize.append(name)
    regions = [int(size) for size in _REGION.findall(header)]
    profile = _PROFILE.search(header)
    return PlanGraph(
        profile=int(profile[1]) if profile else 0,
        kernels=sum(kinds[kind] for kind in _KERNELS),
        attention=_attention(attention, sources),
        gemms=tuple(gemms),
        softmax=tuple(softmax),
        dequantize=tuple(dequantize),
        activation_bytes=sum(regions),
        largest_activation_bytes=max(regions, default=0),
        allocations=kinds["allocate"],
        stream_capturable="\n  stream_capturable=1\n" in header,
    )


def _tensors(text: str) -> Iterator[tuple[str, _Tensor]]:
    for match in _TENSOR.finditer(text):
        body = match[1]
        kind, dims = _TYPE.search(body), _DIMS.search(body)
        if kind and dims:
            sizes = tuple(None if part.startswith('"') else int(part) for part in re.findall(r'"[^"]*"|-?\d+', dims[1]))
            yield _name(body), _Tensor(_TYPES.get(kind[1], kind[1]), sizes, "const_payload_size=" in body)


def _gemm(kind: str, name: str, body: str, inputs: list[_Tensor], outputs: list[_Tensor]) -> Gemm:
    # The first two inputs of a plain product are its operands; of a fusion all are, residual and scales too.
    operands = [tensor for tensor in (inputs[:2] if kind == "fully_connected" else inputs) if tensor.matrix]
    types = Counter(tensor.type for tensor in operands)
    narrow = next((kind for kind in _NARROW if types[kind]), None)
    if narrow is None:
        most = max(types.values(), default=0)
        computes = next((kind for kind in _WIDE if types[kind] == most), "unknown") if most else "unknown"
    elif types[narrow] >= 2:
        computes = "nvfp4" if narrow == "fp4" else narrow
    else:
        computes = f"{narrow}-weight"
    # A product with a weight has none, whatever the layout of its result (sound is written [channels, rows]).
    dynamic = any(tensor.dims and tensor.dims[-1] is None for tensor in (*operands, *outputs))
    dynamic &= not any(tensor.constant for tensor in operands)
    nodes = tuple(dict.fromkeys(_NODES.findall(body)))
    return Gemm(
        name="+".join(nodes) or name,
        nodes=nodes,
        operands=tuple(tensor.type for tensor in operands),
        type=computes,
        scores=dynamic,
    )


def _attention(
    kernels: list[tuple[str, str, int]], sources: list[tuple[str, str, str, float]]
) -> tuple[FusedAttention, ...]:
    # Kernels name their source by number, equal sources share one; sources are in the file in that order.
    numbers = sorted({binary for _, _, binary in kernels})
    known = dict(zip(numbers, sources, strict=True)) if len(numbers) == len(sources) else {}
    fused = []
    for name, operand, binary in kernels:
        source = known.get(binary)
        accumulate = _TYPES.get(source[2], source[2]) if source else None
        fused.append(FusedAttention(name, operand, accumulate, source[3] if source else None))
    return tuple(fused)


def _is_weight(tensor: _Tensor) -> bool:
    """A narrow matrix of static size: activations have a dynamic row count.

    What is no constant and has three sizes is keys or values of the prompt, in a profile of one length.
    """
    static = tensor.type in _NARROW and None not in tensor.dims and tensor.matrix
    return static and (tensor.constant or sum(size != 1 for size in tensor.dims) <= 2)


def _name(body: str) -> str:
    match = _NAME.search(body)
    return (match[1] or match[2] or "") if match else ""


def _list(pattern: re.Pattern[str], body: str) -> list[str]:
    match = pattern.search(body)
    return re.findall(r'"([^"]*)"', match[1]) if match else []
