"""Engines that are built on the GPU itself: the request for each, and the script that has them built."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

import torch

from cosmos_export.bundle import BundleWriter
from cosmos_export.compiler.components import Codec, codec_profiles
from cosmos_export.compiler.engines import ATTENTIONS, profile_dims
from cosmos_export.compiler.finish import REQUESTS, REQUESTS_ROLE, SCRIPT, EngineRequest, requests_text, script_text
from cosmos_export.compiler.keys import plugin_nodes
from cosmos_export.compiler.models import LoweredModel
from cosmos_export.ir import ops
from cosmos_export.ir.graph import Graph, spec_of
from cosmos_export.ir.spec import TensorSpec
from cosmos_export.release import VERSION
from cosmos_export.targets import Target
from cosmos_export.targets.backends import backend_of
from cosmos_export.targets.profiles import Profile, input_shapes


def engine_requests(
    models: Iterable[LoweredModel], codecs: Iterable[Codec], profiles: Sequence[Profile], dtype: torch.dtype
) -> Iterator[EngineRequest]:
    """A request for every engine of ``models`` and ``codecs``. ``dtype`` is that of the whole model."""
    fused = dtype != torch.float32
    for model in models:
        if model.has_engine:
            request = _request(model.name, model.graph, model.inputs, profiles, decomposable=not fused)
            # In a loop attention is written out, so that a builder may fuse it there: none is parsed as one.
            attention = 0 if model.in_loop else request.attention
            yield replace(request, attention=attention, weights=model.weights)
    for codec in codecs:
        own = tuple(codec_profiles(codec.name, profiles))
        for name, graph in codec.program.graphs.items() if own else ():
            inputs = {i: spec_of(node) for i, node in graph.inputs.items()}
            yield _request(name, graph, inputs, own, decomposable=True)


def _request(
    name: str, graph: Graph, inputs: Mapping[str, TensorSpec], profiles: Sequence[Profile], *, decomposable: bool
) -> EngineRequest:
    spec = profile_dims(inputs)
    return EngineRequest(
        graph=name,
        profiles=tuple(profile.name for profile in profiles),
        shapes=tuple(input_shapes(profile, spec) for profile in profiles),
        decomposable_attention=decomposable,
        attention=len(graph.calls(*(ATTENTIONS - ops.having(ops.Trait.ROUNDS)))),
    )


def with_plugins(requests: Iterable[EngineRequest], writer: BundleWriter) -> Iterator[EngineRequest]:
    """``requests`` with how many plugins their models have; attention that is one is not the builder's."""
    for request in requests:
        found = plugin_nodes(writer.path(f"onnx/{request.graph}.onnx", "onnx"))
        attention = max(0, request.attention - found["joint_attention"])
        yield replace(request, plugins=found.total(), attention=attention)


def write_requests(requests: Iterable[EngineRequest], writer: BundleWriter, target: Target) -> str:
    """The requests and the script as files of the bundle; returns what a reader of the result is told."""
    found, extra = list(requests), backend_of(target).requirements[0].extra
    writer.path(REQUESTS, REQUESTS_ROLE).write_text(requests_text(found), encoding="utf-8")
    writer.path(SCRIPT, "script").write_text(script_text(VERSION, extra), encoding="utf-8")
    return (
        f"{len(found)} engines are built on the GPU itself: run `sh {SCRIPT}` in the bundle on a machine that has one "
        f"of compute capability {target.compute_capability}"
    )
