"""Codecs of the published widths as engines: what a clip of any length takes of the device. Random weights, no GPU.

    python benchmarks/codec.py [--profile 720p-189f+sound] [--target rtx-pro-6000] [-o FILE.json]

The video codecs work through a clip one latent frame per call, with their caches as inputs and outputs, so what a call
takes does not grow with the clip. "exact" decodes latents of true width and a few rows chunk by chunk and compares with
one call of diffusers' decoder, bit for bit, in fp32.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from cosmos_export.capture.sources import weight_sources
from cosmos_export.checkpoint import open_checkpoint
from cosmos_export.checkpoint.codecs import CODECS, codec_tensors
from cosmos_export.checkpoint.demo import write_demo_checkpoint
from cosmos_export.compiler.artifacts import model_bytes
from cosmos_export.compiler.components import capture_codec
from cosmos_export.compiler.selection import codec_config
from cosmos_export.ir.graph import spec_of
from cosmos_export.ir.interpreter import read_weights, run_graph
from cosmos_export.ir.program import Program
from cosmos_export.progress import Silent
from cosmos_export.targets import load_target
from cosmos_export.targets.onnx.lowering import lower
from cosmos_export.targets.onnx.weights import layout, read_source, write_weights
from cosmos_export.targets.profiles import input_shapes, parse_profile
from cosmos_export.targets.trt.engine_inspector import inspect_engine
from cosmos_export.targets.trt.tensorrt_rtx import build_engine


def measure(name: str, program: Program, arguments: argparse.Namespace, work: Path) -> list[dict[str, Any]]:
    """A row for each graph of codec ``name``."""
    stored = layout(node.meta["weight"] for graph in program.graphs.values() for node in graph.weights.values())
    write_weights(work / f"{name}.weights", stored, name, Silent())
    profile, rows = parse_profile(arguments.profile), []
    for graph_name, graph in program.graphs.items():
        path = work / f"{graph_name}.onnx"
        path.write_bytes(model_bytes(lower(graph, stored, f"{name}.weights")))
        spec = {i: [s if isinstance(s, int) else str(s) for s in spec_of(n).shape] for i, n in graph.inputs.items()}
        shapes = input_shapes(profile, spec)
        report = build_engine(
            path, work / f"{graph_name}.engine", target=load_target(arguments.target), profiles=[shapes],
            decomposable_attention=True,
        )  # fmt: skip
        plan = inspect_engine(report.path)
        carried = {edge.input for edge in program.edges if edge.target == graph_name}
        rows.append(
            {
                "graph": graph_name,
                "engine_bytes": report.size_bytes,
                "activation_bytes": max(g.activation_bytes for g in plan.graphs),
                "cache_bytes": sum(2 * int(torch.Size(shapes[i][2]).numel()) for i in carried),
                "run_time_allocations": sum(g.allocations for g in plan.graphs),
                "capturable": all(g.stream_capturable for g in plan.graphs),
                "build_s": report.build_s,
                "peak_anonymous_bytes": report.peak_anonymous_bytes,
            }
        )
        report.path.unlink()
    return rows


@torch.no_grad()
def chunks_are_exact(program: Program, component: Path) -> bool:
    """Three latent frames of 4 × 5, one per call, against one call of diffusers' decoder; the prefix too."""
    import diffusers

    vae = diffusers.AutoencoderKLWan.from_pretrained(component, torch_dtype=torch.float32, local_files_only=True).eval()
    latent = torch.randn(1, vae.config.z_dim, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    mean, std = (torch.tensor(getattr(vae.config, f"latents_{n}")).view(1, -1, 1, 1, 1) for n in ("mean", "std"))
    # As the published pipeline brings latents back to the decoder's scale.
    expected = vae.decode(latent / (1.0 / std) + mean).sample
    del vae
    weights, carried, frames = read_weights(read_source), dict[str, torch.Tensor](), []
    first, following = program.graphs
    for number, chunk in enumerate(torch.split(latent, 1, dim=2)):
        graph = program.graphs[following if number else first]
        results = run_graph(graph, {"latent": chunk, **carried}, weights, compute=torch.float32)
        carried = {edge.input: results[edge.output] for edge in program.edges}
        frames.append(results["pixels"])
    return torch.equal(torch.cat(frames, dim=2), expected)


def show(row: dict[str, Any]) -> None:
    cells = [
        row["graph"],
        f"{row['engine_bytes'] / 2**20:.0f} MiB",
        f"{row['activation_bytes'] / 1e9:.2f} GB",
        f"{row['cache_bytes'] / 1e9:.2f} GB",
        str(row["run_time_allocations"]),
        str(row["capturable"]),
        f"{row['build_s']:.1f} s",
        f"{(row['peak_anonymous_bytes'] or 0) / 2**30:.2f} GiB",
    ]
    print("| " + " | ".join(cells) + " |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profile", default="720p-189f+sound")
    parser.add_argument("--target", default="rtx-pro-6000")
    parser.add_argument("-o", "--output", type=Path)
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    print("| graph | engine | activations | caches | allocated while it runs | capturable | build | peak memory |")
    print("|---|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as work:
        folder = write_demo_checkpoint(Path(work) / "checkpoint", "omni", like="nano", layers=1, vocab=1024)
        checkpoint = open_checkpoint(folder)
        exact = False
        for name, part in CODECS.items():
            config = codec_config(checkpoint, part.folder)
            program = capture_codec(name, config, weight_sources(codec_tensors(checkpoint, name)))
            if name == "vae-decoder":
                exact = chunks_are_exact(program, checkpoint.components[part.folder])
            for row in measure(name, program, arguments, Path(work)):
                rows.append(row)
                show(row)
    print(f"\nchunk by chunk is exact at true width: {exact}")
    if arguments.output:
        document = {
            "command": " ".join(["python", *sys.argv]),
            "profile": arguments.profile,
            "target": arguments.target,
            "tensorrt_rtx": metadata.version("tensorrt-rtx-cu13"),
            "chunks_exact": exact,
            "rows": rows,
        }
        arguments.output.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
