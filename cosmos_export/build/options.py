"""What a build was asked for, checked before any work."""

from __future__ import annotations

from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from cosmos_export.checkpoint import Checkpoint
from cosmos_export.diagnostics import UnsupportedError, UserError
from cosmos_export.targets import Target, load_target, require_backend
from cosmos_export.targets.profiles import ModelLimits, Profile, check_limits, parse_profile

ParityMode = Literal["auto", "always", "never"]
_COMPILE_MODULES = ("torch", "diffusers", "transformers", "onnx", "safetensors")


@dataclass(frozen=True)
class BuildOptions:
    """A build request as the user gives it. ``output`` is None with ``until``: dumps only."""

    checkpoint: Path
    output: Path | None = None
    target: str = "cpu"
    profiles: tuple[str, ...] = ("480p-121f",)
    modalities: tuple[str, ...] | None = None
    outputs: tuple[str, ...] | None = None
    """Velocities to compute; None: all of the modalities."""
    steps: int | None = None
    parity: ParityMode = "auto"
    until: str | None = None
    dump: Path | None = None
    force: bool = False


@dataclass(frozen=True)
class Plan:
    """A request that has been found possible."""

    options: BuildOptions
    checkpoint: Checkpoint
    target: Target
    profiles: tuple[Profile, ...]
    modalities: tuple[str, ...]
    limits: ModelLimits = field(repr=False)


def resolve(options: BuildOptions, checkpoint: Checkpoint) -> Plan:
    """Everything that can be refused without work is refused here: target, backend, profiles, modalities, packages."""
    target = load_target(options.target)
    require_backend(target)
    if target.backend == "tensorrt-rtx":
        from cosmos_export.targets.tensorrt_rtx import FLAVOR
        from cosmos_export.targets.trt_common import require_module

        require_module(FLAVOR)
    require_compiler()
    has = {"vision": True, "sound": checkpoint.geometry.sound_gen, "action": checkpoint.geometry.action_gen}
    available = tuple(name for name, present in has.items() if present)
    modalities = available if options.modalities is None else tuple(m for m in available if m in options.modalities)
    if options.modalities is not None and (set(options.modalities) - set(available) or "vision" not in modalities):
        raise UserError(
            "CX210",
            f"modalities {', '.join(options.modalities)} asked for; this checkpoint generates {', '.join(available)}",
            "`vision` is part of every step; leave --modalities out for all the checkpoint has",
        )
    limits = model_limits(checkpoint, modalities)
    profiles = tuple(parse_profile(text) for text in options.profiles)
    for profile in profiles:
        check_limits(profile, limits)
    return Plan(options, checkpoint, target, profiles, modalities, limits)


def require_compiler() -> None:
    """Raise UnsupportedError (CX802) where the packages that compiling needs are not installed."""
    missing = [name for name in _COMPILE_MODULES if find_spec(name) is None]
    if missing:
        raise UnsupportedError(
            "CX802", f"compiling needs {', '.join(missing)}, not installed here", 'pip install "cosmos-export[compile]"'
        )


def model_limits(checkpoint: Checkpoint, modalities: tuple[str, ...]) -> ModelLimits:
    """The shapes a checkpoint can be asked for."""
    from cosmos_export.checkpoint.strict_json import optional_object

    transformer = optional_object(checkpoint.components["transformer"] / "config.json") or {}
    root = optional_object(checkpoint.root / "config.json") or {}
    text = root.get("text_config") or {}
    published = 262_144 if checkpoint.geometry.gated else 131_072
    position = transformer.get("max_position_embeddings") or text.get("max_position_embeddings") or published
    margin = checkpoint.geometry.unified_3d_mrope_temporal_modality_margin
    return ModelLimits(
        max_position=int(position),
        temporal_margin=margin,
        sound="sound" in modalities,
        action="action" in modalities,
    )
