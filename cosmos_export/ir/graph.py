"""A graph: functional operations between named inputs, weights and constants, and named outputs.

It wraps ``torch.fx.Graph``. Node metadata:

``spec``       TensorSpec of the value, or a tuple of them where an operation has several results
``module``     path of the module the node comes from
``passes``     names of the passes that made or touched it
``weight``     WeightBinding (weight placeholders only)
``constant``   small tensor (constant placeholders only)
``precision``  what a matrix product is and computes in (its weight, or attention itself), once that is assigned
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any, TypeAlias, TypeGuard, cast

import torch
from torch import fx
from torch.fx.node import map_arg

from cosmos_export.ir import ops
from cosmos_export.ir.dims import equal
from cosmos_export.ir.spec import TensorSpec, WeightBinding

if TYPE_CHECKING:

    class Node:
        """The part of ``fx.Node`` that passes use. The type of an operand follows from the operation; no checker sees
        it."""

        name: str
        op: str
        target: Any
        args: tuple[Any, ...]
        kwargs: dict[str, Any]
        meta: dict[str, Any]
        users: dict[Node, None]
        all_input_nodes: list[Node]
        next: Node

        def replace_all_uses_with(self, replace_with: Node) -> list[Node]: ...

        def replace_input_with(self, old_input: Node, new_input: Node) -> None: ...

else:
    Node = fx.Node


def map_operands(operands: Any, function: Callable[[Node], Any]) -> Any:
    """``operands`` with ``function`` applied to every node in them."""
    return map_arg(operands, cast(Any, function))


def spec_of(node: Node) -> TensorSpec:
    """Type and shape of ``node``, which is one value. Of an operation with several results, readers take one."""
    spec = node.meta["spec"]
    assert isinstance(spec, TensorSpec)
    return spec


def is_op(value: Any, *targets: Any) -> TypeGuard[Node]:
    """``value`` is a node that calls one of ``targets``."""
    return isinstance(value, Node) and value.op == "call_function" and value.target in targets


def is_weight(node: Node) -> bool:
    return node.op == "placeholder" and "weight" in node.meta


def is_constant(node: Node) -> bool:
    return node.op == "placeholder" and "constant" in node.meta


def is_input(node: Node) -> bool:
    return node.op == "placeholder" and not is_weight(node) and not is_constant(node)


Specs: TypeAlias = TensorSpec | tuple[TensorSpec, ...]
"""Type and shape of a value, or of each of several results."""


def specs_of(node: Node) -> Specs:
    """The result of `infer` for ``node``."""
    specs: Specs = node.meta["spec"]
    return specs


def infer(target: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Specs:
    """Type and shape of ``target(*args, **kwargs)``.

    Raises SpecError for an unknown operation and for operands that do not fit.
    """
    known = ops.OPERATIONS.get(target)
    if known is None:
        raise ops.SpecError(f"`{target}` is not in the dialect")
    try:
        operands = _signature(known.rule).bind(
            *map_operands(tuple(args), specs_of), **map_operands(dict(kwargs), specs_of)
        )
    except TypeError as error:
        raise ops.SpecError(f"operands of `{target}`: {error}") from error
    found: Specs = known.rule(*operands.args, **operands.kwargs)
    return found


_signature = cache(inspect.signature)


def row_operands(node: Node) -> list[Node]:
    """The operands whose rows are the rows of ``node``: row i of it follows from row i of these and from the whole of
    all others. Empty for a value without such, as where an operation mixes rows."""
    known = ops.OPERATIONS.get(node.target)
    if node.op != "call_function" or known is None:
        return []
    args, kwargs = map_operands(node.args, specs_of), map_operands(node.kwargs, specs_of)
    found: list[Node] = []
    map_operands([node.args[at] for at in known.row_positions(*args, **kwargs)], found.append)
    if ops.Trait.ELEMENTWISE in known.traits:
        rank = spec_of(node).rank
        return [n for n in found if rank and spec_of(n).rank == rank and not equal(spec_of(n).shape[0], 1)]
    return found


class Graph:
    """Operations with typed, named inputs and outputs."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.fx = fx.Graph()
        self._output = _node(self.fx.output({}))

    # -- reading ------------------------------------------------------------------------------------------------------

    @property
    def nodes(self) -> Iterator[Node]:
        return (_node(n) for n in self.fx.nodes if n.op != "output")

    def names(self) -> set[str]:
        return {n.name for n in self.nodes}

    def calls(self, *targets: Any) -> list[Node]:
        """Operation nodes in order; of the given targets where any is given."""
        return [n for n in self.nodes if n.op == "call_function" and (not targets or n.target in targets)]

    def placeholders(self, kind: Callable[[Node], bool]) -> dict[str, Node]:
        return {n.name: n for n in self.nodes if n.op == "placeholder" and kind(n)}

    @property
    def inputs(self) -> dict[str, Node]:
        return self.placeholders(is_input)

    @property
    def weights(self) -> dict[str, Node]:
        return self.placeholders(is_weight)

    @property
    def constants(self) -> dict[str, Node]:
        return self.placeholders(is_constant)

    @property
    def outputs(self) -> dict[str, Node]:
        return dict(self._output.args[0])

    def naming(self) -> tuple[list[str], dict[str, int]]:
        """The state that names of further values follow from, besides the values that are there: names that erased ones
        had, and the last number given to each beginning of a name."""
        names = self.fx._graph_namespace
        return sorted(names._used_names - self.names()), dict(sorted(names._base_count.items()))

    # -- building -----------------------------------------------------------------------------------------------------

    def _placeholder(self, name: str, meta: dict[str, Any]) -> Node:
        first = _node(next(iter(self.fx.nodes)))
        # After the placeholders that are there, before the first operation: the order of declaration.
        while first.op == "placeholder":
            first = first.next
        with self.fx.inserting_before(cast(fx.Node, first)):
            node = _node(self.fx.placeholder(name))
        node.meta.update(meta)
        node.meta.setdefault("passes", ())
        return node

    def add_input(self, name: str, spec: TensorSpec) -> Node:
        """A new input. Its name is a contract: it is exactly ``name``, or ValueError where a value has that name."""
        if name in self.names():
            raise ValueError(f"graph `{self.name}` has a value `{name}` already")
        node = self._placeholder(name, {"spec": spec, "module": ""})
        node.name = name  # fx avoids names that erased nodes had, too
        return node

    def add_weight(self, name: str, binding: WeightBinding, *, module: str = "") -> Node:
        spec = TensorSpec(binding.dtype, binding.shape)
        return self._placeholder(name, {"spec": spec, "weight": binding, "module": module})

    def add_constant(self, name: str, value: torch.Tensor, *, module: str = "") -> Node:
        spec = TensorSpec(value.dtype, tuple(value.shape))
        return self._placeholder(name, {"spec": spec, "constant": value, "module": module})

    def call(
        self, target: Any, *args: Any, before: Node | None = None, like: Node | None = None, by: str = "", **kwargs: Any
    ) -> Node:
        """A new operation before ``before`` (default: at the end), with ``like``'s origin, made by pass ``by``."""
        spec = infer(target, args, kwargs)
        node = self._operation(target, tuple(args), kwargs, self._output if before is None else before)
        origin = like.meta if like is not None else {}
        touched = (*origin.get("passes", ()), *((by,) if by and by not in origin.get("passes", ()) else ()))
        node.meta.update(spec=spec, module=origin.get("module", ""), passes=touched)
        if "precision" in origin:
            node.meta["precision"] = origin["precision"]
        return node

    def _operation(
        self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], before: Node, name: str | None = None
    ) -> Node:
        with self.fx.inserting_before(cast(fx.Node, before)):
            return _node(self.fx.create_node("call_function", target, args, kwargs, name))

    def continue_naming(self, gone: Iterable[str], counts: Mapping[str, int]) -> None:
        """Name further values as the graph would that `naming` was asked of."""
        names = self.fx._graph_namespace
        names._used_names.update(gone)
        names._base_count.update(counts)

    def set_outputs(self, outputs: Mapping[str, Node]) -> None:
        self._output.args = (dict(outputs),)

    def replace(self, old: Node, new: Node) -> None:
        """Let readers of ``old`` read ``new``; the next ``eliminate_dead_code`` removes ``old``."""
        old.replace_all_uses_with(new)

    def eliminate_dead_code(self) -> list[Node]:
        """Remove operations, weights and constants nothing reads (inputs are a contract and stay), and return them."""
        removed = []
        for node in reversed(list(self.nodes)):
            if not node.users and not is_input(node):
                removed.append(node)
                self.erase(node)
        return removed

    def remove_unread_inputs(self) -> list[str]:
        unread = {name: node for name, node in self.inputs.items() if not node.users}
        for node in unread.values():
            self.erase(node)
        return list(unread)

    def erase(self, node: Node) -> None:
        """Remove a value that nothing reads."""
        self.fx.erase_node(cast(fx.Node, node))

    def drop_names(self, names: Iterable[str]) -> None:
        """Remove outputs by name; what fed only them is dead code then."""
        gone = set(names)
        self.set_outputs({k: v for k, v in self.outputs.items() if k not in gone})

    def copy(self) -> Graph:
        """An independent graph; bindings and constants are shared, they are immutable."""
        result = Graph(self.name)
        mapping: dict[Node, Node] = {}
        for node in self.nodes:
            mapping[node] = copy_node(result, node, mapping)
        result.set_outputs({k: mapping[v] for k, v in self.outputs.items()})
        return result

    def misplaced(self) -> Node | None:
        """The first node that reads a value made after it, if any."""
        seen: set[Node] = set()
        for node in (*self.nodes, self._output):
            if not seen.issuperset(node.all_input_nodes):
                return node
            seen.add(node)
        return None


def copy_node(into: Graph, node: Node, mapping: Mapping[Node, Node]) -> Node:
    """``node`` again in graph ``into`` under its name, its operands through ``mapping``."""
    if is_input(node):
        new = into.add_input(node.name, spec_of(node))
    elif node.op == "placeholder":
        return into._placeholder(node.name, dict(node.meta))
    else:
        args, kwargs = (map_operands(operands, mapping.__getitem__) for operands in (node.args, node.kwargs))
        new = into._operation(node.target, args, kwargs, into._output, node.name)
    new.meta.update(node.meta)
    return new


def _node(node: fx.Node) -> Node:
    return cast(Node, node)
