"""Engine files of a bundle against its manifest, by their headers: what verification of bytes cannot say."""

from __future__ import annotations

from collections.abc import Iterator

from cosmos_export.bundle import BundleFiles
from cosmos_export.diagnostics import FindingError, UserError
from cosmos_export.targets.trt.engine_inspector import header_of
from cosmos_export.targets.trt.sessions import NAME


def engine_problems(files: BundleFiles) -> Iterator[tuple[str, str]]:
    """Path of each engine that is not one for the manifest's target, and why.

    Only engines of TensorRT-RTX have a header that is known; where its version is not, magic and size are compared.
    """
    target = files.manifest.target
    for engine in files.manifest.engines if target.backend == NAME else ():
        try:
            with files.open(engine.path, "engine") as file:
                header = header_of(file, engine.path)
        except (UserError, FindingError) as error:
            yield engine.path, error.message
            continue
        found = header.compute_capabilities
        if found and target.compute_capability not in found:
            wanted = f"the target {target.name} has {target.compute_capability}"
            yield engine.path, f"is for compute capability {', '.join(found)}; {wanted}"
