"""The robots that are known when a bundle is built: a row of data for each, which goes into the bundle.

Ids, widths and tiers are those of diffusers (``pipeline_cosmos3_omni.py``), ids above 20 those of vLLM-Omni; chunk and
rate are TensorRT-LLM's (``visual_gen`` defaults). Nothing that runs a bundle reads this table.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from cosmos_export.bundle.embodiment import (
    PLAIN_VIEWS,
    ColumnGroup,
    Embodiment,
    Views,
    choose_embodiment,
    known_embodiment,
)

_TABLE = (
    Embodiment("av", 1, 9, chunk=60),
    Embodiment("camera_pose", 2, 9, chunk=60, fps=30.0),
    Embodiment("hand_pose", 3, 57, fps=24.0),
    Embodiment("pusht", 4, 2, tier=256),
    Embodiment("libero", 5, None, tier=256),
    Embodiment("umi", 6, 10, poses=True),
    Embodiment("bridge_orig_lerobot", 7, 10, fps=5.0, poses=True),
    Embodiment("droid_lerobot", 8, 10, fps=15.0, poses=True),
    Embodiment("robomind-franka", 8, 10, poses=True),
    Embodiment("galbot", 9, 30),
    Embodiment("robomind-franka-dual", 12, 20),
    Embodiment("robomind-ur", 13, 10, poses=True),
    Embodiment("agibotworld", 15, 29),
    Embodiment("agibot_gear_gripper", 15, 29),
    Embodiment("agibot_gear_gripper_ext", 15, 29),
    Embodiment("xdof_yam", 16, None),
    Embodiment("fractal", 20, 10, fps=5.0, poses=True),
    Embodiment("drawanything", 21, None),
    Embodiment("behavior1k", 22, None),
    Embodiment("maniparena", 23, None),
)
EMBODIMENTS: Mapping[str, Embodiment] = {embodiment.name: embodiment for embodiment in _TABLE}

_POLICIES: Mapping[str, Embodiment] = {
    # NVIDIA's server (cosmos-framework, action_policy_server_robolab): seven joint positions and the gripper, where the
    # base model has an end effector's pose; chunk 32 at 15 frames per second; names, composition and size of the
    # cameras; the state as the first row; the gripper as 1 − what the robot says; no statistics.
    "droid": Embodiment(
        "droid_lerobot",
        8,
        8,
        chunk=32,
        fps=15.0,
        rated=True,
        parts=(
            ColumnGroup("joint_position", 7, "rad"),
            ColumnGroup("gripper_position", 1, "1 is closed", mirrored=True),
        ),
        views=Views(
            cameras=("wrist_image_left", "exterior_image_1_left", "exterior_image_2_left"),
            short=("wrist", "left", "right"),
            layout="wrist over two",
            size=(540, 640),
            viewpoint="wrist_over_two_view",
        ),
        history=1,
        normalization="none",
    ),
    # cosmos-framework's data set and evaluation of LIBERO: both cameras at 256 × 256, side by side.
    "libero": replace(
        EMBODIMENTS["libero"],
        views=Views(
            cameras=("image", "wrist_image"),
            short=("front", "wrist"),
            whole="composed",
            layout="side by side",
            size=(256, 512),
            viewpoint="third_person_beside_wrist_view",
        ),
    ),
}
"""Policy checkpoints whose actions differ from their embodiment's, by the first part of their domain's name."""

ROBOT_TYPES: Mapping[str, str] = dict.fromkeys(("droid", "franka", "panda"), "droid_lerobot")
"""Names of robots in data sets, in small letters, and the embodiment of each. Franka's arm is one domain."""


@dataclass(frozen=True)
class PoseColumns:
    """The columns of data sets whose poses become the actions of an embodiment."""

    poses: str
    """x, y, z in metres, and Euler angles about the fixed x, y and z axes."""
    gripper: str
    """0 to 1; the model has 1 minus it."""


POSES: Mapping[str, PoseColumns] = {
    # NVIDIA's framework, droid_lerobot_dataset.py
    "droid_lerobot": PoseColumns("observation.state.cartesian_position", "action.gripper_position"),
}
"""How actions that are changes of a pose are made of data sets that have poses, by embodiment."""


def policy_embodiment(
    domain: str,
    width: int | None = None,
    chunk: int | None = None,
    fps: float | None = None,
    history: int | None = None,
) -> Embodiment:
    """The embodiment of a policy trained for ``domain``, with what its checkpoint says in place of what is usual.

    CX610: no such domain.
    """
    usual = _POLICIES.get(domain.split("_")[0]) or known_embodiment(domain, EMBODIMENTS)
    found = replace(
        usual,
        width=width or usual.width,
        chunk=chunk or usual.chunk,
        fps=fps or usual.fps,
        rated=usual.rated or fps is not None,
        history=usual.history if history is None else history,
    )
    if usual.width in (None, found.width):
        return found
    # Of another width it is another representation, of which nothing else is known.
    return replace(found, parts=(), poses=False, views=PLAIN_VIEWS, history=history or 0, normalization=None)


def embodiment(name: str | None, policy: str | Embodiment | None) -> Embodiment:
    """The embodiment ``name``, or that of a checkpoint that is a ``policy`` (its embodiment, or its domain).

    CX610: neither, an unknown one, or another than the policy's.
    """
    own = policy_embodiment(policy) if isinstance(policy, str) else policy
    if name is not None:
        known_embodiment(name, EMBODIMENTS)
    return choose_embodiment(name, own, EMBODIMENTS)


def embodiments_of(policy: Embodiment | None, domains: int, width: int) -> tuple[Embodiment, ...]:
    """The rows that a bundle has of a model with ``domains`` domains and actions of ``width`` columns: a policy's own
    alone, or all that it can act for."""
    rows = _TABLE if policy is None else (policy,)
    return tuple(row for row in rows if row.domain < domains and (row.width or 0) <= width)
