"""From a directory to a bundle that runs: everything is verified before any backend is given a byte of it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from cosmos_export.arguments import whole
from cosmos_export.bundle import BundleFiles, Manifest, read_files
from cosmos_export.diagnostics import FindingError, UserError, shown
from cosmos_export.progress import Progress, Silent
from cosmos_export.runtime.chains import ChainedExecutor
from cosmos_export.runtime.contents import content_problems
from cosmos_export.targets.backends import backends
from cosmos_export.targets.sessions import Executor


@dataclass(frozen=True)
class LoadedBundle:
    """A verified bundle and what runs it."""

    files: BundleFiles
    executor: Executor

    @property
    def manifest(self) -> Manifest:
        return self.files.manifest


def load_bundle(
    path: Path | BundleFiles,
    *,
    backend: str | None = None,
    device: str | None = None,
    progress: Progress | None = None,
) -> LoadedBundle:
    """Verify the bundle at ``path``, every byte, and open ``backend`` for it (None: the one it was built for).

    What is used afterwards is what was verified: the directory stays open, and a link to it may change.

    UserError CX504: no such backend or device. FindingError CX711: the bundle is not what its manifest says.
    UnsupportedError CX503: the backend is not installed; CX505: it has no device that can run this bundle.
    """
    if backend is not None:
        _require_known(backend, device)
    files = read_files(path if isinstance(path, BundleFiles) else Path(path), progress or Silent())
    for name, problem in content_problems(files):
        raise FindingError(
            "CX711", f"{files.path} fails verification: {shown(name)}: {problem}", "build the bundle again"
        )
    chosen = backend or files.manifest.target.backend
    _require_known(chosen, device)
    return LoadedBundle(files, chained(backends()[chosen].open(files, device), files.manifest))


def chained(executor: Executor, manifest: Manifest) -> Executor:
    """``executor`` with the graphs of ``manifest`` that were cut, each as the one session of its parts."""
    if not manifest.chains:
        return executor
    cut = {graph: manifest.graphs[graph] for graph in manifest.chains}
    names = {g: ([t.name for t in c.inputs], [t.name for t in c.outputs]) for g, c in cut.items()}
    return ChainedExecutor(executor, manifest.chains, names)


def _require_known(backend: str, device: str | None) -> None:
    if backend not in backends():
        raise UserError(
            "CX504",
            f"backend {shown(backend)} is not known; known: {', '.join(backends())}",
            "leave --backend out for the bundle's own",
        )
    kind, _, index = (device or "").partition(":")
    allowed = backends()[backend].devices
    if device is not None and (kind not in allowed or (":" in device and whole(index) is None)):
        names = [name if name == "cpu" else f"{name} or {name}:N" for name in allowed]
        raise UserError(
            "CX504",
            f"device {shown(device)} is not one of `{backend}`; it runs on {', '.join(names)}",
            f"--device {allowed[0]}",
        )
