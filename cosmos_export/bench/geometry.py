"""A published geometry with random weights: the graphs that a build would make, without a checkpoint.

Speed does not depend on the values of weights, so this says how fast, and nothing of how well. The graphs are captured
where diffusers is, and can be carried to a machine that has a GPU and torch alone (`write_graphs`); a recipe quantizes
them there, by the pass that a build runs.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from cosmos_export.checkpoint.geometry import Geometry
from cosmos_export.checkpoint.layout import expected_tensors
from cosmos_export.checkpoint.strict_json import read_object
from cosmos_export.compiler.forms import close_loop
from cosmos_export.diagnostics import InternalError, UserError, shown
from cosmos_export.ir import ops
from cosmos_export.ir.dims import Dim, bind, evaluate
from cosmos_export.ir.graph import Graph, Node, is_op, is_weight, spec_of
from cosmos_export.ir.program import Edge, Loop, Program
from cosmos_export.ir.serialize import graph_document, read_graph
from cosmos_export.ir.spec import INT4, Part, Rate, TensorSpec, WeightBinding, WeightSource
from cosmos_export.ir.verifier import verify
from cosmos_export.passes.assign_precision import Precision
from cosmos_export.passes.batch_guidance import NEGATIVE, NEGATIVE_LEN
from cosmos_export.passes.fold_schedule import SCHEDULE
from cosmos_export.passes.options import PassOptions, Ranges, linears_of
from cosmos_export.passes.pipeline import CAPTURE, passes_of, run_passes
from cosmos_export.passes.split_towers import CONDITIONING, REASONER
from cosmos_export.plan import Workload
from cosmos_export.precision.recipe import Assignment
from cosmos_export.precision.schemes import UNQUANTIZED
from cosmos_export.sampling import Schedule

DEVIATION = 0.02
"""Standard deviation of random weights. Zeros would let a card clock higher than it does at work."""
_FP8_DEVIATION = 100.0
"""Standard deviation of E4M3 values, so that they use its range: a few deviations come near its 448."""
_INT4_DEVIATION = 4.0
"""Approximate standard deviation of integers from −8 to 7, all equally likely."""
_AMAX = 5.0
"""Range of activations, which norms keep near one."""
_PROGRAMS = "programs"
_WRITE = "write them with `python benchmarks/geometry.py -o DIR`"
TINY: Mapping[str, Any] = {
    "num_hidden_layers": 2, "hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 32, "vocab_size": 256, "latent_channel": 16, "patch_latent_dim": 64,
    "rope_axes_dim": (6, 5, 5),
}  # fmt: skip
"""Changes of a geometry in a dry run: everything that takes time is small."""
PROMPT_DIMS = frozenset({"und_len", NEGATIVE_LEN})
"""Dims that differ from prompt to prompt: measured is the code that a bundle runs, which takes every value of them."""
GUIDED, PLAIN = "step-guided", "step-plain"
"""Bodies of the loop: both branches in one run, and one branch."""


@dataclass(frozen=True)
class GeometryGraphs:
    """The graphs of a request: what runs once per prompt, once per request, and once per step."""

    programs: Mapping[str, Program]
    """`GUIDED` and `PLAIN` → the program whose loop runs steps of that kind by itself, with every site labelled."""

    @property
    def graphs(self) -> dict[str, Graph]:
        """``reasoner``, ``conditioning`` where the model has actions, and the bodies `GUIDED` and `PLAIN`."""
        found: dict[str, Graph] = {}
        for kind, program in self.programs.items():
            found |= {name: one for name, one in program.graphs.items() if name not in (SCHEDULE, program.loop.body)}
            found[kind] = program.graphs[program.loop.body]
        return found

    @property
    def layers(self) -> int:
        """Layers of the towers, by their labels."""
        labels = [node.meta["precision"] for graph in self.graphs.values() for node in _labelled(graph)]
        return max((label.layer for label in labels), default=-1) + 1


def modalities_of(workload: Workload, geometry: Geometry) -> tuple[str, ...]:
    """Modalities of the model that a workload uses; a build for it takes no more."""
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

    if tiny:
        geometry = tiny_geometry(geometry)
    sources = {
        name: WeightSource(name, Path("absent.safetensors"), 0, torch.bfloat16, tuple(int(n) for n in tensor.shape))
        for name, tensor in expected_tensors(geometry).items()
    }
    program = capture(geometry.config, sources, modalities=modalities)
    options = PassOptions(over_steps=lambda tower, kind, layer: (UNQUANTIZED,))
    run_passes(program, passes_of(options, "form", "towers", "sites"))
    programs: dict[str, Program] = {}
    for closed in close_loop(program, schedule).values():
        guided = any(edge.instance == NEGATIVE for edge in closed.edges)
        programs.setdefault(GUIDED if guided else PLAIN, closed)
    return GeometryGraphs(programs)


def _labelled(graph: Graph) -> list[Node]:
    return [n for n in graph.nodes if "precision" in n.meta and (is_weight(n) or is_op(n, ops.JOINT_ATTENTION))]


def quantize_geometry(program: Program, assignment: Assignment, step: int) -> Program:
    """A copy of the labelled ``program`` as a build with the recipe of ``assignment`` has it at ``step``, with ranges
    that no data was seen for."""
    amax: dict[str, float] = {}
    attention: dict[tuple[int, str], float] = {}
    for node in (node for graph in program.graphs.values() for node in _labelled(graph)):
        if is_weight(node):
            amax |= {f"{linear}.input_amax": _AMAX for linear in linears_of(node.meta["weight"])}
        else:
            attention |= {(node.meta["precision"].layer, operand): _AMAX for operand in "qkv"}
    options = PassOptions(
        over_steps=assignment.over_steps, ranges=Ranges(amax, attention=attention), step=step
    )  # fmt: skip
    copy = program.copy()
    run_passes(copy, passes_of(options, "sites", "numbers"))
    return copy


def write_graphs(found: GeometryGraphs, folder: Path) -> list[Path]:
    """One document per graph, with weights as shapes alone, and one of what joins them and what their sites are."""
    folder.mkdir(parents=True, exist_ok=True)
    documents: dict[str, Any] = {
        name: graph_document(graph, "random.weights", lambda binding: (0, _bytes(binding.shape, binding.dtype)))
        for name, graph in found.graphs.items()
    }
    documents[_PROGRAMS] = {kind: _program_document(kind, program) for kind, program in found.programs.items()}
    paths = []
    for name, document in documents.items():
        paths.append(folder / f"{name}.json")
        paths[-1].write_text(json.dumps(document, separators=(",", ":")), encoding="utf-8")
    return paths


def _program_document(kind: str, program: Program) -> dict[str, Any]:
    """Parts of a program besides its graphs. The schedule's graph, which makes tables, is not measured and left out:
    what it hands on is given by the caller."""
    graphs = {name: graph for name, graph in program.graphs.items() if name != SCHEDULE}
    given = [edge.input for edge in program.edges if edge.source == SCHEDULE]
    return {
        "graphs": {name: kind if name == program.loop.body else name for name in graphs},
        "edges": [[e.source, e.output, e.target, e.input, e.instance] for e in program.edges if e.source != SCHEDULE],
        "dims": [[dim.name, dim.min, dim.max, dim.meaning] for dim in program.dims.values()],
        "rates": {name: rate.name for name, rate in program.rates.items()} | dict.fromkeys(given, Rate.STEP.name),
        "loop": program.loop.body,
        "carried": dict(program.loop.carried),
        "sites": {name: _sites(graph) for name, graph in graphs.items()},
    }


def _sites(graph: Graph) -> dict[str, tuple[str, str, int]]:
    """Tower, kind and layer of every labelled value, as recipes name places."""
    labels: dict[str, Precision] = {node.name: node.meta["precision"] for node in _labelled(graph)}
    return {name: (label.tower, label.kind, label.layer) for name, label in labels.items()}


def read_graphs(folder: Path) -> GeometryGraphs:
    """Read the files of `write_graphs`; UserError CX671 where there is nothing, or what does not fit together."""
    path = folder / f"{_PROGRAMS}.json"
    if not path.is_file():
        raise UserError("CX671", f"{folder} has no graphs", _WRITE)
    graphs: dict[str, Graph] = {}
    programs = {}
    for kind, document in read_object(path).items():
        try:
            programs[kind] = _program(kind, document, lambda name: graphs.get(name) or _graph(name, folder, graphs))
            verify(programs[kind], stage=f"reading {kind}")
        except (ValueError, KeyError, TypeError, AttributeError, InternalError) as error:
            raise UserError("CX671", f"{path.name}: {kind}: {error}", _WRITE) from error
    return GeometryGraphs(programs)


def _graph(name: str, folder: Path, known: dict[str, Graph]) -> Graph:
    if name not in (REASONER, CONDITIONING, GUIDED, PLAIN):
        raise ValueError(f"no graph is called {name!r}")
    known[name] = read_graph(read_object(folder / f"{name}.json"), folder)
    return known[name]


def _program(kind: str, document: Mapping[str, Any], graph: Callable[[str], Graph]) -> Program:
    if kind not in (GUIDED, PLAIN):
        raise ValueError(f"no kind of step is called {kind!r}")
    graphs = {_text(name): graph(_text(file)) for name, file in document["graphs"].items()}
    for name, sites in document["sites"].items():
        nodes = {node.name: node for node in graphs[name].nodes}
        for node, (tower, place, layer) in sites.items():
            label = Precision(_text(tower), _text(place), _integer(layer), (UNQUANTIZED,))
            nodes[node].meta["precision"] = label
    return Program(
        graphs=graphs,
        dims={n: Dim(_text(n), _integer(low), _integer(high), _text(why)) for n, low, high, why in document["dims"]},
        rates={name: Rate[_text(rate)] for name, rate in document["rates"].items()},
        loop=Loop(_text(document["loop"]), {name: _text(value) for name, value in document["carried"].items()}),
        edges=[Edge(*map(_text, edge)) for edge in document["edges"]],
        history=[CAPTURE],
    )


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{shown(value)} is not a text")
    return value


def _integer(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 2**31:
        raise ValueError(f"{shown(value)} is not a small whole number")
    return value


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
    "GUIDED", "PLAIN", "PROMPT_DIMS", "GeometryGraphs", "capture_graphs", "dims_of", "modalities_of",
    "quantize_geometry", "random_inputs", "random_weight", "random_weights", "read_graphs",
    "tiny_geometry", "write_graphs",
]  # fmt: skip
