"""The ``quantization_config`` of a checkpoint: which scheme, and which denoising steps must not use it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from cosmos_export.diagnostics import UserError, shown

MODELOPT_FP8 = "fp8-modelopt"


@dataclass(frozen=True)
class StepPolicy:
    """Steps that run with 16-bit activations: the first and last of the loop. A loop of one step stays in FP8."""

    first_steps: int
    last_steps: int
    reasoner: str
    """``a16``: always 16-bit activations; ``native``: as quantized."""
    overlap: str
    """Meaning of a step that counts as first or as last."""


@dataclass(frozen=True)
class Quantization:
    """Static per-tensor FP8 (E4M3) by ModelOpt, the published revision."""

    weight_only: bool
    ignored: tuple[str, ...]
    step_policy: StepPolicy | None

    @property
    def label(self) -> str:
        return MODELOPT_FP8


_POLICY: Mapping[str, Any] = {
    "schema_version": 1,
    "type": "first_last_n",
    "index_space": "denoising_loop_iteration",
    "scope": ["transformer"],
    "default_mode": "native",
}
FIRST_LAST_THREE: Mapping[str, Any] = {
    **_POLICY,
    "first_steps": {"count": 3, "mode": "a16"},
    "last_steps": {"count": 3, "mode": "a16"},
    "overlap": "a16",
    "reasoner": "a16",
}
"""The policy of the published FP8 revisions of Nano, Super and Super-Image2Video."""
_POLICY_KEYS = {*_POLICY, "first_steps", "last_steps", "overlap", "reasoner"}


def parse_quantization(config: Mapping[str, Any]) -> Quantization | None:
    """Read quantization from ``transformer/config.json``; CX124 for a scheme or policy this compiler does not know."""
    raw = config.get("quantization_config")
    if raw is None:
        return None
    if not isinstance(raw, dict):
        _refuse(f"quantization_config = {shown(raw)} is not an object")
    method, algorithm = raw.get("quant_method"), raw.get("quant_algo", raw.get("quant_type"))
    if method != "modelopt" or algorithm not in ("FP8", "FP8_FP8"):
        _refuse_layout(raw, method, algorithm)
    weight_only = raw.get("weight_only", False)
    ignored = raw.get("ignore", [])
    if not isinstance(weight_only, bool):
        _refuse(f"weight_only = {shown(weight_only)} is not true or false")
    if not isinstance(ignored, list) or not all(isinstance(item, str) for item in ignored):
        _refuse("ignore is not a list of module names")
    runtime = raw.get("runtime")
    if runtime is not None and not isinstance(runtime, dict):
        _refuse(f"runtime = {shown(runtime)} is not an object")
    policy = runtime.get("diffusion_step_policy") if runtime else None
    return Quantization(weight_only, tuple(ignored), None if policy is None else _step_policy(policy))


_BF16 = "build from the BF16 checkpoint, with `calibrate` and `--recipe` (or `quantize --format fp8`)"
_METHODS: Mapping[str, str] = {
    "awq": "AWQ: its weights are packed in another order than an engine reads",
    "gptq": "GPTQ: its weights are packed in another order than an engine reads",
    "bitsandbytes": "bitsandbytes: its code books are in no engine",
    "torchao": "torchao: its tensors are Python objects",
    "quanto": "optimum-quanto: its weights have scales of their own layout",
    "gguf": "GGUF: its blocks are those of llama.cpp",
    "hqq": "HQQ: its weights have zero points, and no engine has",
    "compressed-tensors": "compressed-tensors (llm-compressor): scales per channel or group under other names",
    "fbgemm_fp8": "FP8 of FBGEMM: a scale per row, and the published layout has one per weight",
    "fp8": "block-wise FP8: a scale per block of 128 × 128, and the published layout has one per weight",
    "svdquant": "SVDQuant (nunchaku): low-rank parts in a layout of its own",
    "nunchaku": "SVDQuant (nunchaku): low-rank parts in a layout of its own",
    "mxfp4": "MXFP4: blocks of 32 with scales that are powers of two",
}
"""Methods of quantization by ``quant_method``, and why a checkpoint of it is not read."""
_ALGORITHMS: Mapping[str, tuple[str, str]] = {
    "NVFP4": ("NVFP4", "`build BF16-CHECKPOINT --recipe fp4 --calibration TABLE` makes the same numbers"),
    "W4A16_AWQ": ("INT4 (AWQ)", "`build BF16-CHECKPOINT --recipe int4 --calibration TABLE` makes the same numbers"),
    "MIXED_PRECISION": (
        "several formats",
        "`calibrate --algorithm modelopt-auto` of the BF16 checkpoint makes a recipe",
    ),
    "NVFP4_AWQ": ("NVFP4 with factors of AWQ", _BF16),
    "W4A8_AWQ": ("INT4 weights with FP8 activations", _BF16),
    "FP8_PB_WO": ("block-wise FP8", _BF16),
    "FP8_PER_CHANNEL_PER_TOKEN": ("FP8 with scales per channel", _BF16),
    "INT8_SQ": ("INT8 (SmoothQuant)", _BF16),
    "W8A8_SQ": ("INT8 (SmoothQuant)", _BF16),
    "MXFP8": ("MXFP8", _BF16),
    "NVFP4_SVDQUANT": ("NVFP4 with low-rank parts", _BF16),
}
"""Algorithms of ModelOpt that the reader of checkpoints does not take: what they store, and what helps."""


def _refuse_layout(raw: Mapping[str, Any], method: object, algorithm: object) -> NoReturn:
    """CX124 with what the layout is, and what helps."""
    where = "transformer/config.json: the weights are quantized"
    producer = raw.get("producer")
    own = isinstance(producer, dict) and producer.get("name") == "cosmos-export"
    if method in ("modelopt", "modelopt_fp4", "modelopt_mixed") and isinstance(algorithm, str):
        name = algorithm.upper().removesuffix("_NVFP4") if algorithm.upper() == "NVFP4_NVFP4" else algorithm.upper()
        stored, hint = _ALGORITHMS.get(name, (f"{shown(algorithm)} of ModelOpt", _BF16))
        by = "by `cosmos-export quantize`" if own else "by ModelOpt"
        raise UserError(
            "CX124",
            f"{where} to {stored} {by}; of quantized checkpoints, `build` reads FP8 with a scale per weight",
            hint,
        )
    if isinstance(method, str) and method.lower().replace("_", "-") in {name.replace("_", "-") for name in _METHODS}:
        known = next(name for name in _METHODS if name.replace("_", "-") == method.lower().replace("_", "-"))
        raise UserError("CX124", f"{where} with {_METHODS[known]}", _BF16)
    raise UserError(
        "CX124",
        f"{where} with {shown(method)} / {shown(algorithm)}, which is not known; supported: modelopt / FP8",
        _BF16,
    )


def _step_policy(raw: Any) -> StepPolicy:
    """The policy changes the result of every video, so an unknown field is refused, not skipped."""
    if not isinstance(raw, dict):
        _refuse(f"diffusion_step_policy = {shown(raw)} is not an object")
    if raw.keys() != _POLICY_KEYS:
        missing, extra = sorted(_POLICY_KEYS - raw.keys()), sorted(raw.keys() - _POLICY_KEYS)
        _refuse(f"diffusion_step_policy lacks {missing} and has the unknown {shown(extra)}")
    for key, value in _POLICY.items():
        if type(raw[key]) is not type(value) or raw[key] != value:
            _refuse(f"diffusion_step_policy.{key} = {shown(raw[key])}; this compiler knows {value!r}")
    for key in ("overlap", "reasoner"):
        if raw[key] not in ("a16", "native"):
            _refuse(f"diffusion_step_policy.{key} = {shown(raw[key])}; this compiler knows 'a16' and 'native'")
    return StepPolicy(_count(raw, "first_steps"), _count(raw, "last_steps"), raw["reasoner"], raw["overlap"])


def _count(raw: Mapping[str, Any], key: str) -> int:
    value = raw[key]
    if not isinstance(value, dict) or value.keys() != {"count", "mode"} or value["mode"] != "a16":
        _refuse(f"diffusion_step_policy.{key} = {shown(value)} is not a count of steps in mode 'a16'")
    count = value["count"]
    if type(count) is not int or not 0 <= count <= 10_000:
        _refuse(f"diffusion_step_policy.{key}.count = {shown(count)} is not a number of steps")
    return count


def _refuse(what: str) -> NoReturn:
    raise UserError(
        "CX124",
        f"transformer/config.json: {what}",
        "use the BF16 revision and quantize with cosmos-export, or the published revision=fp8",
    )
