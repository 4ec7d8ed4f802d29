"""The components beside the transformer: codecs as models and engines, and the tokenizer with its template."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from cosmos_export.bundle import BundleWriter, PromptRecord, StreamRecord
from cosmos_export.capture.sources import weight_sources
from cosmos_export.checkpoint import Checkpoint
from cosmos_export.checkpoint.codecs import CODECS, codec_tensors
from cosmos_export.compiler.artifacts import Engine, EngineSettings, build_engine, write_models
from cosmos_export.compiler.captures import capture_codec
from cosmos_export.compiler.prompt import compile_chat_template
from cosmos_export.compiler.selection import TOKENIZER_FILE, codec_config
from cosmos_export.ir.graph import Graph, spec_of
from cosmos_export.ir.program import Program
from cosmos_export.ir.verifier import verify
from cosmos_export.progress import Progress
from cosmos_export.targets.backends import Backend
from cosmos_export.targets.profiles import DimRange, Profile
from cosmos_export.targets.trt.checks import WantedEngine


@dataclass(frozen=True)
class Codec:
    """A codec of the bundle; its graphs are one, or the first and the next call of a stream."""

    name: str
    program: Program
    suffix: str
    """Ending of its models that run on a CPU."""

    @property
    def graphs(self) -> tuple[str, ...]:
        """The names of its graphs, in the order of their calls."""
        return tuple(self.program.graphs)

    @property
    def stream_name(self) -> str:
        """Beginning of its graphs' names."""
        return self.name.replace("-", "_")

    @property
    def stream(self) -> StreamRecord | None:
        """How its two graphs follow each other; None for a codec that is one call."""
        if len(self.graphs) == 1:
            return None
        first, following = self.graphs
        return StreamRecord(first, following, {edge.input: edge.output for edge in self.program.edges})


def write_codec(
    name: str,
    checkpoint: Checkpoint,
    backend: Backend,
    writer: BundleWriter,
    progress: Progress,
    graphs: Path | None = None,
) -> Codec:
    """Capture codec ``name``, or take its graphs from the folder ``graphs``, and write its models.

    A stream's two graphs share one file of weights.
    """
    config = codec_config(checkpoint, CODECS[name].folder)
    sources = weight_sources(codec_tensors(checkpoint, name))
    program = capture_codec(name, config, sources, graphs)
    verify(program, stage=name)
    stem = name.replace("-", "_")
    return Codec(name, program, write_models(program.graphs, stem, _narrow(program), backend, writer, progress))


def _narrow(program: Program) -> bool:
    """Whether a codec computes in bf16."""
    bindings = (node.meta["weight"] for graph in program.graphs.values() for node in graph.weights.values())
    return any(binding.dtype == torch.bfloat16 for binding in bindings)


def write_tokenizer(checkpoint: Checkpoint, writer: BundleWriter) -> PromptRecord:
    """The tokenizer, and what its chat template puts around a text."""
    template = compile_chat_template(checkpoint)
    name = f"tokenizer/{TOKENIZER_FILE}"
    shutil.copyfile(checkpoint.components["text_tokenizer"] / TOKENIZER_FILE, writer.path(name, "tokenizer"))
    # The pipeline's own default where the model index does not say.
    use_system = bool(checkpoint.model_index.get("default_use_system_prompt", True))
    return PromptRecord(name, template.plain, template.system, use_system, template.suffix_ids)


def codec_engines(
    codec: Codec, settings: EngineSettings, writer: BundleWriter
) -> dict[str, Callable[[Progress], Engine]]:
    """Graph → the function that builds its engine, of ``codec``, for every profile that has something for it to do."""
    own = replace(settings, profiles=tuple(codec_profiles(codec.name, settings.profiles)))

    def build(name: str, graph: Graph, progress: Progress) -> Engine:
        spec = {i: _dims(spec_of(node).shape) for i, node in graph.inputs.items()}
        # The autoencoder's one head is wider than any fused kernel; it attends within a frame of latents.
        wanted = WantedEngine(
            name, own.target.compute_capability or "", len(own.profiles), attention=0, decomposable_attention=True
        )
        return build_engine(wanted, spec, own, writer, progress)

    return {name: partial(build, name, graph) for name, graph in codec.program.graphs.items() if own.profiles}


def codec_profiles(name: str, profiles: Sequence[Profile]) -> Iterator[Profile]:
    """The profiles of the engines of codec ``name``.

    One that may have no sound is for the sound decoder one that has a latent at least; one that never has any is none.
    """
    for profile in profiles:
        if CODECS[name].modality != "sound":
            yield profile
        elif profile.dims["sound_len"].max:
            span = profile.dims["sound_len"]
            some = DimRange(max(1, span.min), max(1, span.opt), span.max)
            yield replace(profile, dims={**profile.dims, "sound_len": some})


def _dims(shape: Sequence[Any]) -> list[int | str]:
    return [size if isinstance(size, int) else str(size) for size in shape]
