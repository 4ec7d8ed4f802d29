"""A ROS 2 node between a robot and `cosmos-export serve`.

Subscribes to three cameras, the joints and the gripper; asks for a chunk of actions when the last one is nearly done;
and publishes it as a trajectory. While anything that it needs is too old it asks for nothing, and when the server
refuses it stops. The robot's controller decides what is safe.
"""

from __future__ import annotations

import threading
import time

import numpy as np
import rclpy
from builtin_interfaces.msg import Duration
from openpi_client.websocket_client_policy import WebsocketClientPolicy
from rclpy.node import Node
from rclpy.qos import qos_profile_sensor_data
from sensor_msgs.msg import Image, JointState
from trajectory_msgs.msg import JointTrajectory, JointTrajectoryPoint

CAMERAS = {
    "observation/wrist_image_left": "/wrist/image_raw",
    "observation/exterior_image_1_left": "/left/image_raw",
    "observation/exterior_image_2_left": "/right/image_raw",
}
JOINTS = [f"panda_joint{i}" for i in range(1, 8)]
GRIPPER, GRIPPER_OPEN_M = "panda_finger_joint1", 0.04
OLDEST_S = 0.2
"""Nothing older than this is sent to the server."""


def pixels(message: Image) -> np.ndarray:
    """uint8 [height, width, 3] in RGB."""
    if message.encoding not in ("rgb8", "bgr8"):
        raise ValueError(f"encoding {message.encoding}; rgb8 or bgr8")
    rows = np.frombuffer(message.data, np.uint8).reshape(message.height, message.step)
    picture = rows[:, : 3 * message.width].reshape(message.height, message.width, 3)
    return np.ascontiguousarray(picture[..., ::-1] if message.encoding == "bgr8" else picture)


class PolicyNode(Node):
    def __init__(self) -> None:
        super().__init__("cosmos_policy")
        for name, value in (("host", "127.0.0.1"), ("port", 8000), ("token", ""), ("task", ""), ("rows", 16)):
            self.declare_parameter(name, value)
        said = {name: self.get_parameter(name).value for name in ("host", "port", "token", "task", "rows")}
        self._task, self._rows = said["task"], int(said["rows"])
        self._seen: dict[str, tuple[float, np.ndarray]] = {}
        self._client = WebsocketClientPolicy(said["host"], said["port"], said["token"] or None)
        self._fps = float(self._client.get_server_metadata()["fps"])
        for key, topic in CAMERAS.items():
            self.create_subscription(Image, topic, lambda m, k=key: self._see(k, pixels(m)), qos_profile_sensor_data)
        self.create_subscription(JointState, "/joint_states", self._joints, qos_profile_sensor_data)
        self._publisher = self.create_publisher(JointTrajectory, "/arm_controller/joint_trajectory", 1)
        self._asking = threading.Thread(target=self._ask_until_refused, daemon=True)
        self._asking.start()

    def _see(self, key: str, value: np.ndarray) -> None:
        self._seen[key] = (time.monotonic(), value)

    def _joints(self, message: JointState) -> None:
        position = dict(zip(message.name, message.position, strict=False))
        if all(name in position for name in (*JOINTS, GRIPPER)):
            self._see("observation/joint_position", np.array([position[name] for name in JOINTS]))
            # DROID: 0 is open, 1 is closed.
            self._see("observation/gripper_position", np.array([1 - position[GRIPPER] / GRIPPER_OPEN_M]))

    def observation(self) -> dict | None:
        """What the server is sent; None while something is missing or too old."""
        seen, now = dict(self._seen), time.monotonic()
        wanted = (*CAMERAS, "observation/joint_position", "observation/gripper_position")
        if any(key not in seen or now - seen[key][0] > OLDEST_S for key in wanted):
            return None
        return {**{key: seen[key][1] for key in wanted}, "prompt": self._task}

    def trajectory(self, actions: np.ndarray) -> JointTrajectory:
        """The first rows of ``actions`` [rows, 8] as absolute joint positions; the gripper has another controller."""
        message = JointTrajectory(joint_names=JOINTS)
        for i, row in enumerate(actions[: self._rows]):
            seconds, rest = divmod((i + 1) / self._fps, 1)
            when = Duration(sec=int(seconds), nanosec=int(rest * 1e9))
            message.points.append(JointTrajectoryPoint(positions=[float(v) for v in row[:7]], time_from_start=when))
        return message

    def _ask_until_refused(self) -> None:
        while rclpy.ok():
            observation = self.observation()
            if observation is None:
                time.sleep(0.01)
                continue
            started = time.monotonic()
            try:
                reply = self._client.infer(observation)
            except Exception as error:  # a refusal (a text frame), or a connection that is gone
                self.get_logger().error(f"stopped: {error}")
                return
            if reply["stale"]:
                self.get_logger().warning("a chunk came too late and is dropped")
                continue
            self._publisher.publish(self.trajectory(reply["actions"]))
            # Ask again before the last row that was sent is reached.
            time.sleep(max(0.0, 0.8 * self._rows / self._fps - (time.monotonic() - started)))


def main() -> None:
    rclpy.init()
    node = PolicyNode()
    try:
        rclpy.spin(node)
    finally:
        node.destroy_node()
        rclpy.shutdown()


if __name__ == "__main__":
    main()
