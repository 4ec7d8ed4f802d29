"""The files that cases begin with: what the product itself writes, tiny, one folder for each kind of reader."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

TESTS = Path(__file__).resolve().parents[1]
ROOT = TESTS.parent
sys.path[:0] = [str(TESTS / name) for name in ("compiler", "bundle", "calibration", "checkpoint", "serve")]

SIZES = "und_len=1:64:512,frames=1:2:3,height=3:3:4,width=3:5:6,sound_len=0,action_len=0"
ROBOT = "und_len=1:132:512,frames=5:5:9,height=3:12:40,width=3:20:52,sound_len=0,action_len=16:16:32"


def checkpoint(folder: Path) -> None:
    """One as it is published, and a sharded one."""
    from cosmos_export.checkpoint.demo import write_demo_checkpoint

    write_demo_checkpoint(folder / "checkpoint", layers=1, dtype="bfloat16")


def captured(folder: Path) -> None:
    """A checkpoint, and its captured step as the cache keeps it."""
    from cosmos_export.capture.document import program_document
    from cosmos_export.capture.sources import weight_sources
    from cosmos_export.checkpoint import open_checkpoint
    from cosmos_export.compiler.captures import capture

    checkpoint(folder)
    found = open_checkpoint(folder / "checkpoint")
    program = capture(found.geometry.config, weight_sources(found.tensors), modalities=("vision",))
    (folder / "step.json").write_bytes(program_document(program))


def shards(folder: Path) -> None:
    from cosmos_export.checkpoint.demo import write_demo_checkpoint

    write_demo_checkpoint(folder / "checkpoint", layers=1, dtype="bfloat16", shard_size=100_000)


def quantized(folder: Path) -> None:
    """The published FP8 layout, its data a hole."""
    import fake_checkpoint as fake

    specs, config = fake.quantized_specs(fake.TINY), {"quantization_config": fake.QUANTIZATION}
    fake.write_checkpoint(folder / "checkpoint", specs=specs, config=config)


def graphs_bundle(folder: Path) -> None:
    """A bundle with graphs for PyTorch, tables and models for a CPU, its loop closed."""
    _build(folder, "x.bundle", "--target", "h100", "--loop", "device", "--steps", "2", "--modalities", "vision",
           "--components", "tokenizer", "--profile", SIZES)  # fmt: skip


def full_bundle(folder: Path) -> None:
    """A bundle of every component and two profiles, one for a robot."""
    _build(folder, "x.bundle", "--target", "cpu", "--profile", SIZES, "--profile", ROBOT)


def waiting_bundle(folder: Path) -> None:
    """A bundle that waits for an engine with a kernel of its own."""
    import bundle_samples

    from cosmos_export.kernels.description import DOCUMENT, Output, PluginRecord, document_text

    size = ("product", ("size", 0, 0), 4)
    record = PluginRecord("norm", "k", ("bf16",), (Output("bf16", (size,)),), (), (("cdiv", size, 2), 1, 1), 32, 0)
    asked = {"engines": [bundle_samples.REQUEST | {"plugins": 1}]}
    plugins = {DOCUMENT: document_text([record]).encode(), "norm.ptx": b"// ptx"}
    bundle_samples.waiting(folder / "x.bundle", asked, plugins)


def requests(folder: Path) -> None:
    """The same bundle, and all that a request can bring."""
    once(folder.parent / "full_bundle", full_bundle)
    shutil.copytree(folder.parent / "full_bundle" / "x.bundle", folder / "x.bundle")
    prompts(folder)
    actions(folder)
    media(folder)


def _build(folder: Path, name: str, *options: str) -> None:
    import build_harness

    source = folder.parent / "checkpoint"
    once(source, checkpoint)
    arguments = ("build", source / "checkpoint", "-o", folder / name, "--parity", "never", "--no-cache", *options)
    done = build_harness.cosmos_export(*arguments)
    if done.returncode:
        raise RuntimeError(done.stderr)
    (folder / f"{name}.build.json").unlink(missing_ok=True)


def scales(folder: Path) -> None:
    """A scale table with every kind of entry."""
    from cosmos_export.calibration.table import ScaleTable, write_scale_table

    row = np.linspace(0.5, 2.0, 8, dtype=np.float32)
    half = np.ones((2, 8), np.float32)
    amax = {f"layers.0.{name}.input_amax": 1.5 for name in ("self_attn.to_q", "mlp.gate_proj", "mlp.down_proj")}
    amax |= {f"layers.0.attention.generator.{operand}_amax": 8.0 for operand in "qkv"}
    linear = "layers.0.mlp.gate_proj"
    lineage = {"data": [{"name": "prompts.txt", "licence": "Apache-2.0", "origin": "synthetic"}], "samples": 4}
    table = ScaleTable(amax, {linear: row}, "ab" * 32, lineage, {linear: (half, half.T.copy())})
    write_scale_table(table, folder / "scales")


def recipes(folder: Path) -> None:
    for path in sorted((ROOT / "cosmos_export" / "precision" / "recipes").glob("*.toml")):
        shutil.copy(path, folder / path.name)


def measurements(folder: Path) -> None:
    """Two results of `bench`."""
    from cosmos_export.bench.result import Baseline, MeasuredPart, Measurement, write

    for name, seconds in (("a", 0.5), ("b", 0.45)):
        parts = (MeasuredPart("reasoner", (0.01, 0.012)), MeasuredPart("step", (seconds, seconds + 0.1, seconds), 35))
        found = Measurement(
            "geometry:nano",
            "nano",
            "t2v-480p-189f",
            "bf16",
            "inductor",
            "cuda",
            "NVIDIA H100 80GB HBM3",
            parts,
            35,
            70,
            "",
            "the request without codecs",
            baselines=(Baseline("eager", "bf16", parts, 70, "the same"),),
        )
        write(found.document(), folder / f"{name}.json")


def actions(folder: Path) -> None:
    """Actions as `run` writes them, and statistics as the framework does."""
    from cosmos_export.runtime.media import Mark, write_json, write_safetensors

    rows = np.linspace(-1, 1, 160, dtype=np.float32).reshape(16, 10)
    facts: dict[str, Any] = {"mode": "policy", "embodiment": "umi", "domain": 0, "fps": 20.0, "units": "model"}
    write_json(folder / "actions.json", {**facts, "actions": rows.astype(float).tolist()}, Mark("cd" * 32))
    text = {key: str(value) for key, value in facts.items()}
    write_safetensors(folder / "actions.safetensors", {"actions": rows}, Mark("cd" * 32), **text)
    width = 10
    columns = {"q01": -1.0, "q99": 1.0, "min": -2.0, "max": 2.0, "mean": 0.0, "std": 0.5}
    pairs = {name: [value] * width for name, value in columns.items()}
    (folder / "stats.json").write_text(json.dumps({"method": "quantile", "global": pairs}, indent=1))


def prompts(folder: Path) -> None:
    """Captions, and noise of a request of `SIZES`."""
    from cosmos_export.runtime.media import Mark, write_safetensors

    caption = {
        "cinematography": {"framing": "A wide shot."}, "actions": [{"time": "0:00-0:02", "description": "Pour."}],
        "duration": "2s", "fps": 24.0, "resolution": {"H": 48, "W": 80}, "aspect_ratio": "16,9",
    }  # fmt: skip
    (folder / "caption.json").write_text(json.dumps(caption, indent=1))
    (folder / "negative.json").write_text(json.dumps({"description": "blurred"}))
    noise = np.random.default_rng(0).standard_normal((1, 4, 2, 3, 5)).astype(np.float32)
    write_safetensors(folder / "noise.safetensors", {"vision": noise}, Mark("cd" * 32))


def media(folder: Path) -> None:
    """Pictures and clips: by the product's own writers, and by others."""
    import data_samples
    from PIL import Image

    from cosmos_export.runtime.media import Audio, Mark, write_mp4, write_png

    frames = np.random.default_rng(0).integers(0, 255, (9, 48, 80, 3), dtype=np.uint8)
    write_png(folder / "own.png", frames[0], Mark("cd" * 32))
    data_samples.write_picture(folder / "other.png")
    Image.fromarray(frames[1]).save(folder / "other.jpg")
    Image.fromarray(frames[1]).save(folder / "other.webp")
    Image.fromarray(frames[1]).save(folder / "other.bmp")
    sound = Audio(np.sin(np.arange(24_000, dtype=np.float32) / 9)[None].repeat(2, 0), 48_000)
    write_mp4(folder / "own.mp4", [frames], 24.0, Mark("cd" * 32), sound)
    data_samples.write_clip(folder / "other.mp4", frames=9)
    _webm(folder / "other.webm", frames)


def _webm(path: Path, frames: Any) -> None:
    import av

    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream("libvpx-vp9", rate=24)
        stream.height, stream.width, stream.pix_fmt = frames.shape[1], frames.shape[2], "yuv420p"
        for image in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode(None))


def lerobot_2(folder: Path) -> None:
    import data_samples

    data_samples.write_lerobot(folder / "data", "v2.1")


def lerobot_3(folder: Path) -> None:
    import data_samples

    data_samples.write_lerobot(folder / "data", "v3.0")


def sources(folder: Path) -> None:
    """Data of `calibrate` but robots: prompts, objects, captions, pictures with texts beside them, latents."""
    import data_samples

    from cosmos_export.runtime.media import Mark, write_safetensors

    prompts(folder)
    actions(folder)
    (folder / "prompts.txt").write_text("A robot folds a towel.\nA red cube.\n")
    (folder / "pictures").mkdir()
    data_samples.write_picture(folder / "pictures" / "one.png")
    (folder / "pictures" / "one.txt").write_text("A picture.")
    rows: list[dict[str, Any]] = [
        {"prompt": "A cat.", "negative_prompt": "dark", "fps": 24, "num_frames": 9, "name": "one"},
        {"prompt": "A dog.", "image_path": "pictures/one.png", "mode": "i2v"},
        {"prompt": "Fold.", "action_path": "actions.json", "domain_name": "umi", "model_mode": "forward_dynamics"},
    ]
    (folder / "items.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "items.json").write_text(json.dumps(rows[:2], indent=1))
    vision = np.zeros((1, 16, 2, 3, 5), np.float32)
    write_safetensors(folder / "latents.safetensors", {"vision": vision}, Mark("cd" * 32))


def cache(folder: Path) -> None:
    """A cache that knows three engines."""
    from cosmos_export.compiler.cache import Cache, Entry, key_of

    (folder / "bundle").mkdir()
    entries = []
    for number, name in enumerate(("generator", "generator", "reasoner")):
        path = folder / "bundle" / f"{name}-{number}.engine"
        path.write_bytes(b"engine" * 100)
        digest = _sha256(path)
        parts = {"graph": f"{number}" * 64, "weights": "a" * 64, "target": "rtx-pro-6000", "builder": "1.7.1"}
        facts = {"size_bytes": 600, "seconds": 1.5}
        created = f"2026-01-0{number + 1}T00:00:00Z"
        # The place of an engine is absolute; that it is there is not what these cases are about.
        entries.append(Entry(key_of(parts), name, parts, str(path), path.stat().st_size, digest, facts, created))
    Cache(folder / "cache").add(entries)


def state(folder: Path) -> None:
    """What an interrupted build leaves beside its output."""
    import hashlib

    from cosmos_export.bundle import BundleWriter

    try:
        with BundleWriter(folder / "x.bundle") as writer:
            for name in ("onnx/generator.weights", "engines/generator.engine"):
                data = name.encode() * 100
                writer.path(name, "weights").write_bytes(data)
                writer.keep(name, "k" * 64, hashlib.sha256(data).hexdigest(), {"seconds": 1.5})
            raise KeyboardInterrupt
    except KeyboardInterrupt:
        (left,) = folder.glob(".x.bundle.partial-*")
        left.rename(folder / ".x.bundle.partial-1")  # the same name in every run


def limits(folder: Path) -> None:
    """Limits of a robot's actions."""
    columns = "".join(
        f'[[column]]\nname = "joint_{i}"\nlow = -2.7\nhigh = 2.7\nmax_step_per_s = 2.0\nmax_jump = 0.2\nclip = true\n'
        for i in range(7)
    )
    head = 'robot = "Franka"\nunits = "raw"\nmax_age_s = 1.0\n'
    gripper = '[[column]]\nname = "gripper"\nlow = 0.0\nhigh = 1\n'
    box = '[workspace]\ncolumns = ["joint_0", "joint_1"]\nlow = [-1.0, -1.0]\nhigh = [1.0, 1.0]\n'
    (folder / "limits.toml").write_text(head + columns + gripper + box)


def trail(folder: Path) -> None:
    """An audit trail, and the digest of its last line, which is kept elsewhere."""
    from cosmos_export.audit import AuditTrail

    with AuditTrail(folder / "trail.jsonl", clock=lambda: 1.8e9) as found:
        found.record("verified", bundle="0" * 64, failed=["G2 of the transformer"], not_measured=[])
        found.record("loaded", backend="onnxruntime", device="cpu", version="0.1.0")
        for seed in range(4):
            found.record("request", seed=seed, prompt="1" * 64, seconds=0.25, verdict="pass")
        found.record("ended", requests=4)
        (folder / "anchor").write_text(found.head)
    shutil.copy(folder / "trail.jsonl", folder / "kept")


def signed_bundle(folder: Path) -> None:
    """A bundle that is signed, beside the public key."""
    import bundle_samples
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    from cosmos_export.bundle import open_bundle, sign

    key = ec.derive_private_key(7, ec.SECP256R1())
    form = serialization.Encoding.PEM
    secret = key.private_bytes(form, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    public = key.public_key().public_bytes(form, serialization.PublicFormat.SubjectPublicKeyInfo)
    (folder / "private.pem").write_bytes(secret)
    (folder / "public.pem").write_bytes(public)
    bundle_samples.write(folder / "x.bundle")
    sign(open_bundle(folder / "x.bundle"), folder / "private.pem")
    shutil.copy(folder / "x.bundle/manifest.json", folder / "kept")


def messages(folder: Path) -> None:
    """One observation as clients of both protocols send it, and where a robot is."""
    import serve_samples

    from cosmos_export.serve import wire

    (folder / "openpi.msgpack").write_bytes(wire.pack(serve_samples.droid()))
    request = {"endpoint": "get_action", "data": {"observation": serve_samples.groot()}}
    (folder / "gr00t.msgpack").write_bytes(wire.pack_groot(request))
    state = {"joint_position": [0.1, -0.2, 0.3, -1.5, 0.5, 1.25, 0.75], "gripper_position": 0.4}
    (folder / "state.json").write_text(json.dumps(state))


def _sha256(path: Path) -> str:
    import hashlib

    return hashlib.sha256(path.read_bytes()).hexdigest()


def tiny_graphs(folder: Path) -> None:
    """Graphs of a geometry, as `benchmarks/geometry.py` writes them."""
    command = [sys.executable, ROOT / "benchmarks/geometry.py", "--tiny", "--kinds", "vision", "-o", folder / "made"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    subprocess.run(command, check=True, capture_output=True, env=environment)
    (folder / "made" / "nano-vision").rename(folder / "graphs")
    (folder / "made").rmdir()


def once(folder: Path, make: Callable[[Path], None]) -> Path:
    """``folder`` with what ``make`` writes into it; made unless a run before has."""
    done = folder.with_name(f"{folder.name}.done")
    if not done.exists():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        make(folder)
        done.touch()
    return folder
