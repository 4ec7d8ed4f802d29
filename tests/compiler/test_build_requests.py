"""What cannot be built is refused before any work: at once, without torch, with a code, a reason and a way on."""

from __future__ import annotations

import json
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import build_harness as harness
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cosmos_export.compiler.options import resolve
from cosmos_export.compiler.request_record import checkpoint_notes
from cosmos_export.diagnostics import CosmosExportError, ToolError, UnsupportedError, UserError
from cosmos_export.options import BuildOptions
from cosmos_export.targets import target_names

SHARD = "transformer/diffusion_pytorch_model.safetensors"
_PROBE = (
    "import sys\n"
    "from cosmos_export.cli import main\n"
    "try: main()\n"
    "finally: print('torch' in sys.modules, 'tensorrt_rtx' in sys.modules, file=sys.stdout)\n"
)


def refused(folder: Path, code: str, status: int, *arguments: object) -> tuple[str, str]:
    """Message and hint of `build`, after checking how it ended: nothing left behind, nothing heavy imported."""
    before = harness.leftovers(folder)
    command = [sys.executable, "-c", _PROBE, "build", *map(str, arguments)]
    result = subprocess.run(command, cwd=folder, env=harness.environment(), capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stdout) == (status, "False False\n"), result.stderr
    assert harness.leftovers(folder) == before
    head, _, tail = result.stderr.strip().partition("\n\nhint: ")
    assert head.startswith(f"error[{code}]: "), result.stderr
    assert "Traceback" not in result.stderr
    return head.removeprefix(f"error[{code}]: "), tail


# ---------------------------------------------------------------------------------------------------------------------
# The request itself


@pytest.mark.parametrize(
    ("arguments", "code", "status", "message", "hint"),
    [
        (("-o", "x", "--target", "rtx-pro-600"), "CX401", 2, "unknown target `rtx-pro-600`", "mean `rtx-pro-6000`?"),
        (("-o", "x", "--target", "h100", "--backend", "x"), "CX407", 2, "`h100` has no backend `x`", "targets"),
        (("-o", "x", "--profile", "480q"), "CX410", 2, "unknown profile `480q`", "mean `480p`?"),
        (("-o", "x", "--profile", "480p,frame=3"), "CX410", 2, "unknown dimension `frame`", "mean `frames`?"),
        (("-o", "x", "--profile", "480p,frames=a"), "CX410", 2, "`frames=a` is neither frames=N nor", ""),
        (("-o", "x", "--profile", "480p,frames=9:1:2"), "CX410", 2, "`frames` = 9:1:2 does not satisfy", ""),
        (("-o", "x", "--profile", "480p-120f"), "CX410", 2, "120 pixel frames are not 4·n + 1", "use 117 or 121"),
        (("-o", "x", "--profile", "480p", "--profile", "480p"), "CX410", 2, "profile `480p` is given twice", "once"),
        (("-o", "x", "--profile", "480p," + "," * 300), "CX410", 2, "`", ""),
        (("-o", "x", "--profile", "480p,und_len=1:9:5000"), "CX411", 2, "`und_len` reaches 5000, allowed 4096", "512"),
        (("-o", "x", "--profile", "480p,height=2"), "CX411", 2, "`height` goes down to 2, allowed from 3", ""),
        (("-o", "x", "--profile", "480p,width=2000"), "CX411", 2, "`width` reaches 2000, allowed 1024", ""),
        (("-o", "x", "--modalities", "vision", "--profile", "policy-droid"), "CX411", 2, "no action is generated", ""),
        (("-o", "x", "--modalities", "vision,smell"), "CX210", 2, "smell asked for", "leave --modalities out"),
        (("-o", "x", "--modalities", "sound"), "CX210", 2, "sound asked for; this checkpoint generates vision", "part"),
        (("-o", "x", "--modalities", ""), "CX210", 2, "none asked for", ""),
        (("-o", "x", "--outputs", "action"), "CX221", 2, "no output `action`; the step computes vision_", "out"),
        (("-o", "x", "--outputs", ""), "CX221", 2, "no output is left", ""),
        (("-o", "x", "--modalities", "vision", "--outputs", "sound_velocity"), "CX221", 2, "`sound_velocity`", ""),
        (("-o", "x", "--outputs", "action_velocity"), "CX411", 2, "allows no row of action_velocity", "action_len=16"),
        (("-o", "x", "--components", "vae"), "CX224", 2, "component 'vae' is not one of vae-decoder, vae-en", "all"),
        (("-o", "x", "--components", "none,tokenizer"), "CX224", 2, "component 'none' is not one", "or `none` alone"),
        (
            ("-o", "x", "--components", "sound-decoder", "--modalities", "vision"),
            "CX225", 2, "`sound-decoder` cannot be built: sound is not among the modalities vision", "vae-encoder, tok",
        ),
        (("-o", "x", "--steps", "0"), "CX460", 2, "steps = 0", "35"),
        (("-o", "x", "--steps", "1001"), "CX460", 2, "steps = 1001", "35"),
        (("-o", "x", "--parity", "maybe"), "CX100", 2, "'maybe' is not one of 'auto', 'always'", "build --help"),
        ((), "CX451", 2, "a build needs an output", "-o DIR"),
        (("-o", "x", "--until", "normalize"), "CX451", 2, "`--until` stops before there is a bundle", "--dump"),
        (("--until", "normalize", "--dump", "taken"), "CX451", 2, "taken is not a directory", "directory"),
        (("-o", "taken"), "CX701", 2, "taken already exists", "--force"),
        (("-o", "taken", "--force"), "CX702", 2, "taken is not a directory", ""),
        (("-o", "full", "--force"), "CX702", 2, "full is not a bundle", "choose another output"),
    ],
)  # fmt: skip
def test_requests(
    tmp_path: Path, omni: Path, arguments: tuple[str, ...], code: str, status: int, message: str, hint: str
) -> None:
    (tmp_path / "taken").write_text("precious")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("precious")
    found, way_on = refused(tmp_path, code, status, omni, *arguments)
    assert message in found
    assert hint in way_on
    assert (tmp_path / "taken").read_text() == (tmp_path / "full" / "thesis.tex").read_text() == "precious"


def test_sound_on_edge(tmp_path: Path, edge: Path) -> None:
    message, _ = refused(tmp_path, "CX411", 2, edge, "-o", "x", "--profile", "480p-121f+sound")
    assert "`sound_len` reaches 127, allowed 0 (no sound is generated)" in message
    message, _ = refused(tmp_path, "CX210", 2, edge, "-o", "x", "--modalities", "vision,sound")
    assert "this checkpoint generates vision, action" in message
    message, hint = refused(tmp_path, "CX225", 2, edge, "-o", "x", "--components", "vae-decoder,sound-decoder")
    assert "component `sound-decoder` cannot be built: the checkpoint has no sound_tokenizer/" in message
    assert "all there are: vae-decoder, vae-encoder, tokenizer" in hint


def test_the_range_of_profiles_is_that_of_the_captured_graph() -> None:
    from cosmos_export.capture.model import MODALITIES, program_dims
    from cosmos_export.targets.profiles import ModelLimits

    dims, limits = program_dims({}, MODALITIES), ModelLimits(max_position=262_144)
    assert limits.max_und_len <= dims["und_len"].max
    assert limits.max_frames <= dims["frames"].max
    for name, most in (("height", limits.max_height), ("width", limits.max_width)):
        assert dims[name].min <= limits.min_grid
        assert most <= dims[name].max
    assert limits.max_rows <= min(dims["sound_len"].max, dims["action_len"].max)


# ---------------------------------------------------------------------------------------------------------------------
# The checkpoint


def truncated(root: Path) -> None:
    with (root / SHARD).open("r+b") as file:
        file.truncate(100_000)


def corrupt_header(root: Path) -> None:
    with (root / SHARD).open("r+b") as file:
        file.seek(8)
        file.write(b"{not json")


def endless_header(root: Path) -> None:
    with (root / SHARD).open("r+b") as file:
        file.write(struct.pack("<Q", 2**62))


def lost_shard(root: Path) -> None:
    index = {"metadata": {}, "weight_map": {"proj_in.weight": "diffusion_pytorch_model-00001-of-00002.safetensors"}}
    (root / SHARD).unlink()
    (root / f"{SHARD}.index.json").write_text(json.dumps(index))


def edited(file: str, **changes: Any) -> Callable[[Path], None]:
    def edit(root: Path) -> None:
        path = root / file
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return edit


def wrong_shape(root: Path) -> None:
    rewrite_header(root, lambda header: header["proj_in.bias"].update(shape=[32, 2]))


def duplicate_tensor(root: Path) -> None:
    path = root / SHARD
    header, data = read_header(path)
    text = json.dumps(header)[:-1] + ', "norm.weight": ' + json.dumps(header["norm.weight"]) + "}"
    write_header(path, text.encode(), data)


def same_tensor_twice(root: Path) -> None:
    shutil.copy(root / SHARD, root / "transformer" / "diffusion_pytorch_model-00001-of-00002.safetensors")
    shutil.copy(root / SHARD, root / "transformer" / "diffusion_pytorch_model-00002-of-00002.safetensors")
    (root / SHARD).unlink()


def missing_tensor(root: Path) -> None:
    def rename(header: dict[str, Any]) -> None:
        header["mystery.weight"] = header.pop("norm.weight")

    rewrite_header(root, rename)


def read_header(path: Path) -> tuple[dict[str, Any], bytes]:
    content = path.read_bytes()
    (size,) = struct.unpack_from("<Q", content)
    return json.loads(content[8 : 8 + size]), content[8 + size :]


def write_header(path: Path, header: bytes, data: bytes) -> None:
    header += b" " * (-len(header) % 8)
    path.write_bytes(struct.pack("<Q", len(header)) + header + data)


def rewrite_header(root: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    header, data = read_header(root / SHARD)
    edit(header)
    write_header(root / SHARD, json.dumps(header).encode(), data)


@pytest.mark.parametrize(
    ("damage", "status", "named"),
    [
        (truncated, 2, "diffusion_pytorch_model.safetensors"),
        (corrupt_header, 2, "diffusion_pytorch_model.safetensors"),
        (endless_header, 2, "diffusion_pytorch_model.safetensors"),
        (lost_shard, 2, "diffusion_pytorch_model-00001-of-00002.safetensors"),
        (wrong_shape, 2, "proj_in.bias"),
        (duplicate_tensor, 2, "norm.weight"),
        (same_tensor_twice, 2, "diffusion_pytorch_model"),
        (missing_tensor, 2, "norm.weight"),
        (edited("transformer/config.json", hidden_act="gelu"), 2, "gelu"),
        (edited("transformer/config.json", joint_attn_implementation="three_way"), 2, "three_way"),
        (edited("transformer/config.json", num_hidden_layers=4), 2, "layers.3"),
        (edited("transformer/config.json", max_position_embeddings="many"), 2, "many"),
        (edited("scheduler/scheduler_config.json", _class_name="EulerScheduler"), 2, "EulerScheduler"),
        (lambda root: (root / "transformer/config.json").write_text("{"), 2, "config.json"),
        (lambda root: shutil.rmtree(root / "vae"), 2, "vae"),
        (lambda root: shutil.rmtree(root / "transformer"), 2, "transformer"),
    ],
    ids=[
        "truncated", "corrupt header", "endless header", "lost shard", "wrong shape", "tensor twice in a header",
        "tensor in two shards", "missing tensor", "activation", "attention", "more layers", "positions", "scheduler",
        "configuration", "component", "not a checkpoint",
    ],
)  # fmt: skip
def test_checkpoints(tmp_path: Path, omni: Path, damage: Callable[[Path], None], status: int, named: str) -> None:
    root = harness.copy_checkpoint(omni, tmp_path / "damaged")
    damage(root)
    before = harness.leftovers(tmp_path)
    with pytest.raises(CosmosExportError) as caught:
        resolve(BuildOptions(root, tmp_path / "x"))
    error = caught.value
    assert error.exit_code == status
    assert error.code.startswith("CX1")
    assert named in error.message
    assert error.hint
    assert harness.leftovers(tmp_path) == before


@pytest.mark.parametrize("damage", [truncated, wrong_shape])
def test_a_damaged_checkpoint_at_the_command_line(tmp_path: Path, omni: Path, damage: Callable[[Path], None]) -> None:
    root = harness.copy_checkpoint(omni, tmp_path / "damaged")
    damage(root)
    with pytest.raises(UserError) as caught:
        resolve(BuildOptions(root, tmp_path / "x"))
    message, hint = refused(tmp_path, caught.value.code, 2, root, "-o", "x", "--target", "rtx-pro-6000")
    assert (message, hint) == (caught.value.message, caught.value.hint)


def test_no_checkpoint_there(tmp_path: Path) -> None:
    message, hint = refused(tmp_path, "CX105", 2, "nvidia/Cosmos3-Nano", "-o", "x")
    assert "nvidia/Cosmos3-Nano does not exist" in message
    assert "hf download nvidia/Cosmos3-Nano" in hint


def test_fp16_weights(tmp_path: Path) -> None:
    root = harness.checkpoint(tmp_path, "omni", "float16")
    job = resolve(harness.transformer_only(root, tmp_path / "x", target="cpu"))
    assert job.checkpoint.dtype == "bf16"
    assert any("are F16 and are converted to BF16" in note for note in checkpoint_notes(job.checkpoint))


# ---------------------------------------------------------------------------------------------------------------------
# The machine


def test_without_the_builder(tmp_path: Path, omni: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    import cosmos_export.targets.trt.common as trt_common

    find = importlib.util.find_spec
    monkeypatch.setattr(trt_common, "find_spec", lambda name: None if name == "tensorrt_rtx" else find(name))
    with pytest.raises(UnsupportedError) as caught:
        resolve(BuildOptions(omni, tmp_path / "x", target="rtx-pro-6000"))
    assert caught.value.code == "CX404"
    assert "`tensorrt_rtx` Python module, which is not installed" in caught.value.message
    assert 'pip install ".[rtx]" in the checkout' in caught.value.hint
    resolve(BuildOptions(omni, tmp_path / "x"))  # the CPU needs none


def test_without_the_compiler(tmp_path: Path, omni: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    import cosmos_export.compiler.options as options

    find = importlib.util.find_spec
    monkeypatch.setattr(options, "find_spec", lambda name: None if name == "diffusers" else find(name))
    with pytest.raises(UnsupportedError) as caught:
        resolve(BuildOptions(omni, tmp_path / "x"))
    assert (caught.value.code, caught.value.exit_code) == ("CX802", 3)
    assert "needs diffusers" in caught.value.message
    assert 'pip install ".[compile]" in the checkout' in caught.value.hint


def test_without_space(tmp_path: Path, omni: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from cosmos_export.compiler.driver import build

    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=5_000_000))
    with pytest.raises(ToolError) as caught:
        build(BuildOptions(omni, tmp_path / "x", target="rtx-pro-6000"))
    assert caught.value.code == "CX704"
    assert "not enough disk space" in caught.value.message
    assert harness.leftovers(tmp_path) == []


def test_nothing_is_captured_for_a_request_that_ends_in_an_error(
    tmp_path: Path, omni: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The order of checks: whatever can be refused is refused before the first stage."""
    import cosmos_export.compiler.stages as stages
    from cosmos_export.compiler.driver import build

    def never(*arguments: object, **options: object) -> None:
        raise AssertionError("work began")

    for name in ("capture", "load_published", "write_tokenizer", "write_codec"):
        monkeypatch.setattr(stages, name, never)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").touch()
    good = {"checkpoint": omni, "output": tmp_path / "x"}
    for bad in (
        {"target": "rtx"},
        {"target": "b200", "backend": "inductor"},
        {"profiles": ()},
        {"profiles": ("480p,und_len=5000",)},
        {"modalities": ("action",)},
        {"outputs": ("velocity",)},
        {"steps": -1},
        {"components": ("vae",)},
        {"output": tmp_path / "taken"},
        {"output": tmp_path / "taken", "force": True},
        {"output": tmp_path / "missing" / "x", "target": "nowhere"},
        {"output": None, "until": "nonsense"},
    ):
        with pytest.raises(CosmosExportError):
            build(BuildOptions(**{**good, **bad}))  # type: ignore[arg-type]
    with pytest.raises(AssertionError, match="work began"):
        build(BuildOptions(**good))  # type: ignore[arg-type]
    assert harness.leftovers(tmp_path) == ["taken"]


@settings(max_examples=100, deadline=None)
@given(
    text=st.one_of(
        st.text(max_size=30),
        st.lists(
            st.sampled_from(["480p", "policy-droid", "frames=1:9:9", "und_len=0", "height=,", "=", "width=-1"])
        ).map(",".join),
    ),
    target=st.one_of(st.sampled_from(target_names()), st.text(max_size=12)),
)
def test_any_profile_and_target_is_taken_or_refused(omni: Path, text: str, target: str) -> None:
    try:
        job = resolve(BuildOptions(omni, Path("x"), target=target, profiles=(text,)))
    except (UserError, UnsupportedError) as error:
        assert error.message
    else:
        assert job.profiles[0].dims
