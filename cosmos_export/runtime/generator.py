"""The generation driver: a request through the graphs of a bundle. It knows the manifest, numpy and a backend.

What runs when follows from the manifest: a graph that reads token ids, or what follows from them, runs once per prompt,
one that reads a timestep once per step, and every other one before the loop once per request.
"""

from __future__ import annotations

import hashlib
import time
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np

from cosmos_export.bundle import EdgeRecord, LoopRecord, RequestRecord, SegmentRecord, StreamRecord
from cosmos_export.diagnostics import FindingError, UnsupportedError
from cosmos_export.progress import Progress, Silent
from cosmos_export.runtime.generate_options import DECODER, ENCODER, SOUND_DECODER, request_record
from cosmos_export.runtime.loading import LoadedBundle
from cosmos_export.runtime.request import Request
from cosmos_export.runtime.schedule_table import read_schedule_table
from cosmos_export.runtime.step_inputs import Noise, initial_latents, noisy, request_inputs, sizes
from cosmos_export.sampling import SolverState, coefficient_table, distilled_step, guide, unipc_step
from cosmos_export.targets.backends import reference_backend
from cosmos_export.targets.sessions import PROMPT, STEP, Array, Session, Value

NEGATIVE = "negative"
"""The run of a prompt's graph on the negative prompt."""
_LATENT, _SAMPLE, _FINAL, _NOISE = "_latent", "_sample", "_final", "_noise"
RESULTS_KEPT = 4
"""Results of each graph before the loop that stay on the device: of the reasoner the keys and values of so many
prompts, 147 kB a token for Nano, 262 kB for Super."""


@dataclass
class Result:
    """Sampled latents; video, sound and actions are made when they are called for."""

    latents: dict[str, Array]
    """float32, by modality: ``vision`` [1, C, T, h, w], ``sound`` [C, T_s], ``action`` [T_a, D]."""
    _generator: Generator
    _request: Request
    _timings: dict[str, float] = field(default_factory=dict)

    @property
    def timings(self) -> Mapping[str, float]:
        """Seconds of each stage so far."""
        return self._timings

    def video(self) -> Iterator[Array]:
        """The frames in order, one chunk per latent frame: float32 [1, 3, n, H, W] in [−1, 1], apart from overshoot."""
        latent = self.latents["vision"]
        chunks = (latent[:, :, i : i + 1] for i in range(latent.shape[2]))
        return self._generator.stream(DECODER, chunks)

    def sound(self) -> Array:
        """float32 [channels, samples]."""
        return self._generator.decode_sound(self.latents["sound"])

    def actions(self) -> Array:
        """float32 [rows, width] in the model's units, without the rows that were given."""
        part = self._request.action
        assert part is not None
        return self.latents["action"][part.given_rows :, : part.raw_dim]


class Generator:
    """Runs requests on one bundle.

    Sessions are opened when they are first needed. ``resident``: they stay open for the next request, and the last
    `RESULTS_KEPT` results of each graph before the loop on the device, so that a prompt or a size that comes again is
    not computed again; otherwise a session is closed as soon as the request has done with it, and the largest graph
    alone decides how much memory a request takes.
    """

    def __init__(self, bundle: LoadedBundle, *, resident: bool = True) -> None:
        self.bundle = bundle
        self._record: RequestRecord = request_record(bundle.manifest)
        assert bundle.manifest.loop is not None
        self._loop: LoopRecord = bundle.manifest.loop
        self._resident = resident
        self._sessions: dict[str, Session] = {}
        self._results: dict[str, OrderedDict[bytes, Mapping[str, Value]]] = {}

    # -- a request ----------------------------------------------------------------------------------------------------

    def generate(self, request: Request, progress: Progress | None = None) -> Result:
        """Sample ``request``. FindingError CX665: the results are not finite from some step on."""
        progress, timings = progress or Silent(), dict[str, float]()
        shapes = sizes(request, self._record)
        inputs = request_inputs(request, self._record, shapes)
        encoded = None
        if request.pixels is not None:
            with _timed(timings, "encode"):
                encoded = self._encoded(request, request.pixels)
        noise = Noise(request, shapes)
        samples = initial_latents(request, noise, inputs, encoded)
        before = self._before_loop(request, inputs, timings)
        steps = noise.steps(request.schedule.steps) if request.schedule.sampler == "distilled-sde" else {}
        with _timed(timings, "denoise"):
            run = self._run_segments if self._loop.segments else self._run_steps
            samples = run(request, inputs, samples, steps, before, progress)
        kept = {"vision", *(["sound"] if request.sound else []), *(["action"] if request.action else [])}
        latents = {name: value for name, value in samples.items() if name in kept}
        return Result(latents, self, request, timings)

    def _before_loop(
        self, request: Request, inputs: Mapping[str, Array], timings: dict[str, float]
    ) -> dict[tuple[str, str], Mapping[str, Value]]:
        """Outputs of every graph before the loop but those of the step, by graph and instance."""
        manifest = self.bundle.manifest
        targets = [segment.graph for segment in self._loop.segments] or [self._loop.body]
        found: dict[tuple[str, str], Mapping[str, Value]] = {}
        prompts = {"": request.input_ids}
        if request.negative_ids is not None:
            prompts[NEGATIVE] = request.negative_ids
        of_prompt: set[str] = set()
        for name in self._order(targets):
            given = {tensor.name for tensor in manifest.graphs[name].inputs}
            if STEP in given:
                continue
            if PROMPT in given or any(edge.source in of_prompt for edge in self._edges(name)):
                of_prompt.add(name)
            with _timed(timings, name):
                for branch, ids in prompts.items() if name in of_prompt else [("", request.input_ids)]:
                    fed = self._fed(name, found, branch)
                    found[name, branch] = self._remembered(name, {**inputs, PROMPT: ids}, fed)
            self._done_with(name)
        return found

    def _order(self, targets: list[str]) -> list[str]:
        """Graphs that lead to ``targets``, each after those that feed it; codecs and the loop itself are none."""
        order: list[str] = []

        def visit(name: str) -> None:
            for edge in self._edges(name):
                if edge.source not in targets:
                    visit(edge.source)
            if name not in order and name not in targets:
                order.append(name)

        for target in targets:
            visit(target)
        return order

    def _edges(self, target: str) -> list[EdgeRecord]:
        return [edge for edge in self.bundle.manifest.edges if edge.target == target]

    def _fed(
        self, target: str, found: Mapping[tuple[str, str], Mapping[str, Value]], branch: str = ""
    ) -> dict[str, Value]:
        """Values that edges bring to ``target`` from graphs that have run; those of the prompt from ``branch``."""
        fed = {}
        for edge in self._edges(target):
            run = (edge.source, edge.instance or branch)
            made = found.get(run) or found.get((edge.source, ""))
            if made is not None:
                fed[edge.input] = made[edge.output]
        return fed

    def _remembered(self, name: str, inputs: Mapping[str, Array], fed: Mapping[str, Value]) -> Mapping[str, Value]:
        """Outputs of graph ``name`` for ``inputs``: computed or kept. They alone decide it, unless it is fed."""
        if not self._resident or fed:
            return self._run(name, inputs, fed)
        digest = hashlib.sha256()
        for tensor in self.bundle.manifest.graphs[name].inputs:
            value = inputs[tensor.name]
            digest.update(f"{tensor.name} {value.dtype} {value.shape} ".encode() + value.tobytes())
        kept = self._results.setdefault(name, OrderedDict())
        found = kept.pop(digest.digest(), None) or self._run(name, inputs, {})
        kept[digest.digest()] = found  # the last of them is the one used last
        while len(kept) > RESULTS_KEPT:
            kept.popitem(last=False)
        return found

    # -- the loop -----------------------------------------------------------------------------------------------------

    def _run_segments(
        self,
        request: Request,
        inputs: Mapping[str, Array],
        samples: dict[str, Array],
        noise: Mapping[str, Array],
        before: Mapping[tuple[str, str], Mapping[str, Value]],
        progress: Progress,
    ) -> dict[str, Array]:
        """Every step on the device, a call a segment; the sampler's state goes from one to the next there."""
        # What no output follows from is no state of the loop: it is read as it is given.
        fixed = {f"{name}{_LATENT}": value for name, value in samples.items()}
        state: dict[str, Array | Value] = {f"{name}{_SAMPLE}": value for name, value in samples.items()}
        first, total = 0, request.schedule.steps
        progress.begin("denoise", total)
        for segment in self._loop.segments:
            span = slice(first, first + segment.steps)
            rows = {row: noise[row.removesuffix(_NOISE)][span] for row in segment.rows}
            final = self._run(segment.graph, {**inputs, **fixed, **rows}, {**self._fed(segment.graph, before), **state})
            state |= {name.removesuffix(_FINAL): value for name, value in final.items()}
            self._require_finite(state, segment, first, request)
            self._done_with(segment.graph)
            first += segment.steps
            progress.update("denoise", first)
        progress.end("denoise")
        return {name: _host(state[f"{name}{_SAMPLE}"]) for name in samples}

    def _require_finite(
        self, state: Mapping[str, Array | Value], segment: SegmentRecord, first: int, request: Request
    ) -> None:
        for name, value in state.items():
            if name.endswith(_SAMPLE) and not np.isfinite(_host(value)).all():
                last = first + segment.steps
                raise _not_finite(
                    f"{name.removesuffix(_SAMPLE)} latents", segment.graph,
                    f"after steps {first + 1} to {last} of {request.schedule.steps}",
                    "a bundle built with `--loop host` names the step",
                )  # fmt: skip

    def _run_steps(
        self,
        request: Request,
        inputs: Mapping[str, Array],
        samples: dict[str, Array],
        noise: Mapping[str, Array],
        before: Mapping[tuple[str, str], Mapping[str, Value]],
        progress: Progress,
    ) -> dict[str, Array]:
        """The loop on the host: one call of the body per step and branch, with guidance and sampler in float32."""
        plan, body = request.schedule, self._loop.body
        bodies = self._loop.bodies or (body,) * plan.steps
        rows = self._step_rows(request)
        table = coefficient_table(plan)
        states = {name: SolverState.start(value) for name, value in samples.items()}
        branches = [self._fed(body, before, branch) for branch in ("", NEGATIVE)]
        progress.begin("denoise", plan.steps)
        for step in range(plan.steps):
            now = {**inputs, **{f"{name}{_LATENT}": state.sample for name, state in states.items()}}
            now |= {name: values[step] for name, values in rows.items()}
            runs = bodies[step]
            found = [self._run(runs, now, fed) for fed in branches[: 2 if plan.guided[step] else 1]]
            for latent, output in self._loop.carried.items():
                name = latent.removesuffix(_LATENT)
                velocities = [branch[output].numpy().astype(np.float32) for branch in found]
                if not all(np.isfinite(velocity).all() for velocity in velocities):
                    at = f"in step {step + 1} of {plan.steps} (timestep {plan.timesteps[step]:g})"
                    raise _not_finite(f"{name} velocity", body, at, "report it with the prompt and the seed")
                velocity = guide(velocities[0], velocities[1] if len(velocities) > 1 else None, plan.guidance)
                mask = noisy(name, inputs)
                if plan.sampler == "unipc":
                    states[name] = unipc_step(table[step], states[name], velocity, mask)
                else:
                    moved = distilled_step(table[step], states[name].sample, velocity, noise[name][step], mask)
                    states[name] = SolverState.start(moved)
            if runs not in bodies[step + 1 : step + 2]:
                self._done_with(runs)
            progress.update("denoise", step + 1)
        progress.end("denoise")
        return {name: state.sample for name, state in states.items()}

    def _step_rows(self, request: Request) -> dict[str, Array]:
        """The rows that every body takes per step, [steps, …]: the bundle's table, or computed for other timesteps.

        A table of a narrower type than the body's would round once more than the loop on the device does.
        """
        rows: dict[str, Array] = {}
        manifest, timesteps = self.bundle.manifest, np.array(request.schedule.timesteps, np.float32)
        tables = read_schedule_table(self.bundle.files)
        built = np.array_equal(tables["timesteps"], timesteps)
        first = (*self._loop.bodies, self._loop.body)[0]
        for edge in self._edges(self._loop.body):
            if STEP not in {tensor.name for tensor in manifest.graphs[edge.source].inputs}:
                continue
            table = tables[edge.output]
            if built and table.dtype == self._session(first).inputs[edge.input]:
                rows[edge.input] = table[:, None]
                continue
            graph = reference_backend().open(self.bundle.files, "cpu").open(edge.source)
            rows[edge.input] = np.stack([graph.run({STEP: t[None]})[edge.output].numpy() for t in timesteps])
            graph.close()
        return rows

    # -- codecs -------------------------------------------------------------------------------------------------------

    def _encoded(self, request: Request, pixels: Array) -> Array:
        """[1, C, frames, height, width] latents of the frames that are given."""
        temporal = self._record.video.temporal
        first, rest = pixels[:, :, :1], pixels[:, :, 1:]
        chunks = [first, *(rest[:, :, i : i + temporal] for i in range(0, rest.shape[2], temporal))]
        latents = np.concatenate(list(self.stream(ENCODER, iter(chunks))), axis=2)
        # The canvas of an action is padded at the right and bottom.
        return latents[:, :, : len(request.clean_frames), : request.height, : request.width]

    def stream(self, codec: str, chunks: Iterator[Array]) -> Iterator[Array]:
        """Outputs of the stream ``codec`` for each chunk, in order; its state stays on the device."""
        record = self.bundle.manifest.streams.get(codec)
        if record is None:
            raise UnsupportedError("CX605", f"this bundle has no {codec}", "build it with its components")
        yield from self._streamed(record, chunks)
        self._done_with(record.next)

    def _streamed(self, record: StreamRecord, chunks: Iterator[Array]) -> Iterator[Array]:
        carried: dict[str, Value] = {}
        for number, chunk in enumerate(chunks):
            name = record.next if number else record.first
            (free,) = (t.name for t in self.bundle.manifest.graphs[name].inputs if t.name not in record.carried)
            results = self._run(name, {free: chunk}, carried)
            carried = {input: results[output] for input, output in record.carried.items()}
            (made,) = (output for output in results if output not in record.carried.values())
            yield results[made].numpy().astype(np.float32)
            if not number:
                self._done_with(name)

    def decode_sound(self, latent: Array) -> Array:
        """float32 [channels, samples] of the sound ``latent`` [C, T_s]."""
        contract = self.bundle.manifest.graphs[SOUND_DECODER]
        result = self._run(SOUND_DECODER, {contract.inputs[0].name: latent}, {})
        self._done_with(SOUND_DECODER)
        return result[contract.outputs[0].name].numpy().astype(np.float32)

    # -- sessions -----------------------------------------------------------------------------------------------------

    def _run(self, name: str, inputs: Mapping[str, Array], fed: Mapping[str, Array | Value]) -> dict[str, Value]:
        return self._session(name).run({**inputs, **fed})

    def _session(self, name: str) -> Session:
        if name not in self._sessions:
            self._sessions[name] = self.bundle.executor.open(name)
        return self._sessions[name]

    def _done_with(self, name: str) -> None:
        if not self._resident and name in self._sessions:
            self._sessions.pop(name).close()

    def close(self) -> None:
        """Give memory and device back."""
        for session in self._sessions.values():
            session.close()
        self._sessions.clear()
        self._results.clear()
        self.bundle.executor.close()


def _host(value: Array | Value) -> Array:
    return value if isinstance(value, np.ndarray) else value.numpy()


def _not_finite(what: str, graph: str, where: str, hint: str) -> FindingError:
    return FindingError("CX665", f"NaN or infinite values in the {what} of graph `{graph}` {where}", hint)


@contextmanager
def _timed(timings: dict[str, float], stage: str) -> Iterator[None]:
    started = time.perf_counter()
    yield
    timings[stage] = timings.get(stage, 0.0) + time.perf_counter() - started
