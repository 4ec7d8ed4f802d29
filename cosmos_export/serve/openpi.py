"""openpi's protocol: a WebSocket, msgpack in binary frames.

The server speaks first, with a map of metadata. Then there is one reply for each observation, in their order. An error
is a text frame, and the connection is closed with status 1011; an observation that a later one of the same connection
came before is answered by a text frame alone.
"""

from __future__ import annotations

import asyncio
import contextlib
import http
import time
from dataclasses import dataclass

from websockets.asyncio.server import Server, ServerConnection, serve
from websockets.datastructures import Headers
from websockets.exceptions import ConnectionClosed
from websockets.http11 import Request, Response

from cosmos_export.diagnostics import UserError
from cosmos_export.serve import replies, wire
from cosmos_export.serve.desk import Desk
from cosmos_export.serve.metrics import CONTENT_TYPE
from cosmos_export.serve.observation import from_openpi

INTERNAL_ERROR = 1011
HANDSHAKE_S = 10.0


@dataclass(frozen=True)
class ListenSettings:
    """Where a server listens, and what it allows."""

    host: str
    port: int
    token: str | None = None
    max_message_bytes: int = 1 << 24
    max_connections: int = 8


async def start(desk: Desk, settings: ListenSettings) -> Server:
    """Open the port. OSError where that fails."""
    talk = _Talk(desk, settings)
    return await serve(
        talk.connection,
        settings.host,
        settings.port,
        process_request=talk.request,
        origins=[None],  # pages in a browser state one, and have no business with a robot
        compression=None,
        max_size=settings.max_message_bytes,
        max_queue=1,
        open_timeout=HANDSHAKE_S,
        server_header="cosmos-export",
    )


class _Inbox:
    """The newest observation of a connection, and how many it has replaced."""

    def __init__(self) -> None:
        self._message: str | bytes | None = None
        self._received = 0.0
        self._replaced = 0
        self._changed = asyncio.Event()
        self._closed = False

    def put(self, message: str | bytes) -> None:
        self._replaced += self._message is not None
        self._message, self._received = message, time.perf_counter()
        self._changed.set()

    def close(self) -> None:
        self._closed = True
        self._changed.set()

    async def take(self) -> tuple[str | bytes, float, int] | None:
        """The message, when it came and how many before it are not answered; None when no more will come."""
        while self._message is None:
            if self._closed:
                return None
            self._changed.clear()
            await self._changed.wait()
        taken = self._message, self._received, self._replaced
        self._message, self._replaced = None, 0
        return taken


class _Talk:
    def __init__(self, desk: Desk, settings: ListenSettings) -> None:
        self._desk, self._settings = desk, settings
        self._open = 0
        self._metadata = wire.pack(replies.metadata(desk))

    def request(self, connection: ServerConnection, request: Request) -> Response | None:
        """The answer to a plain request or to a connection that is refused; None: it becomes a WebSocket."""
        path = request.path.partition("?")[0]
        if path == "/healthz":
            return _response(http.HTTPStatus.OK, b"OK\n")
        scheme, _, given = request.headers.get("Authorization", "").partition(" ")
        if not replies.same_token(given.strip() if scheme.lower() == "api-key" else None, self._settings.token):
            return _response(http.HTTPStatus.UNAUTHORIZED, b"Authorization: Api-Key TOKEN is needed\n")
        if path == "/metrics":
            return _response(http.HTTPStatus.OK, self._desk.metrics.text(), CONTENT_TYPE)
        if self._open >= self._settings.max_connections:
            return _response(http.HTTPStatus.SERVICE_UNAVAILABLE, b"too many connections\n")
        return None

    async def connection(self, connection: ServerConnection) -> None:
        """Talk with one client until it leaves or makes a mistake."""
        self._open += 1
        self._desk.metrics.connections.set(self._open)
        inbox = _Inbox()
        reader = asyncio.create_task(_read(connection, inbox))
        try:
            await connection.send(self._metadata)
            await self._answer_all(connection, inbox, reader)
        except ConnectionClosed:
            pass
        finally:
            reader.cancel()
            self._open -= 1
            self._desk.metrics.connections.set(self._open)

    async def _answer_all(self, connection: ServerConnection, inbox: _Inbox, reader: asyncio.Task[None]) -> None:
        total_ms: float | None = None
        while (taken := await inbox.take()) is not None:
            message, received, replaced = taken
            for _ in range(replaced):
                self._desk.metrics.superseded.inc()
                await connection.send(str(UserError("CX642", "a later observation came before this one")))
            try:
                reply = await _unless_gone(self._reply(message, received, total_ms), reader)
            except asyncio.CancelledError:
                raise
            except Exception as error:  # as in gr00t: `said` logs it, and the server goes on
                await connection.send(replies.said(error))
                await connection.close(INTERNAL_ERROR, "the observation was refused")
                return
            if reply is None:
                return
            await connection.send(reply)
            total_ms = (time.perf_counter() - received) * 1e3

    async def _reply(self, message: str | bytes, received: float, total_ms: float | None) -> bytes:
        try:
            if isinstance(message, str):
                raise UserError("CX641", "the message is a text frame", "msgpack, in a binary frame")
            observation = from_openpi(wire.unpack(message), self._desk.policy.robot)
        except UserError:
            self._desk.metrics.messages_refused.inc()
            raise
        answer = await self._desk.answer(observation, received)
        timing = replies.timing(answer, received, time.perf_counter())
        self._desk.metrics.own.observe(timing["own_ms"] / 1e3)
        if total_ms is not None:
            timing["prev_total_ms"] = total_ms
        actions = answer.actions
        return wire.pack({"actions": actions, "action": actions, **replies.facts(answer, self._desk, timing)})


async def _read(connection: ServerConnection, inbox: _Inbox) -> None:
    with contextlib.suppress(ConnectionClosed):
        async for message in connection:
            inbox.put(message)
    inbox.close()


async def _unless_gone(reply: asyncio.Future[bytes] | object, reader: asyncio.Task[None]) -> bytes | None:
    """The reply; None where the client leaves first, and a request that still waits is not made."""
    task: asyncio.Task[bytes] = asyncio.ensure_future(reply)  # type: ignore[arg-type]
    try:
        await asyncio.wait({task, reader}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        return None
    finally:
        task.cancel()


def _response(status: http.HTTPStatus, body: bytes, kind: str = "text/plain; charset=utf-8") -> Response:
    headers = Headers()
    headers["Content-Type"] = kind
    headers["Content-Length"] = str(len(body))
    headers["Connection"] = "close"
    return Response(status.value, status.phrase, headers, body)
