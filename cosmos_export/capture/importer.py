"""Import of an exported program into the IR: named dims in place of the exporter's symbols, one spelling per operation.

What the model writes in place becomes a new value of everything that shares the memory. The exporter can take such
writes apart itself (`run_decompositions`), but traces the whole program again for it.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Iterator, Mapping
from typing import Any, cast

import sympy
import torch
from torch import fx
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind

from cosmos_export.diagnostics import InternalError
from cosmos_export.ir.dims import Size, equal, expression, simplify
from cosmos_export.ir.graph import Graph, Node, spec_of
from cosmos_export.ir.ops import SpecError, aten
from cosmos_export.ir.spec import TensorSpec, WeightBinding

_END = 2**63 - 1
_CAST = aten._to_copy.default


class Importer:
    """Rewrites one exported graph. ``sizes`` gives the named shape of every tensor input."""

    def __init__(
        self,
        exported: ExportedProgram,
        name: str,
        sizes: Mapping[str, tuple[Size, ...]],
        bindings: Mapping[str, WeightBinding],
        constants: Mapping[str, torch.Tensor],
    ) -> None:
        self._exported = exported
        self._graph = Graph(name)
        self._sizes = sizes
        self._bindings = bindings
        self._constants = constants
        self._values: dict[fx.Node, Node] = {}
        self._memory = _Memory()
        self._inlined: dict[Any, Any] = {}
        """Results of the blocks that were inlined."""
        self._expressions: dict[sympy.Expr, Size] = {}
        self._symbols: dict[sympy.Symbol, Size] = {}

    def run(self) -> Graph:
        signature = {s.arg.name: s for s in self._exported.graph_signature.input_specs}
        for node in self._exported.graph.nodes:
            if node.op == "placeholder" and signature[node.name].kind is InputKind.USER_INPUT:
                for size, named in zip(node.meta["val"].shape, self._sizes[node.name], strict=True):
                    if isinstance(size, torch.SymInt):
                        self._declare(size.node.expr, expression(named))
        for node in self._exported.graph.nodes:
            if node.op == "placeholder":
                self._values[node] = self._placeholder(node, signature[node.name])
            elif node.op == "call_function":
                self._call(node)
        (output,) = (n for n in self._exported.graph.nodes if n.op == "output")
        names = list(torch.utils._pytree.tree_unflatten(output.args[0], self._exported.call_spec.out_spec).items())
        self._graph.set_outputs({name: self._argument(node) for name, node in names})
        return self._graph

    # -- leaves -------------------------------------------------------------------------------------------------------

    def _placeholder(self, node: fx.Node, spec: Any) -> Node:
        if spec.kind is InputKind.PARAMETER:
            key = spec.target.split(".", 1)[1]  # without the adapter's name for the model
            weight = self._graph.add_weight(key.replace(".", "_"), self._bindings[key])
            wanted = node.meta["val"].dtype
            return weight if spec_of(weight).dtype == wanted else self._graph.call(_CAST, weight, dtype=wanted)
        if spec.kind is InputKind.BUFFER:
            key = spec.target.split(".", 1)[1]
            return self._graph.add_constant(key.replace(".", "_"), self._constants[key])
        return self._graph.add_input(node.name, self._spec(node.meta["val"]))

    def _declare(self, expr: sympy.Expr, named: sympy.Expr) -> None:
        """The exporter's size ``expr`` of an input is ``named``: its symbol, or a multiple of it."""
        factor, symbol = expr.as_coeff_Mul()
        self._symbols[symbol] = simplify(named / factor)

    def _spec(self, value: torch.Tensor) -> TensorSpec:
        return TensorSpec(value.dtype, tuple(self._size(s) for s in value.shape))

    def _size(self, value: Any) -> Size:
        if isinstance(value, int):
            return value
        expr = value.node.expr if isinstance(value, torch.SymInt) else value
        if expr not in self._expressions:
            unknown = expr.free_symbols - self._symbols.keys()
            if unknown:
                raise InternalError("CX202", f"the exporter's symbols {unknown} belong to no input")
            self._expressions[expr] = simplify(expr.subs(self._symbols, simultaneous=True))
        return self._expressions[expr]

    def _argument(self, value: Any) -> Any:
        """``value`` in the IR: values as nodes, sizes as expressions."""
        if isinstance(value, fx.Node):
            meta = value.meta.get("val")
            if isinstance(meta, (torch.SymInt, int)):
                return self._size(meta)
            self._memory.require_current(value)
            return self._values[value]
        if isinstance(value, (list, tuple)):
            return [self._argument(v) for v in value]
        return self._size(value) if isinstance(value, torch.SymInt) else value

    # -- operations ---------------------------------------------------------------------------------------------------

    def _call(self, node: fx.Node) -> None:
        if node.target is torch.ops.higher_order.wrap_with_autocast:
            self._inline(node)
        elif node.target is operator.getitem and node.args[0] in self._inlined:
            self._same(node, self._inlined[node.args[0]][node.args[1]])
        else:
            self._operation(node)

    def _inline(self, node: fx.Node) -> None:
        """A block for which the model turns automatic types off, inlined: no graph has automatic types."""
        _, _, enabled, _, body, *operands = cast("tuple[Any, ...]", node.args)
        if enabled:
            raise InternalError("CX202", f"`{node.name}` chooses types by itself (autocast)")
        graph = self._exported.graph_module.get_submodule(body.target).graph
        inputs = iter(operands)
        for inner in graph.nodes:
            if inner.op == "placeholder":
                self._same(inner, next(inputs))
            elif inner.op == "call_function":
                self._call(inner)
            elif inner.op == "output":
                (self._inlined[node],) = inner.args

    def _same(self, node: fx.Node, value: Any) -> None:
        self._values[node] = self._argument(value)
        self._memory.share(node, value)

    def _operation(self, node: fx.Node) -> None:
        value = node.meta.get("val")
        if not isinstance(value, torch.Tensor):
            if _writes_anything(node.target):
                raise InternalError("CX202", f"`{node.name}` writes in place and returns nothing")
            return  # integer arithmetic, assertions, tuples: sizes are expressions here, parts are taken by `getitem`
        parts: Any = node.args[0] if node.target is operator.getitem else None
        operands = node.args if parts is None else (*parts.args, node.args[1])
        args = [self._argument(a) for a in operands]
        kwargs = {k: self._argument(v) for k, v in node.kwargs.items()}
        stack = node.meta.get("nn_module_stack") or {}
        module = next(reversed(stack.values()))[0].partition(".")[2] if stack else ""

        def call(target: Any, *args: Any, **kwargs: Any) -> Node:
            new = self._graph.call(target, *args, **kwargs)
            new.meta["module"] = module
            return new

        written = parts is None and _writes(node.target)
        target = _out_of_place(node.target) if written else node.target
        rewrite = _SPELLINGS.get(target) if parts is None else _PARTS.get(parts.target)
        spec = self._spec(value)
        try:
            result = rewrite(call, spec, *args, **kwargs) if rewrite else call(target, *args, **kwargs)
        except SpecError as error:
            raise InternalError("CX202", f"`{node.name}` of module `{module}`: {error}") from error
        known = spec_of(result)
        if known.dtype != spec.dtype or not all(map(equal, known.shape, spec.shape)):
            raise InternalError("CX203", f"`{node.name}` is {spec} in the exported program, {known} by the IR's rules")
        self._values[node] = result
        owner = operands[0] if operands and isinstance(operands[0], fx.Node) else None
        shares = _shares_memory(node.target if parts is None else parts.target)
        if owner is not None and shares and not _copies(node):
            self._memory.share(node, owner)
        if written:
            try:
                self._write(node, call)
            except SpecError as error:
                raise InternalError("CX202", f"`{node.name}` of module `{module}`: {error}") from error

    def _write(self, node: fx.Node, call: Call) -> None:
        """Record what ``node`` wrote in place as the new value of what it wrote into, as far as that is known."""
        whole: Node | None = None  # what the view was; nothing yet for `node`, which is all that it wrote into
        for view, owner in self._memory.write(node):
            old, new = self._values[owner], self._values[view]
            if view.target in _VIEWED_THROUGH:
                operands = [self._argument(a) for a in view.args[1:]]
                named = {name: self._argument(a) for name, a in view.kwargs.items()}
                self._values[owner] = _VIEWED_THROUGH[view.target](call, spec_of(old), old, new, *operands, **named)
            elif whole is None or (whole is old and view.target is not aten.contiguous.default):  # which may be a copy
                self._values[owner] = new
            else:
                return
            self._memory.renew(owner)
            whole = old


class _Memory:
    """Record of the values of an exported program that share memory, and of those that a write has made stale."""

    def __init__(self) -> None:
        self._owner: dict[fx.Node, fx.Node] = {}
        self._stale: dict[fx.Node, str] = {}
        """The operation that made each of them stale."""

    def share(self, view: fx.Node, owner: fx.Node) -> None:
        """Note that ``view`` may share memory with ``owner``."""
        self._owner[view] = owner

    def write(self, node: fx.Node) -> list[tuple[fx.Node, fx.Node]]:
        """The new value ``node`` makes every other that shares its memory stale; pairs of a view and its owner, from
        ``node`` outwards."""
        owners = [node, *self._owners(node)]
        self._stale |= {v: node.name for v in self._owner if owners[-1] in (v, *self._owners(v))}
        self._stale |= dict.fromkeys(owners, node.name)
        self.renew(node)
        return list(itertools.pairwise(owners))

    def renew(self, node: fx.Node) -> None:
        """The value of ``node`` is known again."""
        self._stale.pop(node, None)

    def require_current(self, node: fx.Node) -> None:
        """CX202 where something wrote into the memory of ``node`` and its new value is not known."""
        if node in self._stale:
            raise InternalError("CX202", f"`{node.name}` is read after `{self._stale[node]}` wrote into its memory")

    def _owners(self, node: fx.Node) -> Iterator[fx.Node]:
        while node in self._owner:
            node = self._owner[node]
            yield node


def _writes(target: Any) -> bool:
    """Whether an operation writes its first operand in place."""
    alias = target._schema.arguments[0].alias_info if isinstance(target, torch._ops.OpOverload) else None
    return alias is not None and bool(alias.is_write)


def _writes_anything(target: Any) -> bool:
    """Whether an operation writes any of its operands in place."""
    arguments = target._schema.arguments if isinstance(target, torch._ops.OpOverload) else ()
    return any(a.alias_info is not None and a.alias_info.is_write for a in arguments)


def _out_of_place(target: Any) -> Any:
    """The operation that returns what ``target`` writes."""
    packet = getattr(aten, target._schema.name.removeprefix("aten::").removesuffix("_"))
    return getattr(packet, target._overloadname)


def _shares_memory(target: Any) -> bool:
    """Whether a result of an operation may share the memory of its first operand."""
    if target in _RETURN_THEIR_OPERAND:
        return True
    return isinstance(target, torch._ops.OpOverload) and any(r.alias_info for r in target._schema.returns)


def _copies(node: fx.Node) -> bool:
    """Whether an operation that may return its operand is told not to (``to(…, copy=True)``)."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return False
    given = dict(zip((a.name for a in node.target._schema.arguments), node.args, strict=False)) | node.kwargs
    return given.get("copy") is True


_RETURN_THEIR_OPERAND = {aten.dropout.default, aten.type_as.default}
"""Operations that may do so although their schemas do not say it."""


# Each takes (call, spec of the result, *operands) and returns the value.
Call = Callable[..., Node]


def _identity(call: Call, spec: TensorSpec, x: Node, *_: Any, **__: Any) -> Node:
    return x


def _view(call: Call, spec: TensorSpec, x: Node, *_: Any) -> Node:
    return x if spec_of(x) == spec else call(aten.view.default, x, list(spec.shape))


def _transpose(call: Call, spec: TensorSpec, x: Node, a: int, b: int) -> Node:
    order = list(range(spec.rank))
    order[a], order[b] = order[b], order[a]
    return call(aten.permute.default, x, order)


def _stack(call: Call, spec: TensorSpec, tensors: list[Node], dim: int = 0) -> Node:
    at = dim % spec.rank
    return call(aten.cat.default, [call(aten.unsqueeze.default, t, at) for t in tensors], at)


def _squeeze(call: Call, spec: TensorSpec, x: Node, dim: int) -> Node:
    return x if spec_of(x).rank == spec.rank else call(aten.squeeze.dim, x, dim)


def _expand(call: Call, spec: TensorSpec, x: Node, *_: Any, **__: Any) -> Node:
    return x if spec_of(x) == spec else call(aten.expand.default, x, list(spec.shape))


def _convert(call: Call, spec: TensorSpec, x: Node, *_: Any, **__: Any) -> Node:
    return x if spec_of(x).dtype == spec.dtype else call(aten._to_copy.default, x, dtype=spec.dtype)


def _bounds(size: Size, start: Any, end: Any) -> tuple[Any, Any]:
    """Where a slice of an axis of ``size`` begins and ends, counted from the front."""
    first = 0 if start is None else start
    if isinstance(first, int) and first < 0:
        first = simplify(expression(size) + first)
    last = size if end is None or end == _END else end
    if isinstance(last, int) and last < 0:
        last = simplify(expression(size) + last)
    if isinstance(size, int):  # a slice may reach over the ends
        first, last = (min(max(v, 0), size) if isinstance(v, int) else v for v in (first, last))
    return first, last


def _slice(
    call: Call, spec: TensorSpec, x: Node, dim: int = 0, start: Any = None, end: Any = None, step: int = 1
) -> Node:
    axis = dim % spec.rank
    size = spec_of(x).shape[axis]
    first, last = _bounds(size, start, end)
    if step == 1 and equal(expression(last) - first, size):
        return x
    return call(aten.slice.Tensor, x, axis, first, last, *([step] if step != 1 else []))


def _slice_scatter(
    call: Call, spec: TensorSpec, x: Node, src: Node, dim: int = 0, start: Any = None, end: Any = None, step: int = 1
) -> Node:
    axis = dim % spec.rank
    first, last = _bounds(spec.shape[axis], start, end)
    if step == 1 and equal(expression(last) - first, spec.shape[axis]):
        return src
    return call(aten.slice_scatter.default, x, src, axis, first, last, step)


def _full(value: float | None) -> Callable[..., Node]:
    def rewrite(call: Call, spec: TensorSpec, *args: Any, **_: Any) -> Node:
        return call(aten.full.default, list(spec.shape), args[-1] if value is None else value, dtype=spec.dtype)

    return rewrite


def _arange(call: Call, spec: TensorSpec, *args: Any, **_: Any) -> Node:
    start, end = (0, args[0]) if len(args) == 1 else args[:2]
    return call(aten.arange.start, start, end, dtype=spec.dtype)


def _pad(call: Call, spec: TensorSpec, x: Node, pad: list[Size], mode: str = "constant", value: Any = None) -> Node:
    if mode != "constant":
        raise InternalError("CX202", f"padding mode {mode!r}")
    if all(p == 0 for p in pad):
        return x
    return call(aten.constant_pad_nd.default, x, pad, 0.0 if value is None else value)


def _copy(call: Call, spec: TensorSpec, destination: Node, source: Node, *_: Any) -> Node:
    source = _convert(call, TensorSpec(spec.dtype, spec_of(source).shape), source)
    return _expand(call, spec, source)


def _select(call: Call, spec: TensorSpec, x: Node, dim: int, index: int) -> Node:
    axis = dim % spec_of(x).rank
    return call(aten.select.int, x, axis, _place(index, spec_of(x).shape[axis]))


def _embedding(call: Call, spec: TensorSpec, weight: Node, indices: Node, *_: Any) -> Node:
    return call(aten.embedding.default, weight, indices)


def _chunk(call: Call, spec: TensorSpec, x: Node, chunks: int, dim: int, index: int) -> Node:
    axis = dim % spec.rank
    size = expression(spec.shape[axis])
    if not equal(size * chunks, spec_of(x).shape[axis]):
        raise InternalError("CX202", f"{chunks} chunks of {spec_of(x)} along {dim} are not of one size")
    return call(aten.slice.Tensor, x, axis, simplify(size * index), simplify(size * (index + 1)))


def _repeat(call: Call, spec: TensorSpec, x: Node, times: int, dim: int) -> Node:
    """Every element ``times`` times in a row along ``dim``."""
    at = dim % spec.rank + 1
    shape = spec_of(x).shape
    wide = call(aten.expand.default, call(aten.unsqueeze.default, x, at), [*shape[:at], times, *shape[at:]])
    return call(aten.view.default, wide, list(spec.shape))


def _nearest(call: Call, spec: TensorSpec, x: Node, size: Any, factors: list[float]) -> Node:
    if size is not None or any(f != int(f) for f in factors):
        raise InternalError("CX202", f"nearest resampling to {size} by {factors}")
    batch, channels, height, width = spec_of(x).shape
    rows, columns = map(int, factors)
    spread = call(aten.view.default, x, [batch, channels, height, 1, width, 1])
    spread = call(aten.expand.default, spread, [batch, channels, height, rows, width, columns])
    return call(aten.view.default, spread, list(spec.shape))


def _select_scatter(call: Call, spec: TensorSpec, x: Node, src: Node, dim: int, index: int) -> Node:
    axis = dim % spec.rank
    return call(aten.select_scatter.default, x, src, axis, _place(index, spec.shape[axis]))


def _place(index: int, size: Size) -> int:
    """``index`` counted from the front, where that is a number."""
    return index % size if isinstance(size, int) else index


_VIEWED_THROUGH: dict[Any, Callable[..., Node]] = {
    aten.slice.Tensor: _slice_scatter,
    aten.select.int: _select_scatter,
}
"""Views of a part of a value, and the operation that puts another part in its place."""

_PARTS: dict[Any, Callable[..., Node]] = {aten.chunk.default: _chunk}
"""Operations with several results: one part, chosen by its index."""

_SPELLINGS: dict[Any, Callable[..., Node]] = {
    aten.clone.default: _identity,
    aten.alias.default: _identity,
    aten.contiguous.default: _identity,
    aten.dropout.default: _identity,
    aten.view.default: _view,
    aten._unsafe_view.default: _view,
    aten.reshape.default: _view,
    aten.flatten.using_ints: _view,
    aten.transpose.int: _transpose,
    aten.t.default: lambda call, spec, x: _transpose(call, spec, x, 0, 1),
    aten.stack.default: _stack,
    aten.squeeze.dim: _squeeze,
    aten.expand.default: _expand,
    aten._to_copy.default: _convert,
    aten.slice.Tensor: _slice,
    aten.slice_scatter.default: _slice_scatter,
    aten.zeros.default: _full(0.0),
    aten.ones.default: _full(1.0),
    aten.new_zeros.default: _full(0.0),
    aten.new_ones.default: _full(1.0),
    aten.full.default: _full(None),
    aten.arange.default: _arange,
    aten.arange.start: _arange,
    aten.pad.default: _pad,
    aten.copy.default: _copy,
    aten.select.int: _select,
    aten.embedding.default: _embedding,
    aten.square.default: lambda call, spec, x: call(aten.pow.Tensor_Scalar, x, 2),
    aten.expand_as.default: _expand,
    aten.to.dtype: _convert,
    aten.to.dtype_layout: _convert,
    aten.type_as.default: _convert,
    aten.repeat_interleave.self_int: _repeat,
    aten._upsample_nearest_exact2d.vec: _nearest,
    aten.mm.default: lambda call, spec, a, b: call(aten.matmul.default, a, b),
}
