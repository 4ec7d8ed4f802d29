"""Every rule of the dialect against torch: the spec that the rule derives is the type and shape that torch gives."""

from __future__ import annotations

from collections.abc import Callable
from inspect import signature
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from cosmos_export.ir import ops
from cosmos_export.ir.dims import evaluate, symbol
from cosmos_export.ir.graph import infer
from cosmos_export.ir.ops import SpecError, aten
from cosmos_export.ir.spec import TensorSpec

F32, BF16, I64, BOOL = torch.float32, torch.bfloat16, torch.int64, torch.bool
E4M3, E2M1, INT4 = torch.float8_e4m3fn, torch.float4_e2m1fn_x2, torch.int4
STAND_IN = {E2M1: torch.float32, INT4: torch.int8}
"""Types without tensors, and what the interpreter has in their place."""
N, M = symbol("n"), symbol("m")


class V:
    """An operand of a type and shape."""

    def __init__(self, *shape: Any, dtype: torch.dtype = F32, high: int = 2) -> None:
        self.shape, self.dtype, self.high = shape, dtype, high

    def value(self, binding: dict[str, int]) -> torch.Tensor:
        shape = [evaluate(s, binding) for s in self.shape]
        if self.dtype in STAND_IN:
            return torch.ones(shape, dtype=STAND_IN[self.dtype])
        if self.dtype.is_floating_point:
            return (torch.rand(shape) + 1).to(self.dtype)
        return torch.randint(0, self.high, shape).to(self.dtype)


def rows(start: Any, end: Any) -> Any:
    return lambda binding: torch.arange(evaluate(start, binding), evaluate(end, binding))


SAMPLES: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = [
    *[(op, (V(N, 4), V(N, 4)), {}) for op in (aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor)],
    (aten.add.Tensor, (V(N, 4), V(4)), {}),
    (aten.add.Tensor, (V(N, 1, 4), V(M, 1)), {}),
    (aten.mul.Tensor, (V(N, 4, dtype=BF16), V(4)), {}),
    (aten.mul.Tensor, (V(N, 4, dtype=BF16), V()), {}),
    (aten.mul.Tensor, (V(), V(N, 4, dtype=I64)), {}),
    (aten.add.Tensor, (V(N, dtype=I64), 2), {}),
    (aten.add.Tensor, (V(N, dtype=I64), 0.5), {}),
    (aten.sub.Tensor, (V(1, N), N + 3), {}),
    *[(op, (V(N, 4),), {}) for op in (aten.cos.default, aten.sin.default, aten.exp.default, aten.rsqrt.default)],
    *[(op, (V(N, 4, dtype=BF16),), {}) for op in (aten.silu.default, aten.relu.default, aten.neg.default)],
    (aten.reciprocal.default, (V(N, 4),), {}),
    (aten.pow.Tensor_Scalar, (V(N, 4), 2), {}),
    (aten.clamp_min.default, (V(N, 4, dtype=BF16), 0.5), {}),
    (aten.clamp.default, (V(N, 4), -1.0, 1.5), {}),
    (aten.linalg_vector_norm.default, (V(N, 4, M), 2, [1], True), {}),
    (aten.conv1d.default, (V(1, 4, N + 8), V(6, 4, 3), V(6), [1], [1], [3]), {}),
    (aten.conv1d.default, (V(1, 4, N + 8), V(6, 2, 3), None, [2], [0], [1], 2), {}),
    (aten.conv2d.default, (V(M, 4, N + 2, 9), V(6, 4, 3, 3), None, [2, 2], [0, 1], [1, 1]), {}),
    (aten.conv3d.default, (V(1, 4, M + 2, N + 2, 5), V(6, 4, 3, 3, 1), V(6)), {}),
    (aten.conv_transpose1d.default, (V(1, 4, N + 1), V(4, 6, 8), V(6), [4], [2]), {}),
    (aten.where.self, (V(4, dtype=BOOL), V(N, 4), V(N, 4)), {}),
    (aten._to_copy.default, (V(N, 4),), {"dtype": BF16}),
    (aten.mean.dim, (V(N, 4), [-1], True), {}),
    (aten.mean.dim, (V(N, 4, M), [0, 2]), {}),
    (aten.linear.default, (V(N, 4), V(6, 4)), {}),
    (aten.linear.default, (V(N, M, 4), V(6, 4), V(6)), {}),
    (aten.matmul.default, (V(N, 4), V(4, M)), {}),
    (aten.matmul.default, (V(3, 1, N, 4), V(2, 4, M)), {}),
    (aten.view.default, (V(N, 6), [N, 2, 3]), {}),
    (aten.view.default, (V(N, M, 6), [N * M, 6]), {}),
    (aten.view.default, (V(N, 6), [-1, 3]), {}),
    (aten.expand.default, (V(1, N), [4, N]), {}),
    (aten.expand.default, (V(N), [3, -1]), {}),
    (aten.permute.default, (V(N, 4, M), [2, 0, 1]), {}),
    (aten.unsqueeze.default, (V(N, 4), 1), {}),
    (aten.unsqueeze.default, (V(N, 4), -1), {}),
    (aten.squeeze.dim, (V(N, 1, 4), 1), {}),
    (aten.cat.default, ([V(N, 4), V(M, 4), V(3, 4)], 0), {}),
    (aten.cat.default, ([V(N, 4), V(N, 2)], -1), {}),
    (aten.cat.default, ([V(N, 4), V(N, 4)],), {}),
    (aten.slice.Tensor, (V(N + M, 4), 0, N, N + M), {}),
    (aten.slice.Tensor, (V(N, 9), 1, 1, 9, 3), {}),
    (aten.select.int, (V(N, 4, M), 1, 2), {}),
    (aten.slice_scatter.default, (V(N, 9), V(N, 3), 1, 1, 9, 3), {}),
    (aten.select_scatter.default, (V(3, N), V(N), 0, 2), {}),
    (aten.index_put.default, (V(N + M, 4), [rows(N, N + M)], V(M, 4)), {}),
    (aten.index.Tensor, (V(N + M, 4), [rows(N, N + M)]), {}),
    (aten.embedding.default, (V(7, 4), V(N, dtype=I64, high=7)), {}),
    (aten.arange.start, (N, N + M), {"dtype": F32}),
    (aten.full.default, ([N, 4], 2.5), {"dtype": BF16}),
    (aten.constant_pad_nd.default, (V(2, N, M), [0, M, 1, 0], 0.0), {}),
    (aten.scaled_dot_product_attention.default, (V(1, 4, N, 8), V(1, 2, M, 8), V(1, 2, M, 8)), {"enable_gqa": True}),
    (ops.RMS_NORM, (V(N, 4), V(4), 1e-6), {}),
    (ops.RMS_NORM, (V(N, 2, 4), V(4, dtype=BF16), 1e-6), {}),
    (ops.ROTARY, (V(N, 2, 8), V(N, 4), V(N, 4)), {}),
    (ops.ROTARY, (V(N, 2, 8, dtype=BF16), V(N, 4), V(N, 4)), {}),
    (ops.SWIGLU, (V(N, 4), V(N, 4)), {}),
    (ops.ATTENTION, (V(N, 4, 8), V(M, 2, 8), V(M, 2, 8), False, 0.3), {}),
    (ops.ATTENTION, (V(N, 4, 8), V(N, 2, 8), V(N, 2, 8), True, 0.3), {}),
    (ops.JOINT_ATTENTION, (V(N, 4, 8), V(N, 2, 8), V(N, 2, 8), V(M, 2, 8), V(M, 2, 8), 0.3), {}),
    (ops.JOINT_ATTENTION_FP8, (V(N, 4, 8), V(N, 2, 8), V(N, 2, 8), V(M, 2, 8), V(M, 2, 8), V(3), 0.3), {}),
    (ops.QUANTIZE, (V(N, 4, dtype=BF16), V()), {}),
    (ops.DEQUANTIZE, (V(N, 4, dtype=E4M3), V(), BF16), {}),
    (ops.DEQUANTIZE_GROUPS, (V(6, 64, dtype=INT4), V(6, 2, dtype=BF16)), {}),
    (ops.DEQUANTIZE_BLOCKS, (V(6, 32, dtype=E2M1), V(6, 2, dtype=E4M3), V(), BF16), {}),
    (ops.REQUANTIZE_BLOCKS, (V(N, 32, dtype=BF16), V()), {}),
    (ops.NORM_QUANTIZE, (V(N, 8, dtype=BF16), V(8), 1e-6, V()), {}),
    (ops.ADD_NORM_QUANTIZE, (V(N, 8), V(N, 8), V(8), 1e-6, V()), {}),
    (ops.ACTIVATION_QUANTIZE, (V(N, 8, dtype=BF16), V(N, 8, dtype=BF16), V()), {}),
    (ops.ACTIVATION_QUANTIZE, (V(N, 8), None, V()), {}),
    (ops.QKV_PACK, (V(N, 16), V(N, 8), V(N, 8), V(4), V(4), V(N, 2), V(N, 2), 1e-6), {}),
    (ops.UNIPC_STEP, (V(10), V(N, 3, 4), V(N, 3, 4), *[V(N, 3, 4)] * 4, [V(N), V(3)], [0, 1]), {}),
    (ops.UNIPC_STEP, (V(10), V(N, 3, dtype=BF16), None, *[V(N, 3)] * 4, [], []), {}),
    (ops.ITEM, ([V(N, 4), V(M)], 1), {}),
]  # fmt: skip


def plain_sample(target: Any) -> tuple[Any, tuple[V, ...], dict[str, Any]] | None:
    """Operands for an operation of tensors alone, each float32 [n, 4]; None where its rule takes something else."""
    operands = list(signature(ops.OPERATIONS[target].rule, eval_str=True).parameters.values())
    if any(one.annotation is not TensorSpec for one in operands):
        return None
    return target, tuple(V(N, 4) for _ in operands), {}


WRITTEN = {target for target, _, _ in SAMPLES}
# An operation needs a sample of its own where this one does not say it.
SAMPLES += filter(None, (plain_sample(target) for target in ops.OPERATIONS if target not in WRITTEN))


def build(operand: Any, binding: dict[str, int], make: Callable[[V], Any], size: Callable[[Any], Any]) -> Any:
    if isinstance(operand, V):
        return make(operand)
    if callable(operand):
        value = operand(binding)
        return TensorSpec(value.dtype, (M,)) if make(V()).__class__ is TensorSpec else value
    if isinstance(operand, (list, tuple)):
        return [build(o, binding, make, size) for o in operand]
    return size(operand)


def several(value: Any) -> tuple[Any, ...]:
    """The results of an operation, which has one or several."""
    return value if isinstance(value, tuple) else (value,)


def spec_of_sample(target: Any, args: Any, kwargs: Any) -> Any:
    one = {"n": 2, "m": 3}
    operands = build(list(args), one, lambda v: TensorSpec(v.dtype, tuple(v.shape)), lambda s: s)
    return ops.OPERATIONS[target].rule(*operands, **kwargs)


@pytest.mark.parametrize(("target", "args", "kwargs"), SAMPLES, ids=lambda v: str(v) if "OpOverload" in repr(v) else "")
def test_a_rule_gives_what_torch_gives(target: Any, args: Any, kwargs: Any) -> None:
    spec = spec_of_sample(target, args, kwargs)

    @settings(max_examples=6, deadline=None)
    @given(st.integers(1, 6), st.integers(1, 6))
    def check(n: int, m: int) -> None:
        binding = {"n": n, "m": m}
        number = lambda s: evaluate(s, binding) if hasattr(s, "free_symbols") else s  # noqa: E731
        operands = build(list(args), binding, lambda v: v.value(binding), number)
        result = ops.OPERATIONS[target].reference(*operands, **kwargs)
        for one, wanted in zip(several(result), several(spec), strict=True):
            shape = tuple(evaluate(s, binding) for s in wanted.shape)
            assert (one.dtype, tuple(one.shape)) == (wanted.dtype, shape)

    check()


def test_every_rule_has_a_sample() -> None:
    left = set(ops.OPERATIONS) - {target for target, _, _ in SAMPLES}
    assert not left, "a rule that takes more than tensors needs a sample here"


def test_an_operation_of_tensors_alone_needs_none() -> None:
    assert plain_sample(aten.where.self) is not None and plain_sample(aten.neg.default) is not None
    assert plain_sample(aten.clamp_min.default) is None and plain_sample(aten.cat.default) is None


@pytest.mark.parametrize("sample", [s for s in SAMPLES if "cosmos_export" in str(s[0])], ids=lambda s: str(s[0]))
def test_our_operations_have_a_fake_form_of_the_same_spec(sample: Any) -> None:
    """What `torch.export` and compilers see of them without running them."""
    target, args, kwargs = sample
    binding = {"n": 3, "m": 2}
    spec = spec_of_sample(target, args, kwargs)
    with FakeTensorMode():
        result = target(*build(list(args), binding, lambda v: v.value(binding), lambda s: s), **kwargs)
    for one, wanted in zip(several(result), several(spec), strict=True):
        assert (one.dtype, tuple(one.shape)) == (wanted.dtype, tuple(evaluate(s, binding) for s in wanted.shape))


# -- operands that do not fit -----------------------------------------------------------------------------------------

WRONG = [
    (aten.add.Tensor, (V(N, 4), V(N, 3)), "sizes 4 and 3 do not broadcast"),
    (aten.add.Tensor, (V(N, 4), V(M, 4)), "sizes n and m do not broadcast"),
    (aten.where.self, (V(4), V(4), V(4)), "where takes a bool and two values of one type"),
    (aten.linear.default, (V(N, 4), V(6, 5)), r"linear of float32\[n, 4\] by float32\[6, 5\]"),
    (aten.linear.default, (V(N, 4), V(6, 4, dtype=BF16)), "types differ"),
    (aten.linear.default, (V(N, 4), V(6, 4), V(5)), "bias"),
    (aten.matmul.default, (V(N, 4), V(5, M)), "matmul of"),
    (aten.linalg_vector_norm.default, (V(N, 4), 1, [1]), "a norm of order 1"),
    (aten.conv1d.default, (V(1, 4, N), V(6, 3, 3)), "convolution of"),
    (aten.conv2d.default, (V(1, 4, N, M), V(6, 4, 3, 3), V(5)), "bias"),
    (aten.conv_transpose1d.default, (V(1, 4, N), V(3, 6, 8)), "transposed convolution of"),
    (aten.matmul.default, (V(N, 4), V(4, M, dtype=BF16)), "types differ"),
    (aten.view.default, (V(N, 4), [N, 5]), "view of"),
    (aten.expand.default, (V(2, N), [4, N]), "expand of"),
    (aten.permute.default, (V(N, 4), [0, 0]), "permute of"),
    (aten.squeeze.dim, (V(N, 4), 1), "squeeze of axis 1"),
    (aten.squeeze.dim, (V(N, 4), 2), "axis 2 of a value of rank 2"),
    (aten.cat.default, ([V(N, 4), V(N, 5)], 0), "cat of"),
    (aten.cat.default, ([V(N, 4), V(N, 4, dtype=BF16)], 0), "cat of"),
    (aten.slice.Tensor, (V(N, 4), 0, 0, N, 2), "a strided slice has a fixed length"),
    (aten.slice_scatter.default, (V(N, 4), V(N, 3), 1, 0, 2), "scatter of"),
    (aten.select_scatter.default, (V(N, 4), V(3), 0, 0), "scatter of"),
    (aten.index.Tensor, (V(N, 4), [V(2, dtype=I64), V(2, dtype=I64)]), "index along axis 0"),
    (aten.index_put.default, (V(N, 4), [V(2, dtype=I64)], V(2, 4, dtype=BF16)), "index_put along axis 0"),
    (ops.RMS_NORM, (V(N, 4), V(5), 1e-6), "rms_norm of"),
    (ops.ROTARY, (V(N, 2, 8), V(N, 8), V(N, 8)), "rotary of"),
    (ops.ROTARY, (V(N, 2, 8), V(M, 4), V(M, 4)), "rotary of"),
    (ops.SWIGLU, (V(N, 4), V(N, 5)), "swiglu of"),
    (ops.ATTENTION, (V(N, 3, 8), V(M, 2, 8), V(M, 2, 8), False, 1.0), "3 query heads over 2 key heads"),
    (ops.ATTENTION, (V(N, 2, 8), V(M, 2, 4), V(M, 2, 4), False, 1.0), "attention of"),
    (ops.ATTENTION, (V(N, 2, 8), V(M, 2, 8), V(M, 2, 8), True, 1.0), "causal attention is over the same rows"),
    (ops.JOINT_ATTENTION, (V(N, 2, 8), V(M, 2, 8), V(M, 2, 8), V(M, 1, 4), V(M, 1, 4), 1.0), "attention of"),
    (ops.JOINT_ATTENTION_FP8, (*[V(N, 2, 8)] * 5, V(2), 1.0), "three scales"),
    (ops.QUANTIZE, (V(N, 4, dtype=I64), V()), "quantize of int64"),
    (ops.QUANTIZE, (V(N, 4), V(4)), "one float32 number"),
    (ops.DEQUANTIZE, (V(N, 4), V(), BF16), "dequantize of float32"),
    (ops.DEQUANTIZE, (V(N, 4, dtype=E4M3), V(dtype=BF16), BF16), "one float32 number"),
    (ops.DEQUANTIZE_GROUPS, (V(6, 64, dtype=INT4), V(2, 6)), "dequantize of int4"),
    (ops.DEQUANTIZE_BLOCKS, (V(6, 32, dtype=E2M1), V(2, 6, dtype=E4M3), V(), BF16), "dequantize of float4"),
    (ops.REQUANTIZE_BLOCKS, (V(N, 24), V()), "no blocks of 16"),
    (ops.NORM_QUANTIZE, (V(N, 8), V(4), 1e-6, V()), "norm of"),
    (ops.ADD_NORM_QUANTIZE, (V(N, 8), V(M, 8), V(8), 1e-6, V()), "sum of"),
    (ops.ACTIVATION_QUANTIZE, (V(N, 8), V(N, 4), V()), "activation of"),
    (ops.QKV_PACK, (V(N, 16), V(N, 8), V(N, 8), V(8), V(8), V(N, 2), V(N, 2), 1e-6), "heads of"),
    (ops.UNIPC_STEP, (V(9), V(N, 3), None, *[V(N, 3)] * 4, [], []), "a row of ten coefficients"),
    (ops.UNIPC_STEP, (V(10), V(N, 3), None, *[V(N, 3, dtype=BF16)] * 4, [], []), "a step of"),
    (ops.UNIPC_STEP, (V(10), V(N, 3), None, *[V(N, 3)] * 4, [V(4)], [1]), "masks"),
    (ops.ITEM, ([V(N, 4), V(M)], 2), "result 2 of"),
]  # fmt: skip


@pytest.mark.parametrize(("target", "args", "message"), WRONG, ids=lambda v: v if isinstance(v, str) else "")
def test_operands_that_do_not_fit_are_refused(target: Any, args: Any, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        spec_of_sample(target, args, {})


def test_an_unknown_operation_and_an_unknown_option_are_refused() -> None:
    with pytest.raises(SpecError, match=r"`aten.sort.default` is not in the dialect"):
        infer(aten.sort.default, (), {})
    with pytest.raises(SpecError, match=r"operands of `aten.add.Tensor`: .*alpha"):
        infer(aten.add.Tensor, (1, 2), {"alpha": 2})


# -- our operations against the modules they stand for ----------------------------------------------------------------


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_rms_norm_is_the_stock_norm(dtype: torch.dtype) -> None:
    from diffusers.models.normalization import RMSNorm

    module = RMSNorm(16, eps=1e-6, elementwise_affine=True, bias=False)
    torch.nn.init.normal_(module.weight)
    module, x = module.to(dtype), torch.randn(5, 16).to(dtype)
    with torch.no_grad():
        assert torch.equal(ops.RMS_NORM(x, module.weight, 1e-6), module(x))


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_rms_norm_in_fp32_and_a_cast_is_the_stock_nemotron_norm(dtype: torch.dtype) -> None:
    from diffusers.models.transformers.transformer_cosmos3 import Cosmos3NemotronRMSNorm

    module = Cosmos3NemotronRMSNorm(16, 1e-5)
    torch.nn.init.normal_(module.weight)
    module, x = module.to(dtype), torch.randn(5, 16).to(dtype)
    with torch.no_grad():
        assert torch.equal(ops.RMS_NORM(x, module.weight.float(), 1e-5).to(dtype), module(x))


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_rotary_is_the_stock_rotation(dtype: torch.dtype) -> None:
    from diffusers.models.transformers.transformer_cosmos3 import _rotate_half

    x, half = torch.randn(5, 3, 16).to(dtype), torch.randn(5, 8)
    cos, sin = (torch.cat((f(half), f(half)), -1).to(dtype) for f in (torch.cos, torch.sin))
    stock = x * cos.unsqueeze(1) + _rotate_half(x) * sin.unsqueeze(1)
    assert torch.equal(ops.ROTARY(x, cos[:, :8], sin[:, :8]), stock)


def test_attention_is_attention_written_out() -> None:
    q, k, v = torch.randn(5, 4, 8), torch.randn(5, 2, 8), torch.randn(5, 2, 8)
    for causal in (False, True):
        scores = torch.einsum("nhd,mhd->hnm", q, k.repeat_interleave(2, 1)) * 0.3
        if causal:
            scores = scores.masked_fill(torch.ones(5, 5, dtype=torch.bool).triu(1), -torch.inf)
        expected = torch.einsum("hnm,mhd->nhd", scores.softmax(-1), v.repeat_interleave(2, 1))
        torch.testing.assert_close(ops.ATTENTION(q, k, v, causal, 0.3), expected)


def test_joint_attention_is_attention_over_own_then_prefix() -> None:
    q, k, v, pk, pv = (torch.randn(n, 2, 8) for n in (5, 5, 5, 3, 3))
    expected = ops.ATTENTION(q, torch.cat((k, pk)), torch.cat((v, pv)), False, 0.3)
    assert torch.equal(ops.JOINT_ATTENTION(q, k, v, pk, pv, 0.3), expected)


def test_swiglu_is_silu_times_up() -> None:
    gate, up = torch.randn(5, 8), torch.randn(5, 8)
    assert torch.equal(ops.SWIGLU(gate, up), F.silu(gate) * up)
