"""A robot with openpi's own, unmodified client: ``openpi_robot.py PORT COUNT [TOKEN]``.

Prints one line for each reply that is right.
"""

import sys

import numpy as np
from openpi_client.action_chunk_broker import ActionChunkBroker
from openpi_client.websocket_client_policy import WebsocketClientPolicy


def observation(seed: int) -> dict:
    rng = np.random.default_rng(seed)
    names = ("wrist_image_left", "exterior_image_1_left", "exterior_image_2_left")
    return {
        **{f"observation/{name}": rng.integers(0, 256, (360, 640, 3), dtype=np.uint8) for name in names},
        "observation/joint_position": rng.uniform(-1, 1, 7),
        "observation/gripper_position": rng.uniform(0, 1, 1),
        "prompt": "Pick up the cube.",
    }


port, count = int(sys.argv[1]), int(sys.argv[2])
client = WebsocketClientPolicy("127.0.0.1", port, *sys.argv[3:4])
assert client.get_server_metadata()["embodiment"] == "droid_lerobot"
for i in range(count):
    seen = observation(i % 4)
    reply = client.infer(seen)
    for name in ("actions", "action"):
        expected = seen["observation/joint_position"] + 0.001 * np.arange(32)[:, None]
        np.testing.assert_allclose(reply[name][:, :7], expected, atol=1e-5)
    assert reply["server_timing"]["infer_ms"] > 0
    print("right", i, flush=True)
broker = ActionChunkBroker(client, 32)
steps = [broker.infer(seen)["actions"] for _ in range(33)]
assert all(step.shape == (8,) for step in steps)
np.testing.assert_allclose(steps[31][:7] - steps[0][:7], 0.031, atol=1e-5)
print("broker", flush=True)
