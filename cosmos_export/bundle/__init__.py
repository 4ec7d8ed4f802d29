"""The bundle: what a build writes and a runtime reads. A directory with ``manifest.json`` as the only entry point.

Writing is atomic, reading fails closed. Knows the manifest and the file system; imports nothing heavy.
"""

from cosmos_export.bundle.manifest import (
    MANIFEST_NAME,
    SCHEMA_VERSION,
    DimRecord,
    EdgeRecord,
    EngineRecord,
    FileRecord,
    GraphContract,
    InputFile,
    LoopRecord,
    Manifest,
    Model,
    PlanCheck,
    ProfileRecord,
    TargetRecord,
    Tensor,
    Verdict,
    Volatile,
    parse_manifest,
)
from cosmos_export.bundle.verify import Check, Status, VerifyReport, read_bundle, verify_bundle
from cosmos_export.bundle.writer import BundleWriter

__all__ = [
    "MANIFEST_NAME",
    "SCHEMA_VERSION",
    "BundleWriter",
    "Check",
    "DimRecord",
    "EdgeRecord",
    "EngineRecord",
    "FileRecord",
    "GraphContract",
    "InputFile",
    "LoopRecord",
    "Manifest",
    "Model",
    "PlanCheck",
    "ProfileRecord",
    "Status",
    "TargetRecord",
    "Tensor",
    "Verdict",
    "VerifyReport",
    "Volatile",
    "parse_manifest",
    "read_bundle",
    "verify_bundle",
]
