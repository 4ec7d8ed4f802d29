"""A safetensors header is believed only when it describes its file exactly."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cosmos_export.checkpoint.safetensors_header import MAX_HEADER_BYTES, read_header
from cosmos_export.checkpoint.safetensors_writer import TensorHeader, encode_header
from cosmos_export.diagnostics import UserError


def raw_file(path: Path, header: object, data: bytes = b"", length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


def entry(begin: int, end: int, dtype: str = "U8", shape: list[Any] | None = None) -> dict[str, Any]:
    return {"dtype": dtype, "shape": [end - begin] if shape is None else shape, "data_offsets": [begin, end]}


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """One tensor of each kind, written by the reference implementation."""
    torch = pytest.importorskip("torch")
    from safetensors.torch import save_file

    path = tmp_path / "mixed.safetensors"
    numbers = torch.arange(24, dtype=torch.float32).reshape(4, 6) / 7
    save_file(
        {
            "f32": numbers,
            "bf16": numbers.to(torch.bfloat16),
            "f16": numbers.to(torch.float16),
            "f8": numbers.to(torch.float8_e4m3fn),
            "f8_wide": numbers.to(torch.float8_e5m2),
            "i64": torch.arange(3),
            "flags": torch.tensor([True, False]),
            "scalar": torch.tensor(2.5),
            "empty": torch.zeros(0, 5),
        },
        path,
        metadata={"format": "pt"},
    )
    return path


def test_agrees_with_the_reference_reader(mixed: Path) -> None:
    import torch
    from safetensors import safe_open

    header = read_header(mixed)
    assert header.metadata == {"format": "pt"}
    with safe_open(mixed, "pt") as reference:
        assert set(header.tensors) == set(reference.keys())
        for name in header.tensors:
            ours, theirs = header.tensors[name], reference.get_tensor(name)
            assert ours.shape == tuple(theirs.shape)
            assert ours.size_bytes == theirs.numel() * theirs.element_size()
            assert ours.dtype == reference.get_slice(name).get_dtype()
            array = ours.array()
            wide = array.astype(np.float64)
            np.testing.assert_array_equal(wide, theirs.to(torch.float64).numpy())
            assert not array.flags.writeable


def test_arrays_have_the_types_of_the_file_and_are_mapped_only_where_that_is_asked_for(mixed: Path) -> None:
    tensors = read_header(mixed).tensors
    assert tensors["bf16"].array().dtype == ml_dtypes.bfloat16
    assert tensors["f8"].array().dtype == ml_dtypes.float8_e4m3fn
    array = tensors["f32"].array()
    assert not mapped(array) and mapped(tensors["f32"].mapped())
    data = mixed.read_bytes()
    f32 = tensors["f32"]
    assert data[f32.offset : f32.offset + f32.size_bytes] == array.tobytes()


def mapped(array: np.ndarray) -> bool:
    while array is not None and not isinstance(array, np.memmap):
        array = array.base
    return array is not None


def test_a_packed_type_has_bytes_but_no_array(tmp_path: Path) -> None:
    path = raw_file(tmp_path / "x.safetensors", {"w": entry(0, 4, "F4", [8])}, b"abcd")
    tensor = read_header(path).tensors["w"]
    assert tensor.raw().tobytes() == b"abcd"
    with pytest.raises(UserError, match="no array form"):
        tensor.array()


def test_writer_and_reader_agree_and_the_data_is_aligned(tmp_path: Path) -> None:
    specs = [TensorHeader("a", "BF16", (3, 5)), TensorHeader("b", "F32", ()), TensorHeader("c", "F8_E4M3", (7,))]
    path = tmp_path / "x.safetensors"
    path.write_bytes(encode_header(specs) + bytes(sum(spec.size_bytes for spec in specs)))
    tensors = read_header(path).tensors
    assert [(t.name, t.dtype, t.shape) for t in tensors.values()] == [(s.name, s.dtype, s.shape) for s in specs]
    assert tensors["a"].offset % 8 == 0


DATA = b"0123456789"
BAD = {
    "empty file": (b"", "CX112", "an empty file"),
    "no room for the length": (b"\x01\x02", "CX112", "too short"),
    "length beyond the limit": ((MAX_HEADER_BYTES + 1).to_bytes(8, "little") + b"{}", "CX112", "8,388,608 allowed"),
    "length of all ones": (b"\xff" * 8 + b"{}", "CX112", "header claims"),
    "header cut off": ((50).to_bytes(8, "little") + b'{"a":', "CX111", "truncated: its header needs 58 bytes"),
    "not an object": ((2).to_bytes(8, "little") + b"[]", "CX112", "does not start with a JSON object"),
    "not JSON": ((5).to_bytes(8, "little") + b"{abc}", "CX112", "not JSON"),
    "not UTF-8": ((3).to_bytes(8, "little") + b'{"\xff', "CX112", "not JSON"),
    "zero length": (bytes(8) + DATA, "CX112", "does not start"),
}
BAD_HEADERS: dict[str, tuple[object, str, str]] = {
    "same name twice": (
        b'{"a":{"dtype":"U8","shape":[5],"data_offsets":[0,5]},"a":{"dtype":"U8","shape":[5],"data_offsets":[5,10]}}',
        "CX114",
        "names 'a' twice",
    ),
    "unknown type": ({"a": entry(0, 10, "Q7")}, "CX115", "unknown type 'Q7'"),
    "type is not text": ({"a": entry(0, 10) | {"dtype": 8}}, "CX115", "unknown type 8"),
    "overlap": ({"a": entry(0, 6), "b": entry(4, 10)}, "CX113", "'b' overlaps 'a' by 2 bytes"),
    "hole": ({"a": entry(0, 4), "b": entry(6, 10)}, "CX113", "2 bytes before 'b' belong to no tensor"),
    "uncovered end": ({"a": entry(0, 4)}, "CX113", "6 bytes after the last tensor"),
    "data cut off": ({"a": entry(0, 12)}, "CX111", "truncated: its tensors need"),
    "size against offsets": ({"a": entry(0, 10, "F32", [3])}, "CX113", "= 12 bytes, but its offsets span 10"),
    "offsets reversed": ({"a": entry(10, 0, shape=[10])}, "CX113", "span -10"),
    "overflow": ({"a": entry(0, 10, "F32", [2**31, 2**31, 2**31])}, "CX113", "overflows"),
    "half a byte": ({"a": entry(0, 1, "F4", [3])}, "CX113", "1.5 bytes"),
    "negative dimension": ({"a": entry(0, 10, shape=[-10])}, "CX112", "not a list of sizes"),
    "fractional dimension": ({"a": entry(0, 10, shape=[10.0])}, "CX112", "not a list of sizes"),
    "boolean dimension": ({"a": entry(0, 1, shape=[True])}, "CX112", "not a list of sizes"),
    "huge offset": ({"a": entry(0, 2**70, shape=[10])}, "CX112", "not a pair of offsets"),
    "three offsets": ({"a": entry(0, 10) | {"data_offsets": [0, 10, 20]}}, "CX112", "not a pair of offsets"),
    "missing field": ({"a": {"dtype": "U8", "shape": [10]}}, "CX112", "not exactly dtype, shape"),
    "extra field": ({"a": entry(0, 10) | {"more": 1}}, "CX112", "not exactly dtype, shape"),
    "entry is not an object": ({"a": 3}, "CX112", "not exactly dtype, shape"),
    "name with an escape": ({"a\x1b[31m": entry(0, 10)}, "CX112", "is not a tensor name"),
    "name is empty": ({"": entry(0, 10)}, "CX112", "is not a tensor name"),
    "metadata of numbers": ({"__metadata__": {"a": 1}, "a": entry(0, 10)}, "CX112", "not a map of strings"),
    "NaN": (b'{"a":NaN}', "CX112", "not JSON"),
    "half of a character": (b'{"__metadata__":{"a":"x\\ud800y"}}', "CX112", "half of a character"),
    "half of a character in a name": (b'{"__metadata__":{"\\uDFFF":"y"}}', "CX112", "half of a character"),
    "too deep": (b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}", "CX112", "nested too deeply"),
    "a number of 5,000 digits": (b'{"a":' + b"9" * 5000 + b"}", "CX112", "not JSON"),
}


def test_a_character_of_two_halves_is_one(tmp_path: Path) -> None:
    header = b'{"__metadata__":{"a":"\\ud83e\\udd16 \\\\ud800"},"b":{"dtype":"U8","shape":[10],"data_offsets":[0,10]}}'
    assert read_header(raw_file(tmp_path / "x.safetensors", header, DATA)).metadata == {"a": "\U0001f916 \\ud800"}


@pytest.mark.parametrize("case", BAD)
def test_damaged_file(tmp_path: Path, case: str) -> None:
    content, code, words = BAD[case]
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    refuses(path, code, words)


@pytest.mark.parametrize("case", BAD_HEADERS)
def test_bad_header(tmp_path: Path, case: str) -> None:
    header, code, words = BAD_HEADERS[case]
    refuses(raw_file(tmp_path / "x.safetensors", header, DATA), code, words)


def refuses(path: Path, code: str, words: str) -> None:
    with pytest.raises(UserError) as caught:
        read_header(path)
    assert caught.value.code == code
    assert words in caught.value.message
    assert path.name in caught.value.message
    assert caught.value.hint
    assert len(caught.value.message) < 600


def test_not_a_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not a regular file"):
        read_header(tmp_path)
    with pytest.raises(UserError, match="is missing"):
        read_header(tmp_path / "none.safetensors")


def test_a_pipe_is_refused_rather_than_waited_for(tmp_path: Path) -> None:
    import os

    os.mkfifo(tmp_path / "pipe.safetensors")
    with pytest.raises(UserError, match="not a regular file"):
        read_header(tmp_path / "pipe.safetensors")


VALID = encode_header([TensorHeader("a", "F32", (2, 3)), TensorHeader("b", "BF16", (4,))]) + bytes(32)


@settings(max_examples=400, deadline=None)
@given(st.data())
def test_any_damage_is_a_user_error(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    content = bytearray(VALID)
    for _ in range(data.draw(st.integers(1, 6))):
        position = data.draw(st.integers(0, len(content) - 1))
        content[position] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(content)))
    accepted_or_refused(tmp_path_factory, bytes(content[:cut] if data.draw(st.booleans()) else content))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
ENTRIES = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "BF16", "U8", "F4", "nope"]) | JSON,
        "shape": st.lists(st.integers(-2, 2**40), max_size=4) | JSON,
        "data_offsets": st.lists(st.integers(-1, 40), min_size=2, max_size=2) | JSON,
    }
)


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(st.text(max_size=6), ENTRIES | JSON, max_size=4), st.binary(max_size=40))
def test_any_header_is_accepted_or_a_user_error(
    tmp_path_factory: pytest.TempPathFactory, header: dict[str, Any], data: bytes
) -> None:
    text = json.dumps(header).encode()
    accepted_or_refused(tmp_path_factory, len(text).to_bytes(8, "little") + text + data)


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200))
def test_any_bytes_are_accepted_or_a_user_error(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    accepted_or_refused(tmp_path_factory, content)


def accepted_or_refused(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    """What we accept, the reference accepts too, with the same tensors."""
    from safetensors import deserialize

    path = tmp_path_factory.getbasetemp() / "fuzz.safetensors"
    path.write_bytes(content)
    try:
        header = read_header(path)
    except UserError as error:
        assert error.code in {"CX111", "CX112", "CX113", "CX114", "CX115"}
        return
    reference = dict(deserialize(content))
    assert {name: (t.dtype, list(t.shape)) for name, t in header.tensors.items()} == {
        name: (value["dtype"], value["shape"]) for name, value in reference.items()
    }
    for name, tensor in header.tensors.items():
        assert tensor.raw().tobytes() == bytes(reference[name]["data"])
