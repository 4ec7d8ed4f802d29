"""What a search of `calibrate` finds, through the verbs to the end: a table, a bundle, and the numbers it computes."""

from __future__ import annotations

from pathlib import Path

import build_harness as harness
import pytest
import torch
from typer.testing import CliRunner

from cosmos_export.calibration.table import ScaleTable, read_scale_table
from cosmos_export.calibration.weights import read_tensor
from cosmos_export.checkpoint import open_checkpoint
from cosmos_export.checkpoint.demo import write_demo_checkpoint
from cosmos_export.cli import app
from cosmos_export.compiler.driver import build
from cosmos_export.evaluation.cases import CASES
from cosmos_export.evaluation.reference import Reference, relative_error

pytestmark = pytest.mark.xdist_group("builds")
PROFILE = "und_len=1:64:256,frames=1:2:5,height=3:4:8,width=3:4:8,sound_len=0,action_len=0"


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A checkpoint that INT4 groups divide, in fp32 so that nothing else is rounded, and its table of SVDQuant."""
    pytest.importorskip("modelopt")
    root = tmp_path_factory.mktemp("searched")
    checkpoint = write_demo_checkpoint(root / "c", layers=1, hidden=128, intermediate=256, dtype="float32")
    (root / "prompts.txt").write_text("A robot folds a towel.\n")
    arguments = [
        "calibrate", checkpoint, "--data", root / "prompts.txt", "-o", root / "scales", "--modalities", "vision",
        "--latents", "noise", "--samples", 4, "--steps", 4, "--guidance", 1, "--profile", PROFILE,
        "--algorithm", "modelopt-svdquant", "--rank", 4,
    ]  # fmt: skip
    result = CliRunner().invoke(app, [str(one) for one in arguments])
    assert result.exit_code == 0, result.output
    return checkpoint, root / "scales"


def effective(weight: torch.Tensor, linear: str, table: ScaleTable) -> torch.Tensor:
    """float32: what a weight amounts to as 4-bit groups of what the low-rank part leaves, that part, and the pre-scale.

    A row has at least two groups.
    """
    pre = torch.from_numpy(table.pre_scales[linear].copy())
    down, up = (torch.from_numpy(half.copy()) for half in table.low_rank[linear])
    left = weight / pre - up @ down
    groups = left.unflatten(1, (-1, 128 if left.shape[1] > 128 else 64))
    scale = groups.abs().amax(-1, keepdim=True) / 7
    levels = (groups / scale).round().clamp(-8, 7)
    return ((levels * scale).flatten(1) + up @ down) * pre


def test_svdquant_is_calibrated_and_built(tmp_path: Path, searched: tuple[Path, Path]) -> None:
    path, scales = searched
    checkpoint, table = open_checkpoint(path), read_scale_table(scales)
    linears = {name for name, tensor in checkpoint.expected.items() if tensor.linear}
    assert {f"{linear}.weight" for linear in table.low_rank} == linears == {f"{x}.weight" for x in table.pre_scales}
    assert all(down.shape[0] == 4 for down, _ in table.low_rank.values())
    build(
        harness.transformer_only(
            path, tmp_path / "x", target="cpu", recipe="int4", calibration=scales, profiles=(PROFILE,),
            modalities=("vision",), parity="never", quality="report", steps=1,
        )
    )  # fmt: skip
    inputs = CASES[0].inputs(checkpoint.geometry.config, ("vision",))
    feeds = {name: value.numpy() for name, value in inputs.items()}
    found = harness.chain(tmp_path / "x", feeds, ".onnx")
    values = {name: read_tensor(checkpoint.tensors[name]).float() for name in checkpoint.expected}
    plain = Reference(path / "transformer", torch.float32, values).step(inputs, CASES[0].fps)
    values |= {name: effective(values[name], name.removesuffix(".weight"), table) for name in linears}
    expected = Reference(path / "transformer", torch.float32, values).step(inputs, CASES[0].fps)
    results = {"vision_velocity": torch.from_numpy(found["vision_velocity"])}
    wanted = {"vision_velocity": expected["vision_velocity"]}
    assert relative_error(results, wanted) < 1e-5
    assert relative_error(results, {"vision_velocity": plain["vision_velocity"]}) > 1e-3


def test_a_checkpoint_has_no_place_for_low_rank_parts(tmp_path: Path, searched: tuple[Path, Path]) -> None:
    path, scales = searched
    arguments = ["quantize", path, "--calibration", scales, "--format", "int4", "-o", tmp_path / "q"]
    result = CliRunner().invoke(app, [str(one) for one in arguments])
    assert result.exit_code == 3, result.output
    assert "CX330" in result.output and "low-rank parts of 14 linears" in " ".join(result.output.split())
    assert not (tmp_path / "q").exists()
