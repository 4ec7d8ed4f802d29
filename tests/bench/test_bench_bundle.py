"""`bench BUNDLE` through ONNX Runtime on a tiny bundle: every workload that it has, and what it refuses."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import build_harness as harness
import pytest
import typer
from typer.testing import CliRunner

from cosmos_export.bench.bundle import BundleRequest, measure_bundle
from cosmos_export.bench.clock import Sample, Watch
from cosmos_export.build.driver import build
from cosmos_export.build.options import BuildOptions
from cosmos_export.cli import console
from cosmos_export.cli.bench import register
from cosmos_export.diagnostics import CosmosExportError
from cosmos_export.progress import Silent

pytestmark = pytest.mark.xdist_group("bench")

PROFILE = "und_len=1:8:64,frames=1:2:3,height=3:3:4,width=3:4:4,sound_len=0:4:8,action_len=0:4:8"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with everything, two guided steps."""
    folder = tmp_path_factory.mktemp("bench")
    path = folder / "x.bundle"
    checkpoint = harness.checkpoint(folder, "omni", "float32")
    build(BuildOptions(checkpoint, path, profiles=(PROFILE,), steps=2, guidance=2.0, parity="never", cache=None))
    return path


def asked(bundle: Path, **options: Any) -> BundleRequest:
    return BundleRequest(bundle, **{"runs": 1, "warm_up": 0, "dry_run": True, "device": "cpu", **options})


@pytest.mark.parametrize(
    ("workload", "parts"),
    [
        (None, {"reasoner", "conditioning", "denoise", "decode"}),
        ("t2i", {"reasoner", "conditioning", "denoise", "decode"}),
        ("i2v", {"encode", "reasoner", "conditioning", "denoise", "decode"}),
        ("av", {"reasoner", "conditioning", "denoise", "decode"}),
        ("policy", {"encode", "reasoner", "conditioning", "denoise"}),
        ("reasoner", {"reasoner"}),
    ],
)
def test_every_workload_of_a_bundle(bundle: Path, workload: str | None, parts: set[str]) -> None:
    found = measure_bundle(asked(bundle, workload=workload, runs=2), Silent(), "a command")
    assert {c.name for c in found.components} == parts and found.request_s > 0
    assert all(len(c.samples_s) == 2 and min(c.samples_s) > 0 for c in found.components)
    if workload == "reasoner":
        assert (found.workload, found.forwards, found.forward_s) == ("reasoner", 0, None)
    else:
        assert found.workload.startswith(f"{workload or 't2v'}-") and (found.steps, found.forwards) == (2, 4)
    document = json.loads(json.dumps(found.document()))
    assert document["backend"] == "onnxruntime" and document["during"] is None and document["command"] == "a command"


def test_no_run_finds_its_prompts_encoded(bundle: Path) -> None:
    """The runtime keeps the last prompts' keys and values; a run that met them again would measure nothing."""
    found = measure_bundle(asked(bundle, workload="t2i", runs=6), Silent())
    (reasoner,) = (c for c in found.components if c.name == "reasoner")
    assert min(reasoner.samples_s) > 0.1 * reasoner.median_s


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
    app = typer.Typer()
    app.callback()(lambda: None)
    register(app)
    output = tmp_path / "m.json"
    flags = ["--workload", "t2i", "--prompt-tokens", "6:3", "--runs", "1", "--warm-up", "0", "--dry-run"]
    result = CliRunner().invoke(app, ["bench", str(bundle), *flags, "-o", str(output)], env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    assert "denoise" in result.output and json.loads(output.read_text())["workload"].startswith("t2i-")


# -- what the GPU does meanwhile --------------------------------------------------------------------------------------


def test_clocks_and_power_are_watched() -> None:
    seen = iter(
        [Sample(1980.0, None, 300.0, 40.0), Sample(1500.0, None, 650.0, 60.0), Sample(1700.0, None, 700.0, 70.0)]
    )
    with Watch(0, read=lambda: next(seen, None), period_s=0.001) as watch:
        deadline = time.monotonic() + 20
        while len(watch._samples) < 3 and time.monotonic() < deadline:
            time.sleep(0.001)
    found = watch.summary()
    assert found is not None and found["samples"] == 3
    assert found["sm_clock_mhz"] == {"median": 1700.0, "min": 1500.0, "max": 1980.0}
    assert found["power_w"] == {"median": 650.0, "min": 300.0, "max": 700.0} and found["memory_clock_mhz"] is None


def test_without_a_gpu_nothing_is_watched() -> None:
    with Watch(None) as watch:
        pass
    assert watch.summary() is None
    with Watch(0, period_s=0.001) as watch:  # no driver: the tool finds no card
        time.sleep(0.01)
    assert watch.summary() is None or watch.source in ("NVML", "nvidia-smi")
