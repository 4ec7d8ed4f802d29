"""The passes in order: the one list."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from dataclasses import dataclass

from cosmos_export.diagnostics import UserError
from cosmos_export.ir.program import Program
from cosmos_export.ir.verifier import verify
from cosmos_export.passes.base import CannotApply, Pass, PassResult, describe
from cosmos_export.passes.fold_schedule import FoldSchedule
from cosmos_export.passes.fuse_joint_attention import FuseJointAttention
from cosmos_export.passes.merge_linears import MergeLinears
from cosmos_export.passes.normalize import Normalize
from cosmos_export.passes.resolve_packing import ResolvePacking
from cosmos_export.passes.shift_rope import ShiftRope
from cosmos_export.passes.slice_outputs import SliceOutputs
from cosmos_export.passes.split_towers import SplitTowers


@dataclass(frozen=True)
class Report:
    """What one pass did to a program, and in how many seconds."""

    name: str
    result: PassResult
    seconds: float


def default_passes(outputs: Collection[str] | None = None) -> list[Pass]:
    """Every pass, in the order in which each finds what it needs. ``outputs``: velocities to keep (default: all)."""
    return [
        Normalize(),
        ResolvePacking(),
        # Before the split: both rotary tables are in one graph, and what makes them independent is visible.
        ShiftRope(),
        SplitTowers(),
        FoldSchedule(),
        # Before merging: a query that needs fewer rows than its key is not merged with it.
        SliceOutputs(outputs),
        MergeLinears(),
        FuseJointAttention(),
    ]


def pass_names() -> list[str]:
    return ["capture", *(p.name for p in default_passes())]


def run_passes(
    program: Program,
    passes: list[Pass],
    *,
    until: str | None = None,
    after_each: Callable[[Program, Report], None] | None = None,
) -> list[Report]:
    """Run ``passes`` on ``program`` in place, with the verifier after each; stop after the one named ``until``.

    Raises UserError (CX222) for an unknown ``until`` and CX220 where the model computes something that a pass does not
    know; InternalError (CX201) where a pass breaks the IR.
    """
    known = ["capture", *(p.name for p in passes)]
    if until is not None and until not in known:
        raise UserError("CX222", f"there is no pass `{until}`", f"passes, in order: {', '.join(known)}")
    verify(program, stage="capture")
    reports: list[Report] = []
    forbidden: set[object] = set()
    for step in passes if until != "capture" else []:
        start = time.perf_counter()
        keys = program.bound_keys()
        result = step.run(program)
        for key in sorted(keys - program.bound_keys()):
            program.unused_keys[key] = f"no output follows from it ({step.name})"
        _require_removed(program, step, result)
        forbidden |= step.removes
        program.history.append(step.name)
        verify(program, stage=step.name, forbidden=forbidden)
        report = Report(step.name, result, time.perf_counter() - start)
        reports.append(report)
        if after_each is not None:
            after_each(program, report)
        if step.name == until:
            break
    return reports


def _require_removed(program: Program, step: Pass, result: PassResult) -> None:
    """CX220 where ``step`` left an operation that it is there to remove: the model has it in a place of its own."""
    left = [n for graph in program.graphs.values() for n in graph.calls() if n.target in step.removes]
    reasons = {d.where: d.reason for d in result.declined}
    for node in sorted(left, key=lambda n: describe(n) not in reasons):  # what a pass says of itself comes first
        why = reasons.get(describe(node), "")
        raise CannotApply(step.name, node, f"`{node.target}` is not known in this place{why and f': {why}'}")
