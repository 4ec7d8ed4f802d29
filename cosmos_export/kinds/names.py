"""The kind of a file of weights, by the names of its tensors."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Collection, Mapping

from cosmos_export.kinds.contents import Thing

_WRAPPERS: Mapping[str, str] = {
    "_orig_mod": "torch.compile",
    "module": "DistributedDataParallel or DeepSpeed",
    "_forward_module": "Lightning Fabric",
    "_fsdp_wrapped_module": "FSDP",
    "_checkpoint_wrapped_module": "activation checkpointing",
    "net_ema": "moving average (EMA) of the weights",
    "ema": "moving average (EMA) of the weights",
    "ema_model": "moving average (EMA) of the weights",
    "model_ema": "moving average (EMA) of the weights",
    "averaged_model": "moving average (EMA) of the weights",
    "shadow_params": "moving average (EMA) of the weights",
    "transformer": "whole pipeline in one file",
    "diffusion_model": "single file of ComfyUI",
    "pipe": "whole pipeline in one file",
    "dit": "training module",
    "state_dict": "training state",
    "student": "distillation",
    "fake_score": "distillation",
}
"""Parts of names that something has put before those of the model, and what."""
_NAMES: tuple[tuple[re.Pattern[str], str, str], ...] = tuple(
    (re.compile(pattern), what, hint)
    for pattern, what, hint in (
        (
            r"\.(qweight|qzeros|g_idx)$",
            "quantized with AWQ or GPTQ",
            "AWQ and GPTQ files are not read: give the BF16 checkpoint, and search with `calibrate --algorithm awq`",
        ),
        (
            r"\.(absmax|quant_map|nested_absmax|SCB)$|\.quant_state\.",
            "quantized with bitsandbytes",
            "bitsandbytes weights are not read: give the BF16 checkpoint and quantize with `cosmos-export quantize`",
        ),
        (
            r"(^|\.)scaled_fp8$|\.scale_weight$|\.scale_input$|\.comfy_quant$",
            "quantized for ComfyUI",
            "ComfyUI's scales are not read: give the BF16 checkpoint, or the published revision=fp8",
        ),
        (
            r"\.(weight_packed|weight_shape|weight_zero_point|input_global_scale|weight_global_scale)$",
            "quantized with compressed-tensors (llm-compressor)",
            "compressed-tensors are not read: give the BF16 checkpoint and quantize with `cosmos-export quantize`",
        ),
        (
            r"\.(weight_scale_inv|weight_block_scale)$",
            "in block-wise FP8",
            "block-wise FP8 is not read: the published layout has one scale per weight. Give revision=fp8 or BF16",
        ),
        (
            r"\.(wscales|smooth_factor|wtscale|proj_down|proj_up|smooth_factor_orig)$",
            "quantized with SVDQuant (nunchaku)",
            "nunchaku's weights are not read: give the BF16 checkpoint, and `calibrate --algorithm modelopt-svdquant`",
        ),
        (
            r"\.(_data|_scale|_shift)$|\.weight_qtype$|\._packed$",
            "quantized with optimum-quanto",
            "quanto's weights are not read: give the BF16 checkpoint and quantize with `cosmos-export quantize`",
        ),
        (
            r"\.(qdata|tensor_impl|layout_tensor|_weight_qdata|_weight_scale)$",
            "quantized with torchao",
            "torchao's weights are not read: give the BF16 checkpoint and quantize with `cosmos-export quantize`",
        ),
        (r"\.(W_q|meta\.scale|meta\.zero)$", "quantized with HQQ", "HQQ is not read: give the BF16 checkpoint"),
        (
            r"\.pre_quant_scale$",
            "quantized with factors on its activations (AWQ or SVDQuant of ModelOpt)",
            "such factors are read from a scale table: `calibrate --algorithm modelopt-awq` of the BF16 checkpoint",
        ),
        (
            r"\.(weight_scale_2|weight_double_scale)$",
            "quantized to NVFP4",
            "build it from a checkpoint of `cosmos-export quantize --format nvfp4`, or quantize the BF16 checkpoint",
        ),
        (
            r"(^|\.)(exp_avg|exp_avg_sq|optimizer|param_groups)(\.|$)",
            "the state of an optimizer",
            "give the weights of the model, without the state of the training",
        ),
    )
)


def of_names(names: Collection[str], expected: Collection[str], canonical: Callable[[str], str] = str) -> Thing | None:
    """The kind of a file whose tensors ``names`` the model does not have; None where they tell nothing.

    ``expected`` are the names of the model, ``canonical`` brings other spellings to them.
    """
    if (wrapped := _wrapped(names, expected, canonical)) is not None:
        return wrapped
    for pattern, what, hint in _NAMES:
        found = sum(pattern.search(name) is not None for name in names)
        if found:
            return Thing(what, hint)
    return None


def _wrapped(names: Collection[str], expected: Collection[str], canonical: Callable[[str], str]) -> Thing | None:
    """Names of the model with something before or among their parts, where that is most of ``names``."""
    added: Counter[str] = Counter()
    for name in names:
        parts = name.split(".")
        bare = [part for part in parts if part not in _WRAPPERS]
        if len(bare) < len(parts) and canonical(".".join(bare)) in expected:
            added[".".join(part for part in parts if part in _WRAPPERS) + "."] += 1
            continue
        for count in range(1, min(len(parts), 6)):
            if canonical(".".join(parts[count:])) in expected:
                added[".".join(parts[:count]) + "."] += 1
                break
    if not added:
        return None
    prefix, count = added.most_common(1)[0]
    if count * 2 < len(names):
        return None
    makers = dict.fromkeys(_WRAPPERS[part] for part in prefix.split(".") if part in _WRAPPERS)
    by = f" ({', '.join(makers)})" if makers else ""
    choose = " Keep either these or those without, not both." if "EMA" in by else ""
    command = (
        'python -c "from safetensors.torch import load_file, save_file; '
        f"save_file({{k.replace('{prefix}', ''): v for k, v in load_file('FILE').items()}}, 'FILE')\""
    )
    return Thing(
        f"named with `{prefix}`{by} in {count} of {len(names)} names",
        f"take `{prefix}` away in every file and in the index: `{command}`.{choose}",
    )
