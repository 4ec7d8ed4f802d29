"""Mutations of any file: bits, bytes and pieces."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

Mutation = Callable[[Random, bytes], tuple[bytes, str]]
"""New bytes of a file, and what was done in words."""


def mutate_bytes(random: Random, data: bytes) -> tuple[bytes, str]:
    """Bits, bytes and pieces."""
    if not data:
        return random.randbytes(random.randrange(1, 64)), "random bytes in an empty file"
    at = random.randrange(len(data))
    length = min(random.choice((1, 2, 4, 8, 64, 512, 4096)), len(data) - at)
    piece = data[at : at + length]
    match random.randrange(11):
        case 0 | 1 | 2:
            return flip(data, at, random.randrange(8)), f"bit flipped at byte {at}"
        case 3:
            return data[:at], f"truncated at {at}"
        case 4:
            return data[:at] + data[at + length :], f"{length} bytes removed at {at}"
        case 5:
            return data[: at + length] + piece + data[at + length :], f"{length} bytes doubled at {at}"
        case 6:
            return data[:at] + random.randbytes(length) + data[at + length :], f"{length} random bytes at {at}"
        case 7:
            return data[:at] + bytes(length) + data[at + length :], f"{length} zeros at {at}"
        case 8:
            return data + random.randbytes(random.choice((1, 7, 8, 4096))), "bytes added at the end"
        case 9:
            value = random.choice((0, 0xFF, 0x7F, 0x80, ord("["), ord('"'), ord("}")))
            return data[:at] + bytes([value]) + data[at + 1 :], f"byte {at} is {value:#x}"
        case _:
            other = random.randrange(len(data))
            moved = data[other : other + length]
            return data[:at] + moved + data[at + len(moved) :], f"{length} bytes of {other} copied to {at}"


def flip(data: bytes, at: int, bit: int) -> bytes:
    changed = bytearray(data)
    changed[at] ^= 1 << bit
    return bytes(changed)
