"""Words that other programs use for options and verbs of this one: what is suggested follows from what is meant."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

OPTIONS: Mapping[str, tuple[str, ...]] = {
    "num-inference-steps": ("--steps",), "num-steps": ("--steps",), "inference-steps": ("--steps",),
    "sampling-steps": ("--steps",), "denoising-steps": ("--steps",), "sample-steps": ("--steps",),
    "guidance-scale": ("--guidance",), "cfg": ("--guidance",), "cfg-scale": ("--guidance",),
    "guidance-range": ("--guidance-interval",), "flow-shift": ("--shift",), "timestep-shift": ("--shift",),
    "negative-prompt": ("--negative",), "neg-prompt": ("--negative",), "uncond": ("--negative",),
    "num-frames": ("--frames",), "num-output-frames": ("--frames",), "video-length": ("--frames",),
    "n-frames": ("--frames",), "duration": ("--frames",), "length": ("--frames",), "frame-rate": ("--fps",),
    "resolution": ("--profile", "--height"), "size": ("--profile", "--height"), "image-size": ("--tier",),
    "model-mode": ("--mode",), "task": ("--mode",), "pipeline": ("--mode",), "action-path": ("--actions",),
    "image-path": ("--image",), "input-image": ("--image",), "vision-path": ("--image",), "init-image": ("--image",),
    "video-path": ("--video",), "input-video": ("--video",), "input": ("--image", "--data"),
    "text": ("--prompt",), "prompt-file": ("--prompt",), "input-file": ("--prompt",), "input-files": ("--prompt",),
    "caption": ("--prompt",), "enable-sound": ("--sound",), "audio": ("--sound",), "generate-audio": ("--sound",),
    "domain-name": ("--embodiment",), "domain": ("--embodiment",), "robot": ("--embodiment",),
    "view-point": ("--viewpoint",), "camera": ("--viewpoint",), "action-chunk-size": ("--chunk",),
    "norm-stats": ("--action-stats",), "stats": ("--action-stats",), "action-dim": ("--action-width",),
    "lora": ("--adapter",), "lora-path": ("--adapter",), "lora-weights": ("--adapter",), "loras": ("--adapter",),
    "peft": ("--adapter",), "adapters": ("--adapter",), "lora-scale": ("--adapter",),
    "precision": ("--recipe", "--format"), "dtype": ("--recipe", "--format"), "quantization": ("--recipe", "--format"),
    "quantize": ("--recipe", "--format"), "quant": ("--recipe", "--format"), "fp8": ("--recipe", "--format"),
    "fp16": ("--recipe",), "bf16": ("--recipe",), "int4": ("--recipe", "--format"), "int8": ("--recipe", "--format"),
    "nvfp4": ("--recipe", "--format"), "scales": ("--calibration",), "calib": ("--calibration",),
    "calibration-data": ("--data", "--calibration"), "dataset": ("--data",), "dataset-path": ("--data",),
    "calib-size": ("--samples",), "num-samples": ("--samples",), "gpu": ("--target", "--device"),
    "arch": ("--target",), "sm": ("--target",), "compute-capability": ("--target",), "device-id": ("--device",),
    "engine": ("--backend",), "runtime": ("--backend",), "provider": ("--backend",), "opt-profile": ("--profile",),
    "shapes": ("--profile",), "min-shapes": ("--profile",), "opt-shapes": ("--profile",), "max-shapes": ("--profile",),
    "workspace": ("--memory-budget",), "max-memory": ("--memory-budget",), "memory": ("--memory-budget",),
    "output-dir": ("--output",), "output-path": ("--output",), "out": ("--output",), "save-path": ("--output",),
    "o": ("--output",), "overwrite": ("--force",), "yes": ("--force",), "continue": ("--resume",),
    "sampler": ("--schedule",), "scheduler": ("--schedule",), "grid": ("--schedule",), "sigmas": ("--schedule",),
    "latents": ("--noise", "--latents"), "generator-seed": ("--seed",), "random-seed": ("--seed",),
    "save-mp4": ("--output",), "debug": ("--verbose",), "silent": ("--quiet",), "log-level": ("--verbose",),
    "licence": ("--data",), "license": ("--data",),
}  # fmt: skip
"""Option of other programs, without its dashes → options here that mean it; the first that the verb has counts."""

VERBS: Mapping[str, str] = {
    "verify": "bundle verify", "show": "bundle show", "check": "bundle verify", "validate": "bundle verify",
    "sign": "bundle sign", "convert": "build", "export": "build", "compile": "build", "make": "build",
    "optimize": "build", "generate": "run", "infer": "run", "inference": "run", "sample": "run", "predict": "run",
    "info": "inspect", "describe": "inspect", "list": "targets", "gpus": "targets", "devices": "doctor",
    "benchmark": "bench", "perf": "bench", "profile": "bench", "compare": "bench", "eval": "bench",
    "calibration": "calibrate", "quant": "quantize", "quantise": "quantize", "estimate": "plan", "size": "plan",
    "server": "serve", "host": "serve", "choose": "recipes choose", "prune": "cache prune", "clean": "cache prune",
    "demo": "demo-checkpoint", "env": "doctor", "diagnose": "doctor", "error": "explain", "errors": "explain",
}  # fmt: skip
"""Verb of other programs → verb here."""
_CLOSE = 0.8


def explained(error: Any) -> tuple[str, str]:
    """Message and hint of ``error`` of the library that reads the command line."""
    message = error.format_message().replace("Value error, ", "")
    context = getattr(error, "ctx", None)
    path = context.command_path if context else "cosmos-export"
    listed = f"`{path} --help` lists what there is"
    option = getattr(error, "option_name", None)
    if context is not None and isinstance(option, str) and hasattr(error, "possibilities"):
        return f"{path} has no option {option}", _option_hint(option, context) or listed
    verb = re.match(r"No such command '([^']*)'", message)
    if verb is not None and context is not None:
        return f"{path} has no verb `{verb[1]}`", _verb_hint(verb[1], context, path) or listed
    return message, listed


def _option_hint(option: str, context: Any) -> str:
    here = list(_options(context.command))
    meant = [found for found in OPTIONS.get(option.lstrip("-").lower(), ()) if found in here]
    if meant:
        return f"`{meant[0]}` means that here; `{context.command_path} --help` describes it"
    near = difflib.get_close_matches(option, here, n=1, cutoff=_CLOSE)
    if near:
        return f"did you mean `{near[0]}`?"
    wanted = {option, *OPTIONS.get(option.lstrip("-").lower(), ())}
    others = [(name, found) for name, command in _commands(context.find_root()) for found in _options(command)
              if found in wanted]  # fmt: skip
    if others:
        names = ", ".join(dict.fromkeys(f"`{name}`" for name, _ in others))
        return f"`{others[0][1]}` is an option of {names}"
    return ""


def _verb_hint(verb: str, context: Any, path: str) -> str:
    known = [name for name, _ in _commands(context.find_root())]
    meant = VERBS.get(verb.lower())
    if path != context.find_root().command_path:
        group = path.split(" ", 1)[1]
        near = difflib.get_close_matches(
            verb, [name.split(" ", 1)[1] for name in known if name.startswith(f"{group} ")]
        )
        meant = f"{group} {near[0]}" if near else meant
    if meant not in known:
        near = difflib.get_close_matches(verb, [name for name in known if " " not in name], n=1, cutoff=0.7)
        if not near:
            return ""
        meant = near[0]
    return f"`cosmos-export {meant}` is meant, perhaps"


def _options(command: Any) -> Iterator[str]:
    for parameter in command.params:
        if parameter.param_type_name == "option":
            yield from (name for name in (*parameter.opts, *parameter.secondary_opts) if name.startswith("--"))


def _commands(root: Any) -> Iterator[tuple[str, Any]]:
    """Every verb below ``root``, and those of its groups, by name."""
    for name, command in _below(root.command, ()):
        yield " ".join(name), command


def _below(group: Any, before: Sequence[str]) -> Iterator[tuple[tuple[str, ...], Any]]:
    for name, command in getattr(group, "commands", {}).items():
        yield (*before, name), command
        yield from _below(command, (*before, name))
