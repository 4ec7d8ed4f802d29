"""Measurements of a bundle: whole requests through the runtime, as `run` makes them, on whatever backend it has."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cosmos_export.bench.clock import CardWatch
from cosmos_export.bench.measure import REASONER, check_runs
from cosmos_export.bench.result import MeasuredPart, Measurement, machine
from cosmos_export.diagnostics import UnsupportedError, UserError
from cosmos_export.progress import Progress
from cosmos_export.sampling import DEFAULT_MODE, MODES, Mode, Schedule
from cosmos_export.sampling.modes import IMAGE_MODE
from cosmos_export.verb_options import FEWEST_RUNS

if TYPE_CHECKING:
    from cosmos_export.bundle import Manifest, ProfileRecord
    from cosmos_export.runtime import Generator, LoadedBundle, Result
    from cosmos_export.runtime.request import Request


@dataclass(frozen=True)
class NamedWorkload:
    """A named workload: what a request of it has, at the sizes of a profile."""

    mode: Mode
    sound: bool = False


KINDS: Mapping[str, NamedWorkload] = {
    **{mode.name: NamedWorkload(mode) for mode in MODES.values()},
    "av": NamedWorkload(MODES[DEFAULT_MODE], sound=True),
}
"""Every mode, and `DEFAULT_MODE` with sound. Besides these `REASONER`: one prompt through the reasoner."""
_ROBOT = "droid_lerobot"


@dataclass(frozen=True)
class BundleRequest:
    """A measurement of ``bundle``. The other fields are explained in `BenchOptions`."""

    bundle: Path
    workload: str | None = None
    """One of `KINDS`, or `REASONER`."""
    profile: str | None = None
    prompt_tokens: tuple[int, int] | None = None
    backend: str | None = None
    device: str | None = None
    runs: int = FEWEST_RUNS
    warm_up: int = 1
    dry_run: bool = False


def measure_bundle(request: BundleRequest, progress: Progress, command: str = "") -> Measurement:
    """Each stage of whole requests, decoding included; every run has prompts of its own, so that all are encoded.

    UserError CX672: no such workload or profile, or one that the bundle's modalities and sizes do not allow.
    """
    from cosmos_export.bundle import open_verdicts
    from cosmos_export.runtime import Generator, load_bundle

    check_runs(request.runs, request.warm_up, request.dry_run)
    loaded = load_bundle(request.bundle, backend=request.backend, device=request.device, progress=progress)
    manifest = loaded.manifest
    profile = _profile(manifest, request.profile)
    dims = {name: span.opt for name, span in profile.dims.items()}
    name = request.workload or _built_for(manifest, dims)
    positive, negative = request.prompt_tokens or (dims["und_len"], dims["und_len"])
    schedule = _schedule(manifest)
    alone = name == REASONER
    requests = None if alone else numbered_requests(manifest, name, profile, (positive, negative))
    session = loaded.executor.open(REASONER) if alone else None
    generator = None if alone else Generator(loaded)

    def run(number: int) -> dict[str, float]:
        if session is not None:
            return _prompt(session, positive, number)
        assert generator is not None and requests is not None
        return _whole(generator, requests(number))

    samples: dict[str, list[float]] = {}
    before = 1 + request.warm_up  # the first run compiles
    progress.begin("measure", before + request.runs)
    try:
        with CardWatch(_index(loaded.executor.device)) as watch:
            for number in range(before + request.runs):
                watch.keeps = number >= before
                found = run(number)
                for part, seconds in found.items() if number >= before else ():
                    samples.setdefault(part, []).append(seconds)
                progress.update("measure", number + 1)
    finally:
        progress.end("measure")
        if session is not None:
            session.close()
        if generator is not None:
            generator.close()
        else:
            loaded.executor.close()
    guided, steps = (0, 0) if alone else (sum(schedule.guided), schedule.steps)
    return Measurement(
        subject=str(request.bundle),
        model=manifest.model.variant,
        workload=name if alone else f"{name}-{profile.name}",
        recipe=manifest.recipe,
        backend=loaded.executor.name,
        device=loaded.executor.device,
        card=_card_of(loaded.executor.device),
        components=tuple(MeasuredPart(part, tuple(values)) for part, values in samples.items()),
        steps=steps,
        forwards=steps + guided,
        extrapolated="",
        covers=_covers(loaded, alone),
        dry_run=request.dry_run,
        machine=machine(),
        during=watch.summary(),
        command=command,
        verdicts=open_verdicts(manifest),
    )


def _profile(manifest: Manifest, asked: str | None) -> ProfileRecord:
    profiles = {profile.name: profile for profile in manifest.profiles}
    chosen = asked or next(iter(profiles))
    if chosen not in profiles:
        raise UserError("CX672", f"profile `{chosen}` is not one of {', '.join(profiles)}")
    return profiles[chosen]


def _built_for(manifest: Manifest, dims: Mapping[str, int]) -> str:
    return IMAGE_MODE if dims["frames"] == 1 else str(manifest.options["mode"])


def _schedule(manifest: Manifest) -> Schedule:
    values = {name: manifest.options[f"schedule.{name}"] for name in Schedule.__dataclass_fields__}
    return Schedule(**values)  # type: ignore[arg-type]


def numbered_requests(
    manifest: Manifest, name: str, profile: ProfileRecord, tokens: tuple[int, int]
) -> Callable[[int], Request]:
    """Requests by number, at the optimum of ``profile`` and with no prompt twice. What ``name`` needs and the bundle
    lacks is refused here."""
    import numpy as np

    from cosmos_export.runtime.embodiments import policy_of, robot_of
    from cosmos_export.runtime.generate_options import ENCODER
    from cosmos_export.runtime.request import ActionPart, Request

    if name not in KINDS:
        raise UserError("CX672", f"workload `{name}` is not one of {', '.join((*KINDS, REASONER))}")
    kind, record = KINDS[name], manifest.request
    mode = kind.mode
    schedule, dims = _schedule(manifest), {name: span.opt for name, span in profile.dims.items()}
    modalities = manifest.options["modalities"]
    for wanted, has in (("sound", kind.sound), ("action", mode.acts)):
        if has and (wanted not in modalities or not dims.get(f"{wanted}_len")):  # type: ignore[operator]
            raise UserError("CX672", f"workload `{name}` has {wanted}, and the bundle's profile none")
    if mode.clean_frames and ENCODER not in manifest.streams:
        raise UnsupportedError("CX605", f"this bundle has no {ENCODER}", "build it with its components")
    lowest = {n: span.min for n, span in manifest.profiles[0].dims.items()}
    if mode.single and lowest["frames"] > 1:
        raise UserError(
            "CX672", f"workload `{name}` has one frame, and the bundle takes no fewer than {lowest['frames']}"
        )
    given = mode.given_frames(dims["frames"])
    if given and dims["frames"] < mode.least_frames:
        what = f"workload `{name}` has at least {mode.least_frames} latent frames"
        raise UserError("CX672", f"{what}, and profile `{profile.name}` {dims['frames']}", "choose another --profile")
    assert record is not None
    frames = 1 if mode.single else record.video.temporal * (dims["frames"] - 1) + 1
    scale = record.video.spatial
    random = np.random.default_rng(0)
    pixels = None
    if given:
        shown = (given - 1) * record.video.temporal + 1
        pixels = 2 * random.random((1, 3, shown, scale * dims["height"], scale * dims["width"]), np.float32) - 1
    action = None
    if mode.acts:
        robot = policy_of(record) or robot_of(_ROBOT, record)
        rows, width = dims["action_len"], robot.width or 1
        actions = 2 * random.random((rows, width), np.float32) - 1 if mode.clean_actions == "all" else None
        action = ActionPart(rows, robot.domain, width, actions)
    positive = np.arange(tokens[0], dtype=np.int64)
    negative = np.arange(tokens[1], dtype=np.int64) if any(schedule.guided) else None
    base = Request(
        mode.name, positive, negative, schedule, frames, dims["height"], dims["width"], 24.0,
        clean_frames=tuple(range(given)), pixels=pixels, sound=kind.sound, action=action,
    )  # fmt: skip

    def numbered(number: int) -> Request:
        # No two runs share a prompt: what the runtime remembers of the last ones would not be computed again.
        other = None if negative is None else (negative + 2 * number + 1) % _IDS
        return replace(base, input_ids=(positive + 2 * number) % _IDS, negative_ids=other, seed=number)

    return numbered


_IDS = 100
"""Token ids that every vocabulary has."""


def _whole(generator: Generator, request: Request) -> dict[str, float]:
    """Seconds of each stage of one request."""
    result = generator.generate(request)
    timings = dict(result.timings)
    start = time.perf_counter()
    if _decoded(result, generator, request):
        timings["decode"] = time.perf_counter() - start
    return timings


def _decoded(result: Result, generator: Generator, request: Request) -> bool:
    from cosmos_export.runtime.generate_options import DECODER, SOUND_DECODER

    manifest, decoded = generator.bundle.manifest, False
    if DECODER in manifest.streams and "vision" in MODES[request.mode].decoded:
        for _ in result.video():
            decoded = True
    if request.sound and SOUND_DECODER in manifest.graphs:
        result.sound()
        decoded = True
    return decoded


def _prompt(session: Any, tokens: int, number: int) -> dict[str, float]:
    """Seconds of the reasoner on one prompt, to the end of its last result."""
    import numpy as np

    start = time.perf_counter()
    made = session.run({"input_ids": (np.arange(tokens, dtype=np.int64) + number) % _IDS})
    last = list(made.values())[-1]
    last.numpy()  # waits for the device; of all keys and values one is copied
    return {REASONER: time.perf_counter() - start}


def _covers(loaded: LoadedBundle, alone: bool) -> str:
    if alone:
        return "keys and values of one prompt"
    return "the whole request, from token ids to frames" if loaded.manifest.streams else "the request without codecs"


def _index(device: str) -> int | None:
    kind, _, index = device.partition(":")
    return int(index or 0) if kind == "cuda" else None


def _card_of(device: str) -> str | None:
    from cosmos_export.machine.gpu import gpus

    return next((gpu.name for gpu in gpus() if gpu.index == _index(device)), None)


__all__ = ["KINDS", "BundleRequest", "NamedWorkload", "measure_bundle"]
