"""Bundles where models live: in a Hugging Face cache, in a repository, in a store of files that nobody may write to.

What travels beside a bundle is named here, and nothing of it is ever read. A link is followed in one case alone: in a
snapshot of a Hugging Face cache it leads to a blob of that cache. What is read there is hashed as any other file.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import stat
from collections.abc import Iterator

_BESIDE = frozenset({".gitattributes", ".gitignore", "README.md", "LICENSE", "LICENSE.md", "LICENSE.txt", "NOTICE"})
"""Files that repositories have at their root."""
_FOLDERS = frozenset({".git", ".cache"})
"""Folders that git and `hf download --local-dir` keep at the root."""
_BLOB = re.compile(r"(?P<up>(?:\.\./)+)blobs/(?P<digest>[0-9a-f]{40}|[0-9a-f]{64})")
_UP_TO_CACHE = 2
"""From a snapshot to its cache: `snapshots` and the name of the revision."""
_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


def of_repository(name: str, status: os.stat_result) -> bool:
    """Whether the entry ``name`` at the root of a bundle is the repository's and not the bundle's."""
    if stat.S_ISDIR(status.st_mode):
        return name in _FOLDERS
    return name in _BESIDE and stat.S_ISREG(status.st_mode)


@contextlib.contextmanager
def opened_blob(root: int, path: str, parent: int) -> Iterator[int]:
    """The blob of a Hugging Face cache that the link ``path`` of the snapshot ``root`` leads to; ``parent`` is open on
    its folder. OSError ELOOP where it is any other link."""
    text = os.readlink(path.rpartition("/")[2], dir_fd=parent)
    match = _BLOB.fullmatch(text)
    if match is None or match["up"].count("/") != path.count("/") + _UP_TO_CACHE:
        raise OSError(errno.ELOOP, "a symbolic link")
    with contextlib.ExitStack() as stack:
        folder = root
        for step in ("..", "..", "blobs"):
            folder = os.open(step, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=folder)
            stack.callback(os.close, folder)
        descriptor = os.open(match["digest"], _READ, dir_fd=folder)
        stack.callback(os.close, descriptor)
        yield descriptor


def fixed(status: os.stat_result) -> bool:
    """Whether nobody may write to a file, whatever other names it has: as content-addressed stores keep theirs."""
    return not status.st_mode & (stat.S_IWUSR | stat.S_IWGRP | stat.S_IWOTH)
