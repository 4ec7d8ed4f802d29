"""The engines of a build: submitted to builders as soon as their models are written, and checked afterwards."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future

import torch

from cosmos_export.bundle import BundleWriter
from cosmos_export.compiler.allocator import return_freed_memory
from cosmos_export.compiler.artifacts import Engine, EngineSettings, build_engine
from cosmos_export.compiler.builders import Builders
from cosmos_export.compiler.components import Codec, codec_engines
from cosmos_export.compiler.models import LoweredModel
from cosmos_export.compiler.precision import layer_weights, planned_types
from cosmos_export.diagnostics import FindingError
from cosmos_export.ir import ops
from cosmos_export.ir.dims import Size
from cosmos_export.ir.spec import TensorSpec
from cosmos_export.passes.batch_guidance import NEGATIVE_LEN
from cosmos_export.progress import Progress
from cosmos_export.targets.backends import backend_of
from cosmos_export.targets.trt.checks import WantedEngine

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

    def submit(self, models: Iterable[LoweredModel], dtype: torch.dtype) -> None:
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

    def _work(self, model: LoweredModel, dtype: torch.dtype) -> Callable[[Progress], Engine]:
        return lambda progress: _build_engine(model, dtype, self._settings, self._writer, progress)


def _build_engine(
    model: LoweredModel, dtype: torch.dtype, settings: EngineSettings, writer: BundleWriter, progress: Progress
) -> Engine:
    wanted = _wanted(model, dtype, settings)
    return build_engine(wanted, profile_dims(model.inputs), settings, writer, progress, model.weights)


def _wanted(model: LoweredModel, dtype: torch.dtype, settings: EngineSettings) -> WantedEngine:
    """Planned contents of the engine of ``model``."""
    attention = model.graph.calls(*ATTENTIONS)
    return WantedEngine(
        graph=model.name,
        compute_capability=settings.target.compute_capability or "",
        profiles=len(settings.profiles),
        attention=len(attention),
        # No fused attention computes in fp32; only a checkpoint that is fp32 throughout gets here.
        decomposable_attention=dtype == torch.float32,
        dtype=_TYPES[dtype],
        fp8_attention=sum(node.target is ops.JOINT_ATTENTION_FP8 for node in attention),
        attention_scale=float(attention[0].args[-1]) if attention else 1.0,
        gemm_types=planned_types(model.graph),
        layer_weights=layer_weights(model.graph),
        in_loop=model.in_loop,
    )


def profile_dims(inputs: Mapping[str, TensorSpec]) -> dict[str, list[int | str]]:
    """Shapes of ``inputs`` over the dims of a profile."""

    def dim(size: Size) -> int | str:
        # A profile says how long a prompt may be; that holds for the negative prompt too.
        return size if isinstance(size, int) else str(size).replace(NEGATIVE_LEN, "und_len")

    return {i: [dim(size) for size in given.shape] for i, given in inputs.items()}


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
