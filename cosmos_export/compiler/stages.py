"""The stages of a build in order. Each writes into the staged bundle; the first that finds something wrong ends it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import partial
from math import inf
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import save as save_arrays
from safetensors.torch import save

import cosmos_export
from cosmos_export.bundle import (
    BundleWriter,
    EngineCheck,
    InputFile,
    Manifest,
    PromptRecord,
    Verdict,
    WeightInput,
)
from cosmos_export.capture.model import capture
from cosmos_export.capture.sources import weight_sources
from cosmos_export.checkpoint import TensorEntry
from cosmos_export.checkpoint.codecs import CODECS, codec_tensors
from cosmos_export.compiler.allocator import return_freed_memory
from cosmos_export.compiler.artifacts import (
    INDUCTOR,
    Engine,
    cache_entries,
    capability_check,
    layout_of,
    model_bytes,
    weight_inputs,
    write_engine,
    write_graph,
    write_models,
    write_plugins,
)
from cosmos_export.compiler.builders import Builders
from cosmos_export.compiler.cache import Cache
from cosmos_export.compiler.components import Codec, codec_engines, codec_profiles, write_codec, write_tokenizer
from cosmos_export.compiler.coverage import coverage_note
from cosmos_export.compiler.cuts import chains, cut_graphs, cut_notes
from cosmos_export.compiler.finish import REQUESTS, REQUESTS_ROLE, SCRIPT, EngineRequest, requests_text, script_text
from cosmos_export.compiler.first_layers import FIRST_BYTES, first_layers, job_of_part
from cosmos_export.compiler.forms import Forms, Pieces, make_forms
from cosmos_export.compiler.input_files import InputHashes
from cosmos_export.compiler.job import ENGINE_BACKENDS, Job
from cosmos_export.compiler.keys import plugin_nodes
from cosmos_export.compiler.loop import LOOP_TABLES, loop_inputs, loop_tables
from cosmos_export.compiler.losses import Losses, measure_losses, require_losses, write_losses
from cosmos_export.compiler.metering import Meter
from cosmos_export.compiler.planned import builder_memory, gates_memory
from cosmos_export.compiler.precision import layer_weights, pass_options, planned_types, require_scales
from cosmos_export.compiler.record import manifest
from cosmos_export.compiler.request_record import checkpoint_notes
from cosmos_export.compiler.time_table import schedule_table, timesteps
from cosmos_export.diagnostics import FindingError
from cosmos_export.evaluation.cases import CASES, Case
from cosmos_export.evaluation.codecs import codec_parity
from cosmos_export.evaluation.forms import FormsComparison, compare_forms, load_form
from cosmos_export.evaluation.parity import REPORT, Measured, Parity
from cosmos_export.evaluation.requested import TABLE_LIMIT, StepModels, schedule_problems, table_problems
from cosmos_export.ir import ops
from cosmos_export.ir.dims import Size, product
from cosmos_export.ir.graph import Graph, spec_of
from cosmos_export.ir.interpreter import read_weights
from cosmos_export.ir.program import Program
from cosmos_export.ir.spec import TensorSpec, WeightSource
from cosmos_export.ir.text import print_program
from cosmos_export.machine.memory import available_bytes
from cosmos_export.passes.base import Effect
from cosmos_export.passes.batch_guidance import NEGATIVE_LEN
from cosmos_export.passes.cut_graph import CutGraph
from cosmos_export.passes.fold_schedule import SCHEDULE
from cosmos_export.passes.pipeline import CAPTURE, PassOptions, Report, passes_of, require_pass, run_passes
from cosmos_export.plan.sizes import compiler_bytes
from cosmos_export.plan.subject import sampling_of
from cosmos_export.progress import Progress, Silent
from cosmos_export.runtime import load_bundle
from cosmos_export.runtime.schedule_table import SCHEDULE_TABLE
from cosmos_export.sampling import coefficient_table
from cosmos_export.targets.onnx.plugins import Plugins
from cosmos_export.targets.onnx.sessions import NAME as ONNX_RUNTIME
from cosmos_export.targets.onnx.weights import read_source
from cosmos_export.targets.profiles import Profile, input_shapes
from cosmos_export.targets.trt.engine_inspector import (
    EngineExpectation,
    EngineSummary,
    check_engine,
    inspect_engine,
    narrow_share,
)

PARITY_MEMORY_SHARE = 0.4
"""Parity loads the stock model in fp32; above this share of the available memory it is left out and said to be."""


@dataclass
class BuildResult:
    """What a build did and measured. ``manifest`` is None where it stopped at a pass."""

    job: Job
    program: Program | None = None
    passes: list[Report] = field(default_factory=list)
    codecs: list[Codec] = field(default_factory=list)
    prompt: PromptRecord | None = None
    bodies: tuple[str, ...] = ()
    """The loop's body of every step, where a host's steps compute differently."""
    pieces: Pieces = field(default_factory=dict)
    """What every graph is lowered as: itself, or the graphs it was cut into."""
    quality: list[Measured] = field(default_factory=list)
    """How far results of quantized loops are from the unquantized model's."""
    losses: Losses | None = None
    """What quantization costs; None where nothing is quantized."""
    parity: list[Measured] = field(default_factory=list)
    parity_note: str = ""
    """Why the transformer was not compared with diffusers'; empty where it was."""
    codec_parity_notes: dict[str, str] = field(default_factory=dict)
    """The same of the codecs that were not, by name."""
    verdicts: list[Verdict] = field(default_factory=list)
    """Verdicts of checks that have no number."""
    notes: list[str] = field(default_factory=list)
    """What a reader of the result should know and would not expect."""
    engines: list[Engine] = field(default_factory=list)
    dumps: list[Path] = field(default_factory=list)
    manifest: Manifest | None = None
    meter: Meter = field(default_factory=Meter)

    @property
    def peak_memory_bytes(self) -> int:
        """Largest resident set of this process or of a builder process."""
        return self.meter.peak_resident_bytes

    @property
    def stage_seconds(self) -> dict[str, float]:
        return {name: cost.seconds for name, cost in self.meter.stages.items()}

    @property
    def seconds(self) -> float:
        return sum(self.stage_seconds.values())


def compile_only(job: Job, progress: Progress) -> BuildResult:
    """The graphs up to ``--until``, and their text; compared with diffusers' after each pass if that is asked for."""
    result = BuildResult(job)
    passes = pass_options(job)
    require_pass(job.options.until, _everything(passes, job))
    with result.meter:
        stages, parity = _Stages(result, progress), None
        if job.options.parity == "always":
            with stages("parity", "reference"):
                parity = Parity(job.checkpoint, job.modalities, job.outputs, read_weights(read_source))
        watch = _Watch(job, parity, result, stages)
        plain = _compile(job, weight_sources(job.checkpoint.tensors), passes, watch, stages)
        forms = _forms(plain, job, passes, watch)
        others = {name: variant.graphs[variant.loop.body] for name, variant in forms.variants.items()}
        if job.options.until == CutGraph.name:
            cut_graphs({**forms.program.graphs, **others}, job, watch)
        _require_parity(result.parity)
    return result


def build_bundle(
    job: Job, writer: BundleWriter, progress: Progress, found: Callable[[BuildResult, FindingError], None]
) -> BuildResult:
    """Every stage, into ``writer``; commits the bundle. ``found`` is told what was measured where a finding ends it."""
    result = BuildResult(job)
    memory = None if job.memory_budget is None else job.memory_budget - compiler_bytes(job.layers)
    with result.meter, InputHashes(job.checkpoint) as hashes, Builders(memory, progress) as builders:

        def nothing_failed() -> None:
            builders.require_none_failed()
            hashes.require_readable()

        try:
            _build(job, writer, result, _Stages(result, builders.progress, nothing_failed), hashes, builders)
        except FindingError as error:
            found(result, error)
            raise
    return result


def _build(
    job: Job, writer: BundleWriter, result: BuildResult, stages: _Stages, hashes: InputHashes | None, builders: Builders
) -> None:
    result.notes += [*checkpoint_notes(job.checkpoint), *_mismatches(job), *filter(None, [coverage_note(job)])]
    result.parity_note = _parity_refusal(job, job.checkpoint.tensors)
    if result.parity_note and job.options.parity == "auto":
        with stages("first layers"):  # before anything else takes memory
            _compare_first_layers(job, writer, result)
    with stages("tokenizer"):
        result.prompt = write_tokenizer(job, writer)
    codec_builds: list[dict[str, Future[Engine]]] = []
    for name in job.components:
        if name in CODECS:
            with stages("components", name):
                codec = write_codec(name, job, writer, stages.progress)
            result.codecs.append(codec)
            if job.target.backend == "tensorrt-rtx":
                memory = builder_memory(job)
                work = codec_engines(codec, job, writer)
                codec_builds.append({graph: builders.submit(one, memory(graph)) for graph, one in work.items()})
    sources, steps = weight_sources(job.checkpoint.tensors), timesteps(job.schedule)
    weights = read_weights(read_source)
    parity = None
    if not result.parity_note:
        with stages("parity", "reference"):
            some: dict[str, Any] = {} if job.part_of is None else {"cases": _cases_of_part(job), "whole": False}
            parity = Parity(job.checkpoint, job.modalities, job.outputs, weights, **some)
    passes, watch = pass_options(job), _Watch(job, parity, result, stages)
    program = _compile(job, sources, passes, watch, stages)
    if parity is not None and job.part_of is not None:
        with stages("parity", "of the passes"):
            result.parity.append(parity.program(program, "passes"))
    with stages("time table"):
        coefficients = torch.from_numpy(coefficient_table(job.schedule).astype(np.float32))
        table = {"timesteps": steps, "coefficients": coefficients, **schedule_table(program, steps, weights)}
        writer.path(SCHEDULE_TABLE, "table").write_bytes(save(table))
    with stages("quantization"):
        plain = program
        forms = _forms(plain, job, passes, watch)
        program, variants, closed = forms.program, forms.variants, forms.closed
        result.bodies = forms.bodies
        if job.quantized:
            require_scales((program, *variants.values(), *closed.values()), job)
    with stages("cuts"):
        others = {name: variant.graphs[variant.loop.body] for name, variant in variants.items()}
        result.pieces = cut_graphs({**program.graphs, **others}, job, watch)
        result.notes += cut_notes(result.pieces)
    _compare_codecs(result, writer, stages)
    if parity is None:
        _require_parity(result.parity)
    plugins = Plugins(job.options.kernels) if job.options.kernels else None
    if plugins is not None:
        bodies = [segment.graphs[segment.loop.body] for segment in closed.values()]
        plugins.require_places([*program.graphs.values(), *bodies])
    engines = _TowerEngines(program, variants, closed, result, writer, builders)
    with stages("weights and ONNX", shown=False):
        for name in program.graphs:
            suffix = _write_onnx(name, program, variants, result.pieces, job, writer, stages.progress, plugins)
            if parity is None:  # its memory is not planned: without it builders of one tower run beside the next one
                engines.submit(name)
        for name, segment in closed.items():
            _write_loop(name, segment, program, loop_tables(segment, job.schedule, weights), job, writer, plugins)
    if plugins is not None:
        with stages("kernels"):
            write_plugins(plugins, job, writer)
    with stages("models of engines"):
        result.verdicts += _compare_forms(program, variants, closed, engines.inputs_of, result, writer)
    if parity is not None:
        with stages("parity", "of what is lowered"):
            dtype = model_dtype(program)
            if dtype != torch.float32:
                result.parity.append(parity.precision(plain, dtype))
            folder = writer.path(f"onnx/{SCHEDULE}{suffix}", "onnx").parent
            cut = chains(result.pieces)
            compare = parity.quantized if job.quantized else parity.onnx
            result.parity.append(compare(program, folder, suffix, chains=cut))
            for name, variant in variants.items():
                result.parity.append(parity.quantized(variant, folder, suffix, body=name, chains=cut))
            if closed:
                scheduler = job.checkpoint.scheduler
                looped = parity.loop(closed, job.schedule, scheduler, folder, suffix, quantized=job.quantized)
                if looped is None:
                    result.notes.append(
                        "the loop was not compared: no case is noisy in the modalities of its outputs alone"
                    )
                else:
                    (result.quality if job.quantized else result.parity).append(looped)
        _require_parity(result.parity)
    engines.submit(*program.graphs, *closed)
    if job.quantized and job.part_of is None:  # what steps of a part lose says nothing of the whole
        with stages("gates"):
            result.losses = measure_losses(plain, job, passes, weights, unsampled=result.parity_note)
            write_losses(result.losses, job, writer)
        require_losses(result.losses, result.quality, job)
        return_freed_memory()
        builders.hold(0)
    if job.target.backend == "tensorrt-rtx":
        with stages("engines", shown=False):
            builders.wait()
            result.engines += [build.result() for build in engines.builds]
            result.engines += [build.result() for builds in codec_builds for build in builds.values()]
            result.notes += _left_out(result)
        _require_plans(result.engines)
    if job.target.backend == "tensorrt":
        requests = _engine_requests(program, variants, closed, engines.inputs_of, result)
        if plugins is not None:
            requests = _with_plugins(requests, writer)
        _write_requests(requests, writer, result)
    hashed: tuple[InputFile, ...] = ()
    if hashes is not None:
        with stages("hashing inputs", shown=False):
            hashed = hashes.result("hashing inputs", stages.progress)
    created = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    record = manifest(result, program, closed, hashed, created)

    def with_requests(root: Path, staged: Manifest) -> Manifest:
        with stages("requests"):
            _run_requests(root, staged, parity, plain, program, suffix, result)
        return manifest(result, program, closed, hashed, created)

    with stages("commit", shown=False):
        result.manifest = writer.commit(record, with_requests)
    Cache(job.options.cache).add(cache_entries(writer, result.manifest, created))


def _cases_of_part(job: Job) -> list[Case]:
    """What a part of a model is compared on; a loop on the device, which runs all its steps, on the first that fits."""
    found = [c for c in CASES if c.mode.representative and set(c.outputs) & set(job.outputs)]
    return [c for c in found if not c.actions or "action" in job.modalities][: 1 if job.options.loop == "device" else 2]


def _compare_first_layers(job: Job, writer: BundleWriter, result: BuildResult) -> None:
    """A bundle of the first layers of both towers, made and measured as that of a model that fits in memory; it is not
    kept. It proves the capture, the passes and the lowering of this geometry; of the whole model's weights no more than
    it reads."""
    memory = min(available_bytes(), job.memory_budget or inf)
    with writer.scratch() as folder:
        part = first_layers(job.checkpoint, folder, FIRST_BYTES, int(PARITY_MEMORY_SHARE * memory))
        if part is None:
            result.parity_note += "; its first layer alone does not fit either"
            return
        first = f"first {part.geometry.num_hidden_layers} of {job.layers} layers"
        ours = job_of_part(job, part, folder / "bundle")
        found = BuildResult(ours)
        inner = BundleWriter(folder / "bundle", require_inputs=job.require_inputs)
        try:
            with inner, Builders(None, Silent()) as builders:
                _build(ours, inner, found, _Stages(found, Silent()), None, builders)
        except FindingError as error:
            raise FindingError(error.code, f"{first} alone: {error.message}", error.hint) from error
        finally:
            result.parity += [replace(measured, stage=f"{measured.stage}, {first}") for measured in found.parity]
        result.parity_note += f"; its {first} were compared"
    return_freed_memory()


def _mismatches(job: Job) -> list[str]:
    """What of the request does not go together, and is allowed."""
    found = []
    for modality, dim, profile in (("sound", "sound_len", "480p-121f+sound"), ("action", "action_len", "policy-droid")):
        if modality in job.modalities and not any(p.dims[dim].max for p in job.profiles):
            found.append(
                f"no profile has {modality}, so no request can: add one that does, as `--profile {profile}`, or leave "
                f"{modality} out of `--modalities`"
            )
    mode, asked = job.options.mode, job.schedule.text(job.options.mode)
    made = job.scales.lineage.get("schedules", ()) if job.scales is not None else ()
    if any(text.startswith(f"{mode}:") for text in made) and asked not in made:
        found.append(
            f"the scale table was made on `{'`, `'.join(made)}`, and this build is for `{asked}`: ranges may be off"
        )
    return found


class _Stages:
    """Times stages and shows them. None begins once ``nothing_failed`` raises what happened beside them."""

    def __init__(
        self, result: BuildResult, progress: Progress, nothing_failed: Callable[[], None] = lambda: None
    ) -> None:
        self._result = result
        self._nothing_failed = nothing_failed
        self.progress = progress

    @contextmanager
    def __call__(self, name: str, detail: str = "", *, shown: bool = True) -> Iterator[None]:
        self._nothing_failed()
        with self._result.meter.stage(name), self._task(f"{name} {detail}".strip()) if shown else nullcontext():
            yield

    @contextmanager
    def _task(self, name: str) -> Iterator[None]:
        self.progress.begin(name)
        try:
            yield
        finally:
            self.progress.end(name)


# -- graphs -----------------------------------------------------------------------------------------------------------


def _compile(
    job: Job, sources: Mapping[str, WeightSource], passes: PassOptions, watch: _Watch, stages: _Stages
) -> Program:
    """The program that all forms are made from: captured, taken apart, and labelled where it is to be quantized."""
    with stages("capture"):
        program = capture(job.checkpoint.geometry.config, sources, modalities=job.modalities)
    watch.captured(program)
    run_passes(program, passes_of(passes, "form", "towers", "sites"), until=job.options.until, after_each=watch)
    return program


def _forms(plain: Program, job: Job, passes: PassOptions, watch: _Watch) -> Forms:
    segments = job.segments if job.options.loop == "device" else ()
    return make_forms(
        plain, passes, job.precision.step_keys(), segments, until=job.options.until, watch=watch
    )  # fmt: skip


def _everything(passes: PassOptions, job: Job) -> PassOptions:
    """Options under which every pass that some form of the program goes through has something to do."""
    segments = job.segments if job.options.loop == "device" else ()
    segment = next((one for one in segments if one.guided), segments[0] if segments else None)
    return replace(passes, segment=segment, cuts=None if job.memory_budget is None else lambda *_: ())


class _Watch:
    """Sees the program after every pass: reports it, writes its text, and compares it with the published model."""

    def __init__(self, job: Job, parity: Parity | None, result: BuildResult, stages: _Stages) -> None:
        self._parity, self._result, self._stages = parity, result, stages
        self._each = job.part_of is None
        self._folder = job.options.dump
        if self._folder is not None:
            self._folder.mkdir(parents=True, exist_ok=True)

    def captured(self, program: Program) -> None:
        self._result.program = program
        self._dump(program)
        self._compare(program, CAPTURE)

    def __call__(self, program: Program, report: Report) -> None:
        self._result.passes.append(report)
        self._result.meter.add("passes", report.seconds)
        self._dump(program, report.form)
        if report.effect is Effect.EXACT and not report.form and self._each:
            self._compare(program, report.name)

    def _compare(self, program: Program, stage: str) -> None:
        if self._parity is not None:
            with self._stages("parity", f"of {stage}"):
                self._result.parity.append(self._parity.program(program, stage))

    def _dump(self, program: Program, form: str = "") -> None:
        if self._folder is None:
            return
        name = f"{len(self._result.dumps):02d}-{program.history[-1]}{f'-{form}' if form else ''}.txt"
        path = self._folder / name
        path.write_text(print_program(program), encoding="utf-8")
        self._result.dumps.append(path)


# -- the bundle -------------------------------------------------------------------------------------------------------


def body_dtype(closed: Program) -> torch.dtype:
    """The type in which a closed loop's body computes: that of its attention."""
    attention = closed.graphs[closed.loop.body].calls(*ops.having(ops.Trait.JOINT))
    return spec_of(attention[0]).dtype


def model_dtype(program: Program) -> torch.dtype:
    """The type in which the loop's body computes: that of its first carried value."""
    body = program.graphs[program.loop.body]
    return spec_of(body.inputs[next(iter(program.loop.carried))]).dtype


def _compare_codecs(result: BuildResult, writer: BundleWriter, stages: _Stages) -> None:
    """The models of every codec against the published one, where it fits in memory."""
    job = result.job
    for codec in result.codecs:
        note = _parity_refusal(job, codec_tensors(job.checkpoint, codec.name))
        if note:
            result.codec_parity_notes[codec.name] = note
            continue
        with stages("parity", f"of {codec.name}"):
            component = job.checkpoint.components[CODECS[codec.name].folder]
            folder = writer.path(f"onnx/{codec.graphs[0]}{codec.suffix}", "onnx").parent
            result.parity.append(codec_parity(codec.name, codec.program, component, folder, codec.suffix))


def _compare_forms(
    program: Program,
    variants: Mapping[str, Program],
    closed: Mapping[str, Program],
    inputs_of: _WeightInputs,
    result: BuildResult,
    writer: BundleWriter,
) -> Iterator[Verdict]:
    """Every model that an engine is built from against its form that runs on a CPU; CX620 where they differ."""

    def lowered() -> Iterator[tuple[str, Graph, tuple[WeightInput, ...]]]:
        for name in program.graphs:
            for one in _sharing(name, program, variants):
                pieces = result.pieces[one]
                for graph in pieces:
                    yield graph.name if len(pieces) > 1 else one, graph, inputs_of(graph, name)
        for name, segment in closed.items():
            body = segment.graphs[segment.loop.body]
            yield name, body, inputs_of(body, program.loop.body)
        for codec in result.codecs:
            yield from ((name, graph, ()) for name, graph in codec.program.graphs.items())

    for name, graph, weights in lowered():
        engine, run = (writer.staged(f"onnx/{name}{suffix}") for suffix in (".onnx", ".cpu.onnx"))
        if engine is not None and run is not None:  # a graph with one model runs what its engine is built from
            yield _forms_verdict(name, compare_forms(graph, load_form(engine), load_form(run), weights))


def _forms_verdict(name: str, found: FormsComparison) -> Verdict:
    if found.differences:
        raise FindingError(
            "CX620",
            f"onnx/{name}.onnx, which engines are built from, is not the model that was run: "
            + "; ".join(found.differences[:_NAMED]),
            REPORT,
        )
    note = f"{found.same} operations alike, {found.evaluated} written otherwise and evaluated in both forms"
    if found.unknown:
        note += f"; no evaluator here has {', '.join(found.unknown)}"
    metric = "operations, constants and places of weights, up to type"
    return Verdict("model of the engine", name, metric, None, "not-measured" if found.unknown else "pass", note)


_NAMED = 3
"""Differences that a message names."""


def _run_requests(
    root: Path,
    staged: Manifest,
    parity: Parity | None,
    plain: Program,
    program: Program,
    suffix: str,
    result: BuildResult,
) -> None:
    """Requests through the bundle at ``root``, complete but for its place, as a user's would go; CX621, CX622.

    All that lies between a request and the models: edges, tables, the request record, what runs for which prompt.
    """
    job, scheduler = result.job, result.job.checkpoint.scheduler
    problems = [
        *schedule_problems(staged, job.schedule, job.options.mode, sampling_of(job.checkpoint)),
        *table_problems(root, job.schedule, scheduler),
    ]
    if problems:
        raise FindingError("CX621", f"the bundle is not sampled as the checkpoint says: {'; '.join(problems)}", REPORT)
    metric = "timesteps, coefficients and time embeddings"
    result.verdicts.append(Verdict("schedule", "tables", metric, TABLE_LIMIT, "pass", f"{job.schedule.steps} steps"))
    found, note = None, result.parity_note
    if parity is not None:
        models = None
        if job.quantized:
            models = StepModels(program, root / "onnx", suffix, result.bodies, chains(result.pieces))
            guided = parity.guided(plain, job.schedule, scheduler)
            result.parity += [] if guided is None else [guided]
        bundle = load_bundle(root, backend=ONNX_RUNTIME, device="cpu")
        found = parity.requests(bundle, job.schedule, scheduler, models)
        note = "no case is noisy in the modalities of the outputs alone"
    if found is None:
        result.verdicts.append(Verdict("request", "bundle", "relative L2", None, "not-measured", note))
        return
    result.parity.append(found)
    failed = [measured for measured in result.parity if not measured.passed]
    if failed:
        what = "; ".join(f"{m.stage} of mode {m.case}: {m.value:.1e}, allowed {m.limit:.0e}" for m in failed)
        raise FindingError(
            "CX622", f"the bundle does not compute what the published implementation computes: {what}", REPORT
        )


class _TowerEngines:
    """Every engine but the codecs': built in the order of their graphs, each as soon as it is submitted."""

    def __init__(
        self,
        program: Program,
        variants: Mapping[str, Program],
        closed: Mapping[str, Program],
        result: BuildResult,
        writer: BundleWriter,
        builders: Builders,
    ) -> None:
        self._program, self._variants, self._closed = program, variants, closed
        self._result, self._writer, self._builders = result, writer, builders
        self._submitted: set[str] = set()
        self.inputs_of = _WeightInputs(program, variants, result.job)
        self.builds: list[Future[Engine]] = []

    def submit(self, *names: str) -> None:
        """Build the engines of the graphs ``names``, whose models are there, unless that has been asked for before.

        What will be measured beside them is held back from their share of the memory from the first one on.
        """
        job = self._result.job
        new = [name for name in names if name not in self._submitted]
        if job.target.backend != "tensorrt-rtx" or not new:
            return
        return_freed_memory()
        self._submitted.update(new)
        memory = builder_memory(job)
        self._builders.hold(gates_memory(job))
        for name in new:
            self.builds += [self._builders.submit(work, memory(engine)) for engine, work in self._of(name)]

    def _of(self, name: str) -> Iterator[tuple[str, Callable[[Progress], Engine]]]:
        """What builds each engine of the graph, or of the closed loop, ``name``."""
        body, shared = self._program.loop.body, (self._program, self._result.job, self._writer)
        if name in self._closed:
            segment = self._closed[name]
            graph = segment.graphs[segment.loop.body]
            inputs, weights = loop_inputs(segment, LOOP_TABLES), self.inputs_of(graph, body)
            yield name, partial(_build_engine, name, graph, inputs, weights, True, *shared)
            return
        if name == SCHEDULE or (self._closed and name == body):
            return
        for one in _sharing(name, self._program, self._variants):
            pieces = self._result.pieces[one]
            for graph in pieces:
                piece = graph.name if len(pieces) > 1 else one
                inputs = {i: spec_of(node) for i, node in graph.inputs.items()}
                yield piece, partial(_build_engine, piece, graph, inputs, self.inputs_of(graph, name), False, *shared)


def _left_out(result: BuildResult) -> Iterator[str]:
    """Which codecs have no engine for which profiles."""
    found = {engine.graph: engine.profiles for engine in result.engines}
    for codec in result.codecs:
        left = [p.name for p in result.job.profiles if p.name not in found.get(codec.graphs[0], ())]
        if left:
            yield f"{codec.name} has no engine for {', '.join(left)}: no sound in that profile"


def _parity_refusal(job: Job, tensors: Mapping[str, TensorEntry]) -> str:
    """Why the model of ``tensors`` is not compared with diffusers'; empty where it is."""
    mode = job.options.parity
    if mode == "never":
        return "not asked for (--parity never)"
    needed = 4 * sum(int(product(e.shape)) for e in tensors.values())
    if mode == "auto" and needed > PARITY_MEMORY_SHARE * available_bytes():
        share = f"{PARITY_MEMORY_SHARE:.0%} of the memory there is"
        return f"the stock model in fp32 takes {needed / 2**30:.1f} GiB, more than {share} (--parity always)"
    return ""


def _require_parity(measured: Sequence[Measured]) -> None:
    failed = [m for m in measured if not m.passed]
    if failed:
        lines = "; ".join(f"{m.stage}: {m.value:.2e} > {m.limit:.0e} ({m.case})" for m in failed)
        raise FindingError(
            "CX601",
            f"the program does not compute what the published implementation computes: {lines}",
            REPORT,
        )


def _write_onnx(
    name: str,
    program: Program,
    variants: Mapping[str, Program],
    pieces: Pieces,
    job: Job,
    writer: BundleWriter,
    progress: Progress,
    plugins: Plugins | None,
) -> str:
    """Graph ``name``, or what it was cut into, with its weights; returns the suffix of the models that run on a CPU.

    Bodies of the loop that differ in precision, and the pieces of a graph, read one file of weights.
    """
    narrow, external = model_dtype(program) != torch.float32, job.options.weights == "external"
    sharing = _sharing(name, program, variants)
    graphs = {graph.name if len(pieces[one]) > 1 else one: graph for one in sharing for graph in pieces[one]}
    # As the whole graphs have them, whatever they were cut into: engines' inputs are parts of this file.
    places = layout_of(sharing.values())
    return write_models(
        graphs, name, narrow, job, writer, progress, external=external, plugins=plugins, places=places
    )  # fmt: skip


def _sharing(name: str, program: Program, variants: Mapping[str, Program]) -> dict[str, Graph]:
    """The graphs on the file of weights of graph ``name``: of the loop's body every form."""
    others = variants if name == program.loop.body else {}
    return {name: program.graphs[name], **{other: one.graphs[one.loop.body] for other, one in others.items()}}


class _WeightInputs:
    """Which weights an engine takes as inputs, and where they lie."""

    def __init__(self, program: Program, variants: Mapping[str, Program], job: Job) -> None:
        self._program, self._variants = program, variants
        self._external = job.options.weights == "external"

    def __call__(self, graph: Graph, stem: str) -> tuple[WeightInput, ...]:
        """Weight inputs of ``graph``, whose weights are those of the program's graph ``stem``."""
        if not self._external:
            return ()
        places = layout_of(_sharing(stem, self._program, self._variants).values())
        return weight_inputs(graph, f"onnx/{stem}.weights", places)


_TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


def _write_loop(
    name: str,
    closed: Program,
    program: Program,
    tables: Mapping[str, np.ndarray],
    job: Job,
    writer: BundleWriter,
    plugins: Plugins | None,
) -> None:
    """A closed loop as one model, on the weights that ``program`` has for its body; an engine's form writes attention
    out."""
    import onnx

    from cosmos_export.targets.onnx.loop import lower_loop

    body = closed.graphs[closed.loop.body]
    stored = layout_of([program.graphs[closed.loop.body]])
    file = f"{closed.loop.body}.weights"
    external = job.options.weights == "external"
    apart = external or body_dtype(closed) != torch.float32
    engines = job.target.backend in ENGINE_BACKENDS
    forms = {".cpu.onnx": torch.float32, ".onnx": None} if apart else {".onnx": None}
    for suffix, compute in forms.items():
        on_cpu = suffix == ".cpu.onnx" or not engines
        if apart and suffix == ".onnx" and not engines:
            continue
        model = lower_loop(
            body, closed.loop, tables, stored, file, compute=compute, explicit_attention=not on_cpu,
            external=external and not on_cpu, plugins=None if on_cpu else plugins,
        )  # fmt: skip
        path = writer.path(f"onnx/{name}{suffix}", "onnx")
        path.write_bytes(model_bytes(model))
        onnx.checker.check_model(str(path))
    if job.target.backend == INDUCTOR:
        write_graph(body, name, file, job, writer, places=stored, loop=closed.loop)
        contiguous = {key: np.ascontiguousarray(table) for key, table in tables.items()}
        writer.path(f"tables/{name}.safetensors", "table").write_bytes(save_arrays(contiguous))


def _build_engine(
    name: str,
    graph: Graph,
    inputs: Mapping[str, TensorSpec],
    weights: Sequence[WeightInput],
    in_loop: bool,
    program: Program,
    job: Job,
    writer: BundleWriter,
    progress: Progress,
) -> Engine:
    """The engine of ``graph``, or of a loop over it, from the model ``name`` with its ``inputs`` and ``weights``."""
    spec = _profile_dims(inputs)
    dtype = model_dtype(program)
    fused = dtype != torch.float32
    # No fused attention computes in fp32; only a checkpoint that is fp32 throughout gets here.
    report = write_engine(name, spec, job.profiles, job, writer, progress, decomposable_attention=not fused)
    summary = inspect_engine(report.path)
    attention = len(graph.calls(*_ATTENTIONS))
    profiles = tuple(profile.name for profile in job.profiles)
    check = _check(name, graph, summary, job, dtype, in_loop)
    return Engine(name, report, summary, check, attention, profiles, tuple(weights), layer_weights(graph))


_ATTENTIONS = ops.having(ops.Trait.ATTENDS)


def _profile_dims(inputs: Mapping[str, TensorSpec]) -> dict[str, list[int | str]]:
    """Shapes over the dims of a profile."""

    def dim(size: Size) -> int | str:
        # A profile says how long a prompt may be; that holds for the negative prompt too.
        return size if isinstance(size, int) else str(size).replace(NEGATIVE_LEN, "und_len")

    return {i: [dim(size) for size in given.shape] for i, given in inputs.items()}


def _check(name: str, graph: Graph, summary: EngineSummary, job: Job, dtype: torch.dtype, in_loop: bool) -> EngineCheck:
    """What the engine was meant to contain, and whether it does."""
    attention, weights = graph.calls(*_ATTENTIONS), layer_weights(graph)
    if not attention and not weights:  # tables: a few element-wise kernels, nothing that could fall back
        return capability_check(name, summary, job)
    fused, kind = dtype != torch.float32, _TYPES[dtype]
    scale = attention[0].args[-1] if attention else 1.0
    in_fp8 = [node for node in attention if node.target is ops.JOINT_ATTENTION_FP8]
    attends = "fp8" if len(in_fp8) == len(attention) else kind
    types = planned_types(graph)
    planned = len(attention)
    if in_loop:  # a short body is unrolled a few times
        counts = {len(g.attention) for g in summary.graphs}
        planned = next((n for n in counts if len(counts) == 1 and n and n % planned == 0), planned)
    expected = EngineExpectation(
        attention=planned if fused else 0,
        gemm_type=kind,
        compute_capability=job.target.compute_capability or "",
        profiles=len(job.profiles),
        # Where some layers attend in fp8 and some do not, their number is checked and not which is which.
        attention_type=None if not fused or 0 < len(in_fp8) < len(attention) else attends,
        attention_scale=float(scale),
        other_gemms=types,
        layer_weights=weights,
        narrow_share=sum(weights[name] for name in types) / sum(weights.values()) if types else 0.0,
    )
    wanted = f"{len(attention)} fused attention kernels, {len(in_fp8)} in fp8, nothing stored O(S²)"
    if not in_fp8:
        wanted = f"{len(attention)} fused attention kernels, nothing stored O(S²)"
    if not fused:
        wanted = (
            f"{len(attention)} attentions as matrix products over stored scores (no fused kernel computes in {kind})"
        )
    products = f"every GEMM in {kind}"
    found = "as planned"
    if types:
        listed = ", ".join(f"{count} in {other}" for other, count in sorted(Counter(types.values()).items()))
        products = f"GEMMs of the layers: {listed}; every other in {kind}"
        share = min(narrow_share(g, weights) for g in summary.graphs) if summary.graphs else 0.0
        found = f"as planned: {share:.1%} of the layers' weights in 8 or 4 bit"
    problems = check_engine(summary, expected)
    return EngineCheck(name, "plan", f"{wanted}, {products}", "; ".join(problems) or found, not problems)


def _engine_requests(
    program: Program,
    variants: Mapping[str, Program],
    closed: Mapping[str, Program],
    inputs_of: _WeightInputs,
    result: BuildResult,
) -> Iterator[EngineRequest]:
    """Every engine that this build is for, to be built where its GPU is."""
    job = result.job
    fused = model_dtype(program) != torch.float32
    for name in program.graphs:
        if name == SCHEDULE or (closed and name == program.loop.body):
            continue
        for one, graph in _sharing(name, program, variants).items():
            inputs = {i: spec_of(node) for i, node in graph.inputs.items()}
            request = _request(one, graph, inputs, job.profiles, decomposable=not fused)
            yield replace(request, weights=inputs_of(graph, name))
    for name, segment in closed.items():
        body = segment.graphs[segment.loop.body]
        inputs = loop_inputs(segment, LOOP_TABLES)
        # In a loop attention is written out, so that a builder may fuse it there: none is parsed as one.
        request = _request(name, body, inputs, job.profiles, decomposable=not fused)
        yield replace(request, attention=0, weights=inputs_of(body, program.loop.body))
    for codec in result.codecs:
        profiles = tuple(codec_profiles(codec.name, job.profiles))
        for name, graph in codec.program.graphs.items() if profiles else ():
            inputs = {i: spec_of(node) for i, node in graph.inputs.items()}
            yield _request(name, graph, inputs, profiles, decomposable=True)


def _with_plugins(requests: Iterator[EngineRequest], writer: BundleWriter) -> Iterator[EngineRequest]:
    """``requests`` with how many plugins their models have; attention that is one is not the builder's."""
    for request in requests:
        found = plugin_nodes(writer.path(f"onnx/{request.graph}.onnx", "onnx"))
        attention = max(0, request.attention - found["joint_attention"])
        yield replace(request, plugins=found.total(), attention=attention)


def _request(
    name: str, graph: Graph, inputs: Mapping[str, TensorSpec], profiles: Sequence[Profile], *, decomposable: bool
) -> EngineRequest:
    spec = _profile_dims(inputs)
    return EngineRequest(
        graph=name,
        profiles=tuple(profile.name for profile in profiles),
        shapes=tuple(input_shapes(profile, spec) for profile in profiles),
        decomposable_attention=decomposable,
        attention=len(graph.calls(*(_ATTENTIONS - ops.having(ops.Trait.ROUNDS)))),
    )


def _write_requests(requests: Iterator[EngineRequest], writer: BundleWriter, result: BuildResult) -> None:
    found = list(requests)
    writer.path(REQUESTS, REQUESTS_ROLE).write_text(requests_text(found), encoding="utf-8")
    writer.path(SCRIPT, "script").write_text(script_text(cosmos_export.__version__), encoding="utf-8")
    result.notes.append(
        f"{len(found)} engines are built on the GPU itself: run `sh {SCRIPT}` in the bundle on a machine that has one "
        f"of compute capability {result.job.target.compute_capability}"
    )


def _require_plans(engines: Sequence[Engine]) -> None:
    missed = [engine.check for engine in engines if not engine.check.passed]
    if missed:
        raise FindingError(
            "CX450",
            "engines do not contain what was planned: " + " | ".join(f"{c.engine}: {c.found}" for c in missed),
            "nothing was written; a narrower profile or another target may avoid it",
        )
