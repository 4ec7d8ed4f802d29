"""Counters and times of a server, for Prometheus."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info, generate_latest, start_http_server

from cosmos_export import files
from cosmos_export.diagnostics import ToolError

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
OUTCOMES = ("pass", "clip", "reject", "late", "refused", "failed")
_MODEL_S = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)
_OWN_S = (0.0005, 0.001, 0.002, 0.003, 0.005, 0.01, 0.02, 0.05, 0.1)


class Metrics:
    """The counters of one server."""

    def __init__(self, bundle_id: str, protocol: str) -> None:
        self._registry = CollectorRegistry()
        self.requests = Counter(
            "cosmos_export_requests", "Observations by what became of them", ("outcome",), registry=self._registry
        )
        for outcome in OUTCOMES:
            self.requests.labels(outcome)
        self.messages_refused = Counter(
            "cosmos_export_messages_refused", "Messages that are no observation", registry=self._registry
        )
        self.superseded = Counter(
            "cosmos_export_superseded", "Observations that a later one came before", registry=self._registry
        )
        self.connections = Gauge("cosmos_export_connections", "Open connections", registry=self._registry)
        self.model = Histogram(
            "cosmos_export_model_seconds", "Time of the model", buckets=_MODEL_S, registry=self._registry
        )
        self.prepare = Histogram(
            "cosmos_export_prepare_seconds", "Time from observation to request", buckets=_OWN_S, registry=self._registry
        )
        self.own = Histogram(
            "cosmos_export_own_seconds",
            "Time of the server beside waiting, preparing and the model",
            buckets=_OWN_S,
            registry=self._registry,
        )
        Info("cosmos_export_bundle", "What is served", registry=self._registry).info(
            {"bundle": bundle_id, "protocol": protocol}
        )

    def text(self) -> bytes:
        """All of it, as Prometheus reads it."""
        return generate_latest(self._registry)

    @contextmanager
    def served(self, port: int | None) -> Iterator[None]:
        """`text` over HTTP at ``port`` of this machine alone, in the block; nowhere where it is None.

        ToolError CX648: the port cannot be opened.
        """
        if port is None:
            yield
            return
        try:
            server, thread = start_http_server(port, "127.0.0.1", self._registry)
        except OSError as error:
            raise ToolError(
                "CX648", f"port {port} for metrics cannot be opened: {files.reason(error)}", "--metrics-port"
            ) from error
        try:
            yield
        finally:
            server.shutdown()
            server.server_close()
            thread.join()
