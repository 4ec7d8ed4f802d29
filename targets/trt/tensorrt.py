"""The TensorRT backend: engines for Hopper, data-centre Blackwell and Jetson Thor, built on the GPU they run on.

The network, profiles, progress and the process that builds are those of TensorRT-RTX (`common`); here is what full
TensorRT has besides: settings of compatibility, a timing cache, and an inspector that lists the layers of an engine.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from cosmos_export.diagnostics import InternalError, UnsupportedError
from cosmos_export.machine.gpu import gpus
from cosmos_export.machine.packages import JETPACK, installed_release, is_older, jetpack_release
from cosmos_export.progress import Progress
from cosmos_export.targets.description import Target
from cosmos_export.targets.profiles import ShapeRange
from cosmos_export.targets.trt.common import EngineReport, TrtFlavor, run_build

FLAVOR = TrtFlavor(
    module="tensorrt",
    title="TensorRT",
    extra="tensorrt",
    distribution="tensorrt-cu13",
    capabilities=frozenset(),  # that of the GPU in the machine
    first_version=(11, 0),  # networks are strongly typed without a flag, and set_timing_cache refuses another machine's
)


@dataclass(frozen=True)
class BuilderOptions:
    """How an engine is built: the ``[engine]`` table of a target."""

    hardware_compatibility: Literal["none", "same-compute-capability", "ampere-plus"] = "none"
    version_compatible: bool = False
    """Runs in later releases of the same major version, at the price of kernels that are not in all of them."""
    weight_streaming: bool = False
    """Weights may stay on the host and be streamed."""

    @classmethod
    def of(cls, target: Target) -> BuilderOptions:
        """Those of ``target``; InternalError CX402 for a key or value that is none."""
        try:
            settings = cls(**dict(target.engine))
        except TypeError as error:
            raise InternalError("CX402", f"target `{target.name}`, [engine]: {error}") from error
        allowed = ("none", "same-compute-capability", "ampere-plus")
        if settings.hardware_compatibility not in allowed:
            raise InternalError("CX402", f"target `{target.name}`: hardware_compatibility is not one of {allowed}")
        return settings


def worker_settings(target: Target, timing_cache: Path | None, plugins: Path | None = None) -> dict[str, Any]:
    """Settings of the build process besides the network."""
    paths = {"timing_cache": timing_cache, "plugins": plugins}
    settings = {name: str(path.resolve()) if path else None for name, path in paths.items()}
    return {**asdict(BuilderOptions.of(target)), **settings, "inspect": True}


def require_gpu(target: Target) -> None:
    """UnsupportedError CX405 where no GPU of this machine is the target's: an engine is built where it runs; CX406 as
    `require_releases`."""
    found = gpus()
    if target.compute_capability not in {gpu.compute_capability for gpu in found}:
        there = ", ".join(f"{gpu.name} ({gpu.compute_capability})" for gpu in found) or "none"
        raise UnsupportedError(
            "CX405",
            f"engines for `{target.name}` are built on a GPU of compute capability {target.compute_capability}; "
            f"this machine has: {there}",
            "build the bundle anywhere and finish it on that machine: `finish.sh` in the bundle",
        )
    require_releases(target)


def require_releases(target: Target) -> None:
    """UnsupportedError CX406 where TensorRT or JetPack of this machine is older than the first that has the target."""
    for name, least in target.least.items():
        found = jetpack_release() if name == JETPACK else installed_release(name)
        if found is not None and is_older(found, least):
            upgrade = "install that JetPack, or a later one" if name == JETPACK else f"pip install '{name}>={least}'"
            raise UnsupportedError(
                "CX406", f"engines for `{target.name}` need {name} {least} or later; this machine has {found}", upgrade
            )


def build_engine(
    onnx_path: Path,
    output: Path,
    *,
    target: Target,
    profiles: Sequence[Mapping[str, ShapeRange]],
    progress: Progress | None = None,
    timeout_s: float | None = None,
    decomposable_attention: bool = False,
    timing_cache: Path | None = None,
    plugins: Path | None = None,
) -> EngineReport:
    """Build ``onnx_path`` for ``target`` on this machine's GPU and write the engine to ``output``.

    As `tensorrt_rtx.build_engine`; kernel timings are read from ``timing_cache`` and added to it, and the model's nodes
    may be plugins of the folder ``plugins``.
    """
    require_gpu(target)
    return run_build(
        FLAVOR,
        onnx_path,
        output,
        target=target,
        profiles=profiles,
        progress=progress,
        timeout_s=timeout_s,
        decomposable_attention=decomposable_attention,
        settings=worker_settings(target, timing_cache, plugins),
    )
