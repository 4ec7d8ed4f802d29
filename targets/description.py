"""A target: data about one GPU, read from the TOML file of that name beside this module.

Knows no backend and imports none (`cosmos_export.targets.backends` knows targets); ``plan``, the build and the tuning
read the same figures.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cache
from importlib.resources import files
from types import MappingProxyType
from typing import Any

from cosmos_export.diagnostics import InternalError, UserError
from cosmos_export.files import parse_toml
from cosmos_export.precision.schemes import SCHEMES
from cosmos_export.targets import gpu_names

FP32 = "fp32"
"""The type of a model that is fp32 throughout: a precision besides the schemes, which no recipe chooses."""

_OPTIONAL = (
    "compute_capability",
    "memory_bytes",
    "bandwidth_bytes_per_s",
    "efficiency",
    "other_backends",
    "engine",
    "also",
    "least",
)
_OF_A_GPU = ("compute_capability", "memory_bytes", "bandwidth_bytes_per_s")


@dataclass(frozen=True)
class Efficiency:
    """Share of the peak rate that each kind of operation reaches, in whatever type it computes."""

    linear: float
    attention: float
    codec: float
    """Convolutions of the video autoencoder and of the sound decoder, in BF16."""
    basis: str
    """Source of the figure."""


@dataclass(frozen=True)
class Target:
    """One GPU (or the CPU) that bundles are built for."""

    name: str
    title: str
    backend: str
    compute_capability: str | None
    """``major.minor``; none for the CPU."""
    memory_bytes: int | None
    """Nominal gigabytes, decimal: a little less than the driver reports, so that a plan never promises too much."""
    bandwidth_bytes_per_s: int | None
    unified_memory: bool
    peak_flops: Mapping[str, float]
    """Dense tensor-core rate per operand type, FP32 accumulation; a type without a published figure is absent."""
    precisions: tuple[str, ...]
    """Schemes with a kernel that computes in them."""
    refused: Mapping[str, str]
    """Schemes that would build but not pay, and why."""
    traps: tuple[str, ...]
    source: tuple[str, ...]
    efficiency: Efficiency | None = None
    """None: no time is predicted."""
    other_backends: tuple[str, ...] = ()
    """Those that run on it besides ``backend``, the default."""
    engine: Mapping[str, Any] = field(default_factory=dict)
    """Settings of an engine's build, as the backend takes them."""
    least: Mapping[str, str] = field(default_factory=dict)
    """Package, or ``jetpack`` → the first release that has this GPU."""
    also: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Backend → schemes that it has kernels for besides ``precisions``."""

    def __repr__(self) -> str:
        return f"Target({self.name}, {self.backend}, compute capability {self.compute_capability or 'none'})"

    @property
    def schemes(self) -> tuple[str, ...]:
        """Schemes with a kernel in the backend that is chosen: those that are listed, and those that require one."""
        listed = (*self.precisions, *self.also.get(self.backend, ()))
        implied = (name for name, scheme in SCHEMES.items() if scheme.requires in listed)
        return (*listed, *(name for name in implied if name not in listed and name not in self.refused))

    def on(self, backend: str | None) -> Target:
        """This target with another of its backends; None: the default. UserError CX407 for one it does not have."""
        known = (self.backend, *self.other_backends)
        if backend is None or backend == self.backend:
            return self
        if backend not in known:
            raise UserError(
                "CX407",
                f"target `{self.name}` has no backend `{backend}`; it has {' and '.join(known)}",
                "`cosmos-export targets` lists the backends of each",
            )
        rest = tuple(name for name in known if name != backend)
        return replace(self, backend=backend, other_backends=rest)

    def __post_init__(self) -> None:
        problem = self._problem()
        if problem:
            raise InternalError("CX402", f"the description of target `{self.name}` is invalid: {problem}")

    def _problem(self) -> str | None:
        if self.backend in self.other_backends:
            return f"backend `{self.backend}` is named twice"
        lacking = [name for name in _OF_A_GPU if getattr(self, name) is None]
        if lacking and len(lacking) < len(_OF_A_GPU):
            return f"a GPU needs {', '.join(_OF_A_GPU)}"
        capability = self.compute_capability
        if capability is not None and [part.isdigit() for part in capability.split(".")] != [True, True]:
            return f"compute capability `{capability}` is not of the form 12.0"
        named = {*self.precisions, *(scheme for schemes in self.also.values() for scheme in schemes)}
        if unknown := named - {FP32, *SCHEMES}:
            return f"unknown precisions {sorted(unknown)}"
        if set(self.also) - {self.backend, *self.other_backends}:
            return f"precisions of backends it does not have: {sorted(self.also)}"
        both = named & set(self.refused)
        if both:
            return f"{sorted(both)} are both legal and refused"
        figures = [*self.peak_flops.values(), self.memory_bytes, self.bandwidth_bytes_per_s]
        if any(figure is not None and not figure > 0 for figure in figures):
            return "figures must be positive"
        return None if self.source else "no source is given"


def target_names() -> tuple[str, ...]:
    """Names of all targets, sorted."""
    return tuple(sorted(path.name.removesuffix(".toml") for path in _folder().iterdir() if path.name.endswith(".toml")))


@cache
def load_target(name: str) -> Target:
    """The target called ``name``, in any spelling of its own name. A `UserError` says which targets have engines that
    load on the GPU that is meant, and never suggests another compute capability."""
    known = target_names()
    if name not in known:
        same = [one for one in known if gpu_names.same(name, one)]
        if not same:
            raise _unknown(name, known)
        name = same[0]
    return parse_target(name, (_folder() / f"{name}.toml").read_text(encoding="utf-8"))


def _may_be(name: str, target: str) -> bool:
    """Whether ``name`` has the numbers of ``target``, or one of its digits too few or too many at the end."""
    first, second = ("".join(re.findall(r"\d+", text)) for text in (name, target))
    short, long = sorted((first, second), key=len)
    return long.startswith(short) and len(long) - len(short) <= 1


def _unknown(name: str, known: Sequence[str]) -> UserError:
    """CX401 for ``name``, with the target that is meant."""
    listed = f"known: {', '.join(known)}"
    if "," in name:
        return UserError("CX401", f"`{name}` is several targets, and a build has one", "build a bundle for each")
    if gpu_names.any_gpu(name):
        hint = (
            "name its GPU; `nvidia-smi --query-gpu=name,compute_cap --format=csv` shows it, `cosmos-export targets` all"
        )
        return UserError("CX401", f"`{name}` is no target: engines are built for one kind of GPU; {listed}", hint)
    if gpu_names.other_maker(name):
        return UserError(
            "CX401", f"`{name}` is not a GPU of NVIDIA; {listed}", "`--target cpu` builds for any processor"
        )
    capability = gpu_names.capability_of(name)
    if capability is not None:
        fits = [one for one in known if load_target(one).compute_capability == capability]
        if not fits:
            what = f"`{name}` has compute capability {capability}, which is not supported; {listed}"
            return UserError("CX401", what, "`--target cpu` builds for any processor; the others need their own GPU")
        named = " or ".join(f"`--target {one}`" for one in fits)
        what = f"`{name}` is not a target by itself; it has compute capability {capability}, as {', '.join(fits)}"
        return UserError("CX401", what, f"{named}: its engines load there; look whether its memory is enough")
    alike = [one for one in known if one[0] == name[:1].lower() and _may_be(name, one)]
    near = difflib.get_close_matches(name.lower(), alike, n=1, cutoff=0.5)
    hint = f"did you mean `{near[0]}`?" if near else "`cosmos-export targets` describes them"
    return UserError("CX401", f"unknown target `{name}`; {listed}", hint)


def parse_target(name: str, text: str) -> Target:
    """A `Target` from TOML text. Unknown, missing and mistyped fields are errors."""
    try:
        data = parse_toml(text)
    except ValueError as error:
        raise InternalError("CX402", f"the description of target `{name}` is not TOML: {error}") from error
    known = {one.name for one in fields(Target)} - {"name"}
    unknown, missing = sorted(set(data) - known), sorted(known - set(data) - set(_OPTIONAL))
    if unknown or missing:
        raise InternalError("CX402", f"target `{name}`: its description has unknown fields {unknown}, lacks {missing}")
    for key, kind in _FIELD_TYPES.items():
        if key in data and type(data[key]) is not kind:
            found = type(data[key]).__name__
            raise InternalError("CX402", f"field `{key}` of target `{name}` is a {found}, not a {kind.__name__}")
    return Target(
        name=name,
        title=data["title"],
        backend=data["backend"],
        compute_capability=data.get("compute_capability"),
        memory_bytes=data.get("memory_bytes"),
        bandwidth_bytes_per_s=data.get("bandwidth_bytes_per_s"),
        unified_memory=data["unified_memory"],
        peak_flops=MappingProxyType({key: float(rate) for key, rate in data["peak_flops"].items()}),
        precisions=tuple(data["precisions"]),
        refused=MappingProxyType(dict(data["refused"])),
        traps=tuple(data["traps"]),
        source=tuple(data["source"]),
        efficiency=_efficiency(name, data.get("efficiency")),
        other_backends=tuple(data.get("other_backends", ())),
        engine=MappingProxyType(dict(data.get("engine", {}))),
        least=MappingProxyType({name: str(release) for name, release in data.get("least", {}).items()}),
        also=MappingProxyType({backend: tuple(schemes) for backend, schemes in data.get("also", {}).items()}),
    )


def _efficiency(name: str, data: dict[str, Any] | None) -> Efficiency | None:
    if data is None:
        return None
    kinds = {one.name: str if one.name == "basis" else float for one in fields(Efficiency)}
    if {key: type(value) for key, value in data.items()} != kinds:
        raise InternalError("CX402", f"target `{name}`: [efficiency] has {sorted(data)}, not {sorted(kinds)}")
    if not all(0 < data[key] <= 1 for key, kind in kinds.items() if kind is float):
        raise InternalError("CX402", f"target `{name}`: an efficiency is a share above 0 and at most 1")
    return Efficiency(**data)


_FIELD_TYPES: Mapping[str, type] = {
    "title": str,
    "backend": str,
    "compute_capability": str,
    "memory_bytes": int,
    "bandwidth_bytes_per_s": int,
    "unified_memory": bool,
    "peak_flops": dict,
    "precisions": list,
    "refused": dict,
    "traps": list,
    "other_backends": list,
    "engine": dict,
    "least": dict,
    "also": dict,
    "source": list,
    "efficiency": dict,
}


def _folder() -> Any:
    return files("cosmos_export.targets")
