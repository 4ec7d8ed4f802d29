"""Keys of files that take long to make, from everything they are made from: equal keys, equal bytes.

A key is the digest of its components, which are kept beside it in plain words, so that two keys that differ can be
told apart. Weight files are known by the checkpoint's files they are copied from; engines by the digests of all they
are built from, wherever it came from.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from cosmos_export.bundle import strict
from cosmos_export.ir.spec import WeightBinding, WeightSource
from cosmos_export.kernels.description import NAMESPACE
from cosmos_export.release import VERSION
from cosmos_export.stamps import Stamp
from cosmos_export.targets import Target
from cosmos_export.targets.onnx.weights import Stored
from cosmos_export.targets.profiles import ShapeRange
from cosmos_export.targets.trt.common import EngineFacts, EngineReport

Components = Mapping[str, str]
"""Parts of a key: name → value, or digest of it."""


def weights_components(stored: Mapping[WeightBinding, Stored]) -> Components:
    """Key of a weight file: where each of its bytes comes from. Source files are known by size, times and inode."""
    files = {source.file for binding in stored for source in _read_by(binding)}
    told = {file: _file_identity(file) for file in files}
    bindings = [
        [
            # Every field a binding has, so that one that is added counts too.
            [repr(getattr(binding, field.name)) for field in fields(binding) if field.name != "sources"],
            place.offset,
            [[told[s.file], s.offset, str(s.dtype), list(s.shape)] for s in _read_by(binding)],
        ]
        for binding, place in stored.items()
    ]
    return {"compiler": VERSION, "weights": _digest(bindings)}


def _read_by(binding: WeightBinding) -> Iterator[WeightSource]:
    """Everything on disk that the value of ``binding`` follows from."""
    for source in binding.sources:
        yield source
        if source.scale is not None:
            yield source.scale
    if binding.packing is not None and binding.packing.divisor is not None:
        yield binding.packing.divisor
    if binding.packing is not None and binding.packing.low_rank is not None:
        yield from (binding.packing.low_rank.down, *binding.packing.low_rank.up)


def engine_components(
    model: Path,
    weights: Sequence[str],
    target: Target,
    profiles: Sequence[Mapping[str, ShapeRange]],
    settings: Mapping[str, Any],
    builder: Mapping[str, str],
) -> Components:
    """Key of an engine. ``weights``: digests of the files that ``model`` takes its weights from; ``builder``: the key
    of `Engines`."""
    return {
        "graph": hashlib.sha256(model.read_bytes()).hexdigest(),
        "weights": ",".join(weights),
        "target": target.compute_capability or "",
        "profiles": _digest([dict(profile) for profile in profiles]),
        "settings": json.dumps(dict(settings), sort_keys=True),
        **builder,
    }


def external_files(model: Path) -> list[str]:
    """Names of the files that hold the weights of an ONNX model, sorted."""
    import onnx

    loaded = onnx.load(str(model), load_external_data=False)
    found: set[str] = set()
    for graph in _graphs(loaded.graph):
        for tensor in graph.initializer:
            found |= {entry.value for entry in tensor.external_data if entry.key == "location"}
    return sorted(found)


def plugin_nodes(model: Path) -> Counter[str]:
    """Kernel → nodes of an ONNX model that run a form of it."""
    import onnx

    nodes = [node for graph in _graphs(onnx.load(str(model), load_external_data=False).graph) for node in graph.node]
    return Counter(node.op_type.rpartition("_")[0] for node in nodes if node.domain == NAMESPACE)


def _graphs(graph: Any) -> list[Any]:
    """A graph and those in its nodes' attributes."""
    found = [graph]
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("g"):
                found += _graphs(attribute.g)
    return found


def report_facts(report: EngineReport) -> dict[str, Any]:
    """An engine's report as plain values, without its path and where it was taken from."""
    facts = asdict(report)
    del facts["path"], facts["reused"]
    return facts


def report_from(path: Path, facts: Mapping[str, Any], reused: str, size_bytes: int, sha256: str) -> EngineReport | None:
    """The report of the engine that is at ``path`` now, taken over from ``reused``; None where ``facts`` is not one, or
    not of that file."""
    names = {field.name for field in fields(EngineFacts)}
    plain = json.loads(json.dumps({name: value for name, value in facts.items() if name in names}))
    try:
        found = strict.decode(EngineFacts, plain)
    except strict.StrictError:
        return None
    if (found.size_bytes, found.sha256) != (size_bytes, sha256):
        return None
    values = {name: getattr(found, name) for name in names}
    return EngineReport(path=path, reused=reused, **values)


def _file_identity(path: Path) -> list[Any]:
    """Facts that change when the file does. Devices are numbered anew when a machine starts."""
    found = Stamp.of(path)
    return [path.name, found.size_bytes, found.mtime_ns, found.ctime_ns, found.inode]


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
