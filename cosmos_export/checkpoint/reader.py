"""Opens a checkpoint directory: everything cheap is checked before anything is built on it.

After ``open_checkpoint`` returns, each tensor of the model is in one known place with the right shape and a known type,
and every other tensor in the files has a stated reason to be there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, NoReturn

from cosmos_export import kinds
from cosmos_export.checkpoint import pipeline_config, scheduler_config, variants
from cosmos_export.checkpoint.adapters import find_adapters
from cosmos_export.checkpoint.codec_configs import read_codec_configs
from cosmos_export.checkpoint.geometry import Geometry, parse_geometry
from cosmos_export.checkpoint.hub import local_checkpoint
from cosmos_export.checkpoint.layout import ExpectedTensor, expected_tensors
from cosmos_export.checkpoint.mapping import map_tensors
from cosmos_export.checkpoint.policy import read_policy
from cosmos_export.checkpoint.published import published_size
from cosmos_export.checkpoint.quantization import Quantization, parse_quantization
from cosmos_export.checkpoint.safetensors_header import TensorEntry
from cosmos_export.checkpoint.shards import Shards, read_shards
from cosmos_export.checkpoint.strict_json import optional_object, read_object, require_file, require_itself
from cosmos_export.diagnostics import UserError, shown
from cosmos_export.stamps import Inputs, unchanged

WEIGHT_STEMS: Mapping[str, str] = {
    "transformer": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
    "sound_tokenizer": "diffusion_pytorch_model",
    "vision_encoder": "model",
}
"""Components with weights, and what their weight files are called."""
COMPONENTS = (*WEIGHT_STEMS, "scheduler", "text_tokenizer")
_INPUT_SUFFIXES = (".json", ".jinja", ".txt", ".model")
_READ_SUFFIXES = (*_INPUT_SUFFIXES, ".safetensors")


@dataclass(frozen=True)
class Checkpoint:
    """A checked checkpoint. Nothing of it is in memory but names, shapes and places."""

    root: Path
    variant: str
    origin: variants.Origin
    geometry: Geometry
    tensors: Mapping[str, TensorEntry]
    """Transformer tensors by diffusers' name, and beside each quantized weight its scales."""
    expected: Mapping[str, ExpectedTensor]
    unused: tuple[tuple[str, str], ...]
    """Every other tensor in the shards, and why it is not needed."""
    ignored_files: tuple[tuple[Path, str], ...]
    """Files in component folders that are not read, and why."""
    scheduler: Mapping[str, Any]
    model_index: Mapping[str, Any]
    components: Mapping[str, Path]
    component_tensors: Mapping[str, Mapping[str, TensorEntry]]
    """Tensors of the other components under the names in their files."""
    codec_configs: Mapping[str, Mapping[str, Any]]
    """Checked configurations of the codec folders there are, complete with the library's defaults."""
    precision: str
    """``fp8-modelopt`` where it is quantized, otherwise ``dtype``."""
    dtype: str
    """Type of what is not quantized: ``bf16``, ``fp32``, ``fp16`` or ``mixed``. The time embedder may be wider."""
    quantization: Quantization | None
    distilled_sigmas: tuple[float, ...] | None
    policy: Mapping[str, Any] | None
    """The policy as checkpoint.json has it; `read_policy` says what it means."""
    max_position: int
    """Positions that the reasoner is trained for."""
    input_files: tuple[Path, ...]
    inputs: Inputs
    """The input files as they were when the checkpoint was opened."""
    adapters: tuple[Path, ...] = ()
    """Files of adapters in its folders: `require_no_adapters` refuses to leave them out unasked."""
    folded: tuple[str, ...] = ()
    """Adapters that its tensors have in them: one JSON object for each, for the manifest."""
    folded_files: tuple[Path, ...] = ()
    """Their files."""
    notes: tuple[str, ...] = ()
    """Changes of its tensors since they were read, in words."""
    scratch: tuple[object, ...] = ()
    """Keep the files of tensors that were made of it for as long as it is used."""

    def __repr__(self) -> str:
        return f"Checkpoint({str(self.root)!r}, {self.variant}, {self.precision}, {len(self.tensors)} tensors)"

    def files(self) -> tuple[Path, ...]:
        """Every input file, sorted; links are not resolved, so that paths stay relative to ``root``."""
        return self.input_files

    def weight_files(self) -> tuple[Path, ...]:
        """The transformer's files of tensors, as they were opened."""
        folder = self.components["transformer"]
        return tuple(path for path in self.input_files if path.parent == folder and path.suffix == ".safetensors")


def open_checkpoint(path: Path | str) -> Checkpoint:
    """Reads and checks the directory ``path``, or the one in the Hugging Face cache that it names.

    Raises ``UserError`` CX1xx with what to do.
    """
    root = Path(path)
    try:
        root = local_checkpoint(root)
        _require_checkpoint(root)
        found = _as_they_are(root)
        with unchanged("its opening", found):
            return _read(root, found)
    except OSError as error:  # a directory that may not be listed, a name that is too long, a disk that fails
        raise UserError(
            "CX105",
            f"cannot read {error.filename or root}: {error.strerror or error}",
            "check the path and permissions",
        ) from error


def _read(root: Path, inputs: Inputs) -> Checkpoint:
    model_index = pipeline_config.read_pipeline(root)
    components = _components(root, model_index)
    config = read_object(components["transformer"] / "config.json")
    geometry = parse_geometry(config)
    quantization = parse_quantization(config)
    scheduler = scheduler_config.read_scheduler(components["scheduler"])
    sigmas = scheduler_config.distilled_sigmas(root, scheduler)
    policy = _policy(root)
    codecs = read_codec_configs(components)
    shards = {name: read_shards(components[name], stem) for name, stem in WEIGHT_STEMS.items() if name in components}
    expected = expected_tensors(geometry)
    mapped = map_tensors(shards["transformer"].tensors(), expected, geometry, quantization)
    origin = variants.origin(root)
    traits = variants.Traits(
        size=published_size(geometry),
        base_fps=geometry.base_fps,
        steps=None if sigmas is None else len(sigmas),
        policy=None if policy is None else str(policy.get("domain_name", "custom")),
    )
    return Checkpoint(
        root=root,
        variant=variants.variant_name(root, origin, traits),
        origin=origin,
        geometry=geometry,
        tensors=MappingProxyType(mapped.tensors),
        expected=MappingProxyType(expected),
        unused=tuple(sorted(mapped.unused.items())),
        ignored_files=tuple(item for shard in shards.values() for item in shard.ignored),
        scheduler=MappingProxyType(scheduler),
        model_index=MappingProxyType(model_index),
        components=MappingProxyType(components),
        component_tensors=MappingProxyType(
            {name: _by_name(shard) for name, shard in shards.items() if name != "transformer"}
        ),
        codec_configs=codecs,
        precision=mapped.precision,
        dtype=mapped.dtype,
        quantization=quantization,
        distilled_sigmas=sigmas,
        policy=policy,
        max_position=pipeline_config.max_position(root, config, geometry.family.facts.max_position),
        input_files=_input_files(root, components, shards),
        inputs=inputs,
        adapters=find_adapters(root, {header.file for shard in shards.values() for header in shard.headers}),
    )


def _as_they_are(root: Path) -> Inputs:
    """Every file that a component may be read from, before any is. Files at the root that appear later are not read."""
    at_root = (path for path in root.iterdir() if path.suffix in _READ_SUFFIXES and path.is_file())
    folders = [root / name for name in COMPONENTS if (root / name).is_dir()]
    return Inputs("the checkpoint", at_root, folders, lambda path: path.suffix in _READ_SUFFIXES)


def _require_checkpoint(root: Path) -> None:
    if not root.exists():
        _not_a_checkpoint(f"{root} is a link that leads nowhere", "give the path of a local checkpoint")
    if not root.is_dir():
        kind = kinds.of_file(root)
        what, hint = ("", "") if kind is None else (f": it is {kind.what}", f"; {kind.hint}")
        _not_a_checkpoint(
            f"{root} is not a directory{what}", f"give the directory that contains model_index.json{hint}"
        )
    if (root / "transformer").is_dir():
        return
    pipeline_config.read_pipeline(root)
    found = kinds.of_folder(root)
    if found is not None:
        _not_a_checkpoint(f"{root} is {found.what}, not a Cosmos 3 checkpoint", found.hint)
    hint = "give the directory that contains model_index.json and transformer/"
    _not_a_checkpoint(f"{root} is not a Cosmos 3 checkpoint: it has no transformer/ folder", hint)


def _components(root: Path, model_index: Mapping[str, Any]) -> dict[str, Path]:
    components = {name: root / name for name in COMPONENTS if (root / name).is_dir()}
    for name, value in model_index.items():
        wanted = isinstance(value, list) and len(value) >= 2 and value[0] is not None and value[1] is not None
        if wanted and name in COMPONENTS and name not in components:
            raise UserError(
                "CX102",
                f"{root} has no {name}/ folder, which its model index lists as {shown(value[1])}",
                "the download is incomplete: run it again",
            )
    if "scheduler" not in components:
        raise UserError("CX102", f"{root} has no scheduler/ folder", "the download is incomplete: run it again")
    return components


def _policy(root: Path) -> Mapping[str, Any] | None:
    policy = (optional_object(root / "checkpoint.json") or {}).get("policy")
    if policy is not None and not isinstance(policy, dict):
        raise UserError("CX103", f"checkpoint.json: policy = {shown(policy)} is not an object", "restore the file")
    read_policy(policy)
    return None if policy is None else MappingProxyType(policy)


def _by_name(shards: Shards) -> Mapping[str, TensorEntry]:
    return MappingProxyType({entry.name: entry for entry in shards.tensors()})


def _input_files(root: Path, components: Mapping[str, Path], shards: Mapping[str, Shards]) -> tuple[Path, ...]:
    found = {
        path
        for folder in (root, *components.values())
        for path in folder.iterdir()
        if path.suffix in _INPUT_SUFFIXES and not path.is_dir()
    }
    for path in sorted(found):
        require_file(path)  # libraries open some of these by themselves, and would wait for a pipe
        if path.parent != root:
            require_itself(path)
    for shard in shards.values():
        found |= {header.file for header in shard.headers}
    return tuple(sorted(found))


def _not_a_checkpoint(what: str, hint: str) -> NoReturn:
    raise UserError("CX105", what, hint)
