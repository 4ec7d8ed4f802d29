"""Programs as text: readable, deterministic, fit for a diff, and complete: two programs that differ never print alike.

Left out is what no result follows from: the passes that touched a node, and the directory that the checkpoint is in.
Files are numbered as they first appear.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from cosmos_export.ir.graph import Graph, Node, is_constant, is_weight, spec_of, specs_of
from cosmos_export.ir.program import Program
from cosmos_export.ir.spec import DTYPE_NAMES, LowRank, Packing, Transform, WeightBinding, WeightSource

_SHOWN = 8
"""Elements of a constant up to which its values are printed; of a larger one there is a digest."""


class _Files:
    """Numbers of the files that weights are read from."""

    def __init__(self) -> None:
        self.numbers: dict[Path, int] = {}

    def __getitem__(self, path: Path) -> int:
        return self.numbers.setdefault(path, len(self.numbers))


def _format(value: Any) -> str:
    if isinstance(value, Node):
        return f"%{value.name}"
    if isinstance(value, tuple | list):
        return f"[{', '.join(map(_format, value))}]"
    if isinstance(value, torch.dtype):
        return DTYPE_NAMES.get(value, str(value))
    return repr(value) if isinstance(value, str) else str(value)


def _operation(node: Node) -> str:
    named = isinstance(node.target, torch._ops.OpOverload)
    name = str(node.target).removesuffix(".default") if named else node.target.__name__
    parts = [_format(a) for a in node.args] + [f"{k}={_format(v)}" for k, v in node.kwargs.items()]
    return f"{name}({', '.join(parts)})"


def _source(source: WeightSource, files: _Files) -> str:
    """``key@file+offset``, with the stored type, and the shape that it adds to the value's own."""
    shape = "x".join(map(str, source.shape))
    text = f"{source.key}@{files[source.file]}+{source.offset}:{_format(source.dtype)}[{shape}]"
    return text if source.scale is None else f"{text} * {_source(source.scale, files)}"


def _binding(binding: WeightBinding, files: _Files) -> str:
    inner = ", ".join(_source(source, files) for source in binding.sources)
    text = inner if binding.transform is Transform.IDENTITY else f"{binding.transform.value}({inner})"
    return text if binding.packing is None else _packed(text, binding.packing, files)


def _packed(text: str, packing: Packing, files: _Files) -> str:
    parts = [text, f"to={_format(packing.dtype)}"]
    if packing.group:
        parts.append(f"group={packing.group}")
    if packing.divisor is not None:
        parts.append(f"divisor={_source(packing.divisor, files)}")
    if packing.low_rank is not None:
        parts.append(f"less={_low_rank(packing.low_rank, files)}")
    return f"{packing.format.name}_{packing.part.value}({', '.join(parts)})"


def _low_rank(low_rank: LowRank, files: _Files) -> str:
    up = ", ".join(_source(source, files) for source in low_rank.up)
    return f"[{up}] x {_source(low_rank.down, files)}"


def _constant(value: torch.Tensor) -> str:
    """The values of a small constant, exactly; the SHA-256 of the bytes of a larger one."""
    if value.numel() <= _SHOWN:
        return str([str(item) if isinstance(item, complex) else item for item in value.flatten().tolist()])
    data = value.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes()
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def print_graph(graph: Graph, name: str | None = None, files: _Files | None = None) -> str:
    """One line per node: name, type and shape, operation, and the module it comes from."""
    files = _Files() if files is None else files
    lines = [f"graph {graph.name if name is None else name} {{"]
    for node in graph.nodes:
        specs = specs_of(node)
        left = f"  %{node.name}: {', '.join(map(str, specs)) if isinstance(specs, tuple) else specs}"
        if is_weight(node):
            right = f"weight {_binding(node.meta['weight'], files)}"
        elif is_constant(node):
            right = f"constant {_constant(node.meta['constant'])}"
        else:
            right = "input" if node.op == "placeholder" else _operation(node)
        shown = ("precision",) if node.op == "placeholder" else ("module", "precision")
        remarks = [str(node.meta[key]) for key in shown if node.meta.get(key)]
        lines.append(f"{left} = {right}{'  # ' if remarks else ''}{' | '.join(remarks)}")
    lines += [f"  output {key}: {spec_of(node)} = %{node.name}" for key, node in graph.outputs.items()]
    return "\n".join([*lines, "}"]) + "\n"


def _loop(program: Program) -> Iterator[str]:
    loop = program.loop
    yield f"loop {loop.body}: {', '.join(f'{k} <- {v}' for k, v in loop.carried.items())}"
    if loop.steps is not None:
        yield f"loop steps {loop.start}..{loop.start + loop.steps}"
    for what in ("rows", "taken", "returned", "pieces"):
        names: tuple[str, ...] = getattr(loop, what)
        if names:
            yield f"loop {what} {', '.join(names)}"


def print_program(program: Program) -> str:
    """The whole program: dims, inputs with their rates, edges, loop, graphs, and the tensors that nothing reads."""
    files = _Files()
    graphs = "\n".join(print_graph(graph, name, files) for name, graph in program.graphs.items())
    lines = [f"after {program.history[-1]}" if program.history else "empty", ""]
    lines += [f"dim {d.name}: {d.min}..{d.max}  # {d.meaning}" for d in program.dims.values()]
    lines += [f"input {name}: {rate.name.lower()}" for name, rate in program.rates.items()]
    for e in program.edges:
        run = f" ({e.instance} run)" if e.instance else ""
        lines.append(f"edge {e.source}.{e.output} -> {e.target}.{e.input}{run}")
    lines += [*_loop(program), ""]
    lines += [f"unused {key}: {reason}" for key, reason in program.unused_keys.items()]
    lines += [f"file {number}: {path.name}" for path, number in files.numbers.items()]
    return "\n".join(lines) + "\n" + graphs
