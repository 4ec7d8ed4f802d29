"""A demo checkpoint is a checkpoint to everyone who reads Cosmos 3: us, diffusers and transformers."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from collections import namedtuple
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cosmos_export.checkpoint import Checkpoint, demo, open_checkpoint
from cosmos_export.checkpoint.demo import demo_geometry, write_demo_checkpoint
from cosmos_export.checkpoint.published import EDGE, NANO, SUPER
from cosmos_export.checkpoint.random_weights import produce
from cosmos_export.checkpoint.safetensors_writer import TensorHeader, split_shards
from cosmos_export.compiler.request_record import request_record
from cosmos_export.diagnostics import UserError
from cosmos_export.embodiments import policy_embodiment
from cosmos_export.runtime.embodiments import policy_of
from cosmos_export.verb_options import DemoOptions

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")
pytest.importorskip("transformers")


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Any:
    """Threads cost tiny convolutions far more than they give."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Checkpoint]:
    root = tmp_path_factory.mktemp("demo")
    return {variant: open_checkpoint(write_demo_checkpoint(root / variant, variant)) for variant in demo.VARIANTS}


@pytest.fixture(scope="module", params=demo.VARIANTS)
def checkpoint(request: pytest.FixtureRequest, checkpoints: dict[str, Checkpoint]) -> Checkpoint:
    return checkpoints[request.param]


def digests(root: Path) -> dict[str, str]:
    files = sorted(path for path in root.rglob("*") if path.is_file())
    return {str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_it_is_a_checkpoint(checkpoint: Checkpoint) -> None:
    geometry = checkpoint.geometry
    assert (geometry.num_hidden_layers, geometry.hidden_size, geometry.vocab_size) == (3, 64, 512)
    assert checkpoint.unused == ()
    assert geometry.unknown_keys == {}
    assert checkpoint.precision == "fp32"
    components = {"transformer", "vae", "scheduler", "text_tokenizer", "vision_encoder"}
    assert set(checkpoint.components) == components | ({"sound_tokenizer"} if geometry.sound_gen else set())
    assert sum(path.stat().st_size for path in checkpoint.files()) < 5_000_000


def test_the_pipeline_loads_and_runs(checkpoint: Checkpoint) -> None:
    from diffusers import Cosmos3OmniPipeline

    pipeline = Cosmos3OmniPipeline.from_pretrained(checkpoint.root)
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    result = pipeline(
        prompt="a robot",
        num_frames=1,
        height=32,
        width=48,
        num_inference_steps=1,
        output_type="np",
        generator=generator,
    )
    video = np.asarray(result.video)
    assert video.shape == (1, 32, 48, 3)
    assert np.isfinite(video).all()
    assert video.std() > 0.01


def test_the_model_has_our_bytes_and_nothing_else(checkpoint: Checkpoint) -> None:
    from diffusers import Cosmos3OmniTransformer

    model, report = Cosmos3OmniTransformer.from_pretrained(checkpoint.root / "transformer", output_loading_info=True)
    assert not any(report.values())
    for name, value in model.state_dict().items():
        np.testing.assert_array_equal(value.numpy(), checkpoint.tensors[name].array())


def test_the_reasoner_loads_with_nothing_missing_and_nothing_unexpected(checkpoint: Checkpoint) -> None:
    import transformers
    from transformers import AutoTokenizer

    omni = checkpoint.geometry.family == "omni"
    name = "Cosmos3OmniForConditionalGeneration" if omni else "Cosmos3EdgeForConditionalGeneration"
    model, report = getattr(transformers, name).from_pretrained(checkpoint.root, output_loading_info=True)
    assert not any(report.values())
    state = model.state_dict()
    query = checkpoint.tensors["layers.1.self_attn.to_q.weight"].array()
    np.testing.assert_array_equal(state["model.language_model.layers.1.self_attn.q_proj.weight"].numpy(), query)
    patch = "model.visual.patch_embed.proj.bias" if omni else "model.visual.embeddings.patch_embedding.bias"
    vision = checkpoint.component_tensors["vision_encoder"]
    on_disk = vision[patch.removeprefix("model.visual.") if omni else patch].array()
    np.testing.assert_array_equal(state[patch].numpy(), on_disk)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint.root / "text_tokenizer")
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    answer = model.generate(**prompt, max_new_tokens=2, do_sample=False)
    assert answer.shape[1] == prompt["input_ids"].shape[1] + 2


def test_the_tokenizer_is_the_byte_level_alphabet(checkpoint: Checkpoint) -> None:
    from tokenizers import pre_tokenizers
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(checkpoint.root / "text_tokenizer")
    vocab = tokenizer.get_vocab()
    assert set(pre_tokenizers.ByteLevel.alphabet()) < set(vocab)
    assert sorted(vocab.values()) == list(range(263))
    text = "Grüße, ロボット 🤖\n\x00\x7f"
    ids = tokenizer(text)["input_ids"]
    assert ids == list(text.encode())
    assert tokenizer.decode(ids) == text
    config = (checkpoint.root / "config.json").read_text()
    for token in ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"):
        assert str(tokenizer.convert_tokens_to_ids(token)) in config


def test_no_weight_is_an_identity(checkpoint: Checkpoint) -> None:
    everything = {**checkpoint.tensors}
    for tensors in checkpoint.component_tensors.values():
        everything.update(tensors)
    for name, entry in everything.items():
        values = entry.array().astype(np.float64)
        if entry.elements > 1:
            assert values.std() > 1e-3, name
        if "norm" in name and name.endswith("weight"):
            assert 0.5 < values.mean() < 1.5, name


def test_same_seed_same_bytes_in_any_process_and_another_seed_others(
    checkpoints: dict[str, Checkpoint], tmp_path: Path
) -> None:
    script = (
        "from pathlib import Path\n"
        "from cosmos_export.checkpoint.demo import write_demo_checkpoint\n"
        f"write_demo_checkpoint(Path({str(tmp_path / 'again')!r}))\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, env={**os.environ, "PYTHONHASHSEED": "7"})
    first = digests(checkpoints["omni"].root)
    assert digests(tmp_path / "again") == first
    other = digests(write_demo_checkpoint(tmp_path / "other", seed=1))
    weights = {name for name in first if name.endswith(".safetensors")}
    assert {name for name in first if other[name] != first[name]} == weights


def test_sharded_bfloat16(tmp_path: Path) -> None:
    root = write_demo_checkpoint(tmp_path / "demo", dtype="bfloat16", shard_size=100_000)
    checkpoint = open_checkpoint(root)
    assert checkpoint.precision == "bf16"
    shards = sorted(path.name for path in (root / "transformer").glob("*.safetensors"))
    assert shards[0] == f"diffusion_pytorch_model-00001-of-{len(shards):05d}.safetensors"
    assert len(shards) > 5
    from diffusers import Cosmos3OmniTransformer

    model = Cosmos3OmniTransformer.from_pretrained(root / "transformer", torch_dtype=torch.bfloat16)
    assert model.time_embedder.linear_1.weight.dtype == torch.float32
    assert checkpoint.tensors["time_embedder.linear_1.weight"].dtype == "BF16"
    import transformers

    _, report = transformers.Cosmos3OmniForConditionalGeneration.from_pretrained(root, output_loading_info=True)
    assert not any(report.values())


def test_bytes_do_not_depend_on_shards_or_but_for_a_factor_on_the_number_of_layers(
    checkpoints: dict[str, Checkpoint], tmp_path: Path
) -> None:
    """What ends a residual branch is smaller the more of them there are."""
    few = open_checkpoint(write_demo_checkpoint(tmp_path / "few", layers=1, shard_size=50_000))
    factors = {}
    for name, entry in few.tensors.items():
        one, three = entry.array(), checkpoints["omni"].tensors[name].array()
        if one.tobytes() != three.tobytes():
            factors[name.split(".")[-2]] = np.unique((one / three).round(5)).tolist()
    assert factors == {name: [pytest.approx(3**0.5, abs=1e-4)] for name in ("to_out", "to_add_out", "down_proj")}


def test_the_stream_is_as_large_behind_the_layers_as_before_them(checkpoint: Checkpoint) -> None:
    from cosmos_export.evaluation.cases import CASES
    from cosmos_export.evaluation.reference import Reference

    reference = Reference(checkpoint.root / "transformer", torch.float32)
    sizes: list[float] = []

    def behind(_: Any, given: Any, result: Any) -> None:
        sizes.extend([given[1].std().item(), result[1].std().item()])

    for layer in reference.transformer.layers:
        layer.register_forward_hook(behind)
    modalities = ("vision", "sound", "action") if checkpoint.geometry.sound_gen else ("vision", "action")
    case = CASES[4]
    reference.step(case.inputs(checkpoint.geometry.config, modalities), case.fps)
    assert len(sizes) == 6 and 1 < sizes[-1] / sizes[0] < 2


def test_a_tensor_of_many_chunks_is_whole_and_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    from cosmos_export.checkpoint import random_weights

    monkeypatch.setattr(random_weights, "_CHUNK", 1000)
    spec = TensorHeader("w", "F32", (123, 457))
    sizes: list[int] = []
    once = b"".join(bytes(piece) for piece in produce(0, on_bytes=sizes.append)(spec))
    assert once == b"".join(bytes(piece) for piece in produce(0)(spec))
    assert len(once) == sum(sizes) == spec.size_bytes
    values = np.frombuffer(once, np.float32)
    assert values.std() == pytest.approx(457**-0.5, rel=0.02)
    assert len(np.unique(values)) > 0.99 * len(values)


def test_shards_keep_order_and_size() -> None:
    specs = [TensorHeader(str(index), "U8", (size,)) for index, size in enumerate([4, 4, 20, 1, 9, 1])]
    assert [[spec.name for spec in shard] for shard in split_shards(specs, 10)] == [
        ["0", "1"],
        ["2"],
        ["3", "4"],
        ["5"],
    ]


@pytest.mark.parametrize(("name", "published"), [("nano", NANO), ("super", SUPER), ("edge", EDGE)])
def test_true_width(name: str, published: Any) -> None:
    options = DemoOptions(Path("unused"), published.family, true_width=name)
    assert demo_geometry(replace(options, layers=published.num_hidden_layers)) == published
    assert demo_geometry(options).num_hidden_layers == 2


def test_true_width_of_a_few_rows(tmp_path: Path) -> None:
    """Edge with a small vocabulary: the published widths of a layer in 250 MB."""
    root = write_demo_checkpoint(
        tmp_path / "demo", "edge", true_width="edge", layers=1, vocab=300, dtype="bfloat16", domains=2
    )
    geometry = open_checkpoint(root).geometry
    assert (geometry.hidden_size, geometry.head_dim, geometry.latent_channel) == (2048, 128, 48)
    assert geometry.rope_axes_dim == (24, 20, 20)


def test_progress_counts_the_bytes(tmp_path: Path) -> None:
    calls: list[tuple[str, str, int]] = []

    class Recorder:
        def begin(self, task: str, total: int | None = None) -> None:
            calls.append(("begin", task, total or 0))

        def update(self, task: str, completed: int) -> None:
            calls.append(("update", task, completed))

        def end(self, task: str) -> None:
            calls.append(("end", task, 0))

    write_demo_checkpoint(tmp_path / "demo", "edge", progress=Recorder())
    assert [task for kind, task, _ in calls if kind == "begin"] == ["transformer", "vae", "vision_encoder"]
    total = next(value for kind, task, value in calls if (kind, task) == ("begin", "transformer"))
    updates = [value for kind, task, value in calls if (kind, task) == ("update", "transformer")]
    assert updates == sorted(updates)
    assert updates[-1] == total


# What it refuses


def refuses(code: str, words: str, *arguments: Any, **options: Any) -> UserError:
    with pytest.raises(UserError) as caught:
        write_demo_checkpoint(*arguments, **options)
    assert caught.value.code == code
    assert words in caught.value.message
    assert caught.value.hint
    return caught.value


def test_existing_output(tmp_path: Path) -> None:
    target = tmp_path / "demo"
    target.mkdir()
    refuses("CX130", "exists", target)
    (target / "precious.txt").write_text("mine")
    refuses("CX130", "not a checkpoint directory", target, force=True)
    assert (target / "precious.txt").read_text() == "mine"
    link = tmp_path / "link"
    link.symlink_to(target)
    refuses("CX130", "not a checkpoint directory", link, force=True)


def test_force_replaces_a_checkpoint_and_leaves_nothing_behind(tmp_path: Path) -> None:
    target = write_demo_checkpoint(tmp_path / "demo", "edge", seed=0)
    before = digests(target)
    write_demo_checkpoint(target, "edge", seed=1, force=True)
    assert digests(target) != before
    assert [path.name for path in tmp_path.iterdir()] == ["demo"]


def test_what_a_killed_process_of_the_same_number_left_is_in_nobodys_way(tmp_path: Path) -> None:
    (tmp_path / f".new.writing-{os.getpid()}").mkdir()
    write_demo_checkpoint(tmp_path / "new", layers=1)
    assert open_checkpoint(tmp_path / "new").geometry.num_hidden_layers == 1


def test_an_interrupted_write_leaves_nothing_and_keeps_the_old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = write_demo_checkpoint(tmp_path / "demo", "edge")
    before = digests(target)

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(demo.components, "write_tokenizer", interrupted)
    for output in (target, tmp_path / "new"):
        with pytest.raises(KeyboardInterrupt):
            write_demo_checkpoint(output, "edge", force=True)
    assert digests(target) == before
    assert [path.name for path in tmp_path.iterdir()] == ["demo"]


def test_no_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10, 9, 30_000_000_000))
    refuses("CX131", "needs 28.3 GiB", tmp_path / "a" / "demo", true_width="nano", layers=36, dtype="bfloat16")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"variant": "nano"}, "variant 'nano' is not one of omni, edge"),
        ({"dtype": "int8"}, "dtype 'int8' is not one of"),
        ({"true_width": "huge"}, "true width 'huge' is not one of nano, super, edge"),
        ({"variant": "omni", "true_width": "edge"}, "belongs to variant edge, not omni"),
        ({"vocab": 200}, "a vocabulary of 200 cannot hold the tokenizer's 263 tokens"),
        ({"heads": 3}, "num_attention_heads = 3 is not a multiple"),
        ({"layers": 0}, "num_hidden_layers = 0 is outside"),
        ({"head_dim": 2}, "add up to half of head_dim"),
        ({"variant": "edge", "sound_dim": 8}, "variant edge has no sound"),
        ({"shard_size": 0}, "shard size 0 is not positive"),
    ],
)
def test_bad_options(tmp_path: Path, options: dict[str, Any], words: str) -> None:
    error = refuses("CX132", words, tmp_path / "demo", **options)
    assert "config.json" not in error.message
    assert not any(tmp_path.iterdir())


# -- true size --------------------------------------------------------------------------------------------------------

TRUE_SIZE = {
    "nano": {"transformer": 15_173_669_120, "vae": 704_688_668, "sound_tokenizer": 496_286_720},
    "edge": {"transformer": 3_369_657_024, "vae": 704_688_668},
}
"""Parameters of the published models."""


@pytest.mark.parametrize("size", TRUE_SIZE)
def test_a_sparse_checkpoint_of_true_size_takes_no_room(size: str, tmp_path: Path) -> None:
    variant = "edge" if size == "edge" else "omni"
    checkpoint = open_checkpoint(write_demo_checkpoint(tmp_path / size, variant, like=size, sparse=True))
    assert (checkpoint.variant, checkpoint.precision) == (size, "bf16")
    expected = TRUE_SIZE[size]
    assert sum(tensor.elements for tensor in checkpoint.expected.values()) == expected.pop("transformer")
    for component, parameters in expected.items():
        found = sum(entry.elements for entry in checkpoint.component_tensors[component].values())
        assert found == pytest.approx(parameters, rel=1e-3), component
    on_disk = sum(path.stat().st_blocks * 512 for path in checkpoint.root.rglob("*"))
    assert on_disk < 128 << 20
    # No two tensors are alike, and only the first pages of each are anything but zero.
    weights = [entry for entry in checkpoint.tensors.values() if entry.elements > 1 << 20]
    heads = {entry.mapped().reshape(-1)[:64].tobytes() for entry in weights}
    assert len(heads) == len(weights)
    assert not weights[0].array().reshape(-1)[32_768:1_000_000].any()


def test_true_size_with_few_layers_keeps_every_width(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write_demo_checkpoint(tmp_path / "few", like="nano", layers=2, sparse=True))
    assert (checkpoint.geometry.num_hidden_layers, checkpoint.geometry.hidden_size) == (2, 4096)


@pytest.mark.parametrize(
    ("options", "said"), [({"like": "nano", "true_width": "nano"}, "both"), ({"like": "big"}, "big")]
)
def test_what_a_true_size_cannot_be(options: dict[str, str], said: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=said):
        write_demo_checkpoint(tmp_path / "none", **options)


def test_a_policy_and_a_distilled_one(tmp_path: Path) -> None:
    """What they say of themselves is what the published ones say."""
    policy = open_checkpoint(write_demo_checkpoint(tmp_path / "a", policy="droid_lerobot", use_state=True))
    assert policy.policy == {"domain_name": "droid_lerobot", "use_state": True}
    robot = policy_of(request_record(policy, ("vision", "action"), None))
    assert robot == policy_embodiment("droid_lerobot") and robot.history == 1
    silent = open_checkpoint(write_demo_checkpoint(tmp_path / "b", policy="umi"))
    assert silent.policy == {"domain_name": "umi"}
    distilled = open_checkpoint(write_demo_checkpoint(tmp_path / "c", distilled=True))
    assert distilled.distilled_sigmas == (1.0, 0.9375, 0.8333333333333334, 0.625)
    for options in ({"use_state": True}, {"distilled": True, "policy": "umi"}):
        with pytest.raises(UserError) as caught:
            write_demo_checkpoint(tmp_path / "d", **options)
        assert caught.value.code == "CX132"
