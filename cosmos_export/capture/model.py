"""Capture of the joint denoising step from the installed diffusers model, without weights."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from cosmos_export.capture.adapter import JointStep
from cosmos_export.capture.export import exported
from cosmos_export.capture.importer import Importer
from cosmos_export.diagnostics import InternalError, UnsupportedError, UserError
from cosmos_export.ir.dims import Dim, Size, expression, floor_div, symbol
from cosmos_export.ir.program import Loop, Program
from cosmos_export.ir.spec import Rate, Transform, WeightBinding, WeightSource

MODALITIES = ("vision", "sound", "action")

_INPUT_RATES = {
    "input_ids": Rate.PROMPT,
    "vision_latent": Rate.CARRIED,
    "vision_mask": Rate.REQUEST,
    "frame_positions": Rate.REQUEST,
    "row_positions": Rate.REQUEST,
    "column_positions": Rate.REQUEST,
    "timestep": Rate.STEP,
    "sound_latent": Rate.CARRIED,
    "sound_positions": Rate.REQUEST,
    "action_latent": Rate.CARRIED,
    "action_mask": Rate.REQUEST,
    "action_positions": Rate.REQUEST,
    "action_domain": Rate.REQUEST,
}


def program_dims(config: Mapping[str, Any], modalities: Collection[str]) -> dict[str, Dim]:
    """The dims of the joint step. Upper bounds are the captured graph's; a checkpoint's own limits are narrower."""
    dims = [
        Dim("und_len", 1, 262144, "prompt tokens"),
        Dim("frames", 1, 4096, "latent frames"),
        # The exporter reasons with grid sizes of two and more; the smallest published canvas has 12 rows.
        Dim("height", 3, 1024, "latent rows"),
        Dim("width", 3, 1024, "latent columns"),
    ]
    if "sound" in modalities:
        dims.append(Dim("sound_len", 0, 65536, "sound latents"))
    if "action" in modalities:
        dims.append(Dim("action_len", 0, 65536, "action rows"))
    return {d.name: d for d in dims}


def available_modalities(config: Mapping[str, Any]) -> tuple[str, ...]:
    has = {"vision": True, "sound": bool(config.get("sound_gen")), "action": bool(config.get("action_gen"))}
    return tuple(m for m in MODALITIES if has[m])


def _input_shapes(config: Mapping[str, Any], modalities: Collection[str]) -> dict[str, tuple[Size, ...]]:
    frames, height, width = (symbol(n) for n in ("frames", "height", "width"))
    patch = config["latent_patch_size"]
    rows, columns = (floor_div(expression(s) + patch - 1, patch) for s in (height, width))
    shapes: dict[str, tuple[Size, ...]] = {
        "input_ids": (symbol("und_len"),),
        "vision_latent": (1, config["latent_channel"], frames, height, width),
        "vision_mask": (frames,),
        "frame_positions": (frames,),
        "row_positions": (rows,),
        "column_positions": (columns,),
        "timestep": (1,),
    }
    if "sound" in modalities:
        length = symbol("sound_len")
        shapes |= {"sound_latent": (config["sound_dim"], length), "sound_positions": (length,)}
    if "action" in modalities:
        length = symbol("action_len")
        shapes |= {
            "action_latent": (length, config["action_dim"]),
            "action_mask": (length,),
            "action_positions": (length,),
            "action_domain": (1,),
        }
    return shapes


_MODEL_TYPED = {"vision_latent", "vision_mask", "sound_latent", "action_latent", "action_mask"}
_EXAMPLE = {"und_len": 77, "frames": 5, "height": 12, "width": 20, "sound_len": 13, "action_len": 17}


def input_dtype(name: str, model_dtype: torch.dtype) -> torch.dtype:
    """Type of a step input: latents and masks as the model computes, ids and embodiments int64, the rest float32."""
    if name in ("input_ids", "action_domain"):
        return torch.int64
    return model_dtype if name in _MODEL_TYPED else torch.float32


def build_empty_model(config: Mapping[str, Any]) -> nn.Module:
    """The published transformer with parameters that have shapes only."""
    from diffusers import Cosmos3OmniTransformer

    with torch.device("meta"):
        model: nn.Module = Cosmos3OmniTransformer(**config)
    return model.eval()


def compute_dtypes(model: nn.Module, stored: Mapping[str, torch.dtype]) -> dict[str, torch.dtype]:
    """Type in which each parameter computes: as stored, except modules that the model keeps in fp32."""
    kept = tuple(getattr(model, "_keep_in_fp32_modules", None) or ())
    return {
        name: torch.float32 if any(k in name.split(".") for k in kept) else stored[name]
        for name, _ in model.named_parameters()
    }


def real_buffers(config: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Buffers that no checkpoint stores, from the stock constructor on a model without layers or vocabulary."""
    from diffusers import Cosmos3OmniTransformer

    shallow = {**config, "num_hidden_layers": 0, "vocab_size": 1, "num_embodiment_domains": 1}
    with torch.device("cpu"):
        return dict(Cosmos3OmniTransformer(**shallow).named_buffers())


def capture(
    config: Mapping[str, Any],
    sources: Mapping[str, WeightSource],
    *,
    modalities: Collection[str] | None = None,
) -> Program:
    """The joint denoising step of the model that ``config`` describes.

    ``sources`` gives the place and the type of each parameter; no weight is read. ``modalities`` defaults to all the
    model has; it must contain ``vision``. Raises UserError (CX210) for a modality that the checkpoint lacks.
    """
    available = available_modalities(config)
    wanted = available if modalities is None else tuple(m for m in MODALITIES if m in modalities)
    if modalities is not None and (set(modalities) - set(available) or "vision" not in modalities):
        raise UserError(
            "CX210",
            f"modalities {sorted(modalities)} asked for; this checkpoint generates {', '.join(available)}",
            "`vision` is always part of a step; leave --modalities out for all the checkpoint has",
        )
    if not config.get("unified_3d_mrope_reset_spatial_ids", True):
        raise UnsupportedError(
            "CX211",
            "this checkpoint does not restart spatial positions at generation "
            "(unified_3d_mrope_reset_spatial_ids: false)",
            "no published checkpoint is made so; please report it if yours is right",
        )
    model = build_empty_model(config)
    names = [name for name, _ in model.named_parameters()]
    missing = [n for n in names if n not in sources]
    if missing:
        raise InternalError("CX204", f"no source for {len(missing)} parameters, first `{missing[0]}`")
    model_dtype = sources["proj_in.weight"].dtype
    # A weight that is stored in FP8 is what its bytes and their scale stand for, in the type of the rest.
    stored = {n: sources[n].dtype if sources[n].scale is None else model_dtype for n in names}
    dtypes = compute_dtypes(model, stored)
    buffers = real_buffers(config)

    mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
    shapes = _input_shapes(config, wanted)
    dims = program_dims(config, wanted)
    with mode:
        for name, parameter in list(model.named_parameters()):
            owner, leaf = _owner(model, name)
            owner._parameters[leaf] = nn.Parameter(
                torch.empty(parameter.shape, dtype=dtypes[name], device="cpu"), requires_grad=False
            )
        for name, buffer in list(model.named_buffers()):
            owner, leaf = _owner(model, name)
            owner._buffers[leaf] = torch.empty(buffer.shape, dtype=buffer.dtype, device="cpu")
        example = {
            name: torch.zeros([_example_size(s) for s in shape], dtype=input_dtype(name, model_dtype))
            for name, shape in shapes.items()
        }
    exported = _export(JointStep(model), example, shapes, dims)
    bindings = {n: WeightBinding((sources[n],), Transform.IDENTITY, dtypes[n]) for n in names}
    graph = Importer(exported, "joint", shapes, bindings, buffers).run()
    outputs = {f"{m}_latent": f"{m}_velocity" for m in wanted}
    program = Program(
        graphs={"joint": graph},
        dims=dims,
        rates={name: _INPUT_RATES[name] for name in shapes},
        loop=Loop(body="joint", carried=outputs),
        history=["capture"],
    )
    graph.eliminate_dead_code()
    read = program.bound_keys()
    program.unused_keys = {name: "the denoising step does not read it" for name in names if name not in read}
    return program


def _owner(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, leaf = name.rpartition(".")
    return (model.get_submodule(path) if path else model), leaf


def _example_size(size: Size) -> int:
    return size if isinstance(size, int) else int(size.subs({symbol(k): v for k, v in _EXAMPLE.items()}))


def _export(
    step: JointStep, example: dict[str, torch.Tensor], shapes: Mapping[str, tuple[Size, ...]], dims: Mapping[str, Dim]
) -> torch.export.ExportedProgram:
    declared = {name: torch.export.Dim(name, min=max(d.min, 0), max=d.max) for name, d in dims.items()}
    # A composite size (⌈height/2⌉) is a dim of its own to the exporter; the importer gives it its meaning again.
    composite: dict[str, Any] = {}

    def dynamic(size: Size) -> Any:
        if isinstance(size, int):
            return torch.export.Dim.STATIC
        if size.is_Symbol:
            return declared[size.name]
        return composite.setdefault(str(size), torch.export.Dim(f"grid_{len(composite)}", min=2, max=512))

    dynamic_shapes = {name: {i: dynamic(s) for i, s in enumerate(shape)} for name, shape in shapes.items()}
    return exported(
        step,
        example,
        dynamic_shapes,
        # Equalities between inputs (every `frames` is the same number) become checks, not constraints to solve.
        prefer_deferred_runtime_asserts_over_guards=True,
    )
