"""Requests in files are read alike by `run` and by `calibrate`: nothing of them is lost without a word."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import run_samples
from run_samples import MARK, ROBOT, manifest

from cosmos_export.bundle import BundleFiles
from cosmos_export.calibration.sources import read_source
from cosmos_export.diagnostics import CosmosExportError
from cosmos_export.in_memory import InMemory
from cosmos_export.options import GenerateOptions, Overrides
from cosmos_export.runtime import media
from cosmos_export.runtime.frontend import prepare
from cosmos_export.runtime.request_file import with_request

REQUEST: dict[str, Any] = {
    "name": "cube", "model_mode": "text2video", "prompt": "A red cube.", "negative_prompt": "blur", "seed": 3,
    "num_frames": 5, "fps": 12, "num_steps": 7, "guidance": 2.5,
}  # fmt: skip


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle directory with its tokenizer, and media beside the requests."""
    root = run_samples.tokenizer(tmp_path_factory.mktemp("requests"))
    media.write_png(root / "image.png", run_samples.picture(64, 96)[0], MARK)
    media.write_mp4(root / "clip.MP4", [run_samples.picture(64, 96, 12)], 24.0, MARK)
    (root / "actions.json").write_text(json.dumps([[0.5] * 10] * 16))
    return root


def request(root: Path, document: object, name: str = "request.json") -> str:
    path = root / name
    path.write_text(document if isinstance(document, str) else json.dumps(document), encoding="utf-8")
    return str(path)


def read(root: Path, document: object, **options: Any) -> tuple[GenerateOptions, tuple[str, ...]]:
    return with_request(GenerateOptions(prompt=request(root, document), **options))


def refused(root: Path, document: object, name: str = "request.json") -> CosmosExportError:
    with pytest.raises(CosmosExportError) as caught:
        with_request(GenerateOptions(prompt=request(root, document, name)))
    assert caught.value.code == "CX600" and name in caught.value.message and caught.value.hint
    return caught.value


def test_a_request_is_run_as_it_says(files: Path) -> None:
    asked = GenerateOptions(prompt=request(files, REQUEST))
    prepared = prepare(asked, BundleFiles(files, manifest()))
    made = prepared.request
    assert (made.mode, made.seed, made.frames, made.fps, made.schedule.steps) == ("t2v", 3, 5, 12.0, 7)
    by_hand = GenerateOptions(
        prompt="A red cube.", negative="blur", seed=3, frames=5, fps=12.0, sampling=Overrides(steps=7, guidance=2.5)
    )
    same = prepare(by_hand, BundleFiles(files, manifest())).request
    assert made.input_ids.tolist() == same.input_ids.tolist()
    assert made.negative_ids is not None and same.negative_ids is not None
    assert made.negative_ids.tolist() == same.negative_ids.tolist()
    assert made.schedule == same.schedule
    assert "request.json is a request" in prepared.notes[0] and "seed" in prepared.notes[0]


@pytest.mark.parametrize("name", ["R.JSON", "r.jsonl", "R.JSONL"])
def test_any_spelling_of_the_ending(files: Path, name: str) -> None:
    asked, _ = with_request(GenerateOptions(prompt=request(files, REQUEST, name)))
    assert (asked.seed, asked.frames) == (3, 5)


def test_a_list_of_one_and_a_byte_order_mark(files: Path) -> None:
    for document in ([REQUEST], "\ufeff" + json.dumps(REQUEST), [{**REQUEST}]):
        assert read(files, document)[0].seed == 3


KEYS: dict[str, tuple[dict[str, Any], str, Any]] = {
    "text": ({"text": "A cup."}, "prompt", "A cup."),
    "prompt_en": ({"prompt_en": "A cup."}, "prompt", "A cup."),
    "caption": ({"caption": "A cup."}, "prompt", "A cup."),
    "caption_json": ({"caption_json": {"subjects": ["a cup"]}}, "prompt", '{"subjects": ["a cup"]}'),
    "prompt-object": ({"prompt": {"subjects": ["a cup"]}}, "prompt", '{"subjects": ["a cup"]}'),
    "negative": ({"prompt": "A", "negative": "blur"}, "negative", "blur"),
    "frames": ({"prompt": "A", "num_output_frames": 9}, "frames", 9),
    "fps": ({"prompt": "A", "frame_rate": 10}, "fps", 10.0),
    "size": ({"prompt": "A", "height": 480, "width": 832}, "width", 832),
    "tier": ({"prompt": "A", "resolution": "480", "aspect_ratio": "16,9"}, "height", 480),
    "portrait": ({"prompt": "A", "resolution": "720p", "aspect_ratio": "9:16"}, "height", 1280),
    "square": ({"prompt": "A", "resolution": 256, "aspect_ratio": "1,1"}, "width", 256),
    "sound": ({"prompt": "A", "enable_sound": True}, "sound", True),
    "mode": ({"prompt": "A", "mode": "image2video"}, "mode", "i2v"),
    "robot": ({"prompt": "A", "domain_name": "umi", "model_mode": "policy"}, "embodiment", "umi"),
    "chunk": ({"prompt": "A", "action_chunk_size": 8}, "chunk", 8),
    "canvas": ({"prompt": "A", "model_mode": "policy", "resolution": "256"}, "tier", 256),
    "view": ({"prompt": "A", "view_point": "wrist_view"}, "viewpoint", "wrist_view"),
    "system": ({"prompt": "A", "use_system_prompt": False}, "system", False),
    "null": ({"prompt": "A", "seed": None, "num_frames": 9}, "seed", 0),
}


@pytest.mark.parametrize("name", KEYS)
def test_each_key_is_the_option_that_says_the_same(files: Path, name: str) -> None:
    document, field, value = KEYS[name]
    found = getattr(read(files, document)[0], field)
    assert (found.value if isinstance(found, InMemory) else found) == value


SAMPLING: dict[str, tuple[dict[str, Any], str, Any]] = {
    "num_steps": ({"num_steps": 4}, "steps", 4),
    "num_inference_steps": ({"num_inference_steps": 4}, "steps", 4),
    "guidance_scale": ({"guidance_scale": 3}, "guidance", 3.0),
    "cfg": ({"cfg_scale": 1.5}, "guidance", 1.5),
    "shift": ({"flow_shift": 5.0}, "shift", 5.0),
    "interval": ({"guidance_interval": [400, 1000]}, "guidance_interval", (400.0, 1000.0)),
}


@pytest.mark.parametrize("name", SAMPLING)
def test_each_key_of_the_schedule(files: Path, name: str) -> None:
    document, field, value = SAMPLING[name]
    assert getattr(read(files, {"prompt": "A", **document})[0].sampling, field) == value


@pytest.mark.parametrize(
    ("name", "field"), [("image.png", "image"), ("clip.MP4", "video"), ("actions.json", "actions")]
)
def test_files_are_beside_the_request(files: Path, name: str, field: str) -> None:
    (files / "sub").mkdir(exist_ok=True)
    key = "action_path" if field == "actions" else "vision_path"
    path = request(files / "sub", {"prompt": "A", key: f"../{name}"})
    asked, _ = with_request(GenerateOptions(prompt=path))
    assert getattr(asked, field) == files / "sub" / ".." / name


def test_options_come_before_the_file(files: Path) -> None:
    asked, notes = read(files, {**REQUEST, "vision_path": "image.png"}, seed=9, frames=17, negative="dark",
                        video=files / "clip.MP4", sampling=Overrides(steps=2))  # fmt: skip
    assert (asked.seed, asked.frames, asked.negative, asked.sampling.steps) == (9, 17, "dark", 2)
    assert asked.video == files / "clip.MP4" and asked.image is None
    assert asked.sampling.guidance == 2.5
    assert "seed" not in notes[0]


def test_keys_that_are_not_read_are_named(files: Path) -> None:
    _, notes = read(files, {**REQUEST, "prompt_upsampler_seed": 1, "camera_speed": "slow"})
    assert "not read: 'prompt_upsampler_seed', 'camera_speed'" in notes[1]


REFUSED: dict[str, tuple[object, str]] = {
    "no-prompt": ({"model_mode": "t2v", "seed": 3}, "without a prompt"),
    "two": ([REQUEST, REQUEST], "2 requests"),
    "lines": (json.dumps(REQUEST) + "\n" + json.dumps(REQUEST), "2 requests"),
    "mode": ({**REQUEST, "model_mode": "audio_image2video"}, "not a mode of this version"),
    "sound": ({**REQUEST, "sound_path": "a.wav"}, "conditioned on sound"),
    "transfer": ({**REQUEST, "control_path": "a.mp4"}, "a transfer"),
    "control": ({**REQUEST, "seg": {"control_path": "a.mp4"}}, "a transfer"),
    "defaults": ({**REQUEST, "defaults_file": "d.json"}, "another file"),
    "url": ({**REQUEST, "vision_path": "https://a/b.png"}, "not on this machine"),
    "missing": ({**REQUEST, "vision_path": "gone.png"}, "not a file beside it"),
    "frames": ({**REQUEST, "num_frames": 9.5}, "not a whole number"),
    "seed": ({**REQUEST, "seed": True}, "not a whole number"),
    "guidance": ({**REQUEST, "guidance": "high"}, "not a number"),
    "flag": ({**REQUEST, "enable_sound": "yes"}, "neither true nor false"),
    "negative": ({**REQUEST, "negative_prompt": ["a"]}, "not text"),
    "tier": ({**REQUEST, "resolution": "1080"}, "known: 256"),
    "aspect": ({**REQUEST, "resolution": "480", "aspect_ratio": "wide"}, "not like 16,9"),
    "interval": ({**REQUEST, "guidance_interval": 400}, "not two numbers"),
    "pointer": ("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3\n", "Git LFS pointer"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_run_is_refused(files: Path, name: str) -> None:
    document, message = REFUSED[name]
    assert message in refused(files, document, "r.jsonl" if name == "lines" else "request.json").message


@pytest.mark.parametrize(
    "document", ['{"subjects": ["a cup"], "fps": 24, "resolution": {"H": 480}, "duration": "5s"}', "{not json", "[1]"]
)
def test_what_is_no_request_is_left_to_the_reader_of_captions(files: Path, document: str) -> None:
    asked = GenerateOptions(prompt=request(files, document, "caption.json"))
    assert with_request(asked) == (asked, ())
    for text in ("A cube.", '{"prompt": "A"}', "gone.json"):
        assert with_request(GenerateOptions(prompt=text)) == (GenerateOptions(prompt=text), ())


def test_a_negative_prompt_that_no_step_reads_is_said(files: Path) -> None:
    asked = GenerateOptions(prompt=request(files, {**REQUEST, "guidance": 1}))
    prepared = prepare(asked, BundleFiles(files, manifest()))
    assert prepared.request.negative_ids is None and "no step is guided" in " ".join(prepared.notes)


def test_a_robots_request(files: Path) -> None:
    document = {"model_mode": "forward_dynamics", "prompt": "Fold.", "domain_name": "umi", "vision_path": "image.png",
                "action_path": "actions.json", "image_size": 256, "action_chunk_size": 16}  # fmt: skip
    asked, _ = read(files, document)
    assert (asked.mode, asked.embodiment, asked.tier, asked.chunk) == ("forward-dynamics", "umi", 256, 16)
    media.write_png(files / "image.png", run_samples.picture(192, 320)[0], MARK)
    made = prepare(asked, BundleFiles(files, manifest({"robot": ROBOT}))).request
    assert made.action is not None and made.action.given is not None and made.action.given[0, 0] == 0.5


@pytest.mark.parametrize("name", ["text", "prompt_en", "caption", "caption_json", "mode"])
def test_calibrate_reads_the_same_keys(files: Path, name: str) -> None:
    (item,) = read_source(request(files, KEYS[name][0])).items
    asked, _ = read(files, KEYS[name][0])
    assert isinstance(asked.prompt, InMemory)
    assert (item.prompt.text, item.mode) == (asked.prompt.value, asked.mode)


def test_calibrate_names_the_keys_that_it_found(files: Path) -> None:
    with pytest.raises(CosmosExportError) as caught:
        read_source(request(files, '{"query": "A cup."}\n', "q.jsonl"))
    assert "'query'" in caught.value.message and "prompt_en" in caught.value.hint


FOLDERS: dict[str, tuple[dict[str, str], list[str]]] = {
    "captions": ({"a.json": '{"subjects": ["a cup"]}', "b.json": '{"subjects": ["a ball"]}'},
                 ['{"subjects": ["a cup"]}', '{"subjects": ["a ball"]}']),
    "capitals": ({"A.JSON": '{"subjects": ["a cup"]}'}, ['{"subjects": ["a cup"]}']),
    "below": ({"sub/a.json": '{"prompt": "A cup."}'}, ["A cup."]),
    "texts": ({"a.txt": "A cup.\nA ball.", "b.TXT": "A box."}, ["A cup.", "A ball.", "A box."]),
    "table": ({"a.csv": 'prompt,num_frames\n"A cup, red.",9\nA ball.,\n'}, ["A cup, red.", "A ball."]),
    "heads": ({"a.csv": "Prompt,FPS\nA cup.,12\n"}, ["A cup."]),
    "tabs": ({"a.tsv": "prompt_en\tid\nA cup.\t1\n"}, ["A cup."]),
    "mixed": ({"a.jsonl": '{"text": "A cup."}', "b.json": '[{"prompt": "A ball."}]', "notes.md": "x"},
              ["A cup.", "A ball."]),
}  # fmt: skip


@pytest.mark.parametrize("name", FOLDERS)
def test_folders_of_captions_are_read(tmp_path: Path, name: str) -> None:
    contents, expected = FOLDERS[name]
    for file, text in contents.items():
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_text(text)
    source = read_source(f"{tmp_path},license=CC0-1.0")
    assert [item.prompt.text for item in source.items] == expected
    assert source.kind == "captions" and source.licence == "CC0-1.0"
    assert len(source.notes) == ("notes.md" in contents)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"title\nA cup.\n", "no prompt"),
        ("a.csv", b"prompt,fps\nA cup.,fast\n", "not a number"),
        ("a.csv", b'prompt\n"A cup.\n', "not a table"),
        ("a.txt", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "Git LFS pointer"),
        ("a.jsonl", b"<!DOCTYPE html><html></html>", "an HTML page"),
        ("a.txt", b"\xff\xfeA\0", "UTF-16"),
        ("a.csv", b"PK\x03\x04" + bytes(40) + b"\xff", "ZIP"),
    ],
)
def test_files_of_data_that_are_something_else(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CosmosExportError) as caught:
        read_source(str(tmp_path / name))
    assert caught.value.code == "CX340" and message in caught.value.message


def test_both_spellings_of_a_licence_are_one_option(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("A cup.")
    with pytest.raises(CosmosExportError, match="given twice"):
        read_source(f"{tmp_path / 'a.txt'},license=a,licence=b")
