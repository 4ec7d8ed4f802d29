"""Audit trails: what was changed is found, whoever goes on goes on from the last line."""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

import pytest

from cosmos_export import cli
from cosmos_export.audit import FIRST, AuditTrail, verify_trail
from cosmos_export.diagnostics import FindingError, UserError


@pytest.fixture
def trail(tmp_path: Path) -> Path:
    path = tmp_path / "trail.jsonl"
    with AuditTrail(path, clock=lambda: 1_700_000_000.25) as written:
        written.record("verified", bundle="b" * 64)
        for seed in range(4):
            written.record("request", seed=seed, text="ä\n\x1b")
        written.record("ended", requests=4)
    return path


def test_each_line_has_the_digest_of_the_line_before_it(trail: Path) -> None:
    lines = trail.read_bytes().splitlines()
    before = FIRST
    for number, line in enumerate(lines):
        entry = json.loads(line)
        assert (entry["n"], entry["previous"]) == (number, before)
        before = hashlib.sha256(line).hexdigest()
    found = verify_trail(trail)
    assert (found.lines, found.head) == (6, before)
    assert found.events == {"verified": 1, "request": 4, "ended": 1}
    assert found.first == found.last == "2023-11-14T22:13:20.250+00:00"
    assert trail.stat().st_mode & 0o077 == 0


def test_going_on(trail: Path) -> None:
    head = verify_trail(trail).head
    with AuditTrail(trail) as written:
        assert written.head == head
        written.record("loaded", device="cpu")
        with pytest.raises(UserError, match="another process writes"):
            AuditTrail(trail)
    assert verify_trail(trail, head).lines == 7
    AuditTrail(trail).close()


def test_what_a_trail_says_does_not_act_on_the_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    entry = {"n": 0, "previous": FIRST, "time": "\x1b[31mX\x9b\u202e", "event": "\x1b]0;title\x07"}
    (tmp_path / "trail").write_text(json.dumps(entry) + "\n")
    monkeypatch.setattr(sys, "argv", ["cosmos-export", "audit", "verify", str(tmp_path / "trail")])
    with pytest.raises(SystemExit):
        cli.main()
    assert not set("".join(capsys.readouterr())) & set("\x1b\x9b\u202e\x07")


def lines_changed(data: bytes) -> dict[str, tuple[bytes, str]]:
    """Changes to a trail, and what finds them."""
    lines = data.splitlines(keepends=True)
    return {
        "a value": (data.replace(b'"seed":1', b'"seed":7'), "line 4 does not follow"),
        "a line is gone": (b"".join(lines[:2] + lines[3:]), "line 3 is not the entry"),
        "the first is gone": (b"".join(lines[1:]), "line 1 is not the entry"),
        "two are exchanged": (b"".join([lines[0], lines[2], lines[1], *lines[3:]]), "line 2 is not the entry"),
        "one is there twice": (b"".join([*lines[:2], *lines[1:]]), "line 3 is not the entry"),
        "white space": (data.replace(b'"n":2,', b'"n": 2,'), "line 3 is not in the form"),
        "a changed text": (data.replace(b'"seed":1', b'"seed":7'), "line 4 does not follow"),
        "an unknown event": (data.replace(b'"verified"', b'"approved"'), "line 1 is not the entry"),
        "no JSON": (b"{\n" + data, "line 1 is not JSON"),
        "a number": (b"1\n" + data, "line 1 is not the entry"),
        "an empty line": (b"\n" + data, "line 1 is not JSON"),
        "depth": (b"[" * 60_000 + b"\n" + data, "line 1 is not JSON"),
        "a torn end": (data[:-9], "line 6 is not complete"),
        "a long line": (b"x" * 70_000 + b"\n" + data, "line 1 is too long"),
    }


NAMES = sorted(lines_changed(b"line\n" * 6))


@pytest.mark.parametrize("name", NAMES)
def test_changes_are_found(trail: Path, name: str) -> None:
    data, said = lines_changed(trail.read_bytes())[name]
    trail.write_bytes(data)
    for look in (verify_trail, AuditTrail):
        with pytest.raises(FindingError, match=said) as caught:
            look(trail)
        assert caught.value.code == "CX651"
    assert trail.read_bytes() == data


def test_missing_ends_are_found_by_an_anchor_alone(trail: Path) -> None:
    head = verify_trail(trail).head
    lines = trail.read_bytes().splitlines(keepends=True)
    trail.write_bytes(b"".join(lines[:-1]))
    assert verify_trail(trail).lines == 5
    with pytest.raises(FindingError, match="none of its 5 lines has the digest"):
        verify_trail(trail, head)
    with pytest.raises(UserError, match="no digest"):
        verify_trail(trail, "abc")


def test_places_that_are_none(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "no" / "trail", Path("/dev/null"), tmp_path / "nul\0"):
        with pytest.raises(UserError) as caught:
            AuditTrail(path)
        assert caught.value.code == "CX650"


def test_the_verb(trail: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def audit(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["cosmos-export", "audit", "verify", str(trail), *arguments])
        with pytest.raises(SystemExit) as ending:
            cli.main()
        return (int(ending.value.code or 0), *capsys.readouterr())

    code, out, err = audit()
    head = verify_trail(trail).head
    assert code == 0 and f"anchor  {head}" in out and "6 lines follow" in err
    code, out, _ = audit("--json", "--anchor", head)
    assert code == 0 and json.loads(out)["lines"] == 6
    trail.write_bytes(trail.read_bytes().replace(b'"seed":1', b'"seed":7'))
    code, out, err = audit("--json")
    assert code == 1 and json.loads(out)["error"]["code"] == "CX651" and "line 4 does not follow" in err


@pytest.mark.parametrize(
    "line",
    [
        b'{"n":0,"n":0,"time":"x","event":"ready","previous":"%s"}',
        b'{"n":false,"time":"x","event":"ready","previous":"%s"}',
        b'{"n":-0.0,"time":"x","event":"ready","previous":"%s"}',
        b'{"n":0.0,"time":"x","event":"ready","previous":"%s"}',
        b'{"n": 0,"time":"x","event":"ready","previous":"%s"}',
        b'{"n":0,"time":"x","event":"ready","previous":"%s","x":NaN}',
        b'{"n":0,"time":"x","event":"ready","previous":"%s","x":1e999}',
        b'{"n":0,"time":"x","event":"ready","previous":"%s","x":' + b"1" * 5000 + b"}",
        b'{"n":0,"time":"x","event":["ready"],"previous":"%s"}',
        b'{"n":0,"time":"x","event":"ready","previous":"%s","x":' + b"[" * 20000 + b"]" * 20000 + b"}",
        b'\xef\xbb\xbf{"n":0,"time":"x","event":"ready","previous":"%s"}',
    ],
)  # fmt: skip
def test_a_line_has_one_form(tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "trail"
    path.write_bytes(line.replace(b"%s", FIRST.encode()) + b"\n")
    with pytest.raises(FindingError, match="line 1 "):
        verify_trail(path)
    path.write_bytes(b'{"n":0,"time":"x","event":"ready","previous":"%s","x":-0.0}\n' % FIRST.encode())
    assert verify_trail(path).lines == 1
