"""`build`: capture, passes, weights, ONNX, engines, checks, bundle. Every stage writes into the staged bundle."""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import torch

from cosmos_export.build.options import BuildOptions, Plan, require_compiler, resolve
from cosmos_export.build.schedule import schedule_table, timesteps
from cosmos_export.build.sources import weight_sources
from cosmos_export.bundle import BundleWriter, InputFile, Manifest, PlanCheck
from cosmos_export.bundle.verify import hash_file
from cosmos_export.checkpoint import Checkpoint, open_checkpoint
from cosmos_export.diagnostics import FindingError, UserError
from cosmos_export.evaluation.parity import Measured, Parity
from cosmos_export.ir import ops
from cosmos_export.ir.dims import product
from cosmos_export.ir.graph import Graph, spec_of
from cosmos_export.ir.interpreter import read_weights
from cosmos_export.ir.program import Program
from cosmos_export.ir.text import print_program
from cosmos_export.passes.fold_schedule import SCHEDULE
from cosmos_export.passes.pipeline import Report, default_passes, pass_names, run_passes
from cosmos_export.progress import Progress, Silent
from cosmos_export.targets.plan_inspector import PlanExpectation, PlanSummary, check_plan, inspect_plan
from cosmos_export.targets.profiles import input_shapes
from cosmos_export.targets.trt_common import EngineReport
from cosmos_export.targets.weights import file_size, layout, read_source, write_weights

PARITY_MEMORY_SHARE = 0.4
"""Parity loads the stock model in fp32; above this share of the free memory it is left out and said to be."""


@dataclass(frozen=True)
class Engine:
    """An engine of the bundle, what its build reported and what its plan contains."""

    graph: str
    report: EngineReport
    plan: PlanSummary
    checks: tuple[PlanCheck, ...]

    @property
    def fused_attention(self) -> int:
        """Fused attention kernels in the plan of one profile."""
        return min((len(g.attention) for g in self.plan.graphs), default=0)


@dataclass
class BuildResult:
    """What a build did and measured. ``manifest`` is None where it stopped at a pass."""

    plan: Plan | None = None
    program: Program | None = None
    passes: list[Report] = field(default_factory=list)
    parity: list[Measured] = field(default_factory=list)
    parity_note: str = ""
    engines: list[Engine] = field(default_factory=list)
    dumps: list[Path] = field(default_factory=list)
    manifest: Manifest | None = None
    stage_seconds: dict[str, float] = field(default_factory=dict)
    peak_memory_bytes: int = 0

    @property
    def seconds(self) -> float:
        return sum(self.stage_seconds.values())


def build(options: BuildOptions, progress: Progress | None = None) -> BuildResult:
    """Compile ``options.checkpoint``; returns what was done. The bundle appears under its name when all of it is right.

    Raises UserError and UnsupportedError before any work for what cannot be built; FindingError (CX450, CX601) where the
    engines are not what was planned or the results not what the published implementation computes; then no bundle is
    left.
    """
    progress = progress or Silent()
    require_compiler()
    if options.until is not None and options.until not in pass_names():
        raise UserError("CX222", f"there is no pass `{options.until}`", f"passes, in order: {', '.join(pass_names())}")
    if options.output is None and options.until is None:
        raise UserError("CX451", "a build needs an output", "pass `-o DIR`, or `--until PASS --dump DIR` for graphs alone")
    if options.until is not None and options.output is not None:
        raise UserError("CX451", "`--until` stops before there is a bundle to write", "leave `--output` out, use `--dump`")
    checkpoint = open_checkpoint(options.checkpoint)
    sources = weight_sources(checkpoint)
    plan = resolve(options, checkpoint)
    steps = timesteps(checkpoint, options.steps)
    result = BuildResult(plan=plan)
    stages = _Stages(result, progress)
    if options.output is None:
        _compile(plan, sources, None, result, stages)
    else:
        with BundleWriter(options.output, options.force, _required_bytes(plan), progress) as writer:
            _build_bundle(plan, sources, steps, writer, result, stages)
    result.peak_memory_bytes = _peak_memory()
    return result


class _Stages:
    """Times stages and shows them."""

    def __init__(self, result: BuildResult, progress: Progress) -> None:
        self._result = result
        self.progress = progress

    @contextmanager
    def __call__(self, name: str, *, shown: bool = True) -> Iterator[None]:
        start = time.perf_counter()
        with self._task(name) if shown else nullcontext():
            yield
        self._result.stage_seconds[name] = self._result.stage_seconds.get(name, 0.0) + time.perf_counter() - start

    @contextmanager
    def _task(self, name: str) -> Iterator[None]:
        self.progress.begin(name)
        try:
            yield
        finally:
            self.progress.end(name)


def _peak_memory() -> int:
    """Largest resident set of this process or of a builder process."""
    return 1024 * max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))


def _required_bytes(plan: Plan) -> int:
    """Disk a bundle takes: the weights once, and once more in the engines."""
    weights = sum(e.size_bytes for e in plan.checkpoint.tensors.values())
    copies = 2 if plan.target.backend == "tensorrt-rtx" else 1
    return int(weights * copies * 1.05)


# -- graphs -----------------------------------------------------------------------------------------------------------


def _compile(
    plan: Plan, sources: Mapping[str, object], parity: Parity | None, result: BuildResult, stages: _Stages
) -> Program:
    from cosmos_export.capture.model import capture

    with stages("capture"):
        program = capture(plan.checkpoint.geometry.config, sources, modalities=plan.modalities)  # type: ignore[arg-type]
    options = plan.options
    dump = _Dump(options.dump, result)
    dump(program)
    if parity is not None:
        with stages("parity"):
            result.parity.append(parity.program(program, "capture"))

    def after_each(program: Program, report: Report) -> None:
        result.passes.append(report)
        result.stage_seconds["passes"] = result.stage_seconds.get("passes", 0.0) + report.seconds
        dump(program)
        if parity is not None:
            with stages("parity"):
                result.parity.append(parity.program(program, report.name))

    run_passes(program, default_passes(options.outputs), until=options.until, after_each=after_each)
    result.program = program
    return program


class _Dump:
    """Writes the program's text after each pass where a directory is given."""

    def __init__(self, folder: Path | None, result: BuildResult) -> None:
        self._folder = folder
        self._result = result

    def __call__(self, program: Program) -> None:
        if self._folder is None:
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._folder / f"{len(self._result.dumps):02d}-{program.history[-1]}.txt"
        path.write_text(print_program(program), encoding="utf-8")
        self._result.dumps.append(path)


# -- the bundle -------------------------------------------------------------------------------------------------------


def _build_bundle(
    plan: Plan,
    sources: Mapping[str, object],
    steps: torch.Tensor,
    writer: BundleWriter,
    result: BuildResult,
    stages: _Stages,
) -> None:
    from cosmos_export.build.record import manifest

    weights = read_weights(read_source)
    result.parity_note = _parity_refusal(plan)
    parity = None
    if not result.parity_note:
        with stages("parity"):
            parity = Parity(plan.checkpoint, plan.modalities, weights)
    program = _compile(plan, sources, parity, result, stages)
    with stages("time table"):
        _write_table(writer.path("tables/schedule.safetensors", "table"), steps, schedule_table(program, steps, weights))
    with stages("weights and ONNX", shown=False):
        suffix = _write_onnx(program, plan, writer, stages.progress)
    if parity is not None:
        with stages("parity"):
            dtype = model_dtype(program)
            if dtype != torch.float32:
                result.parity.append(parity.precision(program, dtype))
            folder = writer.path(f"onnx/{program.loop.body}{suffix}", "onnx").parent
            result.parity.append(parity.onnx(program, folder, suffix))
        _require_parity(result.parity)
    if plan.target.backend == "tensorrt-rtx":
        with stages("engines", shown=False):
            for name, graph in program.graphs.items():
                if name != SCHEDULE:
                    result.engines.append(_build_engine(name, graph, program, plan, writer, stages.progress))
        _require_plans(result.engines)
    with stages("hashing inputs", shown=False):
        inputs = _hash_inputs(plan.checkpoint, stages.progress)
    result.peak_memory_bytes = _peak_memory()
    created = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    result.manifest = writer.commit(manifest(plan, program, result, inputs, steps, created))


def model_dtype(program: Program) -> torch.dtype:
    """The type in which the loop's body computes: that of its first carried value."""
    body = program.graphs[program.loop.body]
    return spec_of(body.inputs[next(iter(program.loop.carried))]).dtype


def _parity_refusal(plan: Plan) -> str:
    """Why parity is not measured; empty where it is."""
    mode = plan.options.parity
    if mode == "never":
        return "not asked for (--parity never)"
    elements = sum(int(product(e.shape)) for e in plan.checkpoint.tensors.values())
    needed, free = 4 * elements, os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if mode == "auto" and needed > PARITY_MEMORY_SHARE * free:
        return f"the stock model in fp32 takes {needed / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free (--parity always)"
    return ""


def _require_parity(measured: Sequence[Measured]) -> None:
    failed = [m for m in measured if not m.passed]
    if failed:
        lines = "; ".join(f"{m.stage}: {m.value:.2e} > {m.limit:.0e} ({m.case})" for m in failed)
        raise FindingError(
            "CX601",
            f"the program does not compute what the published implementation computes: {lines}",
            "this is a bug of the compiler: please report it with `build --until PASS --dump DIR`",
        )


def _write_table(path: Path, steps: torch.Tensor, table: dict[str, torch.Tensor]) -> None:
    from safetensors.torch import save_file

    save_file({"timesteps": steps, **table}, path)


def _write_onnx(program: Program, plan: Plan, writer: BundleWriter, progress: Progress) -> str:
    """Every graph with its weights; returns the suffix of the models that run on a CPU."""
    import onnx

    from cosmos_export.targets.onnx_lowering import lower

    narrow = model_dtype(program) != torch.float32
    for_cpu_only = plan.target.backend == "onnxruntime"
    suffix = ".cpu.onnx" if narrow else ".onnx"
    for name, graph in program.graphs.items():
        stored = layout(node.meta["weight"] for node in graph.weights.values())
        file = f"{name}.weights"
        if file_size(stored):
            write_weights(writer.path(f"onnx/{file}", "weights"), stored, f"weights of {name}", progress)
        if narrow:
            path = writer.path(f"onnx/{name}.cpu.onnx", "onnx")
            path.write_bytes(_bytes(lower(graph, stored, file, compute=torch.float32)))
        if not narrow or not for_cpu_only:
            path = writer.path(f"onnx/{name}.onnx", "onnx")
            path.write_bytes(_bytes(lower(graph, stored, file)))
            onnx.checker.check_model(str(path))
    return suffix


def _bytes(model: object) -> bytes:
    return model.SerializeToString(deterministic=True)  # type: ignore[attr-defined, no-any-return]


_GEMM_TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


def _build_engine(
    name: str, graph: Graph, program: Program, plan: Plan, writer: BundleWriter, progress: Progress
) -> Engine:
    from cosmos_export.targets.tensorrt_rtx import build_engine

    spec = {i: [s if isinstance(s, int) else str(s) for s in spec_of(n).shape] for i, n in graph.inputs.items()}
    dtype = model_dtype(program)
    fused = dtype != torch.float32
    report = build_engine(
        writer.path(f"onnx/{name}.onnx", "onnx"),
        writer.path(f"engines/{name}.engine", "engine"),
        target=plan.target,
        profiles=[input_shapes(profile, spec) for profile in plan.profiles],
        progress=progress,
        # No fused attention computes in fp32; only a checkpoint that is fp32 throughout gets here.
        decomposable_attention=not fused,
    )
    summary = inspect_plan(report.path)
    attention = graph.calls(ops.ATTENTION, ops.JOINT_ATTENTION)
    checks: list[PlanCheck] = []
    if attention:
        scale = attention[0].args[4 if attention[0].target is ops.ATTENTION else 5]
        expected = PlanExpectation(
            attention=len(attention) if fused else 0,
            gemm_type=_GEMM_TYPES[dtype],
            compute_capability=plan.target.compute_capability,
            profiles=len(plan.profiles),
            attention_type=_GEMM_TYPES[dtype] if fused else None,
            attention_scale=float(scale),  # type: ignore[arg-type]
        )
        problems = check_plan(summary, expected)
        wanted = f"{expected.attention} fused attention kernels, every GEMM in {expected.gemm_type}, nothing stored O(S²)"
        found = "; ".join(problems) or "as planned"
        checks.append(PlanCheck(engine=name, check="plan", expected=wanted, found=found, passed=not problems))
    else:
        capability = summary.header.compute_capabilities
        planned = plan.target.compute_capability or ""
        found = ", ".join(capability) or "none"
        checks.append(PlanCheck(name, "compute capability", planned, found, capability == (planned,)))
    return Engine(name, report, summary, tuple(checks))


def _require_plans(engines: Sequence[Engine]) -> None:
    missed = [check for engine in engines for check in engine.checks if not check.passed]
    if missed:
        raise FindingError(
            "CX450",
            "engines do not contain what was planned: " + " | ".join(f"{c.engine}: {c.found}" for c in missed),
            "nothing was written; a narrower profile or another target may avoid it",
        )


def _hash_inputs(checkpoint: Checkpoint, progress: Progress) -> tuple[InputFile, ...]:
    files = checkpoint.files()
    task, total, done = "hashing inputs", sum(f.stat().st_size for f in files), 0
    progress.begin(task, total)
    records = []
    try:
        for path in files:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                before = done
                advance: Callable[[int], None] = lambda read, base=before: progress.update(task, base + read)  # type: ignore[misc] # noqa: E731
                size, digest = hash_file(descriptor, advance)
            finally:
                os.close(descriptor)
            done += size
            records.append(InputFile(path.relative_to(checkpoint.root).as_posix(), size, digest))
    finally:
        progress.end(task)
    return tuple(records)
