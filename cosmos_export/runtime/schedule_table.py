"""The table of a bundle's schedule: what the build computed for each step, hashed when it is read, and held to the
manifest."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from cosmos_export.bundle import BundleFiles
from cosmos_export.checkpoint.safetensors_header import parse_tensors
from cosmos_export.diagnostics import FindingError, UserError
from cosmos_export.targets.sessions import STEP, Array

SCHEDULE_TABLE = "tables/schedule.safetensors"
"""Tables of the build for its own schedule: timesteps, coefficients, and the outputs of graphs of the step."""
_TIMESTEPS, _COEFFICIENTS = "timesteps", "coefficients"


def read_schedule_table(files: BundleFiles) -> Mapping[str, Array]:
    """The table, which is the file that the manifest lists and has what the manifest says; FindingError CX711."""
    try:
        tables = parse_tensors(Path(SCHEDULE_TABLE), files.read(SCHEDULE_TABLE, "table"))
        problem = next(_problems(files, tables), None)
    except UserError as error:
        problem = error.message
    if problem:
        raise FindingError(
            "CX711", f"{files.path} fails verification: {SCHEDULE_TABLE}: {problem}", "build the bundle again"
        )
    return tables


def schedule_problems(files: BundleFiles) -> Iterator[tuple[str, str]]:
    """The table's name and what is wrong with it, where the bundle has one."""
    if SCHEDULE_TABLE not in {record.path for record in files.manifest.files}:
        return
    try:
        tables = parse_tensors(Path(SCHEDULE_TABLE), files.read(SCHEDULE_TABLE, "table"))
    except (UserError, FindingError) as error:
        yield SCHEDULE_TABLE, error.message
        return
    for problem in _problems(files, tables):
        yield SCHEDULE_TABLE, problem


def _problems(files: BundleFiles, tables: Mapping[str, Array]) -> Iterator[str]:
    manifest = files.manifest
    edges = manifest.edges if manifest.loop is not None else ()
    of_step = {name for name, graph in manifest.graphs.items() if STEP in {tensor.name for tensor in graph.inputs}}
    rows = {e.output for e in edges if manifest.loop and e.target == manifest.loop.body and e.source in of_step}
    for name in sorted({_TIMESTEPS, _COEFFICIENTS, *rows} - tables.keys()):
        yield f"it has no {name}"
        return
    steps, expected = tables[_TIMESTEPS], manifest.options.get("schedule.timesteps")
    if steps.ndim != 1 or steps.dtype != np.float32:
        yield f"its timesteps are {steps.dtype}{list(steps.shape)}"
        return
    if isinstance(expected, tuple) and not np.array_equal(steps, np.asarray(expected, np.float32)):
        yield "its timesteps are not those of the manifest"
    for name in sorted({_COEFFICIENTS, *rows}):
        values = tables[name]
        if values.ndim < 2 or len(values) != len(steps):
            yield f"its {name} is {list(values.shape)}, for {len(steps)} steps"
        elif not np.isfinite(values.astype(np.float64)).all():
            yield f"NaN or infinite values in its {name}"
