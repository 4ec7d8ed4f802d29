"""`bundle verify` on the command line: one line a file, the verdict last on stderr, exit codes 0, 1 and 2."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests" / "bundle"))

import bundle_samples  # noqa: E402


def verify(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "cosmos_export", "bundle", "verify", *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    bundle_samples.write(tmp_path / "x")
    return tmp_path / "x"


def test_pass(bundle: Path) -> None:
    result = verify(bundle)
    assert result.returncode == 0
    assert result.stdout.splitlines() == [
        "PASS  manifest.json",
        "PASS  empty.txt",
        "PASS  engines/generator.plan",
        "PASS  engines/reasoner.plan",
        "PASS  tokenizer/tokenizer.json",
    ]
    assert result.stderr == f"PASS: {bundle}: 4 files, 25,002 bytes, as the manifest says\n"


def test_quiet(bundle: Path) -> None:
    assert verify(bundle, "--quiet").stderr == ""


def test_fail(bundle: Path) -> None:
    (bundle / "engines" / "generator.plan").write_bytes(b"x" * 17_000)
    result = verify(bundle)
    assert result.returncode == 1
    assert "FAIL  engines/generator.plan: SHA-256 is " in result.stdout
    assert result.stderr == f"FAIL: {bundle}: engines/generator.plan, of 5 checks; do not use this bundle\n"


def test_names_on_disk_cannot_drive_the_terminal(bundle: Path) -> None:
    (bundle / "\x1b[2J\udcff").write_text("")
    result = verify(bundle)
    assert "FAIL  '\\x1b[2J\\udcff': not listed in the manifest" in result.stdout


def test_json(bundle: Path) -> None:
    (bundle / "extra").write_text("")
    result = verify(bundle, "--json")
    assert result.returncode == 1
    document = json.loads(result.stdout)
    assert document["ok"] is False
    assert document["checks"][-1] == {"path": "extra", "status": "fail", "detail": "not listed in the manifest"}
    assert document["checks"][1]["status"] == "skipped"


def test_damaged_manifest_is_a_finding(bundle: Path) -> None:
    (bundle / "manifest.json").write_text("{")
    result = verify(bundle)
    assert result.returncode == 1
    assert result.stdout.startswith("FAIL  manifest.json: not JSON")


def test_not_a_bundle(tmp_path: Path) -> None:
    result = verify(tmp_path)
    assert result.returncode == 2
    assert result.stderr.startswith("error[CX700]: ")
    assert json.loads(verify(tmp_path, "--json").stdout)["error"]["code"] == "CX700"
