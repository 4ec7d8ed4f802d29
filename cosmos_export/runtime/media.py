"""Pictures, clips and sound into files, with PyAV alone. `read_media` reads them.

What is written appears under its name whole or not at all, and says in its own metadata that it is AI-generated and by
which bundle (`Mark`).
"""

from __future__ import annotations

import json
import os
import struct
import wave
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from cosmos_export.checkpoint import dtypes
from cosmos_export.checkpoint.safetensors_writer import TensorHeader, encode_header
from cosmos_export.diagnostics import ToolError, UnsupportedError, UserError
from cosmos_export.release import VERSION

if TYPE_CHECKING:
    from av.container import OutputContainer

Frames = NDArray[np.uint8]
"""[frames, height, width, 3] RGB."""


@dataclass(frozen=True)
class Mark:
    """The mark of origin of every output."""

    bundle_id: str
    """SHA-256 of the bundle's ``manifest.json``."""

    @property
    def fields(self) -> dict[str, str]:
        """The mark as names and values; the source type is that of the IPTC's vocabulary for such media."""
        return {
            "ai_generated": "true",
            "digital_source_type": "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia",
            "generator": f"cosmos-export {VERSION}",
            "bundle": f"sha256:{self.bundle_id}",
        }

    @property
    def text(self) -> str:
        """The mark as one line, for formats that have a comment and no fields of one's own."""
        return "AI-generated; " + "; ".join(f"{name}={value}" for name, value in self.fields.items())


# Frames come in two forms: bytes [n, H, W, 3], or what a decoder makes, float [1, 3, n, H, W] in [−1, 1].


def frame_count(chunk: NDArray[Any]) -> int:
    """How many frames ``chunk`` has, in either form."""
    return int(chunk.shape[0] if chunk.dtype == np.uint8 else chunk.shape[-3])


def as_bytes(chunk: NDArray[Any]) -> Frames:
    """``chunk`` as bytes, rounded as the published pipeline does."""
    return chunk if chunk.dtype == np.uint8 else np.round(as_unit(chunk) * np.float32(255)).astype(np.uint8)


def as_unit(chunk: NDArray[Any]) -> NDArray[np.float32]:
    """``chunk`` as float32 [n, H, W, 3] in [0, 1]."""
    if chunk.dtype == np.uint8:
        return np.asarray(chunk / np.float32(255), dtype=np.float32)
    clip = chunk.reshape(chunk.shape[-4:]).astype(np.float32)
    unit = np.clip(clip * np.float32(0.5) + np.float32(0.5), 0, 1)
    return np.ascontiguousarray(unit.transpose(1, 2, 3, 0))


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary file beside ``path`` to write to; it takes the name when the block ends well and goes when not."""
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}{path.suffix}")
    try:
        yield partial
        with partial.open("rb") as written:
            os.fsync(written.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_png(path: Path, image: Frames, mark: Mark) -> None:
    """``image`` [height, width, 3] as PNG with the mark in its text chunks."""
    height, width, _ = image.shape
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)  # 8 bits of RGB
    above = np.concatenate([np.zeros_like(image[:1]), image[:-1]])
    filtered = np.full((height, 1 + 3 * width), 2, dtype=np.uint8)  # filter 2: what differs from the row above
    filtered[:, 1:] = (image - above).reshape(height, -1)
    texts = {**mark.fields, "Software": mark.fields["generator"], "Comment": mark.text}
    with replacing(path) as partial, partial.open("wb") as file:
        file.write(b"\x89PNG\r\n\x1a\n")
        file.write(_chunk(b"IHDR", header))
        for name, value in texts.items():
            file.write(_chunk(b"tEXt", name.encode("latin-1") + b"\0" + value.encode("latin-1")))
        file.write(_chunk(b"IDAT", zlib.compress(filtered.tobytes(), 6)))
        file.write(_chunk(b"IEND", b""))


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def to_pcm(sound: NDArray[Any]) -> NDArray[np.int16]:
    """float [channels, samples] in [−1, 1] as int16 [samples, channels]; what is beyond is cut off."""
    return np.asarray(np.round(np.clip(sound.T, -1, 1) * 32767), dtype="<i2")


def write_wav(path: Path, sound: NDArray[Any], rate: int, mark: Mark) -> None:
    """``sound`` float [channels, samples] as 16-bit WAV, ``rate`` samples per second, the mark in a LIST/INFO chunk."""
    with replacing(path) as partial:
        with wave.open(str(partial), "wb") as file:
            file.setnchannels(sound.shape[0])
            file.setsampwidth(2)
            file.setframerate(rate)
            file.writeframes(to_pcm(sound).tobytes())
        info = b"INFO" + b"".join(
            _riff(name, value.encode("ascii") + b"\0")
            for name, value in ((b"ICMT", mark.text), (b"ISFT", mark.fields["generator"]))
        )
        with partial.open("r+b") as raw:
            raw.seek(0, os.SEEK_END)
            raw.write(_riff(b"LIST", info))
            size = raw.tell()
            raw.seek(4)
            raw.write(struct.pack("<I", size - 8))


def _riff(name: bytes, data: bytes) -> bytes:
    return name + struct.pack("<I", len(data)) + data + b"\0" * (len(data) % 2)


def write_safetensors(path: Path, tensors: Mapping[str, NDArray[Any]], mark: Mark, **extra: str) -> None:
    """``tensors`` with the mark and ``extra`` in the file's metadata. The bytes follow from the values: the reference
    implementation writes metadata in an order that changes from process to process."""
    # Wider elements come first, so that each begins at a multiple of its size.
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].dtype.itemsize, item[0]))
    specs = [TensorHeader(name, dtypes.name_of(value.dtype), value.shape) for name, value in ordered]
    with replacing(path) as partial, partial.open("wb") as file:
        file.write(encode_header(specs, {**mark.fields, **extra}))
        for _, value in ordered:
            file.write(np.ascontiguousarray(value, value.dtype.newbyteorder("<")).tobytes())


def write_json(path: Path, document: Mapping[str, Any], mark: Mark) -> None:
    """``document`` with the mark's fields before its own. A list of numbers takes one line."""
    fields: dict[str, Any] = {**mark.fields, "ai_generated": True, **document}
    lines = []
    for name, value in fields.items():
        if isinstance(value, list) and value and isinstance(value[0], list):
            rows = ",\n    ".join(json.dumps(row, allow_nan=False) for row in value)
            lines.append(f"  {json.dumps(name)}: [\n    {rows}\n  ]")
        else:
            lines.append(f"  {json.dumps(name)}: {json.dumps(value, ensure_ascii=False, allow_nan=False)}")
    with replacing(path) as partial:
        partial.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


@dataclass(frozen=True)
class Audio:
    """Sound that goes with a clip: float [channels, samples] and samples per second."""

    samples: NDArray[Any]
    rate: int


def write_mp4(path: Path, chunks: Iterable[Frames], fps: float, mark: Mark, audio: Audio | None = None) -> int:
    """``chunks`` of frames [n, height, width, 3], one after the other, as H.264 (MPEG-4 Part 2 where FFmpeg was built
    without x264) in yuv420p of BT.709, with ``audio`` as AAC. Holds one chunk at a time; returns the number of frames.

    The rate is exactly ``fps`` as it is written in decimals. CX660: height or width is odd, or no frame came.
    """
    av = require_av()
    count = 0
    with replacing(path) as partial:
        try:
            with av.open(str(partial), "w", options={"movflags": "+faststart"}) as container:
                container.metadata.update(title="AI-generated video", comment=mark.text)
                track = _AudioTrack(container, audio) if audio is not None else None
                stream = None
                for chunk in chunks:
                    if stream is None:
                        stream = _video_stream(container, chunk.shape[1], chunk.shape[2], fps)
                    for image in chunk:
                        frame = av.VideoFrame.from_ndarray(image, format="rgb24")
                        frame = frame.reformat(format="yuv420p", dst_colorspace="ITU709", dst_color_range="MPEG")
                        frame.pts = count
                        frame.time_base = 1 / _rate(fps)
                        container.mux(stream.encode(frame))
                        count += 1
                    if track is not None:
                        track.write_until(count / fps)
                if stream is None:
                    raise UserError("CX660", f"{path}: not one frame to write")
                container.mux(stream.encode(None))
                if track is not None:
                    track.close()
        except av.error.FFmpegError as error:
            raise ToolError("CX661", f"FFmpeg could not write {path}: {error}", "is there room on the disk?") from error
    return count


def _rate(fps: float) -> Fraction:
    """The decimal value of ``fps``, not the binary fraction that approximates it; FFmpeg's numbers have 31 bits."""
    return Fraction(repr(fps)).limit_denominator(1_000_000)


def _video_stream(container: OutputContainer, height: int, width: int, fps: float) -> Any:
    import av

    if height % 2 or width % 2:
        raise UserError("CX660", f"{width} × {height} pixels: a video of this kind has an even height and width")
    codec = "libx264" if "libx264" in av.codecs_available else "mpeg4"
    stream: Any = container.add_stream(codec, rate=_rate(fps))
    stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
    stream.options = {"crf": "18", "preset": "medium"} if codec == "libx264" else {"q": "2"}
    context = stream.codec_context
    context.colorspace = context.color_primaries = context.color_trc = 1  # BT.709
    context.color_range = 1  # 16 to 235
    return stream


class _AudioTrack:
    """An AAC track that is written as far as the video has come, so that a player need not seek."""

    def __init__(self, container: OutputContainer, audio: Audio) -> None:
        layout = {1: "mono", 2: "stereo"}[audio.samples.shape[0]]
        self._container = container
        self._stream: Any = container.add_stream("aac", rate=audio.rate, layout=layout)
        self._stream.bit_rate = 96_000 * audio.samples.shape[0]
        self._samples = np.ascontiguousarray(np.clip(audio.samples, -1, 1), dtype=np.float32)
        self._rate, self._layout, self._done = audio.rate, layout, 0

    def write_until(self, seconds: float) -> None:
        self._write(min(round(seconds * self._rate), self._samples.shape[1]))

    def close(self) -> None:
        self._write(self._samples.shape[1])
        self._container.mux(self._stream.encode(None))

    def _write(self, end: int) -> None:
        import av

        if end <= self._done:
            return
        part = np.ascontiguousarray(self._samples[:, self._done : end])
        frame = av.AudioFrame.from_ndarray(part, format="fltp", layout=self._layout)
        frame.sample_rate, frame.pts, frame.time_base = self._rate, self._done, Fraction(1, self._rate)
        self._container.mux(self._stream.encode(frame))
        self._done = end


def require_av() -> Any:
    """PyAV, imported late and silent: what matters comes as an exception. CX802 where it is not installed."""
    try:
        import av
    except ImportError as error:
        raise missing("PyAV") from error
    av.logging.set_level(av.logging.PANIC)
    return av


def missing(package: str) -> UnsupportedError:
    """The error for a ``package`` that reading or writing needs."""
    return UnsupportedError(
        "CX802", f"this needs {package}, which is not installed", "pip install '.[run]' in the checkout"
    )
