"""`run` on bundles that builds made: files, refusals, and a machine without torch."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import wave
from pathlib import Path
from typing import Any

import av
import build_harness as harness
import numpy as np
import pytest
from subjects import Subjects

from cosmos_export.checkpoint.safetensors_header import read_header
from cosmos_export.diagnostics import CosmosExportError, FindingError
from cosmos_export.options import GenerateOptions
from cosmos_export.runtime import Generator, LoadedBundle, load_bundle, media
from cosmos_export.sampling import Overrides

pytestmark = pytest.mark.xdist_group("run-parity")

SIZE = {"frames": 5, "height": 48, "width": 80}
FLAGS = ("--frames", 5, "--height", 48, "--width", 80, "--steps", 3, "--guidance", 2, "--seed", 5)
PROMPT = "A robot pours water."


def asked(**options: Any) -> GenerateOptions:
    return GenerateOptions(PROMPT, **{**SIZE, "seed": 5, "sampling": Overrides(steps=3, guidance=2.0), **options})


def latents(path: Path) -> dict[str, np.ndarray]:
    return {name: entry.array() for name, entry in read_header(path).tensors.items()}


def test_files_hold_what_was_generated(subjects: Subjects, tmp_path: Path) -> None:
    subject = subjects("omni")
    names = {kind: tmp_path / f"out.{kind}" for kind in ("mp4", "wav", "safetensors", "npy")}
    done = harness.cosmos_export(
        "run", subject.bundle, "-p", PROMPT, *FLAGS, "--sound", "-o", names["mp4"], "-o", names["wav"],
        "--save-latents", names["safetensors"], "--save-frames", names["npy"], "--json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert {"prepare", "verify", "reasoner", "conditioning", "denoise", "decode video", "total"} <= set(
        document["timings_s"]
    )
    result = subject.generator.generate(subject.prepare(asked(sound=True)).request)
    found = latents(names["safetensors"])
    assert set(found) == {"vision", "sound"}
    for name, value in found.items():
        np.testing.assert_allclose(value, result.latents[name], rtol=0, atol=1e-5)
    frames = np.concatenate([media.as_unit(chunk) for chunk in result.video()])
    np.testing.assert_allclose(np.load(names["npy"]), frames, rtol=0, atol=1e-4)
    with av.open(str(names["mp4"])) as container:
        assert container.streams.video[0].frames == 5
        assert document["bundle_id"] in container.metadata["comment"]
    with wave.open(str(names["wav"])) as sound:
        assert sound.getnframes() == result.sound().shape[1]


def test_noise_from_a_file(subjects: Subjects, tmp_path: Path) -> None:
    """What was sampled from a seed's noise is sampled again when the noise is given."""
    from cosmos_export.runtime.step_inputs import Noise, sizes

    subject = subjects("omni")
    prepared = subject.prepare(asked())
    noise = Noise(prepared.request, sizes(prepared.request, subject.manifest.request)).initial["vision"]
    media.write_safetensors(tmp_path / "noise.safetensors", {"vision": noise}, media.Mark("0" * 64))
    given = subject.prepare(asked(noise=tmp_path / "noise.safetensors", seed=99)).request
    found, expected = (subject.generator.generate(r).latents["vision"] for r in (given, prepared.request))
    np.testing.assert_array_equal(found, expected)


# ---------------------------------------------------------------------------------------------------------------------
# Without torch


def test_a_machine_without_torch(subjects: Subjects, tmp_path: Path) -> None:
    """A wheel and the extra `run` in an environment of their own; the bundle comes from elsewhere."""
    environment = tmp_path / "environment"
    subprocess.run([sys.executable, "-m", "venv", environment], check=True)
    python = environment / "bin/python"
    quiet = ("--quiet", "--disable-pip-version-check")
    wheel = ("wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", tmp_path / "wheel", harness.ROOT)
    subprocess.run([sys.executable, "-m", "pip", *wheel, *quiet], check=True, capture_output=True)
    (built,) = (tmp_path / "wheel").glob("*.whl")
    constraints = harness.ROOT / "constraints.txt"
    installed = subprocess.run(
        [python, "-m", "pip", "install", *quiet, f"{built}[run]", "-c", constraints], capture_output=True, text=True
    )
    if installed.returncode and not os.environ.get("CI"):
        pytest.skip(f"no package index: {installed.stderr.strip().splitlines()[-1]}")
    assert installed.returncode == 0, installed.stderr
    missing = [m for m in ("torch", "diffusers", "transformers", "onnx") if _has(python, m)]
    assert missing == [], "the extra `run` brings what only a build needs"
    subject = subjects("omni")
    moved = tmp_path / "a bundle"
    shutil.copytree(subject.bundle, moved)
    out, kept = tmp_path / "out.mp4", tmp_path / "out.safetensors"
    done = subprocess.run(
        [environment / "bin/cosmos-export", "run", moved, "-p", PROMPT, *map(str, FLAGS), "-o", out,
         "--save-latents", kept],
        capture_output=True, text=True, cwd=tmp_path, env={"PATH": os.environ["PATH"], "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    expected = subject.generator.generate(subject.prepare(asked()).request).latents["vision"]
    np.testing.assert_allclose(latents(kept)["vision"], expected, rtol=0, atol=1e-5)
    assert out.stat().st_size > 0


def _has(python: Path, module: str) -> bool:
    found = f"import importlib.util as u, sys; sys.exit(u.find_spec('{module}') is None)"
    return subprocess.run([python, "-c", found]).returncode == 0


# ---------------------------------------------------------------------------------------------------------------------
# Refusals


def refused(bundle: Path, code: str, *arguments: object) -> str:
    """`run` ends with ``code`` and leaves nothing."""
    folder = bundle.parent / "outputs"
    folder.mkdir(exist_ok=True)
    done = harness.cosmos_export("run", bundle, "-p", PROMPT, *FLAGS, "-o", folder / "x.mp4", *arguments)
    assert f"error[{code}]" in done.stderr, done.stderr
    assert "Traceback" not in done.stderr
    assert list(folder.iterdir()) == []
    assert done.returncode == {"CX711": 1, "CX503": 3, "CX605": 3}.get(code, 2)
    return done.stderr


@pytest.mark.parametrize("file", ["onnx/generator.weights", "onnx/reasoner.onnx", "tables/schedule.safetensors"])
def test_a_tampered_bundle(subjects: Subjects, tmp_path: Path, file: str) -> None:
    bundle = tmp_path / "bundle"
    shutil.copytree(subjects("omni").bundle, bundle)
    data = bytearray((bundle / file).read_bytes())
    data[len(data) // 2] ^= 1
    (bundle / file).write_bytes(data)
    assert file in refused(bundle, "CX711")


def test_what_the_checkpoint_lacks(subjects: Subjects) -> None:
    assert "its model generates no sound" in refused(subjects("edge").bundle, "CX605", "--sound")
    distilled = subjects("omni-distilled", loop="host", mode="t2v", modalities=("vision",)).bundle
    done = harness.cosmos_export("run", distilled, "-p", PROMPT, "--guidance", 3, "-o", distilled.parent / "x.mp4")
    assert done.returncode == 2
    assert "error[CX46" in done.stderr and "guidance" in done.stderr


def test_backends_and_devices(subjects: Subjects) -> None:
    bundle = subjects("omni").bundle
    assert "known: inductor, onnxruntime, tensorrt" in refused(bundle, "CX504", "--backend", "tensorflow")
    assert "runs on cpu, cuda or cuda:N" in refused(bundle, "CX504", "--device", "tpu")
    import onnxruntime

    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        assert ".[gpu]" in refused(bundle, "CX503", "--device", "cuda:0")
    with pytest.raises(CosmosExportError, match="this bundle has no engines") as caught:
        load_bundle(bundle, backend="tensorrt-rtx")
    assert caught.value.code == "CX505"


class Poisoned:
    """A backend whose ``graph`` returns NaN in its ``call``-th run."""

    def __init__(self, loaded: LoadedBundle, graph: str, call: int) -> None:
        self._inner, self._graph, self._call, self._calls = loaded.executor, graph, call, 0
        self.name, self.device = loaded.executor.name, loaded.executor.device

    def open(self, graph: str) -> Any:
        session = self._inner.open(graph)
        if graph == self._graph:
            run = session.run

            def poisoned(feeds: Any) -> Any:
                self._calls += 1
                results = run(feeds)
                if self._calls == self._call:
                    name = session.outputs[0]
                    array = results[name].numpy().copy()
                    array.flat[0] = np.nan
                    results[name] = type("Value", (), {"shape": array.shape, "numpy": lambda _: array})()
                return results

            session.run = poisoned
        return session

    def close(self) -> None: ...


@pytest.mark.parametrize(
    ("loop", "graph", "call", "message"),
    [
        ("host", "generator", 4, "in the vision velocity of graph `generator` in step 2 of 3 (timestep "),
        ("device", "denoise", 1, "in the vision latents of graph `denoise` after steps 1 to 3 of 3"),
    ],
)
def test_nan_is_stopped_where_it_appears(subjects: Subjects, loop: str, graph: str, call: int, message: str) -> None:
    options: dict[str, Any] = {} if loop == "host" else {
        "loop": "device", "components": ("tokenizer",), "steps": 3, "guidance": 2.0,
    }  # fmt: skip
    subject = subjects("omni", **options)
    loaded = subject.generator.bundle
    poisoned: Any = Poisoned(loaded, graph, call)
    generator = Generator(LoadedBundle(loaded.files, poisoned))
    with pytest.raises(FindingError, match="NaN") as caught:
        generator.generate(subject.prepare(asked()).request)
    assert caught.value.code == "CX665"
    assert message in caught.value.message
