"""Files out and in again, through readers that are not ours."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import wave
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from diffusers.video_processor import VideoProcessor
from PIL import Image, ImageOps
from safetensors import safe_open

from cosmos_export.diagnostics import UserError
from cosmos_export.runtime import media, read_media
from cosmos_export.runtime.media import Audio, Mark

MARK = Mark("ab" * 32)


def picture(height: int = 48, width: int = 80, seed: int = 0) -> Any:
    """Smooth, as pictures are: what is lost in compression is small."""
    rows, columns = np.mgrid[0:height, 0:width] / 16
    return np.stack([127 + 100 * np.sin(rows + c + seed) * np.cos(columns) for c in range(3)], axis=-1).astype(np.uint8)


def tone(seconds: float, rate: int = 48_000) -> Any:
    t = np.arange(round(seconds * rate)) / rate
    return np.stack([np.sin(2 * np.pi * 440 * t), 0.5 * np.sin(2 * np.pi * 660 * t)]).astype(np.float32)


def test_png(tmp_path: Path) -> None:
    image = np.random.default_rng(0).integers(0, 256, (17, 31, 3), dtype=np.uint8)
    media.write_png(tmp_path / "x.png", image, MARK)
    with Image.open(tmp_path / "x.png") as read:
        np.testing.assert_array_equal(np.asarray(read), image)
        texts = dict(read.text)
    assert texts["bundle"] == "sha256:" + "ab" * 32
    assert texts["ai_generated"] == "true"
    assert texts["digital_source_type"].endswith("trainedAlgorithmicMedia")
    np.testing.assert_array_equal(read_media.read_image(tmp_path / "x.png"), image)
    assert [p.name for p in tmp_path.iterdir()] == ["x.png"]


def test_wav(tmp_path: Path) -> None:
    sound = tone(0.25)
    media.write_wav(tmp_path / "x.wav", 1.5 * sound, 48_000, MARK)
    with wave.open(str(tmp_path / "x.wav")) as read:
        assert (read.getnchannels(), read.getsampwidth(), read.getframerate()) == (2, 2, 48_000)
        samples = np.frombuffer(read.readframes(read.getnframes()), "<i2").reshape(-1, 2).T
    np.testing.assert_allclose(samples / 32767, np.clip(1.5 * sound, -1, 1), atol=1 / 32767)
    with av.open(str(tmp_path / "x.wav")) as container:
        assert container.metadata["comment"] == MARK.text
        assert container.duration == pytest.approx(250_000, abs=100)


@pytest.mark.parametrize(
    ("fps", "rate"), [(24.0, Fraction(24)), (29.97, Fraction(2997, 100)), (24000 / 1001, Fraction(24000, 1001))]
)
def test_mp4(tmp_path: Path, fps: float, rate: Fraction) -> None:
    frames = np.stack([picture(seed=i) for i in range(9)])
    assert media.write_mp4(tmp_path / "x.mp4", iter([frames[:1], frames[1:5], frames[5:]]), fps, MARK) == 9
    with av.open(str(tmp_path / "x.mp4")) as container:
        stream = container.streams.video[0]
        assert container.metadata["comment"] == MARK.text
        assert (stream.average_rate, stream.frames, stream.codec.name) == (rate, 9, "h264")
        assert (stream.pix_fmt, stream.codec_context.colorspace) == ("yuv420p", 1)
        assert not container.streams.audio
    clip = read_media.read_clip(tmp_path / "x.mp4", 20)
    assert clip.fps == pytest.approx(fps)
    assert np.abs(clip.frames.astype(int) - frames).mean() < 3
    first, last = read_media.read_clip(tmp_path / "x.mp4", 5), read_media.read_clip(tmp_path / "x.mp4", 5, last=True)
    np.testing.assert_array_equal(first.frames, clip.frames[:5])
    np.testing.assert_array_equal(last.frames, clip.frames[-5:])


def test_mp4_with_sound(tmp_path: Path) -> None:
    frames = np.stack([picture(seed=i) for i in range(25)])
    sound = tone(25 / 24)
    media.write_mp4(tmp_path / "x.mp4", iter(np.split(frames, 5)), 24.0, MARK, Audio(sound, 48_000))
    with av.open(str(tmp_path / "x.mp4")) as container:
        (stream,) = container.streams.audio
        assert (stream.codec.name, stream.rate, stream.layout.name) == ("aac", 48_000, "stereo")
        order = [packet.stream.type for packet in container.demux() if packet.size]
    assert "video" in order[order.index("audio") + 1 :], "sound lies behind all of the pictures"
    with av.open(str(tmp_path / "x.mp4")) as container:
        heard = np.concatenate([frame.to_ndarray() for frame in container.decode(audio=0)], axis=1)
    assert abs(heard.shape[1] - sound.shape[1]) < 2048
    for channel in range(2):
        assert np.corrcoef(heard[channel, 4096:40000], sound[channel, 4096:40000])[0, 1] > 0.99


def test_safetensors_and_json(tmp_path: Path) -> None:
    values = np.arange(6, dtype=np.float32).reshape(2, 3)
    media.write_safetensors(tmp_path / "x.safetensors", {"action": values.T}, MARK, units="model")
    with safe_open(tmp_path / "x.safetensors", "numpy") as read:
        np.testing.assert_array_equal(read.get_tensor("action"), values.T)
        assert read.metadata() == {**MARK.fields, "units": "model"}
    media.write_json(tmp_path / "x.json", {"units": "model", "actions": values.tolist()}, MARK)
    document = json.loads((tmp_path / "x.json").read_text())
    assert document["ai_generated"] is True
    assert document["bundle"] == MARK.fields["bundle"]
    assert document["actions"] == values.tolist()


def test_safetensors_are_the_same_bytes_in_every_process(tmp_path: Path) -> None:
    code = (
        "import sys, numpy as np; from pathlib import Path; from cosmos_export.runtime import media\n"
        "tensors = {name: np.arange(5, dtype=kind) for name, kind in zip('abcd', ('f2', 'f4', 'i8', 'u1'))}\n"
        "media.write_safetensors(Path(sys.argv[1]), tensors, media.Mark('ab' * 32), mode='t2v', seed='1')\n"
    )
    paths = [tmp_path / f"{number}.safetensors" for number in range(3)]
    for number, path in enumerate(paths):
        environment = {**os.environ, "PYTHONHASHSEED": str(number)}
        subprocess.run([sys.executable, "-c", code, str(path)], check=True, env=environment)
    first, *others = (path.read_bytes() for path in paths)
    assert others == [first] * 2
    with safe_open(paths[0], "numpy") as read:
        assert read.metadata() == {**MARK.fields, "mode": "t2v", "seed": "1"}
        assert {name: read.get_tensor(name).dtype.name for name in "abcd"} == {
            "a": "float16", "b": "float32", "c": "int64", "d": "uint8",
        }  # fmt: skip
        assert all(read.get_tensor(name).tolist() == [0, 1, 2, 3, 4] for name in "abcd")


def test_what_fails_leaves_nothing_behind(tmp_path: Path) -> None:
    def chunks() -> Any:
        yield picture()[None]
        raise RuntimeError("the generator broke")

    (tmp_path / "x.mp4").write_bytes(b"before")
    with pytest.raises(RuntimeError, match="the generator broke"):
        media.write_mp4(tmp_path / "x.mp4", chunks(), 24.0, MARK)
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("x.mp4", b"before")]


@pytest.mark.parametrize("chunks", [[], [np.zeros((1, 15, 16, 3), np.uint8)]])
def test_no_video_of_nothing_or_of_odd_size(tmp_path: Path, chunks: Any) -> None:
    with pytest.raises(UserError) as caught:
        media.write_mp4(tmp_path / "x.mp4", iter(chunks), 24.0, MARK)
    assert caught.value.code == "CX660"
    assert not list(tmp_path.iterdir())


def test_pixels_are_rounded_as_the_pipeline_does() -> None:
    pixels = np.random.default_rng(0).uniform(-1.2, 1.2, (1, 3, 2, 16, 16)).astype(np.float32)
    pixels[0, 0, 0, 0] = np.linspace(-1, 1, 16)
    processor = VideoProcessor(vae_scale_factor=16, resample="bilinear")
    expected = processor.postprocess_video(torch.from_numpy(pixels), output_type="pil")[0]
    np.testing.assert_array_equal(media.as_bytes(pixels), np.stack([np.asarray(p) for p in expected]))
    unit = processor.postprocess_video(torch.from_numpy(pixels), output_type="np")[0]
    np.testing.assert_array_equal(media.as_unit(pixels), unit)
    frames = media.as_bytes(pixels)
    np.testing.assert_array_equal(media.as_bytes(frames), frames)
    np.testing.assert_array_equal(media.as_unit(frames), frames.astype(np.float32) / 255)
    assert media.frame_count(pixels) == media.frame_count(frames) == 2


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_a_turned_picture_is_read_upright(tmp_path: Path, orientation: int) -> None:
    """As a camera held on its side writes it: diffusers' `load_image` turns it too."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(picture(32, 48)).save(tmp_path / "x.png", exif=exif)
    with Image.open(tmp_path / "x.png") as image:
        expected = np.asarray(ImageOps.exif_transpose(image))
    np.testing.assert_array_equal(read_media.read_image(tmp_path / "x.png"), expected)


@pytest.mark.parametrize(
    ("name", "content"), [("empty.png", b""), ("text.png", b"not a picture"), ("cut.png", None), ("gone.png", ...)]
)
def test_unreadable(tmp_path: Path, name: str, content: Any) -> None:
    path = tmp_path / name
    if content is None:
        media.write_png(path, picture(), MARK)
        path.write_bytes(path.read_bytes()[:300])
    elif content is not ...:
        path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        read_media.read_image(path)
    assert caught.value.code == "CX614"
    assert str(path) in caught.value.message


def test_wrong_kind(tmp_path: Path) -> None:
    media.write_mp4(tmp_path / "x.mp4", iter([np.stack([picture()] * 3)]), 24.0, MARK)
    media.write_wav(tmp_path / "x.wav", tone(0.1), 48_000, MARK)
    with pytest.raises(UserError, match="several frames"):
        read_media.read_image(tmp_path / "x.mp4")
    with pytest.raises(UserError, match="is a WAV file"):
        read_media.read_clip(tmp_path / "x.wav", 5)


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "P", "1"])
def test_pictures_that_are_not_rgb(tmp_path: Path, mode: str) -> None:
    """Alpha is dropped, as by ``convert("RGB")`` in the pipeline."""
    image = Image.fromarray(picture()).convert(mode)
    image.save(tmp_path / "x.png")
    np.testing.assert_array_equal(read_media.read_image(tmp_path / "x.png"), np.asarray(image.convert("RGB")))


def test_a_grey_jpeg(tmp_path: Path) -> None:
    Image.fromarray(picture()).convert("L").save(tmp_path / "x.jpg", quality=95)
    with Image.open(tmp_path / "x.jpg") as image:
        expected = np.asarray(image.convert("RGB")).astype(int)
    assert np.abs(read_media.read_image(tmp_path / "x.jpg").astype(int) - expected).max() <= 2
