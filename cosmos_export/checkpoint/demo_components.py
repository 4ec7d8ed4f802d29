"""The parts of a demo checkpoint beside the transformer: small, random, and laid out as published.

Modules are built on torch's meta device only to learn their tensor names and shapes; the bytes come from
``random_weights``. This module and ``demo`` are the only ones here that import torch, and only inside functions.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cosmos_export.checkpoint.geometry import Geometry
from cosmos_export.checkpoint.published import PROJECTOR_WIDTH, SOUND_WIDTHS, VAE_WIDTHS
from cosmos_export.checkpoint.safetensors_writer import TensorHeader, write_json

SPECIAL_TOKENS = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>",
    "<|video_pad|>",
)  # fmt: skip
BYTE_TOKENS = 256
MIN_VOCAB = BYTE_TOKENS + len(SPECIAL_TOKENS)
_ALPHABET = [*range(33, 127), *range(161, 173), *range(174, 256)]
_CHAT_TEMPLATE = """\
{%- for message in messages -%}
<|im_start|>{{ message.role }}
{% if message.content is string -%}
{{ message.content }}
{%- else -%}
{%- for part in message.content -%}
{%- if part.type == 'text' -%}{{ part.text }}
{%- elif part.type in ('image', 'video') -%}<|vision_start|><|{{ part.type }}_pad|><|vision_end|>
{%- endif -%}
{%- endfor -%}
{%- endif -%}
<|im_end|>
{% endfor -%}
{%- if add_generation_prompt -%}
<|im_start|>assistant
{% endif -%}
"""


@dataclass(frozen=True)
class DemoComponent:
    """A folder of the checkpoint: what its configuration says and which tensors it has."""

    folder: str
    stem: str
    config: Mapping[str, Any] | None
    tensors: tuple[TensorHeader, ...]


def vae(geometry: Geometry, dtype: str, true_size: bool = False) -> DemoComponent:
    """The video autoencoder, at an eighth of a percent of its published size unless ``true_size``; compression and
    interface are the same."""
    from diffusers import AutoencoderKLWan

    channels = geometry.latent_channel
    narrow = {"base_dim": 8, "decoder_base_dim": 8, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1}
    arguments = {
        **(VAE_WIDTHS if true_size else narrow), "z_dim": channels,
        "attn_scales": [], "temperal_downsample": [False, True, True], "dropout": 0.0, "is_residual": True,
        "in_channels": 12, "out_channels": 12, "patch_size": 2, "scale_factor_temporal": 4, "scale_factor_spatial": 16,
        "latents_mean": [round(0.1 * index, 4) for index in range(channels)],
        "latents_std": [round(1 + 0.1 * index, 4) for index in range(channels)],
    }  # fmt: skip
    return _diffusers_component("vae", AutoencoderKLWan, arguments, dtype)


def sound_tokenizer(geometry: Geometry, dtype: str, true_size: bool = False) -> DemoComponent:
    """The audio autoencoder, narrow unless ``true_size``; 1,920 samples a latent frame as published."""
    from diffusers import Cosmos3AVAEAudioTokenizer

    assert geometry.sound_dim is not None
    narrow = {"dec_dim": 4, "dec_c_mults": [1, 1, 1, 1, 1], "enc_dim": 4, "enc_num_blocks": 1, "enc_c_mults": [1, 1, 1]}
    arguments = {
        **(SOUND_WIDTHS if true_size else narrow), "sampling_rate": 48000, "vocoder_input_dim": geometry.sound_dim,
        "dec_strides": [2, 4, 5, 6, 8], "dec_out_channels": 2, "hop_size": 1920,
        "enc_latent_dim": 2 * geometry.sound_dim, "enc_strides": [4, 5, 6],
    }  # fmt: skip
    return _diffusers_component("sound_tokenizer", Cosmos3AVAEAudioTokenizer, arguments, dtype)


def transformer_config(geometry: Geometry) -> dict[str, Any]:
    """``transformer/config.json`` with the keys the published files have, also those that diffusers ignores."""
    from diffusers import __version__

    config = {"_class_name": "Cosmos3OmniTransformer", "_diffusers_version": __version__, **geometry.config}
    config |= {"joint_attn_implementation": "two_way", "position_embedding_type": "unified_3d_mrope"}
    facts = geometry.family.facts
    if facts.states_backbone:
        return config | {"backbone_type": facts.backbone, "temporal_compression_factor": 4}
    del config["rope_axes_dim"]
    return config | {"model_type": f"{facts.reasoner}_text", "use_moe": True, "video_temporal_causal": False}


def scheduler_config(geometry: Geometry) -> dict[str, Any]:
    """The published sampler of the family."""
    from diffusers import UniPCMultistepScheduler

    flow: dict[str, Any] = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
    return _plain_config(UniPCMultistepScheduler(**flow, **geometry.family.facts.scheduler))


DISTILLED_SIGMAS = (1.0, 0.9375, 0.8333333333333334, 0.625)
"""The steps of the published checkpoints of four steps."""
DISTILLED_SCHEDULER: dict[str, Any] = {
    "_class_name": "FlowMatchEulerDiscreteScheduler",
    "stochastic_sampling": True,
    "shift": 1.0,
    "num_train_timesteps": 1000,
    "use_karras_sigmas": False,
    "use_dynamic_shifting": False,
    "fixed_step_requires_explicit_sigmas": True,
    "fixed_step_sampler_config": {"sample_type": "sde", "t_list": list(DISTILLED_SIGMAS)},
}
DISTILLED_INDEX: dict[str, Any] = {
    "_class_name": "Cosmos3DistilledModularPipeline",
    "is_distilled": True,
    "distilled_sigmas": list(DISTILLED_SIGMAS),
}
"""modular_model_index.json of such a checkpoint."""


def model_index(geometry: Geometry) -> dict[str, Any]:
    """The pipeline. The safety checker is off: it is a separate model with its own licence and weights."""
    from diffusers import __version__

    facts = geometry.family.facts
    sound = ["diffusers", "Cosmos3AVAEAudioTokenizer"] if geometry.sound_gen else [None, None]
    return {
        "_class_name": "Cosmos3OmniPipeline",
        "_diffusers_version": __version__,
        "default_use_system_prompt": facts.system_prompt,
        "enable_safety_checker": False,
        "safety_checker": [None, None],
        "scheduler": ["diffusers", "UniPCMultistepScheduler"],
        "sound_tokenizer": sound,
        "text_tokenizer": ["transformers", "PreTrainedTokenizerFast"],
        "transformer": ["diffusers", "Cosmos3OmniTransformer"],
        "use_native_flow_schedule": facts.native_grid,
        "vae": ["diffusers", "AutoencoderKLWan"],
    }


def token_ids() -> dict[str, int]:
    """The special tokens follow the 256 bytes."""
    return {token: BYTE_TOKENS + index for index, token in enumerate(SPECIAL_TOKENS)}


def write_tokenizer(folder: Path) -> None:
    """A byte-level tokenizer without merges: every text has a token sequence, and a prompt's length is its bytes."""
    others = (chr(256 + index) for index in range(BYTE_TOKENS - len(_ALPHABET)))
    letters = {byte: chr(byte) for byte in _ALPHABET}
    vocab = {letters[byte] if byte in letters else next(others): byte for byte in range(BYTE_TOKENS)}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    tokenizer: dict[str, Any] = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": index, "content": token, **flags} for token, index in token_ids().items()],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
            "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
            "vocab": vocab, "merges": [],
        },
    }  # fmt: skip
    folder.mkdir()
    write_json(folder / "tokenizer.json", tokenizer)
    write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": "<|im_end|>",
            "pad_token": "<|endoftext|>",
            "additional_special_tokens": list(SPECIAL_TOKENS[3:]),
            "clean_up_tokenization_spaces": False,
            "model_max_length": 262144,
        },
    )
    (folder / "chat_template.jinja").write_text(_CHAT_TEMPLATE, encoding="utf-8")


def reasoner(geometry: Geometry, dtype: str, true_size: bool = False) -> tuple[dict[str, Any], DemoComponent]:
    """Root ``config.json`` and the vision encoder with which transformers loads the reasoner; narrow unless
    ``true_size``."""
    facts = geometry.family.facts
    return _REASONERS[facts.reasoner](geometry, dtype, facts.vision if true_size else {})


def _text_config(geometry: Geometry) -> dict[str, Any]:
    ids = token_ids()
    copied = (
        "attention_bias", "head_dim", "hidden_act", "hidden_size", "intermediate_size", "num_attention_heads",
        "num_hidden_layers", "num_key_value_heads", "rms_norm_eps", "vocab_size",
    )  # fmt: skip
    return {name: getattr(geometry, name) for name in copied} | {
        "bos_token_id": ids["<|endoftext|>"],
        "eos_token_id": ids["<|im_end|>"],
        "pad_token_id": ids["<|endoftext|>"],
        "max_position_embeddings": geometry.family.facts.max_position,
        "tie_word_embeddings": False,
    }


def _root_config(architecture: str, model_type: str, dtype: str) -> dict[str, Any]:
    ids = token_ids()
    return {
        "architectures": [architecture],
        "model_type": model_type,
        "dtype": {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}[dtype],
        "image_token_id": ids["<|image_pad|>"],
        "video_token_id": ids["<|video_pad|>"],
        "vision_start_token_id": ids["<|vision_start|>"],
        "vision_end_token_id": ids["<|vision_end|>"],
        "tie_word_embeddings": False,
    }


def _qwen_reasoner(geometry: Geometry, dtype: str, widths: Mapping[str, Any]) -> tuple[dict[str, Any], DemoComponent]:
    import torch
    from transformers import Qwen3VLConfig, Qwen3VLVisionModel

    text = _text_config(geometry) | {
        "model_type": "qwen3_vl_text",
        "rope_theta": geometry.rope_theta,
        "rope_scaling": geometry.config["rope_scaling"],
    }
    vision = {
        "model_type": "qwen3_vl_vision", "depth": 4, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2,
        "in_channels": 3, "patch_size": 16, "spatial_merge_size": 2, "temporal_patch_size": 2,
        "out_hidden_size": geometry.hidden_size, "num_position_embeddings": 16, "deepstack_visual_indexes": [0, 1, 2],
        "hidden_act": "gelu_pytorch_tanh", **widths,
    }  # fmt: skip
    config = _root_config("Cosmos3OmniForConditionalGeneration", "cosmos3_omni", dtype)
    config |= {"text_config": text, "vision_config": vision}
    with torch.device("meta"):
        model = Qwen3VLVisionModel(Qwen3VLConfig(vision_config=dict(vision), text_config=dict(text)).vision_config)
    return config, DemoComponent("vision_encoder", "model", vision, _specs(model.state_dict(), dtype))


def _nemotron_reasoner(
    geometry: Geometry, dtype: str, widths: Mapping[str, Any]
) -> tuple[dict[str, Any], DemoComponent]:
    """Edge keeps the encoder under its names in the whole model, projector included, and gives it no configuration."""
    import torch
    from transformers import Cosmos3EdgeConfig
    from transformers.models.cosmos3_edge.modeling_cosmos3_edge import Cosmos3EdgePatchMerger, Cosmos3EdgeVisionModel

    text = _text_config(geometry) | {
        "model_type": "cosmos3_edge_text",
        "mlp_bias": False,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": geometry.rope_theta,
            "mrope_section": list(geometry.rope_axes_dim),
        },
    }
    vision = {
        "model_type": "cosmos3_edge_vision", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_channels": 3, "patch_size": 16, "num_patches": 16, "spatial_merge_size": 2,
        "hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6, **widths,
    }  # fmt: skip
    projector = PROJECTOR_WIDTH if widths else 80
    config = _root_config("Cosmos3EdgeForConditionalGeneration", "cosmos3_edge", dtype)
    config |= {"text_config": text, "vision_config": vision, "projector_hidden_size": projector}
    parsed = Cosmos3EdgeConfig(
        text_config=dict(text), vision_config=dict(vision), projector_hidden_size=config["projector_hidden_size"]
    )
    with torch.device("meta"):
        parts = {"visual": Cosmos3EdgeVisionModel(parsed.vision_config), "projector": Cosmos3EdgePatchMerger(parsed)}
    state = {
        f"model.{part}.{name}": value for part, model in parts.items() for name, value in model.state_dict().items()
    }
    return config, DemoComponent("vision_encoder", "model", None, _specs(state, dtype))


_REASONERS: Mapping[str, Callable[[Geometry, str, Mapping[str, Any]], tuple[dict[str, Any], DemoComponent]]] = {
    "qwen3_vl": _qwen_reasoner,
    "cosmos3_edge": _nemotron_reasoner,
}
"""Facts by the prefix of the reasoner's ``model_type``."""


def _diffusers_component(folder: str, model_class: Any, arguments: dict[str, Any], dtype: str) -> DemoComponent:
    import torch

    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch's, about a weight norm that diffusers uses
        model = model_class(**arguments)
    return DemoComponent(folder, "diffusion_pytorch_model", _plain_config(model), _specs(model.state_dict(), dtype))


def _plain_config(model: Any) -> dict[str, Any]:
    config: dict[str, Any] = json.loads(model.to_json_string())
    return config


def _specs(state: Mapping[str, Any], dtype: str) -> tuple[TensorHeader, ...]:
    return tuple(TensorHeader(name, dtype, tuple(value.shape)) for name, value in state.items())
