"""Files of a bundle are opened by what the manifest lists, in the directory that was verified."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import bundle_samples
import pytest

from cosmos_export.bundle import BundleFiles, Manifest, WeightInput, open_bundle, parse_manifest, read_files
from cosmos_export.bundle import files as reading
from cosmos_export.bundle.strict import StrictError
from cosmos_export.diagnostics import FindingError, UserError
from cosmos_export.runtime.engine_files import engine_problems

TOKENIZER, ENGINE = "tokenizer/tokenizer.json", "engines/generator.plan"


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    bundle_samples.write(tmp_path / "x.bundle")
    return tmp_path / "x.bundle"


def test_files_are_those_of_the_manifest(bundle: Path) -> None:
    files = read_files(bundle)
    assert files.manifest == bundle_samples.manifest() or files.manifest.files
    assert files.read(TOKENIZER, "tokenizer") == b"{}"
    with files.open(ENGINE, "engine") as file:
        assert file.read() == bundle_samples.FILES[ENGINE][1]
    assert files.location(ENGINE, "engine").read_bytes() == bundle_samples.FILES[ENGINE][1]


@pytest.mark.parametrize(
    "name", ["../outside/reasoner", "engines/absent", "manifest.json", "", "/etc/passwd", TOKENIZER]
)
def test_a_name_is_not_a_path(bundle: Path, name: str) -> None:
    files = open_bundle(bundle)
    for use in (files.read, files.location, lambda *a: files.open(*a).__enter__()):
        with pytest.raises(FindingError) as caught:
            use(name, "engine")
        assert caught.value.code == "CX711"
        assert "is not in the manifest" in caught.value.message or "has the role" in caught.value.message


def test_a_link_that_is_swapped_changes_nothing(bundle: Path, tmp_path: Path) -> None:
    other, link = tmp_path / "other.bundle", tmp_path / "current"
    shutil.copytree(bundle, other)
    (other / TOKENIZER).write_bytes(b"[]")
    link.symlink_to(bundle)
    files = read_files(link)
    link.unlink()
    link.symlink_to(other)
    assert files.read(TOKENIZER, "tokenizer") == b"{}"
    assert files.location(TOKENIZER, "tokenizer").read_bytes() == b"{}"
    with files.open(TOKENIZER, "tokenizer") as file:
        assert file.read() == b"{}"
    bundle.rename(tmp_path / "moved.bundle")
    other.rename(bundle)
    assert files.location(TOKENIZER, "tokenizer").read_bytes() == b"{}"


def test_without_paths_through_descriptors(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "path_of_descriptor", lambda descriptor: tmp_path / "nowhere" / str(descriptor))
    files = read_files(bundle)
    assert files.location(TOKENIZER, "tokenizer") == bundle.resolve() / TOKENIZER
    bundle.rename(tmp_path / "moved.bundle")
    shutil.copytree(tmp_path / "moved.bundle", bundle)
    with pytest.raises(FindingError, match="another directory"):
        files.location(TOKENIZER, "tokenizer")


def sparse(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(20_000_000_000)


CHANGES: dict[str, Callable[[Path], Any]] = {
    "pipe": os.mkfifo,
    "device": lambda path: path.symlink_to("/dev/zero"),
    "link": lambda path: path.symlink_to("../engines/reasoner.plan"),
    "directory": Path.mkdir,
    "sparse": sparse,
    "nothing": lambda path: None,
    "longer": lambda path: path.write_bytes(b"{} "),
    "other": lambda path: path.write_bytes(b"[]"),
    "hard link": lambda path: os.link(path.parents[1] / "empty.txt", path),
}


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("what", [TOKENIZER, "manifest.json"])
def test_what_is_no_file_is_refused_at_once(bundle: Path, name: str, what: str) -> None:
    files, start = open_bundle(bundle), time.monotonic()
    (bundle / what).unlink()
    CHANGES[name](bundle / what) if what == TOKENIZER or name != "hard link" else os.link(
        bundle / "empty.txt", bundle / what
    )
    with pytest.raises((FindingError, UserError)) as caught:
        files.read(TOKENIZER, "tokenizer") if what == TOKENIZER else open_bundle(bundle)
    assert caught.value.code in ("CX711", "CX700")
    assert time.monotonic() - start < 2


@pytest.mark.parametrize("verb", [("run", "-p", "x", "-o", "o.png"), ("bench",)])
def test_commands_read_a_manifest_that_is_one(tmp_path: Path, verb: tuple[str, ...]) -> None:
    (tmp_path / "x").mkdir()
    os.mkfifo(tmp_path / "x/manifest.json")
    done = subprocess.run(
        [sys.executable, "-m", "cosmos_export", verb[0], "x", *verb[1:]],
        cwd=tmp_path, capture_output=True, text=True, timeout=60,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])},
    )  # fmt: skip
    assert done.returncode == 1 and "not a regular file" in done.stderr, done.stderr


def test_only_so_much_is_read_into_memory(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "MAX_DOCUMENT_BYTES", 1000)
    with pytest.raises(FindingError, match="8,000 bytes"):
        open_bundle(bundle).read("engines/reasoner.plan", "engine")


# -- the manifest's names and roles -----------------------------------------------------------------------------------


def renamed(manifest: Manifest, name: str) -> Manifest:
    graphs = {name if graph == "reasoner" else graph: record for graph, record in manifest.graphs.items()}
    edges = tuple(replace(edge, source=name) for edge in manifest.edges)
    engines = tuple(replace(e, graph=name) if e.graph == "reasoner" else e for e in manifest.engines)
    return replace(manifest, graphs=graphs, edges=edges, engines=engines)


@pytest.mark.parametrize(
    "name", ["../../outside/reasoner", "a/b", "..", ".hidden", "", "a\0b", "x" * 129, "a b", "a\n"]
)
def test_graphs_have_names_of_files(bundle: Path, name: str) -> None:
    whole = open_bundle(bundle).manifest
    assert parse_manifest(renamed(whole, "reasoner.2").to_bytes()).graphs
    with pytest.raises(StrictError, match="a graph's name"):
        parse_manifest(renamed(whole, name).to_bytes())


def engine_at(index: int, **changes: Any) -> Callable[[Manifest], Manifest]:
    def change(manifest: Manifest) -> Manifest:
        engines = list(manifest.engines)
        engines[index] = replace(engines[index], **changes)
        return replace(manifest, engines=tuple(engines))

    return change


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (engine_at(0, path=TOKENIZER), "has the role 'tokenizer', not 'engine'"),
        (engine_at(0, path=ENGINE), "is used 2 times"),
        (engine_at(0, weights=(WeightInput("w", ENGINE, 0, 1, "int8", (1,)),)),
         "has the role 'engine', not 'weights'"),
        (lambda m: replace(m, request=replace(m.request, prompt=replace(m.request.prompt, tokenizer="empty.txt"))),
         "has the role 'note', not 'tokenizer'"),
        (lambda m: replace(m, request=replace(m.request, prompt=replace(m.request.prompt, tokenizer="absent"))),
         "is not a file"),
    ],
)  # fmt: skip
def test_files_have_the_role_that_they_are_named_in(
    bundle: Path, change: Callable[[Manifest], Manifest], said: str
) -> None:
    with pytest.raises(StrictError, match=said):
        parse_manifest(change(open_bundle(bundle).manifest).to_bytes())


KNOWN = bytes((1, 7, 1, 116))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (bundle_samples.engine(17_000, 1 << 4, KNOWN), None),
        (bundle_samples.engine(17_000, 1 << 3, KNOWN), "compute capability 8.9; the target rtx-pro-6000 has 12.0"),
        (bundle_samples.engine(17_000, 1 << 3), None),
        (bundle_samples.engine(16_999) + b"x", "has 17000 bytes, its header says 16999"),
        (b"x" * 17_000, "is not a TensorRT-RTX engine"),
        (b"x", "is not a TensorRT-RTX engine"),
    ],
)  # fmt: skip
def test_engines_are_for_the_target(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes, said: str | None
) -> None:
    monkeypatch.setitem(bundle_samples.FILES, ENGINE, ("engine", content))
    bundle_samples.write(tmp_path / "x.bundle")
    found = dict(engine_problems(BundleFiles(tmp_path / "x.bundle")))
    assert (said is None and not found) or (said is not None and said in found[ENGINE])


def test_engines_are_of_the_release_that_the_manifest_records(bundle: Path) -> None:
    files = open_bundle(bundle)
    for recorded, wrong in (("0.0.0.0", False), ("1.7.1.116", True)):
        other = replace(files.manifest, tools={"tensorrt_rtx": recorded})
        found = dict(engine_problems(BundleFiles(bundle, other)))
        assert bool(found) == wrong
        assert not wrong or found[ENGINE] == f"was built by 0.0.0.0, and the manifest says {recorded}"


def plan(tag: bytes = b"ftrt", serialization: int = 0, version: bytes = bytes((11, 4, 0, 106))) -> bytes:
    """What begins as a plan of TensorRT does, as its samples document it."""
    return tag + serialization.to_bytes(4, "little") + bytes(16) + version + b"x" * 100


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (plan(), None),
        (plan(version=bytes((10, 16, 1, 11))), "was built by 10.16.1.11, and the manifest says 11.4.0.106"),
        (plan(serialization=1, version=bytes(4)), None),  # where the version is then is not documented
        (plan(b"vtrt"), "is an engine of TensorRT-RTX, not of TensorRT"),
        (plan(b"ptrt"), "is not a TensorRT engine"),
        (plan()[:27], "is not a TensorRT engine"),
        (b"x" * 200, "is not a TensorRT engine"),
        (b"", "is not a TensorRT engine"),
    ],
)  # fmt: skip
def test_engines_of_full_tensorrt_are_plans_of_its_release(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes, said: str | None
) -> None:
    for name in (ENGINE, "engines/reasoner.plan"):
        monkeypatch.setitem(bundle_samples.FILES, name, ("engine", content))
    bundle_samples.write(tmp_path / "x.bundle")
    manifest = open_bundle(tmp_path / "x.bundle").manifest
    full = replace(manifest.target, name="b200", backend="tensorrt", compute_capability="10.0")
    manifest = replace(manifest, target=full, tools={"tensorrt": "11.4.0.106"})
    found = dict(engine_problems(BundleFiles(tmp_path / "x.bundle", manifest)))
    assert (said is None and not found) or (said is not None and said in found[ENGINE])
    unknown = replace(manifest, target=replace(full, backend="of-tomorrow"))
    assert not dict(engine_problems(BundleFiles(tmp_path / "x.bundle", unknown)))
