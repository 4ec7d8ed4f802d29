"""From a policy to an open port: the golden request first, the port afterwards, and an orderly end."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import signal
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import get_args

import zmq

from cosmos_export import files
from cosmos_export.audit import AuditTrail
from cosmos_export.diagnostics import ToolError, UserError
from cosmos_export.runtime.limits import Limits
from cosmos_export.serve import openpi
from cosmos_export.serve.desk import Desk
from cosmos_export.serve.gr00t import GrootServer
from cosmos_export.serve.metrics import Metrics
from cosmos_export.serve.openpi import ListenSettings
from cosmos_export.serve.policy import ServedPolicy, golden
from cosmos_export.verb_options import Protocol, ServeOptions

PORTS: dict[Protocol, int] = {"openpi": 8000, "gr00t": 5555}
"""Ports that clients of each protocol try by default."""
LEAST_TOKEN = 16
_MAX_TOKEN_BYTES = 4096


def read_token(path: Path) -> str:
    """The token in the file ``path``. UserError CX644: there is none, or it is too short."""
    try:
        token = files.read_bytes(path, _MAX_TOKEN_BYTES).decode("ascii").strip()
    except OSError as error:
        raise UserError("CX644", f"cannot read the token in {path}: {files.reason(error)}") from error
    except UnicodeDecodeError as error:
        raise UserError("CX644", f"the token in {path} is not ASCII text") from error
    if len(token) < LEAST_TOKEN or not token.isprintable() or " " in token:
        hint = "`openssl rand -hex 32 > FILE` makes one"
        raise UserError("CX644", f"the token in {path} has {len(token)} characters; {LEAST_TOKEN} or more", hint)
    return token


def check(options: ServeOptions) -> ListenSettings:
    """Where and how to listen. UserError CX644: options that do not go together."""
    if options.protocol not in get_args(Protocol):
        raise UserError("CX644", f"protocol {options.protocol!r}; known: {', '.join(get_args(Protocol))}")
    host = "127.0.0.1" if options.host == "localhost" else options.host
    try:
        address = ipaddress.ip_address(host)
    except ValueError as error:
        raise UserError("CX644", f"{host!r} is no IP address", "127.0.0.1, ::1, 0.0.0.0 or another") from error
    if not address.is_loopback and options.token is None:
        raise UserError(
            "CX644", f"{host} is reached from other machines, and there is no token",
            "--token-file FILE, or listen on 127.0.0.1 and let `ssh -L` bring clients there",
        )  # fmt: skip
    port = PORTS[options.protocol] if options.port is None else options.port
    for name, number in (("port", port), ("metrics port", options.metrics_port)):
        if number is not None and not 0 <= number <= 65_535:
            raise UserError("CX644", f"{name} {number}; allowed: 0 to 65535")
    if options.deadline_s is not None and not 0 < options.deadline_s <= 3600:
        raise UserError("CX644", f"a deadline of {options.deadline_s} s; allowed: above 0, at most 3600")
    if not files.KIB <= options.max_message_bytes <= files.GIB:
        raise UserError("CX644", f"messages of {options.max_message_bytes:,} bytes; allowed: 1 KiB to 1 GiB")
    if not 1 <= options.max_connections <= 1000:
        raise UserError("CX644", f"{options.max_connections} connections; allowed: 1 to 1000")
    return ListenSettings(host, port, options.token, options.max_message_bytes, options.max_connections)


def serve(
    policy: ServedPolicy,
    options: ServeOptions,
    limits: Limits | None,
    *,
    trail: AuditTrail | None = None,
    ready: Callable[[int], object] = lambda port: None,
) -> int:
    """Serve ``policy`` until SIGINT or SIGTERM comes, and return its number. ``ready`` is given the port when it opens.

    FindingError CX645: the golden request is not what it should be; ToolError CX648: the port cannot be opened. Without
    ``limits`` nothing but what is not finite is rejected, and every reply says so.
    """
    settings = check(options)
    metrics = Metrics(policy.bundle_id, options.protocol)
    desk = Desk(
        policy, limits=limits, metrics=metrics, trail=trail, deadline_s=options.deadline_s, seed=options.seed
    )  # fmt: skip
    try:
        found = golden(policy)
        if trail is not None:
            trail.record("golden", result=found.digest, distance=found.distance)
        return asyncio.run(_run(desk, options, settings, trail, ready))
    finally:
        desk.close()
        if trail is not None:
            trail.record("ended", requests=desk.count)


async def _run(
    desk: Desk,
    options: ServeOptions,
    settings: ListenSettings,
    trail: AuditTrail | None,
    ready: Callable[[int], object],
) -> int:
    loop = asyncio.get_running_loop()
    ended: asyncio.Future[int] = loop.create_future()

    def end(number: int) -> None:
        if not ended.done():
            ended.set_result(number)

    for number in (signal.SIGINT, signal.SIGTERM):
        with contextlib.suppress(ValueError, RuntimeError):  # not in the main thread: who started it ends it
            loop.add_signal_handler(number, end, int(number))
    async with opened(desk, options, settings) as port:
        if trail is not None:
            limits = desk.limits.digest if desk.limits is not None else None
            trail.record("ready", protocol=options.protocol, host=settings.host, port=port, limits=limits)
        ready(port)
        return await ended


@contextlib.asynccontextmanager
async def opened(desk: Desk, options: ServeOptions, settings: ListenSettings) -> AsyncIterator[int]:
    """The port, open while the block runs. ToolError CX648: it cannot be opened."""
    protocol = _openpi if options.protocol == "openpi" else _gr00t
    with desk.metrics.served(options.metrics_port):
        async with protocol(desk, settings) as port:
            yield port


@contextlib.asynccontextmanager
async def _openpi(desk: Desk, settings: ListenSettings) -> AsyncIterator[int]:
    try:
        server = await openpi.start(desk, settings)
    except OSError as error:
        raise _closed(settings, files.reason(error)) from error
    try:
        yield int(next(iter(server.sockets)).getsockname()[1])
    finally:
        server.close()
        await server.wait_closed()


@contextlib.asynccontextmanager
async def _gr00t(desk: Desk, settings: ListenSettings) -> AsyncIterator[int]:
    try:
        server = GrootServer(desk, settings)
    except zmq.ZMQError as error:
        raise _closed(settings, str(error)) from error
    running = asyncio.create_task(server.run())
    try:
        yield server.port
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        server.close()


def _closed(settings: ListenSettings, reason: str) -> ToolError:
    return ToolError(
        "CX648", f"port {settings.port} of {settings.host} cannot be opened: {reason}", "--port with another one"
    )
