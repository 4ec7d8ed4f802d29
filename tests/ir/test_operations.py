"""Every operation of the dialect has a sample, a lowering, and the traits that it declares; nobody else lists them."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
from test_ir_ops import SAMPLES, STAND_IN, V, build, spec_of_sample

import cosmos_export
from cosmos_export.diagnostics import InternalError
from cosmos_export.ir import ops
from cosmos_export.ir.dims import evaluate, symbol
from cosmos_export.ir.graph import Graph, Node
from cosmos_export.ir.ops import OPERATIONS, Trait, aten
from cosmos_export.ir.ops.declare import operation
from cosmos_export.ir.spec import TensorSpec
from cosmos_export.passes.pipeline import PHASES
from cosmos_export.targets.onnx.lowering import lower
from cosmos_export.targets.onnx.plugins import Plugins
from cosmos_export.targets.onnx.rules import RULES

BINDING = {"n": 3, "m": 4}
ROOT = Path(cosmos_export.__file__).parents[1]


class Sample:
    """An operation with operands of it."""

    def __init__(self, target: Any, args: Any, kwargs: Any) -> None:
        torch.manual_seed(0)
        self.target, self.kwargs = target, kwargs
        number = lambda s: evaluate(s, BINDING) if hasattr(s, "free_symbols") else s  # noqa: E731
        self.args = build(list(args), BINDING, self._value, number)
        specs = build(list(args), BINDING, lambda v: TensorSpec(v.dtype, tuple(v.shape)), lambda s: s)
        self.rows = list(OPERATIONS[target].row_positions(*specs, **kwargs))
        self.spec = spec_of_sample(target, args, kwargs)

    @staticmethod
    def _value(v: V) -> torch.Tensor:
        if v.dtype in STAND_IN:
            shape = [evaluate(s, BINDING) for s in v.shape]
            return torch.randint(-4, 5, shape).to(STAND_IN[v.dtype])
        return v.value(BINDING)

    def run(self, args: Any = None) -> torch.Tensor:
        result = OPERATIONS[self.target].reference(*(self.args if args is None else args), **self.kwargs)
        return result.float() if result.is_floating_point() else result

    def tensors(self) -> list[torch.Tensor]:
        flat = [t for a in self.args for t in (a if isinstance(a, list) else [a])]
        return [t for t in flat if isinstance(t, torch.Tensor)]


def samples(*traits: Trait) -> list[Any]:
    chosen = [s for s in SAMPLES if OPERATIONS[s[0]].traits.issuperset(traits)]
    assert chosen, f"no operation has {traits}"
    return [pytest.param(Sample(*s), id=f"{s[0]}-{i}") for i, s in enumerate(chosen)]


def sample(target: Any) -> Sample:
    return next(Sample(*s) for s in SAMPLES if s[0] is target)


# -- laws. Each is tried on every operation that has the trait, and refuses one that has not. --------------------------


def rows_follow(s: Sample) -> bool:
    """With the rows of the declared operands in another order, the rows of the result are in that order."""
    whole = s.run()
    order = torch.randperm(whole.shape[0], generator=torch.Generator().manual_seed(1))
    elementwise = Trait.ELEMENTWISE in OPERATIONS[s.target].traits

    def moved(value: Any) -> Any:
        if isinstance(value, list):
            return [moved(v) for v in value]
        repeated = elementwise and (not isinstance(value, torch.Tensor) or value.shape[:1] != whole.shape[:1])
        return value if repeated or (elementwise and value.dim() < whole.dim()) else value[order]

    args = [moved(a) if i in s.rows else a for i, a in enumerate(s.args)]
    return torch.allclose(s.run(args), whole[order], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("s", [p for p in samples() if p.values[0].rows])
def test_rows_are_independent(s: Sample) -> None:
    assert s.run().dim() == s.spec.rank
    assert rows_follow(s)


@pytest.mark.parametrize("target", [aten.mean.dim, aten.cat.default, aten.index_put.default, aten.slice.Tensor])
def test_operations_that_mix_rows_declare_none(target: Any) -> None:
    """Those whose samples work along the first axis: as if they had rows, they break the law."""
    wrong = []
    for one in (Sample(*s) for s in SAMPLES if s[0] is target):
        if not one.rows and one.spec.rank:
            one.rows = [0]
            try:
                wrong.append(not rows_follow(one))
            except (IndexError, RuntimeError):
                wrong.append(True)
    assert wrong and all(wrong)


def test_causal_attention_and_keys_have_no_rows() -> None:
    causal = next(Sample(*s) for s in SAMPLES if s[0] is ops.ATTENTION and s[1][3])
    assert causal.rows == []
    causal.rows = [0]
    assert not rows_follow(causal)
    joint = sample(ops.JOINT_ATTENTION)
    joint.rows = [0, 1]
    assert not rows_follow(joint)


def is_elementwise(s: Sample) -> bool:
    """On operands of one shape, elements in another order give results in that order."""
    shape = torch.broadcast_shapes(*(t.shape for t in s.tensors()))
    full = [a.expand(shape).flatten() if isinstance(a, torch.Tensor) else a for a in s.args]
    order = torch.randperm(full[0].numel(), generator=torch.Generator().manual_seed(1))
    try:
        moved = s.run([a[order] if isinstance(a, torch.Tensor) else a for a in full])
        return torch.equal(moved, s.run(full)[order]) and torch.equal(s.run(full), s.run().flatten())
    except (IndexError, RuntimeError):
        return False


@pytest.mark.parametrize("s", samples(Trait.ELEMENTWISE))
def test_elements_are_independent(s: Sample) -> None:
    if all(t.dim() for t in s.tensors()):  # a rank-0 operand has a say of its own in the type of the result
        assert is_elementwise(s)


def test_a_norm_is_not_elementwise() -> None:
    assert not is_elementwise(sample(ops.RMS_NORM)) and not is_elementwise(sample(aten.unsqueeze.default))


def commutes(s: Sample) -> bool:
    """Up to one rounding, where types differ: torch rounds a rank-0 operand only if it comes first."""
    one_type = len({t.dtype for t in s.tensors()}) == 1
    return torch.allclose(s.run(s.args[::-1]), s.run(), rtol=0 if one_type else 2**-7, atol=0)


@pytest.mark.parametrize("s", [p for p in samples(Trait.COMMUTATIVE) if len(p.values[0].tensors()) == 2])
def test_operands_commute(s: Sample) -> None:
    assert commutes(s)


def test_a_difference_does_not_commute() -> None:
    assert not commutes(sample(aten.sub.Tensor))


def only_moves(s: Sample) -> bool:
    """Every element of the result is one of an operand (converted, where the type changes)."""
    result = s.run()
    known = torch.cat([t.flatten().to(result.dtype) for t in s.tensors()])
    if s.kwargs.get("dtype"):
        known = torch.cat([known, known.to(s.kwargs["dtype"]).to(result.dtype)])
    return bool(torch.isin(result.flatten(), known).all())


@pytest.mark.parametrize("trait", [Trait.VIEW, Trait.PART, Trait.JOIN, Trait.WRITES], ids=lambda t: t.name)
def test_elements_only_move(trait: Trait) -> None:
    for target, args, kwargs in SAMPLES:
        if trait in OPERATIONS[target].traits:
            assert only_moves(Sample(target, args, kwargs)), target
    assert not only_moves(sample(aten.neg.default)) and not only_moves(sample(ops.SWIGLU))


def test_what_creates_reads_nothing() -> None:
    for target, args, kwargs in SAMPLES:
        assert (not Sample(target, args, kwargs).tensors()) == (Trait.CREATES in OPERATIONS[target].traits), target


def pads_itself(s: Sample) -> bool:
    """The operation on an operand that is padded with zeros is the operation that pads."""
    x, weight, bias, *rest = [*s.args, None][: max(len(s.args), 3)]
    stride, padding, dilation, groups = (*rest, *([1], [0], [1], 1)[len(rest) :])
    axes = x.dim() - 2
    around = ops.spatial(padding, axes)
    wide = torch.nn.functional.pad(x, [2] * (2 * axes))
    given = s.run([wide, weight, bias, stride, around, dilation, groups])
    itself = s.run([x, weight, bias, stride, [p + 2 for p in around], dilation, groups])
    return given.shape == itself.shape and torch.allclose(given, itself, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("s", samples(Trait.CONVOLUTION))
def test_a_convolution_pads_itself(s: Sample) -> None:
    assert pads_itself(s)


def test_a_transposed_convolution_does_not() -> None:
    assert not pads_itself(sample(aten.conv_transpose1d.default))


def averages(s: Sample) -> bool:
    """A query attends to a set: keys and values in another order, together, change nothing; equal values come back."""
    query, key, value, *rest = s.args
    order = torch.randperm(key.shape[0], generator=torch.Generator().manual_seed(1))
    same = torch.allclose(s.run([query, key[order], value[order], *rest]), s.run(), rtol=1e-4, atol=1e-5)
    ones = [torch.ones_like(a) if i in (2, 4) and isinstance(a, torch.Tensor) else a for i, a in enumerate(s.args)]
    return same and torch.allclose(s.run(ones), torch.ones(()), atol=0.1)


@pytest.mark.parametrize("s", [p for p in samples(Trait.ATTENDS) if p.values[0].rows])
def test_attention_is_an_average_over_a_set(s: Sample) -> None:
    assert averages(s)


def test_causal_attention_is_over_an_order() -> None:
    assert not averages(next(Sample(*s) for s in SAMPLES if s[0] is ops.ATTENTION and s[1][3]))


@pytest.mark.parametrize("s", samples(Trait.JOINT))
def test_joint_attention_is_over_own_and_prompt_rows(s: Sample) -> None:
    query, key, value, prefix_key, prefix_value, *rest = s.args
    moved = [query, torch.cat((key, prefix_key[:1])), torch.cat((value, prefix_value[:1])), prefix_key[1:]]
    assert torch.allclose(s.run([*moved, prefix_value[1:], *rest]), s.run(), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(s.run([query, key, value, prefix_value, prefix_key, *rest]), s.run(), rtol=1e-4)


@pytest.mark.parametrize("s", samples(Trait.ACTIVATION))
def test_an_activation_is_not_linear(s: Sample) -> None:
    negative = [-a for a in s.args]
    assert not torch.allclose(s.run(negative), -s.run())


def rounds(s: Sample) -> bool:
    """Moving activations by a millionth moves next to no result; moving them by a quarter moves most."""
    x, *rest = s.args
    wide = x.float()
    plain, near = s.run([wide, *rest]), s.run([wide * (1 + 1e-6), *rest])
    far = s.run([wide * 1.25, *rest])
    return bool((near != plain).float().mean() < 0.05 and (far != plain).float().mean() > 0.5)


@pytest.mark.parametrize("s", samples(Trait.ROUNDS))
def test_a_rounding_hides_small_moves(s: Sample) -> None:
    assert rounds(s)


def test_a_norm_hides_none() -> None:
    assert not rounds(sample(ops.JOINT_ATTENTION)) and not rounds(sample(ops.SWIGLU))


def widens(s: Sample) -> bool:
    """The result has more bits than the numbers, and twice of it are numbers with twice the scale."""
    scale = max(i for i, a in enumerate(s.args) if isinstance(a, torch.Tensor))
    doubled = [a * 2 if i == scale else a for i, a in enumerate(s.args)]
    bits = {torch.float8_e4m3fn: 8, **dict.fromkeys(STAND_IN, 4)}
    first = next(args[0].dtype for target, args, _ in SAMPLES if target is s.target)
    wider = bits.get(first, 64) < 8 * s.spec.dtype.itemsize
    return wider and torch.equal(s.run(doubled), 2 * s.run())


@pytest.mark.parametrize("s", samples(Trait.WIDENS))
def test_widened_numbers_are_multiplied_by_their_scale(s: Sample) -> None:
    assert widens(s)


def test_what_rounds_does_not_widen() -> None:
    assert not widens(sample(ops.QUANTIZE)) and not widens(sample(ops.REQUANTIZE_BLOCKS))


@pytest.mark.parametrize("s", samples(Trait.BLOCKS))
def test_blocks_are_of_four_bit_floats(s: Sample) -> None:
    """A block of 16 has at most eight magnitudes."""
    result = s.run()
    blocks = result.abs().reshape(-1, 16)
    assert all(len(block.unique()) <= 8 for block in blocks)


# -- the registry ------------------------------------------------------------------------------------------------------


def test_an_operation_is_lowered_or_a_pass_removes_it() -> None:
    removed = frozenset[object]().union(*(kind.removes for phase in PHASES for kind in phase.passes))
    plugins = Plugins(["norm-quantize"], lambda graph: graph)._rules  # nodes of TensorRT's: plugins
    neither = {str(target) for target in OPERATIONS if not any(target in table for table in (RULES, removed, plugins))}
    assert set(plugins) == ops.having(Trait.FUSED)
    assert not neither, "write a rule in targets/onnx/rules"
    assert set(RULES) <= set(OPERATIONS)


NARROW = {ops.QUANTIZE, ops.DEQUANTIZE, ops.DEQUANTIZE_GROUPS, ops.DEQUANTIZE_BLOCKS, ops.JOINT_ATTENTION_FP8}
"""Operations on types that numpy lacks: tests/ir/test_quantization.py runs what they are lowered to."""
REFUSED = {"linear-(n, m, 4)", "scaled_dot_product_attention-(1, 4, n, 8)"}
"""Forms that no program has after its passes, and that rules refuse (CX230)."""


def lowered_samples() -> list[Any]:
    chosen = [s for s in SAMPLES if s[0] in RULES and s[0] not in NARROW]
    return [pytest.param(*s, id=f"{s[0]}-{i}") for i, s in enumerate(chosen)]


@pytest.mark.parametrize(("target", "args", "kwargs"), lowered_samples())
def test_a_rule_writes_what_the_reference_computes(target: Any, args: Any, kwargs: Any) -> None:
    """In ONNX Runtime, in float32, as the form for the CPU computes."""
    graph, given = Graph("body"), dict[str, torch.Tensor]()
    for dim in BINDING:  # a model knows a size by an input that has it
        graph.add_input(f"size_{dim}", TensorSpec(torch.float32, (symbol(dim),)))
        given[f"size_{dim}"] = torch.zeros(BINDING[dim])

    def operand(v: V) -> Node:
        name, value = f"x{len(given)}", v.value(BINDING)
        given[name] = value.float() if value.dtype == torch.bfloat16 else value
        return graph.add_input(name, TensorSpec(v.dtype, tuple(v.shape)))

    def constant(value: Any) -> Any:
        if isinstance(value, list):
            return [constant(one) for one in value]
        return graph.add_constant(f"c{len(graph.nodes)}", value) if isinstance(value, torch.Tensor) else value

    def number(size: Any) -> Any:
        return evaluate(size, BINDING) if hasattr(size, "free_symbols") else size

    torch.manual_seed(0)
    nodes = [constant(one) for one in build(list(args), BINDING, operand, lambda size: size)]
    values = iter([value for name, value in given.items() if name.startswith("x")])
    operands = build(list(args), BINDING, lambda _: next(values), number)
    wide = {key: torch.float32 if value == torch.bfloat16 else value for key, value in kwargs.items()}
    expected = OPERATIONS[target].reference(*operands, **wide)
    graph.set_outputs({"y": graph.call(target, *nodes, **kwargs)})
    if f"{str(target).split('.')[1]}-{getattr(args[0], 'shape', '')}" in REFUSED:
        with pytest.raises(InternalError, match="CX230"):
            lower(graph, {}, "weights", compute=torch.float32)
        return
    model = lower(graph, {}, "weights", compute=torch.float32)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {name: value.numpy() for name, value in given.items()})
    torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-5, atol=1e-5)


def test_an_operation_is_declared_once() -> None:
    with pytest.raises(ValueError, match=r"aten\.neg\.default is declared twice"):
        operation(aten.neg.default)(lambda x: x)


# -- nobody else lists operations --------------------------------------------------------------------------------------

OWN_LISTS = {
    "passes/normalize.py": "what `normalize` must not leave",
    "passes/resolve_packing.py": "what `resolve_packing` must not leave",
    "passes/assign_precision.py": "what stands between the products of a layer: the definition of its sites",
    "cosmos_export/evaluation/gates.py": "what `insert_quantization` puts around a product",
}
"""File → why it may list operations of its own."""


def lists_of_operations(source: str) -> Iterator[str]:
    """Tuples, lists, sets and arguments that name two operations of the dialect or more. A dict is a table of rules,
    and `rule` makes an entry of one."""
    known = {f"aten.{str(target).removeprefix('aten.')}" for target in OPERATIONS}
    own = {name for name in ops.__all__ if any(getattr(ops, name) is target for target in OPERATIONS)}

    def names_one(node: ast.expr) -> bool:
        text = ast.unparse(node)
        of_package = text.startswith("ops.") or "from cosmos_export.ir.ops" in source
        return text.removeprefix("ops.") in known or (of_package and text.removeprefix("ops.") in own)

    for node in ast.walk(ast.parse(source)):
        rules = isinstance(node, ast.Call) and ast.unparse(node.func) == "rule"
        parts = [] if rules else node.args if isinstance(node, ast.Call) else getattr(node, "elts", [])
        if sum(map(names_one, parts)) > 1:
            yield ast.unparse(node)


def test_consumers_ask_for_traits() -> None:
    """A new operation has to be named in no list."""
    folders = ("cosmos_export", "passes", "targets", "calibration", "kernels", "benchmarks")
    files = [file for folder in folders for file in sorted((ROOT / folder).rglob("*.py"))]
    found = {}
    for file in files:
        name = file.relative_to(ROOT).as_posix()
        if "ir/ops/" not in name:
            lists = list(lists_of_operations(file.read_text(encoding="utf-8")))
            if lists:
                found[name] = lists
    assert set(found) <= set(OWN_LISTS), f"ask for a trait: {found}"
    assert set(OWN_LISTS) <= set(found), "the list is gone: so is its reason"


def test_lists_are_seen() -> None:
    seen: Callable[[str], list[str]] = lambda text: list(lists_of_operations(text))  # noqa: E731
    imported = "from cosmos_export.ir.ops import x\n[RMS_NORM, ROTARY]"
    assert seen("x = (ops.RMS_NORM, ops.ROTARY)") and seen("is_op(n, aten.add.Tensor, aten.mul.Tensor)")
    assert seen("frozenset({aten.view.default, *ops.VIEWS, ops.ROTARY})") and seen(imported)
    assert not seen("{ops.RMS_NORM: f, ops.ROTARY: g}") and not seen("(ops.RMS_NORM, ops.having(x))")
    assert not seen("@rule(aten.clamp.default, aten.clamp_min.default)\ndef f(): ...")
    assert not seen("call(aten.add.Tensor, x)") and not seen("(aten.dropout.default, aten.type_as.default)")
