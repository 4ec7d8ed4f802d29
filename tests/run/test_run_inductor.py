"""A bundle for Hopper through PyTorch, here on the CPU: the same requests as through ONNX Runtime."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path

import build_harness as harness
import numpy as np
import pytest
import torch

from cosmos_export.bundle import BundleFiles, FileRecord, Manifest, read_bundle, verify_bundle
from cosmos_export.bundle.strict import decode
from cosmos_export.diagnostics import CosmosExportError
from cosmos_export.ir.graph import Graph
from cosmos_export.ir.spec import TensorSpec
from cosmos_export.runtime import Generator, LoadedBundle, load_bundle
from cosmos_export.runtime.request import Request
from cosmos_export.sampling import Schedule
from cosmos_export.targets.inductor.sessions import LoopDocument, TorchExecutor, TorchValue, to_torch
from cosmos_export.targets.inductor.specialise import CompileSettings

pytestmark = pytest.mark.xdist_group("run-inductor")

PROFILE = "und_len=1:64:128,frames=1:3:3,height=3:4:5,width=3:4:6,sound_len=0,action_len=0"
CPU = torch.device("cpu")
EAGER = CompileSettings(compiled=False)
"""The compiler is tested where graphs are; here it would only take its time."""


@pytest.fixture(scope="module")
def built(shared: Path) -> Path:
    checkpoint = harness.checkpoint(shared, "omni", "float32")
    arguments = ("--target", "h100", "--parity", "never", "--modalities", "vision", "--components", "vae-decoder",
                 "--loop", "device", "--steps", "4", "--guidance", "2", "--guidance-interval", "500:1000",
                 "--profile", PROFILE)  # fmt: skip
    return harness.command_line_build(shared, "inductor.run", checkpoint, *arguments).path


@pytest.fixture(scope="module")
def manifest(built: Path) -> Manifest:
    return read_bundle(built)


def request(manifest: Manifest, frames: int = 9) -> Request:
    values = {name: manifest.options[f"schedule.{name}"] for name in Schedule.__dataclass_fields__}
    tokens = np.arange(20, dtype=np.int64)
    return Request("t2v", tokens, tokens[:5], Schedule(**values), frames, 4, 5, 24.0, seed=3)  # type: ignore[arg-type]


def test_the_bundle_is_for_pytorch(built: Path, manifest: Manifest) -> None:
    assert verify_bundle(built).ok
    assert (manifest.target.name, manifest.target.backend) == ("h100", "inductor")
    graphs = {file.path for file in manifest.files if file.role == "graph"}
    assert graphs == {f"graphs/{name}.json" for name in manifest.graphs}
    assert manifest.loop is not None and len(manifest.loop.segments) == 2


def same_requests(
    built: Path,
    manifest: Manifest,
    device: torch.device,
    settings: CompileSettings,
    asked: list[tuple[int, int]],
    limit: float,
) -> None:
    """``asked``: frames and seeds of requests, one after another, which are those of ONNX Runtime."""
    mine = Generator(LoadedBundle(BundleFiles(built), TorchExecutor(BundleFiles(built), device, settings)))
    theirs = Generator(load_bundle(built, backend="onnxruntime"))
    for frames, seed in asked:
        own = replace(request(manifest, frames), seed=seed)
        found, wanted = (g.generate(own) for g in (mine, theirs))
        for name, latent in wanted.latents.items():
            error = np.linalg.norm(found.latents[name] - latent) / np.linalg.norm(latent)
            assert error < limit, (name, error)
        videos = [np.concatenate(list(result.video()), axis=2) for result in (found, wanted)]
        assert np.abs(videos[0] - videos[1]).max() < 50 * limit
    mine.close()


def test_requests_are_those_of_onnx_runtime(built: Path, manifest: Manifest) -> None:
    """Both segments of the loop, and the decoder's stream."""
    same_requests(built, manifest, CPU, EAGER, [(9, 3), (1, 3)], 2e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_requests_on_the_gpu(built: Path, manifest: Manifest) -> None:
    """Compiled at the first, captured at the second, replayed at the third; and another size in between."""
    asked = [(9, 3), (9, 4), (9, 5), (1, 3), (9, 6)]
    same_requests(built, manifest, torch.device("cuda"), CompileSettings(), asked, 2e-4)


def test_graphs_share_their_weights(built: Path, manifest: Manifest) -> None:
    backend = TorchExecutor(BundleFiles(built), CPU, EAGER)
    first, second = backend.open("denoise_1"), backend.open("denoise_2")
    shared = {t.data_ptr() for t in first._executable._fixed.values()}
    own = {t.data_ptr() for t in second._executable._fixed.values()}
    weights = set(second._executable.graph.weights)
    assert len(weights) > 10 and len(shared & own) >= len(weights)


def test_the_lengths_of_prompts_are_open(built: Path, manifest: Manifest) -> None:
    """In every graph that reads a prompt or what was made of it, by the manifest's edges; sizes of a video are not."""
    backend = TorchExecutor(BundleFiles(built), CPU, EAGER)
    found = {name: backend.open(name)._executable.settings.open_dims for name in manifest.graphs}
    assert found["reasoner"] == {"und_len"} and found["denoise_1"] == {"und_len", "negative_und_len"}
    assert found["denoise_2"] == {"und_len"} and found["conditioning"] == set()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.int64, torch.bool])
def test_values_keep_their_type(dtype: torch.dtype) -> None:
    array = np.array([[0.0, 1.0, 2.0]])
    value = TorchValue(to_torch(array, dtype))
    assert value.tensor.dtype == dtype and value.shape == (1, 3)
    back = value.numpy()
    assert str(back.dtype) == str(dtype).removeprefix("torch.")
    assert back.astype(np.float32).tolist() == array.astype(bool if dtype == torch.bool else np.float32).tolist()


def test_what_cannot_be_run_says_so(built: Path, manifest: Manifest, shared: Path, tmp_path: Path) -> None:
    with pytest.raises(CosmosExportError, match="no CUDA device 63") as caught:
        load_bundle(built, device="cuda:63")
    assert caught.value.code == "CX505" and "--device cpu" in caught.value.hint
    backend = TorchExecutor(BundleFiles(built), CPU, EAGER)
    session = backend.open("generator")
    with pytest.raises(CosmosExportError) as caught:
        session.run({name: np.zeros((2, 3)) for name in session.inputs})
    assert caught.value.code == "CX501"
    with pytest.raises(CosmosExportError) as caught:
        backend.open("absent")
    assert caught.value.code == "CX711"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda g: g["operations"][0].update(op="os.system"), "not in the dialect"),
        (lambda g: g.update(schema=2), "schema 2"),
        (lambda g: g.update(weights_file="../x"), "not a name"),
        (lambda g: g["operations"][-1]["args"].append({"eval": "1"}), "operands, "),
        (lambda g: g["operations"][-1]["args"].__setitem__(0, {"eval": "1"}), "not an operand"),
        (lambda g: g["weights"][0].update(size_bytes=1), "has 1 bytes"),
        (lambda g: g["operations"].pop(), "comes before"),
    ],
)
def test_a_damaged_graph_is_refused(built: Path, manifest: Manifest, tmp_path: Path, change: object, said: str) -> None:
    document = json.loads((built / "graphs/generator.json").read_text())
    change(document["graph"])  # type: ignore[operator]
    data = json.dumps(document).encode()
    (tmp_path / "graphs").mkdir()
    (tmp_path / "graphs/generator.json").write_bytes(data)
    listed = FileRecord("graphs/generator.json", len(data), hashlib.sha256(data).hexdigest(), "graph")
    with pytest.raises(CosmosExportError, match=said) as caught:
        TorchExecutor(BundleFiles(tmp_path, replace(manifest, files=(listed,))), CPU, EAGER).open("generator")
    assert caught.value.code == "CX502"


def test_a_graph_is_the_one_the_manifest_lists(built: Path, manifest: Manifest, tmp_path: Path) -> None:
    """Neither a graph nor what is beside it is looked for: a name that leads out of the bundle leads nowhere."""
    shutil.copytree(built, tmp_path / "x.bundle")
    shutil.copytree(built / "graphs", tmp_path / "outside")
    backend = TorchExecutor(BundleFiles(tmp_path / "x.bundle"), CPU, EAGER)
    path = tmp_path / "x.bundle/graphs/reasoner.json"
    path.write_bytes(path.read_bytes().replace(b"{", b"{ ", 1))
    for name in ("../../outside/reasoner", "reasoner"):
        with pytest.raises(CosmosExportError) as caught:
            backend.open(name)
        assert caught.value.code == "CX711"


@pytest.mark.parametrize("backend", ["onnxruntime", "inductor"])
def test_a_link_that_changes_after_verification(built: Path, manifest: Manifest, tmp_path: Path, backend: str) -> None:
    """`current -> release-7`: sessions are opened late, and are those of the bundle that was verified."""
    other, link = tmp_path / "release-8", tmp_path / "current"
    shutil.copytree(built, other)
    for path in other.glob("onnx/*.weights"):
        path.write_bytes(bytes(byte ^ 1 for byte in path.read_bytes()))
    link.symlink_to(built)
    loaded = load_bundle(link, backend=backend, device="cpu")
    if backend == "inductor":
        loaded = LoadedBundle(loaded.files, TorchExecutor(loaded.files, CPU, EAGER))
    link.unlink()
    link.symlink_to(other)
    found, wanted = (
        Generator(one).generate(request(manifest, 1)).latents["vision"]
        for one in (loaded, load_bundle(built, backend="onnxruntime"))
    )
    assert np.linalg.norm(found - wanted) < 2e-5 * np.linalg.norm(wanted)


LOOP = {"steps": 2, "carried": {"a": "b"}, "rows": [], "taken": ["a"], "returned": ["a"]}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"steps": 0}, "less than 1"),
        ({"steps": 2.0}, "expected an integer"),
        ({"steps": True}, "expected an integer"),
        ({"steps": 3}, "for 3 steps"),
        ({"carried": {"x": "b"}}, "carried is not"),
        ({"carried": {"a": "x"}}, "carried is not"),
        ({"rows": ["x"]}, "rows is not"),
        ({"taken": ["table"]}, "taken is not"),
        ({"taken": []}, "takes no state"),
        ({"returned": ["table"]}, "returned is not"),
        ({"more": 1}, "unknown field"),
    ],
)
def test_a_damaged_loop_is_refused(change: dict[str, object], said: str) -> None:
    graph = Graph("g")
    a, _ = (graph.add_input(name, TensorSpec(torch.float32, (2, 3))) for name in ("a", "table"))
    graph.set_outputs({"b": a})
    decode(LoopDocument, LOOP).check(graph, {"table": (2, 3)})
    with pytest.raises(ValueError, match=said):
        decode(LoopDocument, LOOP | change).check(graph, {"table": (2, 3)})
