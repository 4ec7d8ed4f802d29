"""Guidance and sampler inside the loop."""

from __future__ import annotations

from cosmos_export.diagnostics import UnsupportedError
from cosmos_export.ir.graph import Graph, Node, copy_node, is_input, spec_of
from cosmos_export.ir.ops import aten
from cosmos_export.ir.program import Loop, Program
from cosmos_export.ir.rates import rates_of
from cosmos_export.ir.spec import Rate
from cosmos_export.passes.base import Effect, Pass, PassResult
from cosmos_export.passes.batch_guidance import NEGATIVE
from cosmos_export.passes.options import PassOptions
from cosmos_export.passes.sampler import COEFFICIENTS, MASKS, carried_state, sampler_graph
from cosmos_export.sampling import Schedule, Segment

_LATENT, _SAMPLE, _NOISE = "_latent", "_sample", "_noise"


class FuseDenoiseLoop(Pass):
    """The loop's body takes the sampler's state and returns its next one: the loop can run without a host.

        x' = sampler(x, generator(cast(x)), generator'(cast(x)), coefficients[step])

    The loop runs one segment of the schedule. Before the first step the sampler's memory is zeros; a later segment
    takes the whole state from the one before it, and only the last returns nothing but the samples.
    The state is fp32; the generator reads it in its own type, as the published pipeline casts its latents. Guidance is
    ``u + g·(c − u)`` in fp32. What the body takes of a step is one row of the time table, one of the sampler's
    coefficients, and for a stochastic sampler its noise. Runs after `batch_guidance` where the segment is guided.
    Numerical effect: none, the sampler's own arithmetic.
    Refused: a guided segment over a body with one branch (CX223).
    """

    name = "fuse_denoise_loop"
    law = "sampler(x, generator(x)) = one body of a loop that carries the sampler's state in fp32"
    effect = Effect.INTERFACE
    phase = "loop"
    after = ("batch_guidance",)

    def __init__(self, schedule: Schedule, segment: Segment) -> None:
        self._schedule = schedule
        self._segment = segment

    @classmethod
    def made(cls, options: PassOptions) -> Pass | None:
        return None if options.segment is None or options.schedule is None else cls(options.schedule, options.segment)

    def run(self, program: Program) -> PassResult:
        result = PassResult()
        loop = program.loop
        if loop.steps is not None:
            return result
        body = program.graphs[loop.body]
        if self._segment.guided and not any(name.startswith(f"{NEGATIVE}_") for name in body.outputs):
            raise UnsupportedError(
                "CX223", "the segment is guided, and the loop's body has one branch", "run batch_guidance first"
            )
        latents = {name.removesuffix(_LATENT): spec_of(body.inputs[name]) for name in loop.carried}
        sampler = sampler_graph(self._schedule, latents, guided=self._segment.guided)
        new = Graph(body.name)
        mapping: dict[Node, Node] = {}
        state: dict[str, Node] = {}
        for name, node in sampler.inputs.items():
            if name.endswith(_SAMPLE):
                state[name] = new.add_input(name, spec_of(node))
        for node in body.nodes:
            if is_input(node) and node.name in loop.carried:
                sample = state[f"{node.name.removesuffix(_LATENT)}{_SAMPLE}"]
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
        program.loop = self._closed(program, new, carried_state(self._schedule, latents))
        for name in list(program.rates):
            if name in loop.carried:
                del program.rates[name]
        result.changes["latents updated in the loop"] = len(latents)
        return result

    def _closed(self, program: Program, body: Graph, carried: dict[str, str]) -> Loop:
        rates = rates_of(program, body)
        rows = tuple(n for n, node in body.inputs.items() if rates[node] is Rate.STEP or n.endswith(_NOISE))
        start, steps = self._segment.start, self._segment.steps
        samples, everything = tuple(n for n in carried if n.endswith(_SAMPLE)), tuple(carried)
        taken = samples if start == 0 else everything
        returned = samples if start + steps == self._schedule.steps else everything
        return Loop(body.name, carried, rows, start, steps, taken, returned)

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
