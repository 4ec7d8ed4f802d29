"""A policy bundle behind the protocols that robots speak: openpi's WebSocket and GR00T's ZeroMQ.

Importing this package imports no server library; `server` does, and they come with the extra `serve`.
"""

from importlib.util import find_spec

from cosmos_export.diagnostics import UnsupportedError

PACKAGES = {"websockets": "websockets", "msgpack": "msgpack", "zmq": "pyzmq", "prometheus_client": "prometheus-client"}
"""Module → package of each library that a server needs."""


def require_installed() -> None:
    """UnsupportedError CX802 where a library of a server is not installed."""
    missing = [package for module, package in PACKAGES.items() if find_spec(module) is None]
    if missing:
        raise UnsupportedError(
            "CX802",
            f"`serve` needs {', '.join(missing)}, which is not installed",
            "pip install '.[run,serve]' in the checkout",
        )
