"""`torch.export` of a module, for both front ends."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from cosmos_export.diagnostics import CosmosExportError, ToolError
from cosmos_export.machine.packages import other_releases


def exported(
    module: nn.Module, example: Mapping[str, Any], dynamic_shapes: Mapping[str, Any], **settings: Any
) -> torch.export.ExportedProgram:
    """``module`` on the keywords of ``example``. ToolError CX206 where another release of PyTorch or diffusers than
    capture is made for does not take it; with the right ones an error is the exporter's own."""
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # the exporter's own use of what it deprecates
            return torch.export.export(
                module, (), kwargs=dict(example), dynamic_shapes=dict(dynamic_shapes), strict=False, **settings
            )
    except (CosmosExportError, MemoryError):
        raise
    except Exception as error:  # another release may fail in any way
        others = other_releases("compile")
        if not others:
            raise
        said = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise ToolError(
            "CX206",
            f"the model cannot be captured with {', '.join(others)}: {said}",
            'in brackets: what capture is made for, and what `pip install ".[compile]"` in the checkout installs',
        ) from error
