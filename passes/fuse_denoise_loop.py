"""Guidance and sampler inside the loop."""

from __future__ import annotations

from cosmos_export.diagnostics import UnsupportedError
from cosmos_export.ir.graph import Graph, Node, copy_node, is_input, spec_of
from cosmos_export.ir.ops import aten
from cosmos_export.ir.program import Loop, Program
from cosmos_export.ir.rates import rates_of
from cosmos_export.ir.spec import Rate
from cosmos_export.passes.base import Pass, PassResult
from cosmos_export.passes.batch_guidance import NEGATIVE
from cosmos_export.passes.sampler import COEFFICIENTS, MASKS, carried_state, sampler_graph
from cosmos_export.sampling import Schedule

LOOP = "denoise"
"""Name of the model in which the loop runs by itself."""
_LATENT, _NOISE = "_latent", "_noise"


class FuseDenoiseLoop(Pass):
    """The loop's body takes the sampler's state and returns its next one: the loop can run without a host.

        x' = sampler(x, generator(cast(x)), generator'(cast(x)), coefficients[step])

    The state is fp32; the generator reads it in its own type, as the published pipeline casts its latents. Guidance is
    ``u + g·(c − u)`` in fp32. What the body takes of a step is one row of the time table, one of the sampler's
    coefficients, and for a stochastic sampler its noise. Runs after `batch_guidance` where the schedule is guided.
    Numerical effect: none, the sampler's own arithmetic.
    Refused: a schedule in which only some steps are guided (CX223): its loop has several bodies.
    """

    name = "fuse_denoise_loop"

    def __init__(self, schedule: Schedule) -> None:
        self._schedule = schedule

    def run(self, program: Program) -> PassResult:
        result = PassResult()
        loop = program.loop
        if loop.steps is not None:
            return result
        guided = set(self._schedule.guided)
        if len(guided) != 1:
            count = sum(self._schedule.guided)
            raise UnsupportedError(
                "CX223",
                f"{count} of {self._schedule.steps} steps are guided (guidance interval "
                f"{self._schedule.guidance_interval}); a loop in one graph has one body",
                "use a schedule without an interval, or drive the loop from the host",
            )
        body = program.graphs[loop.body]
        if guided == {True} and not any(name.startswith(f"{NEGATIVE}_") for name in body.outputs):
            raise UnsupportedError(
                "CX223", "the schedule is guided, and the loop's body has one branch", "run batch_guidance first"
            )
        latents = {name.removesuffix(_LATENT): spec_of(body.inputs[name]) for name in loop.carried}
        sampler = sampler_graph(self._schedule, latents, guided=guided == {True})
        new = Graph(body.name)
        mapping: dict[Node, Node] = {}
        state: dict[str, Node] = {}
        for name, node in sampler.inputs.items():
            if name.endswith("_sample"):
                state[name] = new.add_input(name, spec_of(node))
        for node in body.nodes:
            if is_input(node) and node.name in loop.carried:
                sample = state[f"{node.name.removesuffix(_LATENT)}_sample"]
                wanted = spec_of(node).dtype
                mapping[node] = sample
                if spec_of(sample).dtype != wanted:
                    mapping[node] = new.call(aten._to_copy.default, sample, dtype=wanted, by=self.name)
            elif node.op == "placeholder":
                mapping[node] = copy_node(new, node, mapping)
        for node in body.nodes:
            if node.op != "placeholder":
                mapping[node] = copy_node(new, node, mapping)
        results = {name: mapping[node] for name, node in body.outputs.items()}
        self._inline(program, new, sampler, results, state)
        new.eliminate_dead_code()
        program.graphs[loop.body] = new
        carried = carried_state(self._schedule, latents)
        rates = rates_of(program, new)
        rows = tuple(n for n, node in new.inputs.items() if rates[node] is Rate.STEP or n.endswith(_NOISE))
        program.loop = Loop(loop.body, carried, rows, self._schedule.steps)
        for name in list(program.rates):
            if name in loop.carried:
                del program.rates[name]
        result.changes["latents updated in the loop"] = len(latents)
        return result

    def _inline(
        self, program: Program, new: Graph, sampler: Graph, results: dict[str, Node], state: dict[str, Node]
    ) -> None:
        """The sampler's operations behind the generator's, its inputs joined to what the body has."""
        mapping: dict[Node, Node] = {}
        for node in sampler.nodes:
            name = node.name
            if not is_input(node):
                mapping[node] = copy_node(new, node, mapping)
            elif name in state:
                mapping[node] = state[name]
                program.rates[name] = Rate.CARRIED
            elif name.endswith("_velocity_cond"):
                mapping[node] = results[name.removesuffix("_cond")]
            elif name.endswith("_velocity_uncond"):
                mapping[node] = results[f"{NEGATIVE}_{name.removesuffix('_uncond')}"]
            elif name in new.inputs:
                mapping[node] = new.inputs[name]
            else:
                mapping[node] = new.add_input(name, spec_of(node))
                program.rates[name] = self._rate(name)
        new.set_outputs({name: mapping[node] for name, node in sampler.outputs.items()})

    def _rate(self, name: str) -> Rate:
        if name in {mask for along in MASKS.values() for mask in along.values()}:
            return Rate.REQUEST
        return Rate.STEP if name == COEFFICIENTS else Rate.CARRIED
