"""Short guided requests through a bundle as it is staged, one per mode: manifest, tables, edges and models together.

What they are compared with knows nothing of the manifest: the stock model under diffusers' scheduler, or, where the
models compute what a recipe loses, the same models run along the program's own edges.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cosmos_export.bundle import Manifest, RequestRecord
from cosmos_export.checkpoint.safetensors_header import read_header
from cosmos_export.diagnostics import UserError
from cosmos_export.evaluation.cases import Case
from cosmos_export.evaluation.models import OnnxModel, Value
from cosmos_export.evaluation.sampled import stock_scheduler
from cosmos_export.ir.program import Program
from cosmos_export.passes.fold_schedule import SCHEDULE
from cosmos_export.runtime.request import ActionPart, Request
from cosmos_export.runtime.schedule_table import SCHEDULE_TABLE
from cosmos_export.runtime.scheduling import checkpoint_sampling, request_schedule
from cosmos_export.runtime.step_inputs import sound_latents
from cosmos_export.sampling import CheckpointSampling, Overrides, Schedule
from cosmos_export.sampling.solvers import SolverState, distilled_step, unipc_step

GUIDANCE = 3.0
_STEPS = 3
TABLE_LIMIT = 1e-5
"""float32, relative L2, of a table against what it stands for; of bfloat16 its own rounding comes on top."""
_ROUNDING = 2.0**-8


def short(schedule: Schedule) -> Schedule:
    """A few steps of ``schedule``, its first and last among them, each of them guided if its sampler knows guidance."""
    chosen = sorted({round(float(i)) for i in np.linspace(0, schedule.steps - 1, _STEPS)})
    few = replace(
        schedule,
        steps=len(chosen),
        sigmas=(*(schedule.sigmas[i] for i in chosen), 0.0),
        timesteps=tuple(schedule.timesteps[i] for i in chosen),
    )
    return few if schedule.sampler == "distilled-sde" else replace(few, guidance=GUIDANCE, guidance_interval=None)


def requested(case: Case, record: RequestRecord) -> Case:
    """``case`` with the sound that a request of its frames has; none where the model generates none."""
    if not case.sound or record.sound is None:
        return replace(case, sound=0)
    return replace(case, sound=sound_latents((case.frames - 1) * record.video.temporal + 1, case.fps, record))


def request_of(
    case: Case,
    inputs: Mapping[str, torch.Tensor],
    negative: torch.Tensor,
    noise: Mapping[str, torch.Tensor],
    schedule: Schedule,
    temporal: int,
) -> Request:
    """``case`` as a request: its latents are the noise, those of clean rows too; ``noise`` is that of the steps."""
    given = {n.removesuffix("_latent"): v.numpy() for n, v in inputs.items() if n.endswith("_latent")}
    action = None
    if case.actions:
        rows = inputs["action_latent"]
        clean = rows.numpy() if case.clean_actions == "all" else None
        action = ActionPart(case.actions, int(inputs["action_domain"]), rows.shape[1], clean)
    return Request(
        mode=case.mode.name,
        input_ids=inputs["input_ids"].numpy(),
        negative_ids=negative.numpy() if any(schedule.guided) else None,
        schedule=schedule,
        frames=(case.frames - 1) * temporal + 1,
        height=case.height,
        width=case.width,
        fps=case.fps,
        clean_frames=tuple((inputs["vision_mask"] == 0).nonzero().flatten().tolist()),
        sound=bool(case.sound),
        action=action,
        noise=given | {f"{n.removesuffix('_noise')}_steps": v.numpy() for n, v in noise.items()},
    )


class StepModels:
    """The models of a host's loop along the edges of the program, each opened once.

    ``bodies``: the model of each step where they differ. ``chains``: the models of graphs that were cut.
    """

    def __init__(
        self, program: Program, folder: Path, suffix: str, bodies: Sequence[str], chains: Mapping[str, Sequence[str]]
    ) -> None:
        self._program = program
        self._folder, self._suffix = folder, suffix
        self._bodies = bodies
        self._chains = chains
        self._models: dict[str, OnnxModel] = {}

    def __call__(self, step: int, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Outputs of the body of ``step`` for ``inputs``."""
        known = {name: value.numpy() for name, value in inputs.items()}
        found: dict[str, Mapping[str, Value]] = {}
        for name in self._program.graphs:
            fed = {e.input: found[e.source][e.output] for e in self._program.edges_into(name)}
            of_step = self._bodies[step] if self._bodies and name == self._program.loop.body else name
            found[name] = self._run(of_step, {**known, **fed})
        return {n: torch.from_numpy(found[self._program.loop.body][n]) for n in self._program.loop.carried.values()}

    def _run(self, name: str, known: Mapping[str, Value]) -> Mapping[str, Value]:
        values = dict(known)
        for piece in self._chains.get(name, (name,)):
            if piece not in self._models:
                self._models[piece] = OnnxModel(self._folder / f"{piece}{self._suffix}")
            values |= self._models[piece](values)
        return values


# -- tables and schedules ---------------------------------------------------------------------------------------------


def table_problems(root: Path, schedule: Schedule, scheduler: Mapping[str, Any]) -> Iterator[str]:
    """Differences of the bundle's table of the schedule from the schedule, the sampler and the bundle's model."""
    tables = {n: t.array() for n, t in read_header(root / SCHEDULE_TABLE).tensors.items()}
    if not np.array_equal(tables["timesteps"], np.asarray(schedule.timesteps, np.float32)):
        yield "its timesteps are not those of the schedule"
    moved = _sampler_error(tables["coefficients"], schedule, scheduler)
    if not moved <= TABLE_LIMIT:
        yield f"with its coefficients the sampler is {moved:.1e} from diffusers', allowed {TABLE_LIMIT:.0e}"
    model = OnnxModel(root / next(f"onnx/{SCHEDULE}{s}" for s in _SUFFIXES if (root / f"onnx/{SCHEDULE}{s}").is_file()))
    rows = [model({model.inputs[0]: np.full(1, t, np.float32)}) for t in schedule.timesteps]
    for name in model.outputs:
        expected = np.concatenate([row[name] for row in rows]).astype(np.float64)
        found = tables[name]
        if not np.isfinite(expected).all():
            step = int(np.argmin(np.isfinite(expected).all(axis=1))) + 1
            raise UserError(
                "CX126",
                f"the checkpoint's own weights give a {name} at step {step} that is not finite",
                "weights of the time embedder are damaged: download the checkpoint again",
            )
        limit = TABLE_LIMIT if found.dtype == np.float32 else TABLE_LIMIT + _ROUNDING
        distance = [np.linalg.norm(a - b) for a, b in zip(found.astype(np.float64), expected, strict=True)]
        worst = int(np.argmax(distance / np.linalg.norm(expected, axis=1)))
        error = distance[worst] / np.linalg.norm(expected[worst])
        if not error <= limit:
            yield f"its {name} of step {worst + 1} is {error:.1e} from that of the model, allowed {limit:.0e}"


_SUFFIXES = (".cpu.onnx", ".onnx")


def _sampler_error(table: np.ndarray, schedule: Schedule, scheduler: Mapping[str, Any]) -> float:
    """How far a sample moves from where diffusers' scheduler moves it, along seeded velocities."""
    generator = np.random.default_rng(0)
    start, *velocities = (generator.standard_normal((1, 16), dtype=np.float32) for _ in range(schedule.steps + 1))
    driver, draws = stock_scheduler(scheduler, schedule), torch.Generator().manual_seed(0)
    noise = torch.Generator().manual_seed(0)
    state, expected = SolverState.start(start), torch.from_numpy(start.copy())
    stochastic = schedule.sampler == "distilled-sde"
    for step, velocity in enumerate(velocities):
        extra = {"generator": draws} if stochastic else {}
        expected = driver.step(
            torch.from_numpy(velocity), driver.timesteps[step], expected, return_dict=False, **extra
        )[0]
        if stochastic:
            drawn = torch.randn(1, 16, generator=noise).numpy()
            state = SolverState.start(distilled_step(table[step], state.sample, velocity, drawn, None))
        else:
            state = unipc_step(table[step], state, velocity, None)
    return float(np.linalg.norm(state.sample - expected.numpy()) / np.linalg.norm(expected.numpy()))


def schedule_problems(manifest: Manifest, built: Schedule, mode: str, stated: CheckpointSampling) -> Iterator[str]:
    """Where a request to the bundle would be sampled otherwise than the checkpoint and the build say."""
    found = checkpoint_sampling(manifest.request)
    for name in ("native", "family", "policy", "distilled_sigmas"):
        if getattr(found, name) != getattr(stated, name):
            yield f"its {name} of the sampling is {getattr(found, name)}, the checkpoint says {getattr(stated, name)}"
    for key, value in found.scheduler.items():
        if stated.scheduler.get(key) != value:
            yield f"its scheduler has {key} = {value}, the checkpoint says {stated.scheduler.get(key)}"
    if request_schedule(Overrides(), manifest, manifest.request, mode) != built:
        yield f"a request of mode {mode} has another schedule than the one that was built for"
