"""The transformer of the micro world, and its forward pass over a batch for training.

The published ``forward`` takes one sample. Here the same modules run on many: the reasoner's tower over a few prompts,
the generator's over many samples, each of which attends to the keys and values of its prompt. Sharing prompts is what
makes training cheap: 60 to 113 tokens of a prompt are computed once for eight samples of 20 to 38 tokens. Positions are
relative: text is placed before 0 in time and everything generated at 0 and later, so that a table of rotations serves
every prompt.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from benchmarks.microworld import text, world

CONFIG: dict[str, Any] = {
    "attention_bias": False, "head_dim": 32, "hidden_size": 128, "intermediate_size": 384, "base_fps": 24,
    "enable_fps_modulation": True, "latent_channel": 16, "unified_3d_mrope_reset_spatial_ids": True,
    "unified_3d_mrope_temporal_modality_margin": 15000, "latent_patch_size": 2, "num_attention_heads": 4,
    "num_hidden_layers": 6, "num_key_value_heads": 2, "patch_latent_dim": 64, "rms_norm_eps": 1e-6,
    "rope_scaling": {"mrope_section": [6, 5, 5], "mrope_interleaved": True, "rope_type": "default"},
    "rope_theta": 5e6, "action_dim": 8, "action_gen": True, "num_embodiment_domains": 32, "sound_dim": 8,
    "sound_gen": True, "sound_latent_fps": 25.0, "timestep_scale": 0.001, "vocab_size": text.VOCABULARY,
    "hidden_act": "silu", "qk_norm_for_text": True, "use_und_k_norm_for_gen": False,
}  # fmt: skip
DOMAIN = 4
"""The embodiment `pusht`."""
ACTION_WIDTH = 2
MARGIN = 15000
LATENT_FRAMES, LATENT_SIZE = 5, 4
SOUND_FRAMES = 18


def make(seed: int = 0) -> Any:
    """An untrained transformer: norms at 1, biases at 0, ends of branches small, heads near 0."""
    from diffusers import Cosmos3OmniTransformer

    torch.manual_seed(seed)
    transformer = Cosmos3OmniTransformer(**CONFIG)
    layers = CONFIG["num_hidden_layers"]
    with torch.no_grad():
        for name, weight in transformer.named_parameters():
            if weight.ndim == 1:
                weight.fill_(1.0 if "norm" in name else 0.0)
                continue
            inputs = weight.shape[1]
            if name == "action_proj_in.fc.weight":
                inputs = CONFIG["action_dim"]
            elif name == "action_proj_out.fc.weight":
                inputs = CONFIG["hidden_size"]
            scale = inputs**-0.5
            if name.endswith((".to_out.weight", ".to_add_out.weight", ".down_proj.weight")):
                scale *= 0.5 / layers**0.5
            elif name.startswith(("proj_out", "action_proj_out", "audio_proj_out", "lm_head")):
                scale *= 0.1
            elif "bias" in name:
                scale = 0.0
            elif name.startswith("embed_tokens"):
                scale = 0.5
            weight.normal_(0.0, scale)
    return transformer


@dataclass
class PromptState:
    """The part of the prompts that the generator reads: per layer keys and values [P, heads, S, 32] and which are
    real."""

    keys: list[torch.Tensor]
    values: list[torch.Tensor]
    real: torch.Tensor
    """[P, S], true where a token is no padding."""
    hidden: torch.Tensor
    """[P, S, 128], behind the last norm."""


@dataclass
class Sample:
    """A batch of noisy samples: what the generator sees. Frames and actions that are given are clean."""

    vision: torch.Tensor
    """[B, 16, 5, 4, 4]."""
    vision_noisy: torch.Tensor
    """[B, 5], 1 where a latent frame is generated."""
    sigma: torch.Tensor
    """[B], the share of noise."""
    fps: float
    actions: torch.Tensor | None = None
    """[B, 16, 8]."""
    actions_noisy: torch.Tensor | None = None
    """[B], 1 where actions are generated."""
    sound: torch.Tensor | None = None
    """[B, 8, 18]."""


class _HalfLinear(torch.autograd.Function):
    """A linear whose three products have bf16 factors; everything beside them stays in fp32. A CPU with AVX-512 BF16
    multiplies it three times as fast."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        flat, narrow = x.reshape(-1, x.shape[-1]).bfloat16(), weight.bfloat16()
        ctx.save_for_backward(flat, narrow)
        return (flat @ narrow.T).float().view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:  # type: ignore[override]
        flat, narrow = ctx.saved_tensors
        error = gradient.reshape(-1, gradient.shape[-1]).bfloat16()
        return (error @ narrow).float().view(*gradient.shape[:-1], -1), (error.T @ flat).float()


class Batched:
    """Runs a transformer on batches; with ``half`` the linears of its layers multiply in bf16."""

    def __init__(self, transformer: Any, half: bool = False) -> None:
        self.transformer = transformer
        self._half = half
        self._tables: dict[tuple[float, bool, bool], tuple[torch.Tensor, torch.Tensor]] = {}

    def prompts(self, ids: torch.Tensor, lengths: torch.Tensor, embedded: torch.Tensor | None = None) -> PromptState:
        """The reasoner's tower over prompts [P, S], padded on the right. ``embedded`` replaces their embeddings."""
        net, count = self.transformer, ids.shape[1]
        hidden = net.embed_tokens(ids) if embedded is None else embedded
        steps = torch.arange(count, dtype=torch.float32)
        times = steps[None] - lengths[:, None].float() - MARGIN
        places = torch.stack([times, steps.expand_as(times), steps.expand_as(times)])
        cos, sin = (table.view(ids.shape[0], 1, count, -1) for table in self._rotations(places))
        state = PromptState([], [], steps[None] < lengths[:, None], hidden)
        for layer in net.layers:
            attention = layer.self_attn
            normed = _norm(hidden, layer.input_layernorm)
            query = _rotate(_heads(self._linear(attention.to_q, normed), attention.norm_q), cos, sin)
            key = _rotate(_heads(self._linear(attention.to_k, normed), attention.norm_k), cos, sin)
            value = _heads(self._linear(attention.to_v, normed))
            state.keys.append(key)
            state.values.append(value)
            out = functional.scaled_dot_product_attention(
                query, _repeat(key), _repeat(value), is_causal=True
            )  # padding is on the right, where no real token looks
            hidden = hidden + self._linear(attention.to_out, _flat(out))
            hidden = hidden + self._mlp(layer.mlp, _norm(hidden, layer.post_attention_layernorm))
        state.hidden = _norm(hidden, net.norm)
        return state

    def velocity(
        self, prompts: PromptState, which: torch.Tensor, sample: Sample
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """Velocities of vision [B, 16, 5, 4, 4], actions [B, 16, 8] and sound [B, 8, 18]. ``which`` [B] is the prompt
        of each sample."""
        net = self.transformer
        time = net.time_embedder(net.time_proj(sample.sigma))[:, None]
        tokens = net.proj_in(_patches(sample.vision))
        noisy = sample.vision_noisy.repeat_interleave(tokens.shape[1] // LATENT_FRAMES, 1)[..., None]
        parts = [tokens + noisy * time]
        if sample.sound is not None:
            parts.append(net.audio_proj_in(sample.sound.transpose(1, 2)) + net.audio_modality_embed + time)
        if sample.actions is not None:
            assert sample.actions_noisy is not None
            weight = net.action_proj_in.fc.weight[DOMAIN].view(CONFIG["action_dim"], -1)
            embedded = sample.actions @ weight + net.action_proj_in.bias.weight[DOMAIN] + net.action_modality_embed
            parts.append(embedded + sample.actions_noisy[:, None, None] * time)
        hidden = torch.cat(parts, 1)
        cos, sin = self._table(sample.fps, sample.sound is not None, sample.actions is not None)
        own = torch.ones(len(which), hidden.shape[1], dtype=torch.bool)
        mask = torch.cat([prompts.real[which], own], 1)[:, None, None]
        for index, layer in enumerate(net.layers):
            attention = layer.self_attn
            normed = _norm(hidden, layer.input_layernorm_moe_gen)
            query = _rotate(_heads(self._linear(attention.add_q_proj, normed), attention.norm_added_q), cos, sin)
            key = _rotate(_heads(self._linear(attention.add_k_proj, normed), attention.norm_added_k), cos, sin)
            value = _heads(self._linear(attention.add_v_proj, normed))
            keys = torch.cat([prompts.keys[index][which], key], 2)
            values = torch.cat([prompts.values[index][which], value], 2)
            out = functional.scaled_dot_product_attention(query, _repeat(keys), _repeat(values), attn_mask=mask)
            hidden = hidden + self._linear(attention.to_add_out, _flat(out))
            hidden = hidden + self._mlp(layer.mlp_moe_gen, _norm(hidden, layer.post_attention_layernorm_moe_gen))
        hidden = _norm(hidden, net.norm_moe_gen)
        sizes = [part.shape[1] for part in parts]
        pieces = list(hidden.split(sizes, 1))
        vision = _unpatches(net.proj_out(pieces.pop(0)))
        sound = net.audio_proj_out(pieces.pop(0)).transpose(1, 2) if sample.sound is not None else None
        actions = None
        if sample.actions is not None:
            weight = net.action_proj_out.fc.weight[DOMAIN].view(-1, CONFIG["action_dim"])
            actions = pieces.pop(0) @ weight + net.action_proj_out.bias.weight[DOMAIN]
        return vision, actions, sound

    def _linear(self, linear: Any, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = _HalfLinear.apply(x, linear.weight) if self._half else linear(x)
        return out

    def _mlp(self, mlp: Any, x: torch.Tensor) -> torch.Tensor:
        gated = functional.silu(self._linear(mlp.gate_proj, x)) * self._linear(mlp.up_proj, x)
        return self._linear(mlp.down_proj, gated)

    def _table(self, fps: float, sound: bool, actions: bool) -> tuple[torch.Tensor, torch.Tensor]:
        from diffusers.pipelines.cosmos.pipeline_cosmos3_omni import get_3d_mrope_ids_vae_tokens

        key = (fps, sound, actions)
        if key not in self._tables:
            grid = LATENT_SIZE // CONFIG["latent_patch_size"]
            parts = [get_3d_mrope_ids_vae_tokens(LATENT_FRAMES, grid, grid, 0, fps=fps)[0]]
            if sound:
                rate = CONFIG["sound_latent_fps"]
                parts.append(
                    get_3d_mrope_ids_vae_tokens(SOUND_FRAMES, 1, 1, 0, fps=rate, temporal_compression_factor=1)[0]
                )
            if actions:
                parts.append(
                    get_3d_mrope_ids_vae_tokens(
                        world.CHUNK, 1, 1, 0, fps=fps, temporal_compression_factor=1,
                        base_temporal_compression_factor=4, start_frame_offset=1,
                    )[0]
                )  # fmt: skip
            self._tables[key] = self._rotations(torch.cat(parts, 1)[:, None])
        return self._tables[key]

    def _rotations(self, places: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines [rows, S, 32] of positions [3, rows, S]."""
        cos, sin = self.transformer.rotary_emb(position_ids=places, device=places.device, dtype=torch.float32)
        return cos, sin


def _norm(hidden: torch.Tensor, norm: Any) -> torch.Tensor:
    return functional.rms_norm(hidden, (hidden.shape[-1],), norm.weight, norm.eps)


def _heads(projected: torch.Tensor, norm: Any = None) -> torch.Tensor:
    """[B, S, heads · 32] as [B, heads, S, 32], normalized per head."""
    heads = projected.view(*projected.shape[:2], -1, CONFIG["head_dim"])
    return (heads if norm is None else _norm(heads, norm)).transpose(1, 2)


def _flat(heads: torch.Tensor) -> torch.Tensor:
    return heads.transpose(1, 2).flatten(2)


def _repeat(heads: torch.Tensor) -> torch.Tensor:
    return heads.repeat_interleave(CONFIG["num_attention_heads"] // CONFIG["num_key_value_heads"], 1)


def _rotate(heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    half = heads.shape[-1] // 2
    turned = torch.cat((-heads[..., half:], heads[..., :half]), -1)
    return (heads * cos + turned * sin).to(heads.dtype)


def _patches(latents: torch.Tensor) -> torch.Tensor:
    batch, channels, frames, height, width = latents.shape
    split = latents.reshape(batch, channels, frames, height // 2, 2, width // 2, 2)
    return torch.einsum("bcthpwq->bthwpqc", split).reshape(batch, -1, 4 * channels)


def _unpatches(tokens: torch.Tensor) -> torch.Tensor:
    batch, grid = tokens.shape[0], LATENT_SIZE // 2
    split = tokens.reshape(batch, LATENT_FRAMES, grid, grid, 2, 2, -1)
    return torch.einsum("bthwpqc->bcthpwq", split).reshape(batch, -1, LATENT_FRAMES, LATENT_SIZE, LATENT_SIZE)
