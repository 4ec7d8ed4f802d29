"""A policy that needs no model, a server of it in a thread, and clients of both protocols that know only the wire."""

from __future__ import annotations

import asyncio
import contextlib
import io
import struct
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from cosmos_export.audit import AuditTrail
from cosmos_export.bundle.embodiment import Embodiment
from cosmos_export.diagnostics import UserError
from cosmos_export.embodiments import policy_embodiment
from cosmos_export.runtime.limits import ColumnLimits, Limits, Units
from cosmos_export.runtime.views import compose
from cosmos_export.serve.desk import Desk
from cosmos_export.serve.metrics import Metrics
from cosmos_export.serve.observation import Observation
from cosmos_export.serve.policy import Chunk, Expected
from cosmos_export.serve.server import check, opened
from cosmos_export.verb_options import ServeOptions

DROID = policy_embodiment("droid_lerobot")
LIMITS = Limits(
    "model",
    (
        *(ColumnLimits(f"joint {i}", -3.0, 3.0, step_per_s=30.0, jump=1.0) for i in range(7)),
        ColumnLimits("gripper", 0.0, 1.0, clip=True),
    ),
    digest="1" * 64,
)


class FakePolicy:
    """Actions that follow from what it is shown: joint i is the state's plus 0.001 · row, the gripper the mean of the
    picture."""

    bundle_id = "b" * 64
    units: Units = "model"

    def __init__(self, robot: Embodiment = DROID) -> None:
        self.robot = robot
        self.fps = robot.fps
        self.width = robot.width or 8
        self.seeds: list[int] = []
        self.wait = 0.0
        self.hold: threading.Event | None = None
        self.change: Callable[[Any], Any] = lambda actions: actions
        self.running = self.most = 0
        self.build: Expected | None = None

    def example(self) -> Observation:
        return Observation("Wait.", {"image": np.zeros((540, 640, 3), np.uint8)})

    def expected(self) -> Expected | None:
        return self.build

    def act(self, observation: Observation, seed: int) -> Chunk:
        self.running += 1
        self.most = max(self.most, self.running)
        try:
            started = time.perf_counter()
            picture = compose(self.robot.views, observation.pictures)
            if observation.prompt == "fail":
                raise UserError("CX600", "the prompt is not one")
            if observation.prompt == "bug":
                raise KeyError("secret of the server")
            made = time.perf_counter()
            self.seeds.append(seed)
            if self.hold is not None:
                assert self.hold.wait(20)
            time.sleep(self.wait)
            state = np.zeros(8) if observation.state is None else observation.state
            actions = np.tile(state, (32, 1)) + 0.001 * np.arange(32)[:, None]
            actions[:, -1] = picture.mean() / 255
            return Chunk(self.change(actions.astype(np.float32)), made - started, time.perf_counter() - made)
        finally:
            self.running -= 1


@contextlib.contextmanager
def serving(
    policy: Any, limits: Limits | None = None, trail: AuditTrail | None = None, **options: Any
) -> Iterator[tuple[int, Desk]]:
    """The port of a server of ``policy``, which runs in a thread of its own."""
    chosen = ServeOptions(port=0, **options)
    settings = check(chosen)
    desk = Desk(
        policy, limits=limits, metrics=Metrics(policy.bundle_id, chosen.protocol), trail=trail,
        deadline_s=chosen.deadline_s, seed=chosen.seed,
    )  # fmt: skip
    started: Any = threading.Event()
    box: dict[str, Any] = {}

    async def main() -> None:
        box["loop"], box["stop"] = asyncio.get_running_loop(), asyncio.Event()
        async with opened(desk, chosen, settings) as port:
            box["port"] = port
            started.set()
            await box["stop"].wait()

    thread = threading.Thread(target=asyncio.run, args=(main(),), daemon=True)
    thread.start()
    assert started.wait(20)
    try:
        yield box["port"], desk
    finally:
        box["loop"].call_soon_threadsafe(box["stop"].set)
        thread.join(20)
        desk.close()
        assert not thread.is_alive()


def picture(seed: int = 0, height: int = 360, width: int = 640) -> Any:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def droid(seed: int = 0, prompt: str = "Pick up the cube.") -> dict[str, Any]:
    """An observation of DROID's as openpi writes it."""
    rng = np.random.default_rng(seed)
    return {
        "observation/wrist_image_left": picture(seed),
        "observation/exterior_image_1_left": picture(seed + 1),
        "observation/exterior_image_2_left": picture(seed + 2),
        "observation/joint_position": rng.uniform(-1, 1, 7),
        "observation/gripper_position": rng.uniform(0, 1, 1),
        "prompt": prompt,
        "session_id": "a",
    }


def groot(seed: int = 0) -> dict[str, Any]:
    """The same for GR00T."""
    flat = droid(seed)
    named = {key.removeprefix("observation/"): value for key, value in flat.items()}
    return {
        "video": {n: named[n][None, None] for n in named if "image" in n},
        "state": {n: named[n][None, None].astype(np.float32) for n in named if "position" in n},
        "language": {"annotation.human.task_description": [[flat["prompt"]]]},
    }


# -- the wire, written by hand: nothing of the server's code, and no msgpack library ----------------------------------


def encode(value: Any, groot: bool = False) -> bytes:
    """``value`` in msgpack."""
    if value is None:
        return b"\xc0"
    if isinstance(value, bool):
        return b"\xc3" if value else b"\xc2"
    if isinstance(value, int):
        return b"\xd3" + struct.pack(">q", value)
    if isinstance(value, float):
        return b"\xcb" + struct.pack(">d", value)
    if isinstance(value, str):
        return b"\xdb" + struct.pack(">I", len(value.encode())) + value.encode()
    if isinstance(value, bytes):
        return b"\xc6" + struct.pack(">I", len(value)) + value
    if isinstance(value, list | tuple):
        return b"\xdd" + struct.pack(">I", len(value)) + b"".join(encode(one, groot) for one in value)
    if isinstance(value, np.ndarray) and groot:
        file = io.BytesIO()
        np.save(file, value, allow_pickle=False)
        return encode({"__ndarray_class__": True, "as_npy": file.getvalue()})
    if isinstance(value, np.ndarray):
        fields = {b"__ndarray__": True, b"data": value.tobytes(), b"dtype": value.dtype.str, b"shape": value.shape}
        return encode(fields)
    assert isinstance(value, Mapping)
    pairs = b"".join(encode(key, groot) + encode(one, groot) for key, one in value.items())
    return b"\xdf" + struct.pack(">I", len(value)) + pairs


_FIXED: Mapping[int, tuple[str, int]] = {
    0xCA: (">f", 4), 0xCB: (">d", 8), 0xCC: (">B", 1), 0xCD: (">H", 2), 0xCE: (">I", 4), 0xCF: (">Q", 8),
    0xD0: (">b", 1), 0xD1: (">h", 2), 0xD2: (">i", 4), 0xD3: (">q", 8),
}  # fmt: skip
_SIZED: Mapping[int, tuple[str, str, int]] = {
    0xC4: ("bin", ">B", 1), 0xC5: ("bin", ">H", 2), 0xC6: ("bin", ">I", 4), 0xD9: ("str", ">B", 1),
    0xDA: ("str", ">H", 2), 0xDB: ("str", ">I", 4), 0xDC: ("list", ">H", 2), 0xDD: ("list", ">I", 4),
    0xDE: ("map", ">H", 2), 0xDF: ("map", ">I", 4),
}  # fmt: skip


def decode(data: bytes) -> Any:
    """The value that ``data`` is in msgpack, arrays included."""
    value, end = _decoded(data, 0)
    assert end == len(data)
    return value


def _decoded(data: bytes, at: int) -> tuple[Any, int]:
    first = data[at]
    at += 1
    if first < 0x80 or first >= 0xE0:
        return first if first < 0x80 else first - 256, at
    if first in (0xC0, 0xC2, 0xC3):
        return {0xC0: None, 0xC2: False, 0xC3: True}[first], at
    if first in _FIXED:
        code, size = _FIXED[first]
        return struct.unpack_from(code, data, at)[0], at + size
    if first in _SIZED:
        kind, code, size = _SIZED[first]
        count = struct.unpack_from(code, data, at)[0]
        at += size
    elif first < 0x90:
        kind, count = "map", first & 0x0F
    elif first < 0xA0:
        kind, count = "list", first & 0x0F
    else:
        assert first < 0xC0, hex(first)
        kind, count = "str", first & 0x1F
    if kind in ("bin", "str"):
        raw = data[at : at + count]
        return raw if kind == "bin" else raw.decode(), at + count
    found = []
    for _ in range(count * (2 if kind == "map" else 1)):
        value, at = _decoded(data, at)
        found.append(value)
    if kind == "list":
        return found, at
    fields = dict(zip(found[::2], found[1::2], strict=True))
    if b"__ndarray__" in fields:
        return np.frombuffer(fields[b"data"], fields[b"dtype"]).reshape(fields[b"shape"]), at
    if "__ndarray_class__" in fields:
        return np.load(io.BytesIO(fields["as_npy"]), allow_pickle=False), at
    return fields, at


def without_jump(limits: Limits) -> Limits:
    return replace(limits, columns=tuple(replace(column, jump=None) for column in limits.columns))
