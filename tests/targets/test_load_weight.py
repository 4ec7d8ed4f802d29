"""Weights for PyTorch are read from a bundle's file: a truncated one is an error and not the end of the process."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cosmos_export.ir.spec import WeightSource
from cosmos_export.targets.inductor import sessions

OFFSET, COUNT = 24, 1000


@pytest.fixture
def source(tmp_path: Path) -> WeightSource:
    path = tmp_path / "x.weights"
    path.write_bytes(b"\xff" * OFFSET + np.arange(COUNT, dtype=np.float32).tobytes() + b"\xff" * 8)
    return WeightSource("w", path, OFFSET, torch.float32, (10, COUNT // 10))


@pytest.mark.parametrize("piece", [4096, 1 << 20, 100])
def test_it_is_what_the_file_has(source: WeightSource, monkeypatch: pytest.MonkeyPatch, piece: int) -> None:
    monkeypatch.setattr(sessions, "_PIECE_BYTES", piece)
    expected = torch.arange(COUNT, dtype=torch.float32).reshape(10, -1)
    assert torch.equal(sessions.load_weight(source, torch.device("cpu"), source.file), expected)
    with source.file.open("rb") as file:
        assert torch.equal(sessions.load_weight(source, torch.device("cpu"), file), expected)
        assert torch.equal(sessions.load_weight(source, torch.device("cpu"), file), expected)


def test_a_file_that_is_truncated_while_it_is_read(source: WeightSource, monkeypatch: pytest.MonkeyPatch) -> None:
    read = os.preadv

    def truncating(*arguments: Any) -> int:
        found = read(*arguments)
        os.truncate(source.file, OFFSET + 100)
        return found

    monkeypatch.setattr(sessions, "_PIECE_BYTES", 1000)
    monkeypatch.setattr(os, "preadv", truncating)
    with pytest.raises(ValueError, match="ends at 1,024 bytes, 1,000 more are needed"):
        sessions.load_weight(source, torch.device("cpu"), source.file)
