"""Graphs of a bundle through PyTorch: compiled by inductor, on a GPU as captured CUDA graphs. The one backend that
needs torch, which is imported when it is opened.

A closed loop is one call: state, tables and noise are on the device before its first step, and no step waits for the
host. Weights are copied from the bundle's files to the device in pieces, once, and shared by every graph that has the
same.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, BinaryIO

import ml_dtypes
import numpy as np

from cosmos_export.bundle import BundleFiles, Manifest
from cosmos_export.bundle.strict import AtLeast, decode
from cosmos_export.checkpoint.strict_json import parse_object
from cosmos_export.diagnostics import ToolError, UnsupportedError, UserError, shown
from cosmos_export.targets.sessions import PROMPT, Array, Value

if TYPE_CHECKING:
    import torch

    from cosmos_export.ir.graph import Graph
    from cosmos_export.targets.inductor.executable import Executable
    from cosmos_export.targets.inductor.specialise import CompileSettings

NAME = "inductor"
_DTYPES: Mapping[str, np.dtype[Any]] = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float8_e4m3fn": np.dtype(ml_dtypes.float8_e4m3fn),
    "int64": np.dtype(np.int64),
    "int32": np.dtype(np.int32),
    "bool": np.dtype(np.bool_),
}
_BITS = {np.dtype(ml_dtypes.bfloat16): np.uint16, np.dtype(ml_dtypes.float8_e4m3fn): np.uint8}
"""Types that numpy and torch exchange as bits."""


def numpy_type(dtype: torch.dtype) -> np.dtype[Any]:
    return _DTYPES[str(dtype).removeprefix("torch.")]


def to_torch(array: Array, dtype: torch.dtype) -> torch.Tensor:
    """A tensor on the host with the elements of ``array``, cast to ``dtype``; shares no memory with it."""
    import torch

    own = numpy_type(dtype)
    data = np.array(array, dtype=own, order="C")
    bits = _BITS.get(own)
    return torch.from_numpy(data) if bits is None else torch.from_numpy(data.view(bits)).view(dtype)


class TorchValue:
    """A tensor that nothing writes to any more."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape)

    def numpy(self) -> Array:
        own = numpy_type(self.tensor.dtype)
        host = self.tensor.detach().cpu().contiguous()
        bits = _BITS.get(own)
        if bits is None:
            plain: Array = host.numpy()
            return plain
        import torch

        viewed = host.view(torch.int16 if bits is np.uint16 else torch.uint8).numpy()
        return viewed.view(own)


class TorchSession:
    """One graph on one device."""

    def __init__(self, name: str, executable: Executable) -> None:
        self._name = name
        self._executable = executable

    @property
    def inputs(self) -> Mapping[str, np.dtype[Any]]:
        return {name: numpy_type(dtype) for name, dtype in self._executable.inputs.items()}

    @property
    def outputs(self) -> tuple[str, ...]:
        return tuple(self._executable.graph.outputs)

    def run(self, feeds: Mapping[str, Array | Value]) -> dict[str, Value]:
        given, tokens = _place(self._executable, self._executable.inputs, feeds)
        made = _guarded(self._name, self._executable, given, tokens)
        return {name: TorchValue(tensor.clone()) for name, tensor in made.items()}

    def close(self) -> None:
        _forget(self)


@dataclass(frozen=True)
class LoopDocument:
    """The closed loop over the graph of a document: `Loop` of `cosmos_export.ir.program`."""

    steps: Annotated[int, AtLeast(1)]
    carried: Mapping[str, str]
    rows: tuple[str, ...]
    taken: tuple[str, ...]
    returned: tuple[str, ...]

    def check(self, graph: Graph, tables: Mapping[str, tuple[int, ...]]) -> None:
        """ValueError where it is not a loop over ``graph`` with ``tables`` of these shapes."""
        for what, names, allowed in (
            ("carried", self.carried, graph.inputs), ("carried", self.carried.values(), graph.outputs),
            ("rows", self.rows, graph.inputs), ("taken", self.taken, self.carried),
            ("returned", self.returned, self.carried), ("the table", tables, graph.inputs),
        ):  # fmt: skip
            for name in names:
                if name not in allowed:
                    raise ValueError(f"{shown(name)} of {what} is not of this loop")
        if not self.taken:
            raise ValueError("the loop takes no state")
        for name, shape in tables.items():
            if shape[:1] != (self.steps,):
                raise ValueError(f"the table {shown(name)} is {list(shape)} for {self.steps} steps")


class LoopSession:
    """A closed loop."""

    def __init__(
        self, name: str, executable: Executable, loop: LoopDocument, tables: Mapping[str, torch.Tensor]
    ) -> None:
        self._name = name
        self._executable = executable
        from cosmos_export.targets.inductor.executable import Steps

        self._carried: dict[str, str] = dict(loop.carried)
        self._taken, self._returned = loop.taken, loop.returned
        self._tables = tables
        rows = tuple(dict.fromkeys((*loop.rows, *tables)))
        self._steps = Steps(loop.steps, self._carried, rows, self._returned)

    @property
    def inputs(self) -> Mapping[str, np.dtype[Any]]:
        return {name: numpy_type(self._executable.inputs[name]) for name in self._free}

    @property
    def outputs(self) -> tuple[str, ...]:
        return tuple(f"{name}_final" for name in self._returned)

    @property
    def _free(self) -> list[str]:
        """Inputs that are given: not in a table, and of the state only what the loop takes."""
        inner = {*self._tables, *self._carried} - set(self._taken)
        return [name for name in self._executable.inputs if name not in inner]

    def run(self, feeds: Mapping[str, Array | Value]) -> dict[str, Value]:
        import torch

        given, tokens = _place(self._executable, self._free, feeds)
        like = next(iter(self._taken))
        for name in self._carried:
            if name not in given:
                given[name] = torch.zeros_like(given.get(f"{name.rpartition('_')[0]}_sample", given[like]))
        # What never changes is read once: values that other graphs made, and the tables, each its own token. What is
        # new in this call has a token of its own, for all the steps that are replayed on it.
        tokens |= dict(self._tables)
        tokens = {name: tokens.get(name, object()) for name in (*given, *self._tables) if name not in self._carried}
        executable, steps = self._executable, self._steps
        made = _guarded(self._name, lambda i, t: executable.loop(steps, i, t), {**given, **self._tables}, tokens)
        return {f"{name}_final": TorchValue(value.clone()) for name, value in made.items()}

    def close(self) -> None:
        _forget(self)


def _place(
    executable: Executable, wanted: Any, feeds: Mapping[str, Array | Value]
) -> tuple[dict[str, torch.Tensor], dict[str, object]]:
    """Inputs on the device, and what each that nobody changes comes from."""
    given: dict[str, torch.Tensor] = {}
    tokens: dict[str, object] = {}
    for name in wanted:
        value, dtype = feeds[name], executable.inputs[name]
        if isinstance(value, TorchValue):
            given[name], tokens[name] = value.tensor, value
        else:
            given[name] = to_torch(np.asarray(value), dtype).to(executable.device)
    return given, tokens


def _guarded(
    name: str,
    call: Callable[[Mapping[str, torch.Tensor], Mapping[str, object]], dict[str, torch.Tensor]],
    inputs: Mapping[str, torch.Tensor],
    tokens: Mapping[str, object],
) -> dict[str, torch.Tensor]:
    try:
        return call(inputs, tokens)
    except (RuntimeError, ValueError, TypeError) as error:  # torch's own, of the compiler too, are RuntimeErrors
        said = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        hint = "fewer frames or a smaller size take less memory" if "out of memory" in str(error) else ""
        raise ToolError("CX501", f"PyTorch failed in graph `{name}`: {said}", hint) from error


def _forget(session: TorchSession | LoopSession) -> None:
    import torch

    del session._executable
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


class TorchExecutor:
    """The graphs of a bundle on one device.

    They are compiled for the sizes of a request and any length of its prompts: a new prompt compiles nothing.
    """

    def __init__(self, files: BundleFiles, device: torch.device, settings: CompileSettings | None = None) -> None:
        self._files, self._device, self._settings = files, device, settings
        self._weights: dict[tuple[Path, int], torch.Tensor] = {}

    @property
    def name(self) -> str:
        return NAME

    @property
    def device(self) -> str:
        return str(self._device)

    def open(self, graph: str) -> TorchSession | LoopSession:
        from cosmos_export.ir.serialize import read_graph
        from cosmos_export.targets.inductor.executable import Executable
        from cosmos_export.targets.inductor.specialise import CompileSettings

        try:
            document = parse_object(self._files.read(f"graphs/{graph}.json", "graph"))
            loop = document.pop("loop", None)
            if document.keys() != {"graph"}:
                raise ValueError(f"its document has the fields {shown(sorted(document))}")
            own = read_graph(document["graph"], Path("onnx"))
            if loop is not None:
                loop, tables = decode(LoopDocument, loop, "loop"), self._loop_tables(graph)
                loop.check(own, {name: array.shape for name, array in tables.items()})
            weights = {name: self._weight(node.meta["weight"]) for name, node in own.weights.items()}
        except (UserError, OSError, ValueError) as error:  # of memmap, too, where a file is too short
            raise ToolError("CX502", f"graph `{graph}` of {self._files.path} cannot be loaded: {error}") from error
        settings = replace(self._settings or CompileSettings(), open_dims=prompt_dims(graph, own, self._files.manifest))
        executable = Executable(own, weights, self._device, settings)
        if loop is None:
            return TorchSession(graph, executable)
        types = executable.inputs
        return LoopSession(
            graph, executable, loop, {name: to_torch(a, types[name]).to(self._device) for name, a in tables.items()}
        )

    def _loop_tables(self, graph: str) -> dict[str, Array]:
        from safetensors import SafetensorError
        from safetensors.numpy import load

        try:
            return dict(load(self._files.read(f"tables/{graph}.safetensors", "table")))
        except SafetensorError as error:
            raise ValueError(f"its table: {error}") from error

    def _weight(self, binding: Any) -> torch.Tensor:
        (source,) = binding.sources
        key = (source.file, source.offset)
        if key not in self._weights:
            with self._files.open(source.file.as_posix(), "weights") as file:
                self._weights[key] = load_weight(source, self._device, file)
        return self._weights[key]

    def close(self) -> None:
        self._weights.clear()


def prompt_dims(name: str, graph: Graph, manifest: Manifest) -> frozenset[str]:
    """Dims of graph ``name`` that differ from prompt to prompt: of token ids, and of what is made of them."""
    from cosmos_export.ir.graph import spec_of

    readers = {source for source, record in manifest.graphs.items() if any(t.name == PROMPT for t in record.inputs)}
    given = {edge.input for edge in manifest.edges if edge.target == name and edge.source in readers}
    inputs = [node for own, node in graph.inputs.items() if own == PROMPT or own in given]
    sizes = [size for node in inputs for size in spec_of(node).shape if not isinstance(size, int)]
    return frozenset(dim.name for size in sizes for dim in size.free_symbols)


_PIECE_BYTES = 64 << 20


def load_weight(source: Any, device: torch.device, file: BinaryIO | Path) -> torch.Tensor:
    """A weight on ``device``, from ``file``; of one with two numbers in each byte, the bytes, uint8 [N, K / 2].

    It is read and not mapped: ValueError where the file is too short or is truncated meanwhile, not SIGBUS.
    """
    import torch

    from cosmos_export.ir.spec import INT4

    packed = source.dtype is INT4
    shape = (*source.shape[:-1], source.shape[-1] // 2) if packed else source.shape
    dtype = torch.uint8 if packed else source.dtype
    result = torch.empty(shape, dtype=dtype, device=device)
    target = result.view(-1).view(torch.uint8)
    if not target.numel():
        return result
    buffer = np.empty(min(_PIECE_BYTES, target.numel()), np.uint8)
    with file.open("rb") if isinstance(file, Path) else nullcontext(file) as opened:
        for start in range(0, target.numel(), _PIECE_BYTES):
            piece = buffer[: target.numel() - start]
            _read_into(opened.fileno(), piece, source.offset + start)
            target[start : start + len(piece)].copy_(torch.from_numpy(piece))
    return result


def _read_into(descriptor: int, buffer: np.ndarray, offset: int) -> None:
    left = buffer.data
    while left:
        read = os.preadv(descriptor, [left], offset)
        if not read:
            raise ValueError(f"its file of weights ends at {offset:,} bytes, {len(left):,} more are needed")
        left, offset = left[read:], offset + read


def open_graphs(files: BundleFiles, device: str | None) -> TorchExecutor:
    """PyTorch for the bundle, on ``cuda[:N]`` or ``cpu``.

    UnsupportedError CX503: torch is not installed; CX505: the bundle has no graphs for it, or there is no such GPU.
    """
    if not any(file.role == "graph" for file in files.manifest.files):
        raise UnsupportedError(
            "CX505",
            "this bundle has no graphs for PyTorch",
            "build it for h100 or h200, or run another backend",
        )
    try:
        import torch
    except ImportError as error:
        raise UnsupportedError(
            "CX503", f"PyTorch is not installed: {error}", 'pip install ".[compile]" in the checkout'
        ) from error
    kind, _, index = (device or "cuda").partition(":")
    if kind == "cuda" and (not torch.cuda.is_available() or int(index or 0) >= torch.cuda.device_count()):
        raise UnsupportedError(
            "CX505", f"no CUDA device {index or 0} that PyTorch {torch.__version__} can use",
            "`--device cpu` runs the same graphs, slowly",
        )  # fmt: skip
    chosen = torch.device(kind, int(index or 0)) if kind == "cuda" else torch.device("cpu")
    return TorchExecutor(files, chosen)
