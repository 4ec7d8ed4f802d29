"""TensorRT-RTX: engines for one compute capability each, built on any machine, whose text of layers is read after."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from cosmos_export.diagnostics import UnsupportedError, UserError
from cosmos_export.precision.schemes import SCHEMES
from cosmos_export.targets.backends.protocol import Backend, Engines, PrecisionAsked, Requirement
from cosmos_export.targets.description import Target
from cosmos_export.targets.profiles import Profile
from cosmos_export.targets.trt import tensorrt_rtx
from cosmos_export.targets.trt.engines import EngineOrder, TrtEngines

if TYPE_CHECKING:
    from cosmos_export.bundle import BundleFiles, EngineCheck, Manifest
    from cosmos_export.targets.sessions import Executor
    from cosmos_export.targets.trt.checks import WantedEngine
    from cosmos_export.targets.trt.common import EngineReport
    from cosmos_export.targets.trt.engine_inspector import EngineSummary

MAX_SINGLE_STEPS = 8
"""Engines of one step in a loop on the device: as many as the published policy has, and two."""


class _Engines(TrtEngines, Engines):
    built_here = True
    flavor = tensorrt_rtx.FLAVOR
    module = flavor.module

    def require_gpu(self, target: Target) -> None:
        """The builder needs none."""

    def builder(self, order: EngineOrder) -> Callable[..., EngineReport]:
        return tensorrt_rtx.build_engine

    def inspect(self, path: Path) -> EngineSummary | None:
        from cosmos_export.targets.trt.engine_inspector import inspect_engine

        return inspect_engine(path)

    def checks(self, wanted: WantedEngine, report: EngineReport, found: EngineSummary | None) -> list[EngineCheck]:
        from cosmos_export.targets.trt.checks import plan_check

        assert found is not None  # `inspect` reads every engine of this builder
        return [plan_check(wanted, found)]

    def problem(self, file: BinaryIO, path: str, manifest: Manifest) -> str | None:
        from cosmos_export.targets.trt.engine_inspector import header_of
        from cosmos_export.targets.trt.plan_header import version_problem

        try:
            header = header_of(file, path)
        except UserError as error:
            return error.message
        found, target = header.compute_capabilities, manifest.target
        if found and target.compute_capability not in found:
            wanted = f"the target {target.name} has {target.compute_capability}"
            return f"is for compute capability {', '.join(found)}; {wanted}"
        return version_problem(header.version, manifest.tools.get(self.module))


class TensorRtRtx(Backend):
    name = "tensorrt-rtx"
    title = "TensorRT-RTX"
    devices = ("cuda",)
    requirements = (Requirement("tensorrt-rtx-cu13", "rtx"),)
    # A weight that several steps of one engine read is widened once for all of them, and is there in full.
    separates_weight_only_steps = True
    engines = _Engines()

    def precision_refusals(self, asked: PrecisionAsked) -> Iterator[UnsupportedError]:
        if asked.schemes and asked.checkpoint_dtype == "fp32":
            yield UnsupportedError(
                "CX358",
                f"recipe `{asked.recipe}` quantizes a bf16 model, and {asked.checkpoint} is fp32",
                "a bf16 checkpoint (`demo-checkpoint --dtype bfloat16` makes one), or the target `cpu`",
            )
        if asked.loop == "device" and asked.weight_only_steps > MAX_SINGLE_STEPS:
            yield UnsupportedError(
                "CX364",
                f"{asked.weight_only_steps} of {asked.steps} steps multiply narrow weights by wide activations, and "
                f"each would be an engine of its own (at most {MAX_SINGLE_STEPS})",
                "leave `--loop device` out, or choose a recipe that quantizes the generator's activations, such as fp8",
            )
        if any(SCHEMES[name].attention is not None for name in asked.schemes):
            yield from map(_open_dims, filter(_dynamic, asked.profiles))

    def open(self, files: BundleFiles, device: str | None) -> Executor:
        from cosmos_export.targets.trt.sessions import open_engines

        return open_engines(tensorrt_rtx.FLAVOR, self.name, files, device)


def _dynamic(profile: Profile) -> list[str]:
    return [dim for dim, span in profile.dims.items() if span.min != span.max]


def _open_dims(profile: Profile) -> UnsupportedError:
    """FP8 attention is fused only over a number of keys that is known when the engine is built."""
    dynamic = _dynamic(profile)
    fixed = ",".join(f"{dim}={profile.dims[dim].opt}" for dim in dynamic)
    return UnsupportedError(
        "CX359",
        f"FP8 attention needs to know the number of keys, and profile `{profile.name}` leaves "
        f"{', '.join(dynamic)} open: the builder would fall back to stored scores",
        f"fix them, for example `{profile.name},{fixed}`, or `--set gen.attention.core=bf16`",
    )


BACKEND = TensorRtRtx()
