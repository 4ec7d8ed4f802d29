"""How engines of TensorRT and TensorRT-RTX are built; a backend adds where, and how its engines are read."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from cosmos_export.progress import Progress
from cosmos_export.targets.description import Target
from cosmos_export.targets.profiles import ShapeRange
from cosmos_export.targets.trt import common
from cosmos_export.targets.trt.common import EngineReport, TrtFlavor


@dataclass(frozen=True)
class EngineOrder:
    """How one engine is built from its model."""

    profiles: Sequence[Mapping[str, ShapeRange]]
    """Input → smallest, optimal and largest shape, for each profile."""
    decomposable_attention: bool = False
    """Attention without a fused kernel may become matrix products over stored scores; otherwise its build fails."""
    timing_cache: Path | None = None
    """File of kernel timings, which are read and added to; None: every kernel is timed anew."""
    plugins: Path | None = None
    """Folder of this project's kernels that the model has as plugins; None: it has none."""


class TrtEngines(ABC):
    """The answers that the backends of both builders share, of `cosmos_export.targets.backends.protocol.Engines`."""

    flavor: ClassVar[TrtFlavor]

    @abstractmethod
    def builder(self, order: EngineOrder) -> Callable[..., EngineReport]:
        """The function that builds, with what of ``order`` this builder alone takes."""

    def require(self) -> None:
        common.require_module(self.flavor)

    def key(self) -> Mapping[str, str]:
        return common.builder_key(self.flavor.module)

    def build(
        self, model: Path, output: Path, order: EngineOrder, target: Target, progress: Progress | None = None
    ) -> EngineReport:
        settings: dict[str, Any] = {
            "target": target,
            "profiles": order.profiles,
            "progress": progress,
            "decomposable_attention": order.decomposable_attention,
        }
        return self.builder(order)(model, output, **settings)
