"""Calibration of a checkpoint that does not fit into memory: all samples through one decoder layer, then the next.

Between layers the hidden states of the samples are on disk, one file per sample, each with what the last layer was seen
to do with it. A file is replaced whole, so a calibration that is killed goes on where it was and ends with the same
table: what a sample adds to a range can be added in any order, a maximum or counts.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cosmos_export import directories
from cosmos_export.calibration.layers import Hidden, LayerSource
from cosmos_export.calibration.observers import ObservedRange, Observer, choose_range
from cosmos_export.calibration.search import Array, Search, SearchResult
from cosmos_export.calibration.watch import Seen, Watched
from cosmos_export.checkpoint.safetensors_header import read_header
from cosmos_export.checkpoint.strict_json import optional_object
from cosmos_export.diagnostics import FindingError, UserError
from cosmos_export.progress import Progress, Silent

PLAN_FILE = "plan.json"
_ROTARY = ("cos_und", "sin_und", "cos_gen", "sin_gen")
_TASK = "calibrate"

_PRE, _DOWN, _UP = "pre:", "down:", "up:"


@dataclass(frozen=True)
class LayerResult:
    """Findings of one layer, by their names in the table without the layer's name. Arrays are mapped."""

    ranges: Mapping[str, float]
    pre_scales: Mapping[str, Array]
    low_rank: Mapping[str, tuple[Array, Array]]
    schemes: Mapping[str, str]


class Workspace:
    """The directory of a calibration in progress. One that was made for other inputs is emptied.

    ``require_inputs`` raises where the checkpoint is not what it was any more: then nothing that follows is written.
    """

    def __init__(
        self, folder: Path, plan: Mapping[str, Any], require_inputs: Callable[[], None] = lambda: None
    ) -> None:
        self.folder, self._require_inputs = folder, require_inputs
        self._states, self._layers = folder / "states", folder / "layers"
        if os.path.lexists(folder) and not directories.private(folder):
            raise UserError(
                "CX349",
                f"{folder} is not a directory that this user alone may write to, so nothing of it is taken over",
                "remove it, or choose another output",
            )
        known = optional_object(folder / PLAN_FILE) if folder.is_dir() else None
        self.resumed = known == json.loads(json.dumps(plan))
        if not self.resumed:
            shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(0o700, parents=True, exist_ok=True)
        for path in (self._states, self._layers):
            path.mkdir(parents=True, exist_ok=True)
        if not self.resumed:
            _replace(folder / PLAN_FILE, lambda path: path.write_text(json.dumps(plan), encoding="utf-8"))

    def remove(self) -> None:
        """The calibration is over."""
        shutil.rmtree(self.folder, ignore_errors=True)

    # -- samples ------------------------------------------------------------------------------------------------------

    def passed(self, sample: int) -> int | None:
        """Layers that ``sample`` has been through; None where it has not entered the first."""
        path = self._state(sample)
        return int(read_header(path).metadata["passed"]) if path.is_file() else None

    def enter(self, sample: int, hidden: Hidden) -> None:
        """Write the rotations of ``sample``, which no layer changes, and what enters the first layer."""
        _save(self._rotary(sample), dict(zip(_ROTARY, hidden.rotary, strict=True)), {})
        self._write(sample, hidden, 0, Seen())

    def hidden(self, sample: int) -> Hidden:
        """The inputs of the next layer."""
        from safetensors.torch import load_file

        rotary, state = load_file(self._rotary(sample)), load_file(self._state(sample))
        cos_und, sin_und, cos_gen, sin_gen = (rotary[name] for name in _ROTARY)
        return Hidden(state["und"], state["gen"], (cos_und, sin_und, cos_gen, sin_gen))

    def advance(self, sample: int, hidden: Hidden, passed: int, seen: Seen) -> None:
        """``sample`` has been through ``passed`` layers, the last of which was ``seen``."""
        self._write(sample, hidden, passed, seen)

    def seen(self, sample: int) -> Seen:
        """Observations of the last layer for ``sample``."""
        from safetensors import safe_open

        with safe_open(self._state(sample), framework="pt") as file:
            metadata = file.metadata() or {}
            amax, readers = json.loads(metadata["amax"]), json.loads(metadata["readers"])
            names = list(file.keys())
            counts = {n.partition(":")[2]: file.get_tensor(n) for n in names if n.startswith("counts:")}
            rows = {n.partition(":")[2]: file.get_tensor(n) for n in names if n.startswith("rows:")}
            sums = {n.partition(":")[2]: file.get_tensor(n) for n in names if n.startswith("sums:")}
        ranges = {name: ObservedRange(float.fromhex(value), counts.get(name)) for name, value in amax.items()}
        return Seen(ranges, readers, rows, sums)

    def _write(self, sample: int, hidden: Hidden, passed: int, seen: Seen) -> None:
        self._require_inputs()
        tensors = {"und": hidden.und, "gen": hidden.gen}
        tensors |= {f"counts:{n}": o.counts for n, o in seen.ranges.items() if o.counts is not None}
        tensors |= {f"rows:{name}": rows for name, rows in seen.rows.items()}
        tensors |= {f"sums:{name}": sums for name, sums in seen.sums.items()}
        amax = {name: o.amax.hex() for name, o in seen.ranges.items()}
        metadata = {"passed": str(passed), "amax": json.dumps(amax), "readers": json.dumps(seen.readers)}
        _save(self._state(sample), tensors, metadata)

    def _state(self, sample: int) -> Path:
        return self._states / f"{sample:06d}.safetensors"

    def _rotary(self, sample: int) -> Path:
        return self._states / f"{sample:06d}.rotary.safetensors"

    # -- layers -------------------------------------------------------------------------------------------------------

    def result(self, layer: int) -> LayerResult | None:
        """The result of ``layer``; None where there is none yet."""
        path = self._layers / f"{layer:05d}.safetensors"
        if not path.is_file():
            return None
        header = read_header(path)
        ranges, schemes = (json.loads(header.metadata[name]) for name in ("ranges", "schemes"))
        arrays = {name: entry.mapped() for name, entry in header.tensors.items()}

        def called(prefix: str) -> dict[str, Array]:
            return {name.removeprefix(prefix): value for name, value in arrays.items() if name.startswith(prefix)}

        down, up = called(_DOWN), called(_UP)
        found = {name: float.fromhex(value) for name, value in ranges.items()}
        return LayerResult(found, called(_PRE), {name: (down[name], up[name]) for name in down}, schemes)

    def finish(self, layer: int, ranges: Mapping[str, float], found: SearchResult) -> LayerResult:
        """Write the result of ``layer``, and return it."""
        self._require_inputs()
        tensors = {f"{_PRE}{name}": scale for name, scale in found.pre_scales.items()}
        tensors |= {f"{_DOWN}{name}": down for name, (down, _) in found.low_rank.items()}
        tensors |= {f"{_UP}{name}": up for name, (_, up) in found.low_rank.items()}
        metadata = {"ranges": json.dumps({name: value.hex() for name, value in ranges.items()})}
        metadata["schemes"] = json.dumps(dict(found.schemes))
        path = self._layers / f"{layer:05d}.safetensors"
        _save(path, {name: tensor.float() for name, tensor in tensors.items()}, metadata)
        result = self.result(layer)
        assert result is not None
        return result


def run_layers(
    source: LayerSource,
    workspace: Workspace,
    samples: Sequence[str],
    observer: Observer,
    *,
    search: Search | None = None,
    rows: int = 0,
    progress: Progress | None = None,
) -> list[LayerResult]:
    """All ``samples`` (their names, for messages) through all layers. They have entered ``workspace``.

    ``search`` looks at ``rows`` rows of each sample. CX321: an activation is NaN or infinite.
    """
    report = progress or Silent()
    report.begin(_TASK, source.count * len(samples))
    watch, results = Watched(observer.counts, rows if search is not None else 0), []
    for layer in range(source.count):
        result = workspace.result(layer)
        if result is None:
            module = source.load(layer)
            for index, name in enumerate(samples):
                if workspace.passed(index) != layer + 1:
                    hidden, seen = _through(module, workspace.hidden(index), watch)
                    _require_finite(seen, layer, name)
                    workspace.advance(index, hidden, layer + 1, seen)
                report.update(_TASK, layer * len(samples) + index + 1)
            result = workspace.finish(layer, *_found(module, workspace, len(samples), observer, search))
            source.drop()
        report.update(_TASK, (layer + 1) * len(samples))
        results.append(result)
    report.end(_TASK)
    return results


def _through(module: nn.Module, hidden: Hidden, watch: Watched) -> tuple[Hidden, Seen]:
    with torch.no_grad(), watch.on(module) as seen:
        und, gen = module(hidden.und, hidden.gen, hidden.rotary)
    return Hidden(und, gen, hidden.rotary), seen


def _require_finite(seen: Seen, layer: int, sample: str) -> None:
    for name, observation in seen.ranges.items():
        if not observation.finite:
            what = name.removesuffix(".input_amax")
            raise FindingError(
                "CX321",
                f"the input of layers.{layer}.{what} is not finite for {sample}",
                "the sample or a weight before it holds NaN or infinite values; check both",
            )


def _found(
    module: nn.Module, workspace: Workspace, samples: int, observer: Observer, search: Search | None
) -> tuple[dict[str, float], SearchResult]:
    merged: dict[str, ObservedRange] = {}
    readers: Mapping[str, Sequence[str]] = {}
    rows: dict[str, list[torch.Tensor]] = {}
    sums: dict[str, torch.Tensor] = {}
    for seen in (workspace.seen(index) for index in range(samples)):
        for name, observation in seen.ranges.items():
            merged[name] = merged[name].merged(observation) if name in merged else observation
        readers = seen.readers
        for name, kept in seen.rows.items():
            rows.setdefault(name, []).append(kept)
        for name, total in seen.sums.items():
            sums[name] = sums[name] + total if name in sums else total
    ranges = {name: choose_range(observer, observation) for name, observation in merged.items()}
    if search is None:
        return ranges, SearchResult()
    means = {name: (total[:-1] / total[-1]).float() for name, total in sums.items()}
    return ranges, search(module, readers, {name: torch.cat(kept) for name, kept in rows.items()}, means)


def zero_ranges(results: Sequence[LayerResult]) -> Iterator[str]:
    """Names of what was never anything but zero, so that nothing is known of it."""
    for layer, result in enumerate(results):
        for name, value in result.ranges.items():
            if not (math.isfinite(value) and value > 0):
                yield f"layers.{layer}.{name}"


def _save(path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> None:
    from safetensors.torch import save_file

    # The file format has neither a tensor twice nor strides: tensors that share memory get copies of their own, and a
    # plain copy would keep the strides.
    seen: set[int] = set()
    contiguous: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        shared = tensor.data_ptr() in seen
        contiguous[name] = tensor.clone(memory_format=torch.contiguous_format) if shared else tensor.contiguous()
        seen.add(tensor.data_ptr())
    _replace(path, lambda partial: save_file(contiguous, partial, metadata=dict(metadata)))


def _replace(path: Path, write: Callable[[Path], object]) -> None:
    """Write beside ``path`` and rename: a reader finds the old file or the new one."""
    partial = path.with_name(f".{path.name}.partial")
    write(partial)
    partial.replace(path)
