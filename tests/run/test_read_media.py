"""What a stranger's pictures and clips can be: damaged, mirrored, far too large, no file at all."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import damaged_clips
import numpy as np
import pytest
from PIL import Image, ImageOps

from cosmos_export.diagnostics import UserError
from cosmos_export.runtime import read_media


def picture(height: int = 32, width: int = 48) -> Any:
    """No two of its mirror images and turns are alike."""
    return (
        np.random.default_rng(0)
        .integers(0, 255, (height // 8, width // 8, 3), dtype=np.uint8)
        .repeat(8, 0)
        .repeat(8, 1)
    )


def clip(path: Path, images: Any, *, times: Any = None, matrix: Any = None, **settings: Any) -> Path:
    """``images`` as they are, without loss."""
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream("libx264rgb" if path.suffix == ".mkv" else "libx264", rate=24)
        stream.height, stream.width = images[0].shape[:2]
        stream.pix_fmt = "rgb24" if path.suffix == ".mkv" else "yuv444p"
        stream.options = {"qp": "0"}
        if matrix is not None:
            stream.set_display_matrix(matrix)
        for name, value in settings.items():
            setattr(stream.codec_context, name, value)
        for number, image in enumerate(images):
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame.pts = number if times is None else times[number]
            frame.time_base = Fraction(1, 24)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def refused(path: Path, match: str, **options: Any) -> None:
    with pytest.raises(UserError, match=match) as caught:
        read_media.read_clip(path, 5, **options)
    assert caught.value.code == "CX614"
    with pytest.raises(UserError, match=match):
        read_media.read_image(path)


# -- damage -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return damaged_clips.write_whole(tmp_path_factory.mktemp("whole"))


@pytest.mark.parametrize("count", [30, pytest.param(200, marks=pytest.mark.slow)])
def test_a_damaged_clip_is_read_or_refused_and_never_hangs(count: int, whole: list[Path], tmp_path: Path) -> None:
    paths = damaged_clips.write(tmp_path, whole, count)
    answers = dict(damaged_clips.read(paths, timeout_s=30 + count))
    assert list(answers) == paths
    unanswered = {
        path.name: answer for path, answer in answers.items() if answer.split(" ")[0] not in ("read", "CX614")
    }
    assert not unanswered
    assert sum(answer.startswith("CX614") for answer in answers.values()) > count / 2


def test_whole_clips_of_those_kinds_are_read(whole: list[Path]) -> None:
    for path in whole:
        assert read_media.read_clip(path, 100).frames.shape == (24, 544, 960, 3)


def test_a_file_that_takes_too_long_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = clip(tmp_path / "x.mkv", [picture()] * 3)
    monkeypatch.setattr(read_media, "MAX_SECONDS", -1.0)
    refused(path, "reading it takes longer than")


# -- how it is turned -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["png", "jpg", "webp", "tiff", "deep.png"])
def test_a_turned_or_mirrored_picture_is_read_upright(kind: str, orientation: int, tmp_path: Path) -> None:
    """As diffusers' `load_image` does it, also of pictures that FFmpeg decodes (16 bits of grey)."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = Image.fromarray(picture())
    if kind == "deep.png":
        image = Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)
    path = tmp_path / f"x.{kind}"
    image.save(path, exif=exif)
    with Image.open(path) as opened:
        expected = np.asarray(ImageOps.exif_transpose(opened))
    if kind == "deep.png":
        expected = (expected // 257).astype(np.uint8)[..., None].repeat(3, -1)
    found = read_media.read_image(path)
    np.testing.assert_allclose(found.astype(int), expected, atol=int(kind == "deep.png"))  # rounded, not cut off
    np.testing.assert_array_equal(read_media.read_clip(path, 5).frames, found[None])


_ONE = 1 << 16
MATRICES = {
    "as it is": ((1, 0, 0, 1), lambda x: x),
    "mirrored": ((-1, 0, 0, 1), lambda x: x[:, ::-1]),
    "upside down": ((1, 0, 0, -1), lambda x: x[::-1]),
    "half a turn": ((-1, 0, 0, -1), lambda x: x[::-1, ::-1]),
    "transposed": ((0, 1, 1, 0), lambda x: x.swapaxes(0, 1)),
    "a quarter clockwise": ((0, 1, -1, 0), lambda x: np.rot90(x, -1)),
    "a quarter back": ((0, -1, 1, 0), np.rot90),
    "transposed the other way": ((0, -1, -1, 0), lambda x: x[::-1, ::-1].swapaxes(0, 1)),
}


@pytest.mark.parametrize("name", MATRICES)
def test_the_matrix_of_a_clip_is_applied(name: str, tmp_path: Path) -> None:
    (a, b, c, d), turn = MATRICES[name]
    plain = read_media.read_clip(clip(tmp_path / "plain.mp4", [picture()] * 2), 2).frames
    matrix = [a * _ONE, b * _ONE, 0, c * _ONE, d * _ONE, 0, 0, 0, 1 << 30]
    turned = read_media.read_clip(clip(tmp_path / "turned.mp4", [picture()] * 2, matrix=matrix), 2).frames
    np.testing.assert_array_equal(turned, np.stack([turn(frame) for frame in plain]))
