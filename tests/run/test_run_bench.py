"""`bench BUNDLE` through ONNX Runtime on a tiny bundle: every workload that it has, and what it refuses."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from subjects import Subjects
from typer.testing import CliRunner

from cosmos_export.bench.bundle import KINDS, BundleRequest, measure_bundle, numbered_requests
from cosmos_export.bundle import DimRecord
from cosmos_export.cli import console, verbs
from cosmos_export.cli.bench import register
from cosmos_export.diagnostics import CosmosExportError, UserError
from cosmos_export.progress import Silent
from cosmos_export.sampling import DEFAULT_MODE

pytestmark = pytest.mark.xdist_group("run-parity")


@pytest.fixture
def bundle(subjects: Subjects) -> Path:
    """A model with everything."""
    return subjects("omni").bundle


def asked(bundle: Path, **options: Any) -> BundleRequest:
    return BundleRequest(
        bundle, **{"prompt_tokens": (8, 5), "runs": 1, "warm_up": 0, "dry_run": True, "device": "cpu", **options}
    )


@pytest.mark.parametrize("workload", [None, *KINDS, "reasoner"])
def test_every_workload_of_a_bundle(bundle: Path, workload: str | None) -> None:
    mode, parts = KINDS[workload if workload in KINDS else DEFAULT_MODE].mode, {"reasoner"}
    if workload != "reasoner":
        parts |= {"conditioning", "denoise"}
        parts |= {name for name, there in (("encode", mode.clean_frames), ("decode", mode.decoded)) if there}
    found = measure_bundle(asked(bundle, workload=workload), Silent(), "a command")
    assert {c.name for c in found.components} == parts and found.request_s > 0
    assert all(len(c.samples_s) == 1 and min(c.samples_s) > 0 for c in found.components)
    if workload == "reasoner":
        assert (found.workload, found.forwards, found.forward_s) == ("reasoner", 0, None)
    else:
        assert found.workload.startswith(f"{workload or 't2v'}-") and found.forwards == 2 * found.steps > 0
    document = json.loads(json.dumps(found.document()))
    assert document["backend"] == "onnxruntime" and document["during"] is None and document["command"] == "a command"


def test_no_run_finds_its_prompts_encoded(subjects: Subjects) -> None:
    """The runtime keeps the last prompts' keys and values; a run that met them again would measure nothing."""
    manifest = subjects("omni").manifest
    made = numbered_requests(manifest, "i2v", manifest.profiles[0], (8, 8))
    requests = [made(number) for number in range(20)]
    prompts = [tuple(ids) for r in requests for ids in (r.input_ids, r.negative_ids)]
    assert len(set(prompts)) == 40
    assert all(np.array_equal(r.pixels, requests[0].pixels) and r.clean_frames == (0,) for r in requests)


def test_what_a_mode_is_given(subjects: Subjects) -> None:
    manifest = subjects("omni").manifest
    profile = manifest.profiles[0]
    frames = profile.dims["frames"].opt
    for name, shown in (("v2v", 5), ("inverse-dynamics", 4 * (frames - 1) + 1)):
        request = numbered_requests(manifest, name, profile, (8, 8))(0)
        assert request.pixels is not None and request.pixels.shape[2] == shown
    given = numbered_requests(manifest, "forward-dynamics", profile, (8, 8))(0).action
    assert given is not None and given.given is not None and given.given.shape == (given.rows, given.raw_dim)
    short = replace(profile, dims={**profile.dims, "frames": DimRecord(1, 2, 5)})
    with pytest.raises(UserError, match="at least 3 latent frames"):
        numbered_requests(manifest, "v2v", short, (8, 8))


@pytest.mark.parametrize(
    ("options", "code"),
    [
        ({"workload": "t3v"}, "CX672"), ({"profile": "absent"}, "CX672"), ({"runs": 0}, "CX672"),
        ({"dry_run": False}, "CX672"),
    ],
)  # fmt: skip
def test_what_a_bundle_is_not_asked(bundle: Path, options: dict[str, Any], code: str) -> None:
    with pytest.raises(CosmosExportError) as caught:
        measure_bundle(asked(bundle, **options), Silent())
    assert caught.value.code == code


def test_the_verb(bundle: Path, tmp_path: Path) -> None:
    console.configure()
    app = verbs.Verbs()
    app.callback()(lambda: None)
    register(app)
    output = tmp_path / "m.json"
    flags = ["--workload", "t2i", "--prompt-tokens", "6:3", "--runs", "1", "--warm-up", "0", "--dry-run"]
    result = CliRunner().invoke(app, ["bench", str(bundle), *flags, "-o", str(output)], env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    assert "denoise" in result.output and json.loads(output.read_text())["workload"].startswith("t2i-")
