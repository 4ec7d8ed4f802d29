"""``plan`` from a user's words: a checkpoint or a published size, targets and workloads, into an estimate. No torch."""

from __future__ import annotations

from pathlib import Path

from cosmos_export.checkpoint import Checkpoint, open_checkpoint
from cosmos_export.compiler.memory import parse_size
from cosmos_export.compiler.options import all_modalities, model_limits
from cosmos_export.diagnostics import UserError
from cosmos_export.options import PlanOptions
from cosmos_export.plan import (
    AUTO,
    Estimate,
    PlanRequest,
    Subject,
    estimate,
    from_checkpoint,
    parse_workload,
    published_subject,
)
from cosmos_export.precision.recipe import DEFAULT, load_recipe
from cosmos_export.precision.stored_recipe import recipe_for
from cosmos_export.sampling import Overrides
from cosmos_export.targets import load_target
from cosmos_export.targets.profiles import ModelLimits


def plan_checkpoint(options: PlanOptions) -> Estimate:
    """Predict sizes, memory, disk and times. CX350 a recipe; CX40x a target; CX48x what is planned; CX410 a shape."""
    if options.loop not in ("host", "device"):
        raise UserError("CX451", f"loop `{options.loop}` is not one of host, device", "pass one of host, device")
    if not options.targets or not options.workloads:
        raise UserError("CX480", "a plan needs a target and a workload", "for example rtx-pro-6000 and t2v-480p-189f")
    subject, limits, opened = subject_of(options.checkpoint, options.like)
    if options.recipe == AUTO:
        raise UserError("CX350", "a plan is of one recipe", "`cosmos-export recipes choose` says which one `auto` is")
    request = PlanRequest(
        targets=tuple(load_target(name.strip()) for name in dict.fromkeys(options.targets)),
        workloads=tuple(parse_workload(text, options.prompt_tokens) for text in dict.fromkeys(options.workloads)),
        recipe=load_recipe(options.recipe or DEFAULT) if opened is None else recipe_for(opened, options.recipe),
        settings=options.overrides,
        loop=options.loop,
        overrides=Overrides(
            steps=options.steps, guidance=options.guidance, guidance_interval=options.guidance_interval
        ),
        memory_budget=None if options.memory_budget is None else parse_size(options.memory_budget),
    )
    return estimate(subject, request, limits)


def subject_of(checkpoint: Path | None, like: str | None) -> tuple[Subject, ModelLimits | None, Checkpoint | None]:
    """The subject of the plan, the limits of its shapes, and the checkpoint itself where there is one."""
    if checkpoint is not None and like is None:
        opened = open_checkpoint(checkpoint)
        return from_checkpoint(opened), model_limits(opened, all_modalities(opened)), opened
    if like is not None and checkpoint is None:
        return published_subject(like), None, None
    raise UserError("CX480", "a plan is for a checkpoint or for a published size", "give CHECKPOINT, or --like nano")
