"""The golden request of a policy: what its bundle gave when it was built, for a server to compare before it opens."""

from __future__ import annotations

from pathlib import Path

from cosmos_export.bundle import BundleFiles, GoldenRecord
from cosmos_export.compiler.job import Job
from cosmos_export.diagnostics import UnsupportedError, UserError
from cosmos_export.runtime.model import LoadedModel
from cosmos_export.sampling import MODES
from cosmos_export.serve.policy import GOLDEN_SEED, BundlePolicy
from cosmos_export.targets.backends import reference_backend
from cosmos_export.verb_options import PolicyOptions

LIMIT = 1e-3
"""Relative L2 of the same models in fp32 on another CPU: ten times what whole requests are held to here."""
LIMIT_ELSEWHERE = 0.5
"""Engines round otherwise, and what a recipe loses is for the gates to say. This is for engines that compute something
else: a result that is unrelated is 1.4 away, and one of zeros 1."""


def golden_record(job: Job, root: Path) -> GoldenRecord | None:
    """The golden request through the bundle at ``root``, on the reference backend; None where the build is for another
    mode, or the bundle acts for no robot by itself."""
    if not MODES[job.mode].state:
        return None
    with LoadedModel(BundleFiles(root), backend=reference_backend().name, device="cpu", resident=False) as model:
        try:
            policy = BundlePolicy(model, PolicyOptions())
            policy.require()
        except (UserError, UnsupportedError):
            return None
        actions = policy.act(policy.example(), GOLDEN_SEED).actions
    rows = tuple(tuple(float(value) for value in row) for row in actions)
    return GoldenRecord(policy.robot.name, GOLDEN_SEED, rows, LIMIT, LIMIT_ELSEWHERE)
