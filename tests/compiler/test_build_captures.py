"""The cache of captured graphs: what is read back is the same program, and a build makes the same bytes either way."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import build_harness as harness
import pytest
import torch
from typer.testing import CliRunner

import cosmos_export.compiler.captures as captures
from cosmos_export.capture.document import alike, program_document, read_program
from cosmos_export.capture.sources import weight_sources
from cosmos_export.checkpoint import open_checkpoint
from cosmos_export.checkpoint.codecs import CODECS, codec_tensors
from cosmos_export.cli import app
from cosmos_export.compiler.cache import Cache, key_of
from cosmos_export.compiler.driver import build
from cosmos_export.compiler.selection import codec_config
from cosmos_export.ir.program import Program
from cosmos_export.ir.spec import WeightSource
from cosmos_export.ir.text import print_program
from cosmos_export.passes.pipeline import default_passes, run_passes

STEP = "step"
NAMES = (STEP, *CODECS)


@dataclass(frozen=True)
class Captured:
    """One program of a checkpoint, and what it was captured from."""

    config: dict[str, Any]
    sources: dict[str, WeightSource]
    program: Program

    @property
    def data(self) -> bytes:
        return program_document(self.program)


@pytest.fixture(scope="module")
def captured(omni: Path) -> Callable[[str], Captured]:
    found, made = open_checkpoint(omni), {}

    def get(name: str) -> Captured:
        if name not in made:
            sources = weight_sources(found.tensors if name == STEP else codec_tensors(found, name))
            if name == STEP:
                config = dict(found.geometry.config)
                program = harness.remembered_capture(config, sources, modalities=("vision", "sound", "action"))
            else:
                config = codec_config(found, CODECS[name].folder)
                program = harness.remembered_codec(name, config, sources)
            made[name] = Captured(config, sources, program)
        return made[name]

    return get


# ---------------------------------------------------------------------------------------------------------------------
# Documents


@pytest.mark.parametrize("name", NAMES)
def test_what_is_read_is_what_was_captured(captured: Callable[[str], Captured], name: str) -> None:
    """Nodes, operands, names, order, modules, bindings, sizes; and so is what is written of it again."""
    one = captured(name)
    again = read_program(one.data, one.sources)
    assert alike(again, one.program)
    assert program_document(again) == one.data
    assert print_program(again) == print_program(one.program)


def test_passes_find_no_difference(captured: Callable[[str], Captured]) -> None:
    """Values that passes make are named as they would be, though names of erased ones are taken."""
    one = captured(STEP)
    first, second = one.program.copy(), read_program(one.data, one.sources)
    first = read_program(one.data, one.sources)
    graph = first.graphs["joint"]
    gone, counts = graph.naming()
    assert gone and counts
    texts = []
    for program in (first, second):
        run_passes(program, default_passes())
        texts.append(print_program(program))
    assert texts[0] == texts[1]


def renamed(program: Program) -> None:
    next(n for n in program.graphs["joint"].calls()).name = "another"


def rebound(program: Program) -> None:
    weights = list(program.graphs["joint"].weights.values())
    first = weights[0]
    second = next(n for n in weights[1:] if n.meta["spec"] == first.meta["spec"])
    first.meta["weight"], second.meta["weight"] = second.meta["weight"], first.meta["weight"]


def other_module(program: Program) -> None:
    next(n for n in program.graphs["joint"].calls()).meta["module"] += "x"


def other_constant(program: Program) -> None:
    node = next(iter(program.graphs["joint"].constants.values()))
    node.meta["constant"] = node.meta["constant"] * (1 + 2**-20)


def other_names_later(program: Program) -> None:
    program.graphs["joint"].continue_naming((), {"add": 10_000})


def other_dim(program: Program) -> None:
    program.dims["frames"] = replace(program.dims["frames"], max=17)


def other_order(program: Program) -> None:
    program.rates = dict(reversed(program.rates.items()))


@pytest.mark.parametrize(
    "change", [renamed, rebound, other_module, other_constant, other_names_later, other_dim, other_order]
)
def test_a_difference_is_seen(captured: Callable[[str], Captured], change: Callable[[Program], None]) -> None:
    one = captured(STEP)
    other = read_program(one.data, one.sources)
    change(other)
    assert not alike(other, one.program)


def test_weights_are_where_the_checkpoint_has_them(captured: Callable[[str], Captured]) -> None:
    one = captured(STEP)
    elsewhere = {
        key: replace(source, file=Path("/elsewhere"), offset=source.offset + 64) for key, source in one.sources.items()
    }
    program = read_program(one.data, elsewhere)
    read = {s for n in program.graphs["joint"].weights.values() for s in n.meta["weight"].sources}
    assert read and all(source == elsewhere[source.key] for source in read)


def changed(data: bytes, **fields: Any) -> bytes:
    return json.dumps({**json.loads(data), **fields}).encode()


def in_graph(data: bytes, change: Callable[[dict[str, Any]], None]) -> bytes:
    document = json.loads(data)
    change(document["graphs"][0])
    return json.dumps(document).encode()


WRONG: dict[str, Callable[[bytes], bytes]] = {
    "no JSON": lambda data: data[:-1],
    "another schema": partial(changed, schema=2),
    "one field more": partial(changed, more=1),
    "a rate that is none": partial(changed, rates={"input_ids": "DAILY"}),
    "a graph that is none": partial(changed, graphs=[1]),
    "code for a name": partial(changed, body="__import__('os')"),
    "a weight of no checkpoint": partial(
        in_graph, change=lambda graph: next(iter(graph["weights"].values())).update(keys=["absent"])
    ),
    "a weight of another type": partial(
        in_graph, change=lambda graph: next(iter(graph["weights"].values())).update(dtype="int64")
    ),
    "weights without a place": partial(in_graph, change=lambda graph: graph.update(weights={})),
    "an order without an input": partial(in_graph, change=lambda graph: graph["order"].pop()),
    "an order with one twice": partial(in_graph, change=lambda graph: graph["order"].append(graph["order"][0])),
    "an operation that is none": partial(
        in_graph, change=lambda graph: graph["graph"]["operations"][0].update(op="os.system")
    ),
}


@pytest.mark.parametrize("how", WRONG)
def test_a_document_that_is_wrong_is_refused(captured: Callable[[str], Captured], how: str) -> None:
    one = captured(STEP)
    with pytest.raises(ValueError, match=r"\w"):
        read_program(WRONG[how](one.data), one.sources)


# ---------------------------------------------------------------------------------------------------------------------
# Keys and entries


def test_the_key_has_all_that_capture_follows_from(
    captured: Callable[[str], Captured], monkeypatch: pytest.MonkeyPatch
) -> None:
    one = captured("sound-decoder")
    first = next(iter(one.sources))

    def key(name: str = "sound-decoder", config: Any = one.config, **source: Any) -> str:
        sources = {**one.sources, first: replace(one.sources[first], **source)}
        return key_of(captures.capture_components(name, config, sources))

    same = key()
    assert key(file=Path("/elsewhere"), offset=64) == same
    others = [
        key("vae-decoder"), key(config={**one.config, "more": 1}), key(dtype=torch.float16), key(shape=(1, 2, 3)),
        key(key="another"), key(scale=one.sources[first]),
    ]  # fmt: skip
    for name, value in (("_version", lambda package: f"{package} of tomorrow"), ("_code", lambda: "changed")):
        with monkeypatch.context() as patch:
            patch.setattr(captures, name, value)
            others.append(key())
    assert len({same, *others}) == len(others) + 1


class Once:
    """Gives one program, and counts how often it is asked."""

    def __init__(self, one: Captured) -> None:
        self.one, self.asked = one, 0

    def __call__(self, *_: Any) -> Program:
        self.asked += 1
        return read_program(self.one.data, self.one.sources)

    def through(self, folder: Path) -> Program:
        return captures.capture_codec("sound-decoder", self.one.config, self.one.sources, folder)


@pytest.fixture
def once(captured: Callable[[str], Captured], monkeypatch: pytest.MonkeyPatch) -> Once:
    made = Once(captured("sound-decoder"))
    monkeypatch.setattr(captures, "_CODECS", {"sound-decoder": made})
    return made


def content(folder: Path) -> Path:
    (path,) = folder.glob("*.graphs")
    return path


def test_it_is_captured_once(once: Once, tmp_path: Path) -> None:
    first, second = once.through(tmp_path / "cache"), once.through(tmp_path / "cache")
    assert once.asked == 1
    assert alike(first, second)
    once.through(tmp_path / "another")
    assert once.asked == 2
    captures.capture_codec("sound-decoder", once.one.config, once.one.sources, None)
    assert once.asked == 3


def flipped(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def another(path: Path) -> None:
    """Somebody's own graphs, with an entry that has their digest."""
    data = path.read_bytes().replace(b'"schema":1', b'"schema":3', 1)
    path.write_bytes(data)
    entry = path.with_suffix(".json")
    document = json.loads(entry.read_bytes())
    entry.write_text(json.dumps({**document, "sha256": hashlib.sha256(data).hexdigest()}))


def unfit(path: Path) -> None:
    """Graphs that read well and do not fit together, with an entry that has their digest."""
    document = json.loads(path.read_bytes())
    resealed(path, {**document, "graphs": {}})


def historyless(path: Path) -> None:
    resealed(path, {**json.loads(path.read_bytes()), "history": []})


def resealed(path: Path, document: dict[str, Any]) -> None:
    data = json.dumps(document).encode()
    path.write_bytes(data)
    entry = path.with_suffix(".json")
    fields = {**json.loads(entry.read_bytes()), "sha256": hashlib.sha256(data).hexdigest(), "size_bytes": len(data)}
    entry.write_text(json.dumps(fields))


def removed(path: Path) -> None:
    path.unlink()


def linked(path: Path) -> None:
    path.unlink()
    path.symlink_to("/dev/zero")


@pytest.mark.parametrize("damage", [flipped, another, unfit, historyless, removed, linked])
def test_damaged_graphs_are_captured_again(once: Once, tmp_path: Path, damage: Callable[[Path], None]) -> None:
    folder = tmp_path / "cache"
    first = once.through(folder)
    damage(content(folder))
    assert alike(once.through(folder), first)
    assert once.asked == 2
    assert alike(once.through(folder), first)
    assert once.asked == 2, "the damaged ones are still there"


def test_a_cache_that_cannot_be_written_is_none(once: Once, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    once.through(tmp_path / "file")
    once.through(tmp_path / "file")
    assert once.asked == 2
    assert (tmp_path / "file").read_bytes() == b""


def test_a_program_that_no_document_holds_is_not_kept(
    once: Once, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(captures, "alike", lambda *_: False)
    once.through(tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_the_verbs_know_graphs(once: Once, tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    once.through(folder)
    path = content(folder)
    run = partial(CliRunner().invoke, app)
    listed = json.loads(run(["cache", "ls", "--json", "--cache", str(folder)]).stdout)["entries"]
    assert [(e["kind"], e["name"], e["present"], e["path"]) for e in listed] == [
        ("graphs", "sound-decoder", True, str(path))
    ]
    assert "0 engines and 1 captures recorded" in run(["cache", "ls", "--cache", str(folder)]).output
    config = {**once.one.config, "more": 1}
    captures.capture_codec("sound-decoder", config, once.one.sources, folder)
    why = json.loads(run(["cache", "why", path.stem[:12], "--json", "--cache", str(folder)]).stdout)
    assert why["differ"] == ["configuration"]
    assert run(["cache", "prune", "--cache", str(folder)]).exit_code == 0
    assert len(Cache(folder).entries()) == 2
    (folder / f"{'0' * 64}.graphs").write_text("of an entry that was never written")
    path.with_suffix(".json").unlink()
    run(["cache", "prune", "--cache", str(folder)])
    assert len(list(folder.glob("*.graphs"))) == 1 and not path.exists()
    run(["cache", "prune", "--all", "--cache", str(folder)])
    assert [one.name for one in folder.iterdir()] == [".lock"]


# ---------------------------------------------------------------------------------------------------------------------
# Builds


def test_a_build_makes_the_same_bytes_with_captured_graphs(
    omni: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first build captures, the second reads what the first has kept."""
    found = []
    for name in ("first", "second"):
        options = harness.transformer_only(
            omni, tmp_path / name, components=("sound-decoder",), parity="never", graphs=tmp_path / "graphs"
        )
        result = build(options)
        assert result.manifest is not None
        found.append({file.path: file.sha256 for file in result.manifest.files})
        monkeypatch.setattr(captures.model, "capture", lambda *_, **__: pytest.fail("the step is captured again"))
        monkeypatch.setattr(captures, "_CODECS", {})
    assert found[0] == found[1]
    assert len(Cache(tmp_path / "graphs").entries()) == 2


def test_the_command_line_keeps_graphs_where_it_is_told(
    omni: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`--cache` for both kinds, a variable for each, and none with `--no-cache`."""
    asked = []

    def stop(options: Any, *_: Any, **__: Any) -> None:
        asked.append((options.cache, options.graphs))
        raise KeyboardInterrupt

    monkeypatch.setattr("cosmos_export.compiler.driver.build", stop)
    monkeypatch.setenv("COSMOS_EXPORT_CACHE", str(tmp_path / "both"))
    monkeypatch.delenv("COSMOS_EXPORT_GRAPHS")
    command = ["build", str(omni), "-o", str(tmp_path / "x")]
    CliRunner().invoke(app, command)
    CliRunner().invoke(app, [*command, "--cache", str(tmp_path / "said")])
    CliRunner().invoke(app, [*command, "--no-cache"])
    monkeypatch.setenv("COSMOS_EXPORT_GRAPHS", str(tmp_path / "graphs"))
    CliRunner().invoke(app, command)
    monkeypatch.setenv("COSMOS_EXPORT_GRAPHS", "off")
    CliRunner().invoke(app, command)
    both, said, graphs = (tmp_path / name for name in ("both", "said", "graphs"))
    assert asked == [(both, both), (said, said), (None, None), (both, graphs), (both, None)]
