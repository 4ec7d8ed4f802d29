"""The table of the schedule is held to the manifest when a bundle is verified, and hashed again when it is read."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import bundle_samples
import numpy as np
import pytest
from safetensors.numpy import save

from cosmos_export.bundle import (
    BundleWriter,
    EdgeRecord,
    EngineRecord,
    GraphContract,
    Manifest,
    Tensor,
    read_files,
    verify_bundle,
)
from cosmos_export.diagnostics import CosmosExportError
from cosmos_export.runtime import load_bundle
from cosmos_export.runtime.contents import with_contents
from cosmos_export.runtime.schedule_table import SCHEDULE_TABLE, read_schedule_table

ENGINE = "engines/schedule.plan"
TABLE: dict[str, Any] = {
    "timesteps": np.array([900.0, 400.0], np.float32),
    "coefficients": np.ones((2, 7), np.float32),
    "time_embedding": np.ones((2, 8), np.float32),
}


def manifest() -> Manifest:
    """One whose loop takes what a graph of the step returns."""
    sample = bundle_samples.manifest()
    row = Tensor("time", "float32", (1, 8))
    body = sample.graphs["generator"]
    graphs = {
        **sample.graphs,
        "generator": replace(body, inputs=(*body.inputs, row)),
        "schedule": GraphContract((Tensor("timestep", "float32", (1,)),), (replace(row, name="time_embedding"),)),
    }
    options = {**sample.options, "schedule.steps": 2, "schedule.timesteps": (900.0, 400.0)}
    edges = (*sample.edges, EdgeRecord("schedule", "time_embedding", "generator", "time"))
    engines = (*sample.engines, EngineRecord("schedule", "schedule", ENGINE, ("480p",), ()))
    return replace(sample, graphs=graphs, edges=edges, options=options, engines=engines)


def bundle(root: Path, table: bytes) -> Path:
    with BundleWriter(root) as writer:
        engine = ("engine", bundle_samples.engine(100))
        for name, (role, content) in {
            **bundle_samples.FILES, ENGINE: engine, SCHEDULE_TABLE: ("table", table)
        }.items():  # fmt: skip
            writer.path(name, role).write_bytes(content)
        writer.commit(manifest())
    return root


def changed(**values: Any) -> bytes:
    return save({name: value for name, value in {**TABLE, **values}.items() if value is not None})


def test_the_table_is_read(tmp_path: Path) -> None:
    files = read_files(bundle(tmp_path / "x", changed()))
    assert with_contents(verify_bundle(tmp_path / "x")).ok
    found = read_schedule_table(files)
    assert found.keys() == TABLE.keys() and all(np.array_equal(found[name], TABLE[name]) for name in TABLE)


@pytest.mark.parametrize(
    ("table", "said"),
    [
        (changed(timesteps=np.array([900.0, 401.0], np.float32)), "its timesteps are not those of the manifest"),
        (changed(timesteps=np.array([900.0], np.float32)), "its timesteps are not those of the manifest"),
        (changed(timesteps=np.array([900, 400])), r"its timesteps are int64\[2\]"),
        (changed(timesteps=None), "it has no timesteps"),
        (changed(coefficients=None), "it has no coefficients"),
        (changed(coefficients=np.full((2, 7), np.nan, np.float32)), "NaN or infinite values in its coefficients"),
        (changed(time_embedding=None), "it has no time_embedding"),
        (changed(time_embedding=np.ones((3, 8), np.float32)), r"its time_embedding is \[3, 8\], for 2 steps"),
        (b"{}", "not a readable safetensors file"),
        (b"\xff" * 64, "not a readable safetensors file"),
        (changed()[:-1], "truncated"),
    ],
)
def test_a_table_that_does_not_fit_is_refused(tmp_path: Path, table: bytes, said: str) -> None:
    root = bundle(tmp_path / "x", table)
    report = with_contents(verify_bundle(root))
    (failure,) = report.failures
    assert failure.path == SCHEDULE_TABLE
    for use in (lambda: load_bundle(root, backend="onnxruntime"), lambda: read_schedule_table(read_files(root))):
        with pytest.raises(CosmosExportError, match=said) as caught:
            use()
        assert caught.value.code == "CX711"


def test_a_table_that_changes_after_verification_is_not_read(tmp_path: Path) -> None:
    files = read_files(bundle(tmp_path / "x", changed()))
    (tmp_path / "x" / SCHEDULE_TABLE).write_bytes(changed(coefficients=np.full((2, 7), 2, np.float32)))
    with pytest.raises(CosmosExportError, match="is not the file the manifest lists") as caught:
        read_schedule_table(files)
    assert caught.value.code == "CX711"
