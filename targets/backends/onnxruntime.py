"""ONNX Runtime, the reference executor: it runs the models that every bundle has."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cosmos_export.targets.backends.protocol import Backend, Requirement

if TYPE_CHECKING:
    from cosmos_export.bundle import BundleFiles
    from cosmos_export.targets.sessions import Executor


class OnnxRuntime(Backend):
    name = "onnxruntime"
    title = "ONNX Runtime"
    devices = ("cpu", "cuda")
    requirements = (Requirement("onnxruntime", "compile"),)
    needs_gpu = False

    def open(self, files: BundleFiles, device: str | None) -> Executor:
        from cosmos_export.targets.onnx.sessions import open_models

        return open_models(files, device)


BACKEND = OnnxRuntime()
