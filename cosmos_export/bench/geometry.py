"""A published geometry with random weights: the graphs that a build would make, without a checkpoint.

Speed does not depend on the values of weights, so this says how fast, and nothing of how well. The graphs are captured
where diffusers is, and can be carried to a machine that has a GPU and torch alone (`write_graphs`); a recipe quantizes
them there, by the pass that a build runs.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from cosmos_export.build.loop import close_loop
from cosmos_export.checkpoint.geometry import Geometry
from cosmos_export.checkpoint.layout import expected_tensors
from cosmos_export.checkpoint.strict_json import read_object, shown
from cosmos_export.diagnostics import UserError
from cosmos_export.ir import ops
from cosmos_export.ir.dims import bind, evaluate
from cosmos_export.ir.graph import Graph, is_op, is_weight, spec_of
from cosmos_export.ir.serialize import graph_document, read_graph
from cosmos_export.ir.spec import INT4, Part, TensorSpec, WeightBinding, WeightSource
from cosmos_export.passes.assign_precision import UNQUANTIZED, AssignPrecision, Precision
from cosmos_export.passes.base import PassResult
from cosmos_export.passes.batch_guidance import NEGATIVE_LEN
from cosmos_export.passes.insert_quantization import InsertQuantization, Ranges, linears_of
from cosmos_export.plan import Workload
from cosmos_export.sampling import Schedule
from cosmos_export.targets.recipe import Assignment

DEVIATION = 0.02
"""Of random weights; zeros would let a card clock higher than it does at work."""
_FP8_DEVIATION = 100.0
"""Of E4M3 values, so that they use its range: weights of a few deviations come near its 448."""
_INT4_DEVIATION = 4.0
"""Of integers from −8 to 7, all as likely, about."""
_AMAX = 5.0
"""Range of activations, which norms keep near one."""
_SITES = "sites"
_WRITE = "write them with `python benchmarks/geometry.py -o DIR`"
TINY: Mapping[str, Any] = {
    "num_hidden_layers": 2, "hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 32, "vocab_size": 256, "latent_channel": 16, "patch_latent_dim": 64,
    "rope_axes_dim": (6, 5, 5),
}  # fmt: skip
"""What a dry run changes of a geometry: everything that takes time."""
PROMPT_DIMS = frozenset({"und_len", NEGATIVE_LEN})
"""Dims that differ from prompt to prompt: measured is the code that a bundle runs, which takes every value of them."""
GUIDED, PLAIN = "step-guided", "step-plain"
"""Bodies of the loop: both branches in one run, and one branch."""

Site = tuple[str, str, int]
"""Tower, kind and layer, as recipes name places."""


@dataclass(frozen=True)
class GeometryGraphs:
    """The graphs of a request: what runs once a prompt, once a request, and once a step."""

    graphs: Mapping[str, Graph]
    """``reasoner``, ``conditioning`` where the model has actions, and the bodies `GUIDED` and `PLAIN`."""
    sites: Mapping[str, Mapping[str, Site]]
    """By graph: the site that each weight of a layer, and each of the generator's attentions, is."""


def modalities_of(workload: Workload, geometry: Geometry) -> tuple[str, ...]:
    """What of the model a workload uses; a build for it takes no more."""
    found = ["vision"]
    if geometry.sound_gen and workload.dim("sound_len"):
        found.append("sound")
    if geometry.action_gen and workload.dim("action_len"):
        found.append("action")
    return tuple(found)


def tiny_geometry(geometry: Geometry) -> Geometry:
    """``geometry`` as a dry run has it."""
    return replace(geometry, **TINY)


def capture_graphs(
    geometry: Geometry, modalities: tuple[str, ...], schedule: Schedule, *, tiny: bool
) -> GeometryGraphs:
    """Capture ``geometry`` and close its loop for ``schedule``, without any weight."""
    from cosmos_export.capture.model import capture
    from cosmos_export.passes.pipeline import default_passes, run_passes

    if tiny:
        geometry = tiny_geometry(geometry)
    sources = {
        name: WeightSource(name, Path("absent.safetensors"), 0, torch.bfloat16, tuple(int(n) for n in tensor.shape))
        for name, tensor in expected_tensors(geometry).items()
    }
    program = capture(geometry.config, sources, modalities=modalities)
    run_passes(program, default_passes())
    AssignPrecision(lambda tower, kind, layer: (UNQUANTIZED,)).run(program)
    graphs = {name: graph for name, graph in program.graphs.items() if name not in ("schedule", program.loop.body)}
    for closed in close_loop(program, schedule).values():
        body = closed.graphs[closed.loop.body]
        guided = any(name.startswith("negative_") for name in body.inputs)
        graphs.setdefault(GUIDED if guided else PLAIN, body)
    return GeometryGraphs(graphs, {name: _sites(graph) for name, graph in graphs.items()})


def _sites(graph: Graph) -> dict[str, Site]:
    owners = [n for n in graph.nodes if "precision" in n.meta and (is_weight(n) or is_op(n, ops.JOINT_ATTENTION))]
    labels: dict[str, Precision] = {node.name: node.meta["precision"] for node in owners}
    return {name: (label.tower, label.kind, label.layer) for name, label in labels.items()}


def quantized(graph: Graph, sites: Mapping[str, Site], assignment: Assignment, step: int) -> Graph:
    """``graph`` as a build with the recipe of ``assignment`` has it at ``step``."""
    result = graph.copy()
    amax: dict[str, float] = {}
    attention: dict[tuple[int, str], float] = {}
    for node in result.nodes:
        if node.name not in sites:
            continue
        tower, kind, layer = sites[node.name]
        node.meta["precision"] = Precision(tower, kind, layer, assignment.over_steps(tower, kind, layer))
        if is_weight(node):
            amax |= {f"{linear}.input_amax": _AMAX for linear in linears_of(node.meta["weight"])}
        else:
            attention |= {(layer, operand): _AMAX for operand in "qkv"}
    InsertQuantization(Ranges(amax, attention=attention), step).rewrite(result, PassResult())
    return result


def write_graphs(found: GeometryGraphs, folder: Path) -> list[Path]:
    """A document a graph, weights as shapes alone, and one of their sites."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, graph in found.graphs.items():
        document = graph_document(graph, "random.weights", lambda binding: (0, _bytes(binding.shape, binding.dtype)))
        path = folder / f"{name}.json"
        path.write_text(json.dumps(document, separators=(",", ":")), encoding="utf-8")
        paths.append(path)
    paths.append(folder / f"{_SITES}.json")
    paths[-1].write_text(json.dumps(found.sites, separators=(",", ":")), encoding="utf-8")
    return paths


def read_graphs(folder: Path) -> GeometryGraphs:
    """What `write_graphs` wrote; UserError CX671 where there is nothing."""
    paths = {path.stem: path for path in sorted(folder.glob("*.json"))} if folder.is_dir() else {}
    if _SITES not in paths:
        raise UserError("CX671", f"{folder} has no graphs", _WRITE)
    places = read_object(paths.pop(_SITES))
    sites = {graph: _read_sites(graph, named) for graph, named in places.items()}
    return GeometryGraphs({name: read_graph(read_object(path), folder) for name, path in paths.items()}, sites)


def _read_sites(graph: str, named: object) -> dict[str, Site]:
    found: dict[str, Site] = {}
    for name, site in named.items() if isinstance(named, dict) else [("", named)]:
        match site:
            case [str(tower), str(kind), int(layer)] if not isinstance(layer, bool):
                found[name] = (tower, kind, layer)
            case _:
                where = f"{_SITES}.json: {shown(name)} of graph {shown(graph)}"
                raise UserError("CX671", f"{where} is {shown(site)}, expected tower, kind and layer", _WRITE)
    return found


def _bytes(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    size = dtype.itemsize
    for n in shape:
        size *= n
    return size


def dims_of(workload: Workload, *, tiny: bool) -> dict[str, int]:
    """Values of the dims at the workload's optimum."""
    dims = {name: workload.dim(name) for name in workload.profile.dims}
    dims |= {"und_len": workload.prompt_tokens, NEGATIVE_LEN: workload.negative_tokens}
    if tiny:
        small = {"frames": 3, "height": 6, "width": 8, "und_len": 9, NEGATIVE_LEN: 7, "sound_len": 4, "action_len": 3}
        dims = {name: min(value, small[name]) for name, value in dims.items()}
    return dims


def random_weights(graph: Graph, device: torch.device) -> dict[str, torch.Tensor]:
    """Values for every weight of ``graph``, in the form in which it is stored. Norms are about one."""
    generator = torch.Generator(device).manual_seed(0)
    return {name: _random_form(node.meta["weight"], generator) for name, node in graph.weights.items()}


def _random_form(binding: WeightBinding, generator: torch.Generator) -> torch.Tensor:
    """A weight, or what is stored of one that is packed: together about as large as the weight would be."""
    shape, device = tuple(binding.shape), generator.device
    packing = binding.packing
    if packing is None:
        return random_weight(shape, binding.dtype, generator)
    if packing.part is Part.SCALE:
        values = _INT4_DEVIATION if packing.group else _FP8_DEVIATION
        return torch.full(shape, DEVIATION / values, dtype=binding.dtype, device=device)
    if binding.dtype is INT4:
        return torch.randint(256, (shape[0], shape[1] // 2), generator=generator, dtype=torch.uint8, device=device)
    wide = torch.randn(shape, generator=generator, device=device, dtype=torch.bfloat16)
    return (_FP8_DEVIATION * wide).clamp(-448, 448).to(binding.dtype)


def random_weight(shape: Sequence[int], dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    """A weight on the device of ``generator``: about one where it has one axis, as norms have, and small otherwise."""
    device = generator.device
    if len(shape) == 1:
        return (1 + 0.1 * torch.randn(shape, generator=generator, device=device)).to(dtype)
    return (DEVIATION * torch.randn(shape, generator=generator, device=device, dtype=torch.bfloat16)).to(dtype)


def random_inputs(graph: Graph, dims: Mapping[str, int], device: torch.device) -> dict[str, torch.Tensor]:
    """Values for every input of ``graph`` at the sizes ``dims``: token ids, masks of ones, the rest noise."""
    generator = torch.Generator(device).manual_seed(1)
    known = dict(dims)
    found = {}
    for name, node in graph.inputs.items():
        spec: TensorSpec = spec_of(node)
        shape = [evaluate(size, known) for size in spec.shape]
        if spec.dtype == torch.int64:
            found[name] = torch.zeros(shape, dtype=spec.dtype, device=device)
        elif name.endswith(("_mask", "_columns")):
            found[name] = torch.ones(shape, dtype=spec.dtype, device=device)
        else:
            found[name] = torch.randn(shape, generator=generator, device=device).to(spec.dtype)
    bind((name, spec_of(node).shape, tuple(found[name].shape)) for name, node in graph.inputs.items())
    return found


__all__ = [
    "GUIDED", "PLAIN", "PROMPT_DIMS", "GeometryGraphs", "capture_graphs", "dims_of", "modalities_of", "quantized",
    "random_inputs", "random_weight", "random_weights", "read_graphs", "tiny_geometry", "write_graphs",
]  # fmt: skip
