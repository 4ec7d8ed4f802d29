"""openpi's protocol against a client that knows only the wire: replies, refusals, two clients, damage."""

from __future__ import annotations

import http.client
import json
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import serve_samples as samples
from serve_samples import LIMITS, FakePolicy, decode, droid, encode, serving
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import ClientConnection, connect

from cosmos_export.audit import AuditTrail, verify_trail


def client(port: int, token: str | None = None, **options: Any) -> ClientConnection:
    headers = {"Authorization": f"Api-Key {token}"} if token else {}
    return connect(f"ws://127.0.0.1:{port}", compression=None, max_size=None, additional_headers=headers, **options)


def ask(connection: ClientConnection, observation: Any) -> Any:
    connection.send(encode(observation) if not isinstance(observation, bytes) else observation)
    reply = connection.recv(timeout=20)
    return reply if isinstance(reply, str) else decode(reply)


def refused(port: int, observation: Any) -> str:
    """What is said of ``observation``, before the connection is closed with 1011."""
    with client(port) as connection:
        connection.recv(timeout=20)
        said = ask(connection, observation)
        with pytest.raises(ConnectionClosed) as caught:
            connection.recv(timeout=20)
        assert caught.value.rcvd is not None and caught.value.rcvd.code == 1011
        assert isinstance(said, str) and "Traceback" not in said
        return said


def get(port: int, path: str, **headers: str) -> tuple[int, str]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    connection.request("GET", path, headers=headers)
    response = connection.getresponse()
    return response.status, response.read().decode()


def test_a_hundred_requests_in_a_row() -> None:
    policy = FakePolicy()
    with serving(policy, LIMITS, seed=7) as (port, desk), client(port) as connection:
        metadata = decode(connection.recv(timeout=20))
        assert metadata["embodiment"] == "droid_lerobot" and metadata["action_width"] == 8
        assert metadata["state"] == [["joint_position", 7], ["gripper_position", 1]] and metadata["state_rows"] == 1
        assert metadata["bundle"] == "b" * 64 and metadata["limits"] == "1" * 64
        before = None
        for i in range(100):
            observation = droid(i % 3)
            reply = ask(connection, observation)
            np.testing.assert_array_equal(reply["actions"], reply["action"])
            joints = observation["observation/joint_position"]
            np.testing.assert_allclose(reply["actions"][:, :7], joints + 0.001 * np.arange(32)[:, None], atol=1e-5)
            assert reply["actions"].dtype == np.float32 and reply["actions"].shape == (32, 8)
            assert reply["seed"] == 7 + i and reply["review"]["verdict"] == "pass" and reply["stale"] is False
            timing = reply["server_timing"]
            assert 0 <= timing["model_ms"] <= timing["infer_ms"] <= timing["age_ms"]
            assert ("prev_total_ms" in timing) == (before is not None)
            before = timing
        assert desk.count == 100
    assert policy.seeds == list(range(7, 107))


def test_health_and_metrics() -> None:
    with serving(FakePolicy(), LIMITS) as (port, _):
        assert get(port, "/healthz") == (200, "OK\n")
        with client(port) as connection:
            connection.recv(timeout=20)
            ask(connection, droid())
            status, text = get(port, "/metrics")
            assert "cosmos_export_connections 1.0" in text
        assert status == 200
        assert 'cosmos_export_requests_total{outcome="pass"} 1.0' in text
        assert "cosmos_export_own_seconds_count 1.0" in text and 'bundle="' + "b" * 64 in text


def test_the_token() -> None:
    token = "0123456789abcdef"
    with serving(FakePolicy(), LIMITS, token=token) as (port, _):
        for given in (None, "0123456789abcdeF", ""):
            with pytest.raises(InvalidStatus) as caught:
                client(port, given)
            assert caught.value.response.status_code == 401
        assert get(port, "/metrics")[0] == 401
        assert get(port, "/metrics", Authorization=f"Api-Key {token}")[0] == 200
        assert get(port, "/healthz")[0] == 200
        with client(port, token) as connection:
            connection.recv(timeout=20)
            assert "actions" in ask(connection, droid())


def test_pages_in_a_browser_get_no_connection() -> None:
    with serving(FakePolicy()) as (port, _), pytest.raises(InvalidStatus) as caught:
        client(port, origin="http://127.0.0.1")  # type: ignore[arg-type]
    assert caught.value.response.status_code == 403


def test_too_many_connections() -> None:
    with serving(FakePolicy(), max_connections=1) as (port, _), client(port) as first:
        first.recv(timeout=20)
        with pytest.raises(InvalidStatus) as caught:
            client(port)
        assert caught.value.response.status_code == 503


WITHOUT = {k: v for k, v in droid().items() if k != "observation/exterior_image_2_left"}
IMAGE = {"observation/image": samples.picture(0, 540, 640), "prompt": "Go."}
BAD: dict[str, tuple[Any, str]] = {
    "a camera is missing": (WITHOUT, "no picture `exterior_image_2_left`"),
    "an unknown camera": ({**droid(), "observation/head_image": samples.picture()}, "`head_image` has no place"),
    "the whole picture and others": ({**droid(), "observation/image": samples.picture()}, "is the whole picture"),
    "a picture of floats": ({**IMAGE, "observation/image": np.zeros((4, 4, 3))}, "is float64 of shape"),
    "a grey picture": ({**IMAGE, "observation/image": np.zeros((4, 4), np.uint8)}, "is uint8 of shape"),
    "an empty picture": ({**IMAGE, "observation/image": np.zeros((0, 4, 3), np.uint8)}, "is uint8 of shape"),
    "channels first": ({**IMAGE, "observation/image": np.zeros((3, 8, 8), np.uint8)}, "is uint8 of shape"),
    "no prompt": ({k: v for k, v in droid().items() if k != "prompt"}, "`prompt` is NoneType"),
    "a prompt of bytes": ({**droid(), "prompt": b"x"}, "`prompt` is bytes"),
    "a long prompt": ({**droid(), "prompt": "x" * 9000}, "9,000 characters"),
    "half a state": (
        {k: v for k, v in droid().items() if k != "observation/gripper_position"},
        "state without `gripper_position`",
    ),
    "a short state": ({**droid(), "observation/joint_position": np.zeros(6)}, "`joint_position` has shape [6]"),
    "a state that is no number": ({**droid(), "observation/joint_position": np.full(7, np.nan)}, "not finite"),
    "a state of truths": ({**droid(), "observation/joint_position": np.zeros(7, bool)}, "has type bool"),
    "a list": ([1, 2], "no map with keys of text"),
    "keys of bytes": ({b"prompt": "x"}, "odd keys"),
    "nothing": (b"", "not msgpack"),
    "half a message": (encode(droid())[:-1], "not msgpack"),
    "more than a message": (encode(droid()) + b"\xc0", "not msgpack"),
    "a key twice": (b"\x82\xa1a\x01\xa1a\x02", "a key twice"),
    "an extension": (b"\xd4\x05\x00", "an extension type"),
    "a time": (b"\xd6\xff\x00\x00\x00\x00", "no map"),
    "depth": (b"\x91" * 5000, "not msgpack"),
    "a long list that is not there": (b"\xdd\xff\xff\xff\xff", "not msgpack"),
}


def array(**changes: Any) -> bytes:
    """An observation whose picture is described otherwise than it is."""
    fields = {b"__ndarray__": True, b"data": b"\0" * 48, b"dtype": "|u1", b"shape": [4, 4, 3]}
    fields |= {name.encode(): value for name, value in changes.items()}
    return encode({"observation/image": fields, "prompt": "Go."})


BAD |= {
    "objects": (array(dtype="|O"), "no type of numbers"),
    "text": (array(dtype="<U12"), "no type of numbers"),
    "records": (array(dtype="V48"), "no type of numbers"),
    "complex": (array(dtype="<c8", shape=[6]), "no type of numbers"),
    "times": (array(dtype="<M8[s]", shape=[6]), "no type of numbers"),
    "a list of types": (array(dtype=[["a", "|u1"]]), "no type of numbers"),
    "a large shape": (array(shape=[1 << 40, 1 << 40, 3]), "in 48 bytes"),
    "a negative shape": (array(shape=[-4, -4, 3]), "an array of shape"),
    "a shape of truths": (array(shape=[True, 16, 3]), "an array of shape"),
    "many dimensions": (array(shape=[4, 4, 3, 1, 1, 1, 1]), "an array of shape"),
    "a shape that is a number": (array(shape=48), "without a shape"),
    "data that is text": (array(data="0" * 48), "without bytes"),
    "another field": (array(pickle=b"cos\nsystem\n"), "other fields"),
    "truths that are none": (array(dtype="|b1", data=b"\2" * 48), "truth value"),
    "a mark that is false": (array(__ndarray__=False), "other fields"),
    "a number of objects": (
        encode({"prompt": {b"__npgeneric__": True, b"data": b"x", b"dtype": "|O"}}),
        "no type of numbers",
    ),
    "a number that does not fit": (
        encode({"prompt": {b"__npgeneric__": True, b"data": 300, b"dtype": "|u1"}}),
        "does not fit",
    ),
}


@pytest.fixture(scope="module")
def port() -> Any:
    with serving(FakePolicy(), LIMITS) as (opened, _):
        yield opened


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_observation(port: int, name: str) -> None:
    observation, said = BAD[name]
    found = refused(port, observation)
    assert said in found and found.startswith(("CX640", "CX641")), found
    with client(port) as connection:
        connection.recv(timeout=20)
        assert "actions" in ask(connection, droid())


def test_a_text_frame(port: int) -> None:
    with client(port) as connection:
        connection.recv(timeout=20)
        connection.send("hello")
        assert "a text frame" in connection.recv(timeout=20)


def test_a_message_that_is_too_large() -> None:
    with serving(FakePolicy(), max_message_bytes=1 << 20) as (port, _), client(port) as connection:
        connection.recv(timeout=20)
        connection.send(encode(droid()))
        with pytest.raises(ConnectionClosed) as caught:
            connection.recv(timeout=20)
        assert caught.value.rcvd is not None and caught.value.rcvd.code == 1009


def test_what_the_policy_refuses(port: int, caplog: pytest.LogCaptureFixture) -> None:
    assert refused(port, droid(prompt="fail")) == "CX600: the prompt is not one"
    said = refused(port, droid(prompt="bug"))
    assert said.startswith("CX000: unexpected KeyError") and "secret" not in said


def test_actions_outside_the_limits() -> None:
    policy = FakePolicy()
    with serving(policy, LIMITS) as (port, _):
        policy.change = lambda actions: actions + np.float32(1.5)
        assert "CX631: the actions are rejected: jump of joint 0 from the state to row 0" in refused(port, droid())
        policy.change = lambda actions: np.where(np.arange(8) == 7, np.float32(1.4), actions)
        with client(port) as connection:
            connection.recv(timeout=20)
            reply = ask(connection, droid())
            assert reply["review"]["verdict"] == "clip" and (reply["actions"][:, 7] == 1).all()
        policy.change = lambda actions: actions * np.float32("nan")
        assert "CX631: the actions are rejected: finite" in refused(port, droid())
        policy.change = lambda actions: actions
        without = {k: v for k, v in droid().items() if "position" not in k}
        assert "the limits cannot be looked at (jump: no state)" in refused(port, without)
    with serving(policy, None) as (port, _):
        policy.change = lambda actions: actions + np.float32(100)
        with client(port) as connection:
            connection.recv(timeout=20)
            reply = ask(connection, without)
            assert reply["review"] == {"verdict": "pass", "limits": None, "breaches": [], "unchecked": []}
        policy.change = lambda actions: actions * np.float32("inf")
        assert "CX631" in refused(port, droid())


def test_two_clients_and_one_request_at_a_time() -> None:
    policy = FakePolicy()
    policy.wait = 0.003
    with serving(policy, LIMITS) as (port, _):
        found: list[int] = []

        def many(first: int) -> None:
            with client(port) as connection:
                connection.recv(timeout=20)
                for i in range(20):
                    observation = droid(first + i % 2)
                    reply = ask(connection, observation)
                    joints = observation["observation/joint_position"]
                    np.testing.assert_allclose(reply["actions"][0, :7], joints, atol=1e-5)
                    found.append(reply["seed"])

        threads = [threading.Thread(target=many, args=(10 * i,)) for i in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    assert sorted(found) == list(range(40)) and policy.most == 1


def test_the_latest_observation_wins() -> None:
    policy = FakePolicy()
    policy.hold = threading.Event()
    with serving(policy, LIMITS) as (port, desk), client(port) as connection:
        connection.recv(timeout=20)
        connection.send(encode(droid(0)))
        while not policy.running:
            time.sleep(0.01)
        for seed in (1, 2, 3):
            connection.send(encode(droid(seed)))
        time.sleep(0.2)
        policy.hold.set()
        replies = [connection.recv(timeout=20) for _ in range(4)]
        assert [isinstance(reply, str) for reply in replies] == [False, True, True, False]
        assert all("CX642: a later observation came" in str(reply) for reply in replies[1:3])
        for reply, seed in ((replies[0], 0), (replies[3], 3)):
            joints = droid(seed)["observation/joint_position"]
            np.testing.assert_allclose(decode(reply)["actions"][0, :7], joints, atol=1e-5)  # type: ignore[arg-type]
        assert desk.count == 2


def test_deadline() -> None:
    policy = FakePolicy()
    with serving(policy, LIMITS, deadline_s=0.15) as (port, _), client(port) as first, client(port) as second:
        for connection in (first, second):
            connection.recv(timeout=20)
        policy.wait = 0.3
        first.send(encode(droid()))
        while not policy.running:
            time.sleep(0.01)
        said = ask(second, droid())
        assert said.startswith("CX643: the observation waited")
        assert decode(first.recv(timeout=20))["stale"] is True  # type: ignore[arg-type]


def test_who_has_left_is_not_served() -> None:
    policy = FakePolicy()
    policy.hold = threading.Event()
    with serving(policy, LIMITS) as (port, desk), client(port) as first:
        first.recv(timeout=20)
        first.send(encode(droid()))
        while not policy.running:
            time.sleep(0.01)
        second = client(port)
        second.recv(timeout=20)
        second.send(encode(droid(1)))
        time.sleep(0.1)
        second.close()
        time.sleep(0.1)
        policy.hold.set()
        assert "actions" in decode(first.recv(timeout=20))  # type: ignore[arg-type]
        assert "actions" in ask(first, droid())
        assert desk.count == 2


def test_every_request_is_in_the_trail(tmp_path: Path) -> None:
    policy = FakePolicy()
    path = tmp_path / "trail.jsonl"
    with AuditTrail(path) as trail, serving(policy, LIMITS, trail) as (port, _), client(port) as connection:
        connection.recv(timeout=20)
        ask(connection, droid(0))
        ask(connection, droid(0))
        ask(connection, droid(1))
        policy.change = lambda actions: actions + np.float32(5)
        refused(port, droid())
        refused(port, droid(prompt="bug"))
    entries = [json.loads(line) for line in path.read_text().splitlines()]
    assert verify_trail(path).events == {"request": 5}
    assert [entry["outcome"] for entry in entries] == ["pass", "pass", "pass", "reject", "failed"]
    assert entries[0]["result"] == entries[1]["result"] != entries[2]["result"]
    assert entries[0]["inputs"] == entries[1]["inputs"]
    assert len(entries[0]["inputs"]["pictures"]) == 3 and "Pick up" not in path.read_text()
    assert "result" not in entries[3] and entries[3]["review"]["verdict"] == "reject"


@pytest.mark.parametrize("base", ["droid", "image"])
def test_five_hundred_damaged_messages(port: int, base: str) -> None:
    """Each is answered in time, by an error or by actions, and the server goes on."""
    rng = np.random.default_rng(len(base))
    small = {k: v[:4, :4] if "image" in k else v for k, v in droid().items()}
    good = encode(small if base == "droid" else {**IMAGE, "observation/image": samples.picture(0, 6, 6)})
    outcomes = {"actions": 0, "error": 0}
    connection = None
    for _ in range(500):
        data = bytearray(good)
        for _ in range(int(rng.integers(1, 5))):
            kind, at = rng.integers(0, 4), int(rng.integers(0, max(len(data), 1)))
            # Mostly where structure is: the bytes of a picture are free.
            if kind == 0 and data:
                data[at % len(data)] = int(rng.integers(0, 256))
            elif kind == 1:
                del data[at : at + int(rng.integers(1, 40))]
            elif kind == 2:
                data[at:at] = rng.integers(0, 256, int(rng.integers(1, 9)), dtype=np.uint8).tobytes()
            else:
                data[at : at + 1] = data[at : at + 1] * int(rng.integers(2, 5))
        if connection is None:
            connection = client(port)
            connection.recv(timeout=20)
        connection.send(bytes(data))
        reply = connection.recv(timeout=20)
        outcomes["error" if isinstance(reply, str) else "actions"] += 1
        if isinstance(reply, str):
            assert reply.startswith("CX6"), reply
            connection.close()
            connection = None
    if connection is not None:
        connection.close()
    assert outcomes["error"] > 300, outcomes
    with client(port) as again:
        again.recv(timeout=20)
        assert "actions" in ask(again, droid())
