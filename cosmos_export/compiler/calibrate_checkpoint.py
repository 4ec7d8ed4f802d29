"""``calibrate`` from a user's words: sources, requests, passes and coverage are settled before a weight is read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from cosmos_export.bundle import DimRecord, ProfileRecord, PromptRecord
from cosmos_export.bundle.embodiment import Embodiment
from cosmos_export.calibration.table import require_output, write_scale_table
from cosmos_export.checkpoint import Checkpoint, checkpoint_identity, open_checkpoint
from cosmos_export.checkpoint.adapters import require_no_adapters
from cosmos_export.checkpoint.converted import conversions, converted
from cosmos_export.checkpoint.finite import require_finite
from cosmos_export.checkpoint.folded import fold, left_out
from cosmos_export.checkpoint.read_adapter import read_adapter
from cosmos_export.compiler.options import available_modalities, model_limits, require_compiler
from cosmos_export.compiler.request_record import request_record
from cosmos_export.compiler.selection import TOKENIZER_FILE
from cosmos_export.diagnostics import UnsupportedError, UserError
from cosmos_export.files import read_bytes, reason
from cosmos_export.options import CalibrateOptions
from cosmos_export.plan.subject import sampling_of
from cosmos_export.progress import Progress
from cosmos_export.runtime.embodiments import policy_of
from cosmos_export.runtime.prompts import read_prompt
from cosmos_export.stamps import unchanged
from cosmos_export.targets.profiles import NAMED_PROFILES, DimRange, Profile, check_limits, parse_profile
from cosmos_export.units import size

if TYPE_CHECKING:
    from cosmos_export.calibration.algorithms import Algorithm
    from cosmos_export.calibration.calibrate import CalibrationJob
    from cosmos_export.calibration.observers import Observer


@dataclass(frozen=True)
class CalibrateResult:
    """The table that was made."""

    output: Path
    job: CalibrationJob
    ranges: int
    pre_scales: int
    resumed: bool

    def __repr__(self) -> str:
        return f"CalibrateResult({str(self.output)!r}, {self.ranges} ranges from {len(self.job.samples)} passes)"


def calibrate_checkpoint(options: CalibrateOptions, progress: Progress | None = None) -> CalibrateResult:
    """Write the scale table ``options.output``. CX31x the table; CX32x observers and coverage; CX34x the data."""
    require_compiler()
    from cosmos_export.calibration import calibrate as stream
    from cosmos_export.calibration.stream import Workspace

    require_output(options.output, options.force)
    job = resolve_calibration(options, progress)
    folder = stream.workspace_folder(options.output)
    stream.require_workspace_space(job, options.output)
    with unchanged("calibration", *job.inputs):
        workspace = Workspace(folder, job.plan(), partial(job.checkpoint.inputs.require_unchanged, "calibration"))
        table = stream.calibrate(job, workspace, progress)
    write_scale_table(table, options.output, force=options.force)
    workspace.remove()
    return CalibrateResult(options.output, job, len(table.amax), len(table.pre_scales), workspace.resumed)


def resolve_calibration(options: CalibrateOptions, progress: Progress | None = None) -> CalibrationJob:
    """Everything the calibration depends on, checked."""
    from cosmos_export.calibration.algorithms import Algorithm, require_provider
    from cosmos_export.calibration.observers import Observer

    observer = Observer(options.observer, options.margin, options.percentile)
    algorithm = Algorithm(options.algorithm, options.rank, options.bits)
    require_provider(algorithm)
    if options.samples < 1:
        raise UserError("CX322", f"{options.samples} passes", f"--samples {CalibrateOptions.samples}")
    if not options.data:
        raise UserError("CX340", "nothing to calibrate on", "--data with prompts, clips, robot data or latents")
    checkpoint = open_checkpoint(options.checkpoint)
    with unchanged("calibration", checkpoint.inputs):
        return _job(options, checkpoint, observer, algorithm, progress)


def _job(
    options: CalibrateOptions,
    checkpoint: Checkpoint,
    observer: Observer,
    algorithm: Algorithm,
    progress: Progress | None,
) -> CalibrationJob:
    """The part of `resolve` that reads the checkpoint and the data."""
    from cosmos_export.calibration.calibrate import CalibrationJob
    from cosmos_export.calibration.coverage import coverage, plan_samples, require_coverage
    from cosmos_export.calibration.encode import hears
    from cosmos_export.calibration.requests import Setting, make_requests
    from cosmos_export.calibration.sources import read_source
    from cosmos_export.runtime.tokenize import PromptTokenizer

    adapters = tuple(read_adapter(text, checkpoint) for text in options.adapters)
    require_no_adapters(checkpoint.root, left_out(checkpoint, adapters), options.ignore_adapters)
    if (adapters or conversions(checkpoint)) and options.latents == "rollout":
        raise UserError(
            "CX128",
            "--latents rollout samples with the files of the checkpoint, without adapters and conversions",
            "show it clips (--data), or save the checkpoint with them by diffusers first",
        )
    _require_calibratable(checkpoint)
    if options.latents == "rollout":
        _require_memory(checkpoint)
    modalities = available_modalities(options.modalities, checkpoint)
    prompt = _prompt_record(checkpoint)
    record = request_record(checkpoint, modalities, prompt)
    policy = policy_of(record)
    profile = _without_rows(parse_profile(_profile_text(options.profile, policy)), modalities)
    check_limits(profile, model_limits(checkpoint, modalities))
    dims = {name: DimRecord(span.min, span.opt, span.max) for name, span in profile.dims.items()}
    setting = Setting(
        record=record,
        profile=ProfileRecord(profile.name, dims),
        sampling=sampling_of(checkpoint),
        overrides=options.overrides,
        modalities=modalities,
        height=dims["height"].opt * record.video.spatial,
        width=dims["width"].opt * record.video.spatial,
        frames=_frames(options.frames, profile, record.video.temporal),
        negative=read_prompt(options.negative, "negative prompt"),
        latents=options.latents,
        hears=hears(checkpoint),
        policy=policy,
    )
    sources = tuple(read_source(text, policy) for text in options.data)
    tokenizer = PromptTokenizer(prompt, _tokenizer(checkpoint.root / prompt.tokenizer))
    works = make_requests([source.items for source in sources], setting, tokenizer, prompt.use_system)
    samples = plan_samples(works, options.samples)
    found = coverage(works, samples)
    require_coverage(found, modalities)
    require_finite(checkpoint, progress)
    checkpoint = fold(converted(checkpoint, options.output, progress), adapters, options.output, progress)
    return CalibrationJob(
        checkpoint=checkpoint,
        identity=checkpoint_identity(checkpoint, progress),
        record=record,
        sources=sources,
        works=tuple(works),
        samples=tuple(samples),
        coverage=found,
        observer=observer,
        algorithm=algorithm,
        seed=options.seed,
        components=_components_digest(checkpoint),
    )


def _components_digest(checkpoint: Checkpoint) -> str:
    """Digest of every input file that `checkpoint_identity` does not cover and a calibration may read."""
    from cosmos_export.calibration.sources import digest_of

    weights = set(checkpoint.weight_files())
    unread = checkpoint.components.get("vision_encoder")
    return digest_of([path for path in checkpoint.files() if path not in weights and path.parent != unread])


def _profile_text(asked: str, policy: Embodiment | None) -> str:
    """The profile that is ``asked`` for; where none is, a policy's own, if it has a name."""
    if policy is None or asked != CalibrateOptions.profile:
        return asked
    own = f"policy-{policy.name.partition('_')[0]}"
    return own if own in NAMED_PROFILES and policy.normalization is not None else asked


def _frames(asked: int | None, profile: Profile, temporal: int) -> int:
    """Pixel frames of a clip, at most: as asked, or the profile's optimum."""
    if asked is None:
        return (profile.dims["frames"].opt - 1) * temporal + 1
    if asked < 1:
        raise UserError("CX322", f"clips of {asked} frames", "--frames 1 or more")
    return asked


def _require_calibratable(checkpoint: Checkpoint) -> None:
    if checkpoint.quantization is not None:
        raise UnsupportedError(
            "CX324",
            f"{checkpoint.root} is quantized ({checkpoint.precision}); its scales are in it",
            "calibrate the bf16 revision",
        )


def _require_memory(checkpoint: Checkpoint) -> None:
    """A rollout has the whole transformer in memory."""
    from cosmos_export.machine.memory import available_bytes

    needed, available = sum(entry.size_bytes for entry in checkpoint.tensors.values()), available_bytes()
    if needed > available // 2:
        raise UserError(
            "CX347",
            f"`--latents rollout` needs the whole model in memory: {size(needed)}, {size(available)} are free",
            "give clips instead: their latents are noised along the schedule",
        )


def _tokenizer(path: Path) -> bytes:
    try:
        return read_bytes(path)
    except OSError as error:
        raise UserError("CX603", f"cannot read {path}: {reason(error)}", "download the file again") from error


def _prompt_record(checkpoint: Checkpoint) -> PromptRecord:
    """The checkpoint's own tokenizer and chat template, in place in the checkpoint."""
    from cosmos_export.compiler.prompt import compile_chat_template

    if "text_tokenizer" not in checkpoint.components:
        raise UserError("CX324", f"{checkpoint.root} has no text_tokenizer/", "complete the checkpoint")
    template = compile_chat_template(checkpoint)
    use_system = bool(checkpoint.model_index.get("default_use_system_prompt", True))
    return PromptRecord(
        f"text_tokenizer/{TOKENIZER_FILE}", template.plain, template.system, use_system, template.suffix_ids
    )


def _without_rows(profile: Profile, modalities: Sequence[str]) -> Profile:
    """``profile`` without rows of what is not wanted: it bounds the requests, and none has them."""
    none = {f"{name}_len": DimRange(0, 0, 0) for name in ("sound", "action") if name not in modalities}
    return Profile(profile.name, {**profile.dims, **none})
