"""A LeRobot policy that is a client of `cosmos-export serve`, so that LeRobot's own tools can evaluate a bundle.

LeRobot's asynchronous server speaks pickle, which runs what a stranger sends; this speaks openpi's protocol instead.
Nothing is trained here: there are no parameters.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

import numpy as np
import torch
from lerobot.configs.policies import PreTrainedConfig
from lerobot.policies.pretrained import PreTrainedPolicy
from openpi_client.websocket_client_policy import WebsocketClientPolicy
from torch import Tensor


@PreTrainedConfig.register_subclass("cosmos_remote")
@dataclass
class RemoteConfig(PreTrainedConfig):
    """Where the server is, and which of its names each feature of the data has."""

    host: str = "127.0.0.1"
    port: int = 8000
    token: str | None = None
    rows: int = 16
    """Actions of a chunk that are carried out before the next one is asked for."""
    cameras: dict[str, str] = field(
        default_factory=lambda: {
            "observation.images.wrist": "observation/wrist_image_left",
            "observation.images.left": "observation/exterior_image_1_left",
            "observation.images.right": "observation/exterior_image_2_left",
        }
    )
    state: dict[str, tuple[int, int]] = field(
        default_factory=lambda: {"observation/joint_position": (0, 7), "observation/gripper_position": (7, 8)}
    )
    """Name → columns of ``observation.state``."""

    @property
    def observation_delta_indices(self) -> None:
        return None

    @property
    def action_delta_indices(self) -> list[int]:
        return list(range(self.rows))

    @property
    def reward_delta_indices(self) -> None:
        return None

    def get_optimizer_preset(self) -> None:
        return None

    def get_scheduler_preset(self) -> None:
        return None

    def validate_features(self) -> None:
        return None


def observation(batch: dict[str, Tensor], config: RemoteConfig) -> dict:
    """The server's observation for a batch of one, as LeRobot has it: pictures in [0, 1], [1, 3, height, width]."""
    found: dict = {}
    for feature, name in config.cameras.items():
        picture = batch[feature]
        if len(picture) != 1:
            raise ValueError(f"a batch of {len(picture)}; the server serves one robot")
        levels = (picture[0].permute(1, 2, 0) * 255).round().clamp(0, 255)
        found[name] = levels.to(torch.uint8).cpu().numpy()
    state = batch["observation.state"][0].cpu().numpy().astype(np.float64)
    for name, (first, last) in config.state.items():
        found[name] = state[first:last]
    task = batch["task"]
    found["prompt"] = task if isinstance(task, str) else task[0]
    return found


class RemotePolicy(PreTrainedPolicy):
    config_class = RemoteConfig
    name = "cosmos_remote"

    def __init__(self, config: RemoteConfig, **_: object) -> None:
        super().__init__(config)
        self._client = WebsocketClientPolicy(config.host, config.port, config.token)
        self._queue: deque[Tensor] = deque()

    def reset(self) -> None:
        """A new episode: what is left of the last chunk belongs to the one before."""
        self._queue.clear()

    def get_optim_params(self) -> dict:
        return {}

    def forward(self, batch: dict[str, Tensor]) -> tuple[Tensor, None]:
        raise NotImplementedError("the policy is served and not trained")

    def predict_action_chunk(self, batch: dict[str, Tensor], **_: object) -> Tensor:
        """float32 [1, rows, columns]. RuntimeError where the server refuses."""
        actions = self._client.infer(observation(batch, self.config))["actions"]
        return torch.from_numpy(np.array(actions[: self.config.rows], dtype=np.float32))[None]

    def select_action(self, batch: dict[str, Tensor], **_: object) -> Tensor:
        """float32 [1, columns]: the next row, of a new chunk where the last one is done."""
        if not self._queue:
            self._queue.extend(self.predict_action_chunk(batch)[0])
        return self._queue.popleft()[None]
