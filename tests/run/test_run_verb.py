"""`run` on the command line: files, marks, timings, exit codes. The generator is a stand-in; the files are not."""

from __future__ import annotations

import hashlib
import json
import sys
import wave
from dataclasses import replace
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import run_samples
from PIL import Image
from run_samples import MARK, ROBOT, SMALL, manifest
from safetensors import safe_open

import cosmos_export.runtime
from cosmos_export import cli
from cosmos_export.bundle import BundleFiles, DimRecord, Manifest, Verdict
from cosmos_export.runtime import media
from cosmos_export.runtime.request import Request


class Generated:
    """Results of the right shapes: every value follows from the request."""

    def __init__(self, request: Request, broken: bool, chunked: bool) -> None:
        self.request, self.chunked = request, chunked
        self.timings = {"denoise": 1.5}
        shape = (1, 4, (request.frames - 1) // 4 + 1, request.height, request.width)
        self.latents = {"vision": np.random.default_rng(request.seed).standard_normal(shape).astype(np.float32)}
        if broken:
            self.latents["vision"][0, 0, 0, 0, 0] = np.nan

    def video(self) -> Any:
        shape = (1, 3, self.request.frames, 16 * self.request.height, 16 * self.request.width)
        pixels = np.linspace(-1.1, 1.1, int(np.prod(shape))).reshape(shape).astype(np.float32)
        yield media.as_bytes(pixels[:, :, :1]) if self.chunked else pixels[:, :, :1]
        for first in range(1, self.request.frames, 4):
            yield pixels[:, :, first : first + 4]

    def sound(self) -> Any:
        samples = round(self.request.frames / self.request.fps * 48_000)
        return np.stack([np.sin(np.arange(samples) / 20), np.zeros(samples)]).astype(np.float32)

    def actions(self) -> Any:
        assert self.request.action is not None
        return np.linspace(-1, 1, 16 * self.request.action.raw_dim).reshape(16, -1).astype(np.float32)


class Run:
    """The command in this process, with a bundle of one's own."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self.root, self.monkeypatch, self.capsys = run_samples.tokenizer(root), monkeypatch, capsys
        self.loaded: list[Any] = []
        self.broken = self.chunked = False
        self.bundle(manifest())
        outer = self

        class Generator:
            def __init__(self, loaded: Any, *, resident: bool) -> None:
                outer.loaded.append(loaded)

            def generate(self, request: Request, progress: Any) -> Generated:
                return Generated(request, outer.broken, outer.chunked)

        def load_bundle(files: BundleFiles, *, backend: str | None, device: str | None, progress: Any) -> Any:
            return files.path, backend, device

        monkeypatch.setattr(cosmos_export.runtime, "Generator", Generator, raising=False)
        monkeypatch.setattr(cosmos_export.runtime, "load_bundle", load_bundle, raising=False)

    def bundle(self, found: Manifest) -> None:
        (self.root / "manifest.json").write_bytes(found.to_bytes())

    def __call__(self, *arguments: str | Path, prompt: str = "A cube.") -> tuple[int, str, str]:
        command = ["cosmos-export", "run", str(self.root), "--prompt", prompt, *map(str, arguments)]
        self.monkeypatch.setattr(sys, "argv", command)
        with pytest.raises(SystemExit) as ending:
            cli.main()
        captured = self.capsys.readouterr()
        return int(ending.value.code or 0), captured.out, captured.err


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    (tmp_path / "bundle").mkdir()
    return Run(tmp_path / "bundle", monkeypatch, capsys)


def bundle_id(run: Run) -> str:
    return "sha256:" + hashlib.sha256((run.root / "manifest.json").read_bytes()).hexdigest()


def test_a_prompt_into_a_video(run: Run, tmp_path: Path) -> None:
    code, out, err = run("-o", tmp_path / "out.mp4")
    assert code == 0, err
    with av.open(str(tmp_path / "out.mp4")) as container:
        assert (container.streams.video[0].frames, container.streams.video[0].average_rate) == (9, 24)
        assert bundle_id(run) in container.metadata["comment"]
        assert "AI-generated" in container.metadata["comment"]
        assert not container.streams.audio
    lines = out.splitlines()
    assert lines[0].split() == ["stage", "time"]
    assert {"denoise", "decode", "write", "total"} <= {line.split()[0] for line in lines[2:-1]}
    assert lines[-1] == str(tmp_path / "out.mp4")
    assert "t2v: 9 frames at 24 a second of 80 × 48 pixels; 35 steps (karras), guidance 6 in 35;" in err
    assert run.loaded == [(run.root, None, None)]


def test_what_the_build_left_open_is_said(run: Run, tmp_path: Path) -> None:
    found = manifest()
    failed = Verdict("G2", "steps", "relative L2", 0.03, "fail", "the median step is 11.9% off\x1b[2J")
    missed = [Verdict("engine", name, "relative L2", None, "not-measured", "needs a GPU") for name in ("a", "b")]
    run.bundle(replace(found, evaluation=(failed, *missed)))
    code, out, err = run("-o", tmp_path / "x.mp4", "--json", "--quiet")
    assert code == 0
    (line,) = [line for line in err.splitlines() if "G2" in line]
    assert "this bundle failed checks of its build: " in line and "G2 of steps (the median step is 11.9% off" in line
    assert "not measured: engine of a, engine of b (needs a GPU)" in line and "\x1b" not in err
    verdicts = json.loads(out)["verdicts"]
    assert len(verdicts["failed"]) == len(verdicts["not_measured"]) == 1
    run.bundle(replace(found, evaluation=(), plan_checks=()))
    _, out, err = run("-o", tmp_path / "y.mp4", "--json")
    assert json.loads(out)["verdicts"] == {"failed": [], "not_measured": []} and "measured" not in err


def test_an_image(run: Run, tmp_path: Path) -> None:
    code, _, err = run("--mode", "t2i", "-o", tmp_path / "out.png", "--backend", "onnxruntime", "--device", "cpu")
    assert code == 0, err
    with Image.open(tmp_path / "out.png") as image:
        assert image.size == (80, 48)
        assert image.text["bundle"] == bundle_id(run)
    assert run.loaded == [(run.root, "onnxruntime", "cpu")]


def test_sound_in_the_video_and_beside_it(run: Run, tmp_path: Path) -> None:
    code, _, err = run("--sound", "-o", tmp_path / "out.mp4", "-o", tmp_path / "out.wav")
    assert code == 0, err
    with av.open(str(tmp_path / "out.mp4")) as container:
        assert container.streams.audio[0].codec.name == "aac"
    with wave.open(str(tmp_path / "out.wav")) as sound:
        assert (sound.getnframes(), sound.getframerate(), sound.getnchannels()) == (18_000, 48_000, 2)


@pytest.mark.parametrize("chunked", [False, True])
def test_latents_and_frames(run: Run, tmp_path: Path, chunked: bool) -> None:
    run.chunked = chunked
    code, _, err = run("--seed", "3", "--save-latents", tmp_path / "l.safetensors", "--save-frames", tmp_path / "f.npy")
    assert code == 0, err
    with safe_open(tmp_path / "l.safetensors", "numpy") as read:
        expected = np.random.default_rng(3).standard_normal((1, 4, 3, 3, 5)).astype(np.float32)
        np.testing.assert_array_equal(read.get_tensor("vision"), expected)
        assert read.metadata() | {"bundle": bundle_id(run), "seed": "3", "mode": "t2v"} == read.metadata()
    frames = np.load(tmp_path / "f.npy")
    assert (frames.shape, frames.dtype) == ((9, 48, 80, 3), np.float32)
    assert (frames.min(), frames.max()) == (0, 1)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bundle", "f.npy", "l.safetensors"]


def test_actions(run: Run, tmp_path: Path) -> None:
    run.bundle(manifest({"robot": ROBOT}))
    media.write_png(tmp_path / "robot.png", run_samples.picture(192, 320)[0], MARK)
    low, high = [-2.0] * 10, [4.0] * 10
    (tmp_path / "stats.json").write_text(json.dumps({"min": low, "max": high}))
    common = ("--image", tmp_path / "robot.png", "--embodiment", "umi", "--tier", "256")
    code, _, err = run(*common, "-o", tmp_path / "a.json", "-o", tmp_path / "a.safetensors")
    assert code == 0, err
    model = np.linspace(-1, 1, 160).reshape(16, 10)
    document = json.loads((tmp_path / "a.json").read_text())
    np.testing.assert_allclose(document["actions"], model, atol=1e-6)
    assert document | {"units": "model", "embodiment": "umi", "domain": 6, "ai_generated": True} == document
    assert document["bundle"] == bundle_id(run)
    with safe_open(tmp_path / "a.safetensors", "numpy") as read:
        np.testing.assert_allclose(read.get_tensor("actions"), model, atol=1e-6)
        assert (read.metadata()["units"], read.metadata()["ai_generated"]) == ("model", "true")
    assert run(*common, "--action-stats", tmp_path / "stats.json", "-o", tmp_path / "b.json")[0] == 0
    document = json.loads((tmp_path / "b.json").read_text())
    np.testing.assert_allclose(document["actions"], 3 * model + 1, atol=1e-5)
    assert (document["units"], document["normalization"]) == ("raw", "minmax")
    # What comes out goes in again.
    code, _, err = run(*common, "--actions", tmp_path / "b.json", "--action-stats", tmp_path / "stats.json",
                       "-o", tmp_path / "fd.mp4")  # fmt: skip
    assert code == 0, err
    # But not in other units than it was made in, nor for another robot.
    stats, other = ("--action-stats", tmp_path / "stats.json"), (*common[:3], "droid_lerobot", *common[4:])
    wrong = [(common, "b.json", (), "units of the data"), (common, "a.json", stats, "normalised again"),
             (common, "a.safetensors", stats, "normalised again"), (other, "a.json", (), "of `umi`")]  # fmt: skip
    for asked, file, options, said in wrong:
        code, _, err = run(*asked, "--actions", tmp_path / file, *options, "-o", tmp_path / "no.mp4")
        assert code == 2 and "CX611" in err and said in " ".join(err.split()), err


def test_limits(run: Run, tmp_path: Path) -> None:
    run.bundle(manifest({"robot": ROBOT}))
    media.write_png(tmp_path / "robot.png", run_samples.picture(192, 320)[0], MARK)
    common = ("--image", tmp_path / "robot.png", "--embodiment", "umi", "--tier", "256", "--json")

    def limits(count: int, bound: float, more: str = "", units: str = "model") -> Path:
        column = f'[[column]]\nname = "c{{}}"\nlow = -{bound}\nhigh = {bound}\n{more}\n'
        path = tmp_path / "limits.toml"
        path.write_text(f'units = "{units}"\n' + "".join(column.format(i) for i in range(count)))
        return path

    code, out, err = run(*common, "--limits", limits(10, 1.5, "max_jump = 1"), "-o", tmp_path / "a.json")
    digest = hashlib.sha256((tmp_path / "limits.toml").read_bytes()).hexdigest()
    assert code == 0 and "could not be looked at: jump: no state" in err
    assert json.loads((tmp_path / "a.json").read_text())["limits"] == digest
    review = json.loads(out)["review"]
    assert (review["verdict"], review["limits"]) == ("pass", digest)
    code, out, err = run(*common, "--limits", limits(10, 0.5, "clip = true"), "-o", tmp_path / "b.json")
    assert code == 0 and json.loads(out)["review"]["verdict"] == "clip" and "clipped: range of c0 in row 0" in err
    actions = np.array(json.loads((tmp_path / "b.json").read_text())["actions"])
    np.testing.assert_allclose(actions, np.clip(np.linspace(-1, 1, 160).reshape(16, 10), -0.5, 0.5), atol=1e-6)
    code, out, _ = run(*common, "--limits", limits(10, 0.5), "-o", tmp_path / "c.json")
    assert (code, json.loads(out)["error"]["code"]) == (1, "CX631") and not (tmp_path / "c.json").exists()
    loaded = len(run.loaded)
    for count, units in ((9, "model"), (10, "raw")):
        path = limits(count, 1, units=units)
        assert json.loads(run(*common, "--limits", path, "-o", tmp_path / "d.json")[1])["error"]["code"] == "CX632"
    assert len(run.loaded) == loaded
    code, _, _ = run(*common, "-o", tmp_path / "e.json")
    assert code == 0 and json.loads((tmp_path / "e.json").read_text())["limits"] == "none"
    run.bundle(manifest())
    code, out, _ = run("--json", "--limits", path, "-o", tmp_path / "f.mp4")
    assert (code, json.loads(out)["error"]["code"]) == (2, "CX604")


def test_json(run: Run, tmp_path: Path) -> None:
    code, out, _ = run("--json", "-o", tmp_path / "out.mp4", "--frames", "5", "--steps", "4")
    assert code == 0
    document = json.loads(out)
    assert document["bundle_id"] == bundle_id(run)
    assert (document["mode"], document["frames"], document["steps"], document["seed"]) == ("t2v", 5, 4, 0)
    assert document["outputs"] == [
        {"path": str(tmp_path / "out.mp4"), "size_bytes": (tmp_path / "out.mp4").stat().st_size}
    ]
    assert document["timings_s"]["total"] > 0


def test_refused_before_anything_is_loaded(run: Run, tmp_path: Path) -> None:
    code, out, err = run("--frames", "24", "-o", tmp_path / "out.mp4", "--json")
    assert code == 2
    assert json.loads(out)["error"]["code"] == "CX609"
    assert err.startswith("error[CX609]: 24 frames are not 4·n + 1")
    assert not run.loaded
    run.bundle(manifest(modalities=("vision", "action"), has_sound=False))
    code, _, err = run("--sound", "-o", tmp_path / "out.mp4")
    assert (code, run.loaded) == (3, [])
    assert "generates no sound" in err
    assert run("--guidance-interval", "x", "-o", tmp_path / "out.mp4")[2].startswith("error[CX463]")


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        ([], "no output"),
        (["-o", "out.avi"], "unknown kind"),
        (["-o", "out.png"], "makes video, no image"),
        (["-o", "out.wav"], "add --sound"),
        (["-o", "out.json"], "no actions"),
        (["-o", "a.mp4", "-o", "b.mp4"], "written once"),
        (["-o", "a.mp4", "-o", "./a.mp4"], "written once"),
        (["--save-latents", "a.safetensors", "--save-frames", "a.safetensors"], "ends in .npy"),
        (["--save-latents", "a.bin"], "ends in .safetensors"),
        (["-o", "there/out.mp4"], "no directory"),
        (["-o", f"{'x' * 236}.mp4"], "too long"),
        (["-o", f"{'x' * 300}.mp4"], "too long"),
        (["-o", f"{'é' * 120}.mp4"], "too long"),
        (["-o", "circle/out.mp4"], "cannot be written: Too many levels"),
        (["-o", "circle"], "unknown kind"),
        (["-o", "circle.mp4"], "cannot be written: Too many levels"),
        (["-o", "old.mp4"], "exists"),
    ],
)
def test_outputs(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], what: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "old.mp4").write_bytes(b"old")
    for name in ("circle", "circle.mp4"):
        (tmp_path / name).symlink_to(tmp_path / name)
    code, _, err = run(*arguments)
    assert code == 2
    assert err.startswith("error[CX662]")
    assert what in err
    assert not run.loaded
    assert (tmp_path / "old.mp4").read_bytes() == b"old"


def test_force(run: Run, tmp_path: Path) -> None:
    (tmp_path / "out.mp4").write_bytes(b"old")
    assert run("-o", tmp_path / "out.mp4", "--force")[0] == 0
    assert (tmp_path / "out.mp4").stat().st_size > 100


def test_without_decoders(run: Run, tmp_path: Path) -> None:
    run.bundle(manifest(components=()))
    code, _, err = run("-o", tmp_path / "out.mp4")
    assert (code, "no decoder for pictures" in err) == (3, True)
    assert run("--save-latents", tmp_path / "l.safetensors")[0] == 0
    run.bundle(manifest(components=("vae_decoder",)))
    assert "no decoder for sound" in run("--sound", "-o", tmp_path / "out.mp4")[2]


def test_results_that_are_not_finite(run: Run, tmp_path: Path) -> None:
    run.broken = True
    code, _, err = run("-o", tmp_path / "out.mp4")
    assert code == 1
    assert err.splitlines()[-3].startswith("error[CX663]: the vision latents hold NaN")
    assert not (tmp_path / "out.mp4").exists()


@pytest.mark.parametrize("reach", [1.0, 1e10])
def test_actions_that_are_not_finite_in_the_units_of_the_data(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reach: float
) -> None:
    """Finite for the model, but not for the robot: no file of any kind is written."""
    run.bundle(manifest({"robot": ROBOT}, modalities=("vision", "action")))
    media.write_png(tmp_path / "robot.png", run_samples.picture(192, 320)[0], MARK)
    (tmp_path / "stats.json").write_text(json.dumps({"q01": [-1e30] * 10, "q99": [1e30] * 10}))
    made = Generated.actions
    monkeypatch.setattr(Generated, "actions", lambda self: made(self) * np.float32(reach))
    options = ["--image", tmp_path / "robot.png", "--embodiment", "umi", "--tier", "256"]
    outputs = [tmp_path / name for name in ("a.json", "a.safetensors", "a.mp4", "latents.safetensors")]
    named = [word for path in outputs[:3] for word in ("-o", path)]
    code, _, err = run(*options, "--action-stats", tmp_path / "stats.json", *named, "--save-latents", outputs[3])
    assert (code, [path.exists() for path in outputs]) == ((0, [True] * 4) if reach == 1 else (1, [False] * 4)), err
    assert ("error[CX663]: row 0, column 0 of the actions is -1e+10" in err) == (reach > 1)


def test_a_bundle_of_images(run: Run, tmp_path: Path) -> None:
    run.bundle(manifest({"image": SMALL | {"frames": DimRecord(1, 1, 1)}}))
    assert run("-o", tmp_path / "out.png")[0] == 0
