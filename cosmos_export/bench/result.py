"""A measurement: samples by component, what follows from them, and how two are compared. No torch."""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cosmos_export import files
from cosmos_export.bench.published import published_cells, target_of
from cosmos_export.bundle import Open
from cosmos_export.checkpoint.strict_json import parse_object
from cosmos_export.diagnostics import UserError, shown
from cosmos_export.machine.gpu import gpus
from cosmos_export.machine.packages import installed_release
from cosmos_export.machine.system import cores, processor, python_version

SCHEMA = 1
MAX_MEASUREMENT_BYTES = 16 * files.MIB
_WRITE_ONE = "write one with `bench … -o FILE.json`"
_PACKAGES = (
    "cosmos-export", "torch", "triton", "onnxruntime", "onnxruntime-gpu", "tensorrt-cu13", "tensorrt-rtx-cu13",
    "nvidia-cudnn-frontend", "diffusers",
)  # fmt: skip


@dataclass(frozen=True)
class MeasuredPart:
    """One part of a request: seconds of each measured call, and how often a request has it."""

    name: str
    samples_s: tuple[float, ...]
    calls: int = 1

    @property
    def median_s(self) -> float:
        return statistics.median(self.samples_s)

    def percentile_s(self, share: float) -> float:
        """The sample that ``share`` of all do not exceed."""
        ordered = sorted(self.samples_s)
        return ordered[min(len(ordered) - 1, max(0, -int(-share * len(ordered) // 1) - 1))]

    @property
    def total_s(self) -> float:
        return self.calls * self.median_s


@dataclass(frozen=True)
class Baseline:
    """Another implementation of the same request, measured in the same run."""

    name: str
    recipe: str
    """Its precision, which is stated beside a measurement in another one."""
    components: tuple[MeasuredPart, ...]
    forwards: int
    covers: str

    @property
    def request_s(self) -> float:
        return sum(component.total_s for component in self.components)

    @property
    def forward_s(self) -> float | None:
        return _forward_s(self.components, self.forwards)


def _forward_s(components: Sequence[MeasuredPart], forwards: int) -> float | None:
    steps = [c for c in components if c.name.startswith(("step", "denoise"))]
    return sum(c.total_s for c in steps) / forwards if steps and forwards else None


@dataclass(frozen=True)
class Measurement:
    """A workload on a device."""

    subject: str
    """Path of a bundle, or ``geometry:nano``: random weights of the true size."""
    model: str
    """``nano``, ``super``, ``edge``, or another model's name."""
    workload: str
    recipe: str
    backend: str
    device: str
    card: str | None
    components: tuple[MeasuredPart, ...]
    steps: int
    forwards: int
    """Runs of the generator in a request: one per step and branch."""
    extrapolated: str
    """How the request follows from fewer measured steps; empty where it was measured whole."""
    covers: str
    """The parts of a request that are in the sum."""
    kernels: tuple[str, ...] = ()
    """Kernels of this project in place of the compiler's code."""
    dry_run: bool = False
    memory_bytes: int | None = None
    machine: Mapping[str, Any] = field(default_factory=dict)
    command: str = ""
    during: Mapping[str, Any] | None = None
    """Clocks, power and temperature while it was measured; None without a GPU."""
    baselines: tuple[Baseline, ...] = ()
    baselines_left_out: tuple[str, ...] = ()
    """Baselines that a reader would expect and that are missing, and why."""
    verdicts: Open | None = None
    """Findings that the build of a measured bundle left open."""

    @property
    def request_s(self) -> float:
        """Seconds of a request: the sum of its components, each at its median."""
        return sum(component.total_s for component in self.components)

    @property
    def forward_s(self) -> float | None:
        """Seconds of one run of the generator; None where nothing of it was measured."""
        return _forward_s(self.components, self.forwards)

    def document(self) -> dict[str, Any]:
        """The measurement as it is written."""
        gpu = target_of(self.card or "")
        cells = [dataclasses.asdict(c) for c in published_cells(self.model, self.workload, gpu)]
        return {
            "benchmark": "bench", "schema": SCHEMA, "dry_run": self.dry_run, "command": self.command,
            "subject": self.subject, "model": self.model, "workload": self.workload, "recipe": self.recipe,
            "backend": self.backend, "device": self.device, "kernels": list(self.kernels), "card": self.card,
            "steps": self.steps, "forwards": self.forwards, "extrapolated": self.extrapolated, "covers": self.covers,
            "request_s": self.request_s, "forward_s": self.forward_s, "memory_bytes": self.memory_bytes,
            "components": [_row(c) for c in self.components],
            "baselines": [self._beside(b) for b in self.baselines], "baselines_left_out": list(self.baselines_left_out),
            "published": cells, "during": self.during and dict(self.during),
            "machine": dict(self.machine),
            **({} if self.verdicts is None else {"verdicts": dataclasses.asdict(self.verdicts)}),
        }  # fmt: skip

    def _beside(self, baseline: Baseline) -> dict[str, Any]:
        """A baseline as it is written, with the ratio of the measured time over its own."""
        forward, own = baseline.forward_s, self.forward_s
        return {
            "name": baseline.name, "recipe": baseline.recipe, "same_precision": baseline.recipe == self.recipe,
            "covers": baseline.covers, "request_s": baseline.request_s, "forward_s": forward,
            "ours_over_request": self.request_s / baseline.request_s,
            "ours_over_forward": own / forward if own is not None and forward is not None else None,
            "components": [_row(c) for c in baseline.components],
        }  # fmt: skip


def _row(c: MeasuredPart) -> dict[str, Any]:
    return {
        "name": c.name, "calls": c.calls, "median_s": c.median_s, "p5_s": c.percentile_s(0.05),
        "p95_s": c.percentile_s(0.95), "samples_s": list(c.samples_s),
    }  # fmt: skip


def machine() -> dict[str, Any]:
    """Cores, cards with their clocks and power as they are now, and versions."""
    versions = {"python": python_version(), **{name: installed_release(name) for name in _PACKAGES}}
    cards = [dataclasses.asdict(gpu) for gpu in gpus()]
    return {"cores": cores(), "processor": processor(), "gpus": cards, "versions": versions}


@dataclass(frozen=True)
class Ratio:
    """One quantity in two measurements."""

    name: str
    before_s: float
    after_s: float

    @property
    def ratio(self) -> float:
        """Time of the second over time of the first."""
        return self.after_s / self.before_s


_LONGEST_S, _NO_TIME = 1e9, 1e-12
_COMPARED = ("model", "workload", "recipe", "backend", "card", "dry_run", "covers")


def read_measurement(path: Path) -> dict[str, Any]:
    """A written measurement; UserError CX670 for a file that is none."""
    try:
        data = parse_object(files.read_bytes(path, MAX_MEASUREMENT_BYTES))
    except OSError as error:
        raise UserError("CX670", f"cannot read {path}: {files.reason(error)}", "is it the right path?") from error
    except ValueError as error:
        raise UserError("CX670", f"{path} is not JSON: {error}", _WRITE_ONE) from error
    ours = data.get("benchmark") == "bench" and type(data.get("schema")) is int and data["schema"] == SCHEMA
    if not ours or not isinstance(data.get("components"), list):
        raise UserError("CX670", f"{path} is no measurement of `bench`", _WRITE_ONE)
    for place, value in _parts(data):
        raise UserError("CX670", f"{path} is no measurement of `bench`: {place} is {shown(value)}", _WRITE_ONE)
    return data


def _parts(data: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Parts of ``data`` that cannot be compared, by their place."""
    for key in _COMPARED:
        value = data.get(key)
        words = value if isinstance(value, list) else [value]
        if not all(word is None or isinstance(word, str | bool) for word in words):
            yield key, value
    names: set[str] = set()
    for number, component in enumerate(data["components"]):
        name, median = (component.get(key) if isinstance(component, dict) else None for key in ("name", "median_s"))
        if not isinstance(name, str) or name in names or not _is_time(median):
            yield f"component {number}", component
        else:
            names.add(name)
    for key in ("request_s", "forward_s"):
        if data.get(key) is not None and not _is_time(data[key]):
            yield key, data[key]


def _is_time(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= _LONGEST_S


def compare(before: Mapping[str, Any], after: Mapping[str, Any]) -> tuple[list[Ratio], list[str]]:
    """Ratios of the request, a forward and every component both have; and what makes the two unlike."""
    unlike = [
        f"{key}: {before.get(key)} and {after.get(key)}" for key in _COMPARED if before.get(key) != after.get(key)
    ]
    pairs: list[tuple[str, Any, Any]] = [
        (name, before.get(key), after.get(key)) for name, key in (("request", "request_s"), ("forward", "forward_s"))
    ]
    medians = [{c["name"]: c["median_s"] for c in one["components"]} for one in (before, after)]
    pairs += [(name, value, medians[1].get(name)) for name, value in medians[0].items()]
    both = [(name, a, b) for name, a, b in pairs if a is not None and b is not None and a > _NO_TIME]
    ratios = [Ratio(name, float(a), float(b)) for name, a, b in both]
    return ratios, unlike


def incomparable(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """Why ratios of the two would say nothing; a difference of recipe, backend or card is what one compares."""
    keys = ("model", "workload", "covers", "dry_run")
    found = [f"{key} is {before.get(key)} and {after.get(key)}" for key in keys if before.get(key) != after.get(key)]
    return found or (["both are dry runs"] if before.get("dry_run") else [])


def regressions(ratios: Sequence[Ratio], allowed: float) -> list[Ratio]:
    """Ratios of the request and of the forward that are slower by more than the share ``allowed``."""
    return [r for r in ratios if r.name in ("request", "forward") and r.ratio > 1 + allowed]


def require_output(path: Path, force: bool) -> None:
    """UserError CX675 where a measurement cannot be written to ``path``, before one is made."""
    if not path.absolute().parent.is_dir():
        raise UserError("CX675", f"there is no directory {path.absolute().parent}", "create it first")
    if path.is_dir():
        raise UserError("CX675", f"{path} is a directory", "name a file in it")
    if path.exists() and not force:
        raise UserError("CX675", f"{path} exists", "choose another name, or add --force")


def write(document: Mapping[str, Any], path: Path) -> None:
    """Write ``document`` to ``path``, whole or not at all."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    partial.replace(path)
