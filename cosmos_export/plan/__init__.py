"""Predictions of what a build costs and how its bundle runs, before either exists. No torch.

Everything follows from numbers that the compiler works with itself: the tensors of the geometry, the profiles, the
schedule, the targets. Constants that were measured stand in tables with where they come from.
"""

from cosmos_export.plan.choose import AUTO, Tried, choose
from cosmos_export.plan.estimate import Estimate, PlanRequest, estimate, offered_bytes
from cosmos_export.plan.precision import PlannedPrecision, precision
from cosmos_export.plan.subject import Subject, from_checkpoint, published_subject
from cosmos_export.plan.workload import Workload, parse_workload

__all__ = [
    "AUTO",
    "Estimate",
    "PlanRequest",
    "PlannedPrecision",
    "Subject",
    "Tried",
    "Workload",
    "choose",
    "estimate",
    "from_checkpoint",
    "offered_bytes",
    "parse_workload",
    "precision",
    "published_subject",
]
