"""Effect of a recipe on sizes and speed, added up over the sites of a model.

Which site gets which scheme is the recipe's (`cosmos_export.precision.recipe`); what a scheme stores and computes in is
the scheme's own (`cosmos_export.precision.schemes`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from types import MappingProxyType

from cosmos_export.checkpoint.geometry import Geometry
from cosmos_export.precision.recipe import Assignment, Recipe, resolve_recipe, segment_keys
from cosmos_export.precision.scheme import WIDE_BITS
from cosmos_export.precision.schemes import SCHEMES
from cosmos_export.precision.sites import CORE, GEN, LINEARS, PROMPT_KV, UND
from cosmos_export.sampling import Schedule
from cosmos_export.targets import Target, load_target
from cosmos_export.targets.backends import backend_of

Shares = Mapping[str, float]
"""Scheme → share of a tower's linears, by parameters, which is by work too."""


@dataclass(frozen=True)
class Mix:
    """Schemes of one pass of a tower."""

    linears: Shares
    attention: Shares
    """Scheme → share of the layers."""

    @property
    def computes(self) -> frozenset[str]:
        """Types whose rates it needs."""
        return frozenset(SCHEMES[name].computes for name in (*self.linears, *self.attention))

    @property
    def bits(self) -> float:
        """Bits per weight of its linears, on average."""
        return sum(share * SCHEMES[name].bits for name, share in self.linears.items())

    @property
    def label(self) -> str:
        """The schemes of the linears, the largest share first."""
        return "+".join(sorted(self.linears, key=lambda name: -self.linears[name]))


@dataclass(frozen=True)
class PlannedPrecision:
    """A recipe for one model and schedule, added up."""

    recipe: str
    reasoner: Mix
    steps: tuple[tuple[Mix, int], ...]
    """The generator's mixes, each with the number of steps that have it, in the order they first appear."""
    of_step: tuple[int, ...]
    """Index in ``steps`` of what each step has."""
    alone: tuple[int, ...]
    """Steps that multiply narrow weights by wide activations: in a loop that TensorRT-RTX builds, each is an engine."""

    cache_share: float = 1.0
    """Bytes of a prompt's keys and values beside those in bf16."""

    @property
    def generator(self) -> Mix:
        """Schemes of most steps. The stored weights are the same in all of them."""
        return max(self.steps, key=lambda entry: entry[1])[0]

    def engines(self, schedule: Schedule, target: Target, loop: str) -> int:
        """Engines that have the generator's weights: where the host runs the ``loop``, one for each mix; on the
        ``device`` one for each run of steps with the same guidance branches and the same mix."""
        if loop == "host":
            return len(self.steps)
        alone = self.alone if backend_of(target).separates_weight_only_steps else ()
        return len(schedule.segments_by(segment_keys(self.of_step, alone)))

    @property
    def computes(self) -> frozenset[str]:
        return frozenset.union(self.reasoner.computes, *(mix.computes for mix, _ in self.steps))


def precision(
    recipe: Recipe, overrides: Sequence[str], target: Target, geometry: Geometry, steps: int, *, distilled: bool = False
) -> PlannedPrecision:
    """``recipe`` with ``overrides`` for a model on ``target``; errors as `resolve_recipe`'s."""
    return _added_up(recipe, tuple(overrides), target.name, geometry, steps, distilled)


@cache
def _added_up(
    recipe: Recipe, overrides: tuple[str, ...], target: str, geometry: Geometry, steps: int, distilled: bool
) -> PlannedPrecision:
    layers = geometry.num_hidden_layers
    on = load_target(target)
    return added_up(resolve_recipe(recipe, overrides, on, layers=layers, steps=steps, distilled=distilled), geometry)


def added_up(assigned: Assignment, geometry: Geometry) -> PlannedPrecision:
    """The schemes that are ``assigned`` to the sites of a model, added up."""
    keys, layers = assigned.step_keys(), assigned.layers
    counts = Counter(keys)
    return PlannedPrecision(
        recipe=assigned.recipe,
        reasoner=_mix(assigned, geometry, UND, 0),
        steps=tuple((_mix(assigned, geometry, GEN, keys.index(key)), counts[key]) for key in sorted(counts)),
        of_step=keys,
        alone=tuple(assigned.weight_only_steps()),
        cache_share=sum(SCHEMES[assigned.scheme(UND, PROMPT_KV, n)].bits for n in range(layers)) / (WIDE_BITS * layers),
    )


def _mix(assigned: Assignment, geometry: Geometry, tower: str, step: int) -> Mix:
    sizes = linear_parameters(geometry)
    linears: Counter[str] = Counter()
    attention: Counter[str] = Counter()
    for layer in range(geometry.num_hidden_layers):
        for kind in LINEARS:
            linears[assigned.scheme(tower, kind, layer, step)] += sizes[kind]
        attention[assigned.scheme(tower, CORE, layer, step)] += 1
    return Mix(_shares(linears), _shares(attention))


def _shares(counted: Counter[str]) -> Shares:
    total = sum(counted.values())
    return MappingProxyType({name: count / total for name, count in counted.items()})


def linear_parameters(geometry: Geometry) -> Mapping[str, int]:
    """Parameters of a layer's linears in one tower, by kind."""
    hidden, query, keys = geometry.hidden_size, geometry.query_width, geometry.key_value_width
    inner = hidden * geometry.intermediate_size
    return {
        "attention.qkv": hidden * (query + 2 * keys),
        "attention.out": query * hidden,
        "mlp.gate_up": len(geometry.family.facts.mlp_inputs) * inner,
        "mlp.down": inner,
    }
