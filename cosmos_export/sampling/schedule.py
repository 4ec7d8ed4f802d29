"""The schedule of a request: explicit, complete, and resolved from checkpoint, mode and overrides before any work.

Every field that decides the trajectory is in ``Schedule``; nothing downstream looks at a scheduler's configuration.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby, pairwise
from typing import Any, Literal, NoReturn, TypeGuard, get_args

import numpy as np

from cosmos_export.diagnostics import UserError
from cosmos_export.family import Family
from cosmos_export.options import Overrides
from cosmos_export.sampling import grids
from cosmos_export.sampling.defaults import Default, Interval
from cosmos_export.sampling.grids import TRAINING_STEPS
from cosmos_export.sampling.modes import MODES

Sampler = Literal["unipc", "distilled-sde"]
Grid = Literal["karras", "flow", "native", "distilled"]

GRIDS: tuple[Grid, ...] = get_args(Grid)
_UNIPC_GRIDS = tuple(g for g in GRIDS if g != "distilled")
_DISTILLED_MODES = tuple(mode.name for mode in MODES.values() if mode.distilled)
_PUBLISHED_BOUNDS = {"sigma_min": grids.PUBLISHED_SIGMA_MIN, "sigma_max": grids.PUBLISHED_SIGMA_MAX}
_LAST_TIMESTEP = 1001
"""Upper end of the guidance intervals that engines publish: one above the largest timestep."""
MAX_GUIDANCE = 100
"""Published settings end at 7; far above, the difference of the branches leaves the range of 16-bit engines."""


@dataclass(frozen=True)
class Segment:
    """Consecutive steps that compute the same: ``steps`` of them from step ``start`` on.

    ``guided``: whether they run the unconditional branch.
    """

    start: int
    steps: int
    guided: bool


@dataclass(frozen=True)
class Schedule:
    """How a request is sampled. ``sigmas`` has one more entry than there are steps, the last is 0.

    ``shift`` is None on grids that have none (Karras, distilled). ``guidance_interval`` holds inclusive timesteps; None
    guides every step. ``timesteps`` are whole numbers, except for a distilled checkpoint.

    Sigmas are rounded to float32, as the published scheduler rounds them. That is part of the trajectory: on the flow
    grid the first σ is 1 − 1e-6, and the rounding moves 1 − σ by 1.3 %.
    """

    sampler: Sampler
    grid: Grid
    steps: int
    shift: float | None
    guidance: float
    guidance_interval: Interval | None
    sigmas: tuple[float, ...]
    timesteps: tuple[float, ...]

    def __post_init__(self) -> None:
        start = 1.0 if self.sampler == "distilled-sde" else np.nextafter(1.0, 0.0)
        falling = all(a > b for a, b in pairwise(self.sigmas))
        if len(self.sigmas) != self.steps + 1 or len(self.timesteps) != self.steps:
            _inconsistent(f"{self.steps} steps with {len(self.sigmas)} sigmas and {len(self.timesteps)} timesteps")
        if not falling or self.sigmas[0] > start or self.sigmas[-1] != 0:
            _inconsistent(f"sigmas {list(self.sigmas)} do not fall from at most {start:g} to 0")
        if (self.sampler == "distilled-sde") != (self.grid == "distilled"):
            _inconsistent(f"sampler {self.sampler} on grid {self.grid}")

    def text(self, mode: str) -> str:
        """Description of the schedule for requests of ``mode``."""
        shift = "" if self.shift is None else f", shift {self.shift:g}"
        return f"{mode}: {self.sampler} on {self.grid}, {self.steps} steps{shift}, guidance {self.guidance:g}"

    @property
    def guided(self) -> tuple[bool, ...]:
        """Whether each step needs the unconditional branch."""
        low, high = self.guidance_interval or (-math.inf, math.inf)
        return tuple(self.guidance != 1 and low <= t <= high for t in self.timesteps)

    @property
    def segments(self) -> tuple[Segment, ...]:
        """All steps, in order, as the longest runs of steps that compute the same."""
        return self.segments_by([0] * self.steps)

    def segments_by(self, keys: Sequence[int]) -> tuple[Segment, ...]:
        """The same where steps with different ``keys``, one per step, compute differently, too."""
        kinds = list(zip(self.guided, keys, strict=True))
        runs = (list(steps) for _, steps in groupby(range(self.steps), key=kinds.__getitem__))
        return tuple(Segment(run[0], len(run), self.guided[run[0]]) for run in runs)


def _inconsistent(what: str) -> NoReturn:
    raise UserError("CX465", f"the schedule contradicts itself: {what}", "take schedules from `resolve_schedule`")


@dataclass(frozen=True)
class CheckpointSampling:
    """Sampling settings of a checkpoint."""

    scheduler: Mapping[str, Any]
    """``scheduler_config.json``."""
    native: bool = False
    """``use_native_flow_schedule`` of the model index."""
    distilled_sigmas: tuple[float, ...] | None = None
    family: Family = Family.OMNI
    policy: str | None = None
    """Embodiment domain of a policy checkpoint."""


_UNIPC = "UniPCMultistepScheduler"
_EULER = "FlowMatchEulerDiscreteScheduler"


@dataclass(frozen=True)
class _Setting:
    """A scheduler setting that changes the arithmetic: the one value that is compiled, and what a missing key means."""

    value: Any
    default: Any = field(default=...)

    def absent(self) -> Any:
        return self.value if self.default is ... else self.default


_REQUIRED: Mapping[str, Mapping[str, _Setting]] = {
    _UNIPC: {
        "use_flow_sigmas": _Setting(True, default=False),
        "prediction_type": _Setting("flow_prediction", default="epsilon"),
        "solver_order": _Setting(2),
        "solver_type": _Setting("bh2"),
        "predict_x0": _Setting(True),
        "lower_order_final": _Setting(True),
        "final_sigmas_type": _Setting("zero"),
        "num_train_timesteps": _Setting(TRAINING_STEPS),
        "disable_corrector": _Setting([]),
        "solver_p": _Setting(None),
        "thresholding": _Setting(False),
        "use_dynamic_shifting": _Setting(False),
        "use_exponential_sigmas": _Setting(False),
        "use_beta_sigmas": _Setting(False),
        "shift_terminal": _Setting(None),
    },
    _EULER: {
        "stochastic_sampling": _Setting(True, default=False),
        "shift": _Setting(1.0),
        "num_train_timesteps": _Setting(TRAINING_STEPS),
        "use_dynamic_shifting": _Setting(False),
        "use_karras_sigmas": _Setting(False),
        "use_exponential_sigmas": _Setting(False),
        "use_beta_sigmas": _Setting(False),
        "invert_sigmas": _Setting(False),
        "shift_terminal": _Setting(None),
    },
}
"""Sampler by scheduler class. A checkpoint that differs would be sampled wrongly, so it is refused."""


def resolve_schedule(checkpoint: CheckpointSampling, mode: str, overrides: Overrides | None = None) -> Schedule:
    """The schedule of a request of ``mode``.

    A distilled checkpoint has one schedule. Otherwise the grid is the checkpoint's own, with its own shift; steps,
    guidance and interval are those of the mode's declaration; each can be overridden.

    Raises UserError naming the field, its value and what is allowed: CX460 steps, CX461 a scheduler that is not
    compiled, CX462 grid or shift, CX463 guidance or interval, CX464 mode.
    """
    if mode not in MODES:
        _refuse("CX464", "mode", mode, ", ".join(MODES))
    asked = overrides or Overrides()
    _require_settings(checkpoint)
    if checkpoint.distilled_sigmas is not None:
        return _distilled(checkpoint.distilled_sigmas, mode, asked)
    return _unipc(checkpoint, MODES[mode].default(checkpoint.family, checkpoint.policy), asked)


def _require_settings(checkpoint: CheckpointSampling) -> None:
    expected = _UNIPC if checkpoint.distilled_sigmas is None else _EULER
    what = "a checkpoint without fixed sigmas" if checkpoint.distilled_sigmas is None else "a distilled checkpoint"
    found = checkpoint.scheduler.get("_class_name")
    if found != expected:
        _refuse("CX461", "scheduler _class_name", found, f"{expected} for {what}", "restore the published scheduler")
    for key, setting in _REQUIRED[expected].items():
        value = checkpoint.scheduler.get(key, setting.absent())
        # A manifest has tuples where the checkpoint's file has lists.
        if (list(value) if isinstance(value, tuple) else value) != setting.value:
            _refuse("CX461", f"scheduler {key}", value, repr(setting.value), "restore the published scheduler")


# -- distilled --------------------------------------------------------------------------------------------------------


def _distilled(stated: tuple[float, ...], mode: str, asked: Overrides) -> Schedule:
    steps = len(stated)
    if mode not in _DISTILLED_MODES:
        _refuse("CX464", "mode", mode, f"{', '.join(_DISTILLED_MODES)} for a distilled checkpoint")
    if asked.grid not in (None, "distilled"):
        _refuse("CX462", "grid", asked.grid, "distilled: this checkpoint is trained for its own sigmas only")
    if asked.steps not in (None, steps):
        _refuse("CX460", "steps", asked.steps, f"{steps}: this checkpoint is distilled to them")
    if asked.shift is not None:
        _refuse("CX462", "shift", asked.shift, "none: a distilled checkpoint states its sigmas as they are")
    if asked.guidance not in (None, 1):
        _refuse("CX463", "guidance", asked.guidance, "1: guidance is distilled into the weights")
    if asked.guidance_interval is not None:
        _refuse("CX463", "guidance_interval", asked.guidance_interval, "none: guidance is distilled into the weights")
    sigmas = np.asarray(stated, dtype=np.float32)
    return Schedule(
        sampler="distilled-sde",
        grid="distilled",
        steps=steps,
        shift=None,
        guidance=1.0,
        guidance_interval=None,
        sigmas=(*(float(s) for s in sigmas), 0.0),
        timesteps=tuple(float(t) for t in sigmas * np.float32(TRAINING_STEPS)),
    )


# -- UniPC ------------------------------------------------------------------------------------------------------------


def _unipc(checkpoint: CheckpointSampling, default: Default, asked: Overrides) -> Schedule:
    own = _own_grid(checkpoint)
    grid = _grid(asked.grid, own)
    steps = default.steps if asked.steps is None else asked.steps
    if type(steps) is not int or not 1 <= steps <= TRAINING_STEPS:
        _refuse("CX460", "steps", steps, f"whole numbers from 1 to {TRAINING_STEPS}", f"the default is {default.steps}")
    shift = _shift(checkpoint.scheduler, grid, own, default, asked.shift)
    exact = _sigmas(checkpoint.scheduler, grid, own, steps, shift)
    sigmas = np.append(exact, 0.0).astype(np.float32).astype(np.float64)
    if not (sigmas[0] < 1 and (np.diff(sigmas) < 0).all()):
        found = asked.shift if asked.shift is not None else shift
        _refuse("CX462", "shift", found, f"values at which {steps} sigmas are below 1 and distinct in float32")
    timesteps = (exact * TRAINING_STEPS).astype(np.int64)
    guidance = default.guidance if asked.guidance is None else asked.guidance
    if not (_is_number(guidance) and 0 <= guidance <= MAX_GUIDANCE):
        _refuse("CX463", "guidance", guidance, f"numbers from 0 to {MAX_GUIDANCE}; 1 means none")
    return Schedule(
        sampler="unipc",
        grid=grid,
        steps=steps,
        shift=shift,
        guidance=float(guidance),
        guidance_interval=_interval(asked.guidance_interval, default, guidance, timesteps.tolist()),
        sigmas=tuple(sigmas.tolist()),
        timesteps=tuple(map(float, timesteps)),
    )


def _own_grid(checkpoint: CheckpointSampling) -> Grid:
    # The scheduler makes its Karras grid also where the pipeline passes it the native one.
    if checkpoint.scheduler.get("use_karras_sigmas"):
        return "karras"
    return "native" if checkpoint.native else "flow"


def _grid(asked: str | None, own: Grid) -> Grid:
    wanted = own if asked is None else asked
    found = next((grid for grid in _UNIPC_GRIDS if grid == wanted), None)
    if found is None:
        _refuse("CX462", "grid", asked, ", ".join(_UNIPC_GRIDS), f"this checkpoint's own is {own}")
    return found


def _shift(scheduler: Mapping[str, Any], grid: Grid, own: Grid, default: Default, asked: float | None) -> float | None:
    if grid == "karras":
        if asked is not None:
            _refuse("CX462", "shift", asked, "none: the Karras grid has no shift", "with a shift: grid flow or native")
        return None
    stated = scheduler.get("flow_shift", 1.0) if grid == own else default.shift
    shift = stated if asked is None else asked
    if not (_is_number(shift) and shift > 0):
        _refuse("CX462", "shift", shift, "finite numbers above 0")
    return float(shift)


def _sigmas(scheduler: Mapping[str, Any], grid: Grid, own: Grid, steps: int, shift: float | None) -> grids.Sigmas:
    if shift is not None:
        return grids.native(steps, shift) if grid == "native" else grids.flow(steps, shift)
    if own != "karras":
        return grids.karras(steps)
    low, high = _sigma_bound(scheduler, "sigma_min"), _sigma_bound(scheduler, "sigma_max")
    if low >= high:
        _refuse("CX461", "scheduler sigma_min", low, f"values below sigma_max = {high}")
    return grids.karras(steps, low, high)


def _sigma_bound(scheduler: Mapping[str, Any], key: str) -> float:
    value = scheduler.get(key)
    if not (_is_number(value) and value > 0):
        _refuse("CX461", f"scheduler {key}", value, f"numbers above 0; published: {_PUBLISHED_BOUNDS[key]}")
    return value


def _interval(asked: Interval | None, default: Default, guidance: float, timesteps: list[int]) -> Interval | None:
    if asked is None:
        return default.guidance_interval if guidance != 1 else None
    numbers = isinstance(asked, tuple) and len(asked) == 2 and all(map(_is_number, asked))
    if not (numbers and 0 <= asked[0] <= asked[1] <= _LAST_TIMESTEP):
        _refuse("CX463", "guidance_interval", asked, f"two timesteps, low to high, from 0 to {_LAST_TIMESTEP}")
    if guidance == 1:
        _refuse("CX463", "guidance_interval", asked, "none with guidance 1, which guides no step")
    if not any(asked[0] <= t <= asked[1] for t in timesteps):
        where = f"intervals that contain a step; timesteps fall from {timesteps[0]} to {timesteps[-1]}"
        _refuse("CX463", "guidance_interval", asked, where, "guidance 1 turns guidance off")
    return (float(asked[0]), float(asked[1]))


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _refuse(code: str, name: str, value: object, allowed: str, hint: str = "") -> NoReturn:
    raise UserError(code, f"{name} = {str(value)[:120]}; allowed: {allowed}", hint)
