"""GR00T's protocol against a client that knows only the wire."""

from __future__ import annotations

import io
import threading
import time
from typing import Any

import numpy as np
import pytest
import serve_samples as samples
import zmq
from serve_samples import LIMITS, FakePolicy, decode, encode, groot, serving


class Client:
    """A REQ socket, as GR00T's own client has it."""

    def __init__(self, port: int) -> None:
        self.socket = zmq.Context.instance().socket(zmq.REQ)
        self.socket.setsockopt(zmq.LINGER, 0)
        self.socket.setsockopt(zmq.RCVTIMEO, 20_000)
        self.socket.connect(f"tcp://127.0.0.1:{port}")

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def send(self, endpoint: str, data: Any = None, **fields: Any) -> None:
        request = {"endpoint": endpoint, **({} if data is None else {"data": data}), **fields}
        self.socket.send(encode(request, groot=True))

    def ask(self, endpoint: str, data: Any = None, **fields: Any) -> Any:
        self.send(endpoint, data, **fields)
        return decode(self.socket.recv())

    def act(self, observation: Any) -> Any:
        return self.ask("get_action", {"observation": observation, "options": None})


@pytest.fixture(scope="module")
def port() -> Any:
    with serving(FakePolicy(), LIMITS, protocol="gr00t") as (opened, _):
        yield opened


def test_actions(port: int) -> None:
    with Client(port) as client:
        for i in range(20):
            actions, info = client.act(groot(i % 3))
            joints = samples.droid(i % 3)["observation/joint_position"]
            assert actions["joint_position"].shape == (1, 32, 7) and actions["gripper_position"].shape == (1, 32, 1)
            assert actions["joint_position"].dtype == np.float32
            np.testing.assert_allclose(actions["joint_position"][0, 0], joints, atol=1e-5)
            assert info["review"]["verdict"] == "pass" and info["server_timing"]["own_ms"] > 0


def test_flat_keys(port: int) -> None:
    nested = groot(5)
    flat = {f"{group}.{name}": value for group in ("video", "state") for name, value in nested[group].items()}
    flat = {key: value[0] for key, value in flat.items()} | {"annotation.human.task_description": ["Pick."]}
    with Client(port) as client:
        found, wanted = client.act(flat)[0], client.act(nested)[0]
        np.testing.assert_array_equal(found["joint_position"], wanted["joint_position"])


def test_the_other_endpoints(port: int) -> None:
    with Client(port) as client:
        assert client.ask("ping")["status"] == "ok"
        assert client.ask("reset", {"options": None}) == {}
        modalities = client.ask("get_modality_config")
        assert modalities["action"]["as_json"]["modality_keys"] == ["joint_position", "gripper_position"]
        assert modalities["action"]["as_json"]["delta_indices"] == list(range(32))
        assert modalities["video"]["as_json"]["modality_keys"][0] == "wrist_image_left"
        for endpoint in ("kill", "eval", 3):
            assert "CX641" in client.ask(endpoint)["error"]  # type: ignore[arg-type]
        assert client.ask("ping")["status"] == "ok"


def npy(header: str, body: bytes = b"\0" * 48) -> dict[str, Any]:
    """An array file with a header of one's own."""
    text = header.encode() + b" " * 16 + b"\n"
    data = b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + body
    return {"__ndarray_class__": True, "as_npy": data}


def observed(picture: Any) -> Any:
    return {"video": {"image": picture}, "language": {"task": [["Go."]]}}


def pickled() -> dict[str, Any]:
    file = io.BytesIO()
    np.save(file, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    return {"__ndarray_class__": True, "as_npy": file.getvalue()}


GOOD = "{'descr': '|u1', 'fortran_order': False, 'shape': (1, 1, 4, 4, 3), }"
BAD: dict[str, tuple[Any, str]] = {
    "objects": (observed(pickled()), "no type of numbers"),
    "records": (observed(npy(GOOD.replace("'|u1'", "[('a', '|u1')]"))), "not that of an array of numbers"),
    "a large shape": (observed(npy(GOOD.replace("1, 1,", "1099511627776, 1,"))), "in 48 bytes"),
    "code": (observed(npy("__import__('os').system('true')")), "not that of an array of numbers"),
    "a long header": (observed(npy(GOOD + " " * 5000)), "not that of an array of numbers"),
    "no header": (observed({"__ndarray_class__": True, "as_npy": b"NUMPY"}), "does not begin as one"),
    "version 9": (
        observed({"__ndarray_class__": True, "as_npy": b"\x93NUMPY\x09\x00" + b"\0" * 80}), "does not begin as one",
    ),
    "text": (observed({"__ndarray_class__": True, "as_npy": "x"}), "other fields"),
    "a batch of two": (observed(np.zeros((2, 1, 4, 4, 3), np.uint8)), "a batch of 2"),
    "no times": (observed(np.zeros((1, 0, 4, 4, 3), np.uint8)), "has shape"),
    "two tasks": ({**groot(), "language": {"a": [["x"]], "b": [["y"]]}}, "2 instructions"),
    "no task": ({"video": groot()["video"]}, "0 instructions"),
    "a task of two": ({**groot(), "language": {"a": [["x", "y"]]}}, "is list"),
    "no map": ([1], "no map"),
    "a group that is none": ({**groot(), "video": [1]}, "no map"),
    "a camera too many": (
        {**groot(), "video": {**groot()["video"], "head": np.zeros((1, 1, 4, 4, 3), np.uint8)}}, "`head` has no place",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_observation(port: int, name: str) -> None:
    observation, said = BAD[name]
    with Client(port) as client:
        assert said in client.act(observation)["error"]
        assert "joint_position" in client.act(groot())[0]


def test_columns_first(port: int) -> None:
    turned = np.asfortranarray(groot(2)["video"]["wrist_image_left"])
    observation = groot(2)
    observation["video"]["wrist_image_left"] = turned
    with Client(port) as client:
        found, wanted = client.act(observation)[0], client.act(groot(2))[0]
        np.testing.assert_array_equal(found["gripper_position"], wanted["gripper_position"])


def test_the_token() -> None:
    token = "0123456789abcdef"
    with serving(FakePolicy(), protocol="gr00t", token=token) as (port, _), Client(port) as client:
        assert "CX647" in client.ask("ping")["error"]
        assert "CX647" in client.ask("ping", api_token=token[:-1])["error"]
        assert "CX647" in client.ask("ping", api_token=3)["error"]
        assert client.ask("ping", api_token=token)["status"] == "ok"


def test_a_ping_does_not_wait_for_the_model() -> None:
    policy = FakePolicy()
    policy.hold = threading.Event()
    with serving(policy, LIMITS, protocol="gr00t") as (port, _), Client(port) as first, Client(port) as second:
        first.send("get_action", {"observation": groot()})
        while not policy.running:
            time.sleep(0.01)
        assert second.ask("ping")["status"] == "ok"
        policy.hold.set()
        assert "joint_position" in decode(first.socket.recv())[0]


def test_metrics_at_a_port_of_their_own() -> None:
    import http.client
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        number = free.getsockname()[1]
    with serving(FakePolicy(), protocol="gr00t", metrics_port=number) as (port, _), Client(port) as client:
        client.act(groot())
        connection = http.client.HTTPConnection("127.0.0.1", number, timeout=20)
        connection.request("GET", "/metrics")
        assert 'cosmos_export_requests_total{outcome="pass"} 1.0' in connection.getresponse().read().decode()


def test_damaged_messages(port: int) -> None:
    rng = np.random.default_rng(3)
    small = groot()
    small["video"] = {name: value[:, :, :4, :4] for name, value in small["video"].items()}
    good = encode({"endpoint": "get_action", "data": {"observation": small}}, groot=True)
    errors = 0
    with Client(port) as client:
        for _ in range(300):
            data = bytearray(good)
            for _ in range(int(rng.integers(1, 4))):
                at = int(rng.integers(0, max(len(data), 1)))
                if rng.integers(0, 2) and data:
                    data[at % len(data)] = int(rng.integers(0, 256))
                else:
                    del data[at : at + int(rng.integers(1, 40))]
            client.socket.send(bytes(data))
            reply = decode(client.socket.recv())
            if isinstance(reply, dict) and "error" in reply:
                assert reply["error"].startswith("CX6"), reply
                errors += 1
        assert errors > 150
        assert "joint_position" in client.act(groot())[0]
