"""A copy of a reader's files, and what may lie in the place of a file: pipes, devices, links, other files.

`Tree` is what a mutation changes; it is restored after each case.
"""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

from fuzz_values import OUTSIDE


@dataclass
class Tree:
    """A working copy of ``pristine`` at ``root``. What `write` and the others change, `restore` puts back."""

    pristine: Path
    root: Path
    changed: dict[str, str] = field(default_factory=dict)
    """Path in the tree → what was done to it."""

    def __post_init__(self) -> None:
        self.rebuild()

    def files(self) -> list[str]:
        return sorted(path.relative_to(self.pristine).as_posix() for path in self.pristine.rglob("*") if path.is_file())

    def read(self, name: str) -> bytes:
        path = self.root / name
        return path.read_bytes() if path.is_file() and path.stat().st_size < 1 << 28 else b""

    def original(self, name: str) -> bytes:
        path = self.pristine / name
        return path.read_bytes() if path.is_file() else b""

    def write(self, name: str, data: bytes, what: str) -> None:
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove(path)
        path.write_bytes(data)
        self.note(name, what)

    def note(self, name: str, what: str) -> None:
        self.changed[name] = f"{self.changed[name]}; {what}" if name in self.changed else what

    def restore(self) -> None:
        for name in self.changed:
            path, origin = self.root / name, self.pristine / name
            _remove(path)
            if origin.is_file():
                path.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(origin, path)
        self.changed.clear()

    def rebuild(self) -> None:
        """A new copy: after a reader that writes into its files."""
        _remove(self.root)
        shutil.copytree(self.pristine, self.root)
        self.changed.clear()

    def same(self) -> bool:
        """Whether the mutations have cancelled out."""
        return not any(self.differs(name) for name in self.changed)

    def differs(self, name: str) -> bool:
        """Whether ``name`` is not what it was."""
        return not _same(self.root / name, self.pristine / name)


def _same(path: Path, origin: Path) -> bool:
    if not os.path.lexists(path) or not origin.is_file():
        return os.path.lexists(path) == origin.is_file()
    if path.is_symlink() or not path.is_file() or path.stat().st_nlink != 1:
        return False
    found, wanted = path.stat(), origin.stat()
    return (found.st_size, found.st_mode) == (
        wanted.st_size,
        wanted.st_mode,
    ) and path.read_bytes() == origin.read_bytes()


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        path.chmod(0o755)
        shutil.rmtree(path)
    elif os.path.lexists(path):
        path.unlink()


SPECIAL = (
    "fifo", "zero", "directory", "loop", "dangling", "sparse", "unreadable", "link", "hard link", "absent", "full",
    "tty",
)  # fmt: skip


def place_special(tree: Tree, name: str, kind: str) -> None:
    """Something that is not the regular file it was at ``name``."""
    path, data = tree.root / name, tree.read(name)
    _remove(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    match kind:
        case "fifo":
            os.mkfifo(path)
        case "zero" | "full" | "tty":
            path.symlink_to(f"/dev/{kind}")
        case "directory":
            path.mkdir()
        case "loop":
            path.symlink_to(path.name)
        case "dangling":
            path.symlink_to("nothing")
        case "sparse":
            with path.open("wb") as file:
                file.write(data)
                file.truncate(20 << 30)
        case "unreadable":
            path.write_bytes(data)
            path.chmod(0)
        case "link" | "hard link":
            other = tree.root.parent / OUTSIDE / "copy"
            _remove(other)
            other.write_bytes(data)
            path.symlink_to(other) if kind == "link" else path.hardlink_to(other)
    tree.note(name, kind)


def shuffle_files(random: Random, tree: Tree, name: str, names: Sequence[str]) -> None:
    """Files moved, exchanged, added."""
    other = random.choice(names)
    match random.randrange(5):
        case 0:
            one, two = tree.read(name), tree.read(other)
            tree.write(name, two, f"exchanged with {other}")
            tree.write(other, one, f"exchanged with {name}")
        case 1:
            tree.write(name, tree.read(other), f"a copy of {other}")
        case 2:
            _remove(tree.root / name)
            tree.note(name, "removed")
        case 3:
            folder, _, last = name.rpartition("/")
            odd = random.choice(
                (last.upper(), f".{last}", f"{last}~", "\x1b[31m", "a b", "é", "x" * 200, "\udcff", "\n")
            )
            tree.write(f"{folder}/{odd}".lstrip("/"), b"x", "added")
        case _:
            tree.write(name, b"", "empty")


def is_special(path: Path) -> bool:
    """Whether ``path`` is anything but a regular file that can be read."""
    mode = path.lstat().st_mode
    return not stat.S_ISREG(mode) or not mode & 0o400
