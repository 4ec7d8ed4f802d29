"""Losses by quantization: each linear by itself, and the velocity of whole steps.

Everything runs in the interpreter, which holds one weight at a time: a model of any size is measured in the memory of
its activations.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import inf, isfinite, log10, sqrt

import torch

from cosmos_export.evaluation.sampled import generated, sampled_by, step_noise
from cosmos_export.ir import ops
from cosmos_export.ir.formats import E4M3
from cosmos_export.ir.graph import Graph, Node, is_op, is_weight
from cosmos_export.ir.interpreter import Tensors, Weights, compute_value, run_program
from cosmos_export.ir.ops import Trait, aten
from cosmos_export.ir.packing import E2M1_MAX, E4M3_MAX
from cosmos_export.ir.program import Program
from cosmos_export.ir.spec import Transform
from cosmos_export.passes.assign_precision import Precision
from cosmos_export.passes.insert_quantization import InsertQuantization
from cosmos_export.passes.options import linears_of
from cosmos_export.precision.schemes import SCHEMES, UNQUANTIZED
from cosmos_export.sampling import Schedule

Observer = Callable[[Node, torch.Tensor, torch.Tensor, torch.Tensor], None]
"""A linear, its input [rows, K], its weight [N, K] and its result."""
_ROUNDINGS = ops.having(Trait.ROUNDS) - ops.having(Trait.ATTENDS)


def observe_inputs(program: Program, inputs: Tensors, weights: Weights) -> dict[str, float]:
    """``<linear>.input_amax`` of every linear of ``program`` in one step, in float32."""
    found: dict[str, float] = {}

    def see(node: Node, x: torch.Tensor, weight: torch.Tensor, y: torch.Tensor) -> None:
        for linear in linears_of(node.args[1].meta["weight"]):
            amax = float(x.abs().amax()) if x.numel() else 0.0
            found[f"{linear}.input_amax"] = max(found.get(f"{linear}.input_amax", 0.0), amax)

    run_program(program, inputs, weights, compute=torch.float32, observe=watch_linears(see))
    return found


def watch_linears(see: Observer) -> Callable[[Node, Mapping[Node, torch.Tensor]], None]:
    """An observer for the interpreter that sees linears with plain weights."""

    def observe(node: Node, values: Mapping[Node, torch.Tensor]) -> None:
        if node.target is aten.linear.default and is_weight(node.args[1]):
            see(node, values[node.args[0]], values[node.args[1]], values[node])

    return observe


def wrong_scales(
    program: Program, linears: Mapping[str, float], attention: Mapping[tuple[int, str], float]
) -> list[str]:
    """Constants that activations are divided by, and are not what the ranges in a scale table make of them.

    ``linears``: the range of the input of each; ``attention``: by layer of the generator and operand. A range that is
    off by less than a linear's own error is seen nowhere else. Read from the graphs as they are, by other words than
    those of the pass: each constant is the largest range of all that read it over the largest number of its format.
    """
    found = []

    def compare(where: str, node: Node, wanted: Sequence[float]) -> None:
        scale = node.meta["constant"].double().flatten() if "constant" in node.meta else torch.empty(0)
        expected = torch.tensor(wanted, dtype=torch.float64)
        if scale.shape != expected.shape or not torch.allclose(scale, expected, rtol=_FLOAT32, atol=0):
            found.append(f"{where}: {[float(f'{s:.4g}') for s in scale]} for {[float(f'{w:.4g}') for w in wanted]}")

    for graph in program.graphs.values():
        for node in graph.calls(*_ROUNDINGS):
            widened = [user for user in node.users if is_op(user, ops.DEQUANTIZE)]
            read = widened if is_op(node, ops.QUANTIZE) else [node]
            names = [name for value in read for user in value.users for name in _linears_from(user)]
            if names:
                largest = E4M3_MAX * (1.0 if is_op(node, ops.QUANTIZE) else E2M1_MAX)
                wanted = max(linears.get(name, inf) for name in names) / largest
                for one in (node, *widened):
                    compare(names[0], one.args[1], [wanted])
    for node in program.graphs[program.loop.body].calls(*ops.having(Trait.JOINT)):
        if "precision" not in node.meta:
            continue
        layer = node.meta["precision"].layer
        q, k, v = (attention.get((layer, operand), inf) / E4M3_MAX for operand in "qkv")
        if is_op(node, ops.JOINT_ATTENTION_FP8):
            compare(f"attention of layer {layer}", node.args[5], [q * float(node.args[-1]), k, v])
        for operand, wanted in ((node.args[3], k), (node.args[4], v)):
            if is_op(operand, ops.DEQUANTIZE):
                compare(f"keys and values of layer {layer}", operand.args[1], [wanted])
                for edge in program.edges_into(program.loop.body):
                    if operand.args[0].name == edge.input:
                        narrow = program.graphs[edge.source].outputs[edge.output]
                        compare(f"`{edge.output}` of the prompt", narrow.args[1], [wanted])
    return found


_FLOAT32 = 2.0**-22


def _linears_from(node: Node) -> tuple[str, ...]:
    """Names of the linears in the quantized product ``node``; none for anything else."""
    if not is_op(node, aten.linear.default):
        return ()
    packed = [n for n in node.args[1].all_input_nodes if is_weight(n) and n.meta["weight"].packing is not None]
    return linears_of(packed[0].meta["weight"]) if packed else ()


# -- G1: each linear by itself ----------------------------------------------------------------------------------------

LINEAR_MARGIN = 1.3
"""Largest loss of a linear, in shares of `Scheme.linear_error`."""


@dataclass(frozen=True)
class LinearLoss:
    """Loss of one quantized linear on the inputs that it has in the unquantized model."""

    tower: str
    kind: str
    layer: int
    scheme: str
    relative: float
    """‖y' − y‖ / ‖y‖ over all inputs."""
    limit: float

    @property
    def site(self) -> str:
        return f"{self.tower}.{self.kind}[{self.layer}]"

    @property
    def sqnr_db(self) -> float:
        return -20 * log10(self.relative) if self.relative > 0 else inf

    @property
    def passed(self) -> bool:
        return self.relative <= self.limit


def linear_losses(
    plain: Program,
    quantized: Mapping[int, Program],
    inputs: Sequence[Tensors],
    weights: Weights,
    *,
    whole: bool = True,
) -> list[LinearLoss]:
    """The loss of every quantized linear in each of its schemes, each on what it reads in the unquantized ``plain``.

    ``plain`` is labelled by `assign_precision`; ``quantized`` is what it becomes, by the step from which on it is that.
    The quantized linear is the one in its graph, with its quantizers and packed weight: what is wrong there shows here.
    Weights are told by what they are made of, in whatever order. One without an unquantized counterpart counts as lost
    altogether, if ``plain`` is the ``whole`` model and not its beginning.
    """
    forms: dict[_Form, Node] = {}
    for step, program in quantized.items():
        for graph in program.graphs.values():
            for names, node in _quantized_linears(graph):
                forms.setdefault((frozenset(names), _precision_of(node).at(step)), node)
    schemes: dict[frozenset[str], list[str]] = {}
    for keys, scheme in forms:
        schemes.setdefault(keys, []).append(scheme)
    error: dict[_Form, list[float]] = {}

    def see(node: Node, x: torch.Tensor, weight: torch.Tensor, y: torch.Tensor) -> None:
        keys = frozenset(node.args[1].meta["weight"].keys)
        for scheme in schemes.get(keys, ()) if y.numel() else ():
            lossy = _run_linear(forms[keys, scheme], x, weights)
            sums = error.setdefault((keys, scheme), [0.0, 0.0])
            sums[0] += float((lossy.double() - y.double()).square().sum())
            sums[1] += float(y.double().square().sum())

    for one in inputs:
        run_program(plain, one, weights, compute=torch.float32, observe=watch_linears(see))
    losses = []
    for form in (*error, *(forms.keys() - error.keys() if whole else ())):
        lost, total = error.get(form, (inf, 1.0))
        place, scheme = _precision_of(forms[form]), form[1]
        limit = SCHEMES[scheme].linear_error * LINEAR_MARGIN
        losses.append(LinearLoss(place.tower, place.kind, place.layer, scheme, _share(lost, total), limit))
    return losses


_Form = tuple[frozenset[str], str]
"""A quantized linear: the keys of its weight, and its scheme."""


def _precision_of(linear: Node) -> Precision:
    """The label of a quantized linear's weight."""
    found: Precision = next(n for n in linear.args[1].all_input_nodes if "precision" in n.meta).meta["precision"]
    return found


def _share(lost: float, whole: float) -> float:
    """√(lost / whole), of sums of squares; nothing is lost of nothing."""
    if lost == 0 and isfinite(whole):
        return 0.0
    return sqrt(lost / whole) if whole > 0 and isfinite(lost) else inf


def _quantized_linears(graph: Graph) -> Iterator[tuple[tuple[str, ...], Node]]:
    """Linears with a packed weight, by the keys of what is packed."""
    for node in graph.calls(aten.linear.default):
        packed = [n for n in node.args[1].all_input_nodes if is_weight(n) and n.meta["weight"].packing is not None]
        if packed:
            yield packed[0].meta["weight"].keys, node


_COMPUTED = _ROUNDINGS | ops.having(Trait.WIDENS)
_PUT = (aten.mul.Tensor, aten.linear.default, aten.add.Tensor)


def _run_linear(linear: Node, x: torch.Tensor, weights: Weights) -> torch.Tensor:
    """The result of a quantized linear whose unquantized form reads ``x``: quantizers, pre-scale and product."""

    def value(node: Node) -> torch.Tensor:
        # A factor before the product, and a part of low rank beside it, carry the name of the pass that put them there.
        put = is_op(node, *_PUT) and InsertQuantization.name in node.meta["passes"]
        if node.op == "placeholder" or is_op(node, *_COMPUTED) or put:
            return compute_value(node, weights, {n: value(n) for n in node.all_input_nodes}, torch.float32)
        if is_op(node, ops.RMS_NORM) and node.args[1].meta["weight"].transform is Transform.SCALE:
            binding = node.args[1].meta["weight"]
            factors = replace(binding, sources=binding.sources[1:], transform=Transform.IDENTITY, dtype=torch.float32)
            return x * weights(factors)
        return x

    beside = [
        user for user in linear.users if is_op(user, aten.add.Tensor) and InsertQuantization.name in user.meta["passes"]
    ]
    return value(beside[0] if beside else linear)


# -- G2: whole steps --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StepLoss:
    """How far a quantized step is from that of the unquantized model at the same latents."""

    step: int
    relative: float
    cosine: float
    rounding: float | None = None
    """Loss of the same step by independent rounding of the same values (`rounding_losses`); None: not measured."""
    modality: str = ""
    """The modality whose velocity alone it is of; empty: of all that is generated."""

    @property
    def share(self) -> float | None:
        """The loss in shares of what rounding alone loses."""
        if self.rounding is None:
            return None
        return self.relative / self.rounding if self.rounding > 0 else 0.0 if self.relative == 0 else inf


def step_losses(
    plain: Program,
    quantized: Callable[[int], Program],
    recorded: Sequence[tuple[int, Tensors]],
    weights: Weights,
    draws: int = 0,
) -> list[StepLoss]:
    """Each of the ``recorded`` steps (index in the schedule, inputs) again, quantized as ``quantized`` says for it: the
    velocity of all that is generated, and where that is several modalities, of each. With ``draws`` of rounding errors
    also what they lose."""
    losses = []
    for step, inputs in recorded:
        expected = _velocities(run_program(plain, inputs, weights, compute=torch.float32), inputs)
        found = _velocities(run_program(quantized(step), inputs, weights, compute=torch.float32), inputs)
        rounding = rounding_losses(plain, step, inputs, expected, weights, draws) if draws else {}
        for name, a in expected.items():
            b = found[name]
            scale, lost = float(a.norm() * b.norm()), float((b - a).norm())
            cosine = float(a @ b) / scale if scale > 0 and isfinite(scale) else 1.0 if lost == 0 else -1.0
            losses.append(StepLoss(step, relative_loss(a, b), cosine, rounding.get(name), name))
    return losses


def _velocities(results: Tensors, inputs: Tensors) -> dict[str, torch.Tensor]:
    """float64 velocities of what is generated: all together under an empty name, and by modality where several are."""
    found = {}
    for output, value in results.items():
        modality = output.removesuffix("_velocity")
        own = value.double()[generated(inputs, modality).expand(value.shape)]
        if own.numel():
            found[modality] = own
    return {"": torch.cat([*found.values(), torch.empty(0).double()]), **(found if len(found) > 1 else {})}


def relative_loss(expected: torch.Tensor, found: torch.Tensor) -> float:
    """‖found − expected‖ / ‖expected‖; nothing is lost of nothing."""
    return _share(float((found - expected).norm()) ** 2, float(expected.norm()) ** 2)


def rounding_losses(
    plain: Program, step: int, inputs: Tensors, expected: Tensors, weights: Weights, draws: int
) -> dict[str, float]:
    """Losses of ``step`` of the unquantized ``plain``, by modality as ``expected`` has it, where every value that its
    schemes round to E4M3 is off by an independent error of that size, uniform over the distance of two codes: a root
    mean square over ``draws``.

    No scale, quantizer or packed weight takes part, and no range: it is what the format costs this network, whatever
    the network is. The softmax of FP8 attention has its error at the values, which are multiplied by it.
    """
    lost = dict.fromkeys(expected, 0.0)
    for seed in range(draws):
        generator = torch.Generator().manual_seed(seed)

        def off(value: torch.Tensor, generator: torch.Generator = generator) -> torch.Tensor:
            return rounded_at_random(value, generator)

        def follow(
            node: Node, values: Mapping[Node, torch.Tensor], off: Callable[[torch.Tensor], torch.Tensor] = off
        ) -> torch.Tensor | None:
            return _off(node, values, step, weights, off)

        found = _velocities(run_program(plain, inputs, weights, compute=torch.float32, follow=follow), inputs)
        for name, wanted in expected.items():
            lost[name] += relative_loss(wanted, found[name]) ** 2 / draws
    return {name: sqrt(value) for name, value in lost.items()}


def _off(
    node: Node,
    values: Mapping[Node, torch.Tensor],
    step: int,
    weights: Weights,
    off: Callable[[torch.Tensor], torch.Tensor],
) -> torch.Tensor | None:
    """The result of a quantized product with its rounded operands ``off``; None for what is not quantized."""
    changed: list[Node] = []
    if is_op(node, aten.linear.default) and is_weight(node.args[1]) and "precision" in node.args[1].meta:
        scheme, (x, weight) = SCHEMES[_label(node.args[1]).at(step)], node.args[:2]
        forms = (x, scheme.activation), (weight, scheme.weight)
        changed = [operand for operand, form in forms if form is not None and form.values == E4M3]
    elif is_op(node, ops.JOINT_ATTENTION) and "precision" in node.meta:
        query, key, value, prefix_key, prefix_value = node.args[:5]
        if SCHEMES[_label(node).at(step)].attention is not None:
            changed = [query, key, value, value, prefix_key, prefix_value, prefix_value]
        elif _label(node).prefix != UNQUANTIZED:
            changed = [prefix_key, prefix_value]
    if not changed:
        return None
    seen = dict(values)
    for operand in changed:
        seen[operand] = off(seen[operand])
    return compute_value(node, weights, seen, torch.float32)


def _label(node: Node) -> Precision:
    found: Precision = node.meta["precision"]
    return found


def rounded_at_random(value: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """float32 ``value`` and an error uniform over the distance of the two codes of E4M3 around it, at any scale."""
    flat, result = value.contiguous().flatten(), torch.empty(value.numel())
    for start in range(0, flat.numel(), _BLOCK):  # a weight is large
        block = flat[start : start + _BLOCK]
        spacing = torch.exp2(torch.frexp(block).exponent.float() - 1 - _MANTISSA_BITS)
        errors = torch.rand(block.shape, generator=generator).sub_(0.5).mul_(spacing)
        result[start : start + _BLOCK] = block + errors.where(block != 0, 0.0)
    return result.reshape(value.shape)


_BLOCK = 1 << 22
_MANTISSA_BITS = 3


def record_rollout(
    program: Program,
    inputs: Tensors,
    negative: torch.Tensor,
    schedule: Schedule,
    steps: Sequence[int],
    weights: Weights,
) -> tuple[list[tuple[int, dict[str, torch.Tensor]]], dict[str, torch.Tensor]]:
    """Inputs of ``steps`` (indices in the schedule) of a rollout of the unquantized ``program`` from ``inputs``' noise,
    and the samples that it ends with.

    The sampler is that of a bundle: guidance and update in float32 on the host. A stochastic sampler draws its noise
    from a fixed seed.
    """
    recorded: dict[int, dict[str, torch.Tensor]] = {}

    def step(index: int, now: Tensors) -> Tensors:
        if index in steps:
            recorded.setdefault(index, dict(now))  # the prompt comes before the negative prompt
        return run_program(program, now, weights, compute=torch.float32)

    final = roll_out(program, step, inputs, negative, schedule)
    return list(recorded.items()), final


def roll_out(
    program: Program,
    step: Callable[[int, Tensors], Tensors],
    inputs: Tensors,
    negative: torch.Tensor,
    schedule: Schedule,
) -> dict[str, torch.Tensor]:
    """The samples at the end of ``schedule``, by modality, where ``step`` gives the velocities of ``program``'s step of
    that number for its inputs."""
    samples = {n.replace("_latent", "_sample"): v for n, v in inputs.items() if n.endswith("_latent")}
    noise = step_noise(samples, schedule)
    final = sampled_by(step, program.loop.carried, inputs, negative, noise, schedule)
    return {name.removesuffix("_sample_final"): value for name, value in final.items()}
