"""Engine files of a bundle against its manifest, by their headers: what verification of bytes cannot say."""

from __future__ import annotations

from collections.abc import Iterator

from cosmos_export.bundle import BundleFiles
from cosmos_export.diagnostics import FindingError
from cosmos_export.targets.backends import backends


def engine_problems(files: BundleFiles) -> Iterator[tuple[str, str]]:
    """Path of each engine that is not one for the manifest's target, and why.

    A bundle of a backend that is not known here has none that could be told.
    """
    backend = backends().get(files.manifest.target.backend)
    if backend is None or backend.engines is None:
        return
    for engine in files.manifest.engines:
        try:
            with files.open(engine.path, "engine") as file:
                problem = backend.engines.problem(file, engine.path, files.manifest)
        except FindingError as error:
            problem = error.message
        if problem is not None:
            yield engine.path, problem
