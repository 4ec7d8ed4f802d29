"""One request at a time through a policy: how long it waited, what was decided, and what was recorded of it."""

from __future__ import annotations

import asyncio
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from cosmos_export.audit import AuditTrail
from cosmos_export.diagnostics import CosmosExportError, UserError
from cosmos_export.runtime.embodiments import Actions
from cosmos_export.runtime.limits import Limits, Review, review
from cosmos_export.runtime.recorded import OUTCOMES, array_digest
from cosmos_export.serve.metrics import Metrics
from cosmos_export.serve.observation import Observation
from cosmos_export.serve.policy import ServedPolicy

MAX_SEED = 2**31


@dataclass(frozen=True)
class Answer:
    """The answer to one observation."""

    actions: Actions
    review: Review
    seed: int
    stale: bool
    """Whether it is older than the deadline."""
    waited_s: float
    prepare_s: float
    model_s: float
    started: float
    """Times are those of `time.perf_counter`."""
    ended: float


class Desk:
    """Where observations of all connections come in, and wait for each other in the order in which they came."""

    def __init__(
        self,
        policy: ServedPolicy,
        *,
        limits: Limits | None,
        metrics: Metrics,
        trail: AuditTrail | None = None,
        deadline_s: float | None = None,
        seed: int = 0,
    ) -> None:
        """UserError CX632: ``limits`` of another robot. ``seed`` is that of the first request; each has the next."""
        if limits is not None:
            limits.require(policy.width, policy.units)
            if limits.needs_state and sum(part.columns for part in policy.robot.parts) != policy.width:
                raise UserError(
                    "CX632", f"limits with `max_jump`, and observations of `{policy.robot.name}` have no state that is "
                    "an action's columns", "leave `max_jump` out",
                )  # fmt: skip
        self.policy = policy
        self.metrics = metrics
        self.limits = limits
        self._trail, self._deadline_s = trail, deadline_s
        self._seed, self._count = seed, 0
        self._lock = threading.Lock()
        self._thread = ThreadPoolExecutor(1, "policy")
        # Digests of pictures take milliseconds: they are made while the model runs.
        self._digests = ThreadPoolExecutor(1, "digests")

    @property
    def count(self) -> int:
        """Requests so far."""
        return self._count

    async def answer(self, observation: Observation, received: float) -> Answer:
        """The answer to ``observation``, which came in at ``received``.

        UserError CX643: it waited longer than the deadline; FindingError CX631: the actions are rejected; and whatever
        the policy raises. A request whose task is cancelled while it waits is not made.
        """
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._work, observation, received)

    def close(self) -> None:
        """Wait for the request that is being made; none follows it."""
        self._thread.shutdown(cancel_futures=True)
        self._digests.shutdown()

    def _work(self, observation: Observation, received: float) -> Answer:
        started = time.perf_counter()
        with self._lock:
            seed = (self._seed + self._count) % MAX_SEED
            self._count += 1
        inputs = None if self._trail is None else self._digests.submit(lambda: observation.digests)
        facts: dict[str, Any] = {"seed": seed, "waited_s": round(started - received, 6)}
        try:
            answer, outcome = self._made(observation, received, started, seed, facts), "pass"
        except CosmosExportError as error:
            outcome = OUTCOMES.get(error.code, "refused")
            self._record(inputs, outcome, {**facts, "error": error.code})
            raise
        except BaseException:
            self._record(inputs, "failed", facts)
            raise
        outcome = answer.review.verdict
        self._record(inputs, outcome, {**facts, "result": array_digest(answer.actions)})
        return answer

    def _made(
        self, observation: Observation, received: float, started: float, seed: int, facts: dict[str, Any]
    ) -> Answer:
        waited = started - received
        if self._deadline_s is not None and waited > self._deadline_s:
            raise UserError(
                "CX643", f"the observation waited {waited:.3f} s; the deadline is {self._deadline_s:g} s",
                "send fewer, or from fewer robots",
            )  # fmt: skip
        chunk = self.policy.act(observation, seed)
        age = time.perf_counter() - received
        found = review(chunk.actions, self.limits, fps=self.policy.fps, state=observation.now, age_s=age)
        facts |= {"review": found.document, "prepare_s": round(chunk.prepare_s, 6), "model_s": round(chunk.model_s, 6)}
        if found.actions is not None and found.unchecked:
            raise UserError(
                "CX640", f"the limits cannot be looked at ({'; '.join(found.unchecked)})",
                f"observations with {', '.join(f'`{part.name}`' for part in self.policy.robot.parts)}",
            )  # fmt: skip
        actions = found.require()
        stale = self._deadline_s is not None and age > self._deadline_s
        self.metrics.model.observe(chunk.model_s)
        self.metrics.prepare.observe(chunk.prepare_s)
        return Answer(actions, found, seed, stale, waited, chunk.prepare_s, chunk.model_s, started, time.perf_counter())

    def _record(self, inputs: Future[dict[str, Any]] | None, outcome: str, facts: dict[str, Any]) -> None:
        self.metrics.requests.labels(outcome).inc()
        if self._trail is not None and inputs is not None:
            self._trail.record("request", inputs=inputs.result(), outcome=outcome, **facts)
