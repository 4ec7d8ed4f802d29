"""Take the reasoner out of the denoising loop."""

from __future__ import annotations

from cosmos_export.ir import ops
from cosmos_export.ir.dims import product
from cosmos_export.ir.graph import Graph, Node, is_op, spec_of
from cosmos_export.ir.ops import aten
from cosmos_export.ir.program import Loop, Program
from cosmos_export.ir.rates import rates_of
from cosmos_export.ir.spec import Rate
from cosmos_export.passes.base import CannotApply, Pass, PassResult
from cosmos_export.passes.motion import hoist

REASONER, CONDITIONING, GENERATOR = "reasoner", "conditioning", "generator"


class SplitTowers(Pass):
    """Loop-invariant code motion over the joint step, in two parts.

    What follows from the token ids alone becomes graph ``reasoner`` (once per prompt); what follows from the rest of
    the request, rotary tables and embodiment matrices, becomes ``conditioning`` (once per request); the loop's body
    stays as ``generator``. Nothing is trimmed here: `resolve_packing`, which takes the rows of the towers apart, has
    left the last reasoner layer with its key and value, because nothing else of it is read.

        joint(ids, latents, t)  =  generator(latents, t, reasoner(ids), conditioning(request))

    The generator may read the prompt as keys and values of attention and in no other way. A program in which an
    operation on carried values or on values of the request reads a prompt value otherwise, or in which a reasoner reads
    the generator, is refused with the first such operation (CX220): a guided request has two prompts, and what follows
    from one of them cannot be a table that both share.
    Numerical effect: none, the same operations run.
    """

    name = "split_towers"
    law = "joint(ids, x, t) = generator(x, t, reasoner(ids), conditioning(request))"
    phase = "towers"
    # Until the split both rotary tables are in one graph, and what makes them independent is visible.
    after = ("shift_rope",)

    def run(self, program: Program) -> PassResult:
        result = PassResult()
        body = program.graphs[program.loop.body]
        if not any(rates_of(program, body)[n] is Rate.PROMPT for n in body.calls()):
            return result
        self._refuse_crossing(program, body)
        labels = _memory_names(body)
        body.name = GENERATOR
        program.graphs = {GENERATOR if g is body else n: g for n, g in program.graphs.items()}
        program.loop = Loop(GENERATOR, program.loop.carried)

        memory = hoist(program, GENERATOR, {Rate.PROMPT}, REASONER, lambda n: labels.get(n, n.name), list(labels))
        shared = hoist(program, GENERATOR, {Rate.REQUEST}, CONDITIONING, _conditioning_name)
        result.changes["keys and values computed once a prompt"] = len(memory)
        result.changes["tables computed once a request"] = len(shared)
        result.changes = +result.changes
        return result

    def _refuse_crossing(self, program: Program, body: Graph) -> None:
        rates = rates_of(program, body)
        for node in body.calls():
            if rates[node] is Rate.PROMPT or _feeds_attention_memory(node):
                continue
            as_memory = node.args[1:] if is_op(node, ops.ATTENTION) and rates[node] >= Rate.STEP else ()
            for operand in node.all_input_nodes:
                if not rates[operand].follows_prompt or (operand in as_memory and operand is not node.args[0]):
                    continue
                often = "in every step" if rates[node] >= Rate.STEP else "with every request"
                raise CannotApply(
                    self.name,
                    node,
                    f"reads the prompt's value `{operand.name}` together with what changes {often}, and not as key or "
                    "value of attention: the reasoner cannot leave the loop",
                )


def _feeds_attention_memory(node: Node) -> bool:
    """``node`` joins rows that are read only as key or value of attention."""
    return is_op(node, aten.cat.default) and all(
        is_op(user, ops.ATTENTION) and user.args[0] is not node for user in node.users
    )


def _memory_names(graph: Graph) -> dict[Node, str]:
    """`key_i` and `value_i` for the operands of the i-th attention that joins rows."""
    labels: dict[Node, str] = {}
    index = 0
    for node in graph.calls(ops.ATTENTION):
        joined = [a for a in node.args[1:3] if is_op(a, aten.cat.default)]
        if len(joined) != 2:
            continue
        for kind, cat in zip(("key", "value"), joined, strict=True):
            labels |= dict.fromkeys(cat.args[0], f"{kind}_{index}")
        index += 1
    return labels


def _conditioning_name(node: Node) -> str:
    for user in node.users:
        if is_op(user, ops.ROTARY):
            return "rotary_cos" if user.args[1] is node else "rotary_sin"
    module = node.meta.get("module", "")
    return module.replace(".", "_") if module else node.name


def memory_bytes_per_token(program: Program) -> int:
    """Bytes of keys and values that one prompt token leaves behind."""
    total = 0
    for node in program.graphs[REASONER].outputs.values():
        spec = spec_of(node)
        total += int(product(spec.shape[1:])) * spec.dtype.itemsize
    return total
