"""GR00T's protocol: ZeroMQ, one request and one reply, msgpack with ``.npy`` arrays.

A request is a map with ``endpoint`` (``ping``, ``get_action``, ``reset``, ``get_modality_config``), ``data`` and, where
the server has one, ``api_token``. An error is a map with ``error``. A client sends its next request after the reply, so
no observation of it can come before another. Nobody can end the server from outside (``kill`` is refused).
"""

from __future__ import annotations

import asyncio
import time
from typing import Any

import numpy as np
import zmq
import zmq.asyncio

from cosmos_export.bundle.embodiment import ColumnGroup
from cosmos_export.diagnostics import UserError
from cosmos_export.serve import replies, wire
from cosmos_export.serve.desk import Answer, Desk
from cosmos_export.serve.observation import from_groot
from cosmos_export.serve.openpi import ListenSettings

ENDPOINTS = ("ping", "get_action", "reset", "get_modality_config")
_LANGUAGE = "annotation.human.task_description"


class GrootServer:
    """The socket and what waits at it."""

    def __init__(self, desk: Desk, settings: ListenSettings) -> None:
        """Open the port. ZMQError where that fails."""
        self._desk, self._settings = desk, settings
        self._tasks: set[asyncio.Task[None]] = set()
        self._context = zmq.asyncio.Context()
        # A router and not a REP socket, so that a ping is answered while the model runs, and the age of a request that
        # waits is known. Clients with REQ sockets see no difference.
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.MAXMSGSIZE, settings.max_message_bytes)
        self._socket.setsockopt(zmq.RCVHWM, 2)
        self._socket.setsockopt(zmq.SNDHWM, 2)
        self._socket.setsockopt(zmq.HANDSHAKE_IVL, 10_000)
        host = f"[{settings.host}]" if ":" in settings.host else settings.host
        self._socket.setsockopt(zmq.IPV6, int(":" in settings.host))
        try:
            self._socket.bind(f"tcp://{host}:{settings.port if settings.port else '*'}")
        except zmq.ZMQError:
            self.close()
            raise
        self.port = int(self._socket.getsockopt_string(zmq.LAST_ENDPOINT).rpartition(":")[2])

    def close(self) -> None:
        """Give the port back."""
        self._socket.close()
        self._context.term()

    async def run(self) -> None:
        """Answer until it is cancelled."""
        try:
            while True:
                frames = await self._socket.recv_multipart()
                received = time.perf_counter()
                if len(frames) != 3 or frames[1]:  # not from a REQ socket
                    continue
                task = asyncio.create_task(self._answer(frames[0], frames[2], received))
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)
        finally:
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _answer(self, client: bytes, data: bytes, received: float) -> None:
        try:
            reply = wire.pack_groot(await self._reply(data, received))
        except asyncio.CancelledError:
            raise
        except Exception as error:  # whatever it was, the client is told and the server goes on; `said` logs it
            reply = wire.pack_groot({"error": replies.said(error)})
        await self._socket.send_multipart([client, b"", reply])

    async def _reply(self, data: bytes, received: float) -> Any:
        try:
            endpoint, given = self._request(data)
            if endpoint == "get_action":
                observation = from_groot(given.get("observation", given), self._desk.policy.robot)
        except UserError:
            self._desk.metrics.messages_refused.inc()
            raise
        if endpoint == "ping":
            return {"status": "ok", "message": "the server is running"}
        if endpoint == "reset":
            return {}
        if endpoint == "get_modality_config":
            return self._modalities()
        if len(self._tasks) > self._settings.max_connections:
            raise UserError("CX646", f"{len(self._tasks)} requests wait; allowed: {self._settings.max_connections}")
        answer = await self._desk.answer(observation, received)
        timing = replies.timing(answer, received, time.perf_counter())
        self._desk.metrics.own.observe(timing["own_ms"] / 1e3)
        return [self._parts(answer), {**replies.facts(answer, self._desk, timing)}]

    def _request(self, data: bytes) -> tuple[str, dict[str, Any]]:
        request = wire.unpack(data)
        if not isinstance(request, dict):
            raise UserError("CX641", f"the message is {type(request).__name__}", "a map with `endpoint` and `data`")
        token = request.get("api_token")
        if not replies.same_token(token if isinstance(token, str) else None, self._settings.token):
            raise UserError("CX647", "the token is missing or wrong", "a client is given it as `api_token`")
        endpoint, given = request.get("endpoint", "get_action"), request.get("data")
        if endpoint not in ENDPOINTS:
            raise UserError("CX641", f"the endpoint is {str(endpoint)[:40]!r}", f"known: {', '.join(ENDPOINTS)}")
        if endpoint == "get_action" and not isinstance(given, dict):
            raise UserError("CX641", "`get_action` without `data`", "a map with `observation`")
        return endpoint, given if isinstance(given, dict) else {}

    def _parts(self, answer: Answer) -> dict[str, Any]:
        """float32 [1, rows, columns] of each part of an action."""
        found, first = {}, 0
        for part in self._desk.policy.robot.parts or (ColumnGroup("action", answer.actions.shape[1]),):
            found[part.name] = np.ascontiguousarray(answer.actions[None, :, first : first + part.columns])
            first += part.columns
        return found

    def _modalities(self) -> dict[str, Any]:
        policy = self._desk.policy
        views = policy.robot.views
        parts = [part.name for part in policy.robot.parts]
        names = {
            "video": [*(views.cameras or (views.whole,))],
            "state": parts,
            "action": parts or ["action"],
            "language": [_LANGUAGE],
        }
        spans = {"action": list(range(policy.robot.chunk))}
        return {
            modality: {
                "__ModalityConfig_class__": True,
                "as_json": {"delta_indices": spans.get(modality, [0]), "modality_keys": keys},
            }
            for modality, keys in names.items()
            if keys
        }
