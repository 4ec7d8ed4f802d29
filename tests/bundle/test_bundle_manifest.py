"""The manifest is accepted in exactly one form, and whatever else comes is a `StrictError` that names the place."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import bundle_samples
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cosmos_export.bundle import manifest as manifests
from cosmos_export.bundle import parse_manifest, strict
from cosmos_export.bundle.manifest import MAX_MANIFEST_BYTES, FileRecord, check_path, schema_text
from cosmos_export.bundle.strict import StrictError
from cosmos_export.cli.bundle import _facts

ROOT = Path(__file__).resolve().parents[2]


def complete() -> manifests.Manifest:
    files = tuple(
        FileRecord(name, len(content), "a" * 64, role) for name, (role, content) in sorted(bundle_samples.FILES.items())
    )
    return replace(bundle_samples.manifest(), files=files)


def document() -> dict[str, Any]:
    return json.loads(complete().to_bytes())


def reason(changed: Any) -> str:
    """Why ``changed`` is refused, with a digest of its own where it can have one."""
    try:
        data = strict.seal(changed) if strict.DIGEST in changed else json.dumps(changed).encode()
    except (ValueError, OverflowError):
        data = json.dumps(changed).encode()
    with pytest.raises(StrictError) as caught:
        parse_manifest(data)
    return str(caught.value)


def test_reads_back_what_it_writes() -> None:
    assert parse_manifest(complete().to_bytes()) == complete()


def test_canonical_form() -> None:
    data = complete().to_bytes()
    assert data.endswith(b"}\n")
    assert not data.endswith(b"\n\n")
    keys = list(json.loads(data))
    assert keys == sorted(keys)
    assert strict.seal(dict(reversed(json.loads(data).items()))) == data


def test_schema_document_is_up_to_date() -> None:
    assert (ROOT / "docs" / "manifest.schema.json").read_text() == schema_text(), "run `make schema`"


def test_schema_names_every_field_as_required() -> None:
    definitions = json.loads(schema_text())["$defs"]
    assert definitions["Manifest"]["required"] == list(definitions["Manifest"]["properties"])
    assert all(one["additionalProperties"] is False for one in definitions.values())


@pytest.mark.parametrize("field", sorted(document()))
def test_each_field_is_required(field: str) -> None:
    changed = document()
    del changed[field]
    assert reason(changed) == f"field `{field}` is missing"


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (["extra"], 1, "unknown field 'extra'"),
        (["model", "extra"], 1, "model: unknown field 'extra'"),
        (["schema_version"], 1, "schema_version: 1 is not 3, the version this reader knows; build the bundle again"),
        (["schema_version"], True, "schema_version: True is a boolean, expected 3"),
        (["schema_version"], "1", "schema_version: '1' is a string, expected 3"),
        (["recipe"], 1, "recipe: 1 is an integer, expected a string"),
        (["recipe"], None, "recipe: None is null, expected a string"),
        (["recipe"], "a\nb", r"recipe: 'a\nb' is not a name of at most 256 printable characters"),
        (["model", "revision"], 3, "model.revision: 3 is an integer, expected a string or null"),
        (["files"], {}, "files: {} is an object, expected an array"),
        (["graphs"], [], "graphs: [] is an array, expected an object"),
        (["files", 0, "size_bytes"], 1.0, "files[0].size_bytes: 1.0 is a number, expected an integer"),
        (["files", 0, "size_bytes"], True, "files[0].size_bytes: True is a boolean, expected an integer"),
        (["files", 0, "size_bytes"], -1, "files[0].size_bytes: -1 is less than 0"),
        (["files", 0, "size_bytes"], 2**63, "files[0].size_bytes: out of range"),
        (["files", 0, "sha256"], "A" * 64, "is not a SHA-256 digest in lower-case hexadecimal"),
        (["volatile", "build_seconds"], 10**400, "volatile.build_seconds: out of range"),
        (["volatile", "created"], "yesterday", "volatile.created: 'yesterday' is not a UTC time"),
        (["options", "target"], {}, "options.target: {} is an object, expected"),
        (["options", "deep"], [[1]], "options.deep[0]: [1] is an array, expected"),
        (["tools", "\ud800"], "1", r"tools: '\ud800' is not valid Unicode"),
        (
            ["evaluation", 0, "verdict"],
            "perhaps",
            "verdict: 'perhaps' is a string, expected 'pass' or 'fail' or 'not-measured'",
        ),
        (
            ["engines", 0, "weights"],
            [
                {
                    "name": "w",
                    "path": "engines/reasoner.plan",
                    "offset": 1 << 40,
                    "size_bytes": 8,
                    "dtype": "bfloat16",
                    "dims": [2, 2],
                }
            ],
            "engines[0].weights[0]: 'w' is not within a file of this manifest",
        ),
        (["inputs", 0, "path"], "../secret", "inputs[0].path: '../secret' is not a normalised relative path"),
        (["inputs", 0, "path"], "a/./b", "is not a normalised relative path"),
        (["inputs", 0, "path"], "/etc/passwd", "is not a normalised relative path"),
        (["engines", 0, "graph"], "vae", "engines[0].graph: 'vae' is not a graph of this manifest"),
        (["engines", 0, "path"], "engines/vae.plan", "is not a file of this manifest"),
        (["engines", 0, "profiles"], ["720p"], "engines[0].profiles: '720p' is not a profile of this manifest"),
        (["engines", 0, "name"], "generator", "engines: name 'generator' is used 2 times"),
        (["plan_checks", 0, "engine"], "vae", "plan_checks[0].engine: 'vae' is not an engine of this manifest"),
        (["edges", 0, "source"], "vae", "edges[0]: 'vae' has no output 'key_0'"),
        (["edges", 0, "input"], "key", "edges[0]: 'generator' has no input 'key'"),
        (["graphs", "reasoner", "outputs", 0, "dtype"], "float32", "'key_0' 'float32'['und_len', 8, 128] cannot be"),
        (["graphs", "reasoner", "outputs", 0, "dims"], ["und_len", 4, 128], "cannot be 'und_key_0'"),
        (["graphs", "reasoner", "outputs", 0, "dims"], [8, 128], "cannot be 'und_key_0'"),
        (["loop", "body"], "vae", "loop: 'vae' is not a graph of this manifest"),
        (["loop", "carried"], {"noise": "velocity"}, "loop.carried: 'generator' has no input 'noise'"),
        (["loop", "carried"], {"latents": "noise"}, "loop.carried: 'generator' has no output 'noise'"),
        (["profiles", 0, "dims", "und_len", "min"], 4097, "profiles[0].dims: 'und_len' does not satisfy min <= opt"),
    ],
)
def test_refusals(place: list[Any], value: Any, message: str) -> None:
    changed = document()
    inner = changed
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    assert message in reason(changed)


def test_two_edges_into_one_input() -> None:
    changed = document()
    changed["edges"] *= 2
    assert "input 'und_key_0' of 'generator' has two edges" in reason(changed)


@pytest.mark.parametrize("paths", [["a.bin", "A.bin"], ["a", "a/b"], ["d/x", "D/y"], ["a.bin", "a.bin"]])
def test_colliding_paths(paths: list[str]) -> None:
    changed = document()
    changed["files"] += [{"path": path, "size_bytes": 0, "sha256": "a" * 64, "role": "x"} for path in paths]
    assert "files[" in reason(changed)


HOSTILE = [
    *["", ".", "..", "/", "/etc/passwd", "../x", "a/../x", "a/..", "a//b", "a/", "./a", "a/./b", "~/x"],
    *["a\\b", "..\\x", "C:\\x", "C:x", "\\\\host\\share", "a\0b", "a\nb", "a\n", "a b"],
    *[".hidden", "a/.b", "a.", "a/b.", "\uff41", "\u00e9", "a\u202eb"],
    *["con", "CON", "nul.txt", "engines/AUX.plan", "com1", "lpt9.x", "manifest.json", "MANIFEST.JSON"],
    *["a:b", "a*", "a?", "a|b", "<a>", '"a"', "x" * 241, "/".join("a" * 9), "%2e%2e/x", "$HOME", "-rf"],
]


@pytest.mark.parametrize("path", HOSTILE)
def test_hostile_paths(path: str) -> None:
    with pytest.raises(StrictError):
        check_path(path)
    changed = document()
    changed["files"][0]["path"] = path
    assert reason(changed).startswith("files[0].path: ")


@pytest.mark.parametrize("path", ["a", "engines/generator.plan", "A-b_c+d.e/f.0", "manifest.json.sig", "x" * 240])
def test_ordinary_paths(path: str) -> None:
    check_path(path)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "not JSON"),
        (b"[]", "the top level is an array, not an object"),
        (b"null", "the top level is null, not an object"),
        (b"\xff", "not JSON"),
        (b'{"a": 1, "a": 1}', "duplicate key 'a'"),
        (b'{"a": {"b": 1, "c": 2, "b": 3}}', "duplicate key 'b'"),
        (b'{"a": NaN}', "NaN is not a JSON number"),
        (b'{"a": -Infinity}', "-Infinity is not a JSON number"),
        (b'{"a": ' + b"9" * 5000 + b"}", "not JSON"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a":' * 100_000, "nested too deeply"),
        (b'{"schema_version": 1} {}', "not JSON"),
        (b" " * (MAX_MANIFEST_BYTES + 1), "larger than the 16,777,216 bytes a manifest may have"),
    ],
)
def test_not_a_document(data: bytes, message: str) -> None:
    with pytest.raises(StrictError, match=re.escape(message)):
        parse_manifest(data)


def test_overflowing_number() -> None:
    text = json.dumps(document()).replace("12.5", "1e999")
    with pytest.raises(StrictError, match=r"volatile\.build_seconds: out of range"):
        parse_manifest(text.encode())


def test_messages_stay_short_and_printable() -> None:
    changed = document()
    changed["recipe"] = ["\x1b[31m" + "x" * 100_000]
    message = reason(changed)
    assert len(message) < 200
    assert message.isprintable()


@pytest.mark.parametrize("cut", range(1, 40))
def test_truncated(cut: int) -> None:
    data = complete().to_bytes()
    with pytest.raises(StrictError):
        parse_manifest(data[: len(data) * cut // 40])


# ---------------------------------------------------------------------------------------------------------------------
# Fuzz

_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200))
def test_any_bytes(data: bytes) -> None:
    with pytest.raises(StrictError):
        parse_manifest(data)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_any_change_of_one_value(data: st.DataObject) -> None:
    """A value anywhere is replaced, or a key added: the result is refused, or it is a manifest that reads back."""
    changed = document()
    inner: Any = changed
    while True:
        keys = list(inner) if isinstance(inner, dict) else list(range(len(inner)))
        key = data.draw(st.sampled_from(keys)) if keys else None
        if key is None or not isinstance(inner[key], dict | list) or data.draw(st.booleans()):
            break
        inner = inner[key]
    if isinstance(inner, dict) and (key is None or data.draw(st.booleans())):
        key = data.draw(st.text(max_size=8))
    if key is None:
        inner.append(data.draw(_JSON))
    else:
        inner[key] = data.draw(_JSON)
    try:
        parsed = parse_manifest(json.dumps(changed).encode())
    except StrictError as error:
        assert str(error).isprintable()
    else:
        assert parse_manifest(parsed.to_bytes()) == parsed


@settings(max_examples=300, deadline=None)
@given(st.text(alphabet=st.sampled_from("aA./\\~:-_ \0\n\u0130é"), max_size=12) | st.text(max_size=300))
def test_an_accepted_path_stays_inside(path: str) -> None:
    try:
        check_path(path)
    except StrictError:
        return
    base = Path("/bundle")
    assert (base / path).resolve().is_relative_to(base)
    assert str(base / path) == f"/bundle/{path}"
    assert path.isascii()


def test_decode_refuses_what_is_not_a_dataclass_field() -> None:
    with pytest.raises(StrictError, match=r"^\[\] is an array, expected an object$"):
        strict.decode(FileRecord, [])


# -- fields against each other ----------------------------------------------------------------------------------------


def changed(place: list[Any], value: Any) -> dict[str, Any]:
    result = document()
    inner = result
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    return result


SCHEDULE = {
    "schedule.steps": 2, "schedule.sigmas": [1.0, 0.5, 0.0], "schedule.timesteps": [1000.0, 500.0],
}  # fmt: skip


def test_a_schedule_that_fits_is_taken() -> None:
    data = strict.seal(document() | {"options": SCHEDULE})
    assert parse_manifest(data).options["schedule.steps"] == 2


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"schedule.steps": 0}, "not a number of steps"),
        ({"schedule.steps": True}, "not a number of steps"),
        ({"schedule.steps": "2"}, "not a number of steps"),
        ({"schedule.steps": 10**9}, "not a number of steps"),
        ({"schedule.sigmas": [1.0, 0.5]}, "2 numbers, 3 for 2 steps"),
        ({"schedule.sigmas": [1.0, "0.5", 0.0]}, "not numbers"),
        ({"schedule.sigmas": 1.0}, "not numbers"),
        ({"schedule.timesteps": [1.0]}, "1 numbers, 2 for 2 steps"),
        ({"schedule.timesteps": [1.0, None]}, "not numbers"),
        ({"schedule.timesteps": [1.0, False]}, "not numbers"),
    ],
)
def test_schedules_that_are_none(options: dict[str, Any], said: str) -> None:
    assert said in reason(document() | {"options": SCHEDULE | options})


@pytest.mark.parametrize(
    ("place", "value", "said"),
    [
        (["request", "video", "channels"], 10**9, "is more than 1,048,576"),
        (["request", "video", "base_fps"], 0.0, "is outside 0"),
        (["request", "video", "base_fps"], -7.0, "is outside 0"),
        (["request", "action", "dim"], 10**9, "is more than 1,048,576"),
        (["request", "prompt", "plain"], ["a"], "a template has 2 pieces"),
        (["request", "prompt", "system"], ["a", "b"], "a template has 2 pieces"),
        (["profiles", 0, "dims", "frames", "max"], 10**12, "is more than"),
        (["graphs", "generator", "inputs", 1, "dims", 1], "rows", "'rows' of 'latents' is not a dim of the profiles"),
        (["graphs", "generator", "inputs", 1, "dims", 1], "f'{frames}'", "is not an expression over dims"),
        (["graphs", "generator", "inputs", 0, "dims", 0], "frames", "cannot be 'und_key_0'"),
        (["graphs", "generator", "outputs", 0, "dims", 0], 8, "loop.carried: 'velocity'"),
        (["loop", "bodies"], ["generator"] * 3, "3 bodies for 2 steps"),
        (["loop", "segments"], [{"graph": "generator", "steps": 3, "rows": []}], "not the 2 steps"),
        (["target", "compute_capability"], None, "the target has none"),
    ],
)
def test_fields_that_contradict_each_other(place: list[Any], value: Any, said: str) -> None:
    assert said in reason(changed(place, value) | {"options": SCHEDULE})


@pytest.mark.parametrize(("kind", "axis"), [("vision", 1), ("sound", 0), ("action", 1)])
def test_requests_are_told_the_widths_that_the_loop_takes(kind: str, axis: int) -> None:
    found = document()
    found["request"]["sound"] = {"channels": 4, "latent_fps": 25.0, "sampling_rate": 48000, "hop": 1920}
    width = {"vision": 16, "sound": 4, "action": 64}[kind]
    for value in (width, width + 1):
        dims: list[Any] = ["frames", "frames", "frames"]
        dims[axis] = value
        tensors = found["graphs"]["generator"]
        tensors["inputs"][1:] = [{"name": f"{kind}_latent", "dtype": "float32", "dims": dims}]
        tensors["outputs"] = [{"name": "velocity", "dtype": "float32", "dims": dims}]
        found["loop"]["carried"] = {f"{kind}_latent": "velocity"}
        if value == width:
            assert parse_manifest(strict.seal(found))
        else:
            assert f"channels of {kind}" in reason(found)


def test_many_tensors_take_time_in_proportion() -> None:
    """Each is looked up, and none is searched for: eight times as many would take 64 times as long."""

    def seconds(count: int) -> float:
        found = document()
        tensors = [{"name": f"t{i}", "dtype": "float32", "dims": ["frames"]} for i in range(count)]
        outputs = [{**tensor, "name": f"o{i}"} for i, tensor in enumerate(tensors)]
        found["graphs"]["generator"]["inputs"][1:] = tensors
        found["graphs"]["generator"]["outputs"] = outputs
        found["loop"]["carried"] = {f"t{i}": f"o{i}" for i in range(count)}
        data, start = strict.seal(found), time.process_time()
        assert len(parse_manifest(data).loop.carried) == count  # type: ignore[union-attr]
        return time.process_time() - start

    few, many = min(seconds(1000) for _ in range(3)), seconds(8000)
    assert many < 20 * few


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("hidden_size", 0, "outside 1"),
        ("vocab_size", -5, "outside 1"),
        ("num_hidden_layers", 2**31, "outside 1"),
        ("latent_channel", 48, "requests are told of 16"),
        ("latent_channel", True, "requests are told of 16"),
        ("action_dim", 63, "requests are told of 64"),
        ("sound_dim", 8, ""),
        ("action_dim", None, ""),
        ("hidden_act", "silu", ""),
    ],
)
def test_the_geometry_is_one_that_a_model_can_have(name: str, value: Any, said: str) -> None:
    found = document()
    found["model"]["geometry"][name] = value
    if said:
        assert said in reason(found)
    else:
        parse_manifest(strict.seal(found))


CODE = "__import__('os').mkdir({!r})"


def leaves(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from leaves(item, (*at, key))
    if not isinstance(value, dict | list):
        yield at


def test_no_text_of_a_manifest_is_code(tmp_path: Path) -> None:
    """In every place it is text that is taken as such, or refused; shown and taken for a request, it is never run."""
    mark, taken = tmp_path / "ran", set()
    code = CODE.format(str(mark))
    for place in leaves(document()):
        found = changed(list(place), code)
        try:
            manifest = parse_manifest(strict.seal(found))
            taken.add(place[0])
        except StrictError:
            continue
        finally:
            assert not mark.exists(), place
        _facts(manifest)
        assert not mark.exists(), place
    assert "graphs" in taken and "files" in taken
