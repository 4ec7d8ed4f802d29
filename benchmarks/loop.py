"""The denoising loop in engines: true width, guided, for several numbers of steps; one engine per segment of them.

    python benchmarks/loop.py [--size nano] [--layers 4] [--steps 1,35,50] [--interval LOW:HIGH]
                              [--target rtx-pro-6000] [-o FILE.json]

Random weights, a small vocabulary (the loop has no token ids). Each engine is built in a process of its own; the plan
inside it says how many attentions are fused and whether a CUDA graph can capture the loop.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
from importlib import metadata
from pathlib import Path
from typing import Any

import onnx

from cosmos_export.capture.model import capture
from cosmos_export.capture.sources import weight_sources
from cosmos_export.checkpoint import open_checkpoint
from cosmos_export.checkpoint.demo import write_demo_checkpoint
from cosmos_export.compiler.forms import close_loop
from cosmos_export.compiler.loop import LOOP_TABLES, loop_inputs, loop_tables
from cosmos_export.ir import ops
from cosmos_export.ir.interpreter import read_weights
from cosmos_export.ir.program import Program
from cosmos_export.passes.batch_guidance import NEGATIVE_LEN
from cosmos_export.passes.pipeline import default_passes, run_passes
from cosmos_export.plan.subject import sampling_of
from cosmos_export.progress import Silent
from cosmos_export.sampling import Overrides, Schedule, resolve_schedule
from cosmos_export.targets import load_target
from cosmos_export.targets.onnx.loop import lower_loop
from cosmos_export.targets.onnx.weights import layout, read_source, write_weights
from cosmos_export.targets.profiles import input_shapes, parse_profile
from cosmos_export.targets.trt.engine_inspector import inspect_engine
from cosmos_export.targets.trt.tensorrt_rtx import build_engine


def measure(arguments: argparse.Namespace, work: Path) -> list[dict[str, Any]]:
    folder = write_demo_checkpoint(
        work / "checkpoint", true_width=arguments.size, layers=arguments.layers, vocab=1024, dtype="bfloat16",
    )  # fmt: skip
    checkpoint = open_checkpoint(folder)
    program = capture(checkpoint.geometry.config, weight_sources(checkpoint.tensors), modalities=("vision",))
    run_passes(program, default_passes())
    rows: list[dict[str, Any]] = []
    print("| steps | engine | fused attention | planned | GEMMs | activations | capturable | build | peak memory |")
    print("|---|---|---|---|---|---|---|---|---|")
    for steps in (int(s) for s in arguments.steps.split(",")):
        plan = resolve_schedule(sampling_of(checkpoint), "t2v", Overrides(None, steps, None, 6.0, arguments.interval))
        for closed in close_loop(program, plan).values():
            rows.append(measure_segment(arguments, program, closed, plan, work))
    return rows


def measure_segment(
    arguments: argparse.Namespace, program: Program, closed: Program, plan: Schedule, work: Path
) -> dict[str, Any]:
    body, steps = closed.graphs[closed.loop.body], closed.loop.steps
    tables = loop_tables(closed, plan, read_weights(read_source))
    stored = layout(n.meta["weight"] for n in program.graphs[closed.loop.body].weights.values())
    if not (work / "loop.weights").exists():
        write_weights(work / "loop.weights", stored, "weights", Silent())
    path = work / "loop.onnx"
    onnx.save(lower_loop(body, closed.loop, tables, stored, "loop.weights", explicit_attention=True), path)
    spec = {
        name: [s if isinstance(s, int) else str(s).replace(NEGATIVE_LEN, "und_len") for s in given.shape]
        for name, given in loop_inputs(closed, LOOP_TABLES).items()
    }
    report = build_engine(
        path, work / "loop.engine", target=load_target(arguments.target),
        profiles=[input_shapes(parse_profile(arguments.profile), spec)],
    )  # fmt: skip
    graph = inspect_engine(report.path).graphs[0]
    planned = len(body.calls(ops.JOINT_ATTENTION))
    print(
        f"| {steps} | {report.size_bytes / 2**20:.1f} MiB | {len(graph.attention)} | {planned} | "
        f"{sum(graph.gemm_types().values())} {'/'.join(graph.gemm_types())} | "
        f"{graph.activation_bytes / 2**30:.2f} GiB | {graph.stream_capturable} | {report.build_s:.1f} s | "
        f"{report.peak_memory_bytes / 2**30:.2f} GiB |"
    )
    report.path.unlink()
    return {
        "steps": steps, "engine_bytes": report.size_bytes, "fused_attention": len(graph.attention),
        "attention_in_body": planned, "gemms": dict(graph.gemm_types()), "activation_bytes": graph.activation_bytes,
        "stream_capturable": graph.stream_capturable, "build_s": round(report.build_s, 1),
        "peak_bytes": report.peak_memory_bytes, "unfused_softmax": list(graph.softmax),
    }  # fmt: skip


def interval(text: str) -> tuple[float, float]:
    low, high = (float(part) for part in text.split(":"))
    return low, high


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", default="nano", choices=["nano", "super", "edge"])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--steps", default="1,35,50")
    parser.add_argument("--interval", type=interval, help="timesteps that are guided, LOW:HIGH (default: all)")
    parser.add_argument("--target", default="rtx-pro-6000")
    parser.add_argument("--profile", default="480p-121f")
    parser.add_argument("--work", type=Path, help="directory for the checkpoint and the engines (default: temporary)")
    parser.add_argument("-o", "--output", type=Path)
    arguments = parser.parse_args()
    work = Path(tempfile.mkdtemp(dir=arguments.work))
    try:
        rows = measure(arguments, work)
    finally:
        shutil.rmtree(work)
    if arguments.output:
        document = {
            "benchmark": "loop",
            "command": f"python benchmarks/loop.py --size {arguments.size} --layers {arguments.layers} "
            f"--steps {arguments.steps} --target {arguments.target} --profile {arguments.profile}"
            + (" --interval {:g}:{:g}".format(*arguments.interval) if arguments.interval else ""),
            "machine": {"cores": os.cpu_count()},
            "versions": {n: metadata.version(n) for n in ("cosmos-export", "torch", "diffusers", "tensorrt-rtx-cu13")},
            "weights": "random",
            "rows": rows,
        }
        arguments.output.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    sizes = [row["engine_bytes"] for row in rows]
    return 0 if max(sizes) <= 1.05 * min(sizes) else 1


if __name__ == "__main__":
    sys.exit(main())
