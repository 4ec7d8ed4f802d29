"""Reads LoRA adapters in the layouts of PEFT, diffusers and kohya: which weights they change, and by what.

An adapter adds ``factor · B · A`` to a weight [out, in], with A [rank, in] and B [out, rank]. Every tensor in the file
is accounted for, and what is more than that sum is refused with its reason.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from cosmos_export import files, kinds
from cosmos_export.checkpoint.adapters import CONFIG
from cosmos_export.checkpoint.layout import WEIGHT_DTYPES, canonical_name
from cosmos_export.checkpoint.reader import Checkpoint
from cosmos_export.checkpoint.safetensors_header import Header, TensorEntry, read_header
from cosmos_export.checkpoint.strict_json import parse_object, read_object
from cosmos_export.diagnostics import UserError, shown

_WEIGHTS = ("adapter_model.safetensors", "pytorch_lora_weights.safetensors")
_PREFIXES = (
    "base_model.model.", "transformer.", "model.diffusion_model.", "diffusion_model.", "module.", "_orig_mod.", "net.",
    "lora_unet_", "lora_transformer_", "lycoris_",
)  # fmt: skip
_DOWN = re.compile(r"(?P<module>.+?)[._](lora_A|lora_down|lora\.down|lora_a)(\.[\w-]+)?\.weight")
_UP = re.compile(r"(?P<module>.+?)[._](lora_B|lora_up|lora\.up|lora_b)(\.[\w-]+)?\.weight")
_ALPHA = re.compile(r"(?P<module>.+?)(\.lora)?\.alpha")
_OTHER: tuple[tuple[re.Pattern[str], str], ...] = tuple(
    (re.compile(pattern), what)
    for pattern, what in (
        (r"dora_scale|lora_magnitude_vector|magnitude", "DoRA: it scales the columns of the sum of weight and adapter"),
        (r"hada_w|\.hada", "LoHa: a product of Hadamard factors"),
        (r"lokr_w|\.lokr", "LoKr: a Kronecker product"),
        (r"oft_|boft_", "OFT: it rotates the weight"),
        (r"\bia3_l|\.ia3_", "IA³: it scales activations"),
        (r"vera_lambda|randlora_", "VeRA or RandLoRA: their factors are shared by layers"),
        (r"lora_mid|lora_C|conv_", "an adapter of convolutions"),
        (r"lora_embedding_|lora_ga", "an adapter of an embedding"),
        (r"lora_(B|up)\S*\.bias$|\.diff_b$|\.bias$", "biases of layers: only weights are changed"),
        (r"\.diff$|modules_to_save|original_module", "whole weights of layers besides low-rank parts"),
        (r"^text_encoder|\.text_encoder\.|lora_te", "a part for a text encoder, which Cosmos 3 does not have"),
    )
)
_METHODS = {"LORA": ""}
_FLAGS: Mapping[str, str] = {
    "use_dora": "DoRA: it scales the columns of the sum of weight and adapter", "lora_bias": "biases of layers",
    "fan_in_fan_out": "weights that are stored transposed (fan_in_fan_out)", "use_qalora": "QALoRA",
    "use_bdlora": "block-diagonal LoRA", "alora_invocation_tokens": "aLoRA: it depends on the tokens of the prompt",
    "modules_to_save": "whole weights of layers (modules_to_save)",
    "trainable_token_indices": "rows of an embedding (trainable_token_indices)",
    "layer_replication": "layers that are repeated (layer_replication)", "target_parameters": "single parameters",
    "arrow_config": "Arrow: it chooses among adapters for each token",
}  # fmt: skip
"""Fields of a configuration that ask for more than the sum, where they are set."""
_CHANGED_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga", "orthogonal")
"""Beginnings of `init_lora_weights` that change the base weights as well."""


@dataclass(frozen=True)
class AdapterPart:
    """The change of one weight: ``factor · up · down``."""

    down: TensorEntry
    """[rank, in]."""
    up: TensorEntry
    """[out, rank]."""
    factor: float

    @property
    def rank(self) -> int:
        return self.down.shape[0]


@dataclass(frozen=True)
class Adapter:
    """An adapter that fits a checkpoint."""

    path: Path
    """Its weight file."""
    sha256: str
    scale: float
    parts: Mapping[str, AdapterPart]
    """By name of the weight in the model; ``scale`` is in their factors."""

    @property
    def ranks(self) -> tuple[int, ...]:
        """Each rank that it has, ascending."""
        return tuple(sorted({part.rank for part in self.parts.values()}))

    def __str__(self) -> str:
        ranks = ", ".join(map(str, self.ranks))
        return f"{self.path.name} × {self.scale:g}: {len(self.parts)} weights, rank {ranks}"


def read_adapter(text: str, checkpoint: Checkpoint) -> Adapter:
    """The adapter ``PATH[:SCALE]`` for ``checkpoint``. CX127: it is none; CX128: it is one of another kind or model."""
    path, scale = _split(text)
    file, config = _files(path)
    header = read_header(file)
    if config is None:
        config = _embedded(header, file)
    if config is not None:
        _require_plain(file, config)
    weights = {name: entry.shape for name, entry in checkpoint.tensors.items() if name.endswith(".weight")}
    found = _parts(file, header, config, weights, scale)
    _require_fits(file, found, checkpoint)
    with files.opened(file) as opened:
        digest = hashlib.file_digest(opened, "sha256").hexdigest()
    return Adapter(file, digest, scale, found)


def _split(text: str) -> tuple[Path, float]:
    """``PATH[:SCALE]``; a colon that no number follows belongs to the path."""
    path, colon, number = text.rpartition(":")
    if colon and path:
        try:
            scale = float(number)
        except ValueError:
            return Path(text), 1.0
        if not math.isfinite(scale):
            raise UserError(
                "CX127", f"adapter {text}: the scale {number} is not a finite number", "PATH:0.8, for example"
            )
        return Path(path), scale
    return Path(text), 1.0


def _files(path: Path) -> tuple[Path, dict[str, Any] | None]:
    """The weight file of the adapter at ``path``, and the configuration beside it where there is one."""
    if not path.exists():
        _no_adapter(f"{path} does not exist", "give the file or the folder of the adapter: --adapter PATH[:SCALE]")
    if not path.is_dir():
        if path.name == CONFIG:
            return _files(path.parent)
        if path.suffix.lower() != ".safetensors":
            kind = kinds.of_file(path)
            what = "not a .safetensors file" if kind is None else kind.what
            hint = "write the adapter as safetensors" if kind is None else kind.hint
            _no_adapter(f"{path} is {what}", hint)
        beside = path.with_name(CONFIG)
        return path, read_object(beside) if beside.is_file() and path.name == _WEIGHTS[0] else None
    known = [path / name for name in _WEIGHTS if (path / name).is_file()]
    found = known or sorted(path.glob("*.safetensors"))
    if len(found) != 1:
        kind = kinds.of_folder(path)
        if not found:
            pickled = sorted(file.name for file in path.glob("adapter_model.*"))
            what = f"it has {pickled[0]}, which is never opened" if pickled else "it has no .safetensors file"
            if kind is not None and not pickled:
                what += f"; it is {kind.what}"
            _no_adapter(f"{path}: {what}", "save the adapter with safe_serialization=True")
        _no_adapter(f"{path} has {len(found)} .safetensors files", f"name one of them, such as {found[0]}")
    config = path / CONFIG
    return found[0], read_object(config) if config.is_file() else None


def _embedded(header: Header, file: Path) -> dict[str, Any] | None:
    """The configuration that diffusers writes into the header of the file."""
    text = header.metadata.get("lora_adapter_metadata")
    if text is None:
        return None
    try:
        found = parse_object(text.encode())
    except ValueError as error:
        _no_adapter(f"{file}: lora_adapter_metadata in its header is not JSON: {error}", "save the adapter again")
    return {key.removeprefix("transformer."): value for key, value in found.items()}


def _require_plain(file: Path, config: Mapping[str, Any]) -> None:
    """CX128 where ``config`` asks for more than the sum of a weight and a product of low rank."""
    method = config.get("peft_type", "LORA")
    if method not in _METHODS:
        _refuse(file, f"its peft_type is {shown(method)}")
    for field, what in _FLAGS.items():
        if config.get(field) not in (None, False, [], {}):
            _refuse(file, f"it has {what}")
    if config.get("bias", "none") != "none":
        _refuse(file, f"it changes biases (bias = {shown(config['bias'])})")
    start = str(config.get("init_lora_weights", "")).lower()
    if start.startswith(_CHANGED_BASE):
        _refuse(
            file,
            f"it was started by {start}, which changes the base weights too",
            "convert it with PEFT: save_pretrained(…, path_initial_model_for_weight_conversion=…)",
        )


def _parts(
    file: Path,
    header: Header,
    config: Mapping[str, Any] | None,
    weights: Mapping[str, tuple[int, ...]],
    scale: float,
) -> dict[str, AdapterPart]:
    downs: dict[str, TensorEntry] = {}
    ups: dict[str, TensorEntry] = {}
    alphas: dict[str, float] = {}
    names = _Names(weights)
    for name, entry in header.tensors.items():
        if (match := _DOWN.fullmatch(name)) is not None:
            names.put(file, downs, match["module"], entry)
        elif (match := _UP.fullmatch(name)) is not None:
            names.put(file, ups, match["module"], entry)
        elif (match := _ALPHA.fullmatch(name)) is not None and entry.elements == 1:
            alphas[names.weight(file, match["module"])] = float(entry.array().reshape(()))
        else:
            what = next((what for pattern, what in _OTHER if pattern.search(name)), None)
            if what is None:
                _no_adapter(f"{file} has {shown(name)}, which is no part of a LoRA", "give the file of a LoRA adapter")
            _refuse(file, f"{shown(name)} is of {what}")
    if not downs:
        _no_adapter(f"{file} has no tensors of an adapter", "give the file of a LoRA adapter")
    if downs.keys() != ups.keys():
        name = sorted(downs.keys() ^ ups.keys())[0]
        _no_adapter(f"{file} has one half of the change of {name}", "download it again")
    found = {}
    for name, down in downs.items():
        up, shape = ups[name], weights[name]
        fits = len(down.shape) == len(up.shape) == len(shape) == 2 and down.shape[0] == up.shape[1]
        if not fits or (up.shape[0], down.shape[1]) != shape or not down.shape[0]:
            _refuse(
                file,
                f"{name} is {list(shape)}; the adapter has A {list(down.shape)} and B {list(up.shape)}",
                "it was trained on another model: give the checkpoint that it is for",
            )
        found[name] = AdapterPart(down, up, scale * _factor(file, name, down.shape[0], alphas.get(name), config))
    return dict(sorted(found.items()))


class _Names:
    """Names of modules in an adapter as the weights of the model."""

    def __init__(self, weights: Mapping[str, tuple[int, ...]]) -> None:
        self._weights = weights
        self._joined = {name.removesuffix(".weight").replace(".", "_"): name for name in weights}

    def weight(self, file: Path, module: str) -> str:
        """The weight of ``module``; CX128 where the model has none."""
        name = self._stripped(module)
        if name is None:
            what = next((what for pattern, what in _OTHER if pattern.search(module)), None)
            if what is not None:
                _refuse(file, f"{shown(module)} is of {what}")
            _refuse(
                file,
                f"it changes {shown(module)}, which the model does not have",
                "it was trained on another model: give the checkpoint that it is for",
            )
        return name

    def _stripped(self, module: str) -> str | None:
        """The weight of ``module`` without what libraries put before its name."""
        before = None
        while before != module:
            before = module
            if (name := self._known(module)) is not None:
                return name
            for prefix in _PREFIXES:
                module = module.removeprefix(prefix)
        return None

    def put(self, file: Path, into: dict[str, TensorEntry], module: str, entry: TensorEntry) -> None:
        name = self.weight(file, module)
        if name in into:
            _no_adapter(f"{file} changes {name} twice: {into[name].name} and {entry.name}", "give one adapter per file")
        into[name] = entry

    def _known(self, module: str) -> str | None:
        for name in (f"{module}.weight", canonical_name(f"{module}.weight"), self._joined.get(module)):
            if name in self._weights:
                return name
        return None


def _factor(file: Path, name: str, rank: int, alpha: float | None, config: Mapping[str, Any] | None) -> float:
    """alpha / rank, with a stabilised rank alpha / √rank; without an alpha anywhere, 1, as diffusers reads it."""
    root = False
    if config is not None:
        module = name.removesuffix(".weight")
        stated = _of_pattern(config.get("rank_pattern"), module, config.get("r", rank))
        if stated != rank:
            _no_adapter(f"{file}: {name} has rank {rank}, its configuration says {shown(stated)}", "correct the files")
        if alpha is None and "lora_alpha" in config:
            alpha = _of_pattern(config.get("alpha_pattern"), module, config["lora_alpha"])
        root = bool(config.get("use_rslora"))
    if alpha is None:
        return 1.0
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not math.isfinite(alpha):
        _no_adapter(f"{file}: the alpha of {name} is {shown(alpha)}", "correct the files")
    return alpha / (math.sqrt(rank) if root else rank)


def _of_pattern(patterns: object, module: str, otherwise: Any) -> Any:
    """The value of the pattern that ``module`` ends in, as PEFT looks it up; ``otherwise`` where there is none.

    Patterns are compared as text: an expression of a stranger may take for ever.
    """
    for key, value in patterns.items() if isinstance(patterns, dict) else ():
        plain = str(key).removeprefix("^").removesuffix("$").replace("\\.", ".").removeprefix(".*").lstrip(".")
        for prefix in _PREFIXES:
            plain = plain.removeprefix(prefix)
        if re.search(r"[\\*+?\[\](){}|^$]", plain):
            raise UserError(
                "CX128", f"its configuration has the expression {shown(key)} for modules", "write names of modules"
            )
        if module == plain or module.endswith(f".{plain}"):
            return value
    return otherwise


def _require_fits(file: Path, parts: Mapping[str, AdapterPart], checkpoint: Checkpoint) -> None:
    for name, part in parts.items():
        base = checkpoint.tensors[name]
        if base.dtype not in WEIGHT_DTYPES:
            _refuse(
                file,
                f"{name} of the checkpoint is quantized ({base.dtype}), and an adapter is added before that",
                "give the BF16 checkpoint: `quantize --adapter` and `build --adapter --recipe` quantize the sum",
            )
        for entry in (part.down, part.up):
            if entry.dtype not in WEIGHT_DTYPES:
                _refuse(file, f"{entry.name} has the type {entry.dtype}; allowed: {', '.join(WEIGHT_DTYPES)}")
            if not np.isfinite(entry.array().astype(np.float32)).all():
                _no_adapter(f"{file}: {entry.name} has NaN or infinite values", "the adapter is broken: train it again")


def describe_adapters(adapters: tuple[Adapter, ...]) -> tuple[str, ...]:
    """The lineage of ``adapters`` as a manifest has it: one JSON object for each."""
    return tuple(
        json.dumps(
            {
                "name": one.path.name, "sha256": one.sha256, "scale": one.scale, "ranks": list(one.ranks),
                "weights": len(one.parts),
            },
            sort_keys=True,
        )
        for one in adapters
    )  # fmt: skip


def _no_adapter(what: str, hint: str) -> NoReturn:
    raise UserError("CX127", what, hint)


def _refuse(file: Path, what: str, hint: str = "") -> NoReturn:
    raise UserError(
        "CX128",
        f"{file} cannot be folded into the weights: {what}",
        hint or "merge it into a checkpoint with the library that trained it, and build that",
    )
