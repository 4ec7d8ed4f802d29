"""`--components`: codecs and tokenizer in the bundle, run from it alone and compared with the published pipeline."""

from __future__ import annotations

import itertools
import json
import shutil
import time
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import build_harness as harness
import numpy as np
import pytest
import torch
from build_harness import Built

import cosmos_export.compiler.components as components
import cosmos_export.compiler.engines as engines
import cosmos_export.compiler.first_layers as first_layers
import cosmos_export.compiler.published as published
import cosmos_export.compiler.stages as stages
from cosmos_export.bundle import BundleWriter, Manifest, verify_bundle
from cosmos_export.compiler.artifacts import EngineSettings
from cosmos_export.compiler.driver import build
from cosmos_export.compiler.options import resolve
from cosmos_export.compiler.selection import COMPONENTS
from cosmos_export.diagnostics import CosmosExportError, FindingError
from cosmos_export.evaluation.cases import CASES
from cosmos_export.evaluation.codecs import codec_parity
from cosmos_export.evaluation.parity import Parity
from cosmos_export.ir.graph import is_constant
from cosmos_export.ir.program import Program
from cosmos_export.options import BuildOptions
from cosmos_export.progress import Silent
from cosmos_export.targets.trt.engine_inspector import inspect_engine

pytestmark = pytest.mark.xdist_group("components")

SILENT, WITH_SOUND = "256p-17f", "256p-17f+sound"
ARGUMENTS = ("--target", "rtx-pro-6000", "--profile", SILENT, "--profile", WITH_SOUND)
STREAMS = {"vae_decoder": ("latent", "pixels"), "vae_encoder": ("pixels", "latent")}


@pytest.fixture(scope="module")
def complete(shared: Path, omni: Path) -> Built:
    """All components, as a user gets them who says nothing of components."""
    return harness.command_line_build(shared, "complete.bundle", omni, *ARGUMENTS)


@pytest.fixture
def _quick(captured_once: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The transformer has tests of its own."""
    monkeypatch.setattr(published, "Parity", partial(Parity, cases=CASES[:1]))


def built(checkpoint: Path, output: Path, **options: Any) -> Manifest:
    result = build(BuildOptions(checkpoint, output, **{"parity": "never", **options}))
    assert result.manifest is not None
    assert verify_bundle(output).ok
    return result.manifest


# ---------------------------------------------------------------------------------------------------------------------
# The bundle


def test_it_verifies_and_lists_its_components(complete: Built) -> None:
    assert verify_bundle(complete.path).ok
    listed = "transformer + vae-decoder + vae-encoder + sound-decoder + tokenizer"
    assert complete.stderr.splitlines()[-1].startswith(f"built {complete.path}: {listed}, 8 engines with 5 fused att")
    assert complete.manifest.options["components"] == COMPONENTS
    assert complete.document["components"] == list(COMPONENTS)


def test_streams_carry_every_cache(complete: Built) -> None:
    manifest = complete.manifest
    assert set(manifest.streams) == set(STREAMS)
    for name, count in (("vae_decoder", 24), ("vae_encoder", 16)):
        stream = manifest.streams[name]
        assert (stream.first, stream.next) == (f"{name}_first", f"{name}_next")
        assert len(stream.carried) == count
        caches = {t.name for t in manifest.graphs[stream.next].inputs} - {STREAMS[name][0]}
        assert stream.carried == {cache: f"new_{cache}" for cache in caches}
        edges = {(e.source, e.output, e.input) for e in manifest.edges if e.target == stream.next}
        assert edges == {(stream.first, output, cache) for cache, output in stream.carried.items()}
    assert [t.name for t in manifest.graphs["sound_decoder"].inputs] == ["sound_latent"]


def test_the_graphs_of_a_stream_share_their_weights(complete: Built) -> None:
    import onnx

    names = {Path(f.path).name for f in complete.manifest.files if f.role == "weights"}
    assert {"vae_decoder.weights", "vae_encoder.weights", "sound_decoder.weights"} <= names
    assert not any("first" in name or "next" in name for name in names)
    for name in ("vae_decoder", "vae_encoder", "sound_decoder"):
        for path in (complete.path / "onnx").glob(f"{name}*.onnx"):
            onnx.checker.check_model(str(path), full_check=True)
            model = onnx.load(str(path), load_external_data=False)
            files = {e.value for i in model.graph.initializer for e in i.external_data if e.key == "location"}
            assert files == {f"{name}.weights"}


def test_engines_are_for_the_profiles_that_need_them(complete: Built) -> None:
    manifest = complete.manifest
    codecs = {e.name: e.profiles for e in manifest.engines if e.name.startswith(("vae", "sound"))}
    both, sound = (SILENT, WITH_SOUND), (WITH_SOUND,)
    assert codecs == {
        **dict.fromkeys(("vae_decoder_first", "vae_decoder_next", "vae_encoder_first", "vae_encoder_next"), both),
        "sound_decoder": sound,
    }
    notes = complete.document["notes"]
    assert f"sound-decoder has no engine for {SILENT}: no sound in that profile" in notes
    assert [note for note in notes if "no profile has action" in note] and not any("has sound" in n for n in notes)
    reported = {e["graph"]: e["activation_bytes"] for e in complete.document["engines"]}
    for engine, profiles in codecs.items():
        plan = inspect_engine(complete.path / f"engines/{engine}.engine")
        assert plan.header.compute_capabilities == ("12.0",)
        assert [g.profile for g in plan.graphs] == list(range(len(profiles)))
        assert reported[engine] == max(g.activation_bytes for g in plan.graphs) > 0
        assert all(g.allocations == 0 and g.stream_capturable for g in plan.graphs)
    checks = {c.engine: c for c in manifest.plan_checks}
    assert all(checks[engine].passed and checks[engine].check == "compute capability" for engine in codecs)


def test_parity_is_recorded_for_every_codec(complete: Built) -> None:
    manifest = complete.manifest
    for name in COMPONENTS[:3]:
        (verdict,) = [v for v in manifest.evaluation if v.subject == name]
        assert (verdict.verdict, verdict.threshold) == ("pass", 1e-4)
        assert 0 < manifest.volatile.measured[verdict.stage] <= 1e-4
    assert {v.subject for v in manifest.evaluation if v.stage == "engine"} == {e.name for e in manifest.engines}


def test_two_builds_are_the_same_bytes(complete: Built, omni: Path, tmp_path: Path) -> None:
    """The second takes no graphs from other builds."""
    arguments = (omni.name, *ARGUMENTS, "--no-cache")
    again = harness.command_line_build(tmp_path, "again", *arguments, threads=2, cwd=omni.parent)
    first, second = ({f.path: f.sha256 for f in b.manifest.files} for b in (complete, again))
    assert first == second
    documents = [json.loads((b.path / "manifest.json").read_text()) for b in (complete, again)]
    for document in documents:
        del document["volatile"], document["digest"]
    assert documents[0] == documents[1]


# ---------------------------------------------------------------------------------------------------------------------
# Run from the bundle alone


@pytest.fixture(scope="module")
def pipeline(omni: Path) -> Any:
    """The published pipeline on the same checkpoint, in fp32 as a CPU runs it."""
    from diffusers import Cosmos3OmniPipeline

    return Cosmos3OmniPipeline.from_pretrained(omni, torch_dtype=torch.float32, local_files_only=True)


def run(bundle: Path, graph: str, feed: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(bundle / f"onnx/{graph}.cpu.onnx"), providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, dict(feed)), strict=True))


def stream(bundle: Built, name: str, chunks: Iterator[np.ndarray]) -> np.ndarray:
    """What a reader does that knows the manifest and nothing else."""
    record, (given, result) = bundle.manifest.streams[name], STREAMS[name]
    state = run(bundle.path, record.first, {given: next(chunks)})
    results = [state[result]]
    for chunk in chunks:
        caches = {cache: state[output] for cache, output in record.carried.items()}
        state = run(bundle.path, record.next, {given: chunk, **caches})
        results.append(state[result])
    return np.concatenate(results, axis=2)


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3))


def error(found: np.ndarray, expected: torch.Tensor) -> float:
    assert found.shape == tuple(expected.shape)
    return float((torch.from_numpy(found) - expected).norm() / expected.norm())


@torch.no_grad()
def test_decoding(complete: Built, pipeline: Any) -> None:
    latent = noise(1, 4, 4, 3, 6)
    # The pipeline's own lines.
    mean, inverse = (t.view(1, -1, 1, 1, 1) for t in (pipeline._vae_latents_mean, pipeline._vae_latents_inv_std))
    expected = pipeline.vae.decode(latent / inverse + mean).sample
    found = stream(complete, "vae_decoder", (latent[:, :, i : i + 1].numpy() for i in range(4)))
    assert error(found, expected) <= 1e-4


@torch.no_grad()
def test_encoding(complete: Built, pipeline: Any) -> None:
    pixels = noise(1, 3, 13, 64, 48).clamp(-1, 1)
    chunks = [pixels[:, :, :1], *pixels[:, :, 1:].split(4, dim=2)]
    found = stream(complete, "vae_encoder", (np.ascontiguousarray(chunk.numpy()) for chunk in chunks))
    assert error(found, pipeline._encode_video(pixels)) <= 1e-4


@torch.no_grad()
def test_sound(complete: Built, pipeline: Any) -> None:
    latent = noise(8, 11)
    found = run(complete.path, "sound_decoder", {"sound_latent": latent.numpy()})["waveform"]
    assert error(found, pipeline.decode_sound(latent)) <= 1e-4


@pytest.mark.parametrize("system", [None, True, False])
@pytest.mark.parametrize("prompt", ["A cat.", " two\n\nlines ", "{{x}} <|im_end|> 視頻", ""])
def test_prompts(complete: Built, pipeline: Any, prompt: str, system: bool | None) -> None:
    from diffusers.pipelines.cosmos.pipeline_cosmos3_omni import _SYSTEM_PROMPT_VIDEO
    from tokenizers import Tokenizer

    record = complete.manifest.request.prompt
    assert record is not None
    with_system = record.use_system if system is None else system
    text = record.plain[0] + prompt + record.plain[1]
    if with_system:
        text = record.system[0] + _SYSTEM_PROMPT_VIDEO + record.system[1] + prompt + record.system[2]
    tokenizer = Tokenizer.from_file(str(complete.path / record.tokenizer))
    found = [*tokenizer.encode(text, add_special_tokens=False).ids, *record.suffix_ids]
    expected, _ = pipeline.tokenize_prompt(
        prompt, use_system_prompt=system, add_resolution_template=False, add_duration_template=False
    )
    assert found == expected


def test_what_a_request_needs_to_know(complete: Built, pipeline: Any) -> None:
    request, config = complete.manifest.request, pipeline.transformer.config
    video = request.video
    assert (video.spatial, video.temporal) == (pipeline.vae_scale_factor_spatial, pipeline.vae_scale_factor_temporal)
    assert (video.channels, video.patch) == (config.latent_channel, config.latent_patch_size)
    assert (video.base_fps, video.fps_modulation) == (config.base_fps, config.enable_fps_modulation)
    sound, codec = request.sound, pipeline.sound_tokenizer
    assert sound is not None
    assert (sound.channels, sound.latent_fps) == (config.sound_dim, config.sound_latent_fps)
    assert (sound.sampling_rate, sound.hop) == (codec.config.sampling_rate, codec._hop_size)
    assert request.action is not None
    assert (request.action.dim, request.action.domains) == (config.action_dim, config.num_embodiment_domains)


def test_the_recorded_sampling_gives_the_recorded_schedule(complete: Built) -> None:
    from cosmos_export.sampling import CheckpointSampling, resolve_schedule

    record, manifest = complete.manifest.request.sampling, complete.manifest
    stated = CheckpointSampling(record.scheduler, record.native, record.distilled_sigmas, policy=record.policy)
    again = resolve_schedule(stated, str(manifest.options["mode"]), None)
    assert again.timesteps == manifest.options["schedule.timesteps"]
    assert again.guidance == manifest.options["schedule.guidance"]


# ---------------------------------------------------------------------------------------------------------------------
# What is chosen


@pytest.mark.usefixtures("_quick")
def test_edge(tmp_path: Path, edge: Path) -> None:
    """On the CPU, with what a policy needs: its sound, or a system message, nobody has."""
    assert resolve(BuildOptions(edge, Path("x"))).components == ("vae-decoder", "vae-encoder", "tokenizer")
    manifest = built(edge, tmp_path / "x", parity="auto", components=("tokenizer", "vae-encoder"))
    assert manifest.options["components"] == ("vae-encoder", "tokenizer")
    assert manifest.request.sound is None
    assert manifest.request.prompt is not None
    assert not manifest.request.prompt.use_system
    assert manifest.request.sampling.native and manifest.request.sampling.edge
    assert {v.verdict for v in manifest.evaluation} == {"pass"}
    assert {v.subject for v in manifest.evaluation} == {"transformer", "vae-encoder", "tables"}


@pytest.mark.usefixtures("captured_once")
@pytest.mark.parametrize("asked", [("none",), ()])
def test_none(tmp_path: Path, omni: Path, asked: tuple[str, ...]) -> None:
    manifest = built(omni, tmp_path / "x", components=asked)
    assert manifest.options["components"] == ()
    assert (manifest.streams, manifest.request.prompt) == ({}, None)
    assert set(manifest.graphs) == {"reasoner", "conditioning", "schedule", "generator"}
    assert manifest.request.video.channels == 4


@pytest.mark.usefixtures("captured_once")
def test_one_alone(tmp_path: Path, omni: Path) -> None:
    manifest = built(omni, tmp_path / "x", components=("vae-encoder",))
    assert set(manifest.streams) == {"vae_encoder"}
    assert not {f.path for f in manifest.files if f.role == "tokenizer"}
    notes = {v.subject: v.note for v in manifest.evaluation if v.verdict == "not-measured"}
    assert notes == dict.fromkeys(("transformer", "vae-encoder", "bundle"), "not asked for (--parity never)")


@pytest.mark.parametrize("asked", [None, ("all",)])
def test_all_is_what_the_modalities_use(omni: Path, asked: tuple[str, ...] | None) -> None:
    def chosen(**options: Any) -> tuple[str, ...]:
        return resolve(BuildOptions(omni, Path("x"), components=asked, **options)).components

    assert chosen() == COMPONENTS
    assert chosen(modalities=("vision", "action")) == ("vae-decoder", "vae-encoder", "tokenizer")


def test_all_is_what_there_is(tmp_path: Path, omni: Path) -> None:
    root = harness.copy_checkpoint(omni, tmp_path / "less")
    (root / "text_tokenizer/tokenizer.json").unlink()
    shutil.rmtree(root / "sound_tokenizer")
    edit(root / "model_index.json", sound_tokenizer=[None, None])
    assert resolve(BuildOptions(root, Path("x"))).components == ("vae-decoder", "vae-encoder")
    assert "no text_tokenizer/tokenizer.json" in refusal(root, "CX225", components=("tokenizer",))
    assert "no sound_tokenizer/" in refusal(root, "CX225", components=("sound-decoder",))


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def refusal(root: Path, code: str, **options: Any) -> str:
    with pytest.raises(CosmosExportError) as caught:
        resolve(BuildOptions(root, Path("x"), **options))
    assert caught.value.code == code
    assert caught.value.hint
    return str(caught.value)


def test_components_that_do_not_fit_are_refused(tmp_path: Path, omni: Path) -> None:
    root = harness.copy_checkpoint(omni, tmp_path / "other")
    other = {"z_dim": 16, "latents_mean": [0.0] * 16, "latents_std": [1.0] * 16}
    edit(root / "vae/config.json", **other)
    assert "z_dim = 16, the transformer's latent_channel is 4" in refusal(root, "CX226")
    assert resolve(BuildOptions(root, Path("x"), components=("sound-decoder",))).components == ("sound-decoder",)
    edit(root / "vae/config.json", scale_factor_spatial="16")
    assert "scale_factor_spatial = '16', which is not supported" in refusal(root, "CX104", components=())


def test_half_precision_codecs_are_refused(tmp_path: Path, omni: Path) -> None:
    root = harness.copy_checkpoint(omni, tmp_path / "half")
    shutil.copytree(harness.checkpoint(tmp_path, "omni", "float16") / "vae", root / "vae", dirs_exist_ok=True)
    assert "vae/ has F16 weights; vae-decoder is built from BF16 or F32" in refusal(root, "CX226")


def test_an_fp32_codec_of_a_bf16_checkpoint(tmp_path: Path, omni: Path, omni_fp32: Path) -> None:
    """As the published sound tokenizer may be. What is fp32 has one form, for the CPU and for the builder."""
    root = harness.copy_checkpoint(omni, tmp_path / "mixed")
    shutil.copytree(omni_fp32 / "sound_tokenizer", root / "sound_tokenizer", dirs_exist_ok=True)
    job = resolve(BuildOptions(root, tmp_path / "x", target="rtx-pro-6000", profiles=(WITH_SOUND,)))
    with BundleWriter(tmp_path / "x") as writer:
        codec = components.write_codec("sound-decoder", job.checkpoint, job.backend, writer, Silent())
        folder = writer.path("onnx/sound_decoder.onnx", "onnx").parent
        assert (codec.suffix, codec.stream) == (".onnx", None)
        assert {path.name for path in folder.iterdir()} == {"sound_decoder.onnx", "sound_decoder.weights"}
        assert codec_parity(codec.name, codec.program, root / "sound_tokenizer", folder, codec.suffix).passed
        settings = EngineSettings(job.target, job.profiles, None)
        (build_engine,) = components.codec_engines(codec, settings, writer).values()
        assert build_engine(Silent()).check.passed


@pytest.mark.parametrize("what", ["builder", "input"])
def test_what_fails_beside_a_build_ends_it_at_the_next_stage(
    tmp_path: Path, omni: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """Not after everything else has been done."""

    def fails(*_: Any) -> Any:
        raise OSError("a disk that does not answer")

    if what == "builder":
        monkeypatch.setattr(engines, "codec_engines", lambda *_: {"vae_decoder_first": fails})
    else:
        monkeypatch.setattr("cosmos_export.compiler.input_files.hash_file", fails)
    sources = stages.weight_sources
    monkeypatch.setattr(stages, "weight_sources", lambda tensors: time.sleep(0.3) or sources(tensors))
    monkeypatch.setattr(stages, "capture", lambda *_, **__: pytest.fail("the transformer was captured"))
    options = BuildOptions(omni, tmp_path / "x", target="rtx-pro-6000", components=("vae-decoder",), parity="never")
    with pytest.raises((OSError, CosmosExportError), match="does not answer"):
        build(options)


@pytest.mark.usefixtures("captured_once")
def test_without_memory_each_component_counts_for_itself(
    tmp_path: Path, omni: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The transformer may be too large to compare where a codec is not."""
    for module in (published, first_layers):
        monkeypatch.setattr(module, "available_bytes", lambda: 2_000_000)
    manifest = built(omni, tmp_path / "x", parity="auto", components=("vae-decoder",))
    verdicts = {v.subject: v.verdict for v in manifest.evaluation}
    assert verdicts.pop("tables") == "pass"
    assert verdicts == {"vae-decoder": "pass", "transformer": "not-measured", "bundle": "not-measured"}


# ---------------------------------------------------------------------------------------------------------------------
# What is wrong is found


def swapped_weights(program: Program) -> None:
    """Two convolutions of one shape read each other's weights."""
    for graph in program.graphs.values():
        convolutions = [node for node in graph.weights.values() if len(node.meta["weight"].shape) == 5]
        pairs = itertools.combinations(convolutions, 2)
        first, second = next((a, b) for a, b in pairs if a.meta["weight"].shape == b.meta["weight"].shape)
        first.meta["weight"], second.meta["weight"] = second.meta["weight"], first.meta["weight"]


def other_statistics(program: Program) -> None:
    """The latents' means are off by a thousandth of the deviation."""
    for graph in program.graphs.values():
        statistics = [n for n in graph.nodes if is_constant(n) and n.meta["constant"].numel() == 4]
        assert len(statistics) == 2
        statistics[0].meta["constant"] = statistics[0].meta["constant"] + 1e-3


@pytest.mark.usefixtures("_quick")
@pytest.mark.parametrize("name", ["vae-decoder", "vae-encoder"])
@pytest.mark.parametrize("spoil", [swapped_weights, other_statistics])
def test_a_wrong_codec_fails(
    tmp_path: Path, omni: Path, monkeypatch: pytest.MonkeyPatch, name: str, spoil: Any
) -> None:
    def spoiled(*arguments: Any) -> Program:
        program: Program = harness.remembered_codec(*arguments)
        spoil(program)
        return program

    monkeypatch.setattr(components, "capture_codec", spoiled)
    with pytest.raises(FindingError) as caught:
        build(BuildOptions(omni, tmp_path / "x", components=(name,)))
    assert caught.value.code == "CX601"
    assert f"{name} in ONNX Runtime: " in caught.value.message
    assert harness.leftovers(tmp_path) == []
