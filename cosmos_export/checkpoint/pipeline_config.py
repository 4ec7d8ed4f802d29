"""Settings in the files beside the components: the pipeline's switches, and how far positions go."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cosmos_export.checkpoint.config_fields import Fields, Flag, Integer, Nullable, checked
from cosmos_export.checkpoint.strict_json import optional_object
from cosmos_export.diagnostics import UserError, shown

_PIPELINE: Fields = {"use_native_flow_schedule": Flag(False), "default_use_system_prompt": Flag(True)}
_POSITIONS = Nullable(None, Integer(None, 1, 2**31 - 1))


def read_pipeline(root: Path) -> dict[str, Any]:
    """``model_index.json``, or the modular one where it is not there; CX103 for a switch that is none."""
    for name in ("model_index.json", "modular_model_index.json"):
        index = optional_object(root / name)
        if index:
            checked(index, _PIPELINE, root / name)
            _require_class(index.get("_class_name"), root / name)
            return index
    return {}


def _require_class(found: object, path: Path) -> None:
    """CX104 where ``path`` is the index of another model's pipeline."""
    if found is not None and not (isinstance(found, str) and "cosmos3" in found.lower()):
        raise UserError(
            "CX104",
            f"{path} is of the pipeline {shown(found)}, which is another model",
            "give a checkpoint of Cosmos 3, whose pipeline is Cosmos3OmniPipeline: `hf download nvidia/Cosmos3-Nano "
            "--local-dir Cosmos3-Nano`",
        )


def max_position(root: Path, config: Mapping[str, Any], default: int) -> int:
    """The number of positions that the reasoner is trained for: ``config``'s, or the root configuration's, or
    ``default``."""
    fields: Fields = {"max_position_embeddings": _POSITIONS}
    stated = checked(config, fields, "transformer/config.json")["max_position_embeddings"]
    text = (optional_object(root / "config.json") or {}).get("text_config")
    if isinstance(text, dict):
        of_text = checked(text, fields, root / "config.json")["max_position_embeddings"]
        stated = of_text if stated is None else stated
    return default if stated is None else int(stated)
