"""`build`: the request is checked first, without torch; then the stages run."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from cosmos_export.build.options import BuildOptions, Plan, resolve
from cosmos_export.build.overall import Overall, expected_seconds
from cosmos_export.build.selection import component_bytes, tokenizer_bytes
from cosmos_export.bundle import BundleWriter
from cosmos_export.checkpoint import Tower
from cosmos_export.diagnostics import UserError
from cosmos_export.progress import Progress, Silent

if TYPE_CHECKING:
    from cosmos_export.build.stages import BuildResult

_log = logging.getLogger("cosmos_export")


def build(options: BuildOptions, progress: Progress | None = None) -> BuildResult:
    """Compile ``options.checkpoint``; returns what was done. The bundle appears under its name when all of it is right.

    Raises UserError and UnsupportedError before any work for what cannot be built; FindingError where the results are
    not what the published implementation computes (CX601) or the engines not what was planned (CX450): then no bundle
    is left. After an interruption, or where a tool or the disk failed, what was finished stays for ``options.resume``.
    """
    progress = progress or Silent()
    plan = resolve(options)
    if options.output is None:
        return _compile_only(plan, progress)
    writer = BundleWriter(options.output, options.force, _required_bytes(plan), progress, options.resume)
    try:
        with writer:
            from cosmos_export.build.stages import build_bundle

            if options.resume:
                _log.info("%s", _resumed(writer))
            with Overall(progress, expected_seconds(plan)) as overall:
                return build_bundle(plan, writer, overall)
    except BaseException:
        if writer.left is not None:
            finished = writer.all_kept()
            _log.info("finished so far: %s, in %s", ", ".join(kept.name for kept in finished), writer.left)
        raise


def _resumed(writer: BundleWriter) -> str:
    kept = writer.all_kept()
    if not kept:
        return f"nothing to resume beside {writer.output}: starting anew"
    size = sum(one.size_bytes for one in kept) / 1e9
    return f"resuming with {len(kept)} finished files ({size:.2f} GB): {', '.join(one.name for one in kept)}"


def _compile_only(plan: Plan, progress: Progress) -> BuildResult:
    from cosmos_export.build.stages import compile_only
    from cosmos_export.passes.pipeline import pass_names

    if plan.options.until not in pass_names():
        names = ", ".join(pass_names())
        raise UserError("CX222", f"there is no pass `{plan.options.until}`", f"passes, in order: {names}")
    return compile_only(plan, progress)


def _required_bytes(plan: Plan) -> int:
    """Disk a bundle takes: the weights once, and again in the engines, the generator's in every segment of a loop; and
    the tokenizer."""
    tensors = plan.checkpoint.tensors
    weights = sum(e.size_bytes for e in tensors.values()) + component_bytes(plan.checkpoint, plan.components)
    if plan.target.backend == "tensorrt-rtx":
        in_loop = [name for name, e in plan.checkpoint.expected.items() if e.tower is Tower.GENERATOR]
        generator = sum(tensors[name].size_bytes for name in in_loop if name in tensors)
        further = len(plan.segments) - 1 if plan.options.loop == "device" else 0
        weights = 2 * weights + further * generator
    return int(weights * 1.05) + tokenizer_bytes(plan.checkpoint, plan.components)
