"""Targets: one description per GPU, shape profiles, and the backends that turn graphs into engines.

Importing this package imports no backend.
"""

from cosmos_export.targets.description import Target, load_target, target_names

__all__ = ["Target", "load_target", "target_names"]
