"""TensorRT-RTX sessions: on a GPU where there is one, and anywhere on a stand-in that runs the models instead.

The stand-in shows that the sessions speak to the device as they should: what lies where, when it is given back, and
that nothing is read before it is written. What an engine computes only a GPU can show.
"""

from __future__ import annotations

import inspect
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import build_harness as harness
import fake_gpu
import numpy as np
import pytest
from fake_gpu import FakeCuda

import cosmos_export.targets.trt.cuda_memory as cuda_memory
import cosmos_export.targets.trt.sessions as rtx_sessions
from cosmos_export.bundle import BundleFiles, Manifest, read_bundle
from cosmos_export.compiler.driver import build
from cosmos_export.diagnostics import CosmosExportError
from cosmos_export.plan.sizes import BUILDER_BYTES, compiler_bytes
from cosmos_export.runtime import Generator, LoadedBundle, load_bundle
from cosmos_export.runtime.loading import chained
from cosmos_export.runtime.request import Request
from cosmos_export.sampling import Schedule
from cosmos_export.targets.backends import backends
from cosmos_export.targets.trt.sessions import TrtExecutor

pytestmark = pytest.mark.xdist_group("run-rtx")

PROFILES = ("--profile", "und_len=1:16:32,frames=1:1:1,height=3:4:4,width=3:4:6,sound_len=0,action_len=0",
            "--profile", "und_len=1:64:128,frames=2:3:3,height=3:4:5,width=3:4:6,sound_len=0,action_len=0")  # fmt: skip


@pytest.fixture(scope="module")
def built(shared: Path) -> Path:
    checkpoint = harness.checkpoint(shared, "omni", "float32")
    arguments = ("--target", "rtx-pro-6000", "--parity", "never", "--modalities", "vision", "--components",
                 "vae-decoder", "--loop", "device", "--steps", "3", "--guidance", "2", *PROFILES)  # fmt: skip
    return harness.command_line_build(shared, "rtx.run", checkpoint, *arguments).path


@pytest.fixture(scope="module")
def manifest(built: Path) -> Manifest:
    return read_bundle(built)


def request(manifest: Manifest, ids: int = 20, frames: int = 9, seed: int = 0) -> Request:
    values = {name: manifest.options[f"schedule.{name}"] for name in Schedule.__dataclass_fields__}
    tokens = np.arange(ids, dtype=np.int64)
    return Request("t2v", tokens, tokens[:5], Schedule(**values), frames, 4, 5, 24.0, seed=seed)  # type: ignore[arg-type]


class Gpu:
    """A generator on the stand-in, and what happened there."""

    def __init__(self, root: Path, manifest: Manifest, **options: Any) -> None:
        files = BundleFiles(root, manifest)
        self.cuda = FakeCuda(**options)
        self.trt, self.engines = fake_gpu.fake_trt(self.cuda, root.resolve(), manifest)
        device = cuda_memory.connect(self.cuda, 0, manifest.target.compute_capability)
        self.backend = TrtExecutor(self.trt, device, files, "tensorrt-rtx", "TensorRT-RTX")
        self.generator = Generator(LoadedBundle(files, chained(self.backend, manifest)))


def transformer(shared: Path, name: str, **options: Any) -> Path:
    """A bundle without codecs whose loop the host runs, for the same requests as `built`."""
    path, checkpoint = shared / name, harness.checkpoint(shared, "omni", "float32")
    options |= {"modalities": ("vision",), "steps": 3, "guidance": 2.0, "profiles": PROFILES[1::2]}

    def make() -> None:
        build(harness.transformer_only(checkpoint, path, target="rtx-pro-6000", **options))

    return harness.once(path, make)


@pytest.fixture(scope="module")
def external(shared: Path) -> Path:
    """A bundle of the same request whose engines take their weights as inputs."""
    import cosmos_export.targets.onnx.model as onnx_model

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(onnx_model, "EXTERNAL_BYTES", 4096)
        return transformer(shared, "rtx.external", parity="never", weights="external")


def test_a_link_that_changes_after_verification(external: Path, tmp_path: Path) -> None:
    """Engines and the weights that they take are those of the directory that was opened."""
    other, link, manifest = tmp_path / "release-8", tmp_path / "current", read_bundle(external)
    shutil.copytree(external, other)
    for path in (*other.glob("onnx/*.weights"), *other.glob("engines/*.engine")):
        path.write_bytes(bytes(byte ^ 1 for byte in path.read_bytes()))
    link.symlink_to(external)
    gpu = Gpu(link, manifest)
    link.unlink()
    link.symlink_to(other)
    found = gpu.generator.generate(request(manifest)).latents["vision"]
    wanted = Gpu(external, manifest).generator.generate(request(manifest)).latents["vision"]
    np.testing.assert_array_equal(found, wanted)


def test_weights_that_are_inputs_lie_on_the_device_once(external: Path) -> None:
    manifest = read_bundle(external)
    gpu = Gpu(external, manifest)
    found = gpu.generator.generate(request(manifest))
    expected = Generator(load_bundle(external, backend="onnxruntime")).generate(request(manifest))
    np.testing.assert_allclose(found.latents["vision"], expected.latents["vision"], rtol=0, atol=1e-5)
    records = {record.graph: record for record in manifest.engines}
    assert {graph for graph, record in records.items() if record.weights} >= {"reasoner", "generator"}
    weights = records["generator"].weights
    (context,) = gpu.engines["generator"].contexts
    addresses = {context.addresses[weight.name] for weight in weights}
    assert len(addresses) == len(weights)
    for weight in weights:
        with (external / weight.path).open("rb") as file:
            file.seek(weight.offset)
            data = file.read(weight.size_bytes)
        assert gpu.cuda.view(context.addresses[weight.name], weight.size_bytes).tobytes() == data
    # Another engine on the same weights reads the same memory, which lasts as long as one of them.
    free = gpu.cuda.free_bytes
    again = gpu.backend.open("generator")
    assert gpu.cuda.free_bytes == free
    gpu.generator.close()
    assert addresses <= gpu.cuda.blocks.keys()
    again.close()
    assert not addresses & gpu.cuda.blocks.keys()


@pytest.fixture(scope="module")
def cut(shared: Path) -> Path:
    """A bundle of the same request whose towers are engines in a row, as the memory budget allows no larger ones."""
    budget = f"{(compiler_bytes(3) + BUILDER_BYTES) / 1e6 + 0.25}MB"
    return transformer(shared, "rtx.cut", parity="always", memory_budget=budget)


def test_engines_in_a_row_are_one(cut: Path, built: Path) -> None:
    manifest = read_bundle(cut)
    assert {graph: len(parts) > 1 for graph, parts in manifest.chains.items()} == {"reasoner": True, "generator": True}
    gpu = Gpu(cut, manifest)
    reference = Generator(load_bundle(built, backend="onnxruntime"))
    for wanted in (request(manifest), request(manifest, ids=7, frames=1)):
        found, expected = gpu.generator.generate(wanted), reference.generate(wanted)
        np.testing.assert_allclose(found.latents["vision"], expected.latents["vision"], rtol=0, atol=1e-5)
    assert {part for parts in manifest.chains.values() for part in parts} < gpu.engines.keys()
    free = gpu.cuda.free_bytes
    gpu.generator.generate(request(manifest, ids=7, frames=1, seed=1))
    assert gpu.cuda.free_bytes == free
    gpu.generator.close()
    del gpu.generator, gpu.backend._scratch
    assert gpu.cuda.blocks == {}


def test_bodies_of_a_loop_take_turns_on_the_device(cut: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nothing stays for the next request, a body is there for its steps alone; here it has two names."""
    manifest = read_bundle(cut)
    assert manifest.loop is not None
    turns = replace(manifest, loop=replace(manifest.loop, bodies=("other", "generator", "generator")))
    loaded = load_bundle(cut, backend="onnxruntime")
    opened, events = loaded.executor.open, list[str]()

    def recorded(graph: str) -> Any:
        session = opened("generator" if graph == "other" else graph)
        close = session.close
        events.append(f"open {graph}")
        monkeypatch.setattr(session, "close", lambda: (events.append(f"close {graph}"), close()))
        return session

    monkeypatch.setattr(type(loaded.executor), "open", lambda self, graph: recorded(graph))
    found = Generator(LoadedBundle(BundleFiles(cut, turns), loaded.executor), resident=False).generate(
        request(manifest)
    )
    assert [e for e in events if "reasoner" not in e and "conditioning" not in e] == [
        "open other", "close other", "open generator", "close generator"
    ]  # fmt: skip
    monkeypatch.undo()
    expected = Generator(load_bundle(cut, backend="onnxruntime")).generate(request(manifest))
    np.testing.assert_array_equal(found.latents["vision"], expected.latents["vision"])


@pytest.fixture
def gpu(built: Path, manifest: Manifest) -> Gpu:
    return Gpu(built, manifest)


def test_a_request_is_what_onnx_runtime_makes_of_it(gpu: Gpu, built: Path, manifest: Manifest) -> None:
    reference = Generator(load_bundle(built, backend="onnxruntime"))
    for wanted in (request(manifest), request(manifest, ids=7, frames=1), request(manifest, seed=1)):
        found, expected = gpu.generator.generate(wanted), reference.generate(wanted)
        np.testing.assert_allclose(found.latents["vision"], expected.latents["vision"], rtol=0, atol=1e-5)
        for one, other in zip(found.video(), expected.video(), strict=True):
            np.testing.assert_allclose(one, other, rtol=0, atol=1e-5)
    assert set(gpu.engines) == {e.graph for e in manifest.engines}


@pytest.fixture(scope="module")
def narrow(shared: Path) -> Path:
    """Keys and values of the prompt in FP8, nothing else quantized."""
    checkpoint = harness.checkpoint(shared, "omni", "bfloat16")
    scales = harness.with_attention(harness.scale_table(checkpoint, shared / "omni-scales"), shared / "omni-kv-scales")
    arguments = ("--target", "rtx-pro-6000", "--parity", "never", "--modalities", "vision", "--components",
                 "vae-decoder", "--loop", "device", "--steps", "3", "--guidance", "2", "--set", "und.attention.kv=fp8",
                 "--calibration", scales, *PROFILES)  # fmt: skip
    return harness.command_line_build(shared, "rtx.narrow", checkpoint, *arguments).path


def test_keys_and_values_in_fp8_go_from_engine_to_engine(narrow: Path) -> None:
    manifest = read_bundle(narrow)
    handed = {t.name: t.dtype for t in manifest.graphs["reasoner"].outputs}
    assert len(handed) == 6 and set(handed.values()) == {"float8_e4m3fn"}
    gpu, reference = Gpu(narrow, manifest), Generator(load_bundle(narrow, backend="onnxruntime"))
    found, expected = gpu.generator.generate(request(manifest)), reference.generate(request(manifest))
    np.testing.assert_allclose(found.latents["vision"], expected.latents["vision"], rtol=0, atol=1e-5)
    ids = np.arange(20, dtype=np.int64)
    for value in reference._sessions["reasoner"].run({"input_ids": ids}).values():
        array = value.numpy()
        assert (array.dtype.name, array.itemsize, array.shape) == ("float8_e4m3fn", 1, (20, 2, 32))
        assert np.isfinite(array.astype(np.float32)).all() and array.astype(np.float32).any()


def test_a_repeated_loop_keeps_its_addresses(gpu: Gpu, manifest: Manifest) -> None:
    """Or the runtime would capture it again. The prompt's keys and values stay where they are, too."""
    for seed in range(3):
        gpu.generator.generate(request(manifest, seed=seed))
    (context,) = gpu.engines["denoise"].contexts
    assert context.strategy == "capture"
    assert len(context.runs) == 3
    assert context.runs[0] == context.runs[1] == context.runs[2]
    assert [c.strategy for c in gpu.engines["reasoner"].contexts] == [None]
    assert len(gpu.engines["reasoner"].contexts[0].runs) == 2  # the prompt and the negative prompt, once


def test_memory_is_given_back(gpu: Gpu, manifest: Manifest) -> None:
    gpu.generator.generate(request(manifest))
    before, blocks = gpu.cuda.free_bytes, len(gpu.cuda.blocks)
    for seed in range(3):
        list(gpu.generator.generate(request(manifest, seed=seed)).video())
    decoder = sum(gpu.cuda.blocks[m.address].size for name in ("vae_decoder_first", "vae_decoder_next")
                  for m in gpu.generator._sessions[name]._own.values())  # fmt: skip
    assert gpu.cuda.free_bytes == before - decoder
    assert len(gpu.cuda.blocks) == blocks + 2
    gpu.generator.close()
    del gpu.generator, gpu.backend._scratch
    assert gpu.cuda.blocks == {}


def test_the_profile_follows_the_shapes(gpu: Gpu, manifest: Manifest) -> None:
    for wanted, profile in ((request(manifest), 1), (request(manifest, ids=7, frames=1), 0)):
        gpu.generator.generate(wanted)
        assert gpu.engines["denoise"].contexts[0].profile == profile
    with pytest.raises(CosmosExportError, match=r"graph `reasoner` has no profile for input_ids \[500\]") as caught:
        gpu.generator.generate(request(manifest, ids=500))
    assert caught.value.code == "CX501"


def test_too_little_memory(built: Path, manifest: Manifest) -> None:
    gpu = Gpu(built, manifest, memory_bytes=20_000)
    with pytest.raises(CosmosExportError, match="cudaMallocAsync on CUDA device 0: out of memory") as caught:
        gpu.generator.generate(request(manifest))
    assert (caught.value.code, caught.value.exit_code) == ("CX506", 4)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"capability": (8, 9)}, "device 0 has compute capability 8.9; this bundle's engines are for 12.0"),
     ({"devices": 0}, "no CUDA device 0: there are 0")],
)  # fmt: skip
def test_another_device(built: Path, manifest: Manifest, options: dict[str, Any], message: str) -> None:
    with pytest.raises(CosmosExportError, match=re.escape(message)) as caught:
        Gpu(built, manifest, **options)
    assert (caught.value.code, caught.value.exit_code) == ("CX505", 3)
    assert "onnxruntime" in caught.value.hint


def test_an_engine_that_does_not_load(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu.backend._runtime, "deserialize_cuda_engine", lambda plan: None)
    with pytest.raises(CosmosExportError, match=r"cannot load .*reasoner\.engine: it logged nothing") as caught:
        gpu.backend.open("reasoner")
    assert caught.value.code == "CX502"


def test_engines_of_another_version_are_refused(built: Path, manifest: Manifest) -> None:
    other = replace(manifest, tools={**manifest.tools, "tensorrt_rtx": "1.2.3"})
    with pytest.raises(CosmosExportError, match=r"is installed; the engines are of 1\.2\.3") as caught:
        backends()["tensorrt-rtx"].open(BundleFiles(built, other), None)
    assert caught.value.code == "CX503"


def test_every_call_exists() -> None:
    """What the stand-in answers, the real modules have: names that the sessions use of both."""
    import tensorrt_rtx as trt
    from cuda.bindings import driver
    from cuda.bindings import runtime as cudart

    source = inspect.getsource(cuda_memory)
    called = set(re.findall(r'"(cuda[A-Z]\w+)"', source)) | set(re.findall(r"cudart\.(cuda[A-Z]\w+)", source))
    kinds = {name for name in called if name.startswith("cudaMemcpy") and name != "cudaMemcpyAsync"}
    assert len(called) > 12 and len(kinds) >= 3
    assert [name for name in called - kinds if not hasattr(cudart, name)] == []
    assert [kind for kind in kinds - {"cudaMemcpyKind"} if not hasattr(cudart.cudaMemcpyKind, kind)] == []
    assert hasattr(cudart.cudaMemPoolAttr, "cudaMemPoolAttrReleaseThreshold") and hasattr(driver, "cuuint64_t")
    source = inspect.getsource(rtx_sessions)
    for owner, variable in ((trt.IExecutionContext, "_context"), (trt.ICudaEngine, "engine"), (trt, "trt"),
                            (trt.IRuntimeConfig, "settings"), (trt.Runtime, "_runtime")):  # fmt: skip
        names = set(re.findall(rf"(?<!targets\.)\b{variable}\.(\w+)", source))
        assert names, variable
        assert [name for name in names if not hasattr(owner, name)] == [], owner


@pytest.fixture
def real(built: Path) -> Iterator[Generator]:
    from cuda.bindings import runtime as cudart

    status, count = cudart.cudaGetDeviceCount()
    if status != cudart.cudaError_t.cudaSuccess or not count:
        pytest.skip(f"no CUDA device: {status.name}")
    properties, wanted = cudart.cudaGetDeviceProperties(0)[1], read_bundle(built).target.compute_capability
    if f"{properties.major}.{properties.minor}" != wanted:
        pytest.skip(f"the engines are for {wanted}, this GPU is {properties.major}.{properties.minor}")
    generator = Generator(load_bundle(built))
    yield generator
    generator.close()


@pytest.mark.gpu
def test_on_the_gpu(real: Generator, built: Path, manifest: Manifest) -> None:
    expected = Generator(load_bundle(built, backend="onnxruntime")).generate(request(manifest)).latents["vision"]
    found = real.generate(request(manifest)).latents["vision"]
    assert np.linalg.norm(found - expected) / np.linalg.norm(expected) < 1e-4
