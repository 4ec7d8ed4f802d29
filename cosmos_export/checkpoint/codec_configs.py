"""The configurations of the codecs: ``vae/config.json`` and ``sound_tokenizer/config.json``.

Fields and defaults are those of diffusers' classes; ranges bound the work and the memory that a configuration can ask
for. A default that this compiler cannot take (``Only`` without it) makes its key required.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import prod
from pathlib import Path
from types import MappingProxyType
from typing import Any

from cosmos_export.checkpoint.config_fields import (
    REQUIRED,
    Fields,
    Flag,
    Integer,
    Items,
    Nullable,
    Number,
    Only,
    Record,
    checked,
    require,
)
from cosmos_export.checkpoint.strict_json import read_object

_WIDTH = 1 << 14
"""Channels of a layer before its multiplier, and latents of a codec."""
_WIDEST = 1 << 17
"""Channels of a layer with its multiplier."""
_MAX_HOP = 1_000_000
"""Samples of a latent."""
_multiplier, _stride = Integer(1, 1, 64), Integer(1, 1, 64)
_latent = Number(0.0, -1e6, 1e6)
_deviation = Number(1.0, 1e-6, 1e6)

# What diffusers' loader acts upon before the class sees the configuration.
_LOADER: Fields = {"_use_default_values": Only([], ([],)), "quantization_config": Only(None, (None,))}

VAE: Fields = {
    "_class_name": Only("AutoencoderKLWan", ("AutoencoderKLWan",)),
    **_LOADER,
    "base_dim": Integer(96, 1, _WIDTH),
    "decoder_base_dim": Nullable(None, Integer(1, 1, _WIDTH)),
    "z_dim": Integer(16, 1, _WIDTH),
    "dim_mult": Items([1, 2, 4, 4], _multiplier, 4, 4),
    "num_res_blocks": Integer(2, 1, 16),
    "attn_scales": Only([], ([],)),
    "temperal_downsample": Only([False, True, True], ([False, True, True],)),
    "dropout": Number(0.0, 0, 1),
    "latents_mean": Items(REQUIRED, _latent, 1, _WIDTH),
    "latents_std": Items(REQUIRED, _deviation, 1, _WIDTH),
    "is_residual": Only(False, (True,)),
    "in_channels": Only(3, (12,)),
    "out_channels": Only(3, (12,)),
    "patch_size": Only(None, (2,)),
    "scale_factor_temporal": Only(4, (4,)),
    "scale_factor_spatial": Only(8, (16,)),
}
SOUND_TOKENIZER: Fields = {
    "_class_name": Only("Cosmos3AVAEAudioTokenizer", ("Cosmos3AVAEAudioTokenizer",)),
    **_LOADER,
    "model_type": Only("autoencoder_v2", ("autoencoder_v2",)),
    "sampling_rate": Integer(48000, 1, 1_000_000),
    "vocoder_input_dim": Integer(64, 1, _WIDTH),
    "dec_dim": Integer(320, 1, _WIDTH),
    "dec_c_mults": Items((1, 2, 4, 8, 16), _multiplier, 1, 8),
    "dec_strides": Items((2, 4, 5, 6, 8), _stride, 1, 8),
    "dec_out_channels": Only(2, (2,)),
    "stereo": Only(True, (True,)),
    "use_wav_as_input": Only(True, (True,)),
    "normalize_volume": Flag(True),
    "hop_size": Nullable(None, Integer(1, 1, _MAX_HOP)),
    "input_channels": Only(1, (1,)),
    "enc_type": Only("spec_convnext", ("spec_convnext",)),
    "enc_dim": Integer(192, 1, _WIDTH),
    "enc_intermediate_dim": Integer(768, 1, _WIDEST),
    "enc_num_layers": Integer(12, 1, 1024),
    "enc_num_blocks": Integer(2, 1, 16),
    "enc_n_fft": Integer(64, 2, 1 << 14),
    "enc_hop_length": Integer(16, 1, 1 << 14),
    "enc_latent_dim": Integer(128, 1, 2 * _WIDTH),
    "enc_c_mults": Items((1, 2, 4), _multiplier, 1, 8),
    "enc_strides": Items((4, 5, 6), _stride, 1, 8),
    "enc_identity_init": Flag(False),
    "enc_use_snake": Flag(True),
    "dec_type": Only("oobleck", ("oobleck",)),
    "dec_use_snake": Only(True, (True,)),
    "dec_final_tanh": Only(False, (False,)),
    "dec_anti_aliasing": Only(False, (False,)),
    "dec_use_nearest_upsample": Only(False, (False,)),
    "dec_use_tanh_at_final": Only(False, (False,)),
    "bottleneck_type": Only("vae", ("vae",)),
    "bottleneck": Nullable(None, Record(None, {"type": Only(None, ("vae",))})),
    "activation": Only("snakebeta", ("snakebeta",)),
    "snake_logscale": Only(True, (True,)),
    "anti_aliasing": Only(False, (False,)),
    "use_cuda_kernel": Only(False, (False,)),
    "causal": Only(False, (False,)),
    "padding_mode": Only("zeros", ("zeros", "reflect", "replicate", "circular")),
    "latent_mean": Only(None, (None,)),
    "latent_std": Only(None, (None,)),
    "encoder_enabled": Flag(True),
}


def _vae_relations(config: Mapping[str, Any], file: Path) -> None:
    latents = config["z_dim"]
    for name in ("latents_mean", "latents_std"):
        found = len(config[name])
        require(
            found == latents, file, f"{name} has {found:,} values, and there are {latents:,} latent channels (z_dim)"
        )
    for name in ("base_dim", "decoder_base_dim"):
        _require_width(config, name, "dim_mult", file)


def _sound_relations(config: Mapping[str, Any], file: Path) -> None:
    for strides, multipliers in (("dec_strides", "dec_c_mults"), ("enc_strides", "enc_c_mults")):
        n, m = len(config[strides]), len(config[multipliers])
        require(n == m, file, f"{strides} has {n} values and {multipliers} has {m}; a stage has one of each")
    _require_width(config, "dec_dim", "dec_c_mults", file)
    _require_width(config, "enc_dim", "enc_c_mults", file)
    hop, samples = config["hop_size"], prod(config["dec_strides"])
    require(
        samples <= _MAX_HOP,
        file,
        f"the product of dec_strides is {samples:,}; allowed: {_MAX_HOP:,} samples per latent",
    )
    require(hop in (None, samples), file, f"hop_size is {hop}, and the product of dec_strides is {samples:,}")
    if config["encoder_enabled"]:
        hop, moments = config["enc_hop_length"] * prod(config["enc_strides"]), config["enc_latent_dim"]
        require(hop == samples, file, f"the encoder has {hop:,} samples per latent, the decoder {samples:,}")
        wanted = 2 * config["vocoder_input_dim"]
        require(moments == wanted, file, f"enc_latent_dim is {moments:,}, not twice vocoder_input_dim = {wanted:,}")


def _require_width(config: Mapping[str, Any], width: str, multipliers: str, file: Path) -> None:
    widest = (config[width] or 1) * max(config[multipliers])
    require(widest <= _WIDEST, file, f"{width} × {multipliers} is up to {widest:,} channels; allowed: {_WIDEST:,}")


_TABLES: Mapping[str, tuple[Fields, Callable[[Mapping[str, Any], Path], None]]] = MappingProxyType(
    {"vae": (VAE, _vae_relations), "sound_tokenizer": (SOUND_TOKENIZER, _sound_relations)}
)


def read_codec_configs(components: Mapping[str, Path]) -> Mapping[str, Mapping[str, Any]]:
    """The checked configuration of each codec folder among ``components``, complete with defaults.

    CX103 for a value out of its range or one that contradicts another, CX104 for one of another model.
    """
    found: dict[str, Mapping[str, Any]] = {}
    for folder, (fields, relations) in _TABLES.items():
        if folder in components:
            file = components[folder] / "config.json"
            config = checked(read_object(file), fields, file)
            relations(config, file)
            found[folder] = MappingProxyType({name: value for name, value in config.items() if name not in _LOADER})
    return MappingProxyType(found)
