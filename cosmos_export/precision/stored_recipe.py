"""Recipes for one checkpoint: what a quantized one states, and what a search chose, as rules like any other's."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Mapping

from cosmos_export.checkpoint import Checkpoint, Tower
from cosmos_export.checkpoint.layout import QUANTIZED_DTYPE
from cosmos_export.checkpoint.quantization import StepPolicy
from cosmos_export.diagnostics import UserError
from cosmos_export.precision.recipe import DEFAULT, Recipe, load_recipe, parse_rule
from cosmos_export.precision.scheme import Scheme
from cosmos_export.precision.schemes import SCHEMES, UNQUANTIZED, stored_schemes, weight_only_form
from cosmos_export.precision.sites import GEN, LINEARS, TOWERS, UND

STORED = "checkpoint"
"""The name of the recipe that a quantized checkpoint states."""

_TOWERS = dict(zip((Tower.REASONER, Tower.GENERATOR), TOWERS, strict=True))


def recipe_for(checkpoint: Checkpoint, name: str | None) -> Recipe:
    """The recipe ``name``; without one that of the checkpoint, which is ``bf16`` where it is not quantized.

    CX350: ``checkpoint`` asked of one that states nothing.
    """
    if checkpoint.quantization is not None and name in (None, STORED):
        return stored_recipe(checkpoint)
    if name == STORED:
        raise UserError(
            "CX350",
            f"recipe `{STORED}` is what a quantized checkpoint states, and {checkpoint.root} is {checkpoint.precision}",
            "`cosmos-export recipes ls` lists those for any checkpoint",
        )
    return load_recipe(name or DEFAULT)


def stored_recipe(checkpoint: Checkpoint) -> Recipe:
    """The recipe that the quantized ``checkpoint`` states. A site is quantized where all that was merged into it is."""
    assert checkpoint.quantization is not None
    return Recipe(
        name=STORED,
        title="As the checkpoint is quantized",
        summary="FP8 weights and activation scales as they are stored, with the checkpoint's own step policy.",
        experimental=False,
        not_for=(),
        warning="",
        rules=tuple(parse_rule(text) for text in _rules(checkpoint)),
        source=("quantization_config of transformer/config.json",),
    )


def _rules(checkpoint: Checkpoint) -> Iterator[str]:
    assert checkpoint.quantization is not None
    policy = checkpoint.quantization.step_policy
    wide = dict.fromkeys(TOWERS, checkpoint.quantization.weight_only)
    wide[UND] = wide[UND] or (policy is not None and policy.reasoner == "a16")
    narrow = _stored_scheme()
    layers = checkpoint.geometry.num_hidden_layers
    for (tower, kind), stored in _stored_layers(checkpoint).items():
        scheme = _wide(narrow) if wide[tower] else narrow.name
        for where in _ranges(stored, layers):
            yield f"{tower}.{kind}{where}={scheme}"
            if tower == GEN and policy is not None and not wide[tower]:
                yield from (f"{tower}.{kind}{where}@{steps}={how}" for steps, how in _of_steps(policy, narrow))


def _stored_scheme() -> Scheme:
    """The scheme whose weights are of the type that the reader of checkpoints takes for quantized."""

    def reads(scheme: Scheme) -> bool:
        return scheme.layout is not None and scheme.layout.tensors(1, 1)["weight"][0] == QUANTIZED_DTYPE

    return next(scheme for scheme in stored_schemes() if reads(scheme))


def _wide(scheme: Scheme) -> str:
    """Name of the scheme with the same weights and activations of 16 bit; that of ``scheme`` where it has them."""
    return (weight_only_form(scheme) or scheme).name


def _of_steps(policy: StepPolicy, narrow: Scheme) -> Iterator[tuple[str, str]]:
    """Ranges of steps whose scheme is not that of the others, later ones over earlier."""
    first, last = policy.first_steps, policy.last_steps
    if first:
        yield f":{first}", _wide(narrow)
    if last:
        yield f"-{last}:", _wide(narrow)
    if first and last and policy.overlap == "native":
        # Empty unless the loop is so short that the two ranges overlap.
        yield f"-{last}:{first}", narrow.name


def _stored_layers(checkpoint: Checkpoint) -> dict[tuple[str, str], set[int]]:
    """Tower and kind → layers in which every linear of that kind is stored in FP8."""
    all_of: dict[tuple[str, str, int], bool] = defaultdict(lambda: True)
    for name, tensor in checkpoint.expected.items():
        if tensor.linear:
            site = (_TOWERS[tensor.tower], tensor.kind, tensor.layer)
            all_of[site] &= checkpoint.tensors[name].dtype == QUANTIZED_DTYPE
    return {
        (tower, kind): {layer for layer in range(checkpoint.geometry.num_hidden_layers) if all_of[tower, kind, layer]}
        for tower in TOWERS
        for kind in LINEARS
    }


def _ranges(layers: set[int], count: int) -> Iterator[str]:
    """``layers`` of ``count`` as ranges of a place; nothing to write where it is all of them."""
    if len(layers) == count:
        yield ""
        return
    for start in sorted(layer for layer in layers if layer - 1 not in layers):
        stop = next(n for n in range(start, count + 1) if n not in layers)
        yield f"[{start}:{stop}]"


def recipe_text(checkpoint: Checkpoint, schemes: Mapping[str, str], title: str, summary: str) -> str:
    """A recipe file with a scheme for each linear of ``checkpoint``; those of a site have the same.

    As in the published step policy, the reasoner and the first and last three steps have 16-bit activations where the
    weight is the same in both.
    """
    layers = checkpoint.geometry.num_hidden_layers
    narrow = (scheme for scheme in SCHEMES.values() if not scheme.weight_only)
    wide = {scheme.name: form.name for scheme in narrow if (form := weight_only_form(scheme)) is not None}
    found: dict[tuple[str, str, str], set[int]] = defaultdict(set)
    for name, tensor in checkpoint.expected.items():
        scheme = schemes.get(name.removesuffix(".weight"), UNQUANTIZED) if tensor.linear else UNQUANTIZED
        if scheme != UNQUANTIZED:
            tower = _TOWERS[tensor.tower]
            found[tower, tensor.kind, wide.get(scheme, scheme) if tower == UND else scheme].add(tensor.layer)
    rules: dict[str, list[str]] = defaultdict(list)
    for (tower, kind, scheme), chosen in found.items():
        places = [f"{tower}.{kind}{where}" for where in _ranges(chosen, layers)]
        rules[scheme] += places
        if scheme in wide:
            rules[wide[scheme]] += [f"{place}@{steps}" for place in places for steps in (":3", "-3:")]
    # The rules for some steps come last: of two that match, the later one counts.
    ordered = sorted(rules.items(), key=lambda rule: rule[0] in wide.values())
    text = f"title = {json.dumps(title)}\nsummary = {json.dumps(summary)}\n"
    text += 'experimental = false\nnot_for = []\nwarning = ""\nsource = []\n'
    for scheme, places in ordered:
        text += f"\n[[rules]]\nwhere = {json.dumps(places)}\nscheme = {json.dumps(scheme)}\n"
    return text
