"""Names of Hugging Face mean what is in its cache, main before others; or they get the command that downloads it."""

from __future__ import annotations

import builtins
import json
from pathlib import Path
from typing import Any

import pytest
from fake_checkpoint import write_checkpoint
from typer.testing import CliRunner

from cosmos_export.checkpoint import hub, open_checkpoint
from cosmos_export.checkpoint.hub import Repository, repository
from cosmos_export.cli import app
from cosmos_export.diagnostics import UserError

NANO = Repository("nvidia/Cosmos3-Nano")
FP8 = Repository("nvidia/Cosmos3-Nano", "fp8")


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("nvidia/Cosmos3-Nano", NANO),
        ("nvidia/Cosmos3-Nano@fp8", FP8),
        ("https://huggingface.co/nvidia/Cosmos3-Nano", NANO),
        ("https:/huggingface.co/nvidia/Cosmos3-Nano", NANO),  # as pathlib writes it
        ("https://huggingface.co/nvidia/Cosmos3-Nano/tree/fp8", FP8),
        ("https:/huggingface.co/nvidia/Cosmos3-Nano/resolve/fp8/transformer/config.json", FP8),
        ("https://huggingface.co/nvidia/Cosmos3-Nano/tree/main/", Repository("nvidia/Cosmos3-Nano", "main")),
        ("hf.co/nvidia/Cosmos3-Nano", NANO),
        ("hf://nvidia/Cosmos3-Nano@fp8", FP8),
        ("Cosmos3-Nano", NANO),
        ("cosmos3-super-image2video@fp8", Repository("nvidia/cosmos3-super-image2video", "fp8")),
        ("/data/nano", None),
        ("./nano", None),
        ("../nvidia/nano", None),
        ("nano", None),
        ("a/b/c", None),
        ("https://example.com/nvidia/Cosmos3-Nano", None),
        ("nvidia/", None),
        ("nvidia/..", None),
    ],
)
def test_names(text: str, found: Repository | None) -> None:
    assert repository(text) == found


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache with two revisions, whose names sort the other way round."""
    folder = tmp_path / "hub" / "models--nvidia--Cosmos3-Nano"
    for revision in ("a" * 40, "f" * 40):
        write_checkpoint(folder / "snapshots" / revision)
    (folder / "refs").mkdir()
    (folder / "refs/main").write_text("a" * 40)
    (folder / "refs/fp8").write_text("f" * 40)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)
    return folder


def without_library(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def missing(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("huggingface_hub"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", missing)


@pytest.mark.parametrize("library", [True, False])
@pytest.mark.parametrize(
    ("text", "revision"),
    [
        ("nvidia/Cosmos3-Nano", "a"),
        ("nvidia/Cosmos3-Nano@main", "a"),
        ("nvidia/Cosmos3-Nano@fp8", "f"),
        ("https://huggingface.co/nvidia/Cosmos3-Nano", "a"),
        ("https://huggingface.co/nvidia/Cosmos3-Nano/tree/fp8", "f"),
        ("Cosmos3-Nano", "a"),
        ("hf://nvidia/Cosmos3-Nano@" + "f" * 40, "f"),
    ],
)
def test_the_cache_is_read(
    cache: Path, text: str, revision: str, library: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not library:
        without_library(monkeypatch)
    found = open_checkpoint(Path(text))
    assert found.root == cache / "snapshots" / (revision * 40)
    assert (found.origin.repository, found.origin.revision) == ("nvidia/Cosmos3-Nano", revision * 40)


def test_a_verb_takes_the_name(cache: Path) -> None:
    result = CliRunner().invoke(app, ["inspect", "nvidia/Cosmos3-Nano", "--json"])
    assert result.exit_code == 0 and json.loads(result.stdout)["revision"] == "a" * 40


def test_a_local_folder_of_that_name_comes_first(cache: Path, tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "nvidia/Cosmos3-Nano")
    assert open_checkpoint(Path("nvidia/Cosmos3-Nano")).root == Path("nvidia/Cosmos3-Nano")


def refused(text: str) -> UserError:
    with pytest.raises(UserError) as caught:
        open_checkpoint(Path(text))
    assert caught.value.code == "CX105"
    return caught.value


@pytest.mark.parametrize("library", [True, False])
@pytest.mark.parametrize(
    ("text", "command"),
    [
        ("nvidia/Cosmos3-Super", "`hf download nvidia/Cosmos3-Super`"),
        ("nvidia/Cosmos3-Super@fp8", "`hf download nvidia/Cosmos3-Super --revision fp8`"),
        ("https://huggingface.co/nvidia/Cosmos3-Edge", "`hf download nvidia/Cosmos3-Edge`"),
        ("https://huggingface.co/me/tuned/tree/v2", "`hf download me/tuned --revision v2`"),
        ("Cosmos3-Edge", "`hf download nvidia/Cosmos3-Edge`"),
    ],
)
def test_what_is_not_there_has_the_command(
    cache: Path, text: str, command: str, library: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not library:
        without_library(monkeypatch)
    error = refused(text)
    assert command in error.hint and "then the same command again" in error.hint
    assert "not in the Hugging Face cache" in error.message


def test_another_revision_that_is_there_is_named(cache: Path) -> None:
    error = refused("nvidia/Cosmos3-Nano@fp4")
    assert "revision fp4" in error.message and "there: fp8, main" in error.message
    assert "hf download nvidia/Cosmos3-Nano --revision fp4" in error.hint
    (cache / "refs/main").unlink()
    error = refused("nvidia/Cosmos3-Nano")
    assert "revision main" in error.message and "nvidia/Cosmos3-Nano@fp8" in error.hint


def test_a_mistyped_path_is_not_taken_for_a_repository(cache: Path, tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "demo/checkpoint")
    assert "did you mean demo/checkpoint?" in refused("demo/checkpiont").hint
    assert "folders in demo: checkpoint" in refused("demo/nope").hint
    assert "did you mean" in refused(str(tmp_path / "demo/checkpoints")).hint
    assert refused("/nowhere/at/all").hint == "give the path of a local checkpoint"


def test_the_cache_is_where_the_library_has_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    without_library(monkeypatch)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    assert hub.cache_folder() == tmp_path / "hub"
    monkeypatch.delenv("HF_HOME")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "x"))
    assert hub.cache_folder() == tmp_path / "x/huggingface/hub"
