"""A few layers of a published width end to end on one device, beside diffusers' own transformer there.

Weights are random and seen as fp32 by both. The oracle is diffusers' transformer in fp32; this project in bf16 may be
no further from it than diffusers' own bf16 is, apart from rounding noise. In FP8 diffusers' weights are what the bytes
and scales stand for, as it reads an FP8 checkpoint: weight-only FP8 is judged as bf16 is, and W8A8 against what its own
arithmetic gives in the interpreter.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import hypot
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from cosmos_export.bench.geometry import DEVIATION, PROMPT_DIMS
from cosmos_export.evaluation.cases import Case
from cosmos_export.evaluation.parity import PRECISION_LIMIT
from cosmos_export.evaluation.reference import Reference, relative_error
from cosmos_export.ir import packing
from cosmos_export.ir.graph import spec_of
from cosmos_export.ir.interpreter import Weights, read_weights, run_program
from cosmos_export.ir.program import Program
from cosmos_export.ir.spec import Part, WeightSource
from cosmos_export.precision.schemes import SCHEMES, UNQUANTIZED
from cosmos_export.precision.sites import LINEARS
from cosmos_export.targets.inductor.executable import Executable
from cosmos_export.targets.inductor.specialise import CompileSettings

if TYPE_CHECKING:
    from torch import nn

    from cosmos_export.checkpoint.geometry import Geometry

LAYERS, VOCABULARY = 2, 1024
W8A8_LIMIT = 1.25
"""Times the distance from fp32 that the recipe and bf16 have by themselves; a rounding moves some values by a step."""
CASE = Case("video", prompt=70, frames=5, height=16, width=20)
TINY_CASE = Case("video", prompt=9, frames=2, height=3, width=4)
Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Checked:
    """One precision: the distance of this project's result from the oracle, over the distance that is allowed."""

    recipe: str
    ours: float
    """Relative L2 to diffusers in fp32."""
    measure: float
    """Relative L2 of diffusers in bf16 to the same; for W8A8 together with that of the recipe in the interpreter."""
    limit: float
    """Largest ratio of the two."""

    @property
    def row(self) -> dict[str, Any]:
        ratio = self.ours / self.measure
        return {
            "check": "diffusers, end to end", "recipe": self.recipe, "error": self.ours, "beside": self.measure,
            "ratio": ratio, "limit": self.limit, "right": ratio <= self.limit,
        }  # fmt: skip


def shallow(geometry: Geometry) -> Geometry:
    """``geometry`` at its true width with few layers and a small vocabulary."""
    return replace(geometry, num_hidden_layers=LAYERS, vocab_size=VOCABULARY)


def check_numerics(
    geometry: Geometry, device: torch.device, *, case: Case = CASE, compiled: bool = True
) -> list[dict[str, Any]]:
    """bf16, weight-only FP8 and W8A8, a row each."""
    from cosmos_export.bench.baseline import random_transformer
    from cosmos_export.capture.model import capture
    from cosmos_export.passes.pipeline import default_passes, run_passes

    model = random_transformer(geometry, torch.device("cpu"), torch.bfloat16)
    stored = {name: p.detach() for name, p in model.named_parameters()}
    for value in stored.values():
        if value.ndim > 1:  # so that every layer changes what it is given, whatever the width
            value.mul_(value.shape[-1] ** -0.5 / DEVIATION)
    sources = {
        name: WeightSource(name, Path("absent.safetensors"), 0, torch.bfloat16, tuple(t.shape))
        for name, t in stored.items()
    }
    weights = read_weights(lambda source: stored[source.key].to(source.dtype))
    plain = capture(geometry.config, sources, modalities=("vision",))
    run_passes(plain, default_passes())
    inputs = case.inputs(geometry.config, ("vision",))
    found, rounding = [], 0.0
    stored_so = (s for s in SCHEMES.values() if s.weight is not None and s.weight.one_e4m3_scale)
    for scheme in (SCHEMES[UNQUANTIZED], *sorted(stored_so, key=lambda s: not s.weight_only)):
        program = plain if scheme.weight is None else quantize_linears(plain, scheme.name, inputs, weights)
        values = {} if scheme.weight is None else widened(program, stored)
        oracle = _stock(model, values, device, torch.float32, inputs)
        ours = relative_error(run_compiled(program, inputs, weights, device, compiled=compiled), oracle)
        if scheme.activation is not None:
            # Two roundings that have nothing to do with each other: of activations to FP8, and of everything to bf16.
            reference = run_program(program, inputs, weights, compute=torch.float32)
            measure, limit = hypot(relative_error(reference, oracle), rounding), W8A8_LIMIT
        else:
            rounding = relative_error(_stock(model, values, device, torch.bfloat16, inputs), oracle)
            measure, limit = rounding, PRECISION_LIMIT
        found.append(Checked(scheme.name, ours, measure, limit).row)
    return found


def quantize_linears(plain: Program, scheme: str, inputs: Tensors, weights: Weights) -> Program:
    """A copy of ``plain`` with every linear of the layers in ``scheme``, scales from one request."""
    from cosmos_export.evaluation.gates import observe_inputs
    from cosmos_export.passes.options import PassOptions, Ranges
    from cosmos_export.passes.pipeline import passes_of, run_passes

    options = PassOptions(
        over_steps=lambda tower, kind, layer: (scheme if kind in LINEARS else UNQUANTIZED,),
        ranges=Ranges(observe_inputs(plain, inputs, weights)) if SCHEMES[scheme].calibrated else Ranges(),
    )
    program = plain.copy()
    run_passes(program, passes_of(options, "sites", "numbers"))
    return program


def widened(program: Program, stored: Mapping[str, torch.Tensor]) -> Tensors:
    """Values by weight name that FP8 bytes and scales stand for."""
    found: Tensors = {}
    for graph in program.graphs.values():
        for node in graph.weights.values():
            binding = node.meta["weight"]
            form = binding.packing
            if form is None or not form.format.one_e4m3_scale or form.part is not Part.VALUES:
                continue
            amax = torch.stack([stored[key].abs().amax().float() for key in binding.keys]).amax()
            scale = packing.fp8_scale(amax)
            for key in binding.keys:
                found[key] = (packing.to_fp8(stored[key], scale).float() * scale).to(torch.bfloat16)
    return found


def _stock(
    model: nn.Module, values: Mapping[str, torch.Tensor], device: torch.device, dtype: torch.dtype, inputs: Tensors
) -> Tensors:
    """diffusers' velocities with ``values`` in place of its weights, on ``device`` in ``dtype``; on the host."""
    from copy import deepcopy

    own = deepcopy(model)
    own.load_state_dict(dict(values), strict=False)
    kept = {n for n, p in own.named_parameters() if p.dtype == torch.float32}
    for name, parameter in own.named_parameters():
        parameter.data = parameter.data.to(device, parameter.dtype if name in kept else dtype)
    for _, buffer in own.named_buffers():
        buffer.data = buffer.data.to(device)
    result = Reference.of(own, dtype).step(inputs, CASE.fps)
    return {name: value.float().cpu() for name, value in result.items()}


def run_compiled(
    program: Program, inputs: Tensors, weights: Weights, device: torch.device, *, compiled: bool
) -> Tensors:
    """Every graph of ``program`` by the inductor backend, one feeding the next; the body's results on the host."""
    settings = CompileSettings(compiled=compiled, open_dims=PROMPT_DIMS)
    results: dict[str, Tensors] = {}
    for name, graph in program.graphs.items():
        values = {n: weights(node.meta["weight"]).to(device) for n, node in graph.weights.items()}
        specs = {n: spec_of(node).dtype for n, node in graph.inputs.items()}
        given = {n: inputs[n].to(device, specs[n]) for n in program.free_inputs(name)}
        given |= {e.input: results[e.source][e.output] for e in program.edges_into(name)}
        executable, feeds = Executable(graph, values, device, settings), {n: given[n] for n in graph.inputs}
        executable(feeds)
        made = executable(feeds)  # on a GPU captured, and replayed
        results[name] = {n: t.clone() for n, t in made.items()}
        if device.type == "cuda":
            torch.cuda.synchronize()
    return {n: t.float().cpu() for n, t in results[program.loop.body].items() if t.numel()}


__all__ = ["CASE", "TINY_CASE", "Checked", "check_numerics", "shallow"]
