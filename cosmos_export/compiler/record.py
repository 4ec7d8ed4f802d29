"""The manifest of a build."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from importlib import import_module, metadata
from itertools import pairwise
from typing import Any

from cosmos_export.bundle import (
    DimRecord,
    EdgeRecord,
    EngineRecord,
    GoldenRecord,
    GraphContract,
    InputFile,
    LoopRecord,
    Manifest,
    ModelRecord,
    ProfileRecord,
    PromptRecord,
    SegmentRecord,
    TargetRecord,
    Tensor,
    Verdict,
    Volatile,
)
from cosmos_export.checkpoint import Checkpoint
from cosmos_export.checkpoint.folded import folded_options
from cosmos_export.compiler.components import Codec
from cosmos_export.compiler.coverage import coverage_verdicts
from cosmos_export.compiler.cuts import chains
from cosmos_export.compiler.evidence import BuildResult
from cosmos_export.compiler.forms import Forms, Pieces
from cosmos_export.compiler.job import Job
from cosmos_export.compiler.loop import LOOP_TABLES, loop_inputs, loop_outputs
from cosmos_export.compiler.losses import loss_values, loss_verdicts, precision_record
from cosmos_export.ir.graph import Graph, spec_of
from cosmos_export.ir.program import Program
from cosmos_export.ir.spec import DTYPE_NAMES, TensorSpec
from cosmos_export.machine.system import python_version
from cosmos_export.option_fields import described
from cosmos_export.options import BuildOptions
from cosmos_export.release import VERSION

_TOOLS = ("torch", "diffusers", "transformers", "onnx", "onnxruntime")
_GEOMETRY = (
    "num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim", "intermediate_size",
    "hidden_act", "vocab_size", "latent_channel", "action_dim", "sound_dim",
)  # fmt: skip


@dataclass(frozen=True)
class BundleContents:
    """The files that a build made for its bundle, and those that it read."""

    forms: Forms
    pieces: Pieces
    """The graphs that every graph is lowered as: itself, or those it was cut into."""
    codecs: tuple[Codec, ...]
    prompt: PromptRecord | None
    inputs: tuple[InputFile, ...]
    """Files of the checkpoint."""
    created: str
    """Time of the build, in UTC."""
    golden: GoldenRecord | None = None


def manifest(result: BuildResult, contents: BundleContents) -> Manifest:
    """Everything a reader needs to know of this build, except the files, which the writer adds."""
    job, checkpoint = result.job, result.job.checkpoint
    program, closed, pieces = contents.forms.program, contents.forms.closed, contents.pieces
    bodies, codecs = contents.forms.bodies, contents.codecs
    programs = (program, *(codec.program for codec in codecs))
    return Manifest(
        model=ModelRecord(
            id=checkpoint.origin.repository or checkpoint.root.resolve().name,
            variant=checkpoint.variant,
            revision=checkpoint.origin.revision,
            geometry={name: getattr(checkpoint.geometry, name) for name in _GEOMETRY},
        ),
        inputs=contents.inputs,
        target=TargetRecord(job.target.name, job.target.backend, job.target.compute_capability),
        profiles=tuple(
            ProfileRecord(p.name, {d: DimRecord(r.min, r.opt, r.max) for d, r in p.dims.items()}) for p in job.profiles
        ),
        recipe=job.precision.recipe if job.quantized and job.part_of is None else checkpoint.dtype,
        graphs={name: _contract(graph) for one in programs for name, graph in one.graphs.items()}
        | {name: _contract(program.graphs[program.loop.body]) for name in bodies}
        | {graph.name: _contract(graph) for cut in pieces.values() if len(cut) > 1 for graph in cut}
        | _loop_contracts(closed),
        chains=chains(pieces),
        edges=(
            *(EdgeRecord(e.source, e.output, e.target, e.input) for one in programs for e in one.edges),
            *(
                EdgeRecord(e.source, e.output, name, e.input)
                for name in dict.fromkeys(bodies)
                if name != program.loop.body
                for e in program.edges_into(program.loop.body)
            ),
            *_loop_edges(closed),
        ),
        loop=_loop(program, closed, bodies),
        # Its report is of what the gates measured, which do not look at a part.
        precision=precision_record(job.precision, job.scales, stored=checkpoint.quantization is not None)
        if job.quantized and job.part_of is None
        else None,
        streams={codec.stream_name: codec.stream for codec in codecs if codec.stream is not None},
        request=replace(job.request, prompt=contents.prompt),
        engines=tuple(
            EngineRecord(e.graph, e.graph, f"engines/{e.report.path.name}", e.profiles, e.weights)
            for e in result.engines
        ),
        tools=_tools(result),
        options={
            **_recorded(job),
            **{f"schedule.{name}": value for name, value in asdict(job.schedule).items()},
            "passes": tuple(program.history),
            **folded_options(checkpoint),
            **_ignored_adapters(checkpoint),
        },
        evaluation=verdicts(result),
        plan_checks=tuple(check for engine in result.engines for check in engine.checks),
        volatile=Volatile(
            created=contents.created,
            build_seconds=round(result.costs.seconds, 3),
            peak_memory_bytes=result.costs.peak_resident_bytes,
            stage_seconds={name: round(cost.seconds, 3) for name, cost in result.costs.stages.items()},
            measured={name: value for m in (*result.parity, *result.quality) for name, value in m.numbers.items()}
            | ({} if result.losses is None else loss_values(result.losses)),
            planned=job.plan.beside(result.engines, result.costs.peak_anonymous_bytes),
            golden=contents.golden,
        ),
    )


def _recorded(job: Job) -> dict[str, Any]:
    """The options of the build that say ``options`` for their place in the manifest, as the job resolved them."""
    names = [option.name for option in described(BuildOptions) if option.cli.manifest == "options"]
    return {name: getattr(job, name) for name in names}


def _ignored_adapters(checkpoint: Checkpoint) -> dict[str, tuple[str, ...]]:
    """Adapters that are beside the weights and are not in the bundle, where there are any."""
    found = tuple(path.relative_to(checkpoint.root).as_posix() for path in checkpoint.adapters)
    return {"ignored_adapters": found} if found else {}


def _loop(program: Program, closed: Mapping[str, Program], bodies: tuple[str, ...]) -> LoopRecord:
    """The loop a host runs, and the segments that run by themselves."""
    segments = tuple(
        SegmentRecord(name, one.loop.steps or 0, tuple(n for n in one.loop.rows if n not in LOOP_TABLES))
        for name, one in closed.items()
    )
    return LoopRecord(program.loop.body, dict(program.loop.carried), segments, bodies)


def _loop_contracts(closed: Mapping[str, Program]) -> dict[str, GraphContract]:
    return {
        name: GraphContract(_tensors(loop_inputs(one, LOOP_TABLES)), _tensors(loop_outputs(one)))
        for name, one in closed.items()
    }


def _loop_edges(closed: Mapping[str, Program]) -> list[EdgeRecord]:
    """Edges into every segment, from the graphs before the loop and from the segment before it."""
    edges = [
        EdgeRecord(e.source, e.output, name, e.input, e.instance or None)
        for name, one in closed.items()
        for e in one.edges_into(one.loop.body)
        if e.input not in LOOP_TABLES
    ]
    for source, target in pairwise(closed):
        edges += [EdgeRecord(source, f"{value}_final", target, value) for value in closed[target].loop.taken]
    return edges


def _contract(graph: Graph) -> GraphContract:
    inputs, outputs = ({n: spec_of(node) for n, node in nodes.items()} for nodes in (graph.inputs, graph.outputs))
    return GraphContract(_tensors(inputs), _tensors(outputs))


def _tensors(specs: Mapping[str, TensorSpec]) -> tuple[Tensor, ...]:
    return tuple(
        Tensor(name, DTYPE_NAMES[spec.dtype], tuple(s if isinstance(s, int) else str(s) for s in spec.shape))
        for name, spec in specs.items()
    )


def _tools(result: BuildResult) -> dict[str, str]:
    tools = {"cosmos-export": VERSION, "python": python_version()}
    tools |= {name: _version(name) for name in _TOOLS}
    return tools | {e.report.builder: e.report.builder_version for e in result.engines}


def _version(module: str) -> str:
    """Version of the distribution that provides ``module``: ONNX Runtime has one for the CPU and one for GPUs."""
    try:
        return metadata.version(module)
    except metadata.PackageNotFoundError:
        return str(getattr(import_module(module), "__version__", "unknown"))


def verdicts(result: BuildResult) -> tuple[Verdict, ...]:
    """Measurements of a build, and those that are missing, as a manifest has them."""
    measured = [
        Verdict(m.stage, m.subject, m.metric, m.limit, "pass" if m.passed else "fail", m.over)
        for m in (*result.parity, *result.quality)
    ]
    missing = [
        Verdict("all", subject, "relative L2", None, "not-measured", why)
        for subject, why in result.not_compared.items()
    ]
    engines = [
        Verdict("engine", e.graph, "relative L2", None, "not-measured", "needs the target's GPU")
        for e in result.engines
    ]
    lost = () if result.losses is None else loss_verdicts(result.losses)
    return (*measured, *result.verdicts, *lost, *coverage_verdicts(result.job.coverage), *missing, *engines)
