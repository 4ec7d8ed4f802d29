"""Pictures, clips and sound from files: upright RGB bytes, or an error, whatever the file holds.

A picture is decoded by Pillow, as the published pipeline does, a clip by FFmpeg through PyAV. A file is a stranger's:

- it is opened by `files` and handed over as bytes, so that no name in it (a playlist, a reference) opens another;
- sizes are known and allowed before memory is taken, and no file takes longer than `MAX_SECONDS`;
- decoders have no threads of their own: PyAV waits for such threads with the interpreter's lock held when a damaged
  clip is closed, and they wait for the lock;
- what a decoder would hide or guess (lost blocks) is an error; what is read otherwise than it is shown is a note.
"""

from __future__ import annotations

import struct
import time
import warnings
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from io import FileIO
from itertools import islice, pairwise
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from cosmos_export import files, kinds
from cosmos_export.diagnostics import UserError
from cosmos_export.in_memory import InMemory
from cosmos_export.runtime.media import Frames, missing, require_av

__all__ = ["Clip", "Frames", "has_sound", "read_clip", "read_image", "read_picture", "read_sound"]

MAX_PIXELS = 1 << 26
"""Pixels of a frame that is read. Nothing the model generates comes near."""
MAX_FRAME_BYTES = 4 * MAX_PIXELS
"""Bytes of a frame as its decoder holds it: deep colours take fewer pixels."""
MAX_CLIP_BYTES = 2 * files.GIB
"""Bytes of all frames that are kept of a clip."""
MAX_FILE_BYTES = 16 * files.GIB
MAX_PICTURE_BYTES = 256 * files.MIB
"""Bytes of a file that may be a still picture."""
MAX_SECONDS = 300.0
"""Time for one file."""

# Containers and pictures that hold their data themselves. Playlists (hls, concat, dash, imf, image2) name other files.
_FORMATS = (
    "3dostr,apng,asf,av1,avi,bmp_pipe,dpx_pipe,dv,exr_pipe,flv,gif,gif_pipe,h263,h264,hdr_pipe,hevc,ivf,j2k_pipe,"
    "jpeg_pipe,jpegls_pipe,jpegxl_anim,jpegxl_pipe,matroska,webm,m4v,mjpeg,mov,mp4,m4a,3gp,3g2,mj2,mpeg,mpegts,"
    "mpegvideo,mxf,nut,obu,ogg,pam_pipe,pbm_pipe,pcx_pipe,pfm_pipe,pgm_pipe,pgmyuv_pipe,png_pipe,ppm_pipe,psd_pipe,"
    "qoi_pipe,rm,sgi_pipe,sunrast_pipe,tiff_pipe,vc1,vvc,wav,webp_pipe,xbm_pipe,xpm_pipe,xwd_pipe,yuv4mpegpipe"
)
_OPTIONS = {
    "format_whitelist": _FORMATS,
    "protocol_whitelist": "none",
    "max_pixels": str(MAX_PIXELS),
    "err_detect": "crccheck+bitstream+buffer+explode",
}
_PICTURES = ("PNG", "JPEG", "WEBP", "BMP", "TIFF")
_EIGHT_BITS = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr")
"""Modes of Pillow that become RGB without a loss that is not meant; FFmpeg reads the others."""
_ORIENTATION = 0x0112
_HDR = {16: "PQ", 18: "HLG"}
_UNEVEN = 1.5
"""Between frames that are this many times as far apart as others the rate is not one number."""


@dataclass(frozen=True)
class Clip:
    """Frames that were read, and how many a second the file says it has (None: a still picture)."""

    frames: NDArray[Any]
    """`Frames`, or what they were made into as they were read."""
    fps: float | None
    notes: tuple[str, ...] = ()
    """Properties that are read otherwise than a player shows them."""


def read_image(path: Path) -> Frames:
    """The picture in ``path`` as [height, width, 3]; CX614 if it is none, or a clip of several frames."""
    return np.asarray(read_picture(path).frames[0])


def read_picture(path: Path | InMemory[Frames]) -> Clip:
    """The picture in ``path`` as a clip of one frame; CX614 as `read_image`."""
    if isinstance(path, InMemory):
        if len(path.value) != 1:
            raise UserError(
                "CX614", f"{path}: {len(path.value)} frames where one picture is expected", "pass a clip as `video`"
            )
        return Clip(path.value, None)
    still = _still(path)
    if isinstance(still, Clip):
        return still
    with _opened(path, still) as medium:
        frames = list(islice(medium.frames(), 2))
        if not frames:
            _refuse(path, "no picture in it")
        if len(frames) > 1:
            _refuse(path, "a clip of several frames where one picture is expected")
        return Clip(medium.pixels(frames[0]), None, medium.notes([]))


def read_clip(
    path: Path | InMemory[Frames],
    count: int,
    *,
    last: bool = False,
    skip: int = 0,
    each: Callable[[Frames], NDArray[Any]] | None = None,
) -> Clip:
    """The first ``count`` frames of the clip in ``path``, or the last; fewer if it has fewer.

    ``skip`` frames are left out before the first. A still picture is a clip of one frame. ``each`` is applied to every
    frame [1, height, width, 3] as it is read, so that large ones need not be in memory together. CX614 if there is no
    frame.
    """
    if isinstance(path, InMemory):
        frames = path.value[-count:] if last else path.value[skip : skip + count]
        if not len(frames):
            raise UserError("CX614", f"{path}: no frame in it", "pass at least one")
        return Clip(frames if each is None else np.concatenate([each(frame[None]) for frame in frames]), None)
    still = _still(path)
    if isinstance(still, Clip):
        if skip:
            _refuse(path, "no frame in it")
        return still if each is None else Clip(each(still.frames), None, still.notes)
    with _opened(path, still) as medium:
        kept: list[NDArray[Any]] = []
        times: list[int | None] = []
        for frame in _end(medium, count) if last else islice(medium.frames(), skip, skip + count):
            image = medium.pixels(frame)
            kept.append(image if each is None else each(image))
            times.append(frame.pts)
            medium.require_memory(sum(image.nbytes for image in kept), count, frame)
        if not kept:
            _refuse(path, "no frame in it")
        rate = medium.stream.average_rate
        return Clip(np.concatenate(kept), float(rate) if rate and len(kept) > 1 else None, medium.notes(times))


def _end(medium: _Medium, count: int) -> Iterator[Any]:
    """The last ``count`` frames. All are decoded, as a player does it, and only these are turned into pixels."""
    frames: deque[Any] = deque(maxlen=count)
    for frame in medium.frames():
        frames.append(frame)
        medium.require_memory(2 * len(frames) * frame.width * frame.height, count, frame)
    while frames:
        yield frames.popleft()


def has_sound(path: Path) -> bool:
    """Whether the clip in ``path`` has a track of sound. CX614 where there is no clip."""
    with _opened(path) as medium:
        return bool(medium.stream.container.streams.audio)


def read_sound(path: Path, start_s: float, samples: int, rate: int) -> NDArray[np.float32]:
    """float32 [2, samples] of the first sound track in ``path``, from ``start_s`` seconds on, at ``rate`` per second.

    Silence follows where it ends. CX614: there is none, or it cannot be decoded.
    """
    av = require_av()
    skipped, kept, found = round(start_s * rate), 0, np.zeros((2, samples), np.float32)
    with _opened(path) as medium:
        resampler = av.AudioResampler(format="fltp", layout="stereo", rate=rate)
        for frame in (*medium.sound(), None):
            with _decoding(path):
                parts = resampler.resample(frame)
            for part in parts:
                values = part.to_ndarray()
                dropped = min(skipped, values.shape[1])
                skipped -= dropped
                taken = values[:, dropped : dropped + samples - kept]
                found[:, kept : kept + taken.shape[1]] = taken
                kept += taken.shape[1]
            if kept == samples:
                break
    return found


# -- still pictures ---------------------------------------------------------------------------------------------------


def _still(path: Path) -> Clip | int:
    """The picture in ``path`` as Pillow decodes it; for what FFmpeg has to decode, how EXIF says it is turned."""
    try:
        from PIL import Image, ImageOps, UnidentifiedImageError
    except ImportError as error:
        raise missing("Pillow") from error

    with _regular(path) as file, warnings.catch_warnings():
        if file.seek(0, 2) > MAX_PICTURE_BYTES:
            return 1
        file.seek(0)
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # MAX_PIXELS is less
        try:
            with Image.open(file, formats=_PICTURES) as image:
                if image.width * image.height > MAX_PIXELS:
                    _require_size(path, image.width, image.height, None)
                orientation = image.getexif().get(_ORIENTATION, 1)
                animated = image.format in ("PNG", "WEBP") and getattr(image, "n_frames", 1) > 1
                if animated or image.mode not in _EIGHT_BITS:
                    return orientation if isinstance(orientation, int) else 1
                upright = ImageOps.exif_transpose(image).convert("RGB")
                return Clip(np.asarray(upright)[None], None)
        except UnidentifiedImageError:
            return 1
        except Image.DecompressionBombError:
            _refuse(path, f"more pixels than the {MAX_PIXELS:,} that are allowed")
        except (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error) as error:
            _refuse_contents(path, f"cannot be decoded: {str(error)[:120]}")


# -- decoding ---------------------------------------------------------------------------------------------------------


class _Bytes:
    """A file as FFmpeg reads it here: bytes without a name, until the time is over."""

    def __init__(self, path: Path, file: FileIO) -> None:
        self._path, self._file = path, file
        self._end = time.monotonic() + MAX_SECONDS

    def require_time(self) -> None:
        if time.monotonic() > self._end:
            _refuse(self._path, f"reading it takes longer than {MAX_SECONDS:.0f} seconds")

    def read(self, size: int) -> bytes:
        self.require_time()
        return self._file.read(size) or b""

    def seek(self, offset: int, whence: int = 0) -> int:
        self.require_time()
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()


@dataclass(frozen=True)
class _Medium:
    """An open file, its first video stream, and what EXIF says of how a picture is turned."""

    path: Path
    stream: Any
    source: _Bytes
    orientation: int

    def frames(self) -> Iterator[Any]:
        """Decoded frames, all of one size, none of them too large or damaged."""
        context = self.stream.codec_context
        _require_size(self.path, context.width, context.height, context.format)
        size = None
        for number, frame in enumerate(self._decode(self.stream)):
            _require_size(self.path, frame.width, frame.height, frame.format)
            if frame.is_corrupt:
                _refuse(self.path, f"frame {number} is damaged")
            size = size or (frame.width, frame.height)
            if (frame.width, frame.height) != size:
                _refuse(self.path, f"frames of {size[0]} × {size[1]} and of {frame.width} × {frame.height} pixels")
            yield frame

    def sound(self) -> Iterator[Any]:
        """Decoded frames of the first track of sound."""
        tracks = self.stream.container.streams.audio
        if not tracks:
            _refuse(self.path, "no sound in it")
        _prepare(self.path, tracks[0])
        return self._decode(tracks[0])

    def _decode(self, stream: Any) -> Iterator[Any]:
        decoded = stream.container.decode(stream)
        while True:
            self.source.require_time()
            with _decoding(self.path):
                frame = next(decoded, None)
            if frame is None:
                return
            yield frame

    def pixels(self, frame: Any) -> Frames:
        """``frame`` upright: [1, height, width, 3]."""
        with _decoding(self.path):
            image = frame.to_ndarray(format="rgb24")
        return np.ascontiguousarray(_turned(image, *self._axes(frame)))[None]

    def _axes(self, frame: Any) -> tuple[bool, bool, bool]:
        """Whether rows and columns of ``frame`` change places, and whether then the new ones run backwards."""
        try:
            matrix = next((bytes(data) for data in frame.side_data if data.type.name == "DISPLAYMATRIX"), None)
        except ValueError:  # PyAV knows no name for the side data of EXIF
            return _EXIF.get(self.orientation, _EXIF[1])
        if matrix is None:
            return _EXIF[1]
        a, b, _, c, d = struct.unpack_from("=5i", matrix)
        if (b or c) and (a or d):
            _refuse(self.path, f"turned by {frame.rotation} degrees; only quarter turns are read")
        return (True, b < 0, c < 0) if b else (False, d < 0, a < 0)

    def require_memory(self, held_bytes: int, count: int, frame: Any) -> None:
        """CX614 where the frames that are kept take more than `MAX_CLIP_BYTES`."""
        if held_bytes > MAX_CLIP_BYTES:
            size = f"{frame.width} × {frame.height} pixels"
            _refuse(self.path, f"{count} frames of {size}; allowed for all of them: {MAX_CLIP_BYTES:,} bytes")

    def notes(self, times: Sequence[int | None]) -> tuple[str, ...]:
        """Properties that are not read as a player shows them; ``times``: when each frame is shown."""
        found = []
        if hdr := _HDR.get(self.stream.codec_context.color_trc):
            found.append(f"{self.path.name} is HDR ({hdr}) and is read as if it were SDR: its colours are pale")
        aspect = self.stream.sample_aspect_ratio
        if aspect and aspect != 1:
            ratio = f"{aspect.numerator}:{aspect.denominator}"
            found.append(f"{self.path.name} has pixels of {ratio}, which are taken as square: scale it first")
        gaps = [after - before for before, after in pairwise(time for time in times if time is not None)]
        if gaps and max(gaps) > _UNEVEN * max(min(gaps), 0):
            least, most = (float(gap * self.stream.time_base) for gap in (min(gaps), max(gaps)))
            found.append(f"{self.path.name} has frames {least:.3g} to {most:.3g} s apart, which are taken as even")
        return tuple(found)


_EXIF = {
    1: (False, False, False), 2: (False, False, True), 3: (False, True, True), 4: (False, True, False),
    5: (True, False, False), 6: (True, False, True), 7: (True, True, True), 8: (True, True, False),
}  # fmt: skip
"""EXIF's orientations as `_Medium._axes` says it."""


def _turned(image: Frames, swapped: bool, rows: bool, columns: bool) -> Frames:
    image = image.swapaxes(0, 1) if swapped else image
    image = image[::-1] if rows else image
    return image[:, ::-1] if columns else image


@contextmanager
def _regular(path: Path) -> Iterator[FileIO]:
    with ExitStack() as stack:
        try:
            file = stack.enter_context(files.opened(path, MAX_FILE_BYTES))
        except OSError as error:
            _refuse(path, files.reason(error))
        yield file


@contextmanager
def _opened(path: Path, orientation: int = 1) -> Iterator[_Medium]:
    av = require_av()
    with _regular(path) as file:
        source = _Bytes(path, file)
        with _decoding(path):
            container = av.open(source, options=_OPTIONS, metadata_errors="replace", buffer_size=1 << 18)
        with container:
            streams = container.streams.video
            if not streams:
                _refuse_contents(path, "no picture or video in it")
            _prepare(path, streams[0])
            try:
                yield _Medium(path, streams[0], source, orientation)
            finally:
                streams[0].codec_context.flush_buffers()


def _prepare(path: Path, stream: Any) -> None:
    context = stream.codec_context
    if context is None:
        _refuse(path, "FFmpeg has no decoder for it")
    context.thread_type = "NONE"
    context.options = {name: _OPTIONS[name] for name in ("max_pixels", "err_detect")}


@contextmanager
def _decoding(path: Path) -> Iterator[None]:
    """Turns errors of PyAV into CX614. Around its calls only: a ValueError of this project is not one of the file."""
    av = require_av()
    try:
        yield
    except (av.error.FFmpegError, ValueError) as error:
        _refuse_contents(path, f"cannot be decoded: {getattr(error, 'strerror', None) or error}")


def _require_size(path: Path, width: int, height: int, pixel_format: Any) -> None:
    if width * height > MAX_PIXELS:
        _refuse(path, f"{width} × {height} pixels; allowed: {MAX_PIXELS:,}")
    bits = 0 if pixel_format is None else sum(component.bits for component in pixel_format.components)
    if width * height * bits > 8 * MAX_FRAME_BYTES:
        _refuse(path, f"{width} × {height} pixels of {bits} bits; allowed: {MAX_FRAME_BYTES:,} bytes")


def _refuse_contents(path: Path, found: str) -> NoReturn:
    """`_refuse`, of a file that may be something else than a picture or a clip."""
    kind = kinds.of_file(path)
    if kind is not None and not kind.picture:
        raise UserError("CX614", f"{path} is {kind.what}", kind.hint)
    _refuse(path, found)


def _refuse(path: Path, found: str) -> NoReturn:
    raise UserError("CX614", f"{path}: {found}", "pictures: png, jpg; clips: mp4, and what else FFmpeg reads")
