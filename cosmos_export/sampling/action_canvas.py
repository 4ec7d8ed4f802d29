"""The canvas of an action: where what a robot sees is placed, by its size and the resolution tier.

Canvases are those of diffusers (``_ACTION_RESOLUTION_BINS``) and of NVIDIA's framework.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from cosmos_export.diagnostics import UserError

ACTION_BINS: Mapping[int, tuple[tuple[int, int], ...]] = {
    256: ((256, 256), (256, 320), (320, 256), (192, 320), (320, 192)),
    480: ((640, 640), (544, 736), (736, 544), (480, 832), (832, 480)),
    704: ((960, 960), (832, 1088), (1088, 832), (704, 1280), (1280, 704)),
    720: ((960, 960), (832, 1104), (1104, 832), (720, 1280), (1280, 720)),
}
"""(height, width) of the canvases of each resolution tier, in the order in which the first of equals is taken."""


@dataclass(frozen=True)
class ActionCanvas:
    """Where the frames of an action lie: ``content`` in the top left of ``height`` × ``width``, in pixels."""

    height: int
    width: int
    content_height: int
    content_width: int
    rounded: tuple[int, int]
    """Height and width of the source as it is first brought to multiples of what a latent stands for."""
    whole: bool = False
    """The source is not brought to such multiples, and stays in whole levels."""


def plan_action_canvas(height: int, width: int, tier: int, spatial: int = 16, *, whole: bool = False) -> ActionCanvas:
    """The canvas for a source of ``height`` × ``width`` pixels; ``spatial`` pixels are one latent.

    ``whole``: a source of a size that a policy was trained on is placed as NVIDIA's server of policies does it, which
    does not bring it to multiples of ``spatial`` as diffusers does. CX612: no such tier, or a source that is smaller
    than a latent.
    """
    if tier not in ACTION_BINS:
        raise UserError("CX612", f"resolution tier {tier}; known: {', '.join(map(str, ACTION_BINS))}")
    rows, columns = height - height % spatial, width - width % spatial
    if not rows or not columns:
        raise UserError("CX612", f"{width} × {height} pixels are too few for an action; at least {spatial} × {spatial}")
    if whole:
        rows, columns = height, width
    ratio = rows / columns
    canvas_height, canvas_width = min(ACTION_BINS[tier], key=lambda size: abs(size[0] / size[1] - ratio))
    scale = min(canvas_width / columns, canvas_height / rows, 1.0)
    return ActionCanvas(
        canvas_height,
        canvas_width,
        max(1, int(scale * rows + 0.5)),
        max(1, int(scale * columns + 0.5)),
        (rows, columns),
        whole,
    )
