"""Recipes: which precision each matrix product of a model gets, as data, and what follows for one model and target.

A rule maps a place – tower, kind of module, range of layers, range of steps – to a scheme; of the rules that match a
site, the last one counts, and a site that none matches stays in the model's own type. Knows neither a model's names nor
a backend: sites are found by the compiler from dataflow.

A place is written ``TOWER[.KIND][[LAYERS]][@STEPS]``, ranges as Python writes slices: ``gen.mlp.down``, ``und``,
``gen.mlp[0:2]``, ``gen@-3:`` (the last three steps), ``gen.attention.qkv[-1:]@0:3``.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cache
from importlib import resources
from itertools import groupby
from pathlib import Path
from types import MappingProxyType
from typing import Any, NoReturn, Protocol

from cosmos_export import files
from cosmos_export.diagnostics import InternalError, UnsupportedError, UserError
from cosmos_export.precision.schemes import SCHEMES, UNQUANTIZED, schemes_for
from cosmos_export.precision.sites import CORE, GEN, KINDS, LINEARS, PROMPT_KV, TOWERS, UND

_ONLY: Mapping[str, str] = MappingProxyType({CORE: GEN, PROMPT_KV: UND})
"""Kinds that one tower has alone: the reasoner's attention is as short as the prompt and runs once."""
DEFAULT = UNQUANTIZED
"""The recipe that quantizes nothing has the name of that scheme."""


class Runner(Protocol):
    """Requirements of a recipe on a target."""

    @property
    def name(self) -> str: ...
    @property
    def schemes(self) -> tuple[str, ...]:
        """Names of the schemes that it has kernels for."""

    @property
    def refused(self) -> Mapping[str, str]:
        """Schemes that would build but not pay, and why."""


_PLACE = re.compile(r"(?P<tower>[a-z]+)(?:\.(?P<kind>[a-z_.]+))?(?:\[(?P<layers>[^\]]*)\])?(?:@(?P<steps>\S+))?")
_SPAN = re.compile(r"(-?[0-9]{1,9})?:(-?[0-9]{1,9})?")


@dataclass(frozen=True)
class Span:
    """A slice without a stride: ``start:stop``, each may be missing or count from the end."""

    start: int | None
    stop: int | None

    def of(self, count: int) -> range:
        """The members among ``count``."""
        return range(count)[self.start : self.stop]

    def __str__(self) -> str:
        return f"{'' if self.start is None else self.start}:{'' if self.stop is None else self.stop}"


@dataclass(frozen=True)
class Place:
    """Sites that a rule is for. ``kinds`` are of `KINDS`; a span that is None means all."""

    text: str
    tower: str
    kinds: tuple[str, ...]
    layers: Span | None
    steps: Span | None

    def __contains__(self, site: tuple[str, str]) -> bool:
        return site[0] == self.tower and site[1] in self.kinds


@dataclass(frozen=True)
class Rule:
    """Sites at ``place`` get ``scheme``."""

    place: Place
    scheme: str

    def __str__(self) -> str:
        return f"{self.place.text}={self.scheme}"


@dataclass(frozen=True)
class Recipe:
    """Rules under a name."""

    name: str
    title: str
    summary: str
    """Its purpose and its cost."""
    experimental: bool
    not_for: tuple[str, ...]
    """Modes of generation for which `auto` does not choose it."""
    warning: str
    """Said at every build; may be empty."""
    rules: tuple[Rule, ...]
    source: tuple[str, ...]

    def __repr__(self) -> str:
        return f"Recipe({self.name}, {len(self.rules)} rules, {', '.join(self.schemes) or UNQUANTIZED})"

    @property
    def schemes(self) -> tuple[str, ...]:
        """Schemes its rules use besides the model's own type, in the order of `SCHEMES`."""
        used = {rule.scheme for rule in self.rules} - {UNQUANTIZED}
        return tuple(name for name in SCHEMES if name in used)


# ---------------------------------------------------------------------------------------------------------------------
# Reading


MAX_RECIPE_BYTES = files.MIB
"""A recipe that is searched has a rule for each linear, 30 kB for Super."""


def recipe_names() -> tuple[str, ...]:
    """Names of all recipes, sorted."""
    return tuple(sorted(path.name.removesuffix(".toml") for path in _folder().iterdir() if path.name.endswith(".toml")))


def load_recipe(name: str) -> Recipe:
    """The recipe called ``name``, or in the file ``name`` if that ends in ``.toml``.

    CX350 names the nearest one if there is none; CX351: the file is not a recipe.
    """
    return _read_recipe(Path(name)) if name.lower().endswith(".toml") else _shipped(name)


def _read_recipe(path: Path) -> Recipe:
    try:
        return parse_recipe(path.stem, files.read_bytes(path, MAX_RECIPE_BYTES).decode("utf-8"))
    except OSError as error:
        why = files.reason(error)
        raise UserError("CX350", f"recipe {path} cannot be read: {why}", "`cosmos-export recipes ls`") from error
    except UnicodeDecodeError as error:
        raise UserError("CX350", f"recipe {path} is not UTF-8 text", "`cosmos-export recipes ls`") from error
    except InternalError as error:
        raise UserError(
            error.code, error.message, "`cosmos-export recipes show fp8 --json` shows what one has"
        ) from error


@cache
def _shipped(name: str) -> Recipe:
    if name not in recipe_names():
        near = difflib.get_close_matches(name.lower(), recipe_names(), n=1, cutoff=0.5)
        raise UserError(
            "CX350",
            f"unknown recipe `{name}`; known: {', '.join(recipe_names())}",
            f"did you mean `{near[0]}`?" if near else "`cosmos-export recipes ls` describes them",
        )
    return parse_recipe(name, (_folder() / f"{name}.toml").read_text(encoding="utf-8"))


def parse_recipe(name: str, text: str) -> Recipe:
    """A `Recipe` from TOML text. Unknown, missing and mistyped fields and contradictions are errors (CX351)."""
    try:
        data: dict[str, Any] = files.parse_toml(text)
    except ValueError as error:  # also numbers of thousands of digits
        raise InternalError("CX351", f"recipe `{name}` is not TOML: {error}") from error
    known = {field.name for field in fields(Recipe)} - {"name"}
    if data.keys() != known:
        unknown, missing = sorted(data.keys() - known), sorted(known - data.keys())
        raise InternalError("CX351", f"recipe `{name}` has unknown fields {unknown}, lacks {missing}")
    for field, kind in _FIELD_TYPES.items():
        if type(data[field]) is not kind:
            raise InternalError("CX351", f"field `{field}` of recipe `{name}` is not a {kind.__name__}")
    for field in ("not_for", "source"):
        if not all(isinstance(item, str) for item in data[field]):
            raise InternalError("CX351", f"field `{field}` of recipe `{name}` is not a list of texts")
    try:
        rules = tuple(rule for item in data["rules"] for rule in _rules(item))
        check_rules(rules)
    except UserError as error:
        raise InternalError("CX351", f"recipe `{name}`: {error.message}") from error
    return Recipe(
        name=name,
        title=data["title"],
        summary=data["summary"],
        experimental=data["experimental"],
        not_for=tuple(data["not_for"]),
        warning=data["warning"],
        rules=rules,
        source=tuple(data["source"]),
    )


_FIELD_TYPES: Mapping[str, type] = {
    "title": str,
    "summary": str,
    "experimental": bool,
    "not_for": list,
    "warning": str,
    "rules": list,
    "source": list,
}


def _rules(item: Any) -> Iterator[Rule]:
    if not isinstance(item, dict) or item.keys() != {"where", "scheme"} or not isinstance(item["where"], list):
        _wrong(f"a rule has `where` (a list of places) and `scheme`, not {item!r}")
    for place in item["where"]:
        yield Rule(parse_place(str(place), str(item["scheme"])), str(item["scheme"]))


def parse_rule(text: str) -> Rule:
    """``PLACE=SCHEME``, as `--set` takes it; CX353 for what is not one."""
    place, separator, scheme = text.rpartition("=")
    if not separator:
        _wrong(f"`{text}` is not PLACE=SCHEME")
    scheme = scheme.strip()
    return Rule(parse_place(place.strip(), scheme), scheme)


def parse_place(text: str, scheme: str) -> Place:
    """The place ``text`` for ``scheme``: a tower, or the first part of a kind, means all linears in it."""
    match = _PLACE.fullmatch(text)
    if match is None or match["tower"] not in TOWERS:
        _wrong(f"`{text}` is not a place TOWER[.KIND][[LAYERS]][@STEPS]; towers: {', '.join(TOWERS)}")
    prefix = match["kind"] or ""
    kinds = tuple(k for k in LINEARS if not prefix or k == prefix or k.startswith(f"{prefix}."))
    kinds = (prefix,) if prefix in _ONLY else kinds
    if not kinds:
        _wrong(f"`{text}`: there is no kind `{prefix}`; kinds: attention, mlp, {', '.join(KINDS)}")
    for kind in kinds:
        if scheme in SCHEMES and kind not in SCHEMES[scheme].kinds:
            _wrong(f"`{text}={scheme}`: {kind} takes {', '.join(schemes_for(kind))}")
    if prefix in _ONLY and match["tower"] != _ONLY[prefix]:
        _wrong(f"`{text}`: only `{_ONLY[prefix]}` has the kind {prefix}")
    layers, steps = _span(text, match["layers"]), _span(text, match["steps"])
    if steps is not None and match["tower"] == UND:
        _wrong(f"`{text}`: the reasoner runs once a prompt and has no steps")
    return Place(text, match["tower"], kinds, layers, steps)


def _span(text: str, span: str | None) -> Span | None:
    if span is None:
        return None
    match = _SPAN.fullmatch(span)
    if match is None:
        _wrong(f"`{text}`: `{span}` is not a range START:STOP")
    start, stop = (None if end is None else int(end) for end in match.groups())
    if start is not None and stop is not None and (start < 0) == (stop < 0) and start >= stop:
        _wrong(f"`{text}`: the range {span} is empty")
    return Span(start, stop)


def check_rules(rules: Sequence[Rule]) -> None:
    """No two rules are for exactly the same sites with different schemes; CX353."""
    seen: dict[tuple[Any, ...], Rule] = {}
    for rule in rules:
        place = rule.place
        key = (place.tower, place.kinds, place.layers, place.steps)
        first = seen.setdefault(key, rule)
        if first.scheme != rule.scheme:
            _wrong(f"`{first}` and `{rule}` contradict each other")


def _wrong(what: str) -> NoReturn:
    raise UserError("CX353", what, "for example `gen.mlp.down=fp8`, `gen.mlp[0:2]=bf16`, `gen@-3:=fp8-w8a16`")


def _folder() -> Any:
    return resources.files("cosmos_export.precision") / "recipes"


# ---------------------------------------------------------------------------------------------------------------------
# Resolving


def segment_keys(step_keys: Sequence[int], alone: Sequence[int]) -> tuple[int, ...]:
    """``step_keys``, where each of the steps ``alone`` is unlike every other one."""
    keys = list(step_keys)
    for step in alone:
        keys[step] = len(keys) + step
    return tuple(keys)


@dataclass(frozen=True)
class Assignment:
    """A recipe for one model: the scheme of every site.

    ``steps`` is the number of denoising steps; the reasoner has one scheme a site.
    """

    recipe: str
    overrides: tuple[str, ...]
    rules: tuple[Rule, ...]
    layers: int
    steps: int

    def scheme(self, tower: str, kind: str, layer: int, step: int = 0) -> str:
        """Scheme of the site ``kind`` of ``layer`` of ``tower`` at ``step``: that of the last rule that matches."""
        for rule in reversed(self.rules):
            place = rule.place
            if (tower, kind) not in place:
                continue
            if place.layers is not None and layer not in place.layers.of(self.layers):
                continue
            if place.steps is not None and step not in place.steps.of(self.steps):
                continue
            return rule.scheme
        return UNQUANTIZED

    def over_steps(self, tower: str, kind: str, layer: int) -> tuple[str, ...]:
        """The site's scheme at every step."""
        count = 1 if tower == UND else self.steps
        return tuple(self.scheme(tower, kind, layer, step) for step in range(count))

    def sites(self) -> Iterator[tuple[str, str, int]]:
        """Every site there may be: tower, kind, layer."""
        return ((t, k, n) for t in TOWERS for k in KINDS for n in range(self.layers))

    @property
    def schemes(self) -> frozenset[str]:
        """Every scheme that some site has at some step, except the model's own type."""
        used = {scheme for site in self.sites() for scheme in self.over_steps(*site)}
        return frozenset(used - {UNQUANTIZED})

    @property
    def needs_calibration(self) -> bool:
        """Whether a scheme needs the ranges of activations."""
        return bool(self.calibrated)

    @property
    def calibrated(self) -> frozenset[str]:
        """Schemes that need the ranges of activations."""
        return frozenset(name for name in self.schemes if SCHEMES[name].calibrated)

    def step_keys(self) -> tuple[int, ...]:
        """One number per step, equal where all sites have the same schemes; numbered as they first appear."""
        columns = zip(*(self.over_steps(*site) for site in self.sites() if site[0] == GEN), strict=True)
        seen: dict[tuple[str, ...], int] = {}
        return tuple(seen.setdefault(column, len(seen)) for column in columns)

    def weight_only_steps(self) -> tuple[int, ...]:
        """Steps in which the generator multiplies narrow weights by wide activations."""
        sites = [site for site in self.sites() if site[0] == GEN]
        return tuple(
            step for step in range(self.steps) if any(SCHEMES[self.scheme(*site, step)].weight_only for site in sites)
        )

    def segment_keys(self, *, separate: bool) -> tuple[int, ...]:
        """One number per step: of neighbours in a loop on the device, those with equal ones share an engine.

        ``separate``: each step that multiplies narrow weights by wide activations has an engine of its own, as some
        backends build them.
        """
        return segment_keys(self.step_keys(), self.weight_only_steps() if separate else ())

    def table(self) -> dict[str, str]:
        """Place → scheme of every site, sites that are alike together; what is not quantized is left out."""
        found: dict[str, str] = {}
        for tower in TOWERS:
            for kind in KINDS:
                schemes = [self.over_steps(tower, kind, layer) for layer in range(self.layers)]
                for over, layers in _runs(schemes):
                    for scheme, steps in _runs(over):
                        where = f"{tower}.{kind}"
                        where += "" if len(layers) == self.layers else f"[{layers.start}:{layers.stop}]"
                        where += "" if len(steps) == len(over) else f"@{steps.start}:{steps.stop}"
                        if scheme != UNQUANTIZED:
                            found[where] = scheme
        return found


def _runs(values: Sequence[Any]) -> Iterator[tuple[Any, range]]:
    """Equal neighbours: the value, and the range of its indices."""
    start = 0
    for value, run in groupby(values):
        stop = start + len(list(run))
        yield value, range(start, stop)
        start = stop


def resolve_recipe(
    recipe: Recipe, overrides: Sequence[str], target: Runner, *, layers: int, steps: int, distilled: bool = False
) -> Assignment:
    """Resolve ``recipe`` with ``overrides`` (``PLACE=SCHEME``, later ones count) for a model on ``target``.

    A recipe's own rules for ranges of steps are left out for a distilled model and for one step, as the published
    policy leaves them out; an override's are not. UserError CX353 for overrides that are none or contradict each other
    and CX354 for an assignment that would store a weight twice; UnsupportedError CX352 for a scheme that the target
    does not run.
    """
    own = [rule for rule in recipe.rules if rule.place.steps is None or not (distilled or steps == 1)]
    asked = [parse_rule(text) for text in overrides]
    check_rules(asked)
    for rule in asked:
        if rule.place.layers is not None and not rule.place.layers.of(layers):
            _wrong(f"`{rule}`: the model has no such layer (it has {layers})")
        if rule.place.steps is not None and not rule.place.steps.of(steps):
            _wrong(f"`{rule}`: the schedule has no such step (it has {steps})")
    for rule in (*own, *asked):
        _require_scheme(rule, target)
    result = Assignment(recipe.name, tuple(overrides), (*own, *asked), layers, steps)
    _require_one_storage(result)
    return result


def refusal(scheme: str, target: Runner) -> str | None:
    """Why ``target`` does not run ``scheme``; None where it does."""
    if scheme == UNQUANTIZED or scheme in target.schemes:
        return None
    return target.refused.get(scheme, f"`{target.name}` has no kernels that compute in it")


def _require_scheme(rule: Rule, target: Runner) -> None:
    runs = ", ".join(name for name in target.schemes if name in SCHEMES)
    if rule.scheme not in SCHEMES and rule.scheme not in target.refused:
        _wrong(f"`{rule}`: there is no scheme `{rule.scheme}`; schemes of `{target.name}`: {runs}")
    reason = refusal(rule.scheme, target)
    if reason is None:
        return
    raise UnsupportedError(
        "CX352",
        f"target `{target.name}` does not run {rule.scheme} (`{rule}`): {reason}",
        f"schemes it runs: {runs}; choose another recipe, or another scheme with `--set {rule.place.text}=…`",
    )


def _require_one_storage(assignment: Assignment) -> None:
    """Steps share weights, so a linear whose scheme changes from step to step keeps one stored form."""
    for tower, kind, layer in assignment.sites():
        schemes = set(assignment.over_steps(tower, kind, layer))
        if kind in LINEARS and len({SCHEMES[scheme].storage for scheme in schemes}) > 1:
            raise UserError(
                "CX354",
                f"recipe `{assignment.recipe}` contradicts itself: {tower}.{kind} of layer {layer} is "
                f"{' and '.join(sorted(schemes))} in different steps, and would be stored twice",
                f"steps may differ between {_shared()}, which share the weight",
            )


def _shared() -> str:
    """Schemes that store a weight alike, in words."""
    alike: dict[str, list[str]] = {}
    for scheme in SCHEMES.values():
        alike.setdefault(scheme.storage, []).append(scheme.name)
    return ", or ".join(" and ".join(names) for names in alike.values() if len(names) > 1)
