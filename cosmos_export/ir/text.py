"""Programs as text: readable, deterministic, fit for a diff."""

from __future__ import annotations

from typing import Any

import torch

from cosmos_export.ir.graph import Graph, Node, is_constant, is_weight, spec_of
from cosmos_export.ir.program import Program
from cosmos_export.ir.spec import DTYPE_NAMES


def _format(value: Any) -> str:
    if isinstance(value, Node):
        return f"%{value.name}"
    if isinstance(value, (tuple, list)):
        return f"[{', '.join(map(_format, value))}]"
    if isinstance(value, torch.dtype):
        return DTYPE_NAMES.get(value, str(value))
    return str(value)


def _operation(node: Node) -> str:
    name = str(node.target).removesuffix(".default")
    parts = [_format(a) for a in node.args] + [f"{k}={_format(v)}" for k, v in node.kwargs.items()]
    return f"{name}({', '.join(parts)})"


def print_graph(graph: Graph) -> str:
    """One line a node: name, type and shape, operation, and the module it comes from."""
    lines = [f"graph {graph.name} {{"]
    for node in graph.nodes:
        left = f"  %{node.name}: {spec_of(node)}"
        if is_weight(node):
            lines.append(f"{left} = weight {node.meta['weight']}")
        elif is_constant(node):
            lines.append(f"{left} = constant")
        elif node.op == "placeholder":
            lines.append(f"{left} = input")
        else:
            origin = f"  # {node.meta['module']}" if node.meta.get("module") else ""
            lines.append(f"{left} = {_operation(node)}{origin}")
    lines += [f"  output {name}: {spec_of(node)} = %{node.name}" for name, node in graph.outputs.items()]
    return "\n".join([*lines, "}"]) + "\n"


def print_program(program: Program) -> str:
    """The whole program: dims, inputs with their rates, edges, loop, graphs, and the tensors that nothing reads."""
    lines = [f"after {program.history[-1]}" if program.history else "empty", ""]
    lines += [f"dim {d.name}: {d.min}..{d.max}  # {d.meaning}" for d in program.dims.values()]
    lines += [f"input {name}: {rate.name.lower()}" for name, rate in program.rates.items()]
    lines += [f"edge {e.source}.{e.output} -> {e.target}.{e.input}" for e in program.edges]
    carried = ", ".join(f"{k} <- {v}" for k, v in program.loop.carried.items())
    lines += [f"loop {program.loop.body}: {carried}", ""]
    lines += [f"unused {key}: {reason}" for key, reason in program.unused_keys.items()]
    return "\n".join(lines) + "\n" + "\n".join(print_graph(g) for g in program.graphs.values())
