"""What a stranger's pictures and clips can be: damaged, mirrored, far too large, no file at all."""

from __future__ import annotations

import os
import struct
import time
import zlib
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


# -- what is said -----------------------------------------------------------------------------------------------------


def test_what_is_shown_otherwise_is_said(tmp_path: Path) -> None:
    images = [picture()] * 4
    assert read_media.read_clip(clip(tmp_path / "plain.mp4", images), 4).notes == ()
    (note,) = read_media.read_clip(clip(tmp_path / "uneven.mp4", images, times=[0, 1, 2, 26]), 4).notes
    assert note.endswith("uneven.mp4 has frames 0.0417 to 1 s apart, which are taken as even")
    assert read_media.read_clip(tmp_path / "uneven.mp4", 3).notes == (), "what is read is even"
    assert read_media.read_clip(tmp_path / "uneven.mp4", 2, last=True).notes == ()
    wide = clip(tmp_path / "wide.mp4", images, sample_aspect_ratio=Fraction(4, 3))
    (note,) = read_media.read_clip(wide, 1).notes
    assert note.endswith("wide.mp4 has pixels of 4:3, which are taken as square: scale it first")
    for curve, name in ((16, "PQ"), (18, "HLG")):
        (note,) = read_media.read_clip(clip(tmp_path / "hdr.mkv", images, color_trc=curve), 1).notes
        assert f"hdr.mkv is HDR ({name})" in note


# -- what is not read -------------------------------------------------------------------------------------------------


def test_playlists_are_not_followed(tmp_path: Path) -> None:
    inner = clip(tmp_path / "inner.mp4", [picture()] * 3)
    hls = "#EXTM3U\n#EXT-X-VERSION:3\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{}\n#EXT-X-ENDLIST\n"
    lists = {
        "a.m3u8": hls.format(f"file://{inner}"),
        "b.m3u8": hls.format(inner),
        "c.mp4": hls.format(inner),
        "d.ffconcat": f"ffconcat version 1.0\nfile '{inner}'\n",
        "e.txt": f"ffconcat version 1.0\nfile {inner.name}\n",
        "f.sdp": "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 5004 RTP/AVP 96\n",
        "g.svg": f'<svg xmlns="http://www.w3.org/2000/svg"><image href="{inner}"/></svg>',
        "h.mpd": '<MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static"></MPD>',
    }
    for name, text in lists.items():
        (tmp_path / name).write_text(text)
        refused(tmp_path / name, "cannot be decoded|no picture")


def test_a_name_with_a_pattern_is_one_file(tmp_path: Path) -> None:
    """FFmpeg's own way of opening a picture takes `%d` for a number and reads the files of all numbers."""
    for number in range(3):
        Image.fromarray(picture()).save(tmp_path / f"x{number}.ppm")
    Image.fromarray(picture()[::-1]).save(tmp_path / "x%d.ppm")
    np.testing.assert_array_equal(read_media.read_image(tmp_path / "x%d.ppm"), picture()[::-1])


def _png(width: int, height: int, kind: int = 2, depth: int = 8) -> bytes:
    """A picture of zeros, as large as its header says and at most 1 MiB of it."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    channels = {0: 1, 2: 3, 6: 4}[kind]
    rows = bytes(min(height * (1 + width * channels * depth // 8), 1 << 20))
    header = struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0)
    data = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows, 1)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + data


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("rgb.png", lambda: _png(60_000, 60_000)),
        ("rgba64.png", lambda: _png(12_000, 6_000, 6)),
        ("grey16.png", lambda: _png(12_000, 6_000, 0, 16)),
        ("x.ppm", lambda: b"P6 60000 60000 255\n" + bytes(1000)),
        (
            "x.pam",
            lambda: b"P7\nWIDTH 9000\nHEIGHT 9000\nDEPTH 1\nMAXVAL 255\nTUPLTYPE GRAYSCALE\nENDHDR\n" + bytes(1000),
        ),
        ("x.bmp", lambda: b"BM" + struct.pack("<IHHIIiiHHIIiiII", 54, 0, 0, 54, 40, 30_000, 30_000, 1, 24, *[0] * 6)),
    ],
)
def test_a_picture_that_is_too_large_is_refused_by_its_header(name: str, content: Any, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content())
    started = time.monotonic()
    refused(tmp_path / name, "pixels|cannot be decoded")
    assert time.monotonic() - started < 2


def test_a_clip_that_needs_too_much_memory_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = clip(tmp_path / "x.mkv", [picture()] * 6)
    monkeypatch.setattr(read_media, "MAX_CLIP_BYTES", 4 * 32 * 48 * 3)
    for last in (False, True):
        with pytest.raises(UserError, match="5 frames of 48 × 32 pixels; allowed for all of them: 18,432 bytes"):
            read_media.read_clip(path, 5, last=last)
        assert read_media.read_clip(path, 4, last=last).frames.shape == (4, 32, 48, 3)
    # Frames that are made small as they are read may be many.
    assert read_media.read_clip(path, 6, each=lambda frame: frame[:, :1]).frames.shape == (6, 1, 48, 3)


def test_a_pipe_or_a_device_is_no_picture(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    refused(tmp_path / "pipe.png", "a pipe, not a file")
    (tmp_path / "zero.mp4").symlink_to("/dev/zero")
    refused(tmp_path / "zero.mp4", "a device, not a file")
    refused(tmp_path, "a directory, not a file")
    with (tmp_path / "large.mp4").open("wb") as file:
        file.truncate(20_000_000_000)
    refused(tmp_path / "large.mp4", "20,000,000,000 bytes; allowed: 17,179,869,184")
