"""The tensors that a geometry must have, under diffusers' names, and how other spellings map to them.

The naming trap: ``to_*`` and ``norm_q/k`` belong to the reasoner, ``add_*``, ``to_add_out`` and ``norm_added_*`` to the
generator, the reverse of what the names mean elsewhere in diffusers.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum

from cosmos_export.checkpoint.geometry import TIME_PROJECTION, Geometry
from cosmos_export.checkpoint.safetensors_header import element_count


class Tower(StrEnum):
    """The tower that computes with a tensor."""

    REASONER = "reasoner"
    GENERATOR = "generator"


class TensorPart(StrEnum):
    """Purpose of a tensor, in the units that sizes are reported in."""

    LAYERS = "layers"
    """Decoder layers and the final norm of a tower."""
    EMBED = "embed_tokens"
    LM_HEAD = "lm_head"
    VISION = "vision_heads"
    TIME = "time_embedder"
    ACTION = "action_heads"
    SOUND = "sound_heads"


@dataclass(frozen=True)
class ExpectedTensor:
    """One tensor of the transformer. ``layer`` and ``kind`` (in the words of recipes) are those of a matrix product's
    weight in a tower's layer, which is what recipes quantize."""

    name: str
    shape: tuple[int, ...]
    tower: Tower
    part: TensorPart
    kind: str = ""
    layer: int = 0

    @property
    def linear(self) -> bool:
        """Whether recipes may quantize it."""
        return bool(self.kind)

    @property
    def may_be_quantized(self) -> bool:
        """Whether checkpoints have it in FP8: a linear of a tower, or the language head, which makes no video."""
        return self.linear or self.part is TensorPart.LM_HEAD

    @property
    def elements(self) -> int:
        return element_count(self.shape)


WEIGHT_DTYPES = ("BF16", "F16", "F32")
"""Types of tensors on disk; a tower linear may also be ``QUANTIZED_DTYPE``."""
QUANTIZED_DTYPE = "F8_E4M3"
SCALES = ("weight_scale", "input_scale")
"""Endings of the names of scales beside a quantized weight; each is one F32 number."""


def expected_tensors(geometry: Geometry) -> dict[str, ExpectedTensor]:
    """Every tensor the model has, in the order of its modules."""
    return {tensor.name: tensor for tensor in _tensors(geometry)}


def _tensors(geometry: Geometry) -> Iterator[ExpectedTensor]:
    hidden, vocab = geometry.hidden_size, geometry.vocab_size
    reasoner, generator = Tower.REASONER, Tower.GENERATOR
    yield ExpectedTensor("embed_tokens.weight", (vocab, hidden), reasoner, TensorPart.EMBED)
    for index in range(geometry.num_hidden_layers):
        yield from _layer(geometry, index, reasoner)
        yield from _layer(geometry, index, generator)
    yield ExpectedTensor("norm.weight", (hidden,), reasoner, TensorPart.LAYERS)
    yield ExpectedTensor("norm_moe_gen.weight", (hidden,), generator, TensorPart.LAYERS)
    yield ExpectedTensor("lm_head.weight", (vocab, hidden), reasoner, TensorPart.LM_HEAD)
    patch = geometry.patch_latent_dim
    yield from _affine("proj_in", patch, hidden, TensorPart.VISION)
    yield from _affine("proj_out", hidden, patch, TensorPart.VISION)
    yield from _affine("time_embedder.linear_1", TIME_PROJECTION, hidden, TensorPart.TIME)
    yield from _affine("time_embedder.linear_2", hidden, hidden, TensorPart.TIME)
    if geometry.action_gen and geometry.action_dim is not None:
        domains, action = geometry.num_embodiment_domains, geometry.action_dim
        for name, width in (("action_proj_in", hidden), ("action_proj_out", action)):
            yield ExpectedTensor(f"{name}.fc.weight", (domains, hidden * action), generator, TensorPart.ACTION)
            yield ExpectedTensor(f"{name}.bias.weight", (domains, width), generator, TensorPart.ACTION)
        yield ExpectedTensor("action_modality_embed", (hidden,), generator, TensorPart.ACTION)
    if geometry.sound_gen and geometry.sound_dim is not None:
        yield from _affine("audio_proj_in", geometry.sound_dim, hidden, TensorPart.SOUND)
        yield from _affine("audio_proj_out", hidden, geometry.sound_dim, TensorPart.SOUND)
        yield ExpectedTensor("audio_modality_embed", (hidden,), generator, TensorPart.SOUND)


def _layer(geometry: Geometry, index: int, tower: Tower) -> Iterator[ExpectedTensor]:
    prefix, gen = f"layers.{index}.", tower is Tower.GENERATOR
    suffix = "_moe_gen" if gen else ""
    hidden, ffn, head = geometry.hidden_size, geometry.intermediate_size, (geometry.head_dim,)
    query, key_value = geometry.query_width, geometry.key_value_width

    def norm(name: str, shape: tuple[int, ...]) -> ExpectedTensor:
        return ExpectedTensor(f"{prefix}{name}.weight", shape, tower, TensorPart.LAYERS)

    def linear(name: str, out: int, inner: int, kind: str) -> ExpectedTensor:
        return ExpectedTensor(f"{prefix}{name}.weight", (out, inner), tower, TensorPart.LAYERS, kind, index)

    attention = (
        ("self_attn.add_q_proj" if gen else "self_attn.to_q", query, hidden, "attention.qkv"),
        ("self_attn.add_k_proj" if gen else "self_attn.to_k", key_value, hidden, "attention.qkv"),
        ("self_attn.add_v_proj" if gen else "self_attn.to_v", key_value, hidden, "attention.qkv"),
        ("self_attn.to_add_out" if gen else "self_attn.to_out", hidden, query, "attention.out"),
    )
    yield norm(f"input_layernorm{suffix}", (hidden,))
    for name, out, inner, kind in attention:
        yield linear(name, out, inner, kind)
        if geometry.attention_bias:
            yield ExpectedTensor(f"{prefix}{name}.bias", (out,), tower, TensorPart.LAYERS)
    if gen:
        yield norm("self_attn.norm_added_q", head)
        yield norm("self_attn.norm_added_k", head)
    elif geometry.qk_norm_for_text:
        yield norm("self_attn.norm_q", head)
        yield norm("self_attn.norm_k", head)
    elif geometry.has_und_k_norm_for_gen:
        yield norm("self_attn.k_norm_und_for_gen", head)
    yield norm(f"post_attention_layernorm{suffix}", (hidden,))
    for name in geometry.family.facts.mlp_inputs:
        yield linear(f"mlp{suffix}.{name}", ffn, hidden, "mlp.gate_up")
    yield linear(f"mlp{suffix}.down_proj", hidden, ffn, "mlp.down")


def _affine(name: str, inner: int, out: int, part: TensorPart) -> Iterator[ExpectedTensor]:
    yield ExpectedTensor(f"{name}.weight", (out, inner), Tower.GENERATOR, part)
    yield ExpectedTensor(f"{name}.bias", (out,), Tower.GENERATOR, part)


_PREFIXES = ("model.language_model.", "model.", "net.", "language_model.")
_RENAMES = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"^vae2llm\.", "proj_in."),
        (r"^llm2vae\.", "proj_out."),
        (r"^action2llm\.", "action_proj_in."),
        (r"^llm2action\.", "action_proj_out."),
        (r"^sound2llm\.", "audio_proj_in."),
        (r"^llm2sound\.", "audio_proj_out."),
        (r"^sound_modality_embed$", "audio_modality_embed"),
        (r"^time_embedder\.mlp\.0\.", "time_embedder.linear_1."),
        (r"^time_embedder\.mlp\.2\.", "time_embedder.linear_2."),
        (r"\.self_attn\.([qkv])_proj_moe_gen\.", r".self_attn.add_\1_proj."),
        (r"\.self_attn\.o_proj_moe_gen\.", ".self_attn.to_add_out."),
        (r"\.self_attn\.([qk])_norm_moe_gen\.", r".self_attn.norm_added_\1."),
        (r"\.self_attn\.([qkv])_proj\.", r".self_attn.to_\1."),
        (r"\.self_attn\.o_proj\.", ".self_attn.to_out."),
        (r"\.self_attn\.([qk])_norm\.", r".self_attn.norm_\1."),
    )
)
"""Names of the training framework, which FP8 revisions partly keep."""


def canonical_name(name: str) -> str:
    """diffusers' spelling of a tensor name; the name itself where it has no other."""
    changed = True
    while changed:
        changed = False
        for prefix in _PREFIXES:
            if name.startswith(prefix):
                name, changed = name[len(prefix) :], True
    for pattern, replacement in _RENAMES:
        name = pattern.sub(replacement, name)
    return name


_LEFTOVERS = (
    (re.compile(r"\.\w*quantizer\._(amax|scale)$"), "calibration leftover; the scales hold the same number"),
    (re.compile(r"(^|\.)rotary_emb\.inv_freq$"), "recomputed from rope_theta"),
    (re.compile(r"(^|\.)visual\."), "the reasoner's vision encoder, which generation does not use"),
)


def leftover_reason(name: str) -> str | None:
    """Why a tensor that the model does not have may be in the file; None when it may not."""
    for pattern, reason in _LEFTOVERS:
        if pattern.search(name):
            return reason
    return None
