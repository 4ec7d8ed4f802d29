"""Graphs as files of a bundle: models with their weights, and the engines built from them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from cosmos_export import files
from cosmos_export.bundle import BundleWriter, EngineCheck, Manifest, WeightInput
from cosmos_export.bundle.files import hash_file
from cosmos_export.compiler.cache import Cache, Entry, copy_checked, key_of
from cosmos_export.compiler.keys import (
    Components,
    engine_components,
    external_files,
    report_facts,
    report_from,
    weights_components,
)
from cosmos_export.diagnostics import InternalError
from cosmos_export.ir.graph import Graph
from cosmos_export.ir.spec import DTYPE_NAMES, WeightBinding
from cosmos_export.kernels.description import DOCUMENT, PLUGIN_FOLDER
from cosmos_export.progress import Progress
from cosmos_export.stamps import Stamp
from cosmos_export.targets import Target
from cosmos_export.targets.backends import Backend, backend_of
from cosmos_export.targets.backends.protocol import Engines, LoweredGraph
from cosmos_export.targets.onnx.weights import Stored, file_size, layout, write_weights
from cosmos_export.targets.profiles import Profile, input_shapes
from cosmos_export.targets.trt.checks import WantedEngine
from cosmos_export.targets.trt.common import EngineReport
from cosmos_export.targets.trt.engine_inspector import EngineSummary, PlanGraph, narrow_share
from cosmos_export.targets.trt.engines import EngineOrder

if TYPE_CHECKING:
    from cosmos_export.targets.onnx.plugins import Plugins

_log = logging.getLogger("cosmos_export")


@dataclass(frozen=True)
class Engine:
    """An engine of the bundle, what its build reported and which layers it has."""

    wanted: WantedEngine
    report: EngineReport
    found: EngineSummary | None
    """Contents of the engine; None where they cannot be read."""
    checks: tuple[EngineCheck, ...]
    profiles: tuple[str, ...]
    weights: tuple[WeightInput, ...] = ()
    """Weights that the engine takes as inputs."""

    @property
    def graph(self) -> str:
        return self.wanted.graph

    @property
    def attention(self) -> int:
        """Attentions of the graph. Each profile must have as many fused kernels, or a multiple where a loop is
        unrolled."""
        return self.wanted.attention

    @property
    def check(self) -> EngineCheck:
        """The check that failed, or the first one where all passed."""
        return next((check for check in self.checks if not check.passed), self.checks[0])

    @property
    def graphs(self) -> tuple[PlanGraph, ...]:
        """The layers of each profile; empty where they cannot be read."""
        return () if self.found is None else self.found.graphs

    @property
    def narrow_share(self) -> float:
        """The part of the layers' weights that is multiplied by in 8 or 4 bit, in the profile with the least."""
        return min((narrow_share(g, self.wanted.layer_weights) for g in self.graphs), default=0.0)

    @property
    def fused_attention(self) -> int:
        """Fused attention kernels in one profile."""
        return min((len(g.attention) for g in self.graphs), default=0)

    @property
    def activation_bytes(self) -> int:
        """Device memory for activations, of the profile that takes the most."""
        return max((g.activation_bytes for g in self.graphs), default=0)


@dataclass(frozen=True)
class EngineSettings:
    """Settings that the engines of a build share."""

    target: Target
    profiles: tuple[Profile, ...]
    cache: Path | None
    """Folder that knows engines of other bundles."""


def write_models(
    graphs: Mapping[str, Graph],
    stem: str,
    narrow: bool,
    backend: Backend,
    writer: BundleWriter,
    progress: Progress,
    *,
    external: bool = False,
    plugins: Plugins | None = None,
    places: Mapping[WeightBinding, Stored] | None = None,
) -> str:
    """Every graph as ``onnx/NAME.onnx`` on one file of weights, ``onnx/STEM.weights``.

    A ``narrow`` graph computes in bf16 and has a form for the CPU, ``NAME.cpu.onnx``, which computes in fp32. With
    ``external`` the form for engines takes its large weights as inputs, and there is one for the CPU as well; with
    ``plugins`` it has them. ``places``: where each weight is in the file; None: as `layout_of` has the graphs. Returns
    the suffix of the models that run on a CPU.
    """
    import onnx

    from cosmos_export.targets.onnx.lowering import lower

    stored = layout_of(graphs.values()) if places is None else dict(places)
    file = f"{stem}.weights"
    if file_size(stored):
        _write_weights(f"onnx/{file}", stored, f"weights of {stem}", writer, progress)
    apart = narrow or external
    forms: dict[str, torch.dtype | None] = {".cpu.onnx": torch.float32} if apart else {}
    if not apart or backend.engines is not None:
        forms[".onnx"] = None
    for name, graph in graphs.items():
        for suffix, compute in forms.items():
            path = writer.path(f"onnx/{name}{suffix}", "onnx")
            of_engine = apart and suffix == ".onnx"
            form: dict[str, Any] = {"external": external, "plugins": plugins} if of_engine else {}
            path.write_bytes(model_bytes(lower(graph, stored, file, compute=compute, **form)))
            onnx.checker.check_model(str(path))
        backend.write(LoweredGraph(name, graph, file, stored), writer)
    return ".cpu.onnx" if apart else ".onnx"


def write_plugins(plugins: Plugins, target: Target, writer: BundleWriter) -> None:
    """The kernels that models of the bundle have as ``plugins/``."""
    from cosmos_export.kernels.plugins import compile_plugins

    capability = int((target.compute_capability or "").replace(".", ""))
    folder = writer.path(f"{PLUGIN_FOLDER}/{DOCUMENT}", "plugin").parent
    for name in compile_plugins(list(plugins.forms.values()), capability, folder):
        writer.path(f"{PLUGIN_FOLDER}/{name}", "plugin")


def layout_of(graphs: Iterable[Graph]) -> dict[WeightBinding, Stored]:
    """Places of the weights of ``graphs`` in the one file that they share."""
    return layout(node.meta["weight"] for graph in graphs for node in graph.weights.values())


def weight_inputs(graph: Graph, file: str, stored: Mapping[WeightBinding, Stored]) -> tuple[WeightInput, ...]:
    """Weights that an engine of ``graph`` takes as inputs, in order, from ``file`` of the bundle."""
    from cosmos_export.targets.onnx.model import external_weights

    return tuple(
        WeightInput(
            name, file, stored[binding].offset, stored[binding].size_bytes, DTYPE_NAMES[binding.dtype], binding.shape
        )
        for name, binding in external_weights(graph).items()
    )


def _write_weights(
    name: str, stored: dict[WeightBinding, Stored], task: str, writer: BundleWriter, progress: Progress
) -> None:
    """The weight file ``name``, unless the writer has kept it from a build that was interrupted."""
    path, key = writer.path(name, "weights"), key_of(weights_components(stored))
    if writer.kept(name, key) is None:
        writer.keep(name, key, write_weights(path, stored, task, progress))


def model_bytes(model: object) -> bytes:
    """A model as it is written: the same bytes for the same model."""
    return model.SerializeToString(deterministic=True)  # type: ignore[attr-defined, no-any-return]


def build_engine(
    wanted: WantedEngine,
    inputs: Mapping[str, Sequence[int | str]],
    settings: EngineSettings,
    writer: BundleWriter,
    progress: Progress,
    weights: Sequence[WeightInput] = (),
) -> Engine:
    """``engines/NAME.engine`` from ``onnx/NAME.onnx``, which takes ``inputs``: dims over those of the profiles. What it
    contains is read from it, and compared with what is ``wanted``."""
    engines = backend_of(settings.target).engines
    assert engines is not None
    name = wanted.graph
    model, file = writer.path(f"onnx/{name}.onnx", "onnx"), f"engines/{name}.engine"
    order = EngineOrder([input_shapes(profile, inputs) for profile in settings.profiles], wanted.decomposable_attention)
    report = _report(engines, model, writer.path(file, "engine"), order, settings, writer, progress)
    found = engines.inspect(report.path)
    names = tuple(profile.name for profile in settings.profiles)
    return Engine(wanted, report, found, tuple(engines.checks(wanted, report, found)), names, tuple(weights))


def _report(
    engines: Engines,
    model: Path,
    path: Path,
    order: EngineOrder,
    settings: EngineSettings,
    writer: BundleWriter,
    progress: Progress,
) -> EngineReport:
    """The engine at ``path``: kept from a build that was interrupted, copied from another bundle, or built."""
    name, file = model.stem, f"engines/{path.name}"
    form = {"decomposable_attention": order.decomposable_attention}
    weights = [_digest_of(f"onnx/{one}", writer) for one in external_files(model)]
    components = engine_components(model, weights, settings.target, order.profiles, form, engines.key())
    key = key_of(components)
    kept = writer.kept(file, key)
    if kept is not None:
        resumed = report_from(path, kept.facts, "resumed", kept.size_bytes, kept.sha256)
        if resumed is not None:
            return resumed
    copied = _copied(name, key, components, path, Cache(settings.cache), progress)
    report = copied or engines.build(model, path, order, settings.target, progress)
    writer.keep(file, key, report.sha256, {**report_facts(report), "components": dict(components)})
    return report


def _digest_of(name: str, writer: BundleWriter) -> str:
    digest = writer.digest(name)
    if digest is None:
        raise InternalError("CX441", f"{name} has weights of an engine and was not kept")
    return digest


def _copied(
    name: str, key: str, components: Components, path: Path, known: Cache, progress: Progress
) -> EngineReport | None:
    """The engine from another bundle, if one has it."""
    entry = known.find(key)
    if entry is not None:
        report = report_from(path, entry.facts, "cache", entry.size_bytes, entry.sha256)
        root = Path(entry.path).parents[1]
        if report is None:
            _log.warning("engine %s: the entry %s is damaged", name, entry.key[:12])
        elif not _made_from(components, root, name, _hashed):
            _log.warning("engine %s: not copied from %s, which is not what it was built from", name, root)
        elif copy_checked(entry, path, progress):
            _log.debug("engine %s: copied from %s", name, entry.path)
            return report
    if known.folder is not None and _log.isEnabledFor(logging.DEBUG):
        _log.debug("engine %s: built: %s", name, known.why(name, components))
    return None


def cache_entries(writer: BundleWriter, manifest: Manifest, created: str) -> Iterator[Entry]:
    """Cache entries for the engines of a committed bundle: those that were built from the files in it."""
    digests = {writer.output / file.path: file.sha256 for file in manifest.files}
    for kept in writer.all_kept():
        if kept.name.startswith("engines/"):
            facts = {name: value for name, value in kept.facts.items() if name != "components"}
            title = Path(kept.name).name.removesuffix(".engine")
            path = writer.output / kept.name
            components = kept.facts.get("components")
            if not isinstance(components, Mapping) or key_of(components) != kept.key:
                continue
            if digests.get(path) == kept.sha256 and _made_from(components, writer.output, title, digests.get):
                yield Entry(kept.key, title, components, str(path), kept.size_bytes, kept.sha256, facts, created)


def _made_from(components: Components, root: Path, name: str, digest: Callable[[Path], str | None]) -> bool:
    """Whether the model ``name`` of the bundle at ``root``, and its weights, are what ``components`` say that an engine
    was built from. ``digest`` knows the SHA-256 of a file."""
    model = root / "onnx" / f"{name}.onnx"
    if digest(model) != components.get("graph"):
        return False
    weights = [digest(model.with_name(file)) for file in external_files(model)]
    return None not in weights and ",".join(map(str, weights)) == components.get("weights")


def _hashed(path: Path) -> str | None:
    """SHA-256 of a file of another bundle; None where it cannot be read. The engines of a bundle share weights."""
    with suppress(OSError):
        return _hash(path, Stamp.of(path))
    return None


@cache
def _hash(path: Path, _: Stamp) -> str:
    with files.opened(path) as file:
        return hash_file(file.fileno())[1]
