"""A file of a checkpoint that becomes a pipe after its header was read is refused, and never waited for."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import fake_checkpoint as fake
import pytest

from cosmos_export.checkpoint import Checkpoint, checkpoint_identity, open_checkpoint
from cosmos_export.compiler.input_files import InputHashes
from cosmos_export.progress import Silent


def _hashes(checkpoint: Checkpoint) -> None:
    with InputHashes(checkpoint) as hashes:
        hashes.result("inputs", Silent())


def _tensor(checkpoint: Checkpoint) -> None:
    next(iter(checkpoint.tensors.values())).raw()


@pytest.mark.parametrize("use", [_tensor, checkpoint_identity, _hashes])
def test_a_pipe_in_place_of_weights(tmp_path: Path, use: Callable[[Checkpoint], object]) -> None:
    fake.write_checkpoint(tmp_path / "checkpoint")
    checkpoint = open_checkpoint(tmp_path / "checkpoint")
    file = next(iter(checkpoint.tensors.values())).file
    file.unlink()
    os.mkfifo(file)
    with pytest.raises(OSError, match="a pipe, not a file"):
        use(checkpoint)
