"""The order of the stages of a build. Each writes into the staged bundle; the first that finds something wrong ends it.

What a stage does is in the module of its idea. What it makes is handed to the next as a frozen record; what it measures
is added to the evidence, which outlives a finding.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from cosmos_export.bundle import BundleWriter, InputFile, Manifest
from cosmos_export.bundle.provenance import data_sources, documents, time_of_build
from cosmos_export.capture.sources import weight_sources
from cosmos_export.checkpoint.codecs import CODECS
from cosmos_export.compiler.allocator import return_freed_memory
from cosmos_export.compiler.artifacts import EngineSettings, cache_entries, write_plugins
from cosmos_export.compiler.builders import Builders
from cosmos_export.compiler.bundle_requests import (
    compare_guided,
    compare_requests,
    not_requested,
    require_requests,
    sampling_verdict,
)
from cosmos_export.compiler.cache import Cache
from cosmos_export.compiler.captures import capture
from cosmos_export.compiler.components import Codec, write_codec, write_tokenizer
from cosmos_export.compiler.cuts import cut_graphs, cut_notes
from cosmos_export.compiler.engine_forms import engine_form_verdicts
from cosmos_export.compiler.engine_requests import engine_requests, with_plugins, write_requests
from cosmos_export.compiler.engines import EngineBuilds, require_plans, silent_profiles
from cosmos_export.compiler.evidence import TRANSFORMER, BuildResult, Evidence, result_of
from cosmos_export.compiler.first_layers import compare_first_layers
from cosmos_export.compiler.forms import make_forms
from cosmos_export.compiler.golden import golden_record
from cosmos_export.compiler.graphs import PassWatch, all_passes, plain_program
from cosmos_export.compiler.input_files import InputHashes
from cosmos_export.compiler.job import Job
from cosmos_export.compiler.loop import loop_tables
from cosmos_export.compiler.losses import measure_losses, require_losses, write_losses
from cosmos_export.compiler.metering import Stages
from cosmos_export.compiler.models import model_dtype, models_of, write_graph_models, write_loop_model
from cosmos_export.compiler.precision import pass_options, require_scales
from cosmos_export.compiler.published import (
    Lowered,
    compare_codecs,
    compare_loop,
    compare_lowered,
    load_published,
    parity_refusal,
    require_parity,
)
from cosmos_export.compiler.record import BundleContents, manifest
from cosmos_export.compiler.selection import TOKENIZER
from cosmos_export.compiler.time_table import write_schedule_table
from cosmos_export.diagnostics import FindingError
from cosmos_export.evaluation.parity import Measured
from cosmos_export.ir.interpreter import read_weights
from cosmos_export.ir.program import Program
from cosmos_export.passes.cut_graph import CutGraph
from cosmos_export.passes.fold_schedule import SCHEDULE
from cosmos_export.passes.pipeline import AFTER_FORMS, fuse_kernels, require_pass
from cosmos_export.plan.sizes import compiler_bytes
from cosmos_export.plan.subject import sampling_of
from cosmos_export.progress import Progress, Silent
from cosmos_export.targets.onnx.plugins import Plugins
from cosmos_export.targets.onnx.weights import read_source


def compile_only(job: Job, progress: Progress) -> BuildResult:
    """The graphs up to ``--until``, and their text; compared with diffusers' after each pass if that is asked for."""
    passes, until, config = pass_options(job), job.until, job.checkpoint.geometry.config
    require_pass(until, all_passes(passes, job.segments, cut=job.memory_budget is not None))
    evidence, parity = Evidence(), None
    with evidence.meter:
        stages = Stages(evidence.meter, progress)
        if job.parity == "always":
            with stages("parity", "reference"):
                parity = load_published(job.checkpoint, job.modalities, job.outputs, read_weights(read_source))
        watch = PassWatch(stages, evidence, job.dump, parity, each=True)
        with stages("capture"):
            sources = weight_sources(job.checkpoint.tensors)
            captured = capture(config, sources, modalities=job.modalities, graphs=job.graphs)
        plain = plain_program(captured, passes, until, watch)
        forms = make_forms(plain, passes, job.precision.step_keys(), job.segments, until=until, watch=watch)
        if until in AFTER_FORMS:
            pieces = cut_graphs(forms.graphs, job.largest_part, job.profiles, external=job.external, watch=watch)
            if until != CutGraph.name:
                closed = [segment.graphs[segment.loop.body] for segment in forms.closed.values()]
                for graph in (*(graph for parts in pieces.values() for graph in parts), *closed):
                    fuse_kernels(graph, job.kernels, watch, until=until)
        require_parity(evidence.parity)
    return result_of(job, evidence, plain)


def build_bundle(
    job: Job, writer: BundleWriter, progress: Progress, found: Callable[[BuildResult, FindingError], None]
) -> BuildResult:
    """Every stage, into ``writer``; commits the bundle. ``found`` is told what was measured where a finding ends it."""
    evidence = Evidence()
    memory = None if job.memory_budget is None else job.memory_budget - compiler_bytes(job.layers)
    with evidence.meter, InputHashes(job.checkpoint) as hashes, Builders(memory, progress) as builders:

        def nothing_failed() -> None:
            builders.require_none_failed()
            hashes.require_readable()

        stages = Stages(evidence.meter, builders.progress, nothing_failed)
        try:
            plain, committed = _build(job, writer, evidence, stages, hashes, builders)
        except FindingError as error:
            found(result_of(job, evidence), error)
            raise
    return result_of(job, evidence, plain, committed)


def _build(
    job: Job, writer: BundleWriter, evidence: Evidence, stages: Stages, hashes: InputHashes | None, builders: Builders
) -> tuple[Program, Manifest]:
    """The plain program, and the manifest of the bundle that was committed."""
    checkpoint, schedule, plan, weights = job.checkpoint, job.schedule, job.plan, read_weights(read_source)
    evidence.notes.extend((*job.notes, *job.remarks))
    refusal = parity_refusal(job.parity, checkpoint.tensors)
    if refusal:
        evidence.not_compared[TRANSFORMER] = refusal
    if refusal and job.parity == "auto":
        with stages("first layers"):  # before anything else takes memory
            evidence.not_compared[TRANSFORMER] += compare_first_layers(job, writer, evidence, _build_part)
    with stages("tokenizer"):
        prompt = write_tokenizer(checkpoint, writer) if TOKENIZER in job.components else None
    settings = EngineSettings(job.target, job.profiles, job.cache)
    engines = EngineBuilds(settings, writer, builders, plan.builder_bytes, plan.gates_bytes)
    codecs: list[Codec] = []
    for name in (name for name in job.components if name in CODECS):
        with stages("components", name):
            codecs.append(write_codec(name, checkpoint, job.backend, writer, stages.progress, job.graphs))
        engines.submit_codec(codecs[-1])
    sources = weight_sources(checkpoint.tensors)
    parity, few_cases = None, None if job.part_of is None else 1 if job.loop == "device" else 2
    if not refusal:
        with stages("parity", "reference"):
            parity = load_published(checkpoint, job.modalities, job.outputs, weights, few_cases)

    # The program and the forms that are lowered.
    passes, watch = pass_options(job), PassWatch(stages, evidence, job.dump, parity, each=job.part_of is None)
    with stages("capture"):
        config = checkpoint.geometry.config
        captured = capture(config, sources, modalities=job.modalities, graphs=job.graphs)
    plain = plain_program(captured, passes, job.until, watch)
    if parity is not None and job.part_of is not None:
        with stages("parity", "of the passes"):
            evidence.parity.append(parity.program(plain, "passes"))
    with stages("time table"):
        write_schedule_table(plain, schedule, weights, writer)
    with stages("quantization"):
        forms = make_forms(plain, passes, job.precision.step_keys(), job.segments, watch=watch)
        if job.quantized:
            programs = (forms.program, *forms.variants.values(), *forms.closed.values())
            require_scales(programs, checkpoint, job.calibration)
    with stages("cuts"):
        pieces = cut_graphs(forms.graphs, job.largest_part, job.profiles, external=job.external, watch=watch)
        evidence.notes.extend(cut_notes(pieces))
    compare_codecs(codecs, checkpoint, job.parity, writer, evidence, stages)
    if parity is None:
        require_parity(evidence.parity)

    # The models, each with its engine as soon as it is there.
    kernels = job.kernels
    plugins = Plugins(kernels, lambda graph: fuse_kernels(graph, kernels, watch)) if kernels else None
    if plugins is not None:
        plugins.require_places([*forms.program.graphs.values(), *forms.closed_bodies])
    external, dtype = job.external, model_dtype(forms.program)
    models = models_of(forms, pieces, external=external)
    with stages("weights and ONNX", shown=False):
        for name in forms.program.graphs:
            suffix = write_graph_models(
                name, models, forms, job.backend, writer, stages.progress, plugins, external=external
            )
            if parity is None:  # its memory is not planned: without it builders of one tower run beside the next one
                engines.submit([model for model in models if model.stem == name and not model.in_loop], dtype)
        for name, closed in forms.closed.items():
            tables = loop_tables(closed, schedule, weights)
            write_loop_model(name, forms, tables, job.backend, writer, plugins, external=external)
    if plugins is not None:
        with stages("kernels"):
            write_plugins(plugins, job.target, writer)
    with stages("models of engines"):
        evidence.verdicts.extend(engine_form_verdicts(models, codecs, writer))

    # The proof on a CPU, beside the builders.
    onnx = writer.path(f"onnx/{SCHEDULE}{suffix}", "onnx").parent
    lowered = Lowered(forms, pieces, onnx, suffix, job.quantized)
    if parity is not None:
        with stages("parity", "of what is lowered"):
            evidence.parity.extend(compare_lowered(parity, plain, lowered))
            looped = compare_loop(parity, lowered, schedule, checkpoint.scheduler)
            (evidence.quality if job.quantized else evidence.parity).extend(looped)
            if forms.closed and not looped:
                evidence.notes.append(
                    "the loop was not compared: no case is noisy in the modalities of its outputs alone"
                )
        require_parity(evidence.parity)
    engines.submit(models, dtype)
    if job.quantized and job.part_of is None:  # what steps of a part lose says nothing of the whole
        with stages("gates"):
            why = evidence.not_compared.get(TRANSFORMER, "")
            losses = measure_losses(plain, job, passes, weights, unsampled=why)
            evidence.losses.append(losses)
            write_losses(losses, job.precision, job.scales, writer)
        require_losses(losses, evidence.quality, enforce=job.quality == "enforce")
        return_freed_memory()
        builders.hold(0)

    # The engines, or what asks for them on another machine.
    if job.backend.builds_here:
        with stages("engines", shown=False):
            evidence.engines.extend(engines.result())
            evidence.notes.extend(silent_profiles(codecs, evidence.engines, [profile.name for profile in job.profiles]))
        require_plans(evidence.engines)
    elif job.backend.engines is not None:
        requests = engine_requests(models, codecs, job.profiles, dtype)
        counted = requests if plugins is None else with_plugins(requests, writer)
        evidence.notes.append(write_requests(counted, writer, job.target))

    # The bundle, used once before it is put in place.
    hashed: tuple[InputFile, ...] = ()
    if hashes is not None:
        with stages("hashing inputs", shown=False):
            hashed = hashes.result("hashing inputs", stages.progress)
    created = time_of_build().strftime("%Y-%m-%dT%H:%M:%SZ")
    contents = BundleContents(forms, pieces, tuple(codecs), prompt, hashed, created)

    def with_requests(root: Path, staged: Manifest) -> Manifest:
        with stages("requests"):
            evidence.verdicts.append(sampling_verdict(root, staged, schedule, job.mode, sampling_of(checkpoint)))
            why = evidence.not_compared.get(TRANSFORMER, "no case is noisy in the modalities of the outputs alone")
            found: tuple[Measured, ...] = ()
            if parity is not None:
                evidence.parity.extend(compare_guided(parity, plain, lowered, schedule, checkpoint.scheduler))
                found = compare_requests(parity, root, lowered, schedule, checkpoint.scheduler)
            evidence.parity.extend(found)
            evidence.verdicts.extend(() if found else (not_requested(why),))
            require_requests(evidence.parity)
            golden = golden_record(job, root) if found else None
        return manifest(result_of(job, evidence), replace(contents, golden=golden))

    def described(complete: Manifest) -> dict[str, bytes]:
        sources = () if job.scales is None else data_sources(job.scales.lineage)
        return documents(complete, sources)

    with stages("commit", shown=False):
        committed = writer.commit(manifest(result_of(job, evidence), contents), with_requests, described)
    Cache(job.cache).add(cache_entries(writer, committed, created))
    return plain, committed


def _build_part(job: Job, writer: BundleWriter, evidence: Evidence) -> None:
    """A part of a model in the same order, by itself and not shown."""
    with writer, Builders(None, Silent()) as builders:
        _build(job, writer, evidence, Stages(evidence.meter, Silent()), None, builders)
