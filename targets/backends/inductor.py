"""PyTorch's inductor: the graphs as they are after all passes, compiled when a bundle is first run."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from cosmos_export.targets.backends.protocol import Backend, LoweredGraph, Requirement

if TYPE_CHECKING:
    from cosmos_export.bundle import BundleFiles, BundleWriter
    from cosmos_export.ir.spec import WeightBinding
    from cosmos_export.targets.sessions import Executor


class Inductor(Backend):
    name = "inductor"
    title = "PyTorch's inductor"
    devices = ("cuda", "cpu")
    requirements = (Requirement("torch", "compile"),)
    compiles_when_run = True
    shares_weights = True

    def write(self, lowered: LoweredGraph, writer: BundleWriter) -> None:
        """``graphs/NAME.json``; of a closed loop its tables too, ``tables/NAME.safetensors``."""
        from cosmos_export.ir.serialize import graph_document

        def place(binding: WeightBinding) -> tuple[int, int]:
            return lowered.places[binding].offset, lowered.places[binding].size_bytes

        document: dict[str, Any] = {"graph": graph_document(lowered.graph, lowered.weights_file, place)}
        loop = lowered.loop
        if loop is not None:
            document["loop"] = {
                "steps": loop.steps, "carried": dict(loop.carried), "rows": list(loop.rows), "taken": list(loop.taken),
                "returned": list(loop.returned),
            }  # fmt: skip
        text = json.dumps(document, separators=(",", ":"))
        writer.path(f"graphs/{lowered.name}.json", "graph").write_text(text, encoding="utf-8")
        if loop is not None:
            import numpy as np
            from safetensors.numpy import save

            contiguous = {key: np.ascontiguousarray(table) for key, table in lowered.tables.items()}
            writer.path(f"tables/{lowered.name}.safetensors", "table").write_bytes(save(contiguous))

    def open(self, files: BundleFiles, device: str | None) -> Executor:
        from cosmos_export.targets.inductor.sessions import open_graphs

        return open_graphs(files, device)


BACKEND = Inductor()
