"""The contents of replies besides actions, for both protocols."""

from __future__ import annotations

import hmac
import logging
from typing import Any

from cosmos_export.diagnostics import CosmosExportError
from cosmos_export.printable import printable
from cosmos_export.serve.desk import Answer, Desk

_logger = logging.getLogger("cosmos_export")


def metadata(desk: Desk) -> dict[str, Any]:
    """Description of the policy that a client gets before its first request."""
    policy = desk.policy
    views, parts = policy.robot.views, [[part.name, part.columns] for part in policy.robot.parts]
    return {
        "server": "cosmos-export",
        "bundle": policy.bundle_id,
        "embodiment": policy.robot.name,
        "action_parts": parts,
        "action_width": policy.width,
        "action_units": policy.units,
        "fps": policy.fps,
        "cameras": [views.whole, *views.cameras],
        "image_resolution": list(views.size) if views.size else None,
        "state": parts,
        "state_rows": policy.robot.history,
        "limits": None if desk.limits is None else desk.limits.digest,
    }


def facts(answer: Answer, desk: Desk, timing: dict[str, float]) -> dict[str, Any]:
    """The contents of a reply besides its actions."""
    return {
        "server_timing": timing,
        "review": answer.review.document,
        "stale": answer.stale,
        "seed": answer.seed,
        "bundle": desk.policy.bundle_id,
    }


def timing(answer: Answer, received: float, now: float) -> dict[str, float]:
    """Milliseconds; ``own_ms`` is the server's time beside waiting, preparing and the model."""
    own = (now - received) - answer.waited_s - answer.prepare_s - answer.model_s
    return {
        "infer_ms": (answer.prepare_s + answer.model_s) * 1e3,
        "model_ms": answer.model_s * 1e3,
        "prepare_ms": answer.prepare_s * 1e3,
        "wait_ms": answer.waited_s * 1e3,
        "age_ms": (now - received) * 1e3,
        "own_ms": own * 1e3,
    }


def said(error: BaseException) -> str:
    """Description of ``error`` for a client; of an unexpected one the kind alone."""
    if isinstance(error, CosmosExportError):
        _logger.warning("refused: %s", printable(str(error)))
        return str(error)
    _logger.error("unexpected %s while a request was answered", type(error).__name__, exc_info=error)
    return f"CX000: unexpected {type(error).__name__} in the server; its log has more"


def same_token(given: str | None, token: str | None) -> bool:
    """Whether ``given`` is the token, in the same time whatever is wrong with it."""
    if token is None:
        return True
    return given is not None and hmac.compare_digest(given.encode("utf-8", "replace"), token.encode())
