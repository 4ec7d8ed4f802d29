"""Sites: the places of a model whose products a recipe gives a scheme to."""

from __future__ import annotations

UND, GEN = "und", "gen"
TOWERS = (UND, GEN)
"""The reasoner, which runs once per prompt, and the generator, which runs in every step."""
QKV, OUT, GATE_UP, DOWN = "attention.qkv", "attention.out", "mlp.gate_up", "mlp.down"
LINEARS = (QKV, OUT, GATE_UP, DOWN)
"""Kinds of linears: those that read what attention's operands come from, that read its result, that an activation
reads, and that read an activation."""
CORE = "attention.core"
"""The two products of attention itself."""
PROMPT_KV = "attention.kv"
"""Keys and values that the reasoner hands to the generator."""
KINDS = (*LINEARS, CORE, PROMPT_KV)
