"""The origin of a bundle, in the two forms that supply chains read: provenance and a bill of materials.

Both say what the manifest says and nothing else: the provenance is an in-toto statement of SLSA v1 (https://slsa.dev),
the bill of materials is CycloneDX 1.6 (ECMA-424) with a model card. Neither has a time or a measured number, so that
two builds of the same inputs write the same bytes; ``volatile`` of the manifest has those. A build writes both into its
bundle, where the manifest lists them.
"""

from __future__ import annotations

import hashlib
import os
import re
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

from cosmos_export.bundle.manifest import FileRecord, Manifest
from cosmos_export.bundle.strict import canonical, encode
from cosmos_export.diagnostics import UserError, shown

PROVENANCE_FILE, BOM_FILE = "provenance.intoto.json", "mlbom.cdx.json"
ENGINES_FILE = "engines/provenance.intoto.json"
"""Provenance of engines that were built later than the bundle, on their GPU."""
STATEMENT_TYPE = "https://in-toto.io/Statement/v1"
PREDICATE_TYPE = "https://slsa.dev/provenance/v1"
BUILD_TYPE = "https://github.com/cosmos-export/cosmos-export/blob/main/docs/bundle.md#provenance"
LOCAL_BUILDER = "https://github.com/cosmos-export/cosmos-export/blob/main/docs/bundle.md#builders"
"""Builder of a bundle whose build does not name another one (`--created-by`): somebody's machine."""
CREATED_BY = "created_by"
"""Entry of the manifest's options: the URI of the builder, such as the workflow of a build service."""
EPOCH = "SOURCE_DATE_EPOCH"
"""Environment variable with the time that a build states in place of now (https://reproducible-builds.org)."""
MAX_URI = 2048
_NAMESPACE = uuid.UUID("6a8e4f0e-5b0e-5d1c-9d53-3a7d2d1a3c60")
"""Namespace of the serial numbers of bills of materials."""


@dataclass(frozen=True)
class DataSource:
    """Data that a bundle was calibrated with, as its lineage records it."""

    name: str
    sha256: str
    count: int
    licence: str | None
    origin: str | None
    """``real`` or ``synthetic``, where it is known."""


def time_of_build() -> datetime:
    """Now, or the time in $SOURCE_DATE_EPOCH, in UTC; CX727 where that is no time."""
    said = os.environ.get(EPOCH)
    if said is None:
        return datetime.now(UTC)
    try:
        if not (said.isascii() and said.isdecimal() and len(said) <= 12):
            raise ValueError("not a count of seconds")
        return datetime.fromtimestamp(int(said), UTC)
    except (ValueError, OverflowError, OSError) as error:
        hint = "seconds since 1970, such as the output of `git log -1 --format=%ct`, or unset it"
        raise UserError("CX727", f"${EPOCH} is {shown(said)}: no time", hint) from error


def require_builder(created_by: str | None) -> None:
    """CX726 where ``created_by`` is no URI."""
    if created_by is None:
        return
    scheme, colon, rest = created_by.partition(":")
    plain = created_by.isascii() and created_by.isprintable() and len(created_by) <= MAX_URI
    if not (plain and colon and rest and re.fullmatch(r"[A-Za-z][A-Za-z0-9+.-]*", scheme)) or " " in created_by:
        raise UserError(
            "CX726",
            f"`--created-by` is {shown(created_by)}: no URI of a builder",
            "for example https://github.com/ORGANISATION/REPOSITORY/.github/workflows/build.yml@refs/heads/main",
        )


def data_sources(lineage: Mapping[str, Any]) -> tuple[DataSource, ...]:
    """The data that ``lineage`` of a scale table names."""
    return tuple(
        DataSource(one["name"], one["sha256"], one["count"], one["licence"], one["origin"])
        for one in lineage.get("sources", ())
    )


def documents(manifest: Manifest, sources: Sequence[DataSource] = ()) -> dict[str, bytes]:
    """Name → contents of both documents for ``manifest``, whose files are those beside them."""
    return {
        PROVENANCE_FILE: canonical(provenance(manifest, sources)),
        BOM_FILE: canonical(bill_of_materials(manifest, sources)),
    }


def provenance(manifest: Manifest, sources: Sequence[DataSource] = ()) -> dict[str, Any]:
    """The in-toto statement: subject is every file, dependencies are the checkpoint, the data and the tools."""
    parameters = {
        "recipe": manifest.recipe,
        "profiles": {profile.name: encode(profile.dims) for profile in manifest.profiles},
        "options": encode(manifest.options),
    }
    made_of = [*_dependencies(manifest, sources), *_tools(manifest)]
    return _statement(manifest, _files(manifest), parameters, made_of, _checks(manifest), builder_of(manifest))


def builder_of(manifest: Manifest) -> str:
    """The URI of who built the bundle."""
    return str(manifest.options.get(CREATED_BY) or LOCAL_BUILDER)


def provenance_of_engines(manifest: Manifest, waiting_id: str) -> dict[str, Any]:
    """The statement of engines that were built on their GPU: into the bundle whose manifest has the SHA-256
    ``waiting_id``, the parent of ``manifest``."""
    engines = [file for file in manifest.files if file.role == "engine"]
    parent = {"name": "bundle that waited for its engines", "digest": {"sha256": waiting_id}}
    return _statement(manifest, engines, {}, [parent, *_tools(manifest)], _engine_checks(manifest), LOCAL_BUILDER)


def _statement(
    manifest: Manifest,
    subject: Iterable[FileRecord],
    parameters: Mapping[str, Any],
    made_of: Iterable[Mapping[str, Any]],
    checks: Iterable[Mapping[str, Any]],
    builder: str,
) -> dict[str, Any]:
    target = {name: value for name, value in asdict(manifest.target).items() if value is not None}
    return {
        "_type": STATEMENT_TYPE,
        "subject": [{"name": file.path, "digest": {"sha256": file.sha256}} for file in subject],
        "predicateType": PREDICATE_TYPE,
        "predicate": {
            "buildDefinition": {
                "buildType": BUILD_TYPE,
                "externalParameters": {"target": target, **parameters},
                "internalParameters": {},
                "resolvedDependencies": list(made_of),
            },
            "runDetails": {
                "builder": {
                    "id": builder,
                    "version": {"cosmos-export": manifest.tools.get("cosmos-export", "unknown")},
                },
                "byproducts": list(checks),
            },
        },
    }


def bill_of_materials(manifest: Manifest, sources: Sequence[DataSource] = ()) -> dict[str, Any]:
    """The CycloneDX document: the bundle as a machine-learning model with its card, and what it is made of."""
    data = [_data_component(source, number) for number, source in enumerate(sources)]
    tools = [_tool_component(name, version) for name, version in sorted(manifest.tools.items())]
    checkpoint = _checkpoint_component(manifest)
    parts = [checkpoint, *data]
    return {
        "$schema": "http://cyclonedx.org/schema/bom-1.6.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "serialNumber": f"urn:uuid:{uuid.uuid5(_NAMESPACE, _contents_digest(manifest))}",
        "version": 1,
        "metadata": {
            "component": {
                "type": "machine-learning-model",
                "bom-ref": "bundle",
                "name": f"{manifest.model.id} ({manifest.recipe}, {manifest.target.name})",
                "description": f"{manifest.model.variant} model, compiled for {manifest.target.name}",
                "hashes": [{"alg": "SHA-256", "content": _contents_digest(manifest)}],
                "modelCard": _model_card(manifest, data),
                "properties": [
                    {"name": f"cosmos-export:{name}", "value": _text(value)}
                    for name, value in sorted(manifest.options.items())
                ],
            },
            "tools": {"components": tools},
        },
        "components": parts,
        "dependencies": [
            {"ref": "bundle", "dependsOn": [part["bom-ref"] for part in parts]},
            *({"ref": part["bom-ref"]} for part in parts),
        ],
    }


def _model_card(manifest: Manifest, data: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    modalities = manifest.options.get("modalities")
    listed = modalities if isinstance(modalities, tuple) else ()
    parameters: dict[str, Any] = {
        "task": f"{manifest.options.get('mode')}: generation of {', '.join(map(str, listed)) or 'nothing'}",
        "architectureFamily": "Mixture-of-Transformers",
        "modelArchitecture": manifest.model.variant,
        "datasets": [{"ref": one["bom-ref"]} for one in data],
    }
    card: dict[str, Any] = {"bom-ref": "model-card", "modelParameters": parameters}
    measured = [
        {"type": f"{verdict.stage}: {verdict.metric}", "value": verdict.verdict, "slice": verdict.subject}
        for verdict in manifest.evaluation
    ]
    card["quantitativeAnalysis"] = {"performanceMetrics": measured}
    limits = [
        f"{verdict.stage} of {verdict.subject}: {verdict.verdict}{f' ({verdict.note})' if verdict.note else ''}"
        for verdict in manifest.evaluation
        if verdict.verdict != "pass"
    ]
    # What a build knows of the data it never saw: nothing. The card says so, and no more.
    limits.append("the data that the checkpoint was trained with, its licence and its intended use are not recorded")
    card["considerations"] = {"technicalLimitations": limits}
    return card


def _checkpoint_component(manifest: Manifest) -> dict[str, Any]:
    found: dict[str, Any] = {
        "type": "machine-learning-model",
        "bom-ref": "checkpoint",
        "name": manifest.model.id,
        "components": [
            {
                "type": "file",
                "bom-ref": f"checkpoint/{file.path}",
                "name": file.path,
                "hashes": [{"alg": "SHA-256", "content": file.sha256}],
            }
            for file in manifest.inputs
        ],
    }
    if manifest.model.revision is not None:
        found["version"] = manifest.model.revision
    return found


def _data_component(source: DataSource, number: int) -> dict[str, Any]:
    found: dict[str, Any] = {
        "type": "data",
        "bom-ref": f"data-{number}",
        "name": source.name,
        "hashes": [{"alg": "SHA-256", "content": source.sha256}],
        "data": [{"type": "dataset", "name": source.name, "description": f"{source.count} samples for calibration"}],
        "properties": [{"name": "cosmos-export:origin", "value": source.origin or "not said"}],
    }
    if source.licence is not None:
        found["licenses"] = [{"license": {"name": source.licence}}]
    return found


def _tool_component(name: str, version: str) -> dict[str, Any]:
    kind = "application" if name == "cosmos-export" else "platform" if name == "python" else "library"
    return {"type": kind, "bom-ref": f"tool/{name}", "name": name, "version": version}


def _dependencies(manifest: Manifest, sources: Sequence[DataSource]) -> Iterator[dict[str, Any]]:
    model = manifest.model
    for file in manifest.inputs:
        found: dict[str, Any] = {"name": f"{model.id}/{file.path}", "digest": {"sha256": file.sha256}}
        if model.revision is not None:
            found["annotations"] = {"revision": model.revision}
        yield found
    precision = manifest.precision
    if precision is not None and precision.calibration is not None:
        yield {"name": "calibration/scales", "digest": {"sha256": precision.calibration.scales_sha256}}
        yield {"name": "calibration/lineage", "digest": {"sha256": precision.calibration.lineage_sha256}}
    for source in sources:
        said = {"licence": source.licence or "not said", "origin": source.origin or "not said"}
        yield {"name": f"data/{source.name}", "digest": {"sha256": source.sha256}, "annotations": said}


def _tools(manifest: Manifest) -> Iterator[dict[str, Any]]:
    for name, version in sorted(manifest.tools.items()):
        yield {"name": name, "uri": f"pkg:generic/{name}@{version}"}


def _checks(manifest: Manifest) -> Iterator[dict[str, Any]]:
    """Findings of the build: verdicts, and the contents of the engines."""
    for verdict in manifest.evaluation:
        said = {"metric": verdict.metric, "verdict": verdict.verdict, "note": verdict.note}
        if verdict.threshold is not None:
            said["limit"] = repr(verdict.threshold)
        yield {"name": f"check/{verdict.stage}/{verdict.subject}", "annotations": said}
    yield from _engine_checks(manifest)


def _engine_checks(manifest: Manifest) -> Iterator[dict[str, Any]]:
    for check in manifest.plan_checks:
        said = {"expected": check.expected, "found": check.found, "verdict": "pass" if check.passed else "fail"}
        yield {"name": f"engine/{check.engine}/{check.check}", "annotations": said}


def _files(manifest: Manifest) -> tuple[FileRecord, ...]:
    """The files that the documents speak of: all but themselves."""
    return tuple(file for file in manifest.files if file.path not in (PROVENANCE_FILE, BOM_FILE))


def _contents_digest(manifest: Manifest) -> str:
    """SHA-256 over names and digests of the files: the same for the same contents, whatever was measured."""
    lines = "".join(f"{file.sha256}  {file.path}\n" for file in sorted(_files(manifest), key=lambda file: file.path))
    return hashlib.sha256(lines.encode()).hexdigest()


def _text(value: object) -> str:
    if isinstance(value, tuple | list):
        return ", ".join(map(_text, value))
    return "" if value is None else str(value)
