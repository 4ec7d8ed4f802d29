"""Digests of a checkpoint's files, made beside the build: hashing is a core's work and the builder takes one too."""

from __future__ import annotations

import threading
from functools import partial

from cosmos_export import files
from cosmos_export.bundle import InputFile
from cosmos_export.bundle.files import hash_file
from cosmos_export.checkpoint import Checkpoint
from cosmos_export.progress import Progress

_POLL_S = 0.2


class _Stopped(Exception):
    """Nobody wants the digests any more."""


class InputHashes:
    """Hashes every file of ``checkpoint`` in a thread. A context manager: the thread ends with the block."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._files = checkpoint.files()
        self._records: list[InputFile] = []
        self._error: BaseException | None = None
        self._done = 0
        self._stop = False
        self._thread = threading.Thread(target=self._run, name="input hashes", daemon=True)

    def __enter__(self) -> InputHashes:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop = True
        self._thread.join()

    def require_readable(self) -> None:
        """Raise what a file that could not be read raised."""
        if self._error is not None:
            raise self._error

    def result(self, task: str, progress: Progress) -> tuple[InputFile, ...]:
        """A record for each file, in the checkpoint's order; shows as ``task`` what there is to wait for."""
        progress.begin(task, sum(path.stat().st_size for path in self._files))
        try:
            while self._thread.is_alive():
                self._thread.join(_POLL_S)
                progress.update(task, self._done)
        finally:
            progress.end(task)
        self.require_readable()
        return tuple(self._records)

    def _run(self) -> None:
        before = 0
        try:
            for path in self._files:
                with files.opened(path) as file:
                    size, digest = hash_file(file.fileno(), partial(self._advance, before))
                before += size
                self._records.append(InputFile(path.relative_to(self._checkpoint.root).as_posix(), size, digest))
        except BaseException as error:  # it belongs to whoever waits for the result
            self._error = error

    def _advance(self, before: int, read: int) -> None:
        self._done = before + read
        if self._stop:
            raise _Stopped
