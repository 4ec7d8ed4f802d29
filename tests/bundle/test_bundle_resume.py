"""An interrupted writer's finished files go on, nothing else of it does, and the bundle is what it would have been."""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import bundle_samples
import pytest

from cosmos_export.bundle import BundleWriter, verify_bundle
from cosmos_export.diagnostics import FindingError, ToolError, UserError


def write(writer: BundleWriter, name: str, key: str) -> bool:
    """Make sample file ``name`` unless it is kept; whether it was made."""
    role, content = bundle_samples.FILES[name]
    path = writer.path(name, role)
    if writer.kept(name, key) is not None:
        return False
    path.write_bytes(content)
    writer.keep(name, key, hashlib.sha256(content).hexdigest(), {"made": name})
    return True


NAMES = sorted(bundle_samples.FILES)


def interrupt(output: Path, error: BaseException, count: int = 1) -> None:
    with pytest.raises(type(error)), BundleWriter(output) as writer:
        for name in NAMES[:count]:
            write(writer, name, f"key of {name}")
        (writer.path(NAMES[count], bundle_samples.FILES[NAMES[count]][0])).write_bytes(b"half")
        raise error


ENDS = [KeyboardInterrupt(), ToolError("CX424", "disk full"), OSError(28, "No space"), UserError("CX312", "no range"),
        KeyError("a bug")]  # fmt: skip


@pytest.mark.parametrize("error", ENDS, ids=repr)
def test_what_was_finished_is_taken_over_and_the_rest_is_not(tmp_path: Path, error: BaseException) -> None:
    interrupt(tmp_path / "x", error)
    with BundleWriter(tmp_path / "x", resume=True) as writer:
        assert writer.resumed == 1
        kept = writer.kept(NAMES[0], f"key of {NAMES[0]}")
        assert kept is not None and kept.facts == {"made": NAMES[0]}
        assert not (writer.path(NAMES[1], bundle_samples.FILES[NAMES[1]][0])).exists()
        made = [name for name in NAMES if write(writer, name, f"key of {name}")]
        assert made == NAMES[1:]
        writer.commit(bundle_samples.manifest())
    assert verify_bundle(tmp_path / "x").ok
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_it_is_the_bundle_that_it_would_have_been(tmp_path: Path) -> None:
    whole = bundle_samples.write(tmp_path / "whole")
    interrupt(tmp_path / "x", KeyboardInterrupt())
    with BundleWriter(tmp_path / "x", resume=True) as writer:
        for name in NAMES:
            write(writer, name, f"key of {name}")
        assert writer.commit(bundle_samples.manifest()).files == whole.files


def test_what_was_kept_and_nobody_asks_for_any_more_is_dropped(tmp_path: Path) -> None:
    """An engine that is cut in other places now, or a component that is left out: not even its directory is there."""
    with pytest.raises(KeyboardInterrupt), BundleWriter(tmp_path / "x") as writer:
        write(writer, NAMES[0], f"key of {NAMES[0]}")
        writer.path("engines/parts/generator_part_3.engine", "engine").write_bytes(b"e")
        writer.keep("engines/parts/generator_part_3.engine", "key", hashlib.sha256(b"e").hexdigest())
        raise KeyboardInterrupt
    with BundleWriter(tmp_path / "x", resume=True) as writer:
        assert writer.resumed == 2
        made = [name for name in NAMES if write(writer, name, f"key of {name}")]
        writer.commit(bundle_samples.manifest())
    assert made == NAMES[1:] and verify_bundle(tmp_path / "x").ok
    assert not (tmp_path / "x/engines/parts").exists()


def test_a_rename_that_fails_at_the_end_costs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def busy(self: BundleWriter, staging: Path) -> None:
        raise OSError(16, "Device or resource busy")

    with monkeypatch.context() as patched:
        patched.setattr(BundleWriter, "_swap", busy)
        with pytest.raises(ToolError, match="busy"), BundleWriter(tmp_path / "x") as writer:
            for name in NAMES:
                write(writer, name, f"key of {name}")
            writer.commit(bundle_samples.manifest())
    with BundleWriter(tmp_path / "x", resume=True) as writer:
        assert not [name for name in NAMES if write(writer, name, f"key of {name}")]
        writer.commit(bundle_samples.manifest())
    assert verify_bundle(tmp_path / "x").ok
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_a_finding_leaves_nothing_to_resume(tmp_path: Path) -> None:
    interrupt(tmp_path / "x", FindingError("CX450", "not as planned"))
    assert list(tmp_path.iterdir()) == []


def test_without_resume_what_was_left_is_removed(tmp_path: Path) -> None:
    interrupt(tmp_path / "x", KeyboardInterrupt())
    assert len(list(tmp_path.iterdir())) == 1
    with BundleWriter(tmp_path / "x") as writer:
        assert writer.kept(NAMES[0], f"key of {NAMES[0]}") is None
    assert list(tmp_path.iterdir()) == []


def test_another_key_is_another_file(tmp_path: Path) -> None:
    interrupt(tmp_path / "x", KeyboardInterrupt())
    with BundleWriter(tmp_path / "x", resume=True) as writer:
        assert writer.kept(NAMES[0], "key of another") is None
        assert not writer.path(NAMES[0], bundle_samples.FILES[NAMES[0]][0]).exists()
        assert writer.digest(NAMES[0]) is None


@pytest.mark.parametrize("how", ["longer", "same size", "gone", "a link"])
def test_a_kept_file_that_has_changed_is_not_taken(tmp_path: Path, how: str) -> None:
    interrupt(tmp_path / "x", KeyboardInterrupt())
    (staging,) = tmp_path.glob(".x.partial-*")
    path = staging / NAMES[0]
    content = path.read_bytes()
    if how == "longer":
        path.write_bytes(content + b"!")
    elif how == "same size":
        path.write_bytes(bytes(len(content)))
    else:
        path.unlink()
        if how == "a link":
            (tmp_path / "elsewhere").write_bytes(content)
            path.symlink_to(tmp_path / "elsewhere")
    with BundleWriter(tmp_path / "x", resume=True) as writer:
        assert writer.resumed == 0


def flipped(path: Path) -> None:
    """Another byte, and the size and time of before."""
    status, content = path.stat(), bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


@pytest.mark.parametrize("what", ["link to a file", "link to a folder", "hard link", "pipe", "dangling"])
def test_what_no_build_makes_is_no_part_of_what_is_taken_over(tmp_path: Path, what: str) -> None:
    interrupt(tmp_path / "x", KeyboardInterrupt(), count=2)
    (left,) = tmp_path.glob(".x.partial-*")
    path, other = left / NAMES[1], tmp_path / "other"
    match what:
        case "link to a file":
            path.rename(other)
            path.symlink_to(other)
        case "link to a folder":
            path.parent.rename(other)
            path.parent.symlink_to(other)
        case "hard link":
            other.hardlink_to(path)
        case "pipe":
            os.mkfifo(left / "pipe")
        case _:
            (left / "dangling").symlink_to("nothing")
    with BundleWriter(tmp_path / "x", resume=True) as writer:
        for name in NAMES:
            write(writer, name, f"key of {name}")
        writer.commit(bundle_samples.manifest())
    assert verify_bundle(tmp_path / "x").ok
    assert what in ("pipe", "dangling") or other.exists()


def test_a_kept_file_is_hashed_again(tmp_path: Path) -> None:
    whole = bundle_samples.write(tmp_path / "whole")
    interrupt(tmp_path / "x", KeyboardInterrupt(), count=3)
    (staging,) = tmp_path.glob(".x.partial-*")
    flipped(staging / "engines/generator.plan")
    with BundleWriter(tmp_path / "x", resume=True) as writer:
        assert writer.resumed == 2 and writer.digest("engines/generator.plan") is None
        for name in NAMES:
            write(writer, name, f"key of {name}")
        assert writer.commit(bundle_samples.manifest()).files == whole.files
    assert verify_bundle(tmp_path / "x").ok


@pytest.mark.parametrize("then", ["keep", "digest", "commit"])
@pytest.mark.parametrize("resumed", [False, True], ids=["first", "resumed"])
def test_a_kept_file_that_changes_during_the_build_ends_it(tmp_path: Path, then: str, resumed: bool) -> None:
    """What is made from it is not kept, and nothing is put in place."""
    if resumed:
        interrupt(tmp_path / "x", KeyboardInterrupt())
    with pytest.raises(ToolError, match=r"CX710: .*generator\.plan was finished and has changed since"):  # noqa: SIM117
        with BundleWriter(tmp_path / "x", resume=resumed) as writer:
            for name in NAMES if then == "commit" else NAMES[:2]:
                write(writer, name, f"key of {name}")
            flipped(writer.path("engines/generator.plan", "engine"))
            if then == "keep":
                write(writer, "tokenizer/tokenizer.json", "key")
            elif then == "digest":
                writer.digest("engines/generator.plan")
            else:
                writer.commit(bundle_samples.manifest())
    assert not (tmp_path / "x").exists()
    with BundleWriter(tmp_path / "x", resume=True) as writer:
        assert writer.kept("engines/generator.plan", "key of engines/generator.plan") is None


@pytest.mark.parametrize("mode", [0o777, 0o775, 0o1777])
def test_a_directory_that_others_may_write_to_is_not_taken_over(
    tmp_path: Path, mode: int, caplog: pytest.LogCaptureFixture
) -> None:
    interrupt(tmp_path / "x", KeyboardInterrupt())
    (staging,) = tmp_path.glob(".x.partial-*")
    staging.chmod(mode)
    with BundleWriter(tmp_path / "x", resume=True) as writer:
        assert writer.resumed == 0


def test_nothing_of_another_user_is_taken_over_or_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupt(tmp_path / "x", KeyboardInterrupt())
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    with BundleWriter(tmp_path / "x", resume=True) as writer:
        assert writer.resumed == 0
    assert len(list(tmp_path.glob(".x.partial-*"))) >= 1


def test_what_is_staged_is_private_and_what_is_finished_is_as_any_directory(tmp_path: Path) -> None:
    before = os.umask(0o002)
    try:
        with BundleWriter(tmp_path / "x") as writer:
            for name in NAMES:
                write(writer, name, "key")
            (staging,) = tmp_path.glob(".x.partial-*")
            assert staging.stat().st_mode & 0o777 == 0o700
            writer.commit(bundle_samples.manifest())
        assert (tmp_path / "x").stat().st_mode & 0o777 == 0o775
    finally:
        os.umask(before)


RECORDS = ["", "{", "[]", '{"name": "../../etc/passwd"}', "null", "{}", "[" * 100_000, '{"a":' * 100_000]


@pytest.mark.parametrize("change", [{"key": 1}, {"sha256": ["a"]}, {"name": "a\\ud800"}, {"size_bytes": "1"},
                                    {"size_bytes": True}, {"facts": []}, {"mtime_ns": 1e30}, {"more": 1}])  # fmt: skip
def test_a_record_with_a_wrong_value_counts_for_none(tmp_path: Path, change: dict[str, object]) -> None:
    interrupt(tmp_path / "x", KeyboardInterrupt())
    (record,) = tmp_path.glob(".x.partial-*/.state/*.json")
    record.write_text(json.dumps(json.loads(record.read_text()) | change).replace("\\\\ud800", "\\ud800"))
    with BundleWriter(tmp_path / "x", resume=True) as writer:
        assert writer.resumed == 0


def test_a_record_that_is_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    interrupt(tmp_path / "x", KeyboardInterrupt())
    (record,) = tmp_path.glob(".x.partial-*/.state/*.json")
    record.unlink()
    os.mkfifo(record)
    with BundleWriter(tmp_path / "x", resume=True) as writer:
        assert writer.resumed == 0


@pytest.mark.parametrize("text", RECORDS, ids=lambda text: text[:20])
def test_a_record_that_cannot_be_read_counts_for_none(tmp_path: Path, text: str) -> None:
    interrupt(tmp_path / "x", KeyboardInterrupt())
    (record,) = tmp_path.glob(".x.partial-*/.state/*.json")
    record.write_text(text)
    with BundleWriter(tmp_path / "x", resume=True) as writer:
        assert writer.resumed == 0


def test_a_record_cannot_name_a_file_outside(tmp_path: Path) -> None:
    interrupt(tmp_path / "x", KeyboardInterrupt())
    (record,) = tmp_path.glob(".x.partial-*/.state/*.json")
    (tmp_path / "victim").write_bytes(b"v")
    status = (tmp_path / "victim").stat()
    forged = json.loads(record.read_text()) | {
        "name": "../victim", "size_bytes": status.st_size, "mtime_ns": status.st_mtime_ns,
    }  # fmt: skip
    record.write_text(json.dumps(forged))
    with BundleWriter(tmp_path / "x", resume=True) as writer:
        assert writer.resumed == 0
    assert (tmp_path / "victim").exists()


def test_a_living_build_is_left_alone(tmp_path: Path) -> None:
    with BundleWriter(tmp_path / "x") as living:
        write(living, NAMES[0], "key")
        with BundleWriter(tmp_path / "x", force=True, resume=True) as writer:
            assert writer.resumed == 0
        assert living.kept(NAMES[0], "key") is not None


def test_the_space_that_is_asked_for_is_what_is_still_missing(tmp_path: Path) -> None:
    interrupt(tmp_path / "x", KeyboardInterrupt(), count=2)
    kept = sum(len(bundle_samples.FILES[name][1]) for name in NAMES[:2])
    with BundleWriter(tmp_path / "x", required_bytes=kept, resume=True) as writer:
        assert writer.resumed == 2


_PROGRAM = """
import hashlib, sys, time
from pathlib import Path
sys.path.insert(0, {tests!r})
import bundle_samples
from cosmos_export.bundle import BundleWriter
print("ready", flush=True)
with BundleWriter(Path({output!r}), resume=True) as writer:
    for name, (role, content) in sorted(bundle_samples.FILES.items()):
        path = writer.path(name, role)
        if writer.kept(name, "key of " + name) is None:
            path.touch()
            for position in range(0, len(content), 7):
                with path.open("ab") as file:
                    file.write(content[position:position + 7])
                time.sleep(0.0005)
            writer.keep(name, "key of " + name, hashlib.sha256(content).hexdigest())
    writer.commit(bundle_samples.manifest())
"""


@pytest.mark.parametrize("seed", range(4))
def test_killed_at_random_moments(tmp_path: Path, seed: int) -> None:
    """Five kills, each in the middle of something; then it is left to finish."""
    whole, output = bundle_samples.write(tmp_path / "whole"), tmp_path / "x"
    program = textwrap.dedent(_PROGRAM).format(tests=str(Path(__file__).parent), output=str(output))
    moments = random.Random(seed)
    for _ in range(5):
        process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        time.sleep(moments.uniform(0.0, 0.06))
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()
        if output.exists():
            break
    if not output.exists():
        subprocess.run([sys.executable, "-c", program], check=True, stdout=subprocess.DEVNULL)
    report = verify_bundle(output)
    assert report.ok
    assert (
        json.loads((output / "manifest.json").read_bytes())["files"]
        == json.loads((tmp_path / "whole" / "manifest.json").read_bytes())["files"]
    ), whole
