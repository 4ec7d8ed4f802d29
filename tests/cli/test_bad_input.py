"""Bad input ends in 1, 2 or 3, and never in a bug: `outcome` runs a verb and holds it to that."""

from __future__ import annotations

import inspect
import json
import re
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest
import typer.main
from typer.testing import CliRunner

from cosmos_export.cli import app, console, verbs
from cosmos_export.verb_options import NoOptions

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests" / "checkpoint"))
import fake_checkpoint as fake  # noqa: E402

ENDINGS = (0, 1, 2, 3)


def outcome(*arguments: object) -> tuple[int, str]:
    """Exit code and what is said by `cosmos-export ARGUMENTS`, which is neither a failed tool nor a bug."""
    console.configure()
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code in ENDINGS, (arguments, result.output, result.exception)
    assert "CX000" not in result.output, (arguments, result.output)
    found = re.search(r"error\[(CX\d{3})\]", result.stderr)
    return result.exit_code, found[1] if found else ""


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    root = fake.write_checkpoint(tmp_path / "checkpoint")
    for folder, config in (("vae", fake.VAE), ("sound_tokenizer", fake.SOUND_TOKENIZER)):
        fake.write_sparse(root / folder / f"{fake.STEM}.safetensors", [fake.TensorHeader("w", "F32", (8,))])
        fake.write_json(root / folder / "config.json", config)
    return root


# Configurations

WRONG: list[Any] = [None, True, -1, 0, 10**9, 10**400, 1.5, "x", "", [], [[]], ["x"], {}, {"a": []}]


def _changes(document: Any, random: Random) -> Any:
    """``document`` with one value, at any depth, that is another, or is gone."""
    changed = json.loads(json.dumps(document))
    at = changed
    while True:
        key = random.choice(list(at) if isinstance(at, dict) else range(len(at)))
        inner = at[key]
        if isinstance(inner, dict | list) and inner and random.random() < 0.7:
            at = inner
        elif random.random() < 0.1:
            del at[key]
            return changed
        else:
            at[key] = random.choice(WRONG)
            return changed


def _files(root: Path) -> list[Path]:
    return sorted(path for path in root.rglob("*.json"))


@pytest.mark.parametrize("verb", ["inspect", "plan"])
def test_any_configuration_is_accepted_or_refused(checkpoint: Path, verb: str) -> None:
    random = Random(2)
    more = () if verb == "inspect" else ("--target", "rtx-pro-6000", "--workload", "t2v-256p-17f")
    codes: set[str] = set()
    for _ in range(40):
        path = random.choice(_files(checkpoint))
        kept = path.read_text()
        path.write_text(json.dumps(_changes(json.loads(kept), random)))
        codes.add(outcome(verb, checkpoint, *more)[1])
        path.write_text(kept)
    assert {"", "CX103", "CX104"} <= codes


# Outputs


def _loop(folder: Path) -> Path:
    (folder / "loop").symlink_to("loop")
    return folder / "loop"


def _in_a_loop(folder: Path) -> Path:
    return _loop(folder) / "x.mp4"


def _long(folder: Path) -> Path:
    return folder / ("é" * 110 + ".mp4")


def _under_a_file(folder: Path) -> Path:
    (folder / "file").touch()
    return folder / "file" / "x.mp4"


WRITING = [
    ("demo-checkpoint", "-o"),
    ("build", "absent", "-o"),
    ("build", "absent", "-o", "x", "--dump"),
    ("calibrate", "absent", "--data", "x", "-o"),
    ("quantize", "absent", "--calibration", "x", "-o"),
    ("bench", "absent", "-o"),
]


@pytest.mark.parametrize("name", [_loop, _in_a_loop, _long, _under_a_file])
@pytest.mark.parametrize("verb", WRITING, ids=lambda verb: f"{verb[0]} {verb[-1]}")
def test_an_output_that_cannot_be_is_refused_before_any_work(tmp_path: Path, verb: tuple[str, ...], name: Any) -> None:
    assert outcome(*verb, name(tmp_path)) == (2, "CX004")


def test_every_path_that_a_verb_writes_is_looked_at() -> None:
    """An option that names a new output belongs in `verbs.OUTPUTS`."""
    reads = {
        "actions", "action_stats", "bundle", "cache", "calibration", "checkpoint", "data", "directory", "folder",
        "graphs", "image", "noise", "video", "token_file", "limits", "audit", "file", "key",
        "require_signature", "state", "archive", "first", "second",
    }  # fmt: skip
    named = {
        name
        for command in _commands(typer.main.get_command(app))
        for name, parameter in inspect.signature(command.callback).parameters.items()
        if "Path" in str(parameter.annotation)
    }
    of_run = {"outputs", "save_latents", "save_frames"}
    assert {*verbs.OUTPUTS, *of_run} <= named
    assert named - {*verbs.OUTPUTS, *of_run} <= reads


def _commands(command: Any) -> Iterator[Any]:
    inner = getattr(command, "commands", {})
    for one in inner.values():
        yield from _commands(one)
    if not inner:
        yield command


# Memory


def _chained() -> BaseException:
    try:
        try:
            raise ImportError("libx.so: failed to map segment from shared object")
        except ImportError as inner:
            raise RuntimeError("Failed to import diffusers.models") from inner
    except RuntimeError as error:
        return error


@pytest.mark.parametrize("error", [MemoryError("no"), OSError(12, "Cannot allocate memory"), _chained()])
def test_a_lack_of_memory_is_no_bug(error: BaseException) -> None:
    application = verbs.Verbs()

    @application.verb("act", NoOptions)
    def act(options: NoOptions, as_json: bool) -> None:
        raise error

    result = CliRunner().invoke(application, [])
    assert result.exit_code == 4
    assert "error[CX804]: not enough memory: " in result.stderr
    assert "Failed to import" not in result.stderr


def test_a_process_with_little_memory_says_so(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "cosmos_export", "demo-checkpoint", "-o", str(tmp_path / "x")],
        capture_output=True,
        text=True,
        cwd=ROOT,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (800_000_000, 800_000_000)),
    )
    assert done.returncode == 4
    assert "error[CX804]: not enough memory" in done.stderr


def test_other_errors_are_still_bugs() -> None:
    application = verbs.Verbs()

    @application.verb("act", NoOptions)
    def act(options: NoOptions, as_json: bool) -> None:
        raise KeyError("x")

    result = CliRunner().invoke(application, [])
    assert result.exit_code == 4
    assert "CX000" in result.stderr
