"""The schedule of a request to a bundle: the compiled one, or the build's own with what the request changes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

from cosmos_export.bundle import Manifest, RequestRecord
from cosmos_export.diagnostics import UnsupportedError, UserError
from cosmos_export.family import recorded_family
from cosmos_export.sampling import CheckpointSampling, Overrides, Schedule, resolve_schedule


def checkpoint_sampling(record: RequestRecord) -> CheckpointSampling:
    """Sampling settings of the bundle's checkpoint."""
    sampling = record.sampling
    # Lists of a scheduler's configuration are tuples in a manifest.
    scheduler = {key: list(v) if isinstance(v, tuple) else v for key, v in sampling.scheduler.items()}
    family = recorded_family(sampling.edge)
    return CheckpointSampling(scheduler, sampling.native, sampling.distilled_sigmas, family, sampling.policy)


def request_schedule(asked: Overrides, manifest: Manifest, record: RequestRecord, mode: str) -> Schedule:
    """The compiled schedule of a device loop; else the build's for its own mode, with what the request changes."""
    assert manifest.loop is not None
    recorded = recorded_schedule(manifest)
    if manifest.loop.segments:
        if recorded is None:
            raise UnsupportedError(
                "CX605", "this bundle does not say what schedule is compiled into it", "build it again"
            )
        _require_compiled(asked, recorded)
        return recorded
    if recorded is not None and manifest.options.get("mode") == mode:
        if asked == Overrides():
            return recorded
        asked = _completed(asked, recorded)
    found = resolve_schedule(checkpoint_sampling(record), mode, asked)
    bodies = manifest.loop.bodies
    if bodies and found.steps != len(bodies):
        raise UserError(
            "CX606",
            f"{found.steps} steps; this bundle's recipe says what each of {len(bodies)} steps computes in",
            f"ask for {len(bodies)} steps, or build with the steps you need",
        )
    return found


def recorded_schedule(manifest: Manifest) -> Schedule | None:
    """The schedule that the bundle was built with; None where the manifest does not say it."""
    names = Schedule.__dataclass_fields__
    values = {name: manifest.options.get(f"schedule.{name}", ...) for name in names}
    return None if ... in values.values() else Schedule(**cast(dict[str, Any], values))


_SCHEDULE_OPTIONS = ("grid", "steps", "shift", "guidance", "guidance_interval")


def _require_compiled(asked: Overrides, compiled: Schedule) -> None:
    for name in _SCHEDULE_OPTIONS:
        value, found = getattr(asked, name), getattr(compiled, name)
        if value is not None and value != found:
            raise UserError(
                "CX606",
                f"{name.replace('_', ' ')} {value}; {found} is compiled into this bundle's loop",
                "leave the option out, or build with `--loop host`",
            )


def _completed(asked: Overrides, built: Schedule) -> Overrides:
    """``asked``, and for what it leaves open what the bundle was built with, as long as the two go together."""
    if built.sampler != "unipc":
        return asked
    same_grid = asked.grid in (None, built.grid)
    guided = asked.guidance if asked.guidance is not None else built.guidance
    # Another scale is guided at the same timesteps; what was built without guidance has none to say.
    kept = asked.guidance_interval is None and guided != 1 and built.guidance != 1
    interval = (built.guidance_interval or (0.0, 1000.0)) if kept else asked.guidance_interval
    return replace(
        asked,
        grid=asked.grid or built.grid,  # type: ignore[arg-type]  # a distilled grid, which none asks for
        steps=built.steps if asked.steps is None else asked.steps,
        shift=built.shift if asked.shift is None and same_grid else asked.shift,
        guidance=guided,
        guidance_interval=interval,
    )
