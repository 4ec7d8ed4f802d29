"""The request on which the gates of a quantized build measure: one of the mode that is built."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from cosmos_export.bundle.embodiment import Embodiment
from cosmos_export.compiler.job import Job
from cosmos_export.compiler.request_record import request_record
from cosmos_export.evaluation.cases import CASES, Case
from cosmos_export.evaluation.ends import Axis
from cosmos_export.runtime.embodiments import policy_of
from cosmos_export.sampling import MODES

_MODEL_UNIT = "of the model's units"


def built_case(job: Job) -> Case:
    """The case of the mode of ``job``, with the chunk and the columns of a policy; the first that has one of the
    outputs where that mode's has none."""
    fitting = [case for case in CASES if set(case.outputs) & set(job.outputs)]
    mode = MODES[job.mode]
    case = next((case for case in fitting if case.name == mode.title), fitting[0])
    robot = _robot(job)
    if robot is None or robot.width is None or not case.actions or "action" not in job.modalities:
        return case
    temporal = job.request.video.temporal
    history = robot.history if mode.state else 0
    return replace(
        case,
        frames=robot.chunk // temporal + 1,
        actions=robot.chunk + history,
        clean_actions=range(history) if history else case.clean_actions,
        fps=robot.fps,
        domain=robot.domain,
        columns=robot.width,
        first_action=1 - history,
    )


def action_axes(job: Job) -> tuple[Axis, ...]:
    """The columns of an action of ``job``'s policy by their names and units; all of the model's where it is none.

    In the units of the data where the model has the robot's own numbers, or the scale table was calibrated with
    statistics of such actions; else in the model's.
    """
    robot = _robot(job)
    if robot is None or robot.width is None:
        return tuple(Axis(f"column {i + 1}", _MODEL_UNIT) for i in range(job.checkpoint.geometry.action_dim or 0))
    scale = None if robot.normalization == "none" else _statistics(job, robot.width)
    known = robot.normalization == "none" or scale is not None
    if not robot.parts:
        unit = "of the data's units" if known else _MODEL_UNIT
        return tuple(Axis(f"column {i + 1}", unit, 1.0 if scale is None else scale[i]) for i in range(robot.width))
    axes: list[Axis] = []
    for part in robot.parts:
        unit = (part.unit or "of the robot's own numbers") if known else _MODEL_UNIT
        for index in range(part.columns):
            name = f"{part.name}[{index}]" if part.columns > 1 else part.name
            axes.append(Axis(name, unit, 1.0 if scale is None else scale[len(axes)]))
    return tuple(axes)


def _statistics(job: Job, width: int) -> list[float] | None:
    """One of the model's units in each column of the data that the scale table was calibrated on; None where it does
    not say so of actions of ``width`` columns."""
    sources = job.scales.lineage.get("sources") if job.scales is not None else None
    for source in sources if isinstance(sources, (list, tuple)) else ():
        found = source.get("statistics") if isinstance(source, Mapping) else None
        scale = found.get("scale") if isinstance(found, Mapping) else None
        if isinstance(scale, (list, tuple)) and len(scale) == width:
            return [float(value) for value in scale]
    return None


def _robot(job: Job) -> Embodiment | None:
    """The embodiment of the policy that is built; None for other checkpoints."""
    record = request_record(job.checkpoint, job.modalities, None)
    return policy_of(record)
