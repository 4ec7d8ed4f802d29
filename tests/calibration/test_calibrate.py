"""Calibration against the published model: the streamed ranges are those of hooks on the whole stock transformer."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import data_samples
import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from typer.testing import CliRunner

from cosmos_export.calibration import calibrate as stream
from cosmos_export.calibration import layers
from cosmos_export.calibration.calibrate import CalibrationJob
from cosmos_export.calibration.coverage import coverage, plan_samples
from cosmos_export.calibration.noised_inputs import step_inputs
from cosmos_export.calibration.stream import Workspace
from cosmos_export.calibration.table import LINEAGE_FILE, SCALES_FILE, read_scale_table, require_checkpoint
from cosmos_export.checkpoint import open_checkpoint
from cosmos_export.checkpoint.demo import write_demo_checkpoint
from cosmos_export.cli import app
from cosmos_export.compiler.calibrate_checkpoint import calibrate_checkpoint, resolve_calibration
from cosmos_export.compiler.quantize_checkpoint import quantize_checkpoint
from cosmos_export.diagnostics import CosmosExportError, FindingError, UnsupportedError, UserError
from cosmos_export.evaluation.reference import Reference
from cosmos_export.options import CalibrateOptions, QuantizeRequest
from cosmos_export.runtime import read_media
from cosmos_export.runtime.step_inputs import sound_latents
from cosmos_export.sampling import Overrides

SHORT = Overrides(steps=6)
SMALL = "frames=1:5:48,height=3:6:24,width=3:8:24,und_len=1:512:4096,sound_len=0:0:400,action_len=0:16:128"
"""128 × 96 pixels."""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    (root / "prompts.txt").write_text("A robot folds a towel.\nA red car turns left.\n")
    data_samples.write_clip(root / "clips" / "a.mp4", frames=9)
    data_samples.write_clip(root / "clips" / "b.mp4", frames=9, seed=1)
    data_samples.write_lerobot(root / "robot", episodes=1)
    random = np.random.default_rng(0)
    latents = {"vision": random.standard_normal((1, 4, 3, 12, 20), np.float32)}
    latents["sound"] = random.standard_normal((8, 10), np.float32)
    save_file(latents, root / "latents.safetensors")
    return root


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_demo_checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny", layers=2)


def options(checkpoint: Path, output: Path, root: Path, **changes: Any) -> CalibrateOptions:
    fields: dict[str, Any] = {
        "data": (f"{root / 'clips'},origin=real", str(root / "prompts.txt"), str(root / "robot"),
                 str(root / "latents.safetensors")),
        "samples": 40,
        "frames": 9,
        "profile": SMALL,
        "overrides": SHORT,
        "margin": 1.0,
    }  # fmt: skip
    return CalibrateOptions(checkpoint, output, **{**fields, **changes})


def refused(code: str, call: Callable[[], object], kind: type[CosmosExportError] = UserError) -> str:
    with pytest.raises(kind) as caught:
        call()
    assert caught.value.code == code, caught.value
    return caught.value.message


@pytest.mark.parametrize("variant", ["omni", "edge"])
def test_ranges_are_those_of_the_stock_model(
    variant: str, tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every input that calibration makes also goes through diffusers' whole transformer, packed by its pipeline."""
    path = write_demo_checkpoint(tmp_path / "tiny", variant, layers=2)
    sources = [f"{data / 'clips'}", str(data / "robot")]
    if variant == "omni":
        sources.append(str(data / "latents.safetensors"))
    recorded: list[tuple[dict[str, torch.Tensor], float]] = []

    def recording(request: Any, *arguments: Any, **keywords: Any) -> dict[str, torch.Tensor]:
        inputs = step_inputs(request, *arguments, **keywords)
        recorded.append((inputs, request.fps))
        return inputs

    monkeypatch.setattr(stream, "step_inputs", recording)
    calibrate_checkpoint(options(path, tmp_path / "scales", data, data=tuple(sources)))
    table = read_scale_table(tmp_path / "scales")

    reference = Reference(path / "transformer", torch.float32)
    largest: dict[str, float] = {}

    def hook(name: str) -> Callable[[Any, Any], None]:
        def before(_: Any, arguments: Any) -> None:
            largest[name] = max(largest.get(name, 0.0), float(arguments[0].abs().max()))

        return before

    for name, module in reference.transformer.named_modules():
        if name.startswith("layers.") and isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(hook(f"{name}.input_amax"))
    for inputs, fps in recorded:
        reference.step(inputs, fps)
    linears = {key: value for key, value in table.amax.items() if ".attention." not in key}
    assert linears.keys() == largest.keys()
    for key, value in largest.items():
        assert linears[key] == pytest.approx(value, rel=2e-5), key
    assert len(table.amax) - len(linears) == 2 * 2 * 3
    require_checkpoint(table, open_checkpoint(path))


def test_narrow_layers_compute_the_same_on_a_cpu_without_narrow_products(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = open_checkpoint(write_demo_checkpoint(tmp_path / "narrow", layers=1, dtype="bfloat16"))
    random = torch.Generator().manual_seed(0)
    hidden = [torch.randn(rows, 64, generator=random).bfloat16() for rows in (5, 9)]
    rotary = tuple(torch.rand(rows, 32, generator=random).bfloat16() for rows in (5, 5, 9, 9))
    results = []
    for capabilities in (set(), {torch.backends.cpu.get_cpu_capability()}):
        monkeypatch.setattr(layers, "_WITHOUT_NARROW_PRODUCTS", capabilities)
        layer = layers.LayerSource(opened).load(0)
        wide = [isinstance(module, layers.WideLinear) for module in layer.modules()]
        assert sum(wide) == (14 if capabilities else 0)
        with torch.no_grad():
            results.append(layer(*hidden, rotary))
    for own, wide_one in zip(*results, strict=True):
        assert own.dtype is wide_one.dtype is torch.bfloat16
        assert float((own.float() - wide_one.float()).norm() / own.float().norm()) < 2e-3


def test_attention_ranges_are_of_what_enters_attention(checkpoint: Path, tmp_path: Path, data: Path) -> None:
    """After the norm, a row of q has length √head_dim·|weight|; a rotation does not change it."""
    calibrate_checkpoint(options(checkpoint, tmp_path / "scales", data))
    table, opened = read_scale_table(tmp_path / "scales"), open_checkpoint(checkpoint)
    for tower, norm in (("generator", "norm_added_q"), ("reasoner", "norm_q")):
        amax = table.amax[f"layers.0.attention.{tower}.q_amax"]
        weight = np.asarray(opened.tensors[f"layers.0.self_attn.{norm}.weight"].array(), np.float32)
        assert 1 < amax <= float(np.sqrt(32) * np.abs(weight).max()) * 1.001
    # k and v of the generator's attention hold those of the reasoner too.
    for operand in ("k", "v"):
        joint = table.amax[f"layers.1.attention.generator.{operand}_amax"]
        assert joint >= table.amax[f"layers.1.attention.reasoner.{operand}_amax"]


def test_inputs_are_made_as_the_model_sees_them(checkpoint: Path, tmp_path: Path, data: Path) -> None:
    job = resolve_calibration(options(checkpoint, tmp_path / "scales", data))
    modes = [work.request.mode for work in job.works]
    assert modes == ["t2v", "i2v", "t2v", "t2v", "policy", "forward-dynamics", "inverse-dynamics", "t2v"]
    assert [w.latents for w in job.works] == ["encoded"] * 2 + ["borrowed"] * 2 + ["encoded"] * 3 + ["recorded"]
    assert job.works[1].request.clean_frames == (0,)
    makers = stream._Makers(job)
    work = job.works[1]
    latents = makers.latents(work, [0, 5], 0)
    clean = stream._Makers(job)._encoded(work)
    for step in (0, 5):
        x, sigma = latents(step, 7)["vision"], work.request.schedule.sigmas[step]
        np.testing.assert_array_equal(x[:, :, 0], clean[:, :, 0])  # given frames have no noise
        noise = (x[:, :, 1:] - (1 - sigma) * clean[:, :, 1:]) / sigma
        assert abs(noise.std() - 1) < 0.1 and abs(noise.mean()) < 0.1
    action = makers.latents(job.works[4], [2], 0)(2, 3)["action"]
    assert action[:, :10].any() and not action[:, 10:].any()
    given = makers.latents(job.works[5], [2], 0)(2, 3)["action"]
    np.testing.assert_array_equal(given[:, :10], job.works[5].given)


def test_encoded_latents_are_those_of_the_pipeline(checkpoint: Path, tmp_path: Path, data: Path) -> None:
    from diffusers import Cosmos3OmniPipeline

    job = resolve_calibration(options(checkpoint, tmp_path / "scales", data))
    pipe = Cosmos3OmniPipeline.from_pretrained(str(checkpoint), torch_dtype=torch.float32, local_files_only=True)
    work = job.works[0]
    pixels = torch.from_numpy(stream.pixels(work, job.record))[None]
    with torch.no_grad():
        expected = pipe._encode_video(pixels).numpy()
    np.testing.assert_allclose(stream._Makers(job)._encoded(work), expected, atol=2e-5)


def test_the_sound_of_a_clip_is_what_the_published_tokenizer_makes_of_it(checkpoint: Path, tmp_path: Path) -> None:
    from diffusers import Cosmos3AVAEAudioTokenizer

    clip = data_samples.write_sounding_clip(tmp_path / "clips/tone.mp4", frames=17)
    job = resolve_calibration(
        options(checkpoint, tmp_path / "scales", tmp_path, data=(str(clip),), modalities=("vision", "sound"))
    )
    assert job.coverage["sound"] and all(work.request.sound for work in job.works)
    (work,) = job.works
    waveform = read_media.read_sound(clip, 0.0, 17 * 1920, 48_000)
    assert np.abs(waveform[:, :10_000]).max() < 0.02 < 0.4 < np.abs(waveform[:, 15_000:]).max() < 0.6
    # 440 Hz at whatever rate the file has.
    spectrum = np.abs(np.fft.rfft(waveform[0, 14_000:26_000]))
    assert spectrum.argmax() * 48_000 / 12_000 == pytest.approx(440, abs=8)
    later = read_media.read_sound(clip, 0.3, 1920, 48_000)
    np.testing.assert_allclose(later, waveform[:, 14_400:16_320], atol=1e-6)
    stock = Cosmos3AVAEAudioTokenizer.from_pretrained(checkpoint / "sound_tokenizer", torch_dtype=torch.float32).eval()
    with torch.no_grad():
        count = sound_latents(work.request.frames, work.request.fps, job.record)
        heard = read_media.read_sound(clip, 0.0, count * 1920, 48_000)
        expected = stock.encode(torch.from_numpy(heard)[None]).latent_dist.mode()[0].numpy()
    np.testing.assert_allclose(stream._Makers(job)._heard(work), expected, atol=2e-5)
    silent = data_samples.write_clip(tmp_path / "silent.mp4")
    assert not read_media.has_sound(silent)
    refused("CX614", lambda: read_media.read_sound(silent, 0.0, 10, 48_000))


def test_passes_cover_steps_branches_and_modalities(checkpoint: Path, tmp_path: Path, data: Path) -> None:
    job = resolve_calibration(options(checkpoint, tmp_path / "scales", data))
    assert len(set(job.samples)) == len(job.samples)
    steps = {sample.step for sample in job.samples}
    assert {0, 5} <= steps
    assert job.coverage == coverage(job.works, job.samples)
    assert set(job.coverage) == {"vision", "sound", "action"}
    assert set(job.coverage["vision"]) == {"0-25 %", "25-50 %", "50-75 %", "75-100 %"}
    assert all(count for parts in job.coverage.values() for cells in parts.values() for count in cells.values())
    assert "uncond" not in job.coverage["action"]["0-25 %"]  # actions are not guided
    assert plan_samples(job.works, 40) == list(job.samples)


def test_too_little_coverage_fails(checkpoint: Path, tmp_path: Path, data: Path) -> None:
    def run(**changes: Any) -> Callable[[], object]:
        return lambda: resolve_calibration(options(checkpoint, tmp_path / "scales", data, **changes))

    clips = str(data / "clips")
    assert "sound" in refused("CX322", run(data=(clips,)), FindingError)
    assert "action" in refused("CX322", run(data=(clips,), modalities=("vision", "action")), FindingError)
    assert "too few passes" in refused("CX322", run(samples=3), FindingError)
    resolve_calibration(options(checkpoint, tmp_path / "scales", data, data=(clips,), modalities=("vision",)))


def test_prompts_alone_need_latents_from_somewhere(checkpoint: Path, tmp_path: Path, data: Path) -> None:
    only = {"data": (str(data / "prompts.txt"),), "modalities": ("vision", "sound"), "samples": 24}
    refused("CX346", lambda: resolve_calibration(options(checkpoint, tmp_path / "scales", data, **only)))
    result = calibrate_checkpoint(options(checkpoint, tmp_path / "scales", data, latents="rollout", **only))
    assert {work.latents for work in result.job.works} == {"rollout"}
    (source,) = read_scale_table(tmp_path / "scales").lineage["sources"]
    assert source["latents"] == {"rollout": 2}
    noise = only | {"modalities": ("vision",), "latents": "noise"}
    assert resolve_calibration(options(checkpoint, tmp_path / "x", data, **noise)).works[0].latents == "noise"


def test_what_of_a_clip_is_shown_otherwise_is_in_the_lineage(checkpoint: Path, tmp_path: Path, data: Path) -> None:
    clips = tmp_path / "clips"
    clips.mkdir()
    image = np.zeros((48, 64, 3), np.uint8)
    for number in range(7):
        with av.open(str(clips / f"{number}.mp4"), "w") as container:
            video: Any = container.add_stream("libx264", rate=24)
            video.height, video.width, video.pix_fmt = 48, 64, "yuv420p"
            video.codec_context.sample_aspect_ratio = Fraction(4, 3)
            for _ in range(9):
                container.mux(video.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
            container.mux(video.encode(None))
    job = resolve_calibration(options(checkpoint, tmp_path / "x", data, data=(str(clips),), modalities=("vision",)))
    (source,) = stream.lineage(job)["sources"]
    assert source["notes"][0] == "0.mp4 has pixels of 4:3, which are taken as square: scale it first"
    assert source["notes"][5:] == ["2 more notes of that kind"]


def test_lineage_says_what_it_was_made_of(checkpoint: Path, tmp_path: Path, data: Path) -> None:
    for name in ("one", "two"):
        source = f"{data / 'clips'},origin=real,licence=CC0"
        made = options(checkpoint, tmp_path / name, data, data=(source,), modalities=("vision",), samples=12)
        calibrate_checkpoint(made)
    assert (tmp_path / "one" / SCALES_FILE).read_bytes() == (tmp_path / "two" / SCALES_FILE).read_bytes()
    text = (tmp_path / "one" / LINEAGE_FILE).read_text()
    assert text == (tmp_path / "two" / LINEAGE_FILE).read_text() and str(data) not in text
    lineage = json.loads(text)["lineage"]
    (source,) = lineage["sources"]
    assert (source["count"], source["licence"], source["origin"], source["kind"]) == (2, "CC0", "real", "media")
    assert len(source["sha256"]) == 64 and source["modes"] == {"i2v": 1, "t2v": 1}
    assert lineage["passes"] == 12 and lineage["observer"] == {"method": "absmax", "margin": 1.0}


def test_a_killed_calibration_resumes_to_the_identical_table(checkpoint: Path, tmp_path: Path, data: Path) -> None:
    small = {"data": (str(data / "clips"),), "modalities": ("vision",), "samples": 12}
    calibrate_checkpoint(options(checkpoint, tmp_path / "whole", data, **small))
    code = (
        "import sys\nfrom pathlib import Path\n"
        "from cosmos_export.compiler.calibrate_checkpoint import CalibrateOptions, calibrate_checkpoint\n"
        "from cosmos_export.calibration.stream import Workspace\n"
        "from cosmos_export.sampling import Overrides\n"
        "advance = Workspace.advance\n"
        "def slowly(self, sample, hidden, passed, seen):\n"
        "    advance(self, sample, hidden, passed, seen)\n"
        "    if (passed, sample) == (2, 5):\n"
        "        print('now', flush=True)\n"
        "        import time; time.sleep(60)\n"
        "Workspace.advance = slowly\n"
        f"calibrate_checkpoint(CalibrateOptions(Path({str(checkpoint)!r}), Path({str(tmp_path / 'killed')!r}),\n"
        f"    ({str(data / 'clips')!r},), modalities=('vision',), samples=12, frames=9, margin=1.0,\n"
        f"    profile={SMALL!r}, overrides=Overrides(steps=6)))\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "now\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "killed").exists()
    workspace = stream.workspace_folder(tmp_path / "killed")
    assert (workspace / "layers" / "00000.safetensors").is_file()
    made: list[int] = []
    again = calibrate_checkpoint(options(checkpoint, tmp_path / "killed", data, **small), _Counting(made))
    assert again.resumed and not workspace.exists()
    for file in (SCALES_FILE, LINEAGE_FILE):
        assert (tmp_path / "killed" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()


class _Counting:
    def __init__(self, made: list[int]) -> None:
        self._made = made

    def begin(self, task: str, total: int | None = None) -> None:
        assert task != "make inputs", "the inputs of every pass were on disk"

    def update(self, task: str, completed: int) -> None: ...

    def end(self, task: str) -> None: ...


def test_other_data_starts_anew(checkpoint: Path, tmp_path: Path, data: Path) -> None:
    job = resolve_calibration(options(checkpoint, tmp_path / "scales", data))
    folder = stream.workspace_folder(tmp_path / "scales")
    first = Workspace(folder, job.plan())
    (folder / "layers" / "00000.safetensors").write_bytes(b"a result")
    assert not first.resumed and Workspace(folder, job.plan()).resumed
    other = resolve_calibration(options(checkpoint, tmp_path / "scales", data, seed=1))
    assert not Workspace(folder, other.plan()).resumed
    assert not (folder / "layers" / "00000.safetensors").exists()


@pytest.mark.parametrize("how", ["others may write", "a link"])
def test_a_workspace_that_is_not_this_users_alone_is_not_taken_over(tmp_path: Path, how: str) -> None:
    folder, plan = tmp_path / ".scales.calibrating", {"seed": 0}
    Workspace(folder, plan)
    assert folder.stat().st_mode & 0o777 == 0o700 and Workspace(folder, plan).resumed
    if how == "a link":
        folder.rename(tmp_path / "elsewhere")
        folder.symlink_to(tmp_path / "elsewhere")
    else:
        folder.chmod(0o777)
    refused("CX349", lambda: Workspace(folder, plan))


@pytest.mark.parametrize("changed", ["weights", "an encoder", "data"])
def test_inputs_that_change_while_they_are_read(
    checkpoint: Path, tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch, changed: str
) -> None:
    """In place, with the time of before. Nothing that follows from the new bytes is written, so that a calibration of
    the old ones could go on."""
    path, root = shutil.copytree(checkpoint, tmp_path / "tiny"), shutil.copytree(data, tmp_path / "data")
    file = {
        "weights": path / "transformer/diffusion_pytorch_model.safetensors",
        "an encoder": path / "vae/diffusion_pytorch_model.safetensors",
        "data": root / "clips/b.mp4",
    }[changed]
    when = "enter" if changed == "data" else "advance"
    write, written = getattr(Workspace, when), list[int]()

    def once(self: Workspace, sample: int, *rest: Any) -> None:
        if not written:
            status, content = file.stat(), bytearray(file.read_bytes())
            content[-1] ^= 1
            file.write_bytes(content)
            os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
        written.append(sample)
        write(self, sample, *rest)

    monkeypatch.setattr(Workspace, when, once)
    small: dict[str, Any] = {"data": (str(root / "clips"),), "modalities": ("vision",), "samples": 12}
    given = options(path, tmp_path / "scales", root, **small)
    message = refused("CX118", lambda: calibrate_checkpoint(given))
    assert "changed during calibration" in message and str(file) in message
    assert not (tmp_path / "scales").exists()
    workspace = stream.workspace_folder(tmp_path / "scales")
    passed = [Workspace(workspace, json.loads((workspace / "plan.json").read_text())).passed(i) for i in range(12)]
    assert None in passed if changed == "data" else passed == [0] * 12
    assert not calibrate_checkpoint(given).resumed


@pytest.mark.parametrize("observer", ["percentile", "mse"])
def test_other_observers_choose_smaller_ranges(observer: str, checkpoint: Path, tmp_path: Path, data: Path) -> None:
    small = {"data": (str(data / "clips"),), "modalities": ("vision",), "samples": 12}
    calibrate_checkpoint(options(checkpoint, tmp_path / "absmax", data, **small))
    calibrate_checkpoint(options(checkpoint, tmp_path / observer, data, observer=observer, percentile=99.0, **small))
    widest, found = (read_scale_table(tmp_path / name).amax for name in ("absmax", observer))
    assert all(0 < found[key] <= value * 1.0001 for key, value in widest.items())
    assert any(found[key] < 0.95 * value for key, value in widest.items())


def test_awq_scales_are_shared_by_linears_that_read_one_tensor(tmp_path: Path, data: Path) -> None:
    path = write_demo_checkpoint(tmp_path / "wide", layers=1, hidden=128, intermediate=256)
    small = {"data": (str(data / "clips"),), "modalities": ("vision",), "samples": 12, "algorithm": "awq"}
    result = calibrate_checkpoint(options(path, tmp_path / "scales", data, **small))
    assert result.pre_scales == 14
    table = read_scale_table(tmp_path / "scales")
    queries = [f"layers.0.self_attn.add_{name}_proj" for name in "qkv"]
    for name in queries[1:]:
        np.testing.assert_array_equal(table.pre_scales[name], table.pre_scales[queries[0]])
    assert not np.array_equal(
        table.pre_scales["layers.0.mlp.up_proj"], table.pre_scales["layers.0.mlp_moe_gen.up_proj"]
    )
    assert (
        quantize_checkpoint(QuantizeRequest(path, tmp_path / "scales", tmp_path / "int4", format="int4")).quantized
        == 14
    )


# -- bad input --------------------------------------------------------------------------------------------------------


def _job(checkpoint: Path, tmp_path: Path, source: str, **changes: Any) -> CalibrationJob:
    fields = {"data": (source,), "modalities": ("vision",), **changes}
    return resolve_calibration(options(checkpoint, tmp_path / "scales", tmp_path, **fields))


def test_a_policy_that_wants_the_state_is_not_calibrated_without_it(tmp_path: Path, data: Path) -> None:
    path = write_demo_checkpoint(tmp_path / "tiny", layers=1)
    stated = {"policy": {"domain_name": "umi", "use_state": True}}
    (path / "checkpoint.json").write_text(json.dumps(stated))
    small = {"modalities": ("vision", "action"), "samples": 60}
    assert "robot's state" in refused("CX342", lambda: _job(path, tmp_path, str(data / "robot"), **small))
    actions = tmp_path / "actions.json"
    actions.write_text(json.dumps(data_samples.actions(16, 10).tolist()))
    source = f"{actions},video={data_samples.write_clip(tmp_path / 'a.mp4')},fps=24"
    assert "robot's state" in refused("CX605", lambda: _job(path, tmp_path, source, **small), UnsupportedError)
    job = _job(path, tmp_path, f"{data / 'robot'},mode=inverse-dynamics", **small)
    assert {work.request.mode for work in job.works} == {"inverse-dynamics"}
    stated["policy"]["use_state"] = False
    (path / "checkpoint.json").write_text(json.dumps(stated))
    assert "policy" in {work.request.mode for work in _job(path, tmp_path, str(data / "robot"), **small).works}


@pytest.mark.parametrize("width", [5, 7, 9, 11, 64])
def test_actions_of_another_width(checkpoint: Path, tmp_path: Path, data: Path, width: int) -> None:
    """In JSON too, as `run` refuses them."""
    path = tmp_path / "actions.json"
    path.write_text(json.dumps(data_samples.actions(8, width).tolist()))
    source = f"{path},video={data / 'clips' / 'a.mp4'},embodiment=umi,fps=24"
    assert f"has {width} columns; actions of `umi` have 10" in refused(
        "CX611", lambda: _job(checkpoint, tmp_path, source, modalities=("vision", "action"))
    )


def test_empty_and_unreadable_media(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.mp4").touch()
    refused("CX614", lambda: _job(checkpoint, tmp_path, str(tmp_path / "empty.mp4")))
    (tmp_path / "text.png").write_text("no picture")
    refused("CX614", lambda: _job(checkpoint, tmp_path, str(tmp_path / "text.png")))
    clip = data_samples.write_clip(tmp_path / "short.mp4", frames=3)
    assert "1 frames" in refused("CX344", lambda: _job(checkpoint, tmp_path, str(clip)))


def test_a_video_of_the_wrong_rate(checkpoint: Path, tmp_path: Path) -> None:
    clip = data_samples.write_clip(tmp_path / "clip.mp4", fps=30)
    message = refused("CX343", lambda: _job(checkpoint, tmp_path, f"{clip},fps=24"))
    assert "30" in message and "24" in message
    assert _job(checkpoint, tmp_path, str(clip)).works[0].request.fps == 30
    robot = data_samples.write_lerobot(tmp_path / "robot", fps=15)
    data_samples.write_clip(robot / f"videos/{data_samples.CAMERA}/chunk-000/file-000.mp4", frames=40, fps=30)
    refused("CX343", lambda: _job(checkpoint, tmp_path, str(robot), modalities=("vision", "action")))


def test_a_prompt_longer_than_the_profile(checkpoint: Path, tmp_path: Path) -> None:
    data_samples.write_clip(tmp_path / "clips" / "a.mp4")
    (tmp_path / "clips" / "a.txt").write_text("word " * 2000)
    message = refused("CX607", lambda: _job(checkpoint, tmp_path, str(tmp_path / "clips")))
    assert "a.mp4" in message and "4096 prompt tokens" in message


def test_latents_of_another_model_and_nan(checkpoint: Path, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    for name, value in (("vision", (1, 5, 3, 12, 20)), ("vision", (4, 3, 12, 20)), ("other", (1,))):
        save_file({name: np.zeros(value, np.float32)}, path)
        refused("CX344", lambda: _job(checkpoint, tmp_path, str(path)))
    save_file({"vision": np.full((1, 4, 3, 12, 20), np.nan, np.float32)}, path)
    assert "NaN" in refused("CX344", lambda: _job(checkpoint, tmp_path, str(path)))
    path.write_bytes(b"no header")
    refused("CX344", lambda: _job(checkpoint, tmp_path, str(path)))


@pytest.mark.parametrize(
    ("value", "code", "error", "said"),
    [
        (np.nan, "CX133", UserError, "layers.0.mlp_moe_gen.up_proj.weight (1 of "),
        (3e38, "CX321", FindingError, "layers.0.mlp_moe_gen.down_proj"),
    ],
    ids=["NaN", "too large"],
)
def test_values_that_are_no_numbers_are_named(
    tmp_path: Path, data: Path, value: float, code: str, error: type[CosmosExportError], said: str
) -> None:
    """NaN in a weight before any work; what a product of finite weights makes where it is made."""
    path = write_demo_checkpoint(tmp_path / "damaged", layers=2)
    entry = open_checkpoint(path).tensors["layers.0.mlp_moe_gen.up_proj.weight"]
    with entry.file.open("r+b") as file:
        file.seek(entry.offset)
        file.write(np.full(1 if np.isnan(value) else entry.elements, value, np.float32).tobytes())
    small = {"data": (str(data / "clips"),), "modalities": ("vision",), "samples": 12}
    message = refused(code, lambda: calibrate_checkpoint(options(path, tmp_path / "scales", data, **small)), error)
    assert said in message
    assert not (tmp_path / "scales").exists()


def test_options_are_checked(checkpoint: Path, tmp_path: Path, data: Path) -> None:
    def run(**changes: Any) -> Callable[[], object]:
        return lambda: calibrate_checkpoint(options(checkpoint, tmp_path / "scales", data, **changes))

    refused("CX320", run(margin=0.5))
    refused("CX320", run(observer="mean"))
    refused("CX320", run(percentile=10.0))
    refused("CX322", run(samples=0))
    refused("CX340", run(data=()))
    refused("CX210", run(modalities=("smell",)))
    (tmp_path / "scales").mkdir()
    refused("CX313", run())


def test_the_verb(checkpoint: Path, tmp_path: Path, data: Path) -> None:
    scales = str(tmp_path / "scales")
    arguments = ["calibrate", str(checkpoint), "--data", f"{data / 'clips'},origin=real", "-o", scales,
                 "--modalities", "vision", "--samples", "12", "--frames", "9", "--steps", "6"]  # fmt: skip
    result = CliRunner().invoke(app, [*arguments, "--json"])
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    assert document["ranges"] == 2 * (14 + 6) and document["lineage"]["observer"]["margin"] == 1.1
    plain = CliRunner().invoke(app, [*arguments, "--force", "--no-progress"])
    assert plain.exit_code == 0 and "0-25 %" in plain.stdout and "clips" in plain.stdout
