"""Writes a checkpoint with random weights that everything else accepts as a Cosmos 3 checkpoint.

It is what makes the whole compiler testable without a download, on a laptop, in seconds; at true width it is what makes
engines of the real cost. The same options and seed give the same bytes. Tensors are generated one piece at a time, so
a checkpoint of any size is written in little memory, and the directory appears only when it is complete.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

from cosmos_export.checkpoint import demo_components as components
from cosmos_export.checkpoint import random_weights
from cosmos_export.checkpoint.geometry import Geometry
from cosmos_export.checkpoint.layout import ExpectedTensor, Tower, expected_tensors
from cosmos_export.checkpoint.output import give_back, new_directory, require_space
from cosmos_export.checkpoint.published import PUBLISHED
from cosmos_export.checkpoint.safetensors_writer import TensorHeader, write_json, write_shards
from cosmos_export.diagnostics import UnsupportedError, UserError
from cosmos_export.family import Family
from cosmos_export.progress import Progress, Silent
from cosmos_export.verb_options import DemoOptions

VARIANTS = tuple(family.value for family in Family)
DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
TINY = {
    "num_hidden_layers": 3, "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32,
    "intermediate_size": 96, "vocab_size": 512, "latent_channel": 4,
}  # fmt: skip
_TINY_SOUND = 8
_TRUE_WIDTH_LAYERS = 2
_SPARE_BYTES = 4 << 20
"""Room for configurations and the tokenizer."""


def demo_geometry(options: DemoOptions) -> Geometry:
    """The transformer that ``options`` describe. UserError CX132 for one that cannot be."""
    variant = _variant(options)
    if variant not in VARIANTS:
        _refuse(f"variant {variant!r} is not one of {', '.join(VARIANTS)}")
    if options.dtype is not None and options.dtype not in DTYPES:
        _refuse(f"dtype {options.dtype!r} is not one of {', '.join(DTYPES)}")
    if options.like is not None and options.true_width is not None:
        _refuse("like and true width are both given; like has the widths too")
    for what, size in (("true width", options.true_width), ("like", options.like)):
        if size is not None and size not in PUBLISHED:
            _refuse(f"{what} {size!r} is not one of {', '.join(PUBLISHED)}")
    if options.use_state is not None and options.policy is None:
        _refuse("whether a policy is given the robot's state, and no policy")
    if options.distilled and options.policy is not None:
        _refuse("a distilled policy, which is not published")
    if options.shard_size <= 0:
        _refuse(f"shard size {options.shard_size} is not positive")
    base = _preset(options, variant)
    if base.family != variant:
        _refuse(f"the width of {options.like or options.true_width} belongs to variant {base.family}, not {variant}")
    chosen = {
        "num_hidden_layers": options.layers, "hidden_size": options.hidden, "num_attention_heads": options.heads,
        "num_key_value_heads": options.kv_heads, "head_dim": options.head_dim,
        "intermediate_size": options.intermediate, "vocab_size": options.vocab,
        "latent_channel": options.latent_channels, "action_dim": options.action_dim,
        "num_embodiment_domains": options.domains, "sound_dim": options.sound_dim,
    }  # fmt: skip
    changes: dict[str, Any] = {name: value for name, value in chosen.items() if value is not None}
    if options.sound_dim is not None and not base.sound_gen:
        _refuse(f"variant {variant} has no sound")
    vocab = changes.get("vocab_size", base.vocab_size)
    if vocab < components.MIN_VOCAB:
        _refuse(f"a vocabulary of {vocab} cannot hold the tokenizer's {components.MIN_VOCAB} tokens")
    try:
        return _derived(base, changes)
    except UserError as error:
        _refuse(error.message.removeprefix("transformer/config.json: "))


def _stored(options: DemoOptions) -> str:
    """The type of the weights, as the files name it."""
    return DTYPES[options.dtype or ("float32" if options.like is None else "bfloat16")]


def _variant(options: DemoOptions) -> str:
    size = PUBLISHED.get(options.like or options.true_width or "")
    return options.variant or (Family.OMNI if size is None else size.family)


def _preset(options: DemoOptions, variant: str) -> Geometry:
    if options.like is not None:
        return PUBLISHED[options.like]
    if options.true_width is not None:
        return replace(PUBLISHED[options.true_width], num_hidden_layers=_TRUE_WIDTH_LAYERS)
    family = PUBLISHED[Family(variant).facts.preset]
    return _derived(family, TINY | ({"sound_dim": _TINY_SOUND} if family.sound_gen else {}))


def _derived(base: Geometry, changes: dict[str, Any]) -> Geometry:
    """``base`` with ``changes`` and with what follows from them: patch width, and rotary sections in 6 : 5 : 5."""
    channels = changes.get("latent_channel", base.latent_channel)
    half = changes.get("head_dim", base.head_dim) // 2
    space = half * 5 // 16
    return replace(
        base,
        **changes,
        patch_latent_dim=channels * base.latent_patch_size**2,
        rope_axes_dim=(half - 2 * space, space, space),
    )


def write_demo_checkpoint(
    output: Path, variant: str | None = None, *, force: bool = False, progress: Progress | None = None, **options: Any
) -> Path:
    """Write the checkpoint directory ``output`` and return it. ``options`` are the other fields of `DemoOptions`; the
    errors are those of `write_demo`."""
    return write_demo(DemoOptions(output, variant, force=force, **options), progress)


def write_demo(options: DemoOptions, progress: Progress | None = None) -> Path:
    """Write the checkpoint directory ``options.output`` and return it.

    CX130: it exists; CX131: no room; CX132: an option; CX802: torch or diffusers is not installed.
    """
    geometry, dtype, true_size = demo_geometry(options), _stored(options), options.like is not None
    output, force = options.output, options.force
    _check_output(output, force)
    _require_libraries()
    expected = expected_tensors(geometry)
    config, vision = components.reasoner(geometry, dtype, true_size)
    parts = [
        components.DemoComponent(
            "transformer",
            "diffusion_pytorch_model",
            components.transformer_config(geometry),
            tuple(TensorHeader(tensor.name, dtype, tensor.shape) for tensor in expected.values()),
        ),
        components.vae(geometry, dtype, true_size),
        *([components.sound_tokenizer(geometry, dtype, true_size)] if geometry.sound_gen else []),
        vision,
    ]
    size = 0 if options.sparse else sum(spec.size_bytes for part in parts for spec in part.tensors)
    hint = "--sparse, fewer --layers, --dtype bfloat16, or another disk"
    require_space(output, size + _SPARE_BYTES, "CX131", "the checkpoint", hint)
    with new_directory(output, force) as folder:
        weight_maps = {part.folder: _write_component(folder, part, geometry, options, progress) for part in parts}
        write_json(folder / "model_index.json", components.model_index(geometry))
        (folder / "scheduler").mkdir()
        if options.distilled:
            write_json(folder / "scheduler" / "scheduler_config.json", components.DISTILLED_SCHEDULER)
            write_json(folder / "modular_model_index.json", components.DISTILLED_INDEX)
        else:
            write_json(folder / "scheduler" / "scheduler_config.json", components.scheduler_config(geometry))
        if options.policy is not None:
            said = {} if options.use_state is None else {"use_state": options.use_state}
            write_json(folder / "checkpoint.json", {"policy": {"domain_name": options.policy, **said}})
        components.write_tokenizer(folder / "text_tokenizer")
        write_json(folder / "config.json", config)
        write_json(folder / "model.safetensors.index.json", _root_index(weight_maps, parts, expected, geometry))
    return output


def _write_component(
    root: Path, part: components.DemoComponent, geometry: Geometry, options: DemoOptions, progress: Progress | None
) -> dict[str, str]:
    folder, report = root / part.folder, progress or Silent()
    folder.mkdir()
    if part.config is not None:
        write_json(folder / "config.json", part.config)
    written = 0

    def on_bytes(size: int) -> None:
        nonlocal written
        written += size
        report.update(part.folder, written)

    report.begin(part.folder, sum(spec.size_bytes for spec in part.tensors))
    produce = random_weights.produce(options.seed, hidden_sums(geometry), on_bytes)
    if options.sparse:
        produce = random_weights.produce_heads(options.seed)
    weight_map = write_shards(folder, part.stem, part.tensors, produce, options.shard_size, sparse=options.sparse)
    report.end(part.folder)
    return {name: f"{part.folder}/{file}" for name, file in weight_map.items()}


_BRANCH_ENDS = (".to_out.weight", ".to_add_out.weight", ".down_proj.weight")
"""The last linear of each residual branch."""


def hidden_sums(geometry: Geometry) -> dict[str, int]:
    """How many products a result sums, for the weights of the transformer whose shape does not show it.

    The weight of a domain-aware layer is a matrix flattened into a row. And what ends a branch is added to the stream,
    which is the sum of 2·layers branches: its deviation is 1/√(2·layers·K), the initialization of GPT-2 and Megatron,
    with which the stream is as large behind the layers as before them. With 1/√K each branch would be as large as the
    stream itself, as in no network that was trained or is about to be, and whatever a linear loses by quantization
    would come out of the model in full.
    """
    sums = {"action_proj_in.fc.weight": geometry.action_dim or 1, "action_proj_out.fc.weight": geometry.hidden_size}
    for name, tensor in expected_tensors(geometry).items():
        if name.endswith(_BRANCH_ENDS):
            sums[name] = 2 * geometry.num_hidden_layers * tensor.shape[1]
    return sums


def _root_index(
    weight_maps: dict[str, dict[str, str]],
    parts: list[components.DemoComponent],
    expected: dict[str, ExpectedTensor],
    geometry: Geometry,
) -> dict[str, Any]:
    """The index from which transformers reads the reasoner."""
    weight_map = weight_maps["transformer"] | weight_maps["vision_encoder"]
    if not geometry.family.facts.root_lists_generator:
        generator = {tensor.name for tensor in expected.values() if tensor.tower is Tower.GENERATOR}
        weight_map = {name: file for name, file in weight_map.items() if name not in generator}
    sizes = {spec.name: spec.size_bytes for part in parts for spec in part.tensors}
    total = sum(sizes[name] for name in weight_map)
    return {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}


def _check_output(output: Path, force: bool) -> None:
    give_back(output)
    if not output.exists() and not output.is_symlink():
        return
    if not force:
        raise UserError("CX130", f"{output} exists", "choose another directory, or --force to replace it")
    replaceable = output.is_dir() and not output.is_symlink()
    if not replaceable or not ((output / "model_index.json").is_file() or not any(output.iterdir())):
        raise UserError("CX130", f"{output} exists and is not a checkpoint directory", "choose another directory")


def _require_libraries() -> None:
    try:
        import diffusers  # noqa: F401
        import torch  # noqa: F401
        import transformers  # noqa: F401
    except ImportError as error:
        raise UnsupportedError(
            "CX802", f"a demo checkpoint needs {error.name}", "pip install '.[compile]' in the checkout"
        ) from error


def _refuse(what: str) -> NoReturn:
    raise UserError("CX132", what, "see cosmos-export demo-checkpoint --help")
