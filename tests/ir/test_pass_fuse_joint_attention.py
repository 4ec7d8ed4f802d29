"""fuse_joint_attention: the prompt's and the generated keys and values meet in one operation, prompt last."""

from __future__ import annotations

from typing import Any

import pytest
from sketch import N, P, Sketch, apply, aten, declines, ops, targets

from cosmos_export.ir.spec import Rate
from cosmos_export.passes.fuse_joint_attention import FuseJointAttention

ONE_EACH = "causal, or not one part that changes in the loop and one that does not"


def joined(keys: str, values: str, *, causal: bool = False, axis: int = 0, rows: Any = None) -> Any:
    """Attention over parts: `p` given once a prompt, `r` once a request, `s` in every step, `x`, `y` carried."""
    s = Sketch()
    rates = {"p": Rate.PROMPT, "r": Rate.REQUEST, "s": Rate.STEP, "x": Rate.CARRIED, "y": Rate.CARRIED}
    rows = rows or {}

    def part(kind: str, name: str) -> Any:
        return s.input(f"{kind}_{name}", (rows.get(f"{kind}_{name}", P if name in "pr" else N), 2, 8), rates[name])

    both = [[part(kind, n) for n in names] for kind, names in (("k", keys), ("v", values))]
    key, value = (s.call(aten.cat.default, parts, axis) if len(parts) > 1 else parts[0] for parts in both)
    count = key.meta["spec"].shape[0] if causal else N
    query = s.input("q", (count, 4 if axis == 1 else 2, 8))
    return s.program(y=s.call(ops.ATTENTION, query, key, value, causal, 0.5))


def test_every_layer_of_the_model_is_fused(compile_tiny: Any) -> None:
    for backbone in ("omni", "edge"):
        for layers in (1, 2):
            report = compile_tiny(backbone, layers=layers).reports["fuse_joint_attention"].result
            assert report.changes == {"joint attentions": layers} and report.declined == []


@pytest.mark.parametrize("parts", ["px", "xp", "rx", "ps"])
def test_the_prompt_is_last_in_any_order_of_joining(parts: str) -> None:
    program = joined(parts, parts)
    assert apply(FuseJointAttention(), program, tolerance=1e-6).changes == {"joint attentions": 1}
    (node,) = program.graphs["body"].calls()
    own, prefix = (parts[1], parts[0]) if parts[0] in "pr" else (parts[0], parts[1])
    assert node.target is ops.JOINT_ATTENTION
    assert [n.name for n in node.args[1:5]] == [f"k_{own}", f"v_{own}", f"k_{prefix}", f"v_{prefix}"]


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"keys": "px", "values": "px", "causal": True}, ONE_EACH),
        ({"keys": "pxy", "values": "pxy"}, ONE_EACH),
        ({"keys": "pr", "values": "pr"}, ONE_EACH),
        ({"keys": "sx", "values": "sx"}, ONE_EACH),
        ({"keys": "xy", "values": "xy"}, ONE_EACH),
        ({"keys": "x", "values": "x"}, "its keys and values are not joined from parts"),
        ({"keys": "px", "values": "px", "axis": 1, "rows": {"k_p": N, "v_p": N}}, "not joined from parts"),
        (
            {"keys": "px", "values": "xp", "rows": {"k_p": N, "v_p": N}},
            "keys and values are joined in different orders",
        ),
        (
            {"keys": "px", "values": "px", "rows": {"k_p": 2, "k_x": 3, "v_p": 3, "v_x": 2}},
            "keys and values are joined from parts of different lengths",
        ),
    ],
    ids=["causal", "three parts", "both given", "schedule", "both change", "not joined", "joined by heads",
         "other order of values", "other lengths"],
)  # fmt: skip
def test_other_attention_stays(options: dict[str, Any], reason: str) -> None:
    program = joined(**options)
    declines(FuseJointAttention(), program, reason)
    assert ops.ATTENTION in targets(program)
