"""A disk that fills up at any stage of a build: a file system in memory that is made too small, and larger again.

It is mounted in a child with a mount namespace of its own, which needs either root or user namespaces.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import subprocess
import sys
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import build_harness as harness
import pytest

from cosmos_export.bundle import read_bundle, verify_bundle
from cosmos_export.checkpoint.demo import write_demo_checkpoint
from cosmos_export.compiler import stages
from cosmos_export.compiler.cache import Cache
from cosmos_export.compiler.driver import build
from cosmos_export.diagnostics import ToolError
from cosmos_export.options import BuildOptions

pytest.importorskip("tensorrt_rtx")
_CLONE_NEWNS, _CLONE_NEWUSER = 0x00020000, 0x10000000
_CONTEXT = multiprocessing.get_context("fork")
_PLENTY = 1 << 30
SHARES = (0.0, 0.05, 0.2, 0.5, 0.999)
"""Shares of the bundle's size for which there is space."""


def enter_namespaces() -> None:
    """Mounts of this process are its own from here on. Raises OSError where the system does not allow it."""
    user, group = os.getuid(), os.getgid()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(_CLONE_NEWNS | (_CLONE_NEWUSER if user else 0)):
        raise OSError(ctypes.get_errno(), "unshare")
    if user:
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"0 {user} 1")
        Path("/proc/self/gid_map").write_text(f"0 {group} 1")
    command("mount", "--make-rprivate", "/")


def command(*arguments: str) -> None:
    done = subprocess.run(arguments, capture_output=True, text=True)
    if done.returncode:
        raise OSError(f"{' '.join(arguments)}: {done.stderr}")


def in_a_child(work: Callable[[], Any], mounts: Path) -> Any:
    """What ``work`` returns in a child that has a file system in memory at ``mounts``; skips where none can be had."""
    ours, theirs = _CONTEXT.Pipe(duplex=False)

    def run(pipe: Connection) -> None:
        try:
            try:
                enter_namespaces()
                command("mount", "-t", "tmpfs", "-o", f"size={_PLENTY}", "tmpfs", str(mounts))
            except OSError as error:
                pipe.send(("skip", f"no file system can be mounted here: {error}"))
                return
            pipe.send(("found", work()))
        except BaseException:
            pipe.send(("failed", traceback.format_exc()))

    process = _CONTEXT.Process(target=run, args=(theirs,))
    process.start()
    theirs.close()
    kind, found = ours.recv()
    process.join()
    if kind == "skip":
        pytest.skip(found)
    assert kind == "found", found
    return found


def used_bytes(folder: Path) -> int:
    status = os.statvfs(folder)
    return (status.f_blocks - status.f_bfree) * status.f_frsize


def limit(folder: Path, size_bytes: int) -> None:
    command("mount", "-o", f"remount,size={size_bytes}", str(folder))


@pytest.mark.skipif(sys.platform != "linux", reason="mount namespaces are Linux's")
def test_a_disk_that_fills_up_at_any_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error says so every time, the cache is as it was, and with more space `resume` ends with the same bundle."""
    size_bytes = _PLENTY

    def capture(*arguments: Any, **settings: Any) -> Any:
        """There was enough space when the build began, and then somebody takes it."""
        if size_bytes != _PLENTY:
            limit(disk, size_bytes)
        return harness.remembered_capture(*arguments, **settings)

    monkeypatch.setattr(stages, "capture", capture)
    checkpoint = write_demo_checkpoint(tmp_path / "checkpoint", layers=1, dtype="bfloat16")
    disk = tmp_path / "disk"
    disk.mkdir()

    def options(name: str, **changed: Any) -> BuildOptions:
        settings: dict[str, Any] = {"cache": disk / "cache"} | changed
        return BuildOptions(
            checkpoint, disk / name, target="rtx-pro-6000", components=("none",), modalities=("vision",),
            parity="never", **settings,
        )  # fmt: skip

    def everything() -> list[tuple[str, int]]:
        """For each share of the space what the build said, and how many files it had finished."""
        nonlocal size_bytes
        build(options("other", profiles=("256p-17f",)))
        entries = Cache(disk / "cache").entries()
        before = used_bytes(disk)
        build(options("whole", cache=None))
        bundle_bytes = used_bytes(disk) - before
        whole = read_bundle(disk / "whole")
        command("rm", "-r", str(disk / "whole"))
        found = []
        for share in SHARES:
            size_bytes = before + int(share * bundle_bytes)
            with pytest.raises(ToolError, match="No space left on device") as caught:
                build(options("bundle"))
            assert "space" in caught.value.hint, caught.value
            assert Cache(disk / "cache").entries() == entries
            assert all(entry.present for entry in entries) and verify_bundle(disk / "other").ok
            found.append((caught.value.code, len(list(disk.glob(".bundle.partial-*/.state/*.json")))))
            size_bytes = _PLENTY
            limit(disk, size_bytes)
            build(options("bundle", resume=True, cache=None))
            assert verify_bundle(disk / "bundle").ok
            assert read_bundle(disk / "bundle").files == whole.files
            command("rm", "-r", str(disk / "bundle"))
            assert sorted(path.name for path in disk.iterdir()) == ["cache", "other"]
        return found

    build(BuildOptions(checkpoint, None, until="normalize", modalities=("vision",)))  # captured once, for the child
    found = in_a_child(everything, disk)
    # A small file, weights, and engines, which their builder writes.
    assert {code for code, _ in found} >= {"CX704", "CX440", "CX424"}, found
    # Files are written beside each other, so which of them are finished in between is not the same each time.
    assert found[0][1] == 0 < found[1][1] < found[-1][1], found
