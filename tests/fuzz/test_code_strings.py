"""Code in the place of every text of every document: it is taken as text or refused, and never run.

Documents of graphs, manifests and requests for engines have such tests in `test_graph_documents`,
`test_bundle_manifest` and `test_bundle_finish`.
"""

from __future__ import annotations

import copy
import hashlib
import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import fuzz_seeds as seeds
import pytest
from fuzz_readers import BY_NAME, GOOD, Call, Reader, outcome

from cosmos_export.bundle import strict

CODE = "__import__('os').mkdir({!r})"


def _read_captions(call: Call) -> None:
    """Captions as `run` reads them."""
    from cosmos_export.runtime.prompts import read_prompt

    for name in ("caption.json", "negative.json"):
        read_prompt(str(call.root / name))


CAPTIONS = Reader("captions", seeds.prompts, _read_captions, ("*.json", "*.safetensors"))
QUICK = [
    CAPTIONS,
    *(BY_NAME[name] for name in ("scales", "recipes", "bench-compare", "actions", "sources", "cache", "state")),
]
LONG = [
    BY_NAME[name]
    for name in (
        "inspect", "inspect-shards", "inspect-fp8", "plan", "build-resolve", "build-fp8", "build-codecs",
        "build-tokenizer", "lerobot-2", "lerobot-3",
    )
]  # fmt: skip
CHECKPOINT = Reader("checkpoint", seeds.checkpoint, BY_NAME["build-resolve"].call, ("*.json",))
FEW, MOST = 12, 150
"""Positions of one document that are tried; of more, those at equal distances."""
CASES = [
    *(pytest.param(reader, MOST, id=reader.name) for reader in QUICK),
    pytest.param(CHECKPOINT, FEW, id="checkpoint"),
    pytest.param(BY_NAME["captured"], FEW, id="captured"),
    *(pytest.param(reader, MOST, id=reader.name, marks=pytest.mark.slow) for reader in LONG),
]
DOCUMENTS = (".json", ".jsonl", ".toml", ".safetensors", ".txt", ".jinja")

Place = tuple[str | int, ...]


def texts(value: Any, at: Place = ()) -> Iterator[tuple[Place, bool]]:
    """Places of texts, and of keys (True). Where a list or an object has many, those in the first."""
    if isinstance(value, str):
        yield at, False
    elif isinstance(value, dict):
        for number, (key, item) in enumerate(value.items()):
            yield (*at, key), True
            if number < 40:
                yield from texts(item, (*at, key))
    elif isinstance(value, list):
        for number, item in enumerate(value[:2]):
            yield from texts(item, (*at, number))


def with_text(document: Any, place: Place, is_key: bool, code: str) -> Any:
    changed = copy.deepcopy(document)
    inside = changed
    for key in place[:-1]:
        inside = inside[key]
    if is_key:
        inside[code] = inside.pop(place[-1])
    elif place:
        inside[place[-1]] = code
    return changed if place else code


def variants(name: str, data: bytes, code: str) -> Iterator[bytes]:
    """``data`` with ``code`` in the place of one text."""
    kind = Path(name).suffix
    if kind == ".json":
        document = json.loads(data)
        sealed = strict.DIGEST in document if isinstance(document, dict) else False
        for place, is_key in texts(document):
            changed = with_text(document, place, is_key, code)
            yield strict.seal(changed) if sealed else json.dumps(changed, indent=1).encode()
    elif kind == ".jsonl":
        lines = data.splitlines()
        for number, line in enumerate(lines):
            for changed in variants("x.json", line, code):
                line = json.dumps(json.loads(changed)).encode()
                yield b"\n".join([*lines[:number], line, *lines[number + 1 :], b""])
    elif kind == ".safetensors":
        length = int.from_bytes(data[:8], "little")
        for changed in variants("x.json", data[8 : 8 + length], code):
            yield len(changed).to_bytes(8, "little") + changed + data[8 + length :]
    elif kind == ".toml":
        text = data.decode()
        quoted = json.dumps(code)
        for found in re.finditer(r'"[^"\n]*"|^[\w.-]+(?= *=)', text, re.MULTILINE):
            yield (text[: found.start()] + quoted + text[found.end() :]).encode()
    else:
        yield from (code.encode(), b"{{ " + code.encode() + b" }}")


def bind(root: Path, name: str) -> None:
    """Make the lineage of a scale table fit the numbers that were changed."""
    lineage = root / "scales" / "lineage.json"
    if name == "scales/scales.safetensors":
        document = json.loads(lineage.read_bytes())
        document["scales_sha256"] = hashlib.sha256((root / name).read_bytes()).hexdigest()
        lineage.write_bytes(strict.seal(document))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Reader], Path]:
    """A copy of the files that a reader begins with."""
    base = tmp_path_factory.mktemp("seeds")

    def folder(reader: Reader) -> Path:
        source = seeds.once(base / reader.seed.__name__, reader.seed)
        copied = base / f"{reader.name}-tree" / "a"
        shutil.copytree(source, copied, symlinks=True)
        return copied

    return folder


@pytest.mark.parametrize(("reader", "most"), CASES)
def test_no_text_of_a_document_is_code(
    made: Callable[[Reader], Path], reader: Reader, most: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COSMOS_EXPORT_CACHE", "off")
    monkeypatch.chdir(tmp_path)
    root, mark = made(reader), tmp_path / "ran"
    code = CODE.format(str(mark))
    assert outcome(reader, Call(root, (), Random(0))).kind == "accepted"
    kept = root.with_name("kept")
    shutil.copytree(root, kept, symlinks=True)
    names = [p.relative_to(root).as_posix() for p in sorted(root.rglob("*")) if p.suffix in DOCUMENTS and p.is_file()]
    tried = refused = 0
    for name in reader.names(names):
        forms = list(variants(name, (kept / name).read_bytes(), code))
        for number, data in enumerate(forms[:: len(forms) // most + 1]):
            (root / name).write_bytes(data)
            bind(root, name)
            found = outcome(reader, Call(root, (name,), Random(number)))
            assert not mark.exists(), (name, data[-300:])
            assert found.kind in GOOD, (name, found)
            tried += 1
            refused += found.kind != "accepted"
            if reader.writes:
                shutil.rmtree(root)
                shutil.copytree(kept, root, symlinks=True)
        if (root / name).read_bytes() != (kept / name).read_bytes():
            (root / name).write_bytes((kept / name).read_bytes())
        if (root / "scales").is_dir():
            shutil.copy(kept / "scales" / "lineage.json", root / "scales" / "lineage.json")
    assert tried >= 2
    assert refused or reader is CAPTIONS or reader.writes  # records that cannot be read are ignored


def test_such_code_would_be_seen(tmp_path: Path) -> None:
    """What is tried leaves its mark where it is evaluated."""
    mark = tmp_path / "ran"
    eval(CODE.format(str(mark)))
    assert mark.is_dir()
