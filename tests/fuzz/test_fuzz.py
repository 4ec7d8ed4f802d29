"""The fuzzer finds what it is there for, and says the same twice."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import fuzz_bytes
import fuzz_campaign
import fuzz_mutations
import fuzz_tree
import fuzz_values
import fuzz_worker
import pytest
from fuzz_readers import GOOD, Call, Reader, command, judge

from cosmos_export.diagnostics import FindingError, UserError


def seed(folder: Path) -> None:
    (folder / "a.json").write_text('{"a": [1, 2.5, "x"], "b": {"c": null}}')
    (folder / "b.txt").write_text("one\ntwo\n")


@pytest.fixture
def worker(tmp_path: Path) -> Iterator[fuzz_worker.Worker]:
    (tmp_path / "seed").mkdir()
    seed(tmp_path / "seed")
    (tmp_path / "seed.done").touch()
    made = fuzz_worker.Worker(tmp_path, tmp_path / "work", 256 << 20)
    yield made
    made.audit.end()


def reader(call: Callable[[Call], None], **settings: Any) -> Reader:
    """A reader that does ``call`` with what was changed, and accepts its own files."""
    return Reader("planted", seed, lambda asked: call(asked) if asked.changed else None, **settings)


def raises(error: BaseException) -> Callable[[Call], None]:
    def call(_: Call) -> None:
        raise error

    return call


def sleeps(_: Call) -> None:
    time.sleep(5)


def swallows(_: Call) -> None:
    with contextlib.suppress(Exception):
        time.sleep(5)


def grows(_: Call) -> None:
    bytearray(2 << 30)


def evaluates(_: Call) -> None:
    os.system("true")


def leaves(call: Call) -> None:
    (call.root.parent / fuzz_values.OUTSIDE / "secret").read_text()


def removes(call: Call) -> None:
    (call.root / ".." / fuzz_values.OUTSIDE / "secret.json").unlink()


def commands(_: Call) -> None:
    command("cache", "ls", "--json")


@pytest.mark.parametrize(
    ("call", "settings", "kind"),
    [
        (lambda call: None, {}, "accepted"),
        (raises(UserError("CX310", "no")), {}, "refused"),
        (raises(FindingError("CX711", "no")), {}, "refused"),
        (raises(KeyError("x")), {}, "CX000"),
        (raises(RecursionError()), {}, "CX000"),
        (raises(PermissionError()), {}, "CX801"),
        (raises(MemoryError()), {}, "memory"),
        (lambda call: None, {"unchanged_only": True}, "wrong"),
        (sleeps, {}, "hang"),
        (swallows, {}, "hang"),
        (grows, {}, "memory"),
        (evaluates, {}, "wrong"),
        (leaves, {}, "wrong"),
        (leaves, {"confined": False}, "accepted"),
        (removes, {}, "wrong"),
    ],
)
def test_a_planted_fault_is_found(
    worker: fuzz_worker.Worker,
    monkeypatch: pytest.MonkeyPatch,
    call: Callable[[Call], None],
    settings: dict[str, Any],
    kind: str,
) -> None:
    monkeypatch.setattr(fuzz_worker, "ALARM_S", 1.0)
    answer = worker.case(reader(call, **settings), 0, 1)
    assert answer["kind"] == kind, answer
    assert answer["changed"]


@pytest.mark.parametrize(
    ("printed", "kind"),
    [("{}", "accepted"), ("\x1b[31mred", "wrong"), ("a\x00", "wrong"), ("not JSON", "wrong"), ("NaN", "wrong")],
)
def test_what_a_command_prints_is_looked_at(
    worker: fuzz_worker.Worker, monkeypatch: pytest.MonkeyPatch, printed: str, kind: str
) -> None:
    import cosmos_export.cli

    monkeypatch.setattr(cosmos_export.cli, "main", lambda: print(printed))
    assert worker.case(reader(commands), 0, 1)["kind"] == kind


def test_exit_4_and_a_refusal_without_a_code_are_not_answers() -> None:
    planted = reader(lambda call: None, tools=("CX502",))
    assert judge(planted, 2, "CX310", "").kind == "refused"
    assert judge(planted, 2, "", "").kind == "no code"
    assert judge(planted, 4, "CX502", "").kind == "tool"
    assert judge(planted, 4, "CX801", "").kind == "CX801"
    assert judge(planted, 4, "CX000", "unexpected KeyError").kind == "CX000"
    assert judge(planted, 4, "CX000", "unexpected MemoryError").kind == "memory"
    assert judge(planted, 1, "", "FAIL").kind == "refused"
    assert "wrong" not in GOOD and "hang" not in GOOD


def test_a_case_is_its_seed_and_files_are_restored(worker: fuzz_worker.Worker, tmp_path: Path) -> None:
    planted = reader(lambda call: None)
    tree = worker.prepare(planted)

    def cases(first: int) -> list[Any]:
        found = []
        for number in range(60):
            answer = worker.case(planted, first, number)
            found.append((answer["changed"], {name: tree.read(name) for name in answer["changed"]}))
            worker.finish(planted)
            assert sorted(path.name for path in tree.root.iterdir()) == ["a.json", "b.txt"]
            assert all(tree.read(name) == tree.original(name) for name in ("a.json", "b.txt"))
        return found

    assert cases(0) == cases(0) != cases(1)


@pytest.mark.parametrize("kind", fuzz_tree.SPECIAL)
def test_every_special_file_is_placed_and_restored(tmp_path: Path, kind: str) -> None:
    (tmp_path / "pristine").mkdir()
    seed(tmp_path / "pristine")
    (tmp_path / fuzz_values.OUTSIDE).mkdir()
    tree = fuzz_tree.Tree(tmp_path / "pristine", tmp_path / "tree")
    fuzz_tree.place_special(tree, "a.json", kind)
    path = tree.root / "a.json"
    assert kind == "absent" if not os.path.lexists(path) else not tree.same()
    tree.restore()
    assert tree.same() and path.read_bytes() == tree.original("a.json")


def test_mutations_of_every_kind_of_file_change_it() -> None:
    """Nothing structure-aware is left to chance: from the same bytes come many different ones."""
    document = b'{"a": [1, 2.5, "x", true], "b": {"c": null}}'
    toml = b'name = "x"\n[[rules]]\nwhere = "gen"\nscheme = "fp8"\n'
    header = b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
    tensors = len(header).to_bytes(8, "little") + header + bytes(4)
    samples = {"json": document, "jsonl": document + b"\n", "toml": toml, "txt": b"a\nb\n", "safetensors": tensors}
    for suffix, data in samples.items():
        mutate = fuzz_mutations.by_kind(f"x.{suffix}")
        assert mutate is not fuzz_bytes.mutate_bytes
        found = {mutate(Random(number), data)[0] for number in range(100)}
        assert len(found) > 30, suffix


def test_a_worker_that_dies_is_a_finding_and_is_replaced(tmp_path: Path) -> None:
    folder = tmp_path / "seeds"
    folder.mkdir()
    only = fuzz_campaign.readers_named(["bench-compare"])
    fuzz_campaign.make_seeds(folder, only)
    with fuzz_campaign.Pool(folder) as pool:
        question = {"reader": "bench-compare", "seed": 0, "number": 0}
        first = pool.run(question)
        assert first["kind"] in GOOD
        assert pool.process is not None
        pool.process.ask({"reader": "bench-compare"}, 60)
        pool.process.kill()
        with pytest.raises(fuzz_campaign.Died):
            pool.process.ask(question, 60)
        pool.renew()
        assert pool.run(question) | {"seconds": 0} == first | {"seconds": 0}
