"""The TensorRT-RTX backend: engines for one compute capability each, built on any machine, no GPU needed.

One engine per compute capability: an engine for several falls back to kernels that expand K/V in memory.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from cosmos_export.progress import Progress
from cosmos_export.targets.description import Target
from cosmos_export.targets.profiles import ShapeRange
from cosmos_export.targets.trt.common import EngineReport, TrtFlavor, run_build

FLAVOR = TrtFlavor(
    module="tensorrt_rtx",
    title="TensorRT-RTX",
    extra="rtx",
    distribution="tensorrt-rtx-cu13",
    # 7.5 has no BF16; 8.0 and 8.6 build but expand K/V for each query head.
    capabilities=frozenset({"8.0", "8.6", "8.9", "12.0", "12.1"}),
)


def build_engine(
    onnx_path: Path,
    output: Path,
    *,
    target: Target,
    profiles: Sequence[Mapping[str, ShapeRange]],
    progress: Progress | None = None,
    timeout_s: float | None = None,
    allow_tf32: bool = False,
    decomposable_attention: bool = False,
) -> EngineReport:
    """Build ``onnx_path`` for ``target`` and write the engine to ``output``.

    ``profiles`` gives each dynamic input its smallest, optimal and largest shape, once a profile. Nothing is left at
    ``output`` unless the build succeeded; what was there before stays until then. ``allow_tf32`` matters to FP32 graphs
    only. ``decomposable_attention`` lets attention without a fused kernel (FP32, head sizes over 256) become matrix
    products over stored scores; without it such a graph fails, which is the guard against that cost.
    """
    return run_build(
        FLAVOR,
        onnx_path,
        output,
        target=target,
        profiles=profiles,
        progress=progress,
        timeout_s=timeout_s,
        allow_tf32=allow_tf32,
        decomposable_attention=decomposable_attention,
    )
