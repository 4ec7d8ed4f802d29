"""Clips with flipped bits, zeroed spans and missing ends, the same for the same seed, and a process that reads them.

`python damaged_clips.py FOLDER COUNT` writes them, to look at.
"""

from __future__ import annotations

import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import av
import numpy as np

_KINDS: tuple[tuple[str, str, dict[str, str]], ...] = (
    (".mp4", "libx264", {"preset": "ultrafast"}),
    (".webm", "libvpx-vp9", {"deadline": "realtime", "cpu-used": "8"}),
    (".mov", "libx264", {"preset": "ultrafast", "bf": "2"}),
    (".webm", "libvpx", {"deadline": "realtime", "cpu-used": "8"}),
    (".avi", "mpeg4", {}),
)
_SIZE = (960, 544)
_FRAMES = 24


def whole(path: Path, codec: str, options: Any) -> Path:
    """A clip of a pattern that moves."""
    width, height = _SIZE
    blocks = np.random.default_rng(0).integers(0, 200, (height // 16, width // 16, 3), dtype=np.uint8)
    image = blocks.repeat(16, 0).repeat(16, 1)
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream(codec, rate=24)
        stream.width, stream.height, stream.pix_fmt, stream.options = width, height, "yuv420p", options
        for number in range(_FRAMES):
            frame = av.VideoFrame.from_ndarray(np.roll(image, 5 * number, axis=1), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def damaged(data: bytes, seed: int) -> bytes:
    """``data`` with five bits flipped behind its header, many flipped, a span of zeros, or without its end."""
    chance, found = random.Random(seed), bytearray(data)
    match seed % 4:
        case 0:
            for _ in range(5):
                found[chance.randrange(len(data) // 20, len(data))] ^= 1 << chance.randrange(8)
        case 1:
            for _ in range(60):
                found[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
        case 2:
            start = chance.randrange(len(data) - 200)
            found[start : start + 200] = bytes(200)
        case _:
            del found[chance.randrange(len(data) // 4, len(data)) :]
    return bytes(found)


def write_whole(folder: Path) -> list[Path]:
    """A clip of each kind."""
    return [whole(folder / f"whole{number}{suffix}", *how) for number, (suffix, *how) in enumerate(_KINDS)]


def write(folder: Path, sources: list[Path], count: int) -> list[Path]:
    """``count`` damaged clips in ``folder``, made of ``sources`` in turn."""
    found = []
    for number in range(count):
        source = sources[number % len(sources)]
        path = folder / f"damaged{number:04}{source.suffix}"
        path.write_bytes(damaged(source.read_bytes(), number // len(sources)))
        found.append(path)
    return found


_READ = """
import sys
from pathlib import Path
from cosmos_export.diagnostics import UserError
from cosmos_export.runtime import read_media
for name in sys.stdin.read().splitlines():
    print(name, end=" ", flush=True)
    try:
        clip = read_media.read_clip(Path(name), 21)
        print("read", len(clip.frames), flush=True)
    except UserError as error:
        print(error.code, error.message, flush=True)
"""


def read(paths: list[Path], timeout_s: float) -> Iterator[tuple[Path, str]]:
    """What reading each of ``paths`` in one process of its own ends in. A decoder that hangs holds the interpreter's
    lock, so only another process can tell: it is killed after ``timeout_s``, and its last path has no answer."""
    command = [sys.executable, "-c", _READ]
    names = "\n".join(map(str, paths))
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            printed, _ = process.communicate(names, timeout_s)
        except subprocess.TimeoutExpired:
            process.kill()
            printed, _ = process.communicate()
        for line in printed.splitlines():
            name, _, answer = line.partition(" ")
            yield Path(name), answer


if __name__ == "__main__":
    write(Path(sys.argv[1]), write_whole(Path(sys.argv[1])), int(sys.argv[2]))
