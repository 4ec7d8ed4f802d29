"""The sampler's step as a graph: guidance and update of every latent, elementwise, the step's coefficients an input.

Formulas and columns are those of `cosmos_export.sampling.solvers`, whose numpy steps are the reference.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import reduce
from typing import Any

import torch

from cosmos_export.ir.graph import Graph, Node
from cosmos_export.ir.ops import aten
from cosmos_export.ir.spec import TensorSpec
from cosmos_export.sampling import COLUMNS, Schedule

COEFFICIENTS = "coefficients"
"""Input: this step's row of the schedule's table, float32."""

MASKS: Mapping[str, Mapping[int, str]] = {
    "vision": {2: "vision_mask"},
    "action": {0: "action_mask", 1: "action_columns"},
}
"""Axis → the 0/1 input along it, for each latent. Action columns beyond the embodiment's width are 0."""

_UNIPC_STATE = ("sample", "last", "m0", "m1")
_BY = "sampler"


def carried_state(schedule: Schedule, latents: Mapping[str, TensorSpec]) -> dict[str, str]:
    """Input → output that is its next value. At the first step all but the samples are 0."""
    kinds = _UNIPC_STATE if schedule.sampler == "unipc" else ("sample",)
    return {f"{name}_{kind}": f"{name}_{kind}_next" for name in latents for kind in kinds}


def sampler_graph(
    schedule: Schedule,
    latents: Mapping[str, TensorSpec],
    *,
    guided: bool,
    masks: Mapping[str, Mapping[int, str]] = MASKS,
) -> Graph:
    """One sampler step of all ``latents`` (name → type and shape of its velocity, dims may be symbolic).

    Inputs, for a latent ``vision``: ``vision_velocity_cond`` and where ``guided`` ``vision_velocity_uncond``, in the
    velocity's type; the masks of ``masks`` along single axes, in the same type; float32 state ``vision_sample`` and for
    UniPC ``_last``, ``_m0``, ``_m1``, for the distilled sampler ``vision_noise``. Outputs: ``carried_state``.
    Where a mask is 0 the sample stays bit for bit what it is; this also pins clean frames in the distilled sampler,
    which would drown them in noise. A step for which ``schedule.guided`` is false takes a graph that is not guided.

    All arithmetic is float32: guidance is ``u + g·(c − u)`` in this order, as published. It equals the published
    scheduler's up to rounding; only coefficients follow from the schedule, so one graph serves any with its sampler.
    """
    graph = Graph("sampler")
    columns = COLUMNS[schedule.sampler]
    row = graph.add_input(COEFFICIENTS, TensorSpec(torch.float32, (len(columns),)))
    inputs = {name: _inputs(graph, schedule, name, spec, guided) for name, spec in latents.items()}
    held = {name: _mask_inputs(graph, spec, masks.get(name, {})) for name, spec in latents.items()}
    coefficient = {name: graph.call(aten.select.int, row, 0, i, by=_BY) for i, name in enumerate(columns)}
    update = _unipc if schedule.sampler == "unipc" else _distilled
    outputs: dict[str, Node] = {}
    for name, spec in latents.items():
        make = _Maker(graph)
        velocity = _guide(make, inputs[name], coefficient["guidance"])
        state = update(make, coefficient, inputs[name], velocity)
        state["sample"] = _hold(make, state["sample"], inputs[name]["sample"], held[name], spec)
        outputs |= {f"{name}_{kind}_next": value for kind, value in state.items()}
    graph.set_outputs(outputs)
    graph.eliminate_dead_code()
    return graph


class _Maker:
    """Arithmetic on nodes."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph

    def add(self, a: Node, b: Node | float) -> Node:
        return self._call(aten.add.Tensor, a, b)

    def sub(self, a: Node, b: Node) -> Node:
        return self._call(aten.sub.Tensor, a, b)

    def mul(self, a: Node, b: Node | float) -> Node:
        return self._call(aten.mul.Tensor, a, b)

    def combine(self, coefficients: Mapping[str, Node], **values: Node) -> Node:
        """Sum of ``values``, each times the coefficient of its name, from left to right."""
        return reduce(self.add, (self.mul(value, coefficients[name]) for name, value in values.items()))

    def wide(self, x: Node) -> Node:
        return self._call(aten._to_copy.default, x, dtype=torch.float32)

    def view(self, x: Node, shape: tuple[Any, ...]) -> Node:
        return self._call(aten.view.default, x, shape)

    def _call(self, target: Any, *args: Any, **kwargs: Any) -> Node:
        return self.graph.call(target, *args, by=_BY, **kwargs)


def _inputs(graph: Graph, schedule: Schedule, name: str, spec: TensorSpec, guided: bool) -> dict[str, Node]:
    wide = TensorSpec(torch.float32, spec.shape)
    specs = dict.fromkeys(_UNIPC_STATE, wide) if schedule.sampler == "unipc" else {"sample": wide, "noise": wide}
    specs |= {"velocity_cond": spec} | ({"velocity_uncond": spec} if guided else {})
    return {kind: graph.add_input(f"{name}_{kind}", one) for kind, one in specs.items()}


def _mask_inputs(graph: Graph, spec: TensorSpec, along: Mapping[int, str]) -> dict[int, Node]:
    return {axis: graph.add_input(name, TensorSpec(spec.dtype, (spec.shape[axis],))) for axis, name in along.items()}


def _guide(make: _Maker, inputs: Mapping[str, Node], guidance: Node) -> Node:
    cond = make.wide(inputs["velocity_cond"])
    if "velocity_uncond" not in inputs:
        return cond
    uncond = make.wide(inputs["velocity_uncond"])
    return make.add(uncond, make.mul(make.sub(cond, uncond), guidance))


def _unipc(make: _Maker, c: Mapping[str, Node], inputs: Mapping[str, Node], velocity: Node) -> dict[str, Node]:
    x, last, m0, m1 = (inputs[kind] for kind in _UNIPC_STATE)
    d = make.sub(x, make.mul(velocity, c["sigma"]))
    corrected = make.combine(c, c_sample=x, c_last=last, c_m0=m0, c_m1=m1, c_d=d)
    sample = make.combine(c, p_sample=corrected, p_d=d, p_m0=m0)
    return {"sample": sample, "last": corrected, "m0": d, "m1": m0}


def _distilled(make: _Maker, c: Mapping[str, Node], inputs: Mapping[str, Node], velocity: Node) -> dict[str, Node]:
    d = make.sub(inputs["sample"], make.mul(velocity, c["sigma"]))
    return {"sample": make.combine(c, signal=d, noise=inputs["noise"])}


def _hold(make: _Maker, new: Node, old: Node, masks: Mapping[int, Node], spec: TensorSpec) -> Node:
    """``m·new + (1 − m)·old`` for the product m of the masks: exact, since each is 0 or 1."""
    for axis, mask in masks.items():
        along = make.view(make.wide(mask), tuple(s if i == axis else 1 for i, s in enumerate(spec.shape)))
        rest = make.add(make.mul(along, -1.0), 1.0)
        new = make.add(make.mul(new, along), make.mul(old, rest))
    return new
