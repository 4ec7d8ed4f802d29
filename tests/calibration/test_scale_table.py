"""The scale table: what is written is read again, and what is not a table of this checkpoint is refused."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cosmos_export.bundle.strict import canonical, seal
from cosmos_export.calibration.table import (
    LINEAGE_FILE,
    SCALES_FILE,
    ScaleTable,
    read_scale_table,
    require_checkpoint,
    write_scale_table,
)
from cosmos_export.checkpoint import Checkpoint, checkpoint_identity, open_checkpoint
from cosmos_export.checkpoint.demo import write_demo_checkpoint
from cosmos_export.diagnostics import UserError

QUERY = "layers.0.self_attn.add_q_proj"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    path = tmp_path_factory.mktemp("checkpoint") / "tiny"
    return open_checkpoint(write_demo_checkpoint(path, layers=1))


def table_of(checkpoint: Checkpoint, **changes: Any) -> ScaleTable:
    fields: dict[str, Any] = {
        "amax": {f"{QUERY}.input_amax": 3.5, "layers.0.attention.generator.q_amax": 7.25},
        "pre_scales": {QUERY: np.linspace(0.5, 2, 64, dtype=np.float32)},
        "checkpoint": checkpoint_identity(checkpoint),
        "lineage": {"sources": [{"count": 3, "licence": None}]},
    }
    return ScaleTable(**{**fields, **changes})


def refused(code: str, call: Callable[[], object]) -> str:
    with pytest.raises(UserError) as caught:
        call()
    assert caught.value.code == code
    return caught.value.message


def test_a_table_reads_back_as_it_was_written(tmp_path: Path, checkpoint: Checkpoint) -> None:
    table = table_of(checkpoint)
    write_scale_table(table, tmp_path / "scales")
    found = read_scale_table(tmp_path / "scales")
    assert (dict(found.amax), found.checkpoint, dict(found.lineage)) == (table.amax, table.checkpoint, table.lineage)
    np.testing.assert_array_equal(found.pre_scales[QUERY], table.pre_scales[QUERY])
    assert found.input_amax(QUERY) == 3.5
    refused("CX312", lambda: found.input_amax("layers.0.nothing"))
    require_checkpoint(found, checkpoint)
    assert [path.name for path in tmp_path.iterdir()] == ["scales"]


def test_the_same_table_has_the_same_bytes(tmp_path: Path, checkpoint: Checkpoint) -> None:
    table = table_of(checkpoint)
    turned = table_of(checkpoint, amax=dict(reversed(list(table.amax.items()))))
    for name, value in (("a", table), ("b", turned)):
        write_scale_table(value, tmp_path / name)
    for file in (SCALES_FILE, LINEAGE_FILE):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_identity_is_of_the_weights_and_not_of_the_files(tmp_path: Path, checkpoint: Checkpoint) -> None:
    identity = checkpoint_identity(checkpoint)
    sharded = open_checkpoint(write_demo_checkpoint(tmp_path / "sharded", layers=1, shard_size=100_000))
    assert len(list((tmp_path / "sharded" / "transformer").glob("*.safetensors"))) > 1
    assert checkpoint_identity(sharded) == identity
    other = open_checkpoint(write_demo_checkpoint(tmp_path / "other", layers=1, seed=1))
    assert checkpoint_identity(other) != identity
    entry = sharded.tensors["layers.0.mlp.up_proj.weight"]
    with entry.file.open("r+b") as file:  # one bit of one weight
        file.seek(entry.offset + 5)
        byte = file.read(1)[0]
        file.seek(entry.offset + 5)
        file.write(bytes([byte ^ 1]))
    assert checkpoint_identity(sharded) != identity


def test_a_table_of_another_checkpoint_is_refused(tmp_path: Path, checkpoint: Checkpoint) -> None:
    other = open_checkpoint(write_demo_checkpoint(tmp_path / "other", layers=1, seed=1))
    message = refused("CX311", lambda: require_checkpoint(table_of(checkpoint), other))
    assert "another checkpoint" in message
    deeper = table_of(checkpoint, amax={"layers.7.mlp.up_proj.input_amax": 1.0}, pre_scales={})
    assert "layers.7.mlp.up_proj" in refused("CX311", lambda: require_checkpoint(deeper, checkpoint))
    wide = table_of(checkpoint, pre_scales={QUERY: np.ones(32, np.float32)})
    assert "32 channels" in refused("CX311", lambda: require_checkpoint(wide, checkpoint))


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_a_range_is_a_positive_number(value: float, checkpoint: Checkpoint) -> None:
    refused("CX310", lambda: table_of(checkpoint, amax={f"{QUERY}.input_amax": value}, pre_scales={}))


def test_damage_is_found(tmp_path: Path, checkpoint: Checkpoint) -> None:
    scales = tmp_path / "scales"
    assert "an empty folder" in refused("CX310", lambda: read_scale_table(tmp_path))
    write_scale_table(table_of(checkpoint), scales)
    lineage, numbers = scales / LINEAGE_FILE, scales / SCALES_FILE
    good_lineage, good_numbers = lineage.read_text(), numbers.read_bytes()

    numbers.write_bytes(good_numbers[:-1] + bytes([good_numbers[-1] ^ 1]))
    assert "is not the file" in refused("CX310", lambda: read_scale_table(scales))
    numbers.write_bytes(good_numbers[:-1])
    refused("CX111", lambda: read_scale_table(scales))
    numbers.write_bytes(good_numbers)
    for key, value in {"version": 1, "checkpoint": "abc", "lineage": [], "more": 1}.items():
        lineage.write_bytes(seal({**json.loads(good_lineage), key: value}))
        refused("CX310", lambda: read_scale_table(scales))
    lineage.write_text(good_lineage)
    assert read_scale_table(scales).checkpoint == checkpoint_identity(checkpoint)


LINEAGE = {
    "sources": [{"count": 3, "licence": "OpenMDW1.1", "origin": "own", "files": ["a.mp4", "b.mp4"]}, {"count": 0}],
    "settings": {"steps": 35, "shift": None, "hears": True, "margin": 1.05},
    "passes": [{"mode": "t2v", "rows": [1, 2, 3]}],
}


def changes(value: Any) -> Iterator[Any]:
    """``value`` with one leaf, key or item of it changed, in every way."""
    if isinstance(value, dict):
        for key, item in value.items():
            rest = {k: v for k, v in value.items() if k != key}
            yield from (rest, {**rest, f"{key}_": item})
            yield from ({**value, key: changed} for changed in changes(item))
    elif isinstance(value, list):
        for i, item in enumerate(value):
            yield value[:i] + value[i + 1 :]
            yield from ([*value[:i], changed, *value[i + 1 :]] for changed in changes(item))
        yield [*value, 1]
    yield from (other for other in (None, True, 0, 7, 2.5, "x", [], {}) if other != value or other is not value)


def test_nothing_that_a_table_says_of_its_data_can_change(tmp_path: Path, checkpoint: Checkpoint) -> None:
    scales = tmp_path / "scales"
    write_scale_table(table_of(checkpoint, lineage=LINEAGE), scales)
    path = scales / LINEAGE_FILE
    good = path.read_bytes()
    document = json.loads(good)
    tried = 0
    for changed in changes(LINEAGE):
        if json.dumps(changed) != json.dumps(LINEAGE):
            tried += 1
            path.write_bytes(canonical({**document, "lineage": changed}))
            assert LINEAGE_FILE in refused("CX310", lambda: read_scale_table(scales)) or not isinstance(changed, dict)
    assert tried > 150
    for at in range(0, len(good), 7):
        path.write_bytes(good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :])
        refused("CX310", lambda: read_scale_table(scales))
    path.write_bytes(good[:-1])
    refused("CX310", lambda: read_scale_table(scales))
    path.write_bytes(good)
    assert dict(read_scale_table(scales).lineage) == LINEAGE


def test_nothing_is_replaced_unasked(tmp_path: Path, checkpoint: Checkpoint) -> None:
    table, scales, other = table_of(checkpoint), tmp_path / "scales", tmp_path / "other"
    write_scale_table(table, scales)
    refused("CX313", lambda: write_scale_table(table, scales))
    write_scale_table(table_of(checkpoint, pre_scales={}), scales, force=True)
    assert not read_scale_table(scales).pre_scales
    other.mkdir()
    (other / "file").touch()
    refused("CX313", lambda: write_scale_table(table, other, force=True))
    assert (other / "file").exists()
