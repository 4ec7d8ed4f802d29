"""A tiny model of each backbone, requests in every mode, and the oracle: the stock forward with its own arguments.

Nothing here uses the adapter of the capture. Positions follow the published rule (facts §2.4): generation starts 15,000
after the prompt on the temporal axis.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import Cosmos3OmniTransformer
from diffusers.models.transformers.transformer_cosmos3 import Cosmos3VLTextRotaryEmbedding

from cosmos_export.ir.interpreter import read_weights
from cosmos_export.ir.program import Program
from cosmos_export.ir.spec import WeightSource
from cosmos_export.passes.pipeline import Report

MARGIN = 15000
BACKBONES = ("omni", "edge")
Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Compiled:
    """A tiny model and its program after the capture and after every pass, in order."""

    config: dict[str, Any]
    model: Any
    weights: Callable[[Any], torch.Tensor]
    stages: dict[str, Program]
    reports: dict[str, Report]

    @property
    def captured(self) -> Program:
        return self.stages["capture"].copy()

    @property
    def final(self) -> Program:
        return list(self.stages.values())[-1]


def tiny_config(
    backbone: str, *, layers: int = 2, heads: int = 4, kv_heads: int = 2, head_dim: int = 32, **changes: Any
) -> dict[str, Any]:
    """Same topology as the published model, small numbers. Edge: relu², no q/k norm for text, the extra key norm."""
    edge = backbone == "edge"
    spatial = head_dim // 6
    config = {
        "num_hidden_layers": layers,
        "latent_patch_size": 2,
        "latent_channel": 4,
        "patch_latent_dim": 16,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "vocab_size": 512,
        "action_gen": True,
        "action_dim": 10,
        "num_embodiment_domains": 12,
        "sound_gen": not edge,
        "sound_dim": None if edge else 8,
        "rope_scaling": {"mrope_section": [head_dim // 2 - 2 * spatial, spatial, spatial], "mrope_interleaved": True},
        "rms_norm_eps": 1e-5 if edge else 1e-6,
        "rope_theta": 1e8 if edge else 5e6,
        "hidden_act": "relu2" if edge else "silu",
        "qk_norm_for_text": not edge,
        "use_und_k_norm_for_gen": edge,
        "unified_3d_mrope_temporal_modality_margin": MARGIN,
    }
    return config | changes


def published_config(name: str, **changes: Any) -> dict[str, Any]:
    """The real head and layer geometry of a published model (facts §1.2), with one layer and a small vocabulary."""
    edge = name == "edge"
    sizes = {"nano": (4096, 12288, 32), "super": (5120, 25600, 64), "edge": (2048, 9216, 16)}[name]
    config = {
        "num_hidden_layers": 1,
        "hidden_size": sizes[0],
        "intermediate_size": sizes[1],
        "num_attention_heads": sizes[2],
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 64,
        "latent_patch_size": 2,
        "latent_channel": 48,
        "patch_latent_dim": 192,
        "action_gen": True,
        "action_dim": 64,
        "num_embodiment_domains": 2,
        "sound_gen": not edge,
        "sound_dim": None if edge else 64,
        "rope_scaling": {"mrope_section": [24, 20, 20], "mrope_interleaved": True},
        "rms_norm_eps": 1e-5 if edge else 1e-6,
        "rope_theta": 1e8 if edge else 5e6,
        "hidden_act": "relu2" if edge else "silu",
        "qk_norm_for_text": not edge,
        "use_und_k_norm_for_gen": edge,
        "unified_3d_mrope_temporal_modality_margin": MARGIN,
    }
    return config | changes


def random_model(config: dict[str, Any]) -> Cosmos3OmniTransformer:
    """fp32, with every parameter random: no norm weight is one and no bias zero, so that none can be lost unseen."""
    model = Cosmos3OmniTransformer(**config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 1:
                parameter.copy_((1.0 if "norm" in name else 0.0) + 0.1 * noise)
            else:
                parameter.copy_(noise * parameter.shape[-1] ** -0.5)
    return model


def sources_of_model(model: torch.nn.Module, dtype: torch.dtype | None = None) -> dict[str, WeightSource]:
    """Where a checkpoint would have the parameters; no such file exists."""
    return {
        name: WeightSource(name, Path("absent.safetensors"), 0, dtype or p.dtype, tuple(p.shape))
        for name, p in model.named_parameters()
    }


def weights_of_model(model: torch.nn.Module) -> Callable[[Any], torch.Tensor]:
    """Values of bindings, from the model's own parameters."""
    state = dict(model.named_parameters())
    return read_weights(lambda source: state[source.key].detach())


# --------------------------------------------------------------------------------------------------------------------
# Requests
# --------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A request: which rows are given (clean) and how large everything is, in latent units."""

    mode: str
    frames: int
    height: int
    width: int
    prompt: int
    clean: tuple[int, ...] = ()
    sound: int = 0
    actions: int = 0
    clean_actions: tuple[int, ...] = ()

    def __str__(self) -> str:
        return f"{self.mode}-{self.frames}x{self.height}x{self.width}-{self.prompt}"


def _all(n: int) -> tuple[int, ...]:
    return tuple(range(n))


CASES = [
    Case("t2i", 1, 4, 6, 7),
    Case("t2i", 1, 5, 7, 1),
    Case("t2v", 5, 5, 6, 333),
    Case("t2v", 17, 3, 4, 12),
    Case("i2v", 5, 6, 5, 7, clean=(0,)),
    Case("i2v", 2, 7, 9, 1, clean=(0,)),
    Case("v2v", 5, 4, 7, 20, clean=(0, 1)),
    Case("v2v", 17, 5, 3, 320, clean=(0, 1)),
    Case("policy", 5, 5, 6, 33, clean=(0,), actions=6),
    Case("policy", 3, 4, 4, 1, clean=(0,), actions=16),
    Case("policy_partly_given", 3, 4, 4, 9, clean=(0,), actions=5, clean_actions=(1, 3)),
    Case("forward_dynamics", 5, 5, 5, 11, clean=(0,), actions=6, clean_actions=_all(6)),
    Case("inverse_dynamics", 5, 3, 6, 11, clean=_all(5), actions=6),
    Case("sound", 5, 5, 4, 9, sound=6),
    Case("sound_image", 1, 4, 4, 310, sound=3),
    Case("everything", 5, 5, 6, 7, clean=(0,), sound=4, actions=6, clean_actions=(0,)),
]


def cases_for(backbone: str) -> list[Case]:
    return [c for c in CASES if c.sound == 0 or backbone != "edge"]


def request(
    config: dict[str, Any], case: Case, *, seed: int = 0, timestep: float = 437.0, dtype: torch.dtype = torch.float32
) -> Tensors:
    """Inputs of the program for all modalities of ``config``; a modality the case lacks has no rows."""
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    def mask(rows: int, clean: tuple[int, ...]) -> torch.Tensor:
        return torch.tensor([float(i not in clean) for i in range(rows)], dtype=dtype)

    fps = 16.0
    spacing = 24 / fps if case.frames > 1 else 1.0
    inputs = {
        "input_ids": torch.randint(0, config["vocab_size"], (case.prompt,), generator=generator),
        "vision_latent": noise(1, config["latent_channel"], case.frames, case.height, case.width),
        "vision_mask": mask(case.frames, case.clean),
        "frame_positions": torch.arange(case.frames) * spacing,
        "row_positions": torch.arange((case.height + 1) // 2).float(),
        "column_positions": torch.arange((case.width + 1) // 2).float(),
        "timestep": torch.tensor([timestep]),
    }
    if config["sound_gen"]:
        inputs |= {
            "sound_latent": noise(config["sound_dim"], case.sound),
            "sound_positions": torch.arange(case.sound) * (24 / 25),
        }
    if config["action_gen"]:
        inputs |= {
            "action_latent": noise(case.actions, config["action_dim"]),
            "action_mask": mask(case.actions, case.clean_actions),
            "action_positions": (torch.arange(case.actions) + 1) * (6 / fps),
            "action_domain": torch.tensor([config["num_embodiment_domains"] - 1]),
        }
    return inputs


# --------------------------------------------------------------------------------------------------------------------
# The oracle
# --------------------------------------------------------------------------------------------------------------------


def stock_forward(model: Cosmos3OmniTransformer, inputs: Tensors) -> Tensors:
    """The published forward on the same request: lists of items, index tensors of noisy rows, one packed sequence.

    A modality without rows is left out, as the published pipeline leaves it out.
    """
    ids, latent, timestep = inputs["input_ids"], inputs["vision_latent"], inputs["timestep"]
    text = len(ids)
    frames, height, width = latent.shape[2:]
    rows, columns = (height + 1) // 2, (width + 1) // 2
    start = text + MARGIN
    coordinates = inputs["frame_positions"] + start, inputs["row_positions"], inputs["column_positions"]
    grid = torch.meshgrid(*coordinates, indexing="ij")
    positions = [torch.arange(text).float().expand(3, text), torch.stack([axis.flatten() for axis in grid])]
    vision = torch.arange(text, text + frames * rows * columns)
    noisy = inputs["vision_mask"].nonzero().flatten()
    read = vision.view(frames, -1)[noisy].flatten()
    arguments: dict[str, Any] = {
        "vision_tokens": [latent],
        "vision_token_shapes": [(frames, rows, columns)],
        "vision_sequence_indexes": vision,
        "vision_mse_loss_indexes": read,
        "vision_timesteps": timestep.expand(len(read)),
        "vision_noisy_frame_indexes": [noisy],
    }
    total = text + len(vision)
    items = {}
    if "sound_latent" in inputs:
        sound = inputs["sound_latent"]
        items["sound"] = sound, sound.shape[1], torch.ones(sound.shape[1])
    if "action_latent" in inputs:
        action = inputs["action_latent"]
        items["action"] = action, action.shape[0], inputs["action_mask"]
    present = {name: item for name, item in items.items() if item[1] > 0}
    for name, (tokens, length, mask) in present.items():
        own = torch.arange(total, total + length)
        noisy = mask.nonzero().flatten()
        along = inputs[f"{name}_positions"] + start
        positions.append(torch.stack([along, torch.zeros_like(along), torch.zeros_like(along)]))
        total += length
        arguments |= {
            f"{name}_tokens": [tokens],
            f"{name}_token_shapes": [(length, 1, 1)],
            f"{name}_sequence_indexes": own,
            f"{name}_mse_loss_indexes": own[noisy],
            f"{name}_timesteps": timestep.expand(len(noisy)),
            f"{name}_noisy_frame_indexes": [noisy],
        }
    if "action" in present:
        arguments["action_domain_ids"] = [inputs["action_domain"]]
    with torch.no_grad():
        velocities = model(
            input_ids=ids,
            text_indexes=torch.arange(text),
            position_ids=torch.cat(positions, dim=1),
            und_len=text,
            sequence_length=total,
            return_dict=False,
            **arguments,
        )
    named = zip(("vision", "sound", "action"), velocities, strict=True)
    return {f"{name}_velocity": velocity[0] for name, velocity in named if velocity is not None}


class ExactRotary(Cosmos3VLTextRotaryEmbedding):
    """The stock rotary embedding with its angles in fp64; the stock class computes them in fp32 whatever its type."""

    def __init__(self, stock: Cosmos3VLTextRotaryEmbedding) -> None:
        torch.nn.Module.__init__(self)
        self.inv_freq = stock.inv_freq.double()
        self.rope_axes_dim = stock.rope_axes_dim

    def forward(self, position_ids: torch.Tensor, device: Any, dtype: Any) -> tuple[torch.Tensor, torch.Tensor]:
        angles = (self.inv_freq[:, None] * position_ids[:, :, None, :].double()).transpose(2, 3)
        angles = self.apply_interleaved_mrope(angles, self.rope_axes_dim)
        both = torch.cat((angles, angles), dim=-1)
        return both.cos(), both.sin()


def stock_forward_fp64(model: Cosmos3OmniTransformer, inputs: Tensors) -> Tensors:
    """The stock forward in fp64, its rotary angles included, at the positions that the fp32 run has."""
    import copy

    exact = copy.deepcopy(model).double()
    exact.rotary_emb = ExactRotary(model.rotary_emb)
    typed = ("vision_latent", "vision_mask", "sound_latent", "action_latent", "action_mask")
    return stock_forward(exact, {k: v.double() if k in typed else v for k, v in inputs.items()})


def distance(value: torch.Tensor, reference: torch.Tensor) -> float:
    """‖value − reference‖ / ‖reference‖; the norm of the value where the reference is zero."""
    assert value.shape == reference.shape, f"{tuple(value.shape)} against {tuple(reference.shape)}"
    value, reference = value.double(), reference.double()
    norm = reference.norm().item()
    return (value - reference).norm().item() / (norm if norm > 0 else 1.0)


def assert_close(outputs: Tensors, reference: Tensors, tolerance: float, what: str = "") -> None:
    """Every output of the reference within ``tolerance``; what the reference lacks has no elements."""
    assert reference.keys() <= outputs.keys()
    for name, value in outputs.items():
        if name not in reference:
            assert value.numel() == 0, f"{what}: `{name}` has values that the reference lacks"
            continue
        found = distance(value, reference[name])
        assert found <= tolerance, f"{what}: `{name}` is {found:.2e} from the reference, allowed {tolerance:.0e}"
