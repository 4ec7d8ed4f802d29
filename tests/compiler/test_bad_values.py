"""Whatever stands in place of a number or of a name is accepted or refused, and never a bug."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, get_args

import build_harness as harness
import pytest
import typer.main
from typer.testing import CliRunner

import cosmos_export as cx
from cosmos_export import api
from cosmos_export.bundle import open_bundle
from cosmos_export.cli import app, console
from cosmos_export.diagnostics import CosmosExportError, UnsupportedError, UserError

WRONG = ("1" * 310, "-" + "9" * 310, "1" * 5000, "nan", "inf")
VALUES = (*WRONG, "-1")

_RUN = ("run", "{bundle}", "--prompt", "x", "--backend", "onnxruntime", "--save-latents", "{new}.safetensors")
_GEOMETRY = ("bench", "--geometry", "nano", "--dry-run", "--workload", "t2i-256p")
VERBS: Mapping[tuple[str, ...], tuple[str, ...]] = {
    ("build", "{checkpoint}", "-o", "{new}", "--target", "rtx-pro-6000"): (
        "--steps", "--shift", "--guidance", "--guidance-interval=1:", "--guidance-interval", "--memory-budget={}GiB",
        "--profile=frames=", "--profile={}p", "--profile=480p-{}f", "--profile=frames=1:5:", "--set=gen.mlp[0:{}]=bf16",
    ),
    ("plan", "--like", "nano"): (
        "--steps", "--guidance", "--guidance-interval=0:", "--prompt-tokens", "--prompt-tokens=8:",
        "--memory-budget={}GiB", "--memory-budget=0.{}GiB", "--workload=t2v-frames=", "--workload=t2v-480p-{}f",
    ),
    ("calibrate", "{checkpoint}", "-o", "{new}", "--data", "{prompts},licence=x,origin=synthetic"): (
        "--samples", "--frames", "--steps", "--shift", "--guidance", "--guidance-interval=0:", "--margin",
        "--percentile", "--rank", "--bits", "--seed", "--profile=frames=1:5:", "--data={prompts},limit=",
        "--data={prompts},fps=", "--data={prompts},frames=",
    ),
    _RUN: (
        "--frames", "--height", "--width", "--fps", "--seed", "--steps", "--shift", "--guidance", "--chunk", "--tier",
        "--guidance-interval=0:", "--action-width", "--device=cpu:", "--device=cuda:",
    ),
    ("serve", "{bundle}", "--no-limits", "--backend", "onnxruntime"): (
        "--port", "--deadline", "--metrics-port", "--max-message", "--connections", "--action-width", "--steps",
        "--seed", "--device=cpu:",
    ),
    _GEOMETRY: ("--runs", "--warm-up", "--device=cuda:", "--workload=t2v-frames="),
    ("bench", "{bundle}", "--dry-run"): ("--prompt-tokens", "--device=cuda:", "--device=cpu:"),
    ("bench", "compare", "absent", "absent"): ("--max-regression",),
    ("demo-checkpoint", "-o", "{new}"): (
        "--layers", "--hidden", "--heads", "--kv-heads", "--head-dim", "--intermediate", "--vocab",
        "--latent-channels", "--action-dim", "--domains", "--sound-dim", "--seed", "--shard-size",
    ),
}  # fmt: skip
"""Arguments of a verb → its options with numbers; ``{}``, or the end, is where the number stands."""


_RECORDS: list[Any] = []


@pytest.fixture(autouse=True)
def _no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is accepted is not done."""
    from cosmos_export.calibration import calibrate
    from cosmos_export.compiler import calibrate_checkpoint, driver
    from cosmos_export.runtime.model import LoadedModel

    def stop(*_: object, **__: object) -> Any:
        raise UserError("CX001", "it would begin now")

    monkeypatch.setattr(driver, "_bundle", stop)
    real = calibrate_checkpoint._prompt_record  # which takes a process of its own, and is always the same here

    def prompt_record(checkpoint: Any) -> Any:
        return _RECORDS[0] if _RECORDS else _RECORDS.append(real(checkpoint)) or _RECORDS[0]

    monkeypatch.setattr(calibrate_checkpoint, "_prompt_record", prompt_record)
    monkeypatch.setattr(calibrate, "require_workspace_space", stop)
    monkeypatch.setattr(LoadedModel, "load", stop)


def _options(command: Any) -> Iterator[tuple[str, str]]:
    """Verb and option of every number that the command line takes."""
    for name, inner in getattr(command, "commands", {}).items():
        for parameter in getattr(inner, "params", ()):
            kind = parameter.type_descriptor.annotation
            if {int, float} & {kind, *get_args(kind)}:
                yield name, next(flag for flag in parameter.opts if flag.startswith("--"))
        yield from _options(inner)


def test_the_table_has_every_number() -> None:
    tested = {(arguments[0], option) for arguments, options in VERBS.items() for option in options}
    assert set(_options(typer.main.get_command(app))) <= tested


@pytest.mark.parametrize("verb", VERBS, ids=" ".join)
def test_any_number_is_accepted_or_refused(
    verb: tuple[str, ...], omni: Path, omni_bundle: harness.Built, tmp_path: Path
) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("A cat.\n")
    for option in VERBS[verb]:
        for number, value in enumerate(VALUES):
            places = {"checkpoint": omni, "bundle": omni_bundle.path, "prompts": prompts}
            new = tmp_path / f"{number}{re.sub('[^a-z]', '', option)}"
            words = [word.format(**places, new=new) for word in verb]
            flag, _, form = option.partition("=")
            form = form if "{}" in form else f"{form}{{}}"
            words.append(f"{flag}={form.format(value, **places)}")
            console.configure()
            result = CliRunner().invoke(app, words)
            assert result.exit_code in (0, 2, 3), (option, value[:20], result.output[-500:], result.exception)
            assert value not in WRONG or result.exit_code, (option, value[:20], "was accepted")


NAMES = ("a\0b", "a\0b.json", "\ud800.toml", "\0")
API: Mapping[str, tuple[str, ...]] = {
    "compile": (
        "checkpoint", "output", "calibration", "dump", "cache", "graphs", "recipe", "profiles", "overrides",
        "components", "kernels", "target", "backend", "until",
    ),
    "plan": ("checkpoint", "like", "recipe", "workloads", "targets", "overrides"),
    "calibrate": ("checkpoint", "output", "data", "profile", "negative_prompt"),
    "quantize": ("checkpoint", "output", "calibration", "format", "towers"),
    "generate": (
        "prompt", "negative_prompt", "image", "video", "noise", "actions", "action_stats", "embodiment", "viewpoint",
    ),
}  # fmt: skip
"""Function → its parameters that are a path, or a name that may be one."""


@pytest.mark.parametrize("name", NAMES, ids=ascii)
@pytest.mark.parametrize("function", API)
def test_a_name_that_no_file_can_have_is_refused(
    function: str, name: str, omni: Path, omni_bundle: harness.Built, tmp_path: Path
) -> None:
    from cosmos_export.runtime.model import LoadedModel

    prompts, new = tmp_path / "prompts.txt", tmp_path / "new"
    prompts.write_text("A cat.\n")
    required: dict[str, dict[str, Any]] = {
        "compile": {"checkpoint": omni, "output": new},
        "plan": {"checkpoint": omni},
        "calibrate": {"checkpoint": omni, "output": new, "data": str(prompts)},
        "quantize": {"checkpoint": omni, "output": new, "calibration": prompts},
        "generate": {"prompt": "x"},
    }
    model = api.Model(LoadedModel(open_bundle(omni_bundle.path), backend="onnxruntime"))
    call = model.generate if function == "generate" else getattr(cx, function)
    for parameter in API[function]:
        with pytest.raises(CosmosExportError) as raised:
            call(**required[function] | {parameter: name})
        assert isinstance(raised.value, UserError | UnsupportedError), (parameter, raised.value)
        # A prompt is text whatever it looks like, and may have any character that a tokenizer takes.
        assert raised.value.code != "CX001" or parameter in ("prompt", "negative_prompt"), parameter
    with pytest.raises(UserError):
        cx.open(name)
