"""`build`: the request is checked first, without torch; then the stages run."""

from __future__ import annotations

import errno
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from cosmos_export import units
from cosmos_export.bundle import BundleWriter
from cosmos_export.checkpoint.finite import require_finite
from cosmos_export.compiler.allocator import keep_freed_memory
from cosmos_export.compiler.coverage import require_coverage
from cosmos_export.compiler.job import Job
from cosmos_export.compiler.options import resolve
from cosmos_export.compiler.overall import Overall
from cosmos_export.compiler.planned import Prediction
from cosmos_export.diagnostics import FindingError, ToolError
from cosmos_export.machine.system import free_disk
from cosmos_export.options import BuildOptions
from cosmos_export.progress import Progress, Silent
from cosmos_export.stamps import blamed

if TYPE_CHECKING:
    from cosmos_export.compiler.evidence import BuildResult

_log = logging.getLogger("cosmos_export")


def build(
    options: BuildOptions,
    progress: Progress | None = None,
    begins: Callable[[Job], None] = lambda job: None,
    fails: Callable[[Path | None], None] = lambda left: None,
    found: Callable[[BuildResult, FindingError], None] = lambda result, error: None,
) -> BuildResult:
    """Compile ``options.checkpoint``; returns what was done. The bundle appears under its name when all of it is right.
    ``begins`` is told what the request was resolved to, before any work; ``fails``, where an error ends it, where
    finished files were kept, or None; ``found``, where a finding ends it, what was measured until then.

    Raises UserError and UnsupportedError before any work for what cannot be built; FindingError where the results are
    not what the published implementation computes (CX601) or the engines not what was planned (CX450): then no bundle
    is left. However else it ends, what was finished stays for ``options.resume``.
    """
    progress = progress or Silent()
    keep_freed_memory()
    job = resolve(options, progress)
    if options.output is not None and options.quality == "enforce":
        require_coverage(job.coverage)
    begins(job)
    for note in job.notes:  # now, and again at the end of a long report
        _log.warning("%s", note)
    with blamed("the build", *job.inputs):
        if options.output is not None:
            writer = BundleWriter(
                options.output, options.force, job.plan.required_bytes, progress, options.resume, job.require_inputs
            )
            return _bundle(job, writer, options.resume, progress, fails, found)
        result = _compile_only(job, progress)
        job.require_inputs()
        return result


def _bundle(
    job: Job,
    writer: BundleWriter,
    resume: bool,
    progress: Progress,
    fails: Callable[[Path | None], None],
    found: Callable[[BuildResult, FindingError], None],
) -> BuildResult:
    try:
        with writer:
            from cosmos_export.compiler.stages import build_bundle

            if resume:
                _log.info("%s", _resumed(writer))
            # Here too, as a finding that a changed input explains costs no file that was kept.
            with (
                _full_disk(writer, job.plan),
                blamed("the build", *job.inputs),
                Overall(progress, job.plan.seconds) as overall,
            ):
                require_finite(job.checkpoint, overall)
                return build_bundle(job, writer, overall, found)
    except BaseException as error:
        if writer.left is not None:
            finished = writer.all_kept()
            _log.info("finished so far: %s, in %s", ", ".join(kept.name for kept in finished), writer.left)
        if isinstance(error, Exception):  # an interruption may be repeated in any case
            fails(writer.left)
        raise


@contextmanager
def _full_disk(writer: BundleWriter, plan: Prediction) -> Iterator[None]:
    """Says which disk it was, wherever in a build there was no space for something. There was when the build began."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        folder = writer.output.parent
        free, needed = (size / 2**30 for size in (free_disk(folder), plan.required_bytes))
        raise ToolError(
            "CX704",
            f"the disk filled up during the build: {error}; in {folder} {free:.1f} GiB are free",
            f"the whole bundle takes about {needed:.1f} GiB: free some space, or choose an output on another disk",
        ) from error


def _resumed(writer: BundleWriter) -> str:
    kept = writer.all_kept()
    if not kept:
        return f"nothing to resume beside {writer.output}: starting anew"
    size = units.size(sum(one.size_bytes for one in kept))
    return f"resuming with {len(kept)} finished files ({size}): {', '.join(one.name for one in kept)}"


def _compile_only(job: Job, progress: Progress) -> BuildResult:
    from cosmos_export.compiler.stages import compile_only

    return compile_only(job, progress)
