"""Cases in worker processes, what comes of them, and the smallest form of what is wrong."""

from __future__ import annotations

import contextlib
import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import fuzz_seeds as seeds
from fuzz_readers import BY_NAME, GOOD, Reader
from fuzz_worker import BUSY_S, MEMORY_BYTES

_START_S = 300.0
_STUCK_S = 20.0
"""Seconds without use of the processor after which a worker that does not answer is stuck in native code."""


@dataclass
class Row:
    """What came of the cases of one reader."""

    reader: str
    tried: int = 0
    kinds: Counter[str] = field(default_factory=Counter)
    codes: Counter[str] = field(default_factory=Counter)
    slowest_s: float = 0.0
    seconds: float = 0.0
    findings: list[dict[str, Any]] = field(default_factory=list)
    not_repeated: list[dict[str, Any]] = field(default_factory=list)
    """What a second run of the same case in a new process did not show."""

    def add(self, answer: dict[str, Any]) -> None:
        self.tried += 1
        self.kinds[answer["kind"]] += 1
        if answer["code"]:
            self.codes[answer["code"]] += 1
        self.slowest_s = max(self.slowest_s, answer["seconds"])
        self.seconds += answer["seconds"]

    def document(self) -> dict[str, Any]:
        names = (*GOOD, *COLUMNS)
        others = {kind: count for kind, count in self.kinds.items() if kind not in names}
        return {
            "reader": self.reader, "tried": self.tried, **{name: self.kinds[name] for name in names}, "other": others,
            "slowest_s": round(self.slowest_s, 1), "codes": dict(sorted(self.codes.items())), "findings": self.findings,
            "not_repeated": self.not_repeated,
        }  # fmt: skip


COLUMNS = ("wrong", "CX000", "hang", "memory", "died")
"""Outcomes that none may have, with whatever else is not in `GOOD`."""


class Died(Exception):
    """The worker ended, or had to be ended."""

    def __init__(self, kind: str, said: str) -> None:
        super().__init__(said)
        self.kind = kind


class Process:
    """A worker process."""

    def __init__(self, folder: Path, memory_bytes: int = MEMORY_BYTES) -> None:
        self._work = Path(tempfile.mkdtemp(prefix="fuzz-"))
        self._work.chmod(0o755)  # one mutation is read as another user
        environment = {
            **os.environ, "PYTHONPATH": str(seeds.ROOT), "OMP_NUM_THREADS": "1", "COSMOS_EXPORT_CACHE": "off",
            "PYTHONHASHSEED": "0", "CUDA_VISIBLE_DEVICES": "", "NO_COLOR": "1",
        }  # fmt: skip
        arguments = [sys.executable, str(Path(__file__).with_name("fuzz_worker.py")), str(folder), str(self._work)]
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed in `close`
        self._process = subprocess.Popen(
            [*arguments, str(memory_bytes)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log,
            env=environment, cwd=self._work,
        )  # fmt: skip

    def ask(self, question: dict[str, Any], wait_s: float) -> dict[str, Any]:
        """The answer to ``question``; `Died` where there is none in time."""
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(question).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise Died("died", self._last_words()) from None
        started, moved, used = time.monotonic(), time.monotonic(), -1.0
        while not select.select([self._process.stdout], [], [], 1.0)[0]:
            now, before, used = time.monotonic(), used, _processor_s(self._process.pid)
            moved = now if used > before else moved
            if now - started > wait_s or now - moved > _STUCK_S:
                raise Died("hang", f"did not end in {now - started:.0f} s, an alarm notwithstanding")
        line = self._process.stdout.readline()
        if not line:
            raise Died("died", self._last_words())
        answer: dict[str, Any] = json.loads(line)
        if answer["kind"] == "broken":
            raise RuntimeError(f"{question}: {answer['said']}\n{answer['trace']}")
        return answer

    def kill(self) -> None:
        self._process.kill()

    def close(self) -> None:
        self.kill()
        self._process.wait()
        self._log.close()
        shutil.rmtree(self._work, ignore_errors=True)

    def _last_words(self) -> str:
        status = self._process.wait()
        self._log.seek(0)
        return f"exit status {status}: {self._log.read()[-500:].strip()}"


def _processor_s(pid: int) -> float:
    """Seconds that the process has used the processor for."""
    with contextlib.suppress(OSError):
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return 0.0


class Pool:
    """One worker, replaced when it dies."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.process: Process | None = None

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_: object) -> None:
        self.renew()

    def renew(self) -> None:
        if self.process is not None:
            self.process.close()
        self.process = None

    def run(self, question: dict[str, Any]) -> dict[str, Any]:
        """What came of one case, which may be the worker's end."""
        if self.process is None:
            self.process = Process(self.folder)
        reader = {"reader": question["reader"]}
        self.process.ask(reader, _START_S)
        started = time.perf_counter()
        try:
            return self.process.ask(question, BUSY_S + _STUCK_S)
        except Died as end:
            self.renew()
            seconds = time.perf_counter() - started
            return {"kind": end.kind, "code": "", "said": str(end), "seconds": seconds, "changed": {}, "trace": ""}


def make_seeds(folder: Path, readers: Sequence[Reader]) -> None:
    """The files of ``readers`` in ``folder``, but for those that are there."""
    for seed in dict.fromkeys(reader.seed for reader in readers):
        seeds.once(folder / seed.__name__, seed)


def campaign(
    folder: Path,
    readers: Sequence[Reader],
    count: int,
    seed: int,
    *,
    save: Path | None = None,
    seconds: float | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> list[Row]:
    """``count`` cases of each of ``readers`` (of some a share), or as many as ``seconds`` allow, in turns."""
    rows = {reader.name: Row(reader.name) for reader in readers}
    started = time.perf_counter()
    with Pool(folder) as pool:
        for number, reader in _order(readers, count, by_turns=seconds is not None):
            if seconds is not None and time.perf_counter() - started > seconds:
                break
            question = {"reader": reader.name, "seed": seed, "number": number}
            answer, row = pool.run(question), rows[reader.name]
            if answer["kind"] not in GOOD:
                first, answer = answer, _confirmed(pool, question, answer)
                if answer["kind"] in GOOD:
                    row.not_repeated.append({**question, "kind": first["kind"], "said": first["said"]})
            row.add(answer)
            if answer["kind"] not in GOOD:
                row.findings.append(_finding(folder, reader, question, answer, save))
                say(f"{answer['kind']}: {describe(row.findings[-1])}")
            if row.tried % 500 == 0:
                say(f"{reader.name}: {row.tried} of {count}")
    return list(rows.values())


def _order(readers: Sequence[Reader], count: int, by_turns: bool) -> Iterator[tuple[int, Reader]]:
    if by_turns:
        return ((number, one) for number in range(count) for one in readers if number < one.share * count)
    return ((number, one) for one in readers for number in range(round(one.share * count)))


def flips(folder: Path, reader: Reader, file: str, count: int, seed: int) -> Row:
    """``count`` single bits of ``file`` flipped, one a case."""
    from random import Random

    random, row = Random(seed), Row(f"{reader.name}, bits of {Path(file).name}")
    with Pool(folder) as pool:
        for _ in range(count):
            question = {"reader": reader.name, "file": file, "bit": random.getrandbits(40)}
            answer = pool.run(question)
            row.add(answer)
            if answer["kind"] not in GOOD:
                row.findings.append({**question, **answer})
    return row


def _confirmed(pool: Pool, question: dict[str, Any], answer: dict[str, Any]) -> dict[str, Any]:
    """The same case in a new process: what came before, or a busy machine, is no part of a finding."""
    pool.renew()
    again = pool.run(question)
    return again if again["kind"] in GOOD or again["changed"] else {**again, "changed": answer["changed"]}


def _finding(
    folder: Path, reader: Reader, question: dict[str, Any], answer: dict[str, Any], save: Path | None
) -> dict[str, Any]:
    """What is needed to see it again: the question, and with ``save`` the files as they were read."""
    found = {**question, **{key: answer[key] for key in ("kind", "code", "said", "changed", "trace")}}
    if save is not None:
        place = save / f"{reader.name}-{question['seed']}-{question['number']}"
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir(parents=True)
        with Pool(folder) as pool, contextlib.suppress(Died):
            pool.run({**question, "keep": str(place / "files")})
        (place / "finding.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        found["files"] = str(place)
    return found


def describe(finding: dict[str, Any]) -> str:
    """One line that says how to see it again, and what was done to which file."""
    case = f"--reader {finding['reader']} --seed {finding['seed']} --only {finding['number']}"
    done = "; ".join(f"{name}: {what}" for name, what in finding["changed"].items())
    return f"{case}: {done[:300]} → {finding['said'][:300]}"


def table(rows: Sequence[Row]) -> str:
    """The rows as Markdown, with their sum."""
    names = ("reader", "tried", "refused", "accepted", "tool", *COLUMNS, "other", "slowest")
    lines = ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
    total = Counter[str]()
    for row in rows:
        document = row.document()
        other = sum(document["other"].values())
        cells = [document[name] for name in ("tried", "refused", "accepted", "tool", *COLUMNS)] + [other]
        total.update(dict(zip(names[1:], cells, strict=False)))
        lines.append(f"| {row.reader} | " + " | ".join(map(str, cells)) + f" | {row.slowest_s:.1f} s |")
    lines.append("| all | " + " | ".join(str(total[name]) for name in names[1:-1]) + " | |")
    return "\n".join(lines)


@contextmanager
def seed_folder(given: Path | None) -> Iterator[Path]:
    """``given``, or a new one that is removed."""
    if given is not None:
        given.mkdir(parents=True, exist_ok=True)
        yield given.resolve()
        return
    with tempfile.TemporaryDirectory(prefix="fuzz-seeds-") as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


def readers_named(names: Sequence[str]) -> list[Reader]:
    unknown = [name for name in names if name not in BY_NAME]
    if unknown:
        raise SystemExit(f"no reader {', '.join(unknown)}; known: {', '.join(BY_NAME)}")
    return [BY_NAME[name] for name in names] or list(BY_NAME.values())
