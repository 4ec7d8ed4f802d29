"""The examples against the server: stand-ins for ROS 2, LeRobot and openpi's client, and true messages between them."""

from __future__ import annotations

import importlib.util
import sys
import time
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from serve_samples import LIMITS, FakePolicy, decode, droid, encode, serving
from websockets.sync.client import connect

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


class Client:
    """What of openpi's client the examples use."""

    def __init__(self, host: str, port: int, token: str | None = None) -> None:
        self._connection = connect(f"ws://{host}:{port}", max_size=None)
        self._metadata = decode(self._connection.recv(timeout=20))  # type: ignore[arg-type]

    def get_server_metadata(self) -> Any:
        return self._metadata

    def infer(self, observation: Any) -> Any:
        self._connection.send(encode(observation))
        reply = self._connection.recv(timeout=20)
        if isinstance(reply, str):
            raise RuntimeError(reply)
        return decode(reply)


class Record:
    """A message of any kind: its fields as they are given."""

    def __init__(self, **fields: Any) -> None:
        self.points: list[Any] = []
        self.__dict__.update(fields)


class Node:
    def __init__(self, name: str) -> None:
        self.parameters: dict[str, Any] = {}
        self.callbacks: dict[str, Any] = {}
        self.published: list[Any] = []
        self.errors: list[str] = []

    def declare_parameter(self, name: str, value: Any) -> None:
        self.parameters[name] = Record(value=OVERRIDES.get(name, value))

    def get_parameter(self, name: str) -> Any:
        return self.parameters[name]

    def create_subscription(self, kind: Any, topic: str, callback: Any, qos: Any) -> None:
        self.callbacks[topic] = callback

    def create_publisher(self, kind: Any, topic: str, depth: int) -> Any:
        return types.SimpleNamespace(publish=self.published.append)

    def get_logger(self) -> Any:
        return types.SimpleNamespace(error=self.errors.append, warning=self.errors.append)


OVERRIDES: dict[str, Any] = {}


def load(path: Path, monkeypatch: pytest.MonkeyPatch, modules: dict[str, dict[str, Any]]) -> Any:
    modules = {
        "openpi_client": {},
        "openpi_client.websocket_client_policy": {"WebsocketClientPolicy": Client},
    } | modules
    for name, attributes in modules.items():
        module = types.ModuleType(name)
        module.__dict__.update(attributes)
        monkeypatch.setitem(sys.modules, name, module)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, path.stem, loaded)
    spec.loader.exec_module(loaded)
    return loaded


def test_the_node(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = droid(3)
    policy = FakePolicy()
    alive = {"ok": True}
    messages = {
        "builtin_interfaces": {}, "builtin_interfaces.msg": {"Duration": Record},
        "rclpy": {"ok": lambda: alive["ok"]}, "rclpy.node": {"Node": Node},
        "rclpy.qos": {"qos_profile_sensor_data": None},
        "sensor_msgs": {}, "sensor_msgs.msg": {"Image": Record, "JointState": Record},
        "trajectory_msgs": {}, "trajectory_msgs.msg": {"JointTrajectory": Record, "JointTrajectoryPoint": Record},
    }  # fmt: skip
    with serving(policy, LIMITS) as (port, _):
        monkeypatch.setitem(OVERRIDES, "port", port)
        monkeypatch.setitem(OVERRIDES, "task", "Pick up the cube.")
        example = load(EXAMPLES / "ros2" / "policy_node.py", monkeypatch, messages)
        node = example.PolicyNode()
        assert node.observation() is None
        joints = seen["observation/joint_position"]

        def look() -> None:
            for key, topic in example.CAMERAS.items():
                picture = seen[key][..., ::-1]
                data, step = picture.tobytes(), 3 * picture.shape[1]
                node.callbacks[topic](Record(encoding="bgr8", height=360, width=640, step=step, data=data))
            names = [*example.JOINTS, example.GRIPPER, "another"]
            node.callbacks["/joint_states"](Record(name=names, position=[*joints, 0.01, 9.0]))

        ended = time.monotonic() + 20
        while not node.published and time.monotonic() < ended:
            look()
            time.sleep(0.02)
        message = node.published[0]
        assert message.joint_names == example.JOINTS and len(message.points) == 16
        np.testing.assert_allclose(message.points[0].positions, joints, atol=1e-5)
        first, last = (message.points[i].time_from_start for i in (0, 15))
        assert (first.sec, last.sec) == (0, 1) and abs(first.nanosec - 1e9 / 15) < 2
        observation = node.observation()
        for key in example.CAMERAS:
            np.testing.assert_array_equal(observation[key], seen[key])
        np.testing.assert_allclose(observation["observation/gripper_position"], [0.75])
        policy.change = lambda actions: actions * np.float32("nan")
        while node._asking.is_alive() and time.monotonic() < ended:
            look()
            time.sleep(0.02)
        assert "CX631" in node.errors[-1]
        time.sleep(0.25)
        assert node.observation() is None
        alive["ok"] = False


def test_the_lerobot_policy(monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")

    class Config:
        @staticmethod
        def register_subclass(name: str) -> Any:
            return lambda cls: cls

    class Policy:
        def __init__(self, config: Any) -> None:
            self.config = config

    modules = {
        "lerobot": {}, "lerobot.configs": {}, "lerobot.configs.policies": {"PreTrainedConfig": Config},
        "lerobot.policies": {}, "lerobot.policies.pretrained": {"PreTrainedPolicy": Policy},
    }  # fmt: skip
    example = load(EXAMPLES / "lerobot" / "remote_policy.py", monkeypatch, modules)
    seen = droid(1)
    state = np.concatenate([seen["observation/joint_position"], seen["observation/gripper_position"]])
    with serving(FakePolicy(), LIMITS) as (port, desk):
        config = example.RemoteConfig(port=port)
        policy = example.RemotePolicy(config)
        batch = {name: torch.from_numpy(seen[key]).permute(2, 0, 1)[None] / 255 for name, key in config.cameras.items()}
        batch |= {"observation.state": torch.from_numpy(state)[None], "task": ["Pick up the cube."]}
        made = example.observation(batch, config)
        for key in config.cameras.values():
            np.testing.assert_array_equal(made[key], seen[key])
        rows = [policy.select_action(batch) for _ in range(17)]
        assert all(row.shape == (1, 8) for row in rows) and desk.count == 2
        np.testing.assert_allclose(rows[15][0, :7] - rows[0][0, :7], 0.015, atol=1e-5)
        policy.reset()
        policy.select_action(batch)
        assert desk.count == 3
        with pytest.raises(ValueError, match="a batch of 2"):
            example.observation(
                {name: torch.cat([value] * 2) for name, value in batch.items() if "image" in name}, config
            )
