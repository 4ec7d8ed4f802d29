"""Take the timestep embedding out of the loop."""

from __future__ import annotations

from cosmos_export.ir.graph import Node
from cosmos_export.ir.program import Program
from cosmos_export.ir.spec import Rate
from cosmos_export.passes.base import Pass, PassResult
from cosmos_export.passes.motion import hoist

SCHEDULE, TIME_EMBEDDING = "schedule", "time_embedding"


class FoldSchedule(Pass):
    """Operations that follow from the timestep alone become graph ``schedule``.

    Its result is one row per step, the same for all tokens, and the schedule is known when a bundle is built: the build
    evaluates the graph at each timestep and stores the table [steps, hidden]; the generator takes the row.

        generator(x, t)  =  generator'(x, schedule(t))

    Numerical effect: none, the same operations run, in the type in which the model keeps them (fp32).
    """

    name = "fold_schedule"
    law = "generator(x, t) = generator'(x, schedule(t))"
    phase = "towers"
    after = ("split_towers",)

    def run(self, program: Program) -> PassResult:
        result = PassResult()
        rows = hoist(program, program.loop.body, {Rate.STEP}, SCHEDULE, _name)
        result.changes["rows computed once a step of the schedule"] = len(rows)
        result.changes = +result.changes
        return result


def _name(node: Node) -> str:
    return TIME_EMBEDDING
