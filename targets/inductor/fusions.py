"""This project's kernels in the graphs that inductor compiles: patterns on dataflow, each replaced by one operation.

A rewrite looks at a chunk of a graph whose sizes are known (`inductor.specialise`), before its operations are turned
into code for the compiler. It finds values by what computes them, never by name. Each is used where `Settings.kernels`
names it: what a compiler fuses by itself may be as fast, and only a measurement says which (`benchmarks/gpu_all.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from cosmos_export.ir import ops
from cosmos_export.ir.ops import aten
from cosmos_export.kernels.description import (
    ACTIVATION_QUANTIZE,
    KERNELS,
    NORM_QUANTIZE,
    QKV_PACK,
    SAMPLER_STEP,
)
from cosmos_export.sampling import COLUMNS


def fuse(graph: fx.Graph, kernels: Collection[str]) -> None:
    """Rewrite ``graph`` with the ``kernels`` that a pattern is for. ValueError for one that is none.

    Every node has its type and shape as ``meta["type"]`` and ``meta["shape"]``.
    """
    unknown = set(kernels) - set(KERNELS)
    if unknown:
        raise ValueError(f"kernels {', '.join(sorted(unknown))} are not among {', '.join(KERNELS)}")
    for name, rewrite in _REWRITES.items():
        if name in kernels:
            for node in list(graph.nodes):
                if node.op == "call_function" and node.users:
                    rewrite(graph, node)
            graph.eliminate_dead_code()


# -- values and where they are computed --------------------------------------------------------------------------------


def _is(value: Any, *targets: Any) -> bool:
    return isinstance(value, fx.Node) and value.op == "call_function" and value.target in targets


def _shape(node: fx.Node) -> tuple[int, ...]:
    shape: tuple[int, ...] = node.meta["shape"]
    return shape


def _type(node: fx.Node) -> torch.dtype:
    dtype: torch.dtype = node.meta["type"]
    return dtype


def _alone(node: fx.Node, reader: fx.Node) -> bool:
    """``node`` has no other reader."""
    return set(node.users) == {reader}


def _uncast(value: fx.Node, dtype: torch.dtype) -> fx.Node:
    """What ``value`` is a cast of, where the cast is to ``dtype`` and nothing else reads it."""
    cast = _is(value, aten._to_copy.default) and value.kwargs.get("dtype") is dtype and len(value.users) == 1
    return value.args[0] if cast else value  # type: ignore[return-value]


class _Places:
    """The order of a graph's nodes, in which a new one must come after its operands and before its readers."""

    def __init__(self, graph: fx.Graph) -> None:
        self._order = {node: i for i, node in enumerate(graph.nodes)}

    def before(self, operands: Collection[Any], readers: Collection[fx.Node]) -> fx.Node | None:
        """The first of ``readers``, if every operand is there by then."""
        first = min(readers, key=self._order.__getitem__)
        needed = [n for n in operands if isinstance(n, fx.Node) and n.op == "call_function"]
        return first if all(self._order[n] < self._order[first] for n in needed) else None


def _call(
    graph: fx.Graph, at: fx.Node, target: Any, args: tuple[Any, ...], results: Collection[fx.Node], tuples: bool = True
) -> None:
    """``target(*args)`` in front of ``at``, whose results are read instead of ``results``."""
    with graph.inserting_before(at):
        made = graph.call_function(target, args)
        pairs = []
        for i, old in enumerate(results):
            new = graph.call_function(item, (made, i)) if tuples else made
            new.meta = dict(old.meta)
            pairs.append((old, new))
    for old, new in pairs:
        old.replace_all_uses_with(new)
    for old, _ in pairs:
        _erase(graph, old)


def _erase(graph: fx.Graph, node: fx.Node) -> None:
    """Remove ``node`` and what was computed for it alone: it may now read values that come after it."""
    if node.op == "call_function" and not node.users:
        read = node.all_input_nodes
        graph.erase_node(node)
        for one in read:
            _erase(graph, one)


def item(values: Any, index: int) -> Any:
    """One of the results of an operation that has several."""
    return values[index]


def _operator(name: str) -> Callable[..., Any]:
    from cosmos_export.kernels import operators

    found: Callable[..., Any] = getattr(operators, name)
    return found


# -- norm and quantization ---------------------------------------------------------------------------------------------


def _norm_quantize(graph: fx.Graph, node: fx.Node) -> None:
    """``quantize(rms_norm(x [+ delta]))`` of rows, with one static scale."""
    if not _is(node, ops.QUANTIZE):
        return
    value, scale = node.args
    assert isinstance(value, fx.Node) and isinstance(scale, fx.Node)
    norm = _uncast(value, _type(value))
    if not _is(norm, ops.RMS_NORM) or len(norm.users) != 1 or len(value.users) != 1 or _shape(scale) != ():
        return
    x, weight, eps = norm.args
    assert isinstance(x, fx.Node) and isinstance(weight, fx.Node)
    if len(_shape(x)) != 2 or _type(value) is not _type(x) or _shape(x)[1] > _WIDEST:
        return
    sides = x.args if _is(x, aten.add.Tensor) else ()
    if len(sides) == 2 and all(isinstance(s, fx.Node) and _same(s, x) for s in sides):
        at = _Places(graph).before((*sides, weight, scale), [*(set(x.users) - {norm}), node])
        if at is not None:
            operator = _operator("add_norm_quantize")
            _call(graph, at, operator, (*sides, weight, eps, scale), (node, x))
            return
    _call(graph, node, _operator("norm_quantize"), (x, weight, eps, scale), (node,), tuples=False)


_WIDEST = 65_536
"""Elements of a row that one program of the kernel holds."""


def _same(a: fx.Node, b: fx.Node) -> bool:
    return _shape(a) == _shape(b) and _type(a) is _type(b)


# -- activation and quantization ---------------------------------------------------------------------------------------


def _activation_quantize(graph: fx.Graph, node: fx.Node) -> None:
    """``quantize(swiglu(gate, up))`` and ``quantize(relu(x)²)`` of rows, with one static scale."""
    if not _is(node, ops.QUANTIZE):
        return
    value, scale = node.args
    assert isinstance(value, fx.Node) and isinstance(scale, fx.Node)
    if not _alone(value, node) or len(_shape(value)) != 2 or _shape(scale) != ():
        return
    gate: Any
    up: Any
    if _is(value, ops.SWIGLU):
        gate, up = value.args
    elif (positive := _squared(value)) is not None and _is(positive, aten.relu.default):
        gate, up = positive.args[0], None
    else:
        return
    _call(graph, node, _operator("activation_quantize"), (gate, up, scale), (node,), tuples=False)


def _squared(value: fx.Node) -> fx.Node | None:
    """What ``value`` is the square of."""
    base, other = (*value.args, None, None)[:2]
    power = _is(value, aten.pow.Tensor_Scalar) and other == 2
    product = _is(value, aten.mul.Tensor) and base is other
    return base if (power or product) and isinstance(base, fx.Node) else None


# -- query, key and value ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Turned:
    """A rotation of normalized heads that lie in some columns of a projection."""

    node: fx.Node
    columns: fx.Node
    """The slice of the projection, [N, heads · d]."""
    weight: fx.Node
    eps: float


def _heads_of(view: Any) -> fx.Node | None:
    """The columns of a projection that ``view`` shows as heads: [N, heads, d] of a slice [N, heads · d]."""
    if not _is(view, aten.view.default) or len(_shape(view)) != 3:
        return None
    columns = view.args[0]
    fits = _is(columns, aten.slice.Tensor) and columns.args[1] in (1, -1) and len(_shape(columns)) == 2
    return columns if fits else None


def _turned(node: fx.Node) -> _Turned | None:
    if not _is(node, ops.ROTARY):
        return None
    value = node.args[0]
    assert isinstance(value, fx.Node)
    norm = _uncast(value, _type(value))
    if not _is(norm, ops.RMS_NORM) or len(norm.users) != 1:
        return None
    view, weight, eps = norm.args
    columns = _heads_of(view)
    if columns is None or _type(value) is not _type(columns) or _type(node) is not _type(columns):
        return None
    return _Turned(node, columns, weight, eps)  # type: ignore[arg-type]


def _qkv_pack(graph: fx.Graph, node: fx.Node) -> None:
    """Query and key of one merged projection, normalized and rotated by the same angles, and the value behind them."""
    query = _turned(node)
    if query is None:
        return
    source, cos, sin = query.columns.args[0], node.args[1], node.args[2]
    assert isinstance(source, fx.Node)
    for other in graph.nodes:
        key = _turned(other) if other is not node and _is(other, ops.ROTARY) and other.args[1:] == (cos, sin) else None
        if key is None or key.columns.args[0] is not source or key.eps != query.eps:
            continue
        start, end = _span(query.columns)
        first, last = _span(key.columns)
        if start != 0 or first != end or _type(key.weight) is not _type(query.weight):
            continue
        value = next(_values(source, last, 2 * last - first), None)
        if value is None or _shape(value)[2] != _shape(other)[2]:
            continue
        readers = [*node.users, *other.users, *value.users]
        operands = (query.columns, key.columns, value.args[0], query.weight, key.weight, cos, sin)
        at = _Places(graph).before(operands, readers)
        if at is not None:
            _call(graph, at, _operator("qkv_pack"), (*operands, query.eps), (node, other, value))
            return


def _span(columns: fx.Node) -> tuple[int, int]:
    """First column of a slice, and the one behind its last."""
    start, end = columns.args[2:4]
    assert isinstance(start, int) and isinstance(end, int)
    return start, end


def _values(source: fx.Node, start: int, end: int) -> Iterator[fx.Node]:
    """Heads in the columns from ``start`` to ``end`` of ``source``."""
    for columns in source.users:
        if _is(columns, aten.slice.Tensor) and columns.args[1] in (1, -1) and columns.args[2:4] == (start, end):
            yield from (view for view in columns.users if _heads_of(view) is columns)


# -- the sampler -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Any:
    """Anything, the same wherever the name stands."""

    name: str


@dataclass(frozen=True)
class _Wide:
    """A value in float32, or what it is a cast of."""

    of: _Any


@dataclass(frozen=True)
class _Op:
    target: Any
    args: tuple[Any, ...]
    name: str = ""
    """Under which the node itself is found."""


def _match(pattern: Any, value: Any, found: dict[str, Any]) -> bool:
    """Whether ``value`` is computed as ``pattern`` says; what its names stand for goes into ``found``."""
    if isinstance(pattern, _Any):
        return bool(found.setdefault(pattern.name, value) is value)
    if isinstance(pattern, _Wide):
        cast = _is(value, aten._to_copy.default) and value.kwargs.get("dtype") is torch.float32
        return _match(pattern.of, value.args[0] if cast else value, found)
    if not isinstance(pattern, _Op):
        return bool(pattern == value)
    if not _is(value, pattern.target) or len(value.args) != len(pattern.args):
        return False
    if pattern.name and found.setdefault(pattern.name, value) is not value:
        return False
    return all(_match(p, v, found) for p, v in zip(pattern.args, value.args, strict=True))


def _unipc(guided: bool) -> _Op:
    """The next sample of `passes.sampler`: guidance, corrector and predictor, in its order of operations."""
    columns = {name: i for i, name in enumerate(COLUMNS["unipc"])}

    def coefficient(name: str) -> _Op:
        return _Op(aten.select.int, (_Any("row"), 0, columns[name]))

    def times(value: Any, name: str) -> _Op:
        return _Op(aten.mul.Tensor, (value, coefficient(name)))

    def total(*terms: Any) -> Any:
        first, *rest = terms
        for term in rest:
            first = _Op(aten.add.Tensor, (first, term))
        return first

    velocity: Any = _Wide(_Any("cond"))
    if guided:
        other = _Wide(_Any("uncond"))
        velocity = _Op(aten.add.Tensor, (other, times(_Op(aten.sub.Tensor, (velocity, other)), "guidance")))
    x, last, m0, m1 = (_Any(name) for name in ("sample", "last", "m0", "m1"))
    d = _Op(aten.sub.Tensor, (x, times(velocity, "sigma")), "d")
    terms = [times(v, c) for v, c in ((x, "c_sample"), (last, "c_last"), (m0, "c_m0"), (m1, "c_m1"), (d, "c_d"))]
    corrected = total(*terms)
    corrected = _Op(corrected.target, corrected.args, "corrected")
    result: _Op = total(times(corrected, "p_sample"), times(d, "p_d"), times(m0, "p_m0"))
    return result


_STEPS = (_unipc(True), _unipc(False))
"""The guided one first: the other would match its velocity as a whole."""


def _sampler_step(graph: fx.Graph, node: fx.Node) -> None:
    """A step of UniPC for one latent, with the masks that hold some of its values."""
    found: dict[str, Any] = {}
    for pattern in _STEPS:
        found = {}
        if _match(pattern, node, found):
            break
    else:
        return
    state = [found[name] for name in ("sample", "last", "m0", "m1")]
    if not all(_type(t) is torch.float32 and _shape(t) == _shape(node) for t in state):
        return
    result = node
    masks: list[fx.Node] = []
    axes: list[int] = []
    while len(masks) < _MASKS and (held := _held(result, found["sample"])) is not None:
        result, mask, axis = held
        masks.append(mask)
        axes.append(axis)
    results = (result, found["corrected"], found["d"])
    operands = (found["row"], found["cond"], found.get("uncond"), *state)
    inside = {node, found["corrected"], found["d"]}
    readers = [user for one in (result, found["corrected"], found["d"]) for user in one.users]
    later = [user for user in readers if user not in inside and not _leads_to(user, result)]
    at = _Places(graph).before((*operands, *masks), later)
    if at is not None:
        _call(graph, at, _operator("unipc_step"), (*operands, masks, axes), results)


_MASKS = 2


def _leads_to(node: fx.Node, result: fx.Node) -> bool:
    """``result`` is computed from ``node``."""
    waiting, seen = [node], set[fx.Node]()
    while waiting:
        one = waiting.pop()
        if one is result:
            return True
        if one not in seen:
            seen.add(one)
            waiting += one.users
    return False


def _held(new: fx.Node, old: fx.Node) -> tuple[fx.Node, fx.Node, int] | None:
    """Where ``new`` is held at ``old`` by a 0/1 mask along one axis: the held value, the mask, the axis."""
    if len(new.users) != 1:
        return None
    (product,) = new.users
    if len(product.users) != 1:
        return None
    (held,) = product.users
    along, mask = _Any("along"), _Any("mask")
    rest = _Op(aten.add.Tensor, (_Op(aten.mul.Tensor, (along, -1.0)), 1.0))
    pattern = _Op(
        aten.add.Tensor, (_Op(aten.mul.Tensor, (_Any("new"), along)), _Op(aten.mul.Tensor, (_Any("old"), rest)))
    )
    found: dict[str, Any] = {}
    if not _match(pattern, held, found) or found["new"] is not new or found["old"] is not old:
        return None
    if not _match(_Op(aten.view.default, (_Wide(mask), _Any("shape"))), found["along"], found):
        return None
    size = _shape(found["mask"])
    axes = [axis for axis, n in enumerate(_shape(found["along"])) if (n,) == size and _shape(new)[axis] == n]
    return (held, found["mask"], axes[0]) if axes else None


_REWRITES: Mapping[str, Callable[[fx.Graph, fx.Node], None]] = {
    QKV_PACK: _qkv_pack,
    NORM_QUANTIZE: _norm_quantize,
    ACTIVATION_QUANTIZE: _activation_quantize,
    SAMPLER_STEP: _sampler_step,
}
