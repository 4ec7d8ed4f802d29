"""A bundle for a GPU that builds its own engines: complete without TensorRT but for them, and finished later."""

from __future__ import annotations

import hashlib
import json
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import cosmos_export.compiler.finish as finishing
from cosmos_export.bundle import Manifest, read_bundle, verify_bundle
from cosmos_export.bundle.files import SIGNATURE_NAME
from cosmos_export.compiler.driver import build
from cosmos_export.compiler.keys import plugin_nodes
from cosmos_export.diagnostics import CosmosExportError, ToolError
from cosmos_export.kernels.description import DOCUMENT
from cosmos_export.machine.gpu import Gpu, gpus
from cosmos_export.options import BuildOptions
from cosmos_export.runtime import load_bundle
from cosmos_export.targets import load_target
from cosmos_export.targets.trt import common as trt_common
from cosmos_export.targets.trt import tensorrt, tensorrt_rtx
from cosmos_export.targets.trt.checks import WantedEngine, report_checks
from cosmos_export.targets.trt.plugins import read_document
from cosmos_export.targets.trt.tensorrt import BuilderOptions, require_gpu, worker_settings

pytestmark = [pytest.mark.xdist_group("builds"), pytest.mark.usefixtures("captured_once")]

GRAPHS = {"reasoner", "conditioning", "denoise", "vae_decoder_first", "vae_decoder_next"}
SMI = "0, NVIDIA H100 80GB HBM3, 9.0, 81559, 80994, 580.159.04, 1980, 1980, 2619, 71.2, 700.00, 33, Disabled\n"


@pytest.fixture(scope="module")
def waiting(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tensorrt") / "x.bundle"


def made(waiting: Path, omni: Path) -> Path:
    if not waiting.exists():
        build(
            BuildOptions(
                omni, waiting, target="h100", backend="tensorrt", parity="never", components=("vae-decoder",),
                loop="device", steps=3, modalities=("vision",), profiles=("256p,frames=1:2:3",),
            )
        )  # fmt: skip
    return waiting


def test_everything_but_the_engines_is_there(waiting: Path, omni: Path) -> None:
    root = made(waiting, omni)
    manifest = read_bundle(root)
    assert (manifest.target.name, manifest.target.backend, manifest.engines) == ("h100", "tensorrt", ())
    requests = json.loads((root / "engines/requests.json").read_text())["engines"]
    assert {r["graph"] for r in requests} == GRAPHS
    for request in requests:
        assert (root / "onnx" / f"{request['graph']}.onnx").is_file()
        assert request["profiles"] == ["256p,frames=1:2:3"]
        (shapes,) = request["shapes"]
        assert all(len(span) == 3 for span in shapes.values())
    script = (root / "finish.sh").read_text()
    assert subprocess.run(["sh", "-n", root / "finish.sh"]).returncode == 0
    assert "pip install '.[tensorrt]'" in script and "cosmos_export.compiler.finish" in script
    with pytest.raises(CosmosExportError, match="has no engines") as caught:
        load_bundle(root)
    assert "finish.sh" in caught.value.hint


def test_finishing_needs_the_builder_and_the_gpu(waiting: Path, omni: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = made(waiting, omni)
    with pytest.raises(CosmosExportError, match="`tensorrt` Python module, which is not installed") as caught:
        finishing.finish(root)
    assert caught.value.code == "CX404"
    monkeypatch.setattr(trt_common, "require_module", lambda flavor: None)
    with pytest.raises(CosmosExportError, match=r"compute capability 9.0; this machine has: none") as caught:
        finishing.finish(root)
    assert caught.value.code == "CX405"
    assert verify_bundle(root).ok and finishing.main([]) == 2


def test_finishing_completes_the_manifest(waiting: Path, omni: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With TensorRT-RTX as the builder, which needs no GPU: the requests are ones a builder takes."""
    root = made(waiting, omni)
    before = (root / "manifest.json").read_bytes()
    asked: list[dict[str, Any]] = []

    def stand_in(
        onnx_path: Path, output: Path, *, target: Any, timing_cache: Path, plugins: Path | None, **options: Any
    ) -> Any:
        assert plugins is None
        asked.append({"name": output.name, "cache": timing_cache})
        if len(asked) == 2:
            raise ToolError("CX422", "the builder was ended")
        report = tensorrt_rtx.build_engine(onnx_path, output, target=load_target("rtx-pro-6000"), **options)
        object.__setattr__(report, "layers", 7)
        with output.open("r+b") as file:  # what begins as a plan of TensorRT does
            file.write(b"ftrt" + bytes(4))
        return report

    monkeypatch.setattr(trt_common, "require_module", lambda flavor: None)
    monkeypatch.setattr(tensorrt, "require_gpu", lambda target: None)
    monkeypatch.setattr(tensorrt, "build_engine", stand_in)
    (root / SIGNATURE_NAME).write_bytes(b"of the bundle that waits")
    with pytest.raises(ToolError):
        finishing.finish(root)
    assert (
        (root / SIGNATURE_NAME).exists() and (root / "manifest.json").read_bytes() == before and verify_bundle(root).ok
    )
    # What a run leaves that nobody could end: the next one begins with taking it away.
    for name in (
        "engines/reasoner.engine",
        "engines/.reasoner.engine.ab.partial",
        "engines/provenance.intoto.json",
        ".manifest.json.partial-1",
    ):
        (root / name).write_bytes(b"half")
    manifest: Manifest = finishing.finish(root)
    assert verify_bundle(root).ok and read_bundle(root) == manifest and not (root / SIGNATURE_NAME).exists()
    assert {e.graph for e in manifest.engines} == GRAPHS
    provenance = json.loads((root / "engines/provenance.intoto.json").read_text())
    assert {one["name"] for one in provenance["subject"]} == {engine.path for engine in manifest.engines}
    parent = provenance["predicate"]["buildDefinition"]["resolvedDependencies"][0]["digest"]
    assert parent == {"sha256": hashlib.sha256(before).hexdigest()}
    assert all(check.passed for check in manifest.plan_checks) and "tensorrt_rtx" in manifest.tools
    assert all(not one["cache"].is_relative_to(root) for one in asked)
    with pytest.raises(CosmosExportError, match="does not wait for engines"):
        finishing.finish(root)


KERNELS = ("joint-attention", "qkv-pack", "sampler-step")


def test_kernels_are_plugins_of_the_bundle(tmp_path: Path, omni: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled for the target's GPU, counted in what is asked of the builder, and handed to it."""
    pytest.importorskip("triton")
    root = tmp_path / "x"
    build(
        BuildOptions(
            omni, root, target="h100", backend="tensorrt", parity="never", components=("none",), loop="device", steps=3,
            modalities=("vision",), profiles=("256p,frames=1:2:3",), kernels=KERNELS,
        )
    )  # fmt: skip
    assert verify_bundle(root).ok and read_bundle(root).options["kernels"] == KERNELS
    records = read_document(root / "plugins")
    assert {record.name.rpartition("_")[0] for record in records} == {"joint_attention", "qkv_pack", "unipc_step"}
    assert {path.name for path in (root / "plugins").iterdir()} == {DOCUMENT, *(f"{r.name}.ptx" for r in records)}
    assert all(".target sm_90" in (root / f"plugins/{record.name}.ptx").read_text() for record in records)
    requests = {r["graph"]: r for r in json.loads((root / "engines/requests.json").read_text())["engines"]}
    layers = read_bundle(root).model.geometry["num_hidden_layers"]
    assert isinstance(layers, int)
    assert requests["denoise"]["plugins"] == plugin_nodes(root / "onnx/denoise.onnx").total() > 2 * layers
    assert requests["conditioning"]["plugins"] == 0 and requests["reasoner"]["attention"] > 0
    assert not plugin_nodes(root / "onnx/denoise.cpu.onnx")

    given: dict[str, Path | None] = {}

    def stand_in(onnx_path: Path, output: Path, *, plugins: Path | None, **_: Any) -> Any:
        given[onnx_path.stem] = plugins
        raise ToolError("CX422", "the builder was ended")

    monkeypatch.setattr(trt_common, "require_module", lambda flavor: None)
    monkeypatch.setattr(tensorrt, "require_gpu", lambda target: None)
    monkeypatch.setattr(tensorrt, "build_engine", stand_in)
    for graph in ("conditioning", "denoise"):
        monkeypatch.setattr(
            finishing, "read_requests", lambda files, graph=graph: [finishing_request(files.path, graph)]
        )
        with pytest.raises(ToolError):
            finishing.finish(root)
    assert given == {"conditioning": None, "denoise": root / "plugins"}


def finishing_request(root: Path, graph: str) -> finishing.EngineRequest:
    requests = json.loads((root / finishing.REQUESTS).read_text())["engines"]
    (record,) = (one for one in requests if one["graph"] == graph)
    return finishing.EngineRequest(graph, (), ({},), False, record["attention"], (), record["plugins"])


@pytest.mark.parametrize(
    ("changes", "code", "said"),
    [
        ({"kernels": ("norm",)}, "CX451", "no kernel norm"),
        ({"target": "rtx-pro-6000", "backend": None}, "CX459", "is built with tensorrt-rtx"),
        ({"backend": "inductor"}, "CX459", "is built with inductor"),
        ({"kernels": ("norm-quantize",)}, "CX458", "no place for norm-quantize"),
    ],
)
def test_kernels_that_cannot_be(tmp_path: Path, omni: Path, changes: dict[str, Any], code: str, said: str) -> None:
    asked: dict[str, Any] = {"target": "h100", "backend": "tensorrt", "kernels": ("joint-attention",), **changes}
    with pytest.raises(CosmosExportError, match=said) as caught:
        build(BuildOptions(omni, tmp_path / "x", parity="never", components=("none",), modalities=("vision",), **asked))
    assert caught.value.code == code
    assert list(tmp_path.iterdir()) == []


def test_kernels_of_an_fp32_checkpoint(tmp_path: Path, omni_fp32: Path) -> None:
    with pytest.raises(CosmosExportError, match="kernels take the place of bf16 operations") as caught:
        build(BuildOptions(omni_fp32, tmp_path / "x", target="h100", backend="tensorrt", kernels=("qkv-pack",)))
    assert caught.value.code == "CX459"


def test_an_engine_that_is_not_as_planned_is_not_taken(tmp_path: Path) -> None:
    wanted = WantedEngine("g", "9.0", 1, attention=3, decomposable_attention=False)

    class Report:
        attention, layers, layers_in = 2, 0, {"fp8": 4}

        plugins = 1

    checks = report_checks(wanted, Report())  # type: ignore[arg-type]
    assert [check.passed for check in checks] == [False, False]
    assert checks[1].found == "0 layers, 4 × fp8"
    *_, check = report_checks(replace(wanted, plugins=2), Report())  # type: ignore[arg-type]
    assert (check.check, check.found, check.passed) == ("plugins", "1 plugins parsed", False)


def test_the_drivers_report_is_read() -> None:
    (gpu,) = gpus(lambda command: SMI)
    assert gpu == Gpu(
        0, "NVIDIA H100 80GB HBM3", "9.0", 81559 << 20, 80994 << 20, "580.159.04", 1980.0, 1980.0, 2619.0, 71.2, 700.0,
        33.0, False,
    )  # fmt: skip
    (odd,) = gpus(lambda command: SMI.replace("71.2", "[N/A]").replace("Disabled", "Enabled"))
    assert odd.power_w is None and odd.mig

    def absent(command: Any) -> str:
        raise FileNotFoundError("nvidia-smi")

    assert gpus(absent) == () and gpus(lambda command: "No devices were found\n") == ()


def test_settings_follow_from_the_target(tmp_path: Path) -> None:
    h200 = load_target("h200").on("tensorrt")
    assert BuilderOptions.of(h200).hardware_compatibility == "same-compute-capability"
    assert worker_settings(h200, tmp_path / "cache")["timing_cache"] == str(tmp_path / "cache")
    assert worker_settings(load_target("b200"), None) == {
        "hardware_compatibility": "none", "version_compatible": False, "weight_streaming": False, "timing_cache": None,
        "plugins": None, "inspect": True,
    }  # fmt: skip
    with pytest.raises(CosmosExportError, match="this machine has"):
        require_gpu(load_target("b200"))
