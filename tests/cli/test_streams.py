"""Exit codes are those of the work, whatever happens to the streams; signals end a command in order."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests" / "bundle"))
import bundle_samples  # noqa: E402


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("bundles")
    for name in ("good", "bad"):
        bundle_samples.write(root / name)
    next(path for path in (root / "bad").rglob("*.plan")).write_bytes(b"another")
    return root


def shell(line: str, folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """``line`` for bash, in which `cosmos-export` is this one; the exit code is that of a pipe's first command."""
    command = f'cosmos-export() {{ {sys.executable} -m cosmos_export "$@"; }}\n{line}\nexit ${{PIPESTATUS[0]}}'
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **variables}
    return subprocess.run(
        ["bash", "-c", command], cwd=folder, capture_output=True, text=True, errors="replace", env=environment
    )


@pytest.mark.parametrize(
    ("line", "code"),
    [
        ("cosmos-export bundle verify good 2>&-", 0),
        ("cosmos-export bundle verify good 2>/dev/full", 0),
        ("cosmos-export bundle verify good 2>&1 | true", 0),
        ("cosmos-export bundle verify good | head -1", 0),
        ("cosmos-export bundle verify good --json | true", 0),
        ("cosmos-export bundle verify good >&-", 4),
        ("cosmos-export bundle verify good --json >/dev/full", 4),
        ("cosmos-export bundle verify bad 2>&-", 1),
        ("cosmos-export bundle verify bad >&- 2>&-", 1),
        ("cosmos-export bundle verify bad >/dev/full 2>/dev/full", 1),
        ("cosmos-export bundle verify bad | true", 1),
        ("cosmos-export inspect absent 2>&-", 2),
        ("cosmos-export inspect absent --json >&- 2>/dev/full", 2),
        ("cosmos-export targets | true", 0),
        ("cosmos-export targets >/dev/full", 4),
        ("cosmos-export --help >&-", 4),
        ("cosmos-export --no-such-option 2>&-", 2),
        ("cosmos-export bundle >&- 2>&-", 2),
    ],
)
def test_the_exit_code_is_that_of_the_work(bundles: Path, line: str, code: int) -> None:
    result = shell(line, bundles)
    assert result.returncode == code, result.stderr
    for wrong in ("CX000", "Traceback", "BrokenPipe", "Exception ignored"):
        assert wrong not in result.stderr
    assert ("CX803" in result.stderr) == (code == 4)


def test_a_closed_stream_is_not_the_next_file_that_is_opened(tmp_path: Path) -> None:
    """Messages to the number of a closed descriptor would otherwise be written into whatever was opened last."""
    code = (
        "import sys; from cosmos_export import streams; streams.guard()\n"
        "file = open('found', 'w'); sys.stderr.write('a message'); print('data', flush=True)\n"
        "file.write(f'{file.fileno()} {streams.lost()}')"
    )
    assert shell(f'{sys.executable} -c "{code}" <&- >&- 2>&-', tmp_path).returncode == 0
    assert (tmp_path / "found").read_text() == "3 [Errno 9] Bad file descriptor"


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_a_character_that_the_encoding_lacks(tmp_path: Path, bundles: Path, encoding: str) -> None:
    line = "cosmos-export inspect 'größe → 視頻'"
    result = shell(line, tmp_path, PYTHONIOENCODING=encoding)
    assert result.returncode == 2 and "CX000" not in result.stderr
    result = shell(f"{line} --json", tmp_path, PYTHONIOENCODING=encoding)
    assert "größe → 視頻" in json.loads(result.stdout)["error"]["message"]


ACT = """
import os, sys, time
from cosmos_export.cli import console, verbs
from cosmos_export.verb_options import NoOptions
import cosmos_export.cli as cli
app = verbs.Verbs()
@app.callback()
def root(): ...
@app.verb("act", NoOptions)
def act(options, as_json):
    console.set_resume_command("cosmos-export build x --resume")
    try:
        print("ready", flush=True)
        time.sleep(60)
    finally:
        console.log("cleaned up")
        time.sleep(0.2)
cli.app = app
sys.argv = ["cosmos-export", "act"]
cli.main()
"""


@pytest.mark.parametrize(
    ("number", "code", "name"),
    [(signal.SIGTERM, 143, "stopped by SIGTERM"), (signal.SIGHUP, 129, "stopped by SIGHUP"),
     (signal.SIGINT, 130, "interrupted")],
)  # fmt: skip
def test_a_signal_says_how_to_go_on(number: int, code: int, name: str) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", ACT], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.send_signal(number)
        _, err = process.communicate(timeout=20)
    assert process.returncode == code
    assert err == (
        f"cleaned up\nerror[CX002]: {name}; what is finished is kept\n\n"
        "hint: continue with `cosmos-export build x --resume`\n"
    )


def test_a_second_signal_does_not_cut_the_cleaning_up_short() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", ACT], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.readline()
        process.send_signal(signal.SIGTERM)
        assert process.stderr.readline() == "cleaned up\n"
        process.send_signal(signal.SIGHUP)
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=20)
    assert process.returncode == 143 and "stopped by SIGTERM" in err


def test_an_ignored_signal_stays_ignored() -> None:
    """As under `nohup`."""
    code = ACT.replace("time.sleep(60)", "time.sleep(1)")
    with subprocess.Popen(
        [sys.executable, "-c", f"import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN)\n{code}"],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        process.stdout.readline()
        process.send_signal(signal.SIGHUP)
        _, err = process.communicate(timeout=20)
    assert process.returncode == 0 and err == "cleaned up\n"
