"""Checkpoints that are all header: valid files of any size whose data is a hole in the file."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from cosmos_export.checkpoint import Geometry, expected_tensors
from cosmos_export.checkpoint.safetensors_writer import TensorHeader, encode_header, shard_names

TINY = Geometry(
    hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=32,
    intermediate_size=96, vocab_size=300, latent_channel=4, patch_latent_dim=16, action_dim=8, action_gen=True,
    num_embodiment_domains=3, sound_dim=8, sound_gen=True, rope_axes_dim=(6, 5, 5),
)  # fmt: skip
TINY_EDGE = Geometry(
    hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=32,
    intermediate_size=96, vocab_size=300, latent_channel=4, patch_latent_dim=16, action_dim=8, action_gen=True,
    num_embodiment_domains=3, rope_axes_dim=(6, 5, 5), hidden_act="relu2", qk_norm_for_text=False,
    use_und_k_norm_for_gen=True, rms_norm_eps=1e-5, rope_theta=1e8,
)  # fmt: skip
STEM = "diffusion_pytorch_model"
KARRAS = {
    "_class_name": "UniPCMultistepScheduler",
    "use_karras_sigmas": True,
    "use_flow_sigmas": True,
    "prediction_type": "flow_prediction",
    "sigma_max": 200.0,
    "sigma_min": 0.147,
}
DISTILLED = {
    "_class_name": "FlowMatchEulerDiscreteScheduler",
    "stochastic_sampling": True,
    "shift": 1.0,
    "fixed_step_sampler_config": {"sample_type": "sde", "t_list": [1.0, 0.9375, 0.8333333333333334, 0.625]},
}
STEP_POLICY: dict[str, Any] = {
    "schema_version": 1,
    "type": "first_last_n",
    "index_space": "denoising_loop_iteration",
    "scope": ["transformer"],
    "default_mode": "native",
    "first_steps": {"count": 3, "mode": "a16"},
    "last_steps": {"count": 3, "mode": "a16"},
    "overlap": "a16",
    "reasoner": "a16",
}
QUANTIZATION: dict[str, Any] = {
    "quant_method": "modelopt",
    "quant_algo": "FP8",
    "quant_type": "FP8_FP8",
    "weight_only": False,
    "ignore": ["proj_in", "proj_out", "time_embedder*", "lm_head", "model.visual*"],
    "runtime": {"diffusion_step_policy": STEP_POLICY},
}

VAE: dict[str, Any] = {
    "_class_name": "AutoencoderKLWan", "base_dim": 8, "decoder_base_dim": 8, "dim_mult": [1, 1, 1, 1],
    "num_res_blocks": 1, "attn_scales": [], "temperal_downsample": [False, True, True], "dropout": 0.0,
    "is_residual": True, "in_channels": 12, "out_channels": 12, "patch_size": 2, "scale_factor_temporal": 4,
    "scale_factor_spatial": 16, "z_dim": 4, "latents_mean": [0.0, 0.1, 0.2, 0.3], "latents_std": [1.0, 1.1, 1.2, 1.3],
}  # fmt: skip
SOUND_TOKENIZER: dict[str, Any] = {
    "_class_name": "Cosmos3AVAEAudioTokenizer", "vocoder_input_dim": 8, "dec_dim": 4, "dec_c_mults": [1, 1, 1, 1, 1],
    "dec_strides": [2, 4, 5, 6, 8], "dec_out_channels": 2, "hop_size": 1920, "sampling_rate": 48000, "enc_dim": 4,
    "enc_num_blocks": 1, "enc_c_mults": [1, 1, 1], "enc_latent_dim": 16, "enc_strides": [4, 5, 6],
}  # fmt: skip

Edit = Callable[[list[TensorHeader]], list[TensorHeader]]


def write_json(path: Path, value: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))
    return path


def write_sparse(path: Path, specs: Iterable[TensorHeader]) -> Path:
    """A valid safetensors file whose data is a hole."""
    specs = list(specs)
    path.parent.mkdir(parents=True, exist_ok=True)
    header = encode_header(specs)
    with path.open("wb") as file:
        file.write(header)
        file.truncate(len(header) + sum(spec.size_bytes for spec in specs))
    return path


def transformer_specs(geometry: Geometry, dtype: str = "BF16") -> list[TensorHeader]:
    return [TensorHeader(name, dtype, tensor.shape) for name, tensor in expected_tensors(geometry).items()]


def quantized_specs(geometry: Geometry) -> list[TensorHeader]:
    """The published FP8 layout: scales and calibration leftovers beside each linear, some names of the framework."""
    aliases = {"proj_in.weight": "vae2llm.weight", "proj_in.bias": "vae2llm.bias", "norm.weight": "model.norm.weight"}
    specs = []
    for name, tensor in expected_tensors(geometry).items():
        if tensor.linear:
            module = name.removesuffix(".weight")
            specs.append(TensorHeader(name, "F8_E4M3", tensor.shape))
            specs += [TensorHeader(f"{module}.{scale}", "F32", ()) for scale in ("weight_scale", "input_scale")]
            specs += [
                TensorHeader(f"{module}.{left}", "F32", ())
                for left in ("weight_quantizer._amax", "weight_quantizer._scale", "input_quantizer._amax")
            ]
        else:
            specs.append(TensorHeader(aliases.get(name, name), "BF16", tensor.shape))
    return specs


def split(specs: list[TensorHeader], count: int) -> list[list[TensorHeader]]:
    size = -(-len(specs) // count)
    return [specs[start : start + size] for start in range(0, len(specs), size)]


def write_checkpoint(
    root: Path,
    geometry: Geometry = TINY,
    *,
    specs: list[TensorHeader] | None = None,
    edit: Edit = lambda specs: specs,
    shards: int = 1,
    config: Mapping[str, Any] | None = None,
    scheduler: Mapping[str, Any] = KARRAS,
) -> Path:
    """A directory with transformer and scheduler; ``edit`` changes the tensors, ``config`` the configuration."""
    specs = edit(transformer_specs(geometry) if specs is None else specs)
    parts = split(specs, shards)
    folder = root / "transformer"
    names = shard_names(STEM, len(parts))
    for name, part in zip(names, parts, strict=True):
        write_sparse(folder / name, part)
    if len(parts) > 1:
        weight_map = {spec.name: name for name, part in zip(names, parts, strict=True) for spec in part}
        write_json(folder / f"{STEM}.safetensors.index.json", {"metadata": {}, "weight_map": weight_map})
    values = {"_class_name": "Cosmos3OmniTransformer", **geometry.config, **(config or {})}
    write_json(folder / "config.json", {key: value for key, value in values.items() if value is not ...})
    write_json(root / "scheduler" / "scheduler_config.json", scheduler)
    write_json(
        root / "model_index.json",
        {
            "_class_name": "Cosmos3OmniPipeline",
            "transformer": ["diffusers", "Cosmos3OmniTransformer"],
            "scheduler": ["diffusers", scheduler["_class_name"]],
            "sound_tokenizer": [None, None],
        },
    )
    return root


def weight_file(root: Path) -> Path:
    return root / "transformer" / f"{STEM}.safetensors"
