"""Under the final name there is nothing, the old bundle or the new one, whatever happens to the writer."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bundle_samples
import pytest

from cosmos_export import directories
from cosmos_export.bundle import BundleWriter, read_bundle, verify_bundle
from cosmos_export.bundle import writer as writers
from cosmos_export.diagnostics import CosmosExportError, InternalError, ToolError, UserError


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_writes_a_bundle_that_verifies(tmp_path: Path) -> None:
    written = bundle_samples.write(tmp_path / "new" / "x.bundle")
    assert read_bundle(tmp_path / "new" / "x.bundle") == written
    assert [record.path for record in written.files] == sorted(bundle_samples.FILES)
    assert names(tmp_path / "new") == ["x.bundle"]


def test_two_writes_differ_in_the_volatile_fields_only(tmp_path: Path) -> None:
    bundle_samples.write(tmp_path / "a")
    bundle_samples.write(tmp_path / "b", created="2027-01-01T00:00:00Z", build_seconds=99.0)  # type: ignore[arg-type]
    first, second = (json.loads((tmp_path / one / "manifest.json").read_bytes()) for one in "ab")
    assert all(first.pop(name) != second.pop(name) for name in ("volatile", "digest"))
    assert first == second
    for name in bundle_samples.FILES:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_an_existing_output_is_refused_before_any_work(tmp_path: Path) -> None:
    output = tmp_path / "x"
    output.mkdir()
    with pytest.raises(UserError, match="CX701"), BundleWriter(output):
        raise AssertionError("not reached")
    assert names(tmp_path) == ["x"]


def test_force_replaces_a_bundle(tmp_path: Path) -> None:
    bundle_samples.write(tmp_path / "x")
    bundle_samples.write(tmp_path / "x", force=True, build_seconds=99.0)
    assert read_bundle(tmp_path / "x").volatile.build_seconds == 99.0
    assert names(tmp_path) == ["x"]


def test_force_keeps_the_old_bundle_until_the_new_one_is_complete(tmp_path: Path) -> None:
    old = bundle_samples.write(tmp_path / "x")
    with BundleWriter(tmp_path / "x", force=True) as writer:
        for name, (role, content) in bundle_samples.FILES.items():
            writer.path(name, role).write_bytes(content)
            assert read_bundle(tmp_path / "x") == old
        writer.commit(bundle_samples.manifest(build_seconds=1.0))
        assert read_bundle(tmp_path / "x").volatile.build_seconds == 1.0


@pytest.mark.parametrize("kind", ["file", "directory", "link"])
def test_force_replaces_nothing_but_bundles(tmp_path: Path, kind: str) -> None:
    output, precious = tmp_path / "x", tmp_path / "home"
    precious.mkdir()
    (precious / "thesis.tex").write_text("years")
    if kind == "file":
        output.write_text("years")
    elif kind == "link":
        bundle_samples.write(tmp_path / "real")
        output.symlink_to(tmp_path / "real")
    else:
        output = precious
    with pytest.raises(UserError, match="CX702"), BundleWriter(output, force=True):
        raise AssertionError("not reached")
    assert (precious / "thesis.tex").read_text() == "years"


def test_force_takes_an_empty_directory(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    bundle_samples.write(tmp_path / "x", force=True)
    assert verify_bundle(tmp_path / "x").ok


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_an_exception_leaves_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    with pytest.raises(error), BundleWriter(tmp_path / "x") as writer:
        writer.path("a.bin", "x").write_bytes(b"1")
        raise error
    assert names(tmp_path) == []


def test_leaving_without_commit_leaves_nothing(tmp_path: Path) -> None:
    with BundleWriter(tmp_path / "x") as writer:
        writer.path("a.bin", "x").write_bytes(b"1")
    assert names(tmp_path) == []


@pytest.mark.parametrize("failing", ["sync_tree", "sync_directory"])
def test_a_failing_disk_at_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str) -> None:
    old = bundle_samples.write(tmp_path / "x")

    def fail(path: Path) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(directories, failing, fail)
    with pytest.raises(ToolError, match=r"CX707.*Input/output error"):
        bundle_samples.write(tmp_path / "x", force=True)
    assert read_bundle(tmp_path / "x") == old


def test_a_failing_rename_puts_the_old_bundle_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = bundle_samples.write(tmp_path / "x")
    rename = Path.rename

    def fail_for_staging(self: Path, target: Path) -> Path:
        if ".partial-" in self.name:
            raise OSError(28, "No space left on device")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail_for_staging)
    monkeypatch.setattr(directories, "exchange", lambda first, second: False)
    with pytest.raises(ToolError, match="CX707"):
        bundle_samples.write(tmp_path / "x", force=True)
    assert read_bundle(tmp_path / "x") == old
    assert names(tmp_path) == ["x"]


def test_an_output_that_appears_during_the_build_is_not_replaced(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="CX701"), BundleWriter(tmp_path / "x") as writer:
        for name, (role, content) in bundle_samples.FILES.items():
            writer.path(name, role).write_bytes(content)
        (tmp_path / "x").mkdir()
        (tmp_path / "x" / "mine").write_text("1")
        writer.commit(bundle_samples.manifest())
    assert names(tmp_path) == ["x"]
    assert names(tmp_path / "x") == ["mine"]


def test_no_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writers, "free_disk", lambda folder: 2**30)
    with BundleWriter(tmp_path / "x", required_bytes=2**29):
        pass
    with pytest.raises(ToolError, match=r"CX704: not enough disk space .*: 30\.1 GiB needed, 1\.0 GiB free"):
        BundleWriter(tmp_path / "x", required_bytes=30 * 2**30).__enter__()
    assert names(tmp_path) == []


def test_parent_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="CX703"):
        BundleWriter(tmp_path / "file" / "x").__enter__()


def test_parent_is_not_writable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writers.os, "access", lambda path, mode: False)
    with pytest.raises(UserError, match="CX703: no permission to write"):
        BundleWriter(tmp_path / "x").__enter__()


def test_the_root_directory_is_no_output() -> None:
    with pytest.raises(UserError, match="CX701"):
        BundleWriter(Path("/"), force=True).__enter__()


@pytest.mark.parametrize("path", ["../x", "/x", "manifest.json", "a b", "con"])
def test_path_stays_in_the_bundle(tmp_path: Path, path: str) -> None:
    with pytest.raises(InternalError, match="CX705"), BundleWriter(tmp_path / "x") as writer:
        writer.path(path, "x")


def test_one_role_a_file(tmp_path: Path) -> None:
    with pytest.raises(InternalError, match="two roles"), BundleWriter(tmp_path / "x") as writer:
        writer.path("a", "engine")
        writer.path("a", "tokenizer")


@pytest.mark.parametrize("entry", ["missing", "unknown", "symlink", "directory link", "hard link", "fifo"])
def test_only_the_files_announced_are_committed(tmp_path: Path, entry: str) -> None:
    (tmp_path / "outside").write_text("1")
    with pytest.raises(InternalError, match="CX706"), BundleWriter(tmp_path / "x") as writer:
        for name, (role, content) in bundle_samples.FILES.items():
            writer.path(name, role).write_bytes(content)
        extra = writer.path("extra", "x")
        if entry == "unknown":
            extra.write_bytes(b"1")
            (extra.parent / "generator.plan.tmp").write_bytes(b"1")
        elif entry == "symlink":
            extra.symlink_to(tmp_path / "outside")
        elif entry == "directory link":
            extra.symlink_to(tmp_path)
        elif entry == "hard link":
            extra.hardlink_to(tmp_path / "outside")
        elif entry == "fifo":
            os.mkfifo(extra)
        writer.commit(bundle_samples.manifest())
    assert names(tmp_path) == ["outside"]


def test_an_inconsistent_manifest_is_never_written(tmp_path: Path) -> None:
    with pytest.raises(InternalError, match=r"CX709.*'tokenizer/tokenizer\.json' is not a file"):  # noqa: SIM117
        with BundleWriter(tmp_path / "x") as writer:
            writer.path("engines/generator.plan", "engine").write_bytes(b"1")
            writer.commit(bundle_samples.manifest())
    assert names(tmp_path) == []


def test_commit_comes_once(tmp_path: Path) -> None:
    with pytest.raises(InternalError, match="commit once"), BundleWriter(tmp_path / "x") as writer:
        for name, (role, content) in bundle_samples.FILES.items():
            writer.path(name, role).write_bytes(content)
        writer.commit(bundle_samples.manifest())
        writer.commit(bundle_samples.manifest())
    assert verify_bundle(tmp_path / "x").ok


def test_progress_is_monotonic_and_complete(tmp_path: Path) -> None:
    events: list[tuple[str, int]] = []

    class Recorder:
        def begin(self, task: str, total: int | None = None) -> None:
            events.append((f"begin {task}", total or 0))

        def update(self, task: str, completed: int) -> None:
            events.append((task, completed))

        def end(self, task: str) -> None:
            events.append((f"end {task}", 0))

    with BundleWriter(tmp_path / "x", progress=Recorder()) as writer:
        for name, (role, content) in bundle_samples.FILES.items():
            writer.path(name, role).write_bytes(content)
        writer.commit(bundle_samples.manifest())
    total = sum(len(content) for _, content in bundle_samples.FILES.values())
    assert events[0] == ("begin hash", total)
    updates = [completed for task, completed in events if task == "hash"]
    assert updates == sorted(updates)
    assert updates[-1] == total
    assert events[-1] == ("end hash", 0)


_KILLED = """
    import sys, time
    from pathlib import Path
    sys.path.insert(0, {tests!r})
    import bundle_samples
    from cosmos_export.bundle import BundleWriter
    with BundleWriter(Path({output!r}), force=True) as writer:
        writer.path("engines/generator.plan", "engine").write_bytes(b"1" * 100_000)
        print("ready", flush=True)
        time.sleep(60)
"""


def _start_writer(output: Path) -> subprocess.Popen[str]:
    code = textwrap.dedent(_KILLED).format(tests=str(Path(__file__).parent), output=str(output))
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def test_sigkill_leaves_no_half_bundle_and_the_next_build_cleans_up(tmp_path: Path) -> None:
    old = bundle_samples.write(tmp_path / "x")
    with _start_writer(tmp_path / "x") as process:
        try:
            staging = [name for name in names(tmp_path) if name.startswith(".x.partial-")]
            assert len(staging) == 1
            # A second build beside the living one leaves its files alone.
            bundle_samples.write(tmp_path / "x", force=True)
            assert staging[0] in names(tmp_path)
        finally:
            process.send_signal(signal.SIGKILL)
    assert read_bundle(tmp_path / "x") == old
    assert names(tmp_path) == [staging[0], "x"]
    bundle_samples.write(tmp_path / "x", force=True)
    assert names(tmp_path) == ["x"]


@pytest.mark.parametrize("resume", [False, True])
def test_a_second_build_of_one_output_says_so_before_any_work(tmp_path: Path, resume: bool) -> None:
    """At its end it would find the bundle there. With `force` it replaces it, as it would any other."""
    with BundleWriter(tmp_path / "x") as writer:
        with pytest.raises(UserError, match=r"CX708: another build of .*x is running"):
            BundleWriter(tmp_path / "x", resume=resume).__enter__()
        with BundleWriter(tmp_path / "xy"), BundleWriter(tmp_path / "x", force=True):
            pass
        for name, (role, content) in bundle_samples.FILES.items():
            writer.path(name, role).write_bytes(content)
        writer.commit(bundle_samples.manifest())
    assert names(tmp_path) == ["x"]


def test_a_bundle_moved_aside_by_a_build_that_died_is_kept_while_it_is_the_only_one(tmp_path: Path) -> None:
    bundle_samples.write(tmp_path / "x")
    (tmp_path / "x").rename(tmp_path / ".x.replaced-1")
    with pytest.raises(UserError, match="CX701"), BundleWriter(tmp_path / "x"):
        pass
    assert names(tmp_path) == ["x"] and verify_bundle(tmp_path / "x").ok
    (tmp_path / ".x.replaced-2").mkdir()
    with BundleWriter(tmp_path / "x", force=True):
        assert ".x.replaced-2" not in names(tmp_path)


@pytest.mark.parametrize("kept", [False, True], ids=["no records", "records"])
@pytest.mark.parametrize("exchanges", [False, True], ids=["two renames", "exchange"])
def test_a_kill_at_any_moment_of_the_replacement_loses_neither(tmp_path: Path, exchanges: bool, kept: bool) -> None:
    """Before and after every rename: the next writer finds a whole bundle, the old one or the new."""
    for moment in range(9):
        folder = tmp_path / str(moment)
        bundle_samples.write(folder / "x", build_seconds=1.0)
        child = os.fork()
        if child == 0:
            with contextlib.suppress(BaseException):
                _replace_until(folder / "x", moment, exchanges, kept)
            os._exit(1)
        killed = os.WEXITSTATUS(os.waitpid(child, 0)[1]) == 9
        assert killed == (moment < (2 if exchanges else 3) + (3 if kept else 0)), moment
        with BundleWriter(folder / "x", force=True, resume=True) as again:
            seconds = read_bundle(folder / "x").volatile.build_seconds
            if kept and seconds == 1.0:
                assert again.resumed == len(bundle_samples.FILES), moment
        with BundleWriter(folder / "x", force=True):
            pass
        assert names(folder) == ["x"], moment
        assert seconds == 1.0 if moment == 0 else seconds in (1.0, 2.0)
        if not killed:
            assert seconds == 2.0
            return
    raise AssertionError("it was always killed")


def _replace_until(output: Path, moment: int, exchanges: bool, kept: bool) -> None:
    """Replace the bundle, and die before the rename or removal number ``moment`` of the commit."""
    left = moment

    def step(do: Callable[..., Any]) -> Callable[..., Any]:
        def stepping(*given: Any, **options: Any) -> Any:
            nonlocal left
            if left == 0:
                os._exit(9)
            left -= 1
            return do(*given, **options)

        return stepping

    writer = BundleWriter(output, force=True).__enter__()
    for name, (role, content) in bundle_samples.FILES.items():
        writer.path(name, role).write_bytes(content)
        if kept:
            writer.keep(name, "key", hashlib.sha256(content).hexdigest())
    exchange = directories.exchange
    if exchanges:
        directories.exchange = step(exchange)  # type: ignore[assignment]
    else:
        directories.exchange = lambda first, second: False  # type: ignore[assignment]
    Path.rename = step(Path.rename)  # type: ignore[method-assign]
    writers.shutil.rmtree = step(shutil.rmtree)  # type: ignore[assignment]
    writer.commit(bundle_samples.manifest(build_seconds=2.0))


def test_leftovers_of_other_names_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / ".xy.partial-1").mkdir()
    (tmp_path / ".x.partial-1").write_text("a file")
    (tmp_path / "target").mkdir()
    (tmp_path / ".x.partial-2").symlink_to(tmp_path / "target")
    bundle_samples.write(tmp_path / "x")
    assert names(tmp_path) == [".x.partial-1", ".x.partial-2", ".xy.partial-1", "target", "x"]


def test_every_error_is_one_of_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Path, *args: object, **kwargs: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(Path, "mkdir", fail)
    with pytest.raises(CosmosExportError, match="Read-only"):
        bundle_samples.write(tmp_path / "x")
