"""From options to an open port: what is refused before anything is loaded, the golden request, the command."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from serve_samples import DROID, LIMITS, FakePolicy

from cosmos_export import cli, serve
from cosmos_export.diagnostics import FindingError, ToolError, UnsupportedError, UserError
from cosmos_export.embodiments import EMBODIMENTS
from cosmos_export.runtime.limits import ColumnLimits, Limits
from cosmos_export.serve import server
from cosmos_export.serve.desk import Desk
from cosmos_export.serve.metrics import Metrics
from cosmos_export.serve.policy import Expected, golden
from cosmos_export.serve.server import check, read_token
from cosmos_export.verb_options import ServeOptions

TOKEN = "0123456789abcdef"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"protocol": "lerobot"}, "known: openpi, gr00t"),
        ({"host": "0.0.0.0"}, "reached from other machines, and there is no token"),
        ({"host": "::"}, "reached from other machines"),
        ({"host": "192.168.1.7"}, "reached from other machines"),
        ({"host": "robot.local"}, "no IP address"),
        ({"host": ""}, "no IP address"),
        ({"port": 70_000}, "allowed: 0 to 65535"),
        ({"metrics_port": -1}, "allowed: 0 to 65535"),
        ({"deadline_s": 0.0}, "a deadline of"),
        ({"deadline_s": float("nan")}, "a deadline of"),
        ({"max_message_bytes": 1}, "allowed: 1 KiB to 1 GiB"),
        ({"max_connections": 0}, "allowed: 1 to 1000"),
    ],
)
def test_options_that_are_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said) as caught:
        check(replace(ServeOptions(), **changes))
    assert caught.value.code == "CX644"


def test_where_it_listens() -> None:
    assert (check(ServeOptions()).host, check(ServeOptions()).port) == ("127.0.0.1", 8000)
    assert check(ServeOptions(protocol="gr00t", host="localhost")).port == 5555
    assert check(ServeOptions(host="::1", port=0)).host == "::1"
    assert check(ServeOptions(host="0.0.0.0", token=TOKEN)).token == TOKEN


def test_tokens(tmp_path: Path) -> None:
    (tmp_path / "token").write_text(f"{TOKEN}\n")
    assert read_token(tmp_path / "token") == TOKEN
    for text in ("short", "", "0123456789 abcdef", "0123456789\x00abcdef", "é" * 20, "x" * 5000):
        (tmp_path / "token").write_text(text)
        with pytest.raises(UserError) as caught:
            read_token(tmp_path / "token")
        assert caught.value.code == "CX644"
        assert text[:8] not in str(caught.value) or not text


def test_the_golden_request() -> None:
    policy = FakePolicy()
    assert golden(policy) == golden(policy) and len(golden(policy).digest) == 64
    assert set(policy.seeds) == {0} and golden(policy).distance is None
    made = policy.act(policy.example(), 0).actions
    policy.build = Expected(made * np.float32(1.01), 0.02)
    assert golden(policy).distance == pytest.approx(0.01 / 1.01, rel=1e-3)
    for build in (Expected(made * np.float32(1.1), 0.02), Expected(made[:-4], 0.5), Expected(made * np.nan, 0.5)):
        policy.build = build
        with pytest.raises(FindingError, match="from those of the build"):
            golden(policy)
    policy.build = None
    drift = iter(range(100))
    policy.change = lambda actions: actions + np.float32(1e-6 * next(drift))
    with pytest.raises(FindingError, match="two results for one seed") as caught:
        golden(policy)
    assert caught.value.code == "CX645"
    policy.change = lambda actions: actions * np.float32("nan")
    with pytest.raises(FindingError, match="not finite"):
        golden(policy)


def test_the_port_stays_closed_without_it() -> None:
    policy, opened = FakePolicy(), []
    drift = iter(range(100))
    policy.change = lambda actions: actions + np.float32(next(drift))
    with pytest.raises(FindingError, match="the golden request"):
        server.serve(policy, ServeOptions(port=0), LIMITS, ready=opened.append)
    assert not opened


@pytest.mark.parametrize("protocol", ["openpi", "gr00t"])
def test_a_port_that_is_taken(protocol: Any) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ToolError) as caught:
            server.serve(FakePolicy(), ServeOptions(protocol=protocol, port=port), LIMITS)
        assert caught.value.code == "CX648"
        with pytest.raises(ToolError, match="metrics"):
            server.serve(FakePolicy(), ServeOptions(port=0, metrics_port=port), LIMITS)


def test_limits_of_another_robot() -> None:
    metrics = Metrics("b" * 64, "openpi")
    with pytest.raises(UserError, match="in units `raw`"):
        Desk(FakePolicy(), limits=replace(LIMITS, units="raw"), metrics=metrics)
    with pytest.raises(UserError, match="1 columns, and an action has 8"):
        Desk(FakePolicy(), limits=Limits("model", (ColumnLimits("x", 0, 1),)), metrics=metrics)
    bridge = EMBODIMENTS["bridge_orig_lerobot"]
    columns = tuple(ColumnLimits(f"{i}", -1, 1, jump=1) for i in range(10))
    with pytest.raises(UserError, match="have no state"):
        Desk(FakePolicy(bridge), limits=Limits("model", columns), metrics=metrics)
    assert DROID.width == 8


def test_without_the_libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve, "PACKAGES", {"no_such_module": "no-such-package"})
    with pytest.raises(UnsupportedError, match="no-such-package") as caught:
        serve.require_installed()
    assert caught.value.code == "CX802"


def test_importing_the_package_needs_no_library() -> None:
    code = (
        "import sys, cosmos_export.serve; print({'websockets', 'msgpack', 'zmq', 'prometheus_client'} & {*sys.modules})"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ)
    assert result.stdout == "set()\n", result.stderr


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        ([], "CX644"),
        (["--no-limits", "--limits", "x.toml"], "CX644"),
        (["--no-limits", "--host", "0.0.0.0"], "CX644"),
        (["--no-limits", "--protocol", "pickle"], "CX100"),
        (["--limits", "missing.toml"], "CX630"),
        (["--no-limits", "--token-file", "missing"], "CX644"),
        (["--no-limits"], "CX7"),
    ],
)
def test_the_command_refuses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, arguments: list[str], code: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["cosmos-export", "serve", str(tmp_path / "bundle"), *arguments])
    with pytest.raises(SystemExit) as ending:
        cli.main()
    assert ending.value.code == 2 or code == "CX7"
    assert f"error[{code}" in capsys.readouterr().err
