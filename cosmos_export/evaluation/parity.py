"""Stage by stage: how far a program, and what it was lowered to, is from the published implementation."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import inf, isfinite
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cosmos_export.capture.sources import weight_sources
from cosmos_export.checkpoint import Checkpoint
from cosmos_export.diagnostics import CosmosExportError, FindingError
from cosmos_export.evaluation.cases import CASES, Case
from cosmos_export.evaluation.followed import Counts, Followed, Roundings
from cosmos_export.evaluation.models import OnnxModel, Value, read_model
from cosmos_export.evaluation.reference import Reference, cosine, relative_error
from cosmos_export.evaluation.requested import StepModels, request_of, requested, short
from cosmos_export.evaluation.sampled import (
    negative_ids,
    noisy_modalities,
    run_loop_model,
    sampled,
    sampled_by,
    step_noise,
)
from cosmos_export.ir.graph import spec_of
from cosmos_export.ir.interpreter import Weights, program_dims, run_graph, run_program
from cosmos_export.ir.program import Program
from cosmos_export.ir.spec import Transform, WeightBinding
from cosmos_export.runtime import Generator, LoadedBundle
from cosmos_export.sampling import Schedule

PROGRAM_LIMIT = 1e-5
"""fp32, relative L2: a pass only reorders sums."""
RUNTIME_LIMIT = 1e-4
"""fp32, relative L2: ONNX Runtime has its own kernels."""
_LOOPED = 2
"""Cases that are run where a request has all steps of its schedule."""
REPORT = "this is a bug of the compiler: please report it with `build --until PASS --dump DIR`"
LATENT_LIMIT = 0.02
"""1 − cosine of final latents of a quantized loop to those of the unquantized model."""
PRECISION_LIMIT = 1.5
"""Limit in the model's precision: a multiple of the published implementation's own distance from fp32."""


@dataclass(frozen=True)
class Measured:
    """A value over all cases: the worst with its case, or a mean."""

    stage: str
    metric: str
    value: float
    limit: float
    over: str
    """The cases over which the value is taken."""
    case: str
    subject: str = "transformer"
    """The component that was measured."""
    details: Mapping[str, float] = field(default_factory=dict)
    """Further numbers of the measurement, by what they are."""

    @property
    def passed(self) -> bool:
        return self.value <= self.limit

    @property
    def numbers(self) -> dict[str, float]:
        """All finite numbers of the measurement, each by what it is."""
        found = {self.stage: self.value, **{f"{self.stage}: {name}": value for name, value in self.details.items()}}
        return {name: value for name, value in found.items() if isfinite(value)}


class Parity:
    """Compares stages of one build with the stock model of the same checkpoint, loaded once in fp32.

    ``whole`` is false where ``checkpoint`` is the first layers of one: only what is listed in it is read then.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        modalities: Sequence[str],
        outputs: Sequence[str],
        weights: Weights,
        cases: Sequence[Case] = CASES,
        *,
        whole: bool = True,
    ) -> None:
        self._whole = whole
        self._config = checkpoint.geometry.config
        self._modalities = modalities
        self._weights = weights
        self._folder = checkpoint.components["transformer"]
        # Nothing generates a row of a modality without rows: there is nothing to compare then.
        self._cases = [c for c in cases if (not c.actions or "action" in modalities) and set(c.outputs) & set(outputs)]
        self._checkpoint = checkpoint
        self._looped: dict[str, dict[str, torch.Tensor]] = {}
        self._stock = self._reference(torch.float32)
        self._expected = {c.name: self._wanted(self._stock.step(self._inputs(c), c.fps), outputs) for c in self._cases}

    def _reference(self, dtype: torch.dtype) -> Reference:
        """The stock model; that of a quantized checkpoint with what its bytes and scales stand for."""
        if self._whole and self._checkpoint.quantization is None and not self._checkpoint.scratch:
            return Reference(self._folder, dtype)
        sources = weight_sources(self._checkpoint.tensors)
        model_dtype = sources["proj_in.weight"].dtype
        values = {}
        for name in self._checkpoint.expected:
            stored = sources[name].dtype if sources[name].scale is None else model_dtype
            values[name] = self._weights(WeightBinding((sources[name],), Transform.IDENTITY, stored))
        return Reference(self._folder, dtype, values)

    def _inputs(self, case: Case) -> dict[str, torch.Tensor]:
        return case.inputs(self._config, self._modalities)

    @staticmethod
    def _wanted(results: dict[str, torch.Tensor], outputs: Sequence[str]) -> dict[str, torch.Tensor]:
        return {name: value for name, value in results.items() if name in outputs}

    def _compare(self, case: Case, found: Mapping[str, torch.Tensor]) -> float:
        return relative_error(found, self._expected[case.name])

    def program(self, program: Program, stage: str) -> Measured:
        """The program in fp32 arithmetic, by the interpreter."""
        errors = {
            c.name: self._compare(c, run_program(program, self._inputs(c), self._weights, compute=torch.float32))
            for c in self._cases
        }
        return _worst(stage, "relative L2, fp32", errors, PROGRAM_LIMIT)

    def precision(self, program: Program, dtype: torch.dtype) -> Measured:
        """The program in the model's own precision, against the stock model in that precision, both seen from fp32."""
        stock = self._reference(dtype)
        specs = {n: spec_of(v).dtype for g in program.graphs.values() for n, v in g.inputs.items()}
        theirs, ours = [], []
        for case in self._cases:
            inputs = self._inputs(case)
            theirs.append(self._compare(case, stock.step(inputs, case.fps)))
            own = {n: t.to(specs[n]) for n, t in inputs.items() if n in specs}
            ours.append(self._compare(case, run_program(program, own, self._weights)))
        # Rounding is noise, and the ratio of two samples of it says little: root mean square over the cases.
        lost, stock_lost = float(np.linalg.norm(ours)), float(np.linalg.norm(theirs))
        ratio = lost / stock_lost if stock_lost > 0 else 0.0 if lost == 0 else inf
        name = str(dtype).removeprefix("torch.")
        metric = f"distance from fp32 / that of stock {name}"
        return Measured(name, metric, ratio, PRECISION_LIMIT, f"rms of {len(ours)} cases", "all")

    def onnx(
        self, program: Program, folder: Path, suffix: str, *, chains: Mapping[str, Sequence[str]] | None = None
    ) -> Measured:
        """The lowered graphs in ONNX Runtime on the CPU, one feeding the next.

        ``chains``: the models of graphs that were cut, in their order.
        """
        found: dict[str, dict[str, Value]] = {}
        files = _files(program, folder, suffix, chains)
        for name, results in self._lowered(program, files):
            if name == program.loop.body:
                found = results
        errors = {c.name: self._compare(c, _tensors(found[c.name])) for c in self._cases}
        return _worst("ONNX Runtime", "relative L2, fp32", errors, RUNTIME_LIMIT)

    def quantized(
        self,
        program: Program,
        folder: Path,
        suffix: str,
        *,
        body: str | None = None,
        chains: Mapping[str, Sequence[str]] | None = None,
    ) -> Measured:
        """Gate G0: the lowered graphs of the quantized ``program`` in ONNX Runtime against the interpreter, which takes
        over every code that ONNX Runtime rounds an activation to (`evaluation.followed`).

        ``body`` is the model of the loop's body where it has another name. The value is the largest distance of what
        enters a rounding and of the results; infinite where an activation has a code that is not its own.
        """
        counts = {c.name: Counts() for c in self._cases}
        dims = {c.name: program_dims(program, self._inputs(c)) for c in self._cases}
        values: dict[str, dict[str, dict[str, torch.Tensor]]] = {c.name: {} for c in self._cases}
        made: dict[str, dict[str, Value]] = {}
        stage = f"ONNX Runtime, {body or program.loop.body} as quantized"
        metric = "relative L2 on the same codes, fp32"
        places = {name: Roundings(graph) for name, graph in program.graphs.items()}
        files = _files(program, folder, suffix, chains, body)
        shown = {path: places[name].find(read_model(path)) for name, paths in files.items() for path in paths}
        missing = sum(len(found.missing) for found in places.values())
        if missing:
            details = {"roundings that the models do not have": float(missing)}
            return Measured(stage, metric, inf, RUNTIME_LIMIT, "all cases", "all", details=details)
        for name, results in self._lowered(program, files, shown):
            for case in self._cases:
                inputs, own, key = self._inputs(case), values[case.name], case.name
                given = {i: inputs[i] for i in program.free_inputs(name)}
                given |= {e.input: own[e.source][e.output] for e in program.edges_into(name)}
                own[name] = run_graph(
                    program.graphs[name], given, self._weights, dims[key], compute=torch.float32,
                    follow=Followed(places[name], results[key], counts[key]),
                )  # fmt: skip
            if name == program.loop.body:
                made = results
        errors = {
            c.name: max(counts[c.name].error, relative_error(*_both(made[c.name], values[c.name][program.loop.body])))
            for c in self._cases
        }
        measured = _worst(stage, metric, errors, RUNTIME_LIMIT)
        return replace(measured, details=self._moved(program, made, counts))

    def _moved(
        self, program: Program, made: Mapping[str, Mapping[str, Value]], counts: Mapping[str, Counts]
    ) -> dict[str, float]:
        """How many activations have other codes in ONNX Runtime than in the interpreter, and how far they alone move
        the results of the case that has the most of them."""
        rounded = sum(c.values for c in counts.values())
        if not rounded:
            return {}
        found = {
            "activations rounded": float(rounded),
            "codes of ONNX Runtime alone": float(sum(c.moved for c in counts.values())),
            "codes apart at most": float(max(c.steps for c in counts.values())),
            "wrong codes": float(sum(c.wrong for c in counts.values())),
        }
        case = max(self._cases, key=lambda c: counts[c.name].moved)
        if counts[case.name].moved:
            alone = run_program(program, self._inputs(case), self._weights, compute=torch.float32)
            found["results apart by these codes"] = relative_error(*_both(made[case.name], alone))
        return found

    def _lowered(
        self, program: Program, files: Mapping[str, Sequence[Path]], shown: Mapping[Path, Collection[str]] | None = None
    ) -> Iterator[tuple[str, dict[str, dict[str, Value]]]]:
        """Every graph in turn, and by case the results of its models ``files``, with the values that are ``shown``."""
        edges: dict[str, dict[str, dict[str, Value]]] = {c.name: {} for c in self._cases}
        for name, graph in program.graphs.items():
            known: dict[str, dict[str, Value]] = {}
            for case in self._cases:
                inputs, results = self._inputs(case), edges[case.name]
                known[case.name] = {i: inputs[i].numpy() for i in program.free_inputs(name)}
                known[case.name] |= {e.input: results[e.source][e.output] for e in program.edges_into(name)}
            for path in files[name]:
                # One session at a time: the towers of a large model do not fit side by side.
                model = OnnxModel(path, (shown or {}).get(path, ()))
                for given in known.values():
                    given.update(model(given))
                del model
            for case in self._cases:
                edges[case.name][name] = {output: known[case.name][output] for output in graph.outputs}
            yield name, known

    def loop(
        self,
        closed: Mapping[str, Program],
        schedule: Schedule,
        scheduler: Mapping[str, Any],
        folder: Path,
        suffix: str,
        *,
        quantized: bool = False,
    ) -> Measured | None:
        """Every step in ONNX Runtime, against the stock model under diffusers' scheduler, from the same noise.

        ``closed`` has the loop's segments in order, by the name of their models in ``folder``. ``quantized``: by the
        cosine of the final latents, as they run freely. A loop without an output for a modality holds its latent, and
        the stock model does not: cases with noise in such a one are left out, and None is returned where all are.
        """
        moved = {name.removesuffix("_sample") for segment in closed.values() for name in segment.loop.returned}
        cases = [case for case in self._cases if noisy_modalities(self._inputs(case)) <= moved]
        if not cases:
            return None
        errors = {}
        for case in cases:
            expected = sampled(
                self._stock, self._inputs(case), negative_ids(self._config), case.fps, schedule, scheduler
            )
            found = self._looped[case.name] = run_loop_model(closed, self._loop_inputs(case, schedule), folder, suffix)
            wanted = {k: v for k, v in expected.items() if k in found}
            errors[case.name] = 1 - cosine(found, wanted) if quantized else relative_error(found, wanted)
        if quantized:
            return _worst(f"loop of {schedule.steps} steps", "1 − cosine to unquantized", errors, LATENT_LIMIT)
        return _worst(f"loop of {schedule.steps} steps", "relative L2, fp32", errors, RUNTIME_LIMIT)

    def requests(
        self, bundle: LoadedBundle, schedule: Schedule, scheduler: Mapping[str, Any], models: StepModels | None
    ) -> Measured | None:
        """A short guided request of every mode through ``bundle``, with a prompt and a negative prompt.

        Against the stock model under diffusers' scheduler. A quantized bundle loses what its recipe does: it is held to
        its own ``models``, which were measured by themselves, run along the program's edges. A closed loop runs its own
        ``schedule``, and is held to what its models gave when they were measured. None: no case can be compared.
        """
        assert bundle.manifest.loop is not None
        loop = bundle.manifest.loop
        moved = {latent.removesuffix("_latent") for latent in loop.carried}
        cases = [case for case in self._cases if noisy_modalities(self._inputs(case)) <= moved]
        few, negative = short(schedule), negative_ids(self._config)
        record = bundle.manifest.request
        if loop.segments:  # where a request has another sound, the loop has run another case
            alike = [case for case in cases if record.sound is None or requested(case, record) == case]
            few, cases = schedule, [case for case in alike if case.name in self._looped][:_LOOPED]
        elif len(set(loop.bodies)) > 1:  # what a step computes in follows from its place in the whole schedule
            few, cases = schedule, cases[:1]
        generator = Generator(bundle)
        errors: dict[str, float] = {}
        for case in (requested(case, record) for case in cases):
            inputs = self._inputs(case)
            samples = {n.replace("_latent", "_sample"): v for n, v in inputs.items() if n.endswith("_latent")}
            noise = step_noise(samples, few)
            if loop.segments:
                expected = self._looped[case.name]
            elif models is not None:
                expected = sampled_by(models, loop.carried, inputs, negative, noise, few)
            else:
                expected = sampled(self._stock, inputs, negative, case.fps, few, scheduler)
            request = request_of(case, inputs, negative, noise, few, record.video.temporal)
            try:
                latents = generator.generate(request).latents
            except CosmosExportError as error:
                raise FindingError(
                    "CX621", f"a request of mode {request.mode} to the bundle fails: {error.message}", REPORT
                ) from error
            found = {f"{n}_sample_final": torch.from_numpy(v) for n, v in latents.items()}
            errors[request.mode] = relative_error(found, {n: v for n, v in expected.items() if v.numel()})
        generator.close()
        return _worst("request", "relative L2 of the latents, fp32", errors, RUNTIME_LIMIT) if errors else None

    def guided(self, program: Program, schedule: Schedule, scheduler: Mapping[str, Any]) -> Measured | None:
        """The unquantized program of a quantized bundle, guided, on one request; None as for `requests`."""
        moved = {latent.removesuffix("_latent") for latent in program.loop.carried}
        case = next((case for case in self._cases if noisy_modalities(self._inputs(case)) <= moved), None)
        if case is None:
            return None
        few, negative, inputs = short(schedule), negative_ids(self._config), self._inputs(case)
        expected = sampled(self._stock, inputs, negative, case.fps, few, scheduler)
        samples = {n.replace("_latent", "_sample"): v for n, v in inputs.items() if n.endswith("_latent")}
        noise = step_noise(samples, few)
        found = sampled_by(
            lambda _, now: run_program(program, now, self._weights, compute=torch.float32),
            program.loop.carried, inputs, negative, noise, few,
        )  # fmt: skip
        error = relative_error(found, {n: v for n, v in expected.items() if n in found})
        return _worst(
            "guided request, unquantized", "relative L2 of the latents, fp32", {case.name: error}, RUNTIME_LIMIT
        )

    def _loop_inputs(self, case: Case, schedule: Schedule) -> dict[str, torch.Tensor]:
        inputs = self._inputs(case)
        samples = {n.replace("_latent", "_sample"): v for n, v in inputs.items() if n.endswith("_latent")}
        columns = {"action_columns": torch.ones(self._config["action_dim"])} if "action_latent" in inputs else {}
        negative = {"negative_input_ids": negative_ids(self._config)}
        return inputs | samples | columns | negative | step_noise(samples, schedule)


def _worst(stage: str, metric: str, errors: dict[str, float], limit: float) -> Measured:
    case = max(errors, key=lambda name: errors[name])
    return Measured(stage, metric, errors[case], limit, f"worst of {len(errors)} cases", case)


def _files(
    program: Program,
    folder: Path,
    suffix: str,
    chains: Mapping[str, Sequence[str]] | None,
    body: str | None = None,
) -> dict[str, list[Path]]:
    """The models of each graph in ``folder``, in their order; ``body`` as `Parity.quantized` has it."""
    names = {name: body if body is not None and name == program.loop.body else name for name in program.graphs}
    return {
        name: [folder / f"{piece}{suffix}" for piece in (chains or {}).get(file, (file,))]
        for name, file in names.items()
    }


def _tensors(values: Mapping[str, Value]) -> dict[str, torch.Tensor]:
    """Values of the types that numpy has."""
    return {name: torch.from_numpy(value) for name, value in values.items() if isinstance(value, np.ndarray)}


def _both(
    found: Mapping[str, Value], expected: Mapping[str, torch.Tensor]
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """``found`` and the results ``expected`` of a graph that have rows."""
    return _tensors(found), {name: value for name, value in expected.items() if value.numel()}
