"""A recorded observation of DROID, and the tensors that the published rule makes of it, written down by hand.

The rule is that of NVIDIA's policy server (cosmos-framework, ``action_policy_server_robolab.py`` with
``data/generator/action/transforms.py`` and ``json_formatter.py``, default options). Nothing here calls this project.

Canvas. Three frames of 640 × 360. The wrist's is on top as it is; the exterior ones are halved by
``F.interpolate(mode="bilinear", align_corners=False)``, which at exactly half the size is the mean of four pixels, and
cut to whole levels by ``astype(uint8)``; they stand side by side below: 540 × 640, which is the size that the server
wants, so nothing is resized. The transform looks for the canvas of tier 480 with the nearest aspect: 540/640 = 0.844;
4:3 is 544 × 736 (0.739, 0.105 away), 1:1 is 640 × 640 (0.156 away). It is not enlarged (the scale is the least of
736/640, 544/540 and 1) and padded on the right by 96 columns and at the bottom by 4 rows, by reflection. Latents are
cut to 540 // 16 = 33 rows and 640 // 16 = 40 columns. Levels become numbers by ``/ 127.5 - 1``.

Caption. 33 frames at 15 per second are 2.2 seconds: "2s", and "0:00-0:02". The resolution is the canvas's, 544 × 736,
which is 4:3. The framing is the sentence of ``concat_view`` and, after a blank, the server's own on the views. A full
stop follows the task. ``json.dumps`` with its own separators.

Actions. Row 0 is the state, 7 joints and 1 − gripper in float32, and 32 rows follow. It is given (mask 0), the rest is
made. The stream begins at frame 0 (``action_start_frame_offset`` is 0 where there are as many rows as frames): row j is
at 24/4 / 15 · j = 0.4 · j latent frames of 24 per second.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np

TASK = "Pick up the cube"
JOINTS = [0.1, -0.4, 0.25, -2.0, 0.0, 1.6, 0.75]
GRIPPER = 0.25
STATE_ROW = np.array([0.1, -0.4, 0.25, -2.0, 0.0, 1.6, 0.75, 0.75], np.float32)
ROWS, CHUNK, WIDTH, DOMAIN = 33, 32, 8, 8
LATENT_ROWS, LATENT_COLUMNS, LATENT_FRAMES = 33, 40, 9
MASK = np.array([0.0] + [1.0] * 32, np.float32)
POSITIONS = np.array([0.4 * row for row in range(33)], np.float32)
FRAMING = (
    "This video contains concatenated views from multiple camera perspectives. The top row is from the wrist-mounted "
    "camera. The bottom row contains two horizontally concatenated third-person perspective views of the scene from "
    "opposite sides, with the robot visible."
)
CAPTION = (
    '{"cinematography": {"framing": '
    + json.dumps(FRAMING)
    + '}, "actions": [{"time": "0:00-0:02", "description": "Pick up the cube."}], "duration": "2s", "fps": 15.0, '
    '"resolution": {"H": 544, "W": 736}, "aspect_ratio": "4,3"}'
)


def frame(seed: int) -> Any:
    """A camera's frame: uint8 [360, 640, 3], without a pattern that halving keeps."""
    return np.random.default_rng(seed).integers(0, 256, (360, 640, 3), dtype=np.uint8)


def canvas(wrist: Any, left: Any, right: Any) -> Any:
    """uint8 [544, 736, 3], pixel by pixel as above."""
    made = np.zeros((544, 736, 3), np.uint8)
    made[:360, :640] = wrist
    for start, camera in ((0, left), (320, right)):
        four = camera.astype(int)
        total = four[0::2, 0::2] + four[0::2, 1::2] + four[1::2, 0::2] + four[1::2, 1::2]
        made[360:540, start : start + 320] = total // 4
    for column in range(640, 736):
        made[:540, column] = made[:540, 639 - (column - 639)]
    for row in range(540, 544):
        made[row] = made[539 - (row - 539)]
    return made
