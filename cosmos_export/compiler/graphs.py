"""The graphs of a build: captured, passed through the pipeline, and seen by a watch after every pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from cosmos_export.compiler.evidence import Evidence
from cosmos_export.compiler.metering import Stages
from cosmos_export.evaluation.parity import Parity
from cosmos_export.ir.program import Program
from cosmos_export.ir.text import print_program
from cosmos_export.passes.base import Effect
from cosmos_export.passes.options import PassOptions
from cosmos_export.passes.pipeline import CAPTURE, Report, passes_of, run_passes
from cosmos_export.sampling import Segment


class PassWatch:
    """Sees the program after every pass: reports it, writes its text, and compares it with the published model."""

    def __init__(
        self, stages: Stages, evidence: Evidence, dump: Path | None, parity: Parity | None, each: bool
    ) -> None:
        """``dump``: the folder of the texts. ``each``: compare after every exact pass, not after the capture alone."""
        self._stages, self._evidence = stages, evidence
        self._parity, self._each = parity, each
        self._folder = dump
        if dump is not None:
            dump.mkdir(parents=True, exist_ok=True)

    def captured(self, program: Program) -> None:
        """The program as it was captured, before any pass."""
        self._dump(program)
        self._compare(program, CAPTURE)

    def __call__(self, program: Program, report: Report) -> None:
        self._evidence.passes.append(report)
        self._evidence.meter.add("passes", report.seconds)
        self._dump(program, report.form)
        if report.effect is Effect.EXACT and not report.form and self._each:
            self._compare(program, report.name)

    def _compare(self, program: Program, stage: str) -> None:
        if self._parity is not None:
            with self._stages("parity", f"of {stage}"):
                self._evidence.parity.append(self._parity.program(program, stage))

    def _dump(self, program: Program, form: str = "") -> None:
        if self._folder is None:
            return
        name = f"{len(self._evidence.dumps):02d}-{program.history[-1]}{f'-{form}' if form else ''}.txt"
        path = self._folder / name
        path.write_text(print_program(program), encoding="utf-8")
        self._evidence.dumps.append(path)


def plain_program(captured: Program, passes: PassOptions, until: str | None, watch: PassWatch) -> Program:
    """The program that all forms are made from: taken apart, and labelled where it is to be quantized."""
    watch.captured(captured)
    run_passes(captured, passes_of(passes, "form", "towers", "sites"), until=until, after_each=watch)
    return captured


def all_passes(passes: PassOptions, segments: Sequence[Segment], cut: bool) -> PassOptions:
    """Options under which every pass that some form of the program goes through has something to do."""
    segment = next((one for one in segments if one.guided), segments[0] if segments else None)
    return replace(passes, segment=segment, cuts=(lambda *_: ()) if cut else None)
