"""Every check and benchmark that needs a GPU, in one call of under ten minutes.

    python benchmarks/geometry.py -o build/geometry                             # anywhere, with diffusers: once
    python benchmarks/gpu_all.py --graphs build/geometry -o benchmarks/results  # on the GPU
    python benchmarks/gpu_all.py --graphs DIR --dry-run -o OUT                  # anywhere: all but the device

Stages, in order of what they are worth: the machine and its ceilings; every kernel against its reference, then timed;
the graphs on the device against the interpreter; two layers of true width against diffusers, where it is installed; the
geometry's workloads in the recipes bf16, fp8 and fp8-attention; a step with each of this project's kernels in the
compiled graph.
A stage that would not end within the budget is left out and said to be. Each writes its own JSON as soon as it is done.
"""

from __future__ import annotations

import os
import sys

if "--dry-run" in sys.argv:
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before any kernel is imported

import argparse
import gc
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from gpu import device_for, machine

import kernels
from cosmos_export.bench.geometry import (
    GUIDED,
    PROMPT_DIMS,
    dims_of,
    random_inputs,
    random_weights,
    read_graphs,
    tiny_geometry,
)
from cosmos_export.bench.measure import GeometryRequest, measure_geometry
from cosmos_export.bench.result import write
from cosmos_export.ir.interpreter import run_graph
from cosmos_export.kernels.description import KERNELS, W4A16
from cosmos_export.kernels.interpret import device_rounding
from cosmos_export.plan import parse_workload, published_subject
from cosmos_export.progress import Silent
from cosmos_export.targets.inductor.executable import Executable
from cosmos_export.targets.inductor.specialise import CompileSettings

WORKLOADS = [
    ("t2v-480p-189f", "vision", 90), ("policy-droid", "action", 25), ("t2i-720p", "vision", 50),
    ("t2v-720p-189f", "vision", 170),
]  # fmt: skip
"""(workload, folder of graphs, seconds that a recipe with two kinds of steps takes at most on an H100, guessed)."""
BASELINES = ("t2v-480p-189f",)
"""Workloads of which diffusers is measured too, in the stage of bf16, where it is installed."""
RECIPES = ("fp8-attention", "fp8", "bf16")
PLACES = {("policy-droid", "fp8"): ("gen=fp8",)}
"""Changes to a recipe: the published policy keeps the first and last three steps W8A16, so all of four."""
FUSIONS = {"fp8": tuple(name for name in KERNELS if name != W4A16), "int4": (W4A16,)}
"""Recipe → kernels to try in its guided step."""
LIMITS = {"fp32": 1e-4, "bf16": 3e-2}
"""Relative error of a graph on the device against the interpreter in fp32 on the same (rounded) weights."""


@dataclass(frozen=True)
class Stage:
    """A part of the run."""

    name: str
    needs_s: float
    run: Callable[[], dict[str, Any]]


def graph_check(folder: Path, device: torch.device, *, attention: str, compiled: bool) -> dict[str, Any]:
    """A guided step of the tiny geometry in ``folder`` on the device, against the interpreter in fp32; two prompts."""
    graph = read_graphs(folder).graphs[GUIDED]
    cpu = torch.device("cpu")
    weights = random_weights(graph, cpu)
    by_key = {node.meta["weight"].keys[0]: weights[name] for name, node in graph.weights.items()}
    on_device = {name: t.to(device) for name, t in weights.items()}
    settings = CompileSettings(attention=attention, compiled=compiled, open_dims=PROMPT_DIMS)
    executable, worst = Executable(graph, on_device, device, settings), 0.0
    dims = dims_of(parse_workload("t2v-480p-189f"), tiny=True)
    for more in (0, 9):  # the second prompts are longer, by the same code
        longer = {name: size + more if name in PROMPT_DIMS else size for name, size in dims.items()}
        inputs = random_inputs(graph, longer, cpu)
        wide = {name: t.float() if t.dtype == torch.bfloat16 else t for name, t in inputs.items()}
        wanted = run_graph(graph, wide, lambda b: by_key[b.keys[0]], compute=torch.float32)
        feeds = {name: t.to(device) for name, t in inputs.items()}
        executable(feeds)
        found = executable(feeds)  # captured, and replayed
        for name, value in wanted.items():
            norm = float(value.double().norm()) or 1.0
            worst = max(worst, float((found[name].cpu().double() - value.double()).norm()) / norm)
    return {"attention": attention, "compiled": compiled, "worst": worst, "right": worst <= LIMITS["bf16"]}


def stages(arguments: argparse.Namespace, device: torch.device) -> Iterator[Stage]:
    dry = arguments.dry_run
    shapes = ["tiny"] if dry else ["480p", "policy"]

    def kernel_stage() -> dict[str, Any]:
        with device_rounding() if dry else nullcontext():
            return kernels.run(shapes, device, dry_run=dry, sweep=arguments.sweep, runs=1 if dry else 10)

    yield Stage("kernels", 240 if arguments.sweep else 120, kernel_stage)
    tiny = arguments.graphs / "tiny-vision"

    def graph_stage() -> dict[str, Any]:
        checks = []
        for attention in ("sdpa", "triton"):
            with device_rounding() if dry else nullcontext():
                checks.append(graph_check(tiny, device, attention=attention, compiled=not dry))
            print(f"graph on the device, {attention}: {checks[-1]}", flush=True)
        return {"checks": checks}

    if tiny.is_dir():
        yield Stage("graphs", 60, graph_stage)
    if find_spec("diffusers") is not None:
        yield Stage("numerics", 100, lambda: _numerics(arguments, device))
    for workload, kind, needs_s in WORKLOADS[:2] if dry else WORKLOADS:
        for recipe in RECIPES[1:] if dry else RECIPES:
            if recipe == "fp8-attention" and workload == "policy-droid":
                continue  # none of its four steps has it
            folder = arguments.graphs / (f"tiny-{kind}" if dry else f"{arguments.size}-{kind}")
            beside = recipe == "bf16" and workload in BASELINES and find_spec("diffusers") is not None
            asked = GeometryRequest(
                arguments.size, workload, recipe, str(device), runs=1 if dry else 5, graphs=folder,
                places=PLACES.get((workload, recipe), ()), compiled=not dry, baselines=beside, dry_run=dry,
            )  # fmt: skip
            yield Stage(f"bench-{workload}-{recipe}", needs_s + beside * 90, lambda asked=asked: _bench(asked))

    yield Stage("fusions", 260, lambda: _fusions(arguments, device))


def _numerics(arguments: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Two layers of the size's true width against diffusers on the same device."""
    from cosmos_export.bench.numerics import CASE, TINY_CASE, check_numerics, shallow

    geometry, dry = published_subject(arguments.size).geometry, arguments.dry_run
    geometry = tiny_geometry(geometry) if dry else shallow(geometry)
    checks = check_numerics(geometry, device, case=TINY_CASE if dry else CASE, compiled=not dry)
    for row in checks:
        print(f"against diffusers, {row['recipe']}: {row}", flush=True)
    return {"checks": checks}


def _fusions(arguments: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """A guided step at 480p with each kernel in the graph, among several without any; in the recipe it is for."""
    dry, rows, found = arguments.dry_run, [], {}
    folder = arguments.graphs / ("tiny-vision" if dry else f"{arguments.size}-vision")
    for recipe, names in FUSIONS.items():
        half = (len(names) + 1) // 2  # without any: at both ends and in the middle
        singles = [(name,) for name in names]
        for chosen in ((), *singles[:half], (), *singles[half:], ()):
            with device_rounding() if dry else nullcontext():
                measured = measure_geometry(
                    GeometryRequest(
                        arguments.size, "t2v-480p-189f", recipe, str(device), runs=1 if dry else 5,
                        warm_up=0 if dry else 1, graphs=folder, kernels=frozenset(chosen), only=frozenset({GUIDED}),
                        compiled=not dry, dry_run=dry,
                    ),
                    Silent(),
                )  # fmt: skip
            rows.append({"recipe": recipe, "kernels": list(chosen), "seconds": measured.components[0].median_s})
            what = ", ".join(chosen) or "no kernel of this project"
            print(f"guided step in {recipe} with {what}: {1e3 * rows[-1]['seconds']:.2f} ms", flush=True)
        own = [row for row in rows if row["recipe"] == recipe]
        without = [row["seconds"] for row in own if not row["kernels"]]
        drift = max(max(without) / min(without) - 1, _NOISE)
        wins = [row["kernels"][0] for row in own if row["kernels"] and row["seconds"] < min(without) / (1 + drift)]
        print(f"{recipe}: drift without any {drift:.2%}; kernels that win by more: {', '.join(wins) or 'none'}")
        found[recipe] = {"drift": drift, "wins": wins}
    return {"fusions": rows, **found}


_NOISE = 0.005
"""Share of a step below which a difference of medians says nothing, however little the card drifts."""


def _bench(asked: GeometryRequest) -> dict[str, Any]:
    found = measure_geometry(asked, Silent(), f"python benchmarks/gpu_all.py {' '.join(sys.argv[1:])}")
    forward = f"{1e3 * found.forward_s:.1f} ms a forward" if found.forward_s is not None else "no forward"
    print(f"{asked.workload} {asked.recipe}: {found.request_s:.2f} s a request, {forward}", flush=True)
    document = found.document()
    for row in document["baselines"]:
        print(
            f"    {row['ours_over_request']:.2f} of {row['name']} {row['recipe']} {row['request_s']:.4g} s, in this run"
        )
    for cell in [] if asked.dry_run else document["published"]:
        share, what = found.request_s / cell["seconds"], f"{cell['engine']} {cell['recipe']} {cell['seconds']:g} s"
        print(f"    {share:.2f} of {what}, step cache: {cell['step_cache']}")
    return document


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--graphs", type=Path, required=True, help="what benchmarks/geometry.py wrote")
    parser.add_argument("--size", default="nano", choices=["nano", "super", "edge"])
    parser.add_argument("--sweep", action="store_true", help="also every candidate tile")
    parser.add_argument("--budget", type=float, default=540.0, help="seconds for everything")
    parser.add_argument("--stages", default="", help="beginnings of stages to run, with commas; default: all")
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("-o", "--output", type=Path, required=True)
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    started, device = time.monotonic(), device_for(arguments.dry_run)
    card = "dry-run" if arguments.dry_run else torch.cuda.get_device_name(device).split()[1].lower()
    summary: dict[str, Any] = {"benchmark": "gpu-all", "dry_run": arguments.dry_run, "machine": machine(), "stages": {}}
    failed = False
    path = arguments.output / f"gpu-all-{card}.json"
    if find_spec("diffusers") is None:
        summary["stages"]["numerics and baselines"] = {"left_out": "diffusers is not installed"}
    for stage in stages(arguments, device):
        write(summary, path)  # a call that is cut off leaves what is known
        if not stage.name.startswith(tuple(arguments.stages.split(","))):
            continue
        left = arguments.budget - (time.monotonic() - started)
        if left < stage.needs_s and not arguments.dry_run:
            summary["stages"][stage.name] = {"left_out": f"{left:.0f} s left, it needs {stage.needs_s:.0f}"}
            print(f"{stage.name}: left out, {left:.0f} s left", flush=True)
            continue
        begun = time.monotonic()
        try:
            document = stage.run()
        except Exception as error:  # one stage that fails must not cost the others
            failed = True
            said = (str(error).splitlines() or [""])[0][:300]
            summary["stages"][stage.name] = {"failed": f"{type(error).__name__}: {said}"}
            print(f"{stage.name}: failed: {type(error).__name__}: {said}", flush=True)
            continue
        finally:
            gc.collect()  # a failure holds frames, and these the weights of a whole model
            if device.type == "cuda":
                torch.cuda.empty_cache()
        document = {"machine": summary["machine"], "dry_run": arguments.dry_run, **document}
        write(document, arguments.output / f"{stage.name}-{card}.json")
        rows = [row for shape in document.get("shapes", {}).values() for row in shape] + document.get("checks", [])
        wrong = [row for row in rows if kernels.is_wrong(row)]
        failed |= bool(wrong)
        summary["stages"][stage.name] = {"seconds": round(time.monotonic() - begun, 1), "wrong": len(wrong)}
    summary["seconds"] = round(time.monotonic() - started, 1)
    write(summary, path)
    for name, state in summary["stages"].items():
        print(f"{name}: {state}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
