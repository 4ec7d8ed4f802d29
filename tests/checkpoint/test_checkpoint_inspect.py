"""``inspect`` states the published sizes, at once, for checkpoints of true size."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import typer
from fake_checkpoint import (
    QUANTIZATION,
    STEM,
    VAE,
    quantized_specs,
    transformer_specs,
    write_checkpoint,
    write_json,
    write_sparse,
)
from typer.testing import CliRunner

from cosmos_export.checkpoint import Geometry, open_checkpoint
from cosmos_export.checkpoint.describe import Summary, describe
from cosmos_export.checkpoint.published import EDGE, NANO, SUPER
from cosmos_export.checkpoint.safetensors_writer import TensorHeader

BILLION, MILLION = 1e9, 1e6


def summary(root: Path, geometry: Geometry, **options: Any) -> Summary:
    return describe(open_checkpoint(write_checkpoint(root, geometry, **options)))


@pytest.mark.parametrize(
    ("geometry", "tensors", "tower", "linear", "embed", "total", "tower_gb", "total_gb", "kv_bytes", "linears"),
    [
        (NANO, 814, 6.9461, 6.9458, 0.6223, 15.174, 13.89, 30.35, 147_456, 252),
        (SUPER, 1430, 31.2063, 31.2056, 0.7779, 64.020, 62.41, 128.04, 262_144, 448),
        (EDGE, 549, 1.4094, 1.4093, 0.2684, 3.370, 2.82, 6.74, 114_688, 168),
    ],
)
def test_published_sizes(
    tmp_path: Path,
    geometry: Geometry,
    tensors: int,
    tower: float,
    linear: float,
    embed: float,
    total: float,
    tower_gb: float,
    total_gb: float,
    kv_bytes: int,
    linears: int,
) -> None:
    found = summary(tmp_path, geometry, shards=7)
    assert found.transformer_tensors == tensors
    for name in ("reasoner", "generator"):
        size = found.towers[name]
        assert size.parameters / BILLION == pytest.approx(tower, abs=6e-5)
        assert size.linear_parameters / BILLION == pytest.approx(linear, abs=6e-5)
        assert size.size_bytes / BILLION == pytest.approx(tower_gb, abs=6e-3)
        assert size.linears == linears
    for name in ("embed_tokens", "lm_head"):
        assert found.shared[name].parameters / BILLION == pytest.approx(embed, abs=6e-5)
    assert found.transformer.parameters / BILLION == pytest.approx(total, abs=6e-4)
    assert found.transformer.size_bytes / BILLION == pytest.approx(total_gb, abs=6e-3)
    assert found.kv_bytes_per_prompt_token == kv_bytes


@pytest.mark.parametrize(
    ("geometry", "heads", "time_embedder", "vision"),
    [(NANO, 36.9, 17.83, 1.578), (SUPER, 51.3, 27.54, 1.971), (EDGE, 14.0, 4.72, 0.788)],
)
def test_published_head_sizes(
    tmp_path: Path, geometry: Geometry, heads: float, time_embedder: float, vision: float
) -> None:
    shared = {name: size.parameters / MILLION for name, size in summary(tmp_path, geometry).shared.items()}
    assert shared["time_embedder"] == pytest.approx(time_embedder, abs=6e-3)
    assert shared["vision_heads"] == pytest.approx(vision, abs=2e-3)
    inputs_and_outputs = sum(size for name, size in shared.items() if name not in ("embed_tokens", "lm_head"))
    assert inputs_and_outputs == pytest.approx(heads, abs=6e-2)
    assert ("sound_heads" in shared) == geometry.sound_gen


def test_quantized_bytes_count_the_scales(tmp_path: Path) -> None:
    config = {"quantization_config": QUANTIZATION}
    found = summary(tmp_path, NANO, specs=quantized_specs(NANO), config=config)
    assert found.precision == "fp8-modelopt"
    tower = found.towers["generator"]
    assert tower.size_bytes == tower.linear_parameters + 2 * (tower.parameters - tower.linear_parameters) + 8 * 252
    assert found.step_policy == {"first_steps": 3, "last_steps": 3, "reasoner": "a16", "overlap": "a16"}
    assert len(found.unused_tensors) == 3 * 504


def test_super_of_true_size_is_inspected_in_two_seconds(tmp_path: Path) -> None:
    root = write_checkpoint(tmp_path, SUPER, shards=27)
    assert sum(path.stat().st_size for path in (root / "transformer").glob("*.safetensors")) > 128e9
    started = time.monotonic()
    process = inspect(root, "--json")
    assert time.monotonic() - started < 2
    assert json.loads(process.stdout)["variant"] == "super"


def test_reading_a_checkpoint_does_not_need_torch(tmp_path: Path) -> None:
    root = write_checkpoint(tmp_path, EDGE)
    script = (
        "import sys\n"
        "from cosmos_export.checkpoint import open_checkpoint\n"
        "from cosmos_export.checkpoint.describe import describe\n"
        f"describe(open_checkpoint({str(root)!r}))\n"
        "print(sorted({name.split('.')[0] for name in sys.modules} & {'torch', 'diffusers', 'onnx', 'pickle'}))\n"
    )
    output = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert set(eval(output)) <= {"pickle"}  # numpy imports pickle


def inspect(root: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """The verb in a process of its own, as a user starts it."""
    script = (
        "from cosmos_export.cli import inspect, verbs\n"
        "app = verbs.Verbs()\n"
        "inspect.register(app)\n"
        "app.callback()(lambda: None)\n"
        "app()\n"
    )
    command = [sys.executable, "-c", script, "inspect", str(root), *options]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.fixture
def app() -> typer.Typer:
    from cosmos_export.cli import demo_checkpoint, verbs
    from cosmos_export.cli import inspect as inspect_verb

    app = verbs.Verbs()
    inspect_verb.register(app)
    demo_checkpoint.register(app)
    return app


def test_report(tmp_path: Path, app: typer.Typer) -> None:
    root = write_checkpoint(
        tmp_path / "[bold]Cosmos3-Nano", NANO, specs=quantized_specs(NANO), config={"quantization_config": QUANTIZATION}
    )
    write_json(root / "checkpoint.json", {"policy": {"domain_name": "droid\x1b[31m_lerobot"}})
    write_sparse(root / "vae" / f"{STEM}.safetensors", [TensorHeader("w", "BF16", (1_000_000,))])
    write_json(root / "vae/config.json", VAE)
    result = CliRunner().invoke(app, ["inspect", str(root)])
    assert result.exit_code == 0, result.output
    for words in (
        "nano-policy-droid",
        "fp8-modelopt",
        "36 in each tower, width 4,096",
        "32 query, 8 key/value, 128 wide",
        "147,456 bytes of K/V per token",
        "image, video, sound, action",
        "UniPC, Karras grid (ignores flow_shift)",
        "first 3 and last 3 with 16-bit activations",
        "generator tower",
        "15.2 B",
        "1.00 M",
        "unused: 1512 tensors",
        "[bold]Cosmos3-Nano",
    ):
        assert words in result.stdout, words
    assert "\x1b" not in result.stdout


def test_json_report(tmp_path: Path, app: typer.Typer) -> None:
    result = CliRunner().invoke(app, ["inspect", str(write_checkpoint(tmp_path, EDGE)), "--json"])
    document = json.loads(result.stdout)
    assert document["kv_bytes_per_prompt_token"] == 114_688
    assert document["towers"]["reasoner"]["linears"] == 168
    assert document["modalities"] == ["image", "video", "action"]
    assert document["geometry"]["hidden_act"] == "relu2"


def test_an_error_has_its_code_and_status(tmp_path: Path, app: typer.Typer) -> None:
    result = CliRunner().invoke(app, ["inspect", str(tmp_path), "--json"])
    assert result.exit_code == 2
    assert json.loads(result.stdout)["error"]["code"] == "CX105"
    assert "hint:" in result.stderr


def test_demo_verb(tmp_path: Path, app: typer.Typer) -> None:
    pytest.importorskip("diffusers")
    target = tmp_path / "demo"
    arguments = ["demo-checkpoint", "-o", str(target), "--variant", "edge", "--layers", "1", "--seed", "3"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert "edge" in result.stdout and "seed 3" in result.stdout
    assert open_checkpoint(target).geometry.num_hidden_layers == 1
    again = CliRunner().invoke(app, [*arguments, "--json"])
    assert again.exit_code == 2
    assert json.loads(again.stdout)["error"]["code"] == "CX130"
    forced = CliRunner().invoke(app, [*arguments, "--json", "--force"])
    assert json.loads(forced.stdout)["family"] == "edge"


def test_the_fake_checkpoints_are_the_published_ones_in_size() -> None:
    assert sum(spec.size_bytes for spec in transformer_specs(NANO)) / BILLION == pytest.approx(30.35, abs=6e-3)
