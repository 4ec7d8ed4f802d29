"""The engines of a build: submitted to builders as soon as their models are written, and checked afterwards."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future

import torch

from cosmos_export.bundle import BundleWriter, EngineCheck
from cosmos_export.compiler.allocator import return_freed_memory
from cosmos_export.compiler.artifacts import Engine, EngineSettings, capability_check, write_engine
from cosmos_export.compiler.builders import Builders
from cosmos_export.compiler.components import Codec, codec_engines
from cosmos_export.compiler.models import Model
from cosmos_export.compiler.precision import layer_weights, planned_types
from cosmos_export.diagnostics import FindingError
from cosmos_export.ir import ops
from cosmos_export.ir.dims import Size
from cosmos_export.ir.spec import TensorSpec
from cosmos_export.passes.batch_guidance import NEGATIVE_LEN
from cosmos_export.progress import Progress
from cosmos_export.targets.backends import backend_of
from cosmos_export.targets.trt.engine_inspector import (
    EngineExpectation,
    EngineSummary,
    check_engine,
    inspect_engine,
    narrow_share,
)

_TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
ATTENTIONS = ops.having(ops.Trait.ATTENDS)


class EngineBuilds:
    """Engines that are built beside the rest of a build, each in the order in which it was submitted.

    Nothing is submitted for a target whose engines are not built here.
    """

    def __init__(
        self,
        settings: EngineSettings,
        writer: BundleWriter,
        builders: Builders,
        memory: Callable[[str], int],
        beside: int,
    ) -> None:
        """``memory``: what the builder of an engine takes, by its graph's name. ``beside``: what else is measured while
        the engines of models are built. Both in bytes."""
        self._settings, self._writer, self._builders = settings, writer, builders
        self._memory, self._beside = memory, beside
        self._here = backend_of(settings.target).builds_here
        self._submitted: set[str] = set()
        self._of_models: list[Future[Engine]] = []
        self._of_codecs: list[Future[Engine]] = []

    def submit_codec(self, codec: Codec) -> None:
        """Build the engines of ``codec``, whose models are written."""
        if self._here:
            work = codec_engines(codec, self._settings, self._writer)
            self._of_codecs += [self._builders.submit(one, self._memory(graph)) for graph, one in work.items()]

    def submit(self, models: Iterable[Model], dtype: torch.dtype) -> None:
        """Build the engines of ``models``, which are written, unless that has been asked for before.

        From the first one on, what will be measured beside them is held back from their share of the memory. ``dtype``
        is that of the whole model.
        """
        new = [model for model in models if model.has_engine and model.name not in self._submitted]
        if not self._here or not new:
            return
        return_freed_memory()
        self._submitted.update(model.name for model in new)
        self._builders.hold(self._beside)
        for model in new:
            work = self._work(model, dtype)
            self._of_models.append(self._builders.submit(work, self._memory(model.name)))

    def result(self) -> list[Engine]:
        """Every engine, when all are there. Raises what the first builder that failed raised."""
        if not self._here:
            return []
        self._builders.wait()
        return [build.result() for build in (*self._of_models, *self._of_codecs)]

    def _work(self, model: Model, dtype: torch.dtype) -> Callable[[Progress], Engine]:
        return lambda progress: _build_engine(model, dtype, self._settings, self._writer, progress)


def _build_engine(
    model: Model, dtype: torch.dtype, settings: EngineSettings, writer: BundleWriter, progress: Progress
) -> Engine:  # fmt: skip
    name, graph = model.name, model.graph
    # No fused attention computes in fp32; only a checkpoint that is fp32 throughout gets here.
    fused = dtype != torch.float32
    report = write_engine(
        name, profile_dims(model.inputs), settings, writer, progress, decomposable_attention=not fused
    )
    summary = inspect_engine(report.path)
    profiles = tuple(profile.name for profile in settings.profiles)
    check = _check(model, summary, settings, dtype)
    attention = len(graph.calls(*ATTENTIONS))
    return Engine(name, report, summary, check, attention, profiles, model.weights, layer_weights(graph))


def profile_dims(inputs: Mapping[str, TensorSpec]) -> dict[str, list[int | str]]:
    """Shapes of ``inputs`` over the dims of a profile."""

    def dim(size: Size) -> int | str:
        # A profile says how long a prompt may be; that holds for the negative prompt too.
        return size if isinstance(size, int) else str(size).replace(NEGATIVE_LEN, "und_len")

    return {i: [dim(size) for size in given.shape] for i, given in inputs.items()}


def _check(model: Model, summary: EngineSummary, settings: EngineSettings, dtype: torch.dtype) -> EngineCheck:
    """What the engine was meant to contain, and whether it does."""
    attention, weights = model.graph.calls(*ATTENTIONS), layer_weights(model.graph)
    if not attention and not weights:  # tables: a few element-wise kernels, nothing that could fall back
        return capability_check(model.name, summary, settings.target)
    fused, kind = dtype != torch.float32, _TYPES[dtype]
    scale = attention[0].args[-1] if attention else 1.0
    in_fp8 = [node for node in attention if node.target is ops.JOINT_ATTENTION_FP8]
    attends = "fp8" if len(in_fp8) == len(attention) else kind
    types = planned_types(model.graph)
    expected = EngineExpectation(
        attention=_unrolled(model, summary) if fused else 0,
        gemm_type=kind,
        compute_capability=settings.target.compute_capability or "",
        profiles=len(settings.profiles),
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
    return EngineCheck(model.name, "plan", f"{wanted}, {products}", "; ".join(problems) or found, not problems)


def _unrolled(model: Model, summary: EngineSummary) -> int:
    """Attentions that the engine should have: those of its graph, or a multiple, as a builder unrolls a short loop."""
    planned = len(model.graph.calls(*ATTENTIONS))
    if not model.in_loop:
        return planned
    counts = {len(g.attention) for g in summary.graphs}
    return next((n for n in counts if len(counts) == 1 and n and n % planned == 0), planned)


def silent_profiles(codecs: Sequence[Codec], engines: Sequence[Engine], profiles: Iterable[str]) -> Iterator[str]:
    """Notes on codecs that have no engine for some of ``profiles``."""
    profiles = tuple(profiles)
    found = {engine.graph: engine.profiles for engine in engines}
    for codec in codecs:
        left = [name for name in profiles if name not in found.get(codec.graphs[0], ())]
        if left:
            yield f"{codec.name} has no engine for {', '.join(left)}: no sound in that profile"


def require_plans(engines: Sequence[Engine]) -> None:
    """CX450: an engine does not contain what was planned."""
    missed = [engine.check for engine in engines if not engine.check.passed]
    if missed:
        raise FindingError(
            "CX450",
            "engines do not contain what was planned: " + " | ".join(f"{c.engine}: {c.found}" for c in missed),
            "nothing was written; a narrower profile or another target may avoid it",
        )
