"""The published sizes. Variants of one size differ in training, sound head and frame rate, not in width."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cosmos_export.checkpoint.geometry import Geometry

NANO = Geometry(action_dim=64, action_gen=True, sound_dim=64, sound_gen=True)
SUPER = Geometry(
    hidden_size=5120, intermediate_size=25600, num_attention_heads=64, num_hidden_layers=64,
    action_dim=64, action_gen=True, sound_dim=64, sound_gen=True,
)  # fmt: skip
EDGE = Geometry(
    hidden_size=2048, intermediate_size=9216, num_attention_heads=16, num_hidden_layers=28, vocab_size=131072,
    rms_norm_eps=1e-5, rope_theta=1e8, hidden_act="relu2", qk_norm_for_text=False, use_und_k_norm_for_gen=True,
    action_dim=64, action_gen=True,
)  # fmt: skip
PUBLISHED: Mapping[str, Geometry] = {"nano": NANO, "super": SUPER, "edge": EDGE}

POLICIES: Mapping[str, tuple[str, str]] = {
    "nano-policy-droid": ("nano", "droid_lerobot"), "edge-policy-droid": ("edge", "droid_lerobot"),
}  # fmt: skip
"""Published policies: the size, and the domain of the embodiment."""

VAE_WIDTHS: Mapping[str, Any] = {
    "base_dim": 160, "decoder_base_dim": 256, "dim_mult": [1, 2, 4, 4], "num_res_blocks": 2,
}  # fmt: skip
"""Widths of the video autoencoder, which all sizes share."""
SOUND_WIDTHS: Mapping[str, Any] = {
    "dec_dim": 320, "dec_c_mults": [1, 2, 4, 8, 16], "enc_dim": 192, "enc_num_blocks": 2, "enc_c_mults": [1, 2, 4],
}  # fmt: skip
PROJECTOR_WIDTH = 11520
"""Width of Edge's projector between vision encoder and text tower."""

_SIZE_FIELDS = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
    "vocab_size", "hidden_act", "latent_channel",
)  # fmt: skip


def published_size(geometry: Geometry) -> str | None:
    """``nano``, ``super`` or ``edge`` when the widths are theirs."""
    for name, reference in PUBLISHED.items():
        if all(getattr(geometry, key) == getattr(reference, key) for key in _SIZE_FIELDS):
            return name
    return None
