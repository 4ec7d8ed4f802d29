"""TensorRT: a build writes models and requests, and engines are built from them on the GPU that they run on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from cosmos_export.diagnostics import CosmosExportError, UnsupportedError, UserError
from cosmos_export.targets.backends.protocol import Backend, BuildAsked, Engines, Requirement
from cosmos_export.targets.description import Target
from cosmos_export.targets.trt import tensorrt
from cosmos_export.targets.trt.engines import EngineOrder, TrtEngines

if TYPE_CHECKING:
    from cosmos_export.bundle import BundleFiles, EngineCheck, Manifest
    from cosmos_export.targets.sessions import Executor
    from cosmos_export.targets.trt.checks import WantedEngine
    from cosmos_export.targets.trt.common import EngineReport
    from cosmos_export.targets.trt.engine_inspector import EngineSummary


class _Engines(TrtEngines, Engines):
    built_here = False
    flavor = tensorrt.FLAVOR
    module = flavor.module

    def require_gpu(self, target: Target) -> None:
        tensorrt.require_gpu(target)

    def builder(self, order: EngineOrder) -> Callable[..., EngineReport]:
        return partial(tensorrt.build_engine, timing_cache=order.timing_cache, plugins=order.plugins)

    def inspect(self, path: Path) -> EngineSummary | None:
        return None

    def checks(self, wanted: WantedEngine, report: EngineReport, found: EngineSummary | None) -> list[EngineCheck]:
        from cosmos_export.targets.trt.checks import report_checks

        return report_checks(wanted, report)

    def problem(self, file: BinaryIO, path: str, manifest: Manifest) -> str | None:
        from cosmos_export.targets.trt.plan_header import plan_version, version_problem

        try:
            found = plan_version(file, path)
        except UserError as error:
            return error.message
        return None if found is None else version_problem(found, manifest.tools.get(self.module))


class TensorRt(Backend):
    name = "tensorrt"
    title = "TensorRT"
    devices = ("cuda",)
    requirements = (Requirement("tensorrt-cu13", "tensorrt"),)
    takes_kernels = True
    engines = _Engines()

    def refusals(self, asked: BuildAsked, target: Target) -> Iterator[CosmosExportError]:
        yield from super().refusals(asked, target)
        if asked.kernels and find_spec("triton") is None:
            yield UnsupportedError(
                "CX802",
                "compiling kernels needs Triton, not installed here",
                'pip install ".[kernels]" in the checkout',
            )

    def open(self, files: BundleFiles, device: str | None) -> Executor:
        from cosmos_export.targets.trt.sessions import open_engines

        return open_engines(tensorrt.FLAVOR, self.name, files, device)


BACKEND = TensorRt()
