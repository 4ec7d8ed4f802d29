"""Directories that commands make: whole or not there, and nothing of a command that was killed stays for good."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from cosmos_export import directories
from cosmos_export.checkpoint.output import give_back, new_directory, require_space
from cosmos_export.diagnostics import UserError

ROOT = Path(__file__).resolve().parents[2]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def write(output: Path, text: str, force: bool = False) -> None:
    with new_directory(output, force) as folder:
        (folder / "file").write_text(text)


def kill_while_writing(output: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from cosmos_export.checkpoint.output import new_directory\n"
        f"with new_directory(Path({str(output)!r}), force=True) as folder:\n"
        "    (folder / 'file').write_text('half'); print('now', flush=True); time.sleep(60)"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None and process.stdout.readline() == "now\n"
        assert names(output.parent)[0].startswith(f".{output.name}.writing-")
        write(output, "another", force=True)  # what a living command works on stays
        assert len(names(output.parent)) == 2
        process.send_signal(signal.SIGKILL)


def test_what_killed_commands_left_is_gone_after_the_next_success(tmp_path: Path) -> None:
    output = tmp_path / "x"
    kill_while_writing(output)
    assert len(names(tmp_path)) == 2
    write(output, "new", force=True)
    assert names(tmp_path) == ["x"] and (output / "file").read_text() == "new"


def test_the_room_that_it_took_is_counted(tmp_path: Path) -> None:
    (tmp_path / ".x.writing-1").mkdir()
    (tmp_path / ".xy.writing-1").mkdir()
    (tmp_path / ".x.writing-2").write_text("a file")
    require_space(tmp_path / "x", 1, "CX131", "it", "")
    assert names(tmp_path) == [".x.writing-2", ".xy.writing-1"]
    with pytest.raises(UserError, match="CX131"):
        require_space(tmp_path / "x", 1 << 60, "CX131", "it", "")


def test_what_was_moved_aside_gets_its_name_back(tmp_path: Path) -> None:
    write(tmp_path / "x", "old")
    (tmp_path / "x").rename(tmp_path / ".x.replaced-1")
    give_back(tmp_path / "x")
    assert names(tmp_path) == ["x"] and (tmp_path / "x/file").read_text() == "old"
    (tmp_path / ".x.replaced-1").mkdir()
    give_back(tmp_path / "x")
    assert (tmp_path / "x/file").read_text() == "old"
    write(tmp_path / "x", "new", force=True)
    assert names(tmp_path) == ["x"]


@pytest.mark.parametrize("exchanges", [True, False])
def test_an_error_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exchanges: bool) -> None:
    write(tmp_path / "x", "old")
    if not exchanges:
        monkeypatch.setattr(directories, "exchange", lambda first, second: False)
    with pytest.raises(RuntimeError), new_directory(tmp_path / "x", force=True):
        raise RuntimeError
    with monkeypatch.context() as patched, pytest.raises(OSError, match="broken"):
        patched.setattr(directories, "sync_directory", broken)
        patched.setattr(directories, "sync_tree", lambda root: None)
        write(tmp_path / "x", "new", force=True)
    assert names(tmp_path) == ["x"] and (tmp_path / "x/file").read_text() == "old"
    write(tmp_path / "x", "new", force=True)
    assert names(tmp_path) == ["x"] and (tmp_path / "x/file").read_text() == "new"


def broken(path: Path) -> None:
    raise OSError(5, "broken")


def test_two_files_exchange_their_names(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    if not directories.exchange(tmp_path / "a", tmp_path / "b"):
        pytest.skip("this file system cannot")
    assert names(tmp_path / "a") == ["b"] and names(tmp_path / "b") == ["a"]
    with pytest.raises(FileNotFoundError):
        directories.exchange(tmp_path / "a", tmp_path / "c")


def test_directories_have_the_mode_of_any_other(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write(tmp_path / "x", "1")
        assert (tmp_path / "x").stat().st_mode & 0o777 == 0o750
    finally:
        os.umask(before)
    shutil.rmtree(tmp_path / "x")
