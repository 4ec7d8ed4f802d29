"""Changes of an end effector's pose from the poses that a data set has, as the published data sets make them.

As in NVIDIA's framework (`pose_utils`, convention ``backward_framewise``): the change of step i is T_i⁻¹·T_{i+1}, its
rotation the first two columns of the matrix.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

_QUARTER_TURN: Floats = np.array([[0.0, -1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
"""The end effector of a Franka as a camera sees it: turned by 90 degrees about its own z axis."""


def pose_changes(positions: Floats) -> Floats:
    """[rows − 1, 9] of ``positions`` [rows, 6]: x, y, z in metres, and Euler angles about the fixed x, y and z axes."""
    turns = rotations(positions[:, 3:]) @ _QUARTER_TURN
    back = turns[:-1].transpose(0, 2, 1)
    moved = np.einsum("nij,nj->ni", back, positions[1:, :3] - positions[:-1, :3])
    turned = back @ turns[1:]
    return np.concatenate([moved, turned[:, :, 0], turned[:, :, 1]], axis=1)


def rotations(angles: Floats) -> Floats:
    """[n, 3, 3] of ``angles`` [n, 3] about the fixed x, y and z axes, in this order."""
    (cx, cy, cz), (sx, sy, sz) = np.cos(angles).T, np.sin(angles).T
    zero, one = np.zeros_like(cx), np.ones_like(cx)
    x = np.stack([one, zero, zero, zero, cx, -sx, zero, sx, cx], axis=-1).reshape(-1, 3, 3)
    y = np.stack([cy, zero, sy, zero, one, zero, -sy, zero, cy], axis=-1).reshape(-1, 3, 3)
    z = np.stack([cz, -sz, zero, sz, cz, zero, zero, zero, one], axis=-1).reshape(-1, 3, 3)
    made: Floats = z @ y @ x
    return made
