"""Runs cases, one a line of stdin, in a process with a limit on memory and an alarm: an answer a line of stdout.

What a case does is a function of the reader, the seed and the number. Before the first case of a reader its files are
read unchanged, which must be accepted. A case may take 1 GiB of memory more than there is when it begins.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
import time
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from random import Random
from typing import Any

import fuzz_bytes
import fuzz_mutations
import fuzz_readers as readers
import fuzz_tree
import fuzz_values
from fuzz_readers import Call, Outcome, Reader

from cosmos_export.bundle import strict
from cosmos_export.bundle.provenance import PROVENANCE_FILE
from cosmos_export.bundle.writer import DESCRIPTION_ROLE
from cosmos_export.cli import verbs

MEMORY_BYTES = 1 << 30
ALARM_S, BUSY_S = 10.0, 120.0
_RUNS_S = 0.001
"""Seconds of the processor in a tenth of the alarm: less is waiting."""
MOST = 3
"""Mutations of one case."""
_NOBODY = 65_534


class Hang(BaseException):
    """A case did not end in time. Not an `Exception`, so that nothing takes it for one of its own."""


class Audit:
    """Sees what Python does to files and processes while a case runs. A hook cannot be removed."""

    def __init__(self) -> None:
        self._on = False
        self._folder: Path | None = None
        self._seen: list[str] = []
        sys.addaudithook(self._hook)

    def begin(self, folder: Path | None) -> None:
        """Look, also at files that are outside of a tree and within ``folder``."""
        self._on, self._folder, self._seen = True, folder, []

    def end(self) -> list[str]:
        self._on = False
        return self._seen

    def _hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self._on:
            return
        if event in _STARTS and not _is_own(event, arguments):
            self._seen.append(f"{event} {arguments!r}"[:200])
        if self._folder is not None and event in _TOUCHES:
            for argument in arguments[:2]:
                if isinstance(argument, str | bytes | os.PathLike):
                    path = os.path.abspath(os.fsdecode(argument))  # noqa: PTH100 - links are not followed
                    if path.startswith(str(self._folder)) and f"/{fuzz_values.OUTSIDE}/" in path:
                        self._seen.append(f"{event} {path}"[:200])


def _is_own(event: str, arguments: tuple[Any, ...]) -> bool:
    """Whether a process is one of this interpreter: what cannot be stopped otherwise runs in one of its own."""
    return event == "subprocess.Popen" and str(arguments[0]) == sys.executable


_STARTS = {"os.system", "subprocess.Popen", "os.exec", "os.posix_spawn", "pickle.find_class", "socket.connect"}
_TOUCHES = {
    "open",
    "os.remove",
    "os.rename",
    "os.listdir",
    "os.scandir",
    "os.mkdir",
    "os.rmdir",
    "os.link",
    "os.truncate",
}


class Worker:
    """Holds a tree for each reader."""

    def __init__(self, seeds: Path, work: Path, memory_bytes: int) -> None:
        self._seeds, self._work, self._memory = seeds, work, memory_bytes
        self._trees: dict[str, fuzz_tree.Tree] = {}
        self.audit = Audit()
        self._failure = ""

    def prepare(self, reader: Reader) -> fuzz_tree.Tree:
        """The tree of ``reader``, which is accepted as it is."""
        if reader.name in self._trees:
            return self._trees[reader.name]
        if not (self._seeds / f"{reader.seed.__name__}.done").exists():
            raise RuntimeError(f"no files for {reader.name}")
        folder = self._work / reader.name
        # Three levels, so that names that lead out of the tree lead to something.
        for depth in range(4):
            outside = folder.joinpath(*["a"] * depth) / fuzz_values.OUTSIDE
            outside.mkdir(parents=True, exist_ok=True)
            for name in ("secret", "secret.json"):
                (outside / name).write_text("{}")
        tree = fuzz_tree.Tree(self._seeds / reader.seed.__name__, folder / "a" / "a" / "a" / "tree")
        found = readers.outcome(reader, Call(tree.root, (), Random(0)))
        if found.kind != "accepted":
            raise RuntimeError(f"{reader.name} does not accept its own files: {found}")
        if reader.writes:
            tree.rebuild()
        self._trees[reader.name] = tree
        return tree

    def case(self, reader: Reader, seed: int, number: int) -> dict[str, Any]:
        """Run one case and say what came of it."""
        tree = self.prepare(reader)
        random = Random(f"{seed}:{reader.name}:{number}")
        names = reader.names(tree.files())
        while True:
            for _ in range(random.choice((1, 1, 1, 2, MOST))):
                fuzz_mutations.change(random, tree, names)
            if not tree.same():
                break
            tree.restore()
        return self.run(reader, tree, random.getrandbits(32))

    def flip(self, reader: Reader, name: str, bit: int) -> dict[str, Any]:
        """The case of one flipped bit of the file ``name``; bits beyond its end come round again."""
        tree = self.prepare(reader)
        data = tree.original(name)
        at, shift = divmod(bit % (8 * len(data)), 8)
        tree.write(name, fuzz_bytes.flip(data, at, shift), f"bit {shift} of byte {at} flipped")
        return self.run(reader, tree, bit)

    def run(self, reader: Reader, tree: fuzz_tree.Tree, draw: int) -> dict[str, Any]:
        changed = dict(tree.changed)
        if reader.resealed:
            _reseal(tree)
        started = time.perf_counter()
        found = self._guarded(reader, Call(tree.root, list(changed), Random(draw)), tree)
        seconds = time.perf_counter() - started
        if found.kind == "accepted":
            found = self._accepted(reader, tree, changed)
        said = found.said.replace(f"{tree.root}{os.sep}", "")  # where the tree is differs from run to run
        return {
            "kind": found.kind, "code": found.code, "said": said[:400], "seconds": round(seconds, 3),
            "changed": changed, "trace": (found.trace or self._failure)[-3000:] * (found.kind not in readers.GOOD),
        }  # fmt: skip

    def _accepted(self, reader: Reader, tree: fuzz_tree.Tree, changed: Mapping[str, str]) -> Outcome:
        """What acceptance is worth: nothing may differ, or the reference has to accept too."""
        if reader.unchanged_only and any(tree.differs(name) for name in reader.names(list(changed))):
            return Outcome("wrong", said="accepted, although it is not what was written")
        for name in changed:
            path = tree.root / name
            known = (tree.pristine / name).is_file()  # what was added need not be read
            regular = known and path.exists() and not fuzz_tree.is_special(path)
            if reader.is_compared(name) and regular and not readers.reference_accepts(path):
                return Outcome("wrong", said=f"{name} is accepted, and the reference refuses it")
        return Outcome("accepted")

    def finish(self, reader: Reader) -> None:
        """Put the files back."""
        tree = self._trees.get(reader.name)
        if tree is None:
            return
        (tree.root.parent / "latents.safetensors").unlink(missing_ok=True)
        if reader.writes or reader.resealed:
            tree.rebuild()
        else:
            tree.restore()

    def _guarded(self, reader: Reader, call: Call, tree: fuzz_tree.Tree) -> Outcome:
        self._failure = ""
        before = resource.getrlimit(resource.RLIMIT_DATA)
        resource.setrlimit(resource.RLIMIT_DATA, (_data_bytes() + self._memory, before[1]))
        self.audit.begin(tree.root.parents[3] if reader.confined else None)
        try:
            with (
                _alarm(ALARM_S),
                _somebody_else("unreadable" in str(tree.changed) and not reader.starts),
                self._remembering(),
            ):
                found = readers.outcome(reader, call)
        except Hang:
            found = Outcome("hang", said=f"did not end in {ALARM_S:g} s", trace=traceback.format_exc())
        except MemoryError:
            found = Outcome("memory", said="MemoryError", trace=traceback.format_exc())
        finally:
            seen = self.audit.end()
            canary = Path("CANARY")
            if canary.exists():  # evaluated in a process of its own
                canary.unlink()
                seen.append("text of a file was run")
            resource.setrlimit(resource.RLIMIT_DATA, before)
        return Outcome("wrong", said=f"reaches out of its files: {seen[0]}") if seen else found

    @contextmanager
    def _remembering(self) -> Iterator[None]:
        """Keeps the traceback of what a command reports as a bug."""
        before = verbs.fail_unexpected

        def reported(error: BaseException, *rest: Any) -> Any:
            if isinstance(error, Hang):
                raise error
            self._failure = "".join(traceback.format_exception(error))
            return before(error, *rest)

        verbs.fail_unexpected = reported  # type: ignore[assignment]
        try:
            yield
        finally:
            verbs.fail_unexpected = before


@contextmanager
def _alarm(seconds: float) -> Iterator[None]:
    """`Hang` after ``seconds`` of which the case used the processor, or in which it waited for something.

    Time in which a busy machine did not let it run is not its own, up to `BUSY_S`.
    """
    started, before, last = time.monotonic(), _processor_s(), -1.0

    def ring(*_: object) -> None:
        nonlocal last
        used = _processor_s() - before
        waits = used - last < _RUNS_S
        if used >= seconds or waits or time.monotonic() - started > BUSY_S:
            raise Hang
        last = used

    signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds, max(seconds / 10, 0.1))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def _processor_s() -> float:
    """Seconds that this process and its children have used the processor for."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    used = time.process_time() + children.ru_utime + children.ru_stime
    for task in Path("/proc/self/task").glob("*/children"):
        for pid in task.read_text().split():
            with suppress(OSError):
                fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
                used += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return used


@contextmanager
def _somebody_else(needed: bool) -> Iterator[None]:
    """As a user who may not read what nobody may read: to root nothing is unreadable."""
    if not needed or os.geteuid() != 0:
        yield
        return
    os.seteuid(_NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)


def _data_bytes() -> int:
    status = Path("/proc/self/status").read_text()
    (line,) = (line for line in status.splitlines() if line.startswith("VmData:"))
    return int(line.split()[1]) << 10


def _reseal(tree: fuzz_tree.Tree) -> None:
    """Make the manifest of the bundle say what its files are, wherever it is a manifest at all."""
    import hashlib

    path = tree.root / "x.bundle" / "manifest.json"
    if not os.path.lexists(path) or fuzz_tree.is_special(path) or path.stat().st_size > fuzz_values.MAX_BYTES:
        return
    try:
        document = json.loads(path.read_bytes())
        for record in document["files"]:
            file = tree.root / "x.bundle" / record["path"]
            if record["path"] and f"x.bundle/{record['path']}" in tree.changed and file.is_file():
                if file.stat().st_size > 1 << 28:
                    return
                record["size_bytes"] = file.stat().st_size
                record["sha256"] = hashlib.sha256(file.read_bytes()).hexdigest()
        if f"x.bundle/{PROVENANCE_FILE}" not in tree.changed:
            _describe(tree, document)
        data = strict.seal(document)
    except (ValueError, KeyError, TypeError, AttributeError, OSError, RecursionError):
        return  # it is no manifest any more
    tree.write("x.bundle/manifest.json", data, "resealed")


def _describe(tree: fuzz_tree.Tree, manifest: dict[str, Any]) -> None:
    """Make the provenance say what ``manifest`` says, whose record of it follows."""
    import hashlib

    name = f"x.bundle/{PROVENANCE_FILE}"
    found = json.loads(tree.read(name))
    own = [record for record in manifest["files"] if record["role"] == DESCRIPTION_ROLE]
    others = [record for record in manifest["files"] if record not in own]
    found["subject"] = [{"name": one["path"], "digest": {"sha256": one["sha256"]}} for one in others]
    parameters = found["predicate"]["buildDefinition"]["externalParameters"]
    parameters |= {"recipe": manifest["recipe"], "options": manifest["options"]}
    data = strict.canonical(found)
    for record in own:
        if record["path"] == PROVENANCE_FILE:
            record["size_bytes"], record["sha256"] = len(data), hashlib.sha256(data).hexdigest()
    tree.write(name, data, "resealed")


def main() -> None:
    seeds, work, memory = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what a library prints is no answer
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends this process
    worker = Worker(seeds, work, memory)
    resource.setrlimit(resource.RLIMIT_DATA, (_data_bytes() + 4 * memory, resource.RLIM_INFINITY))
    for line in sys.stdin:
        asked = json.loads(line)
        reader = readers.BY_NAME[asked["reader"]]
        try:
            if "bit" in asked:
                answer = worker.flip(reader, asked["file"], asked["bit"])
            elif "number" in asked:
                answer = worker.case(reader, asked["seed"], asked["number"])
            else:
                worker.prepare(reader)
                answer = {"kind": "ready"}
        except Exception as error:
            answer = {"kind": "broken", "said": repr(error), "trace": traceback.format_exc()}
        if keep := asked.get("keep"):
            import shutil

            shutil.copytree(worker.prepare(reader).root, keep, symlinks=True, ignore=_no_devices)
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
        worker.finish(reader)


def _no_devices(folder: str, names: list[str]) -> list[str]:
    paths = [Path(folder, name) for name in names]
    return [p.name for p in paths if not (p.is_symlink() or p.is_dir() or p.is_file()) or p.lstat().st_size > 1 << 28]


if __name__ == "__main__":
    main()
