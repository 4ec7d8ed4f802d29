"""Lines of an audit trail for a bundle and for single requests, for `run` and `serve` alike."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cosmos_export.audit import AuditTrail
from cosmos_export.bundle import open_verdicts
from cosmos_export.diagnostics import CosmosExportError
from cosmos_export.release import VERSION
from cosmos_export.runtime.model import Generation, LoadedModel
from cosmos_export.runtime.request import Request
from cosmos_export.runtime.results import Written

OUTCOMES = {"CX631": "reject", "CX643": "late"}
"""Outcomes of requests by the code that ends them; any other is ``refused``."""


def array_digest(array: NDArray[Any]) -> str:
    """SHA-256 of type, shape and bytes of ``array``, in hexadecimal digits."""
    digest = hashlib.sha256(f"{array.dtype.str} {list(array.shape)} ".encode())
    digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def record_opened(trail: AuditTrail | None, model: LoadedModel) -> None:
    """Write that the bundle of ``model``, which is loaded, was built, verified and loaded, if there is a ``trail``."""
    if trail is None:
        return
    manifest, verdicts = model.manifest, open_verdicts(model.manifest)
    trail.record(
        "built", bundle=model.bundle_id, model=manifest.model.id, target=manifest.target.name, recipe=manifest.recipe,
        created=manifest.volatile.created, version=manifest.tools.get("cosmos-export"),
    )  # fmt: skip
    facts = {"failed": list(verdicts.failed), "not_measured": list(verdicts.not_measured)}
    trail.record("verified", bundle=model.bundle_id, **facts)
    running = model.load().bundle.executor
    trail.record("loaded", backend=running.name, device=running.device, version=VERSION)


@contextmanager
def recorded(trail: AuditTrail | None, request: Request) -> Iterator[dict[str, Any]]:
    """A line for ``request`` when the block ends, with what was put into the dictionary, also where it fails."""
    facts: dict[str, Any] = {"seed": request.seed}
    started = time.perf_counter()
    try:
        yield facts
        facts.setdefault("outcome", "made")
    except CosmosExportError as error:
        facts |= {"outcome": OUTCOMES.get(error.code, "refused"), "error": error.code}
        raise
    except BaseException:
        facts["outcome"] = "failed"
        raise
    finally:
        if trail is not None:
            seconds = round(time.perf_counter() - started, 6)
            trail.record("request", inputs=_inputs(request), **facts, seconds=seconds)


def _inputs(request: Request) -> dict[str, Any]:
    """Digests of what decides the result."""
    given = {
        "prompt": request.input_ids,
        "negative": request.negative_ids,
        "pictures": request.pixels,
        "actions": None if request.action is None else request.action.given,
        **{f"noise {name}": value for name, value in sorted(request.noise.items())},
    }
    return {"mode": request.mode, **{name: array_digest(value) for name, value in given.items() if value is not None}}


def results(made: Generation, written: Written) -> dict[str, Any]:
    """Digests of what was sampled and, where actions were reviewed, the verdict."""
    found: dict[str, Any] = {"result": {name: array_digest(value) for name, value in sorted(made.latents.items())}}
    if written.review is not None:
        found |= {"outcome": written.review.verdict, "review": written.review.document}
    return found
