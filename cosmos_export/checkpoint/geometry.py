"""The numbers that define one Cosmos 3 transformer: ``transformer/config.json`` with the published defaults filled in.

``Geometry`` has exactly the arguments of diffusers' ``Cosmos3OmniTransformer``. A value outside what that class
computes is refused here, before anything is built on it. Keys that class does not have are of three kinds: fixed (one
value is legal, any other names a different model), inert (training and bookkeeping), and unknown (``unknown_keys``: the
published implementation ignores them, so they cannot change what is compiled, but a user should see them).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, NoReturn

from cosmos_export.diagnostics import UserError, shown
from cosmos_export.family import ACTIVATIONS, Family, family_of

MODEL_CLASS = "Cosmos3OmniTransformer"
TIME_PROJECTION = 256
"""Width of the sinusoidal timestep embedding; a constant of the model class, not of its configuration."""

PATCH_SIZES = (1, 2)
"""Latents per side of a patch that are captured."""

_MAX_LAYERS = 4096
_MAX_WIDTH = 2**31 - 1

SPELLINGS = {
    "reset_spatial_ids": "unified_3d_mrope_reset_spatial_ids",
    "temporal_modality_margin": "unified_3d_mrope_temporal_modality_margin",
}
"""Two configuration keys exist in a short and a long spelling."""

FIXED: Mapping[str, tuple[Any, ...]] = {
    "joint_attn_implementation": ("two_way",),
    "position_embedding_type": ("unified_3d_mrope",),
    "qk_norm_for_diffusion": (True,),
    "use_moe": (True,),
    "video_temporal_causal": (False,),
    "temporal_compression_factor": (4,),
    "temporal_compression_factor_sound": (1,),
    "backbone_type": (*(family.facts.backbone for family in reversed(Family)), None),
}
"""Keys the model class does not read, but whose other values name a different model."""

INERT = frozenset(
    {
        "_class_name", "_diffusers_version", "_name_or_path", "dtype", "torch_dtype", "freeze_und", "initializer_range",
        "max_action_dim", "max_position_embeddings", "model_type", "qk_norm", "use_cache", "quantization_config",
    }
)  # fmt: skip


@dataclass(frozen=True)
class Geometry:
    """Arguments of the transformer, named and defaulted as in diffusers."""

    attention_bias: bool = False
    attention_dropout: float = 0.0
    head_dim: int = 128
    hidden_size: int = 4096
    intermediate_size: int = 12288
    base_fps: int = 24
    enable_fps_modulation: bool = True
    latent_channel: int = 48
    unified_3d_mrope_reset_spatial_ids: bool = True
    unified_3d_mrope_temporal_modality_margin: int = 15000
    latent_patch_size: int = 2
    num_attention_heads: int = 32
    num_hidden_layers: int = 36
    num_key_value_heads: int = 8
    patch_latent_dim: int = 192
    rms_norm_eps: float = 1e-6
    rope_theta: float = 5_000_000.0
    action_dim: int | None = None
    action_gen: bool = False
    num_embodiment_domains: int = 32
    sound_dim: int | None = None
    sound_gen: bool = False
    sound_latent_fps: float = 25.0
    timestep_scale: float = 0.001
    vocab_size: int = 151936
    hidden_act: str = "silu"
    qk_norm_for_text: bool = True
    use_und_k_norm_for_gen: bool = False
    rope_axes_dim: tuple[int, int, int] = (24, 20, 20)
    unknown_keys: Mapping[str, Any] = field(default_factory=dict, compare=False)

    def __post_init__(self) -> None:
        _validate(self)

    @property
    def family(self) -> Family:
        """The backbone of both towers."""
        return family_of(self.hidden_act)

    @property
    def has_und_k_norm_for_gen(self) -> bool:
        """A separate norm for the reasoner keys that the generator reads; the flag is inert where text has its own."""
        return self.use_und_k_norm_for_gen and not self.qk_norm_for_text

    @property
    def query_width(self) -> int:
        return self.num_attention_heads * self.head_dim

    @property
    def key_value_width(self) -> int:
        return self.num_key_value_heads * self.head_dim

    def kv_bytes_per_token(self, bytes_per_element: int = 2) -> int:
        """Keys and values of one prompt token, all layers, that the generator reads (BF16 unless said)."""
        return 2 * self.num_hidden_layers * self.key_value_width * bytes_per_element

    @property
    def config(self) -> dict[str, Any]:
        """Keyword arguments for diffusers' ``Cosmos3OmniTransformer``."""
        result: dict[str, Any] = {
            entry.name: getattr(self, entry.name) for entry in fields(self) if entry.name != "unknown_keys"
        }
        axes = list(self.rope_axes_dim)
        result["rope_axes_dim"] = axes
        result["rope_scaling"] = {"mrope_interleaved": True, "mrope_section": list(axes), "rope_type": "default"}
        return result


def parse_geometry(config: Mapping[str, Any]) -> Geometry:
    """The geometry in ``transformer/config.json``; CX103 for a bad value, CX104 for one of a different model."""
    class_name = config.get("_class_name", MODEL_CLASS)
    if class_name != MODEL_CLASS:
        _unsupported("_class_name", class_name, repr(MODEL_CLASS))
    for key, allowed in FIXED.items():
        if key in config and not any(type(config[key]) is type(value) and config[key] == value for value in allowed):
            _unsupported(key, config[key], " or ".join(map(repr, allowed)))
    derived = ("unknown_keys", "rope_axes_dim")
    known = {entry.name: entry.type for entry in fields(Geometry) if entry.name not in derived}
    values: dict[str, Any] = {}
    unknown: dict[str, Any] = {}
    for key, value in config.items():
        name = SPELLINGS.get(key, key)
        if name in known:
            value = _typed(key, value, str(known[name]))
            if name in values and values[name] != value:
                _invalid(f"{key} = {value!r} contradicts {name} = {values[name]!r}, the other spelling of the same key")
            values[name] = value
        elif key not in INERT and key not in FIXED and key not in ("rope_scaling", "rope_axes_dim"):
            unknown[key] = value
    values["rope_axes_dim"] = _rope_axes(config)
    geometry = Geometry(**values, unknown_keys=unknown)
    for facts in (family.facts for family in Family if family.facts.states_backbone):
        if config.get("backbone_type") == facts.backbone and geometry.hidden_act != facts.activation:
            _invalid(
                f"backbone_type is {facts.backbone!r}, whose hidden_act is {facts.activation!r}, but hidden_act is "
                f"{geometry.hidden_act!r}"
            )
    return geometry


def _rope_axes(config: Mapping[str, Any]) -> tuple[int, int, int]:
    """Frequencies per axis. ``rope_axes_dim`` wins in diffusers; a config with both must not say two things."""
    scaling = config.get("rope_scaling")
    from_scaling: Any = None
    if scaling is not None:
        if not isinstance(scaling, dict):
            _invalid(f"rope_scaling = {shown(scaling)} is not an object")
        for key in ("rope_type", "type"):
            if scaling.get(key, "default") not in ("default", "mrope"):
                _unsupported(f"rope_scaling.{key}", scaling[key], "'default'")
        if scaling.get("mrope_interleaved", True) is not True:
            _unsupported("rope_scaling.mrope_interleaved", scaling["mrope_interleaved"], "true")
        from_scaling = scaling.get("mrope_section")
    axes = config.get("rope_axes_dim")
    if axes is not None and from_scaling is not None and axes != from_scaling:
        _invalid(f"rope_axes_dim = {shown(axes)} contradicts rope_scaling.mrope_section = {shown(from_scaling)}")
    axes = axes if axes is not None else from_scaling
    if axes is None:
        return Geometry.rope_axes_dim
    if not isinstance(axes, list) or len(axes) != 3 or not all(type(item) is int and item > 0 for item in axes):
        _invalid(f"the rotary sections {shown(axes)} are not three positive sizes (time, height, width)")
    return (axes[0], axes[1], axes[2])


def _typed(key: str, value: Any, annotation: str) -> Any:
    """``value`` in the type of its field; JSON's 25 is a float where a float is meant, never the reverse."""
    if value is None and annotation.endswith("| None"):
        return None
    kind = annotation.removesuffix(" | None")
    if kind == "float" and type(value) in (int, float):
        try:
            return float(value)
        except OverflowError:
            _invalid(f"{key} = {shown(value)} is out of range")
    if kind in ("int", "bool", "str") and type(value).__name__ == kind:
        return value
    return _invalid(f"{key} = {shown(value)} should be {annotation}")


def _validate(geometry: Geometry) -> None:
    if geometry.hidden_act not in ACTIVATIONS:
        _unsupported("hidden_act", geometry.hidden_act, " or ".join(map(repr, ACTIVATIONS)))
    if geometry.latent_patch_size not in PATCH_SIZES:
        _unsupported("latent_patch_size", geometry.latent_patch_size, " or ".join(map(str, PATCH_SIZES)))
    if not 0 < geometry.num_hidden_layers <= _MAX_LAYERS:
        _invalid(f"num_hidden_layers = {shown(geometry.num_hidden_layers)} is outside 1 … {_MAX_LAYERS}")
    for name in (
        "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim", "vocab_size",
        "latent_channel", "patch_latent_dim", "num_embodiment_domains", "base_fps",
    ):  # fmt: skip
        if not 0 < getattr(geometry, name) <= _MAX_WIDTH:
            _invalid(f"{name} = {shown(getattr(geometry, name))} is outside 1 … {_MAX_WIDTH}")
    if not 0 <= geometry.unified_3d_mrope_temporal_modality_margin <= _MAX_WIDTH:
        margin = geometry.unified_3d_mrope_temporal_modality_margin
        _invalid(f"unified_3d_mrope_temporal_modality_margin = {shown(margin)} is outside 0 … {_MAX_WIDTH}")
    for name in ("rms_norm_eps", "rope_theta", "timestep_scale", "sound_latent_fps"):
        if not 0 < getattr(geometry, name) < float("inf"):
            _invalid(f"{name} = {getattr(geometry, name)!r} is not a positive number")
    if geometry.num_attention_heads % geometry.num_key_value_heads:
        heads, groups = geometry.num_attention_heads, geometry.num_key_value_heads
        _invalid(f"num_attention_heads = {heads} is not a multiple of num_key_value_heads = {groups}")
    axes, head_dim = geometry.rope_axes_dim, geometry.head_dim
    if min(axes) <= 0 or sum(axes) * 2 != head_dim:
        _invalid(f"the rotary sections {list(axes)} must be positive and add up to half of head_dim = {head_dim}")
    patch = geometry.latent_channel * geometry.latent_patch_size**2
    if geometry.patch_latent_dim != patch:
        _invalid(f"patch_latent_dim = {geometry.patch_latent_dim} is not latent_channel × latent_patch_size² = {patch}")
    for name in ("action", "sound"):
        width = getattr(geometry, f"{name}_dim")
        if getattr(geometry, f"{name}_gen") and width is None:
            _invalid(f"{name}_gen is true but {name}_dim is not set")
        if width is not None and not 0 < width <= _MAX_WIDTH:
            _invalid(f"{name}_dim = {shown(width)} is outside 1 … {_MAX_WIDTH}")


def _invalid(what: str) -> NoReturn:
    raise UserError(
        "CX103", f"transformer/config.json: {what}", "compare the file with the one in the published repository"
    )


def _unsupported(key: str, value: Any, allowed: str) -> NoReturn:
    raise UserError(
        "CX104",
        f"transformer/config.json: {key} = {shown(value)} is not supported; this compiler knows {allowed}",
        "the checkpoint is a different model than Cosmos 3, or newer than this version: upgrade cosmos-export",
    )
