"""Mutations of pictures and clips: PNG, and the boxes of MP4 and WebM."""

from __future__ import annotations

import struct
import zlib
from random import Random

from fuzz_bytes import flip, mutate_bytes


def mutate_png(random: Random, data: bytes) -> tuple[bytes, str]:
    """A chunk of a PNG, with a checksum that is right."""
    chunks = _png_chunks(data)
    if not chunks or random.random() < 0.3:
        return mutate_bytes(random, data)
    at = random.randrange(len(chunks))
    kind, content = chunks[at]
    match random.randrange(6):
        case 0:
            width, height = random.choice(
                ((0, 1), (1, 60_000), (60_000, 1), (2**31 - 1, 2**31 - 1), (8192, 8191), (16_000, 16_000))
            )
            depth, colour = random.choice(((8, 2), (16, 6), (1, 0), (8, 3), (16, 2), (3, 2)))
            bits = width * depth * {0: 1, 2: 3, 3: 1, 6: 4}[colour]
            lines = min(height, 1 << 25, (1 << 27) // max(1 + bits // 8, 1) + 1)
            head = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
            packed = zlib.compressobj(9)
            row = bytes(1 + (bits + 7) // 8) if bits < 1 << 26 else b"\0"
            pixels = b"".join(packed.compress(row) for _ in range(lines)) + packed.flush()
            chunks = [(b"IHDR", head), (b"IDAT", pixels), (b"IEND", b"")]
            what = f"{width} × {height}, {depth} bits of colour type {colour}, {len(pixels)} bytes"
        case 1:
            del chunks[at]
            what = f"without {kind!r}"
        case 2:
            chunks.insert(at, chunks[random.randrange(len(chunks))])
            what = "a chunk twice"
        case 3:
            chunks.insert(1, random.choice(_CHUNKS))
            what = f"{chunks[1][0]!r} added"
        case _:
            changed, what = mutate_bytes(random, content)
            chunks[at] = (kind, changed)
            what = f"{kind!r}: {what}"
    return b"\x89PNG\r\n\x1a\n" + b"".join(_png_chunk(*chunk) for chunk in chunks), what


_PICTURES = ((0, 1), (1, 60_000), (60_000, 1), (2**31 - 1, 2**31 - 1), (8192, 8191), (16_000, 16_000))

_CHUNKS = (
    (b"eXIf", b"MM\0*" + b"\xff" * 40),
    (b"tRNS", b"\0" * 6),
    (b"gAMA", b"\0\0\0\0"),
    (b"acTL", struct.pack(">II", 99, 0)),
    (b"iCCP", b"x\0\0" + zlib.compress(b"x" * 9**6)),
)


def _png_chunks(data: bytes) -> list[tuple[bytes, bytes]]:
    found, at = [], 8
    while at + 12 <= len(data):
        size = struct.unpack(">I", data[at : at + 4])[0]
        found.append((data[at + 4 : at + 8], data[at + 8 : at + 8 + size]))
        at += 12 + size
    return found


def _png_chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def mutate_boxes(random: Random, data: bytes) -> tuple[bytes, str]:
    """Change a clip: bits, the boxes of an MP4, or a number in their headers."""
    if not data:
        return mutate_bytes(random, data)
    if random.random() < 0.5 or data[4:8] != b"ftyp":
        count = random.choice((1, 5, 20))
        for _ in range(count):
            data = flip(data, random.randrange(len(data)), random.randrange(8))
        return data, f"{count} bits flipped"
    boxes = [at for at in range(4, len(data) - 4) if data[at : at + 4] in _BOXES]
    at = random.choice(boxes)
    kind = data[at : at + 4].decode()
    value = struct.pack(">I", random.choice((0, 1, 7, 8, 2**31 - 1, 2**31, 2**32 - 1, len(data))))
    if random.random() < 0.4:
        return data[: at - 4] + value + data[at:], f"size of {kind} is {value.hex()}"
    place = min(at + 4 + 4 * random.randrange(12), len(data) - 4)
    return data[:place] + value + data[place + 4 :], f"{kind}: {value.hex()} at {place - at}"


_BOXES = frozenset(
    b"ftyp moov mvhd trak tkhd edts elst mdia mdhd hdlr minf stbl stsd avc1 avcC mp4v esds stts stsc stsz stco".split()
)
