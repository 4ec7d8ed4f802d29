"""Turns what a build is asked for into a job: everything that can be refused is refused here, before work begins.

No torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from typing import get_args

from cosmos_export.bundle.provenance import require_builder, time_of_build
from cosmos_export.bundle.staging import require_replaceable
from cosmos_export.calibration.table import ScaleTable, read_scale_table, require_checkpoint
from cosmos_export.checkpoint import Checkpoint, open_checkpoint
from cosmos_export.checkpoint.adapters import require_no_adapters
from cosmos_export.checkpoint.converted import buildable_dtype, converted
from cosmos_export.checkpoint.folded import fold, left_out
from cosmos_export.checkpoint.read_adapter import read_adapter
from cosmos_export.compiler.coverage import table_coverage
from cosmos_export.compiler.job import Job
from cosmos_export.compiler.memory import memory_budget
from cosmos_export.compiler.planned import predict
from cosmos_export.compiler.remarks import opening_remarks
from cosmos_export.compiler.request_record import checkpoint_notes, request_record
from cosmos_export.compiler.selection import select
from cosmos_export.compiler.time_table import checkpoint_schedule
from cosmos_export.diagnostics import UnsupportedError, UserError
from cosmos_export.kernels.description import PLUGINS
from cosmos_export.options import BuildOptions, LoopMode, ParityMode, QualityMode, WeightsMode
from cosmos_export.plan import AUTO, Workload, choose, from_checkpoint, offered_bytes
from cosmos_export.plan.sizes import require_budget
from cosmos_export.precision.recipe import Assignment, Recipe, resolve_recipe
from cosmos_export.precision.schemes import SCHEMES
from cosmos_export.precision.stored_recipe import recipe_for
from cosmos_export.progress import Progress
from cosmos_export.sampling import Overrides, Schedule
from cosmos_export.stamps import Inputs, unchanged
from cosmos_export.targets import Target, load_target
from cosmos_export.targets.backends import backend_of
from cosmos_export.targets.backends.protocol import BuildAsked, PrecisionAsked
from cosmos_export.targets.profiles import ModelLimits, Profile, check_limits, parse_profile

_COMPILE_MODULES = ("torch", "diffusers", "transformers", "onnx", "onnxruntime", "safetensors")
_MAX_PROFILE_NAME = 256


def resolve(options: BuildOptions, progress: Progress | None = None) -> Job:
    """Check the request against itself, the target, this installation and the checkpoint, in that order. Weights that
    adapters or a type of their own change are written when nothing else is wrong."""
    _require_consistent(options)
    require_builder(options.created_by)
    time_of_build()  # or the build would find out at its end
    target = load_target(options.target).on(options.backend)
    profiles = _profiles(options.profiles)
    _require_kernels(options.kernels)
    backend = backend_of(target)
    asked = BuildAsked(options.weights == "external", options.kernels, options.memory_budget is not None)
    for refusal in backend.refusals(asked, target):
        raise refusal
    budget = memory_budget(options.memory_budget, backend)
    require_compiler()
    if backend.engines is not None and backend.engines.built_here:
        backend.engines.require()
    checkpoint = open_checkpoint(options.checkpoint)
    with unchanged("the build", checkpoint.inputs):
        return _resolve(options, target, profiles, budget, checkpoint, progress)


def _resolve(
    options: BuildOptions,
    target: Target,
    profiles: tuple[Profile, ...],
    budget: int | None,
    checkpoint: Checkpoint,
    progress: Progress | None,
) -> Job:
    """The part of `resolve` that reads the checkpoint."""
    adapters = tuple(read_adapter(text, checkpoint) for text in options.adapters)
    require_no_adapters(checkpoint.root, left_out(checkpoint, adapters), options.ignore_adapters)
    if options.kernels and checkpoint.dtype == "fp32":
        raise UnsupportedError(
            "CX459",
            f"kernels take the place of bf16 operations, and {checkpoint.root} is fp32",
            "leave `--kernels` out, or convert the checkpoint to bf16",
        )
    modalities = available_modalities(options.modalities, checkpoint)
    outputs = _outputs(options.outputs, modalities)
    components = select(options.components, checkpoint, modalities)
    request = request_record(checkpoint, modalities, None)
    asked = Overrides(options.grid, options.steps, options.shift, options.guidance, options.guidance_interval)
    sampling = checkpoint_schedule(checkpoint, options.mode, asked)
    limits = model_limits(checkpoint, modalities)
    for profile in profiles:
        check_limits(profile, limits)
        _require_rows(profile, outputs)
    recipe = _recipe(options, target, checkpoint, sampling, profiles)
    assignment = _precision(options, recipe, target, checkpoint, sampling, profiles)
    tables = (options.calibration,) if options.calibration is not None and options.calibration.is_dir() else ()
    scale_files = Inputs("the scale table", (), tables)
    if options.output is not None:  # before weights are written for it
        require_replaceable(options.output.absolute(), options.force)
    checkpoint = fold(converted(checkpoint, options.output, progress), adapters, options.output, progress)
    scales = _scales(options, assignment, checkpoint)
    workloads = [Workload(p.name, options.mode, p, 1, 1) for p in profiles]
    plan = predict(
        checkpoint, modalities, components, target, workloads, assignment, sampling, options.loop,
        memory_budget=budget, external=options.weights == "external",
    )  # fmt: skip
    if budget is not None and checkpoint.dtype == "bf16":
        require_budget(list(plan.engines.values()), assignment.layers, budget, loop=options.loop)
    coverage = table_coverage(scales, modalities, profiles, sampling, options.mode)
    return Job(
        checkpoint=checkpoint,
        target=target,
        profiles=profiles,
        modalities=modalities,
        outputs=outputs,
        components=components,
        mode=options.mode,
        loop=options.loop,
        weights=options.weights,
        kernels=options.kernels,
        parity=options.parity,
        quality=options.quality,
        until=options.until,
        dump=options.dump,
        cache=options.cache,
        graphs=options.graphs,
        created_by=options.created_by,
        memory_budget=budget,
        schedule=sampling,
        precision=assignment,
        scales=scales,
        calibration=None if scales is None else options.calibration,
        scale_files=scale_files,
        request=request,
        plan=plan,
        coverage=coverage,
        notes=checkpoint_notes(checkpoint),
        remarks=opening_remarks(modalities, profiles, scales, coverage, options.mode, sampling),
    )


def _require_kernels(kernels: Sequence[str]) -> None:
    unknown = [name for name in kernels if name not in PLUGINS]
    if unknown:
        raise UserError("CX451", f"no kernel {', '.join(unknown)}", f"there are {', '.join(PLUGINS)}")


def _recipe(
    options: BuildOptions, target: Target, checkpoint: Checkpoint, schedule: Schedule, profiles: Sequence[Profile]
) -> Recipe:
    """The recipe that is asked for, or chosen at the optimum of the profiles among those that this build can have."""
    if options.recipe != AUTO:
        return recipe_for(checkpoint, options.recipe)

    def refusal(recipe: Recipe) -> str:
        try:
            found = _precision(options, recipe, target, checkpoint, schedule, profiles)
        except UnsupportedError as error:
            return error.message
        if checkpoint.quantization is not None and options.calibration is None:
            try:
                _require_stored_scales(options, found, checkpoint)
            except UserError as error:
                return error.message
        return ""

    workloads = [
        Workload(p.name, options.mode, p, p.dims["und_len"].opt, p.dims["und_len"].opt if any(schedule.guided) else 0)
        for p in profiles
    ]
    schedules = [schedule] * len(workloads)
    subject, offered = from_checkpoint(checkpoint), offered_bytes(target)
    return choose(subject, target, workloads, schedules, offered, options.loop, refusal)[0]


def _precision(
    options: BuildOptions,
    recipe: Recipe,
    target: Target,
    checkpoint: Checkpoint,
    schedule: Schedule,
    profiles: Sequence[Profile],
) -> Assignment:
    """The recipe for this model and target. CX35x for what the two do not allow."""
    found = resolve_recipe(
        recipe,
        options.overrides,
        target,
        layers=checkpoint.geometry.num_hidden_layers,
        steps=schedule.steps,
        distilled=schedule.sampler == "distilled-sde",
    )
    asked = PrecisionAsked(
        recipe=found.recipe,
        schemes=frozenset(found.schemes),
        checkpoint=checkpoint.root,
        checkpoint_dtype=buildable_dtype(checkpoint),
        loop=options.loop,
        steps=schedule.steps,
        weight_only_steps=len(found.weight_only_steps()),
        profiles=profiles,
    )
    for refusal in backend_of(target).precision_refusals(asked):
        raise refusal
    return found


def _quantizes_attention(precision: Assignment) -> bool:
    return any(SCHEMES[name].attention is not None for name in precision.schemes)


def _scales(options: BuildOptions, precision: Assignment, checkpoint: Checkpoint) -> ScaleTable | None:
    """The scale table, of exactly this checkpoint; none for one that is quantized, which has its scales in it."""
    if checkpoint.quantization is not None:
        _require_stored_scales(options, precision, checkpoint)
        return None
    if options.calibration is None:
        if precision.needs_calibration:
            wanted = ", ".join(sorted(precision.calibrated))
            raise UserError(
                "CX356",
                f"recipe `{precision.recipe}` quantizes activations ({wanted}) and needs their ranges",
                "make a scale table with `cosmos-export calibrate`, and pass `--calibration DIR`",
            )
        return None
    if not precision.needs_calibration and not any(SCHEMES[name].pre_scaled for name in precision.schemes):
        if options.recipe == AUTO:
            return None  # the choice was not the caller's
        raise UserError(
            "CX356", f"recipe `{precision.recipe}` uses no calibration", "leave `--calibration` out, or choose a recipe"
        )
    table = read_scale_table(options.calibration)
    require_checkpoint(table, checkpoint)
    return table


def _require_stored_scales(options: BuildOptions, precision: Assignment, checkpoint: Checkpoint) -> None:
    if options.calibration is not None:
        raise UserError(
            "CX356", f"{checkpoint.root} is quantized, and its scales are in it", "leave `--calibration` out"
        )
    if _quantizes_attention(precision):
        raise UserError(
            "CX356",
            f"recipe `{precision.recipe}` quantizes attention, whose ranges no checkpoint has",
            "build from the bf16 revision with a scale table of `cosmos-export calibrate`",
        )
    weight_only = checkpoint.quantization is not None and checkpoint.quantization.weight_only
    if weight_only and precision.needs_calibration:
        raise UserError(
            "CX356",
            f"recipe `{precision.recipe}` quantizes activations, and {checkpoint.root} has scales of weights only",
            "leave `--recipe` out, or build from the bf16 revision with a scale table of `cosmos-export calibrate`",
        )


def require_compiler() -> None:
    """Raise UnsupportedError (CX802) where the packages that compiling needs are not installed."""
    missing = [name for name in _COMPILE_MODULES if find_spec(name) is None]
    if missing:
        raise UnsupportedError(
            "CX802",
            f"compiling needs {', '.join(missing)}, not installed here",
            'pip install ".[compile]" in the checkout',
        )


def model_limits(checkpoint: Checkpoint, modalities: Sequence[str]) -> ModelLimits:
    """The shapes a checkpoint can be asked for."""
    return ModelLimits(
        max_position=checkpoint.max_position,
        temporal_margin=checkpoint.geometry.unified_3d_mrope_temporal_modality_margin,
        sound="sound" in modalities,
        action="action" in modalities,
    )


def _require_consistent(options: BuildOptions) -> None:
    for name, mode in (("parity", ParityMode), ("loop", LoopMode), ("quality", QualityMode), ("weights", WeightsMode)):
        allowed, given = get_args(mode), getattr(options, name)
        if given not in allowed:
            listed = ", ".join(allowed)
            raise UserError("CX451", f"{name} `{given}` is not one of {listed}", f"pass one of {listed}")
    if options.output is None and options.until is None:
        raise UserError(
            "CX451", "a build needs an output", "pass `-o DIR`, or `--until PASS --dump DIR` for graphs alone"
        )
    if options.until is not None and options.output is not None:
        raise UserError(
            "CX451", "`--until` stops before there is a bundle to write", "leave `--output` out, use `--dump`"
        )
    if options.dump is not None and options.dump.exists() and not options.dump.is_dir():
        raise UserError("CX451", f"{options.dump} is not a directory", "`--dump` takes a directory for one file a pass")


def _profiles(texts: Sequence[str]) -> tuple[Profile, ...]:
    profiles = tuple(parse_profile(text) for text in texts)
    if not profiles:
        raise UserError("CX410", "a build needs at least one profile", "480p-121f is the default")
    names = [profile.name for profile in profiles]
    repeated = [name for name in names if names.count(name) > 1]
    if repeated:
        raise UserError("CX410", f"profile `{repeated[0]}` is given twice", "an engine has each profile once")
    long = [name for name in names if len(name) > _MAX_PROFILE_NAME]
    if long:
        raise UserError(
            "CX410", f"profile `{long[0][:40]}…` has {len(long[0])} characters, allowed {_MAX_PROFILE_NAME}"
        )
    return profiles


def all_modalities(checkpoint: Checkpoint) -> tuple[str, ...]:
    """Modalities that ``checkpoint`` generates."""
    has = {"vision": True, "sound": checkpoint.geometry.sound_gen, "action": checkpoint.geometry.action_gen}
    return tuple(name for name, present in has.items() if present)


def available_modalities(asked: Sequence[str] | None, checkpoint: Checkpoint) -> tuple[str, ...]:
    """The modalities among ``asked`` that the checkpoint generates, in its order; None: all of them. CX210 for anything
    else."""
    available = all_modalities(checkpoint)
    if asked is None:
        return available
    if set(asked) - set(available) or "vision" not in asked:
        raise UserError(
            "CX210",
            f"modalities {', '.join(asked) or 'none'} asked for; this checkpoint generates {', '.join(available)}",
            ("" if "vision" in asked else "add vision, which is part of every step; ")
            + "leave --modalities out for all the checkpoint has",
        )
    return tuple(name for name in available if name in asked)


def _outputs(asked: Sequence[str] | None, modalities: Sequence[str]) -> tuple[str, ...]:
    available = tuple(f"{name}_velocity" for name in modalities)
    if asked is None:
        return available
    unknown = [name for name in asked if name not in available]
    if unknown or not asked:
        what = f"no output {', '.join(f'`{name}`' for name in unknown)}" if unknown else "no output is left"
        raise UserError("CX221", f"{what}; the step computes {', '.join(available)}", "leave --outputs out for all")
    return tuple(name for name in available if name in asked)


def _require_rows(profile: Profile, outputs: Sequence[str]) -> None:
    """CX411 for a profile whose minimum has nothing to compute, for which no engine can be built. Vision always has a
    row."""
    lengths = [f"{name.removesuffix('_velocity')}_len" for name in outputs]
    if "vision_len" not in lengths and not any(profile.dims[dim].min for dim in lengths):
        raise UserError(
            "CX411",
            f"profile `{profile.name}` allows no row of {', '.join(outputs)}: {' and '.join(lengths)} may be 0",
            f"raise the minimum, for example `{profile.name},{lengths[0]}=16:32:64`",
        )
