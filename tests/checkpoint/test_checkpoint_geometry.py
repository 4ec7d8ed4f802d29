"""The geometry is diffusers' configuration, and the tensor table is what diffusers' model has."""

from __future__ import annotations

import inspect
from dataclasses import replace
from typing import Any

import pytest
from fake_checkpoint import TINY, TINY_EDGE

from cosmos_export.checkpoint.geometry import Geometry, parse_geometry
from cosmos_export.checkpoint.layout import Tower, canonical_name, expected_tensors, leftover_reason
from cosmos_export.checkpoint.published import EDGE, NANO, PUBLISHED, SUPER, published_size
from cosmos_export.diagnostics import UserError

NANO_CONFIG: dict[str, Any] = {
    "_class_name": "Cosmos3OmniTransformer",
    "_diffusers_version": "0.37.1",
    "action_dim": 64,
    "action_gen": True,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "base_fps": 24,
    "dtype": "bfloat16",
    "enable_fps_modulation": True,
    "freeze_und": False,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 12288,
    "joint_attn_implementation": "two_way",
    "latent_channel": 48,
    "latent_patch_size": 2,
    "max_action_dim": 64,
    "max_position_embeddings": 262144,
    "model_type": "qwen3_vl_text",
    "num_attention_heads": 32,
    "num_embodiment_domains": 32,
    "num_hidden_layers": 36,
    "num_key_value_heads": 8,
    "patch_latent_dim": 192,
    "position_embedding_type": "unified_3d_mrope",
    "qk_norm": False,
    "qk_norm_for_diffusion": True,
    "qk_norm_for_text": True,
    "rms_norm_eps": 1e-06,
    "rope_scaling": {"mrope_interleaved": True, "mrope_section": [24, 20, 20], "rope_type": "default"},
    "rope_theta": 5000000,
    "sound_dim": 64,
    "sound_gen": True,
    "sound_latent_fps": 25,
    "temporal_compression_factor_sound": 1,
    "timestep_scale": 0.001,
    "unified_3d_mrope_reset_spatial_ids": True,
    "unified_3d_mrope_temporal_modality_margin": 15000,
    "use_cache": True,
    "use_moe": True,
    "video_temporal_causal": False,
    "vocab_size": 151936,
}
EDGE_CONFIG: dict[str, Any] = {
    "_class_name": "Cosmos3OmniTransformer",
    "action_dim": 64,
    "action_gen": True,
    "backbone_type": "cosmos3_edge_nemotron_dense",
    "hidden_act": "relu2",
    "hidden_size": 2048,
    "intermediate_size": 9216,
    "num_attention_heads": 16,
    "num_hidden_layers": 28,
    "qk_norm_for_text": False,
    "rms_norm_eps": 1e-05,
    "rope_axes_dim": [24, 20, 20],
    "rope_scaling": {"mrope_section": [24, 20, 20]},
    "rope_theta": 100000000.0,
    "sound_dim": None,
    "temporal_compression_factor": 4,
    "use_und_k_norm_for_gen": True,
    "vocab_size": 131072,
}


def test_published_configurations() -> None:
    assert parse_geometry(NANO_CONFIG) == NANO
    assert parse_geometry(EDGE_CONFIG) == EDGE
    assert parse_geometry(NANO_CONFIG).unknown_keys == {}
    assert [published_size(geometry) for geometry in (NANO, SUPER, EDGE, TINY)] == ["nano", "super", "edge", None]


def test_keys_that_a_config_leaves_out_have_the_defaults_of_diffusers() -> None:
    diffusers = pytest.importorskip("diffusers")
    signature = inspect.signature(diffusers.Cosmos3OmniTransformer.__init__)
    defaults = {
        name: parameter.default
        for name, parameter in signature.parameters.items()
        if name not in ("self", "dtype", "rope_scaling", "rope_axes_dim")
    }
    config = Geometry().config
    assert config.keys() - {"rope_scaling", "rope_axes_dim"} == defaults.keys()
    assert {name: config[name] for name in defaults} == defaults
    assert parse_geometry({}) == Geometry()


def test_both_spellings_and_whole_numbers_for_fractions() -> None:
    short = parse_geometry({"reset_spatial_ids": False, "temporal_modality_margin": 7, "sound_latent_fps": 25})
    assert short.unified_3d_mrope_reset_spatial_ids is False
    assert short.unified_3d_mrope_temporal_modality_margin == 7
    assert isinstance(short.sound_latent_fps, float)
    with pytest.raises(UserError, match="the other spelling"):
        parse_geometry({"temporal_modality_margin": 7, "unified_3d_mrope_temporal_modality_margin": 8})


def test_rotary_sections_from_either_key() -> None:
    assert parse_geometry({"rope_axes_dim": [22, 21, 21]}).rope_axes_dim == (22, 21, 21)
    assert parse_geometry({"rope_scaling": {"mrope_section": [22, 21, 21]}}).rope_axes_dim == (22, 21, 21)
    assert parse_geometry({"rope_scaling": None}).rope_axes_dim == (24, 20, 20)


def test_unknown_keys_are_kept_to_be_shown() -> None:
    assert parse_geometry({"sliding_window": 4, "freeze_und": True}).unknown_keys == {"sliding_window": 4}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"_class_name": "WanTransformer3DModel"}, "_class_name = 'WanTransformer3DModel' is not supported"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu' is not supported; this compiler knows 'silu' or 'relu2'"),
        ({"backbone_type": "mamba"}, "backbone_type = 'mamba'"),
        ({"joint_attn_implementation": "one_way"}, "knows 'two_way'"),
        ({"position_embedding_type": "rotary"}, "knows 'unified_3d_mrope'"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "rope_scaling.rope_type = 'yarn'"),
        ({"rope_scaling": {"mrope_interleaved": False}}, "mrope_interleaved = False"),
        ({"qk_norm_for_diffusion": False}, "qk_norm_for_diffusion = False"),
        ({"video_temporal_causal": True}, "video_temporal_causal = True"),
        ({"use_moe": False}, "use_moe = False"),
        ({"temporal_compression_factor": 8}, "temporal_compression_factor = 8"),
        ({"temporal_compression_factor_sound": True}, "temporal_compression_factor_sound = True"),
    ],
)
def test_a_different_model_is_refused(change: dict[str, Any], words: str) -> None:
    refuses(change, "CX104", words)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"hidden_size": "4096"}, "hidden_size = '4096' should be int"),
        ({"hidden_size": 4096.0}, "hidden_size = 4096.0 should be int"),
        ({"hidden_size": True}, "hidden_size = True should be int"),
        ({"action_gen": 1}, "action_gen = 1 should be bool"),
        ({"rms_norm_eps": 0}, "rms_norm_eps = 0.0 is not a positive number"),
        ({"rope_theta": 10**400}, "rope_theta = 1"),
        ({"num_hidden_layers": 0}, "num_hidden_layers = 0 is outside"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers = 1000000000 is outside"),
        ({"num_attention_heads": 30}, "30 is not a multiple of num_key_value_heads = 8"),
        ({"head_dim": 64}, "add up to half of head_dim = 64"),
        ({"patch_latent_dim": 190}, "latent_patch_size² = 192"),
        ({"sound_dim": None}, "sound_gen is true but sound_dim is not set"),
        ({"action_dim": 0}, "action_dim = 0 is outside"),
        ({"rope_scaling": 3}, "rope_scaling = 3 is not an object"),
        ({"rope_axes_dim": [20, 20, 24]}, "contradicts rope_scaling.mrope_section"),
        ({"rope_axes_dim": [64], "rope_scaling": None}, "not three positive sizes"),
        ({"backbone_type": "cosmos3_edge_nemotron_dense"}, "but hidden_act is 'silu'"),
    ],
)
def test_an_impossible_value_is_refused(change: dict[str, Any], words: str) -> None:
    refuses(change, "CX103", words)


def refuses(change: dict[str, Any], code: str, words: str) -> None:
    with pytest.raises(UserError) as caught:
        parse_geometry(NANO_CONFIG | change)
    assert caught.value.code == code
    assert words in caught.value.message
    assert "transformer/config.json" in caught.value.message
    assert caught.value.hint


GEOMETRIES = {
    **PUBLISHED,
    "tiny": TINY,
    "tiny edge": TINY_EDGE,
    "no heads": replace(TINY, action_gen=False, sound_gen=False),
    "biases": replace(TINY, attention_bias=True),
    "text norms and the flag for keys": replace(TINY, use_und_k_norm_for_gen=True),
    "no text norms": replace(TINY, qk_norm_for_text=False),
}


@pytest.mark.parametrize("name", GEOMETRIES)
def test_the_table_is_the_state_of_the_model(name: str) -> None:
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    geometry = GEOMETRIES[name]
    with torch.device("meta"):
        model = diffusers.Cosmos3OmniTransformer(**geometry.config)
    state = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    assert {tensor.name: tensor.shape for tensor in expected_tensors(geometry).values()} == state
    assert parse_geometry(dict(model.config)) == geometry


def test_towers_follow_the_names_that_mislead() -> None:
    table = expected_tensors(TINY)
    assert table["layers.0.self_attn.to_q.weight"].tower is Tower.REASONER
    assert table["layers.0.self_attn.add_q_proj.weight"].tower is Tower.GENERATOR
    assert table["layers.0.self_attn.to_add_out.weight"].tower is Tower.GENERATOR
    assert table["norm.weight"].tower is Tower.REASONER
    assert sum(tensor.linear for tensor in expected_tensors(NANO).values()) == 504
    assert sum(tensor.linear for tensor in expected_tensors(EDGE).values()) == 336
    assert [len(expected_tensors(geometry)) for geometry in (NANO, SUPER, EDGE)] == [814, 1430, 549]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("model.layers.3.self_attn.q_proj_moe_gen.weight", "layers.3.self_attn.add_q_proj.weight"),
        ("layers.3.self_attn.o_proj.weight_scale", "layers.3.self_attn.to_out.weight_scale"),
        ("layers.3.self_attn.k_norm.weight", "layers.3.self_attn.norm_k.weight"),
        ("layers.3.self_attn.k_norm_moe_gen.weight", "layers.3.self_attn.norm_added_k.weight"),
        ("layers.3.self_attn.k_norm_und_for_gen.weight", "layers.3.self_attn.k_norm_und_for_gen.weight"),
        ("vae2llm.bias", "proj_in.bias"),
        ("llm2vae.weight", "proj_out.weight"),
        ("time_embedder.mlp.2.bias", "time_embedder.linear_2.bias"),
        ("action2llm.fc.weight", "action_proj_in.fc.weight"),
        ("sound_modality_embed", "audio_modality_embed"),
        ("model.language_model.norm.weight", "norm.weight"),
    ],
)
def test_names_of_the_training_framework(name: str, expected: str) -> None:
    assert canonical_name(name) == expected


@pytest.mark.parametrize("geometry", [NANO, EDGE])
def test_a_name_of_the_model_means_itself(geometry: Geometry) -> None:
    for name in expected_tensors(geometry):
        assert canonical_name(name) == name
        assert leftover_reason(name) is None
