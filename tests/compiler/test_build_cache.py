"""The cache of engines: it finds what was built from what is in a bundle, and whatever else is in its directory neither
ends a build nor is touched."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from cosmos_export.cli import app
from cosmos_export.compiler.cache import Cache, Entry, key_of

COMPONENTS = {"graph": "a" * 64, "weights": "b" * 64, "target": "12.0"}
KEY = key_of(COMPONENTS)


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    found = Cache(tmp_path / "cache")
    engine = tmp_path / "bundle/engines/generator.engine"
    engine.parent.mkdir(parents=True)
    engine.write_bytes(b"engine")
    digest = hashlib.sha256(b"engine").hexdigest()
    found.add([Entry(KEY, "generator", COMPONENTS, str(engine), 6, digest, {}, "2026-01-01T00:00:00Z")])
    assert found.find(KEY) is not None
    return found


def entry_file(cache: Cache) -> Path:
    assert cache.folder is not None
    return cache.folder / f"{KEY}.json"


def changed(**values: Any) -> Callable[[dict[str, Any]], object]:
    return lambda document: {**document, **values}


WRONG: dict[str, Callable[[dict[str, Any]], object]] = {
    "another key": changed(key="0" * 64),
    "a path for a key": changed(key="../../victim/important"),
    "no text for a key": changed(key=1),
    "other components": changed(components={**COMPONENTS, "target": "9.0"}),
    "components of numbers": changed(components={"graph": 1.5}),
    "components that are a number": changed(components=1.5),
    "a name with an escape": changed(name="\x1b[31mred"),
    "a name that is a list": changed(name=["generator"]),
    "a size that is a text": changed(size_bytes="6"),
    "a date that is a number": changed(created=3),
    "facts that are a list": changed(facts=[]),
    "a relative path": changed(path="engines/generator.engine"),
    "one field more": changed(more=1),
    "one field less": lambda document: {k: v for k, v in document.items() if k != "sha256"},
    "a list": lambda document: [document],
    "null": lambda document: None,
}


@pytest.mark.parametrize("how", WRONG)
def test_an_entry_with_a_wrong_value_is_none(cache: Cache, how: str) -> None:
    path = entry_file(cache)
    path.write_text(json.dumps(WRONG[how](json.loads(path.read_text()))))
    assert cache.find(KEY) is None and cache.entries() == []
    assert cache.why("generator", COMPONENTS)
    for verb in (["ls"], ["ls", "--json"], ["why", "0"], ["prune"]):
        result = CliRunner().invoke(app, ["cache", *verb, "--cache", str(cache.folder)])
        assert result.exit_code in (0, 2) and "CX000" not in result.output, result.output
    assert path.exists()


BYTES = {
    "empty": b"",
    "deep list": b"[" * 200_000,
    "deep object": b'{"a":' * 200_000,
    "not UTF-8": b"\xff",
    "lone surrogate": b'{"key": "\\ud800"}',
    "large": b" " * 5_000_000,
}


def test_an_entry_of_another_user_is_none(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    path = entry_file(cache)
    if os.geteuid() == 0:
        os.chown(path, 65534, 65534)
    else:
        owner = path.stat().st_uid
        monkeypatch.setattr(os, "geteuid", lambda: owner + 1)
    assert cache.find(KEY) is None and cache.entries() == []


@pytest.mark.parametrize("what", BYTES)
def test_bytes_that_are_no_entry_are_none(cache: Cache, what: str) -> None:
    entry_file(cache).write_bytes(BYTES[what])
    assert cache.find(KEY) is None and cache.entries() == []


def test_a_lone_surrogate_in_an_entry_is_none(cache: Cache) -> None:
    path = entry_file(cache)
    path.write_text(path.read_text().replace("/generator.engine", "/\\ud800.engine"))
    assert cache.entries() == []


@pytest.mark.parametrize("kind", ["pipe", "device", "directory", "loop"])
def test_an_entry_that_is_no_file_is_not_waited_for(cache: Cache, kind: str) -> None:
    path = entry_file(cache)
    path.unlink()
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "directory":
        path.mkdir()
    else:
        path.symlink_to(path)
    assert cache.find(KEY) is None and cache.entries() == []
    cache.prune(everything=True)
    assert path.is_dir() == os.path.lexists(path)


def test_prune_touches_what_the_cache_made_alone(cache: Cache, tmp_path: Path) -> None:
    assert cache.folder is not None
    victim = tmp_path / "victim/important.json"
    victim.parent.mkdir()
    victim.write_text("years")
    document = json.loads(entry_file(cache).read_text())
    (cache.folder / "notes.json").write_text(json.dumps({**document, "key": "../victim/important"}))
    (cache.folder / "thesis.json").write_text(json.dumps(document))
    (cache.folder / f".{KEY}.partial").write_text("of a build that was killed")
    Path(document["path"]).unlink()
    assert [entry.key for entry in cache.prune()] == [KEY]
    cache.prune(everything=True)
    assert victim.read_text() == "years"
    assert sorted(path.name for path in cache.folder.iterdir()) == [".lock", "notes.json", "thesis.json"]


def test_an_entry_that_could_not_be_read_back_is_not_written(cache: Cache) -> None:
    (entry,) = cache.entries()
    components = {**COMPONENTS, "target": "9.0"}
    odd = {**asdict(entry), "components": components, "key": key_of(components)}
    cache.add([Entry(**{**odd, "path": "/bundle-\udcff/x.engine"})])
    assert len(cache.entries()) == 1
    cache.add([Entry(**odd)])
    assert len(cache.entries()) == 2


@pytest.mark.parametrize("kind", ["pipe", "device", "link"])
def test_a_lock_that_is_no_file_is_not_waited_for(cache: Cache, tmp_path: Path, kind: str) -> None:
    assert cache.folder is not None
    lock = cache.folder / ".lock"
    lock.unlink()
    if kind == "pipe":
        os.mkfifo(lock)
    else:
        lock.symlink_to("/dev/zero" if kind == "device" else tmp_path / "elsewhere")
    for _ in range(2):
        result = CliRunner().invoke(app, ["cache", "prune", "--all", "--cache", str(cache.folder)])
        assert result.exit_code == 2 and "CX486" in result.stderr
    cache.add([Entry(KEY, "generator", COMPONENTS, "/x", 6, "0" * 64, {}, "")])
    assert cache.find(KEY) is not None and not (tmp_path / "elsewhere").exists()
