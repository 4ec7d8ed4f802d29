"""A file that a user names is regular, of limited size, and never waited for."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cosmos_export import files


def _fifo(path: Path) -> Path:
    os.mkfifo(path)
    return path


def _socket(path: Path) -> Path:
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(str(path))
    return path


def _sparse(path: Path) -> Path:
    with path.open("wb") as file:
        file.truncate(20_000_000_000)
    return path


def _looping(path: Path) -> Path:
    path.symlink_to(path)
    return path


REFUSED: list[tuple[Callable[[Path], Path], str]] = [
    (_fifo, "a pipe, not a file: write its contents to a file first"),
    (_socket, "No such device or address"),
    (_sparse, "20,000,000,000 bytes; allowed: 67,108,864"),
    (_looping, "Too many levels of symbolic links"),
    (lambda path: Path("/dev/zero"), "a device, not a file"),
    (lambda path: path.parent, "a directory, not a file"),
    (lambda path: path / "below", "No such file or directory"),
    (lambda path: Path("a\0b"), "not a name of a file (embedded null byte)"),
    (lambda path: Path("x" * 300), "File name too long"),
]


@pytest.fixture(autouse=True)
def at_once() -> Iterator[None]:
    started = time.monotonic()
    yield
    assert time.monotonic() - started < 2


@pytest.mark.parametrize(("make", "phrase"), REFUSED)
def test_what_is_no_file_is_refused_at_once(make: Callable[[Path], Path], phrase: str, tmp_path: Path) -> None:
    path = make(tmp_path / "it")
    with pytest.raises(OSError) as error:
        files.read_bytes(path)
    assert files.reason(error.value) == phrase


def test_a_link_to_what_is_no_file_is_refused(tmp_path: Path) -> None:
    link = tmp_path / "link.json"
    link.symlink_to("/dev/zero")
    with pytest.raises(files.FileRefusedError, match="a device, not a file"):
        files.read_bytes(link)


@pytest.mark.parametrize("size", [0, 1, 99, 100])
def test_up_to_the_limit_all_of_it_is_read(size: int, tmp_path: Path) -> None:
    path, link = tmp_path / "file", tmp_path / "link"
    path.write_bytes(os.urandom(size))
    link.symlink_to(path)
    assert files.read_bytes(link, 100) == path.read_bytes()


def test_a_byte_beyond_the_limit_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"x" * 101)
    with pytest.raises(files.FileRefusedError, match="101 bytes; allowed: 100"):
        files.read_bytes(path, 100)


def test_a_file_that_says_less_than_it_has_is_refused() -> None:
    """Files of /proc have a size of 0, and this stands for one that grows while it is read."""
    path = Path("/proc/self/maps")
    assert path.stat().st_size == 0
    with pytest.raises(files.FileRefusedError, match="more than 100 bytes; allowed: 100"):
        files.read_bytes(path, 100)


def test_no_child_inherits_the_descriptor(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"x")
    with files.opened(path) as file:
        assert not os.get_inheritable(file.fileno())


def test_a_small_toml_file_takes_no_memory_for_its_keys() -> None:
    assert files.parse_toml("[a.b]\nc = [0.5, 1.5]\n") == {"a": {"b": {"c": [0.5, 1.5]}}}
    for text in (f"{'a.' * 40_000}a = 1", f"[{'a.' * 40_000}a]", "x = " + "[" * 5_000, f"x = {'9' * 5_000}", "x ="):
        with pytest.raises(ValueError):
            files.parse_toml(text)
