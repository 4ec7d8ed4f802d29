"""What is suggested for an unknown option or verb is what is meant, and is there."""

from __future__ import annotations

import sys

import pytest
import typer

from cosmos_export import cli
from cosmos_export.cli import meanings

RUN, BUILD = ("run", "b", "-p", "x"), ("build", "c", "-o", "x")


def said(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *words: str) -> str:
    monkeypatch.setattr(sys, "argv", ["cosmos-export", *words])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    return " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("words", "option", "meant"),
    [
        (RUN, "--num-inference-steps", "--steps"),
        (RUN, "--guidance-scale", "--guidance"),
        (RUN, "--cfg", "--guidance"),
        (RUN, "--negative-prompt", "--negative"),
        (RUN, "--num-frames", "--frames"),
        (RUN, "--vision-path", "--image"),
        (RUN, "--enable-sound", "--sound"),
        (RUN, "--domain-name", "--embodiment"),
        (RUN, "--flow-shift", "--shift"),
        (RUN, "--output-dir", "--output"),
        (RUN, "--gpu", "--device"),
        (RUN, "--model-mode", "--mode"),
        (BUILD, "--lora", "--adapter"),
        (BUILD, "--precision", "--recipe"),
        (BUILD, "--dtype", "--recipe"),
        (BUILD, "--gpu", "--target"),
        (BUILD, "--overwrite", "--force"),
        (BUILD, "--workspace", "--memory-budget"),
        (BUILD, "--resolution", "--profile"),
        (BUILD, "--max-shapes", "--profile"),
        (BUILD, "--scheduler", "--schedule"),
        (("calibrate", "c", "-o", "x"), "--dataset", "--data"),
        (("quantize", "c", "-o", "x"), "--dtype", "--format"),
    ],
)
def test_options_go_by_meaning(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], option: str, meant: str
) -> None:
    text = said(capsys, monkeypatch, *words, option, "1")
    assert f"cosmos-export {words[0]} has no option {option}" in text and f"`{meant}` means that here" in text


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        ((*RUN, "--stepps", "3"), "did you mean `--steps`?"),
        ((*RUN, "--target", "h100"), "`--target` is an option of `plan`"),
        ((*RUN, "--lora", "a"), "`--adapter` is an option of `calibrate`, `quantize`, `build`"),
        ((*BUILD, "--prompt", "x"), "`--prompt` is an option of `run`"),
        ((*BUILD, "--zzz", "x"), "`cosmos-export build --help` lists what there is"),
    ],
)
def test_other_options(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], hint: str
) -> None:
    assert hint in said(capsys, monkeypatch, *words)


@pytest.mark.parametrize(
    ("verb", "meant"),
    [
        (("verify", "x"), "bundle verify"),
        (("convert", "x"), "build"),
        (("export", "x"), "build"),
        (("generate",), "run"),
        (("show", "x"), "bundle show"),
        (("benchmark",), "bench"),
        (("info", "x"), "inspect"),
        (("buidl", "x"), "build"),
        (("bundle", "verfy", "x"), "bundle verify"),
        (("compile", "x"), "build"),
    ],
)
def test_verbs_go_by_meaning(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, verb: tuple[str, ...], meant: str
) -> None:
    text = said(capsys, monkeypatch, *verb)
    assert "has no verb" in text and f"`cosmos-export {meant}` is meant, perhaps" in text


def test_everything_that_is_suggested_exists() -> None:
    root = typer.Context(typer.main.get_command(cli.app), info_name="cosmos-export")
    commands = dict(meanings._commands(root))
    assert set(meanings.VERBS.values()) <= set(commands)
    assert not set(meanings.VERBS) & set(commands)
    options = {option for command in commands.values() for option in meanings._options(command)}
    assert {option for meant in meanings.OPTIONS.values() for option in meant} <= options
