"""The documents of ``--json``: every one names itself and its version, and has the fields that are declared here.

A version grows when a field changes its meaning or goes; fields may be added without. docs/json.md and
docs/json.schema.json are made from these declarations.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cosmos_export.diagnostics import InternalError

_TYPES: Mapping[str, tuple[type, ...]] = {
    "text": (str,), "number": (int, float), "count": (int,), "flag": (bool,), "list": (list, tuple),
    "object": (dict, Mapping), "path": (str,), "null": (type(None),),
}  # fmt: skip
_SCHEMAS: Mapping[str, str] = {
    "text": "string", "number": "number", "count": "integer", "flag": "boolean", "list": "array", "object": "object",
    "path": "string", "null": "null",
}  # fmt: skip


@dataclass(frozen=True)
class Document:
    """The document that one command prints."""

    command: str
    fields: Mapping[str, str]
    """Field → ``TYPE[|TYPE…]: what it is``; a name that ends in ``?`` may be absent."""
    version: int = 1


DOCUMENTS: Mapping[str, Document] = {
    "error": Document(
        "any command that fails",
        {"error": "object: `code`, `message` and `hint`"},
    ),
    "build": Document(
        "build",
        {
            "output": "path|null: the bundle; null with --until",
            "passes": "list: name, form, changes, what was declined and why, seconds",
            "parity": "list: comparisons with diffusers: stage, subject, metric, value, limit, case, passed",
            "parity_note": "text: why the transformer was not compared; empty where it was",
            "recipe": "text: name of the recipe",
            "precision": "object: place → scheme, of what is quantized",
            "gates": "object|null: losses of quantization; null where nothing is quantized",
            "components": "list: components besides the transformer",
            "not_compared": "object: component → why it was not compared",
            "notes": "list: sentences",
            "verdicts": "list: as in the manifest",
            "engines": "list: size, attention, GEMMs, activations, seconds and memory of the build, check",
            "dumps": "list: files of graphs as text",
            "seconds": "number: of the whole build",
            "peak_memory_bytes": "count|null: of all its processes",
            "peak_anonymous_bytes": "count|null: the part that no file backs",
            "stages": "object: stage → seconds and memory",
            "failed?": "object: code, message and hint of the finding that ended it; only in OUTPUT.build.json",
        },
    ),
    "plan": Document(
        "plan",
        {
            "subject": "text: model", "variant": "text: its size", "recipe": "text: name",
            "settings": "list: changes of the recipe", "loop": "text: host or device",
            "components": "list: predicted engines", "loads": "list: work of each workload",
            "fits": "list: each workload on each target, with verdict and predicted time",
            "builds": "object: target → memory, disk and seconds of a build",
            "something_fits": "flag: whether any workload fits on any target",
        },
    ),
    "calibrate": Document(
        "calibrate",
        {
            "output": "path: the scale table", "ranges": "count: activations with a range",
            "pre_scales": "count: linears with factors of channels", "resumed": "flag: it went on after a stop",
            "checkpoint": "text: identity of the weights", "lineage": "object: data, coverage and settings",
        },
    ),
    "quantize": Document(
        "quantize",
        {
            "output": "path: the checkpoint", "format": "text: fp8, int4 or nvfp4",
            "fp8_rounding": "text: exact or modelopt", "quantized": "count: linears in the format",
            "kept": "count: tensors as they were", "size_bytes": "count: of the transformer",
            "policy": "flag: whether steps are mixed as published",
            "buildable": "flag: whether `build` reads the format",
        },
    ),
    "run": Document(
        "run",
        {
            "bundle": "path: as given", "bundle_id": "text: sha256 of its manifest", "mode": "text: of the request",
            "profile": "text: the shape profile that took it", "frames": "count: pixel frames",
            "height": "count: pixels", "width": "count: pixels", "fps": "number: frames per second",
            "sound": "flag: whether sound was generated", "embodiment": "text|null: of an action",
            "actions_beyond_statistics": "object|null: given actions outside their statistics",
            "seed": "count: of the noise", "grid": "text: of the schedule", "steps": "count: of the schedule",
            "guidance": "number: scale", "prompt_tokens": "count: of the prompt",
            "negative_tokens": "count|null: of the negative prompt; null where no step is guided",
            "notes": "list: what the user may not have meant",
            "review": "object|null: what limits did with the actions",
            "outputs": "list: path and size_bytes of each file",
            "timings_s": "object: stage → seconds", "verdicts": "object: what the build of the bundle left open",
        },
    ),
    "inspect": Document(
        "inspect and demo-checkpoint",
        {
            "path": "path: of the checkpoint", "variant": "text: its size", "repository": "text|null: where it is from",
            "revision": "text|null: of the repository", "family": "text: architecture", "precision": "text: of weights",
            "geometry": "object: sizes of the transformer", "towers": "object: tower → parameters, bytes, linears",
            "shared": "object: parts outside the layers", "transformer": "object: parameters and bytes in all",
            "transformer_tensors": "count: in its files", "scheduler": "object: its configuration",
            "distilled_sigmas": "list|null: of a distilled checkpoint",
            "components": "object: component → parameters and bytes", "modalities": "list: what it generates",
            "schedule": "text: of its sampler", "kv_bytes_per_prompt_token": "count: in BF16",
            "step_policy": "object|null: steps with 16-bit activations", "policy": "object|null: of checkpoint.json",
            "policy_unread": "list: fields of the policy that are not read",
            "wants_state": "flag|null: whether a policy is given the robot's state",
            "unused_tensors": "list: name and reason", "ignored_files": "list: name and reason",
            "adapters": "list: files", "unknown_config_keys": "list: keys that the model ignores",
            "conversions": "list: what a build converts, in words",
        },
    ),
    "bundle-verify": Document(
        "bundle verify",
        {
            "bundle": "path: as given", "ok": "flag: whether every check passed",
            "signed_with": "text|null: sha256 of the public key of --key, whose signature holds",
            "checks": "list: path, status (pass, fail, skip) and detail",
        },
    ),
    "bundle-sign": Document(
        "bundle sign",
        {
            "bundle": "path: as given", "bundle_id": "text: sha256 of the manifest that was signed",
            "signed_with": "text: sha256 of the public key",
        },
    ),
    "bundle-show": Document(
        "bundle show",
        {
            "bundle_id": "text: sha256 of the manifest", "model": "object: id and variant",
            "target": "object: name, backend, compute_capability", "recipe": "text: name",
            "modalities": "list: what it generates", "mode": "text|null: whose defaults the schedule has",
            "steps": "count|null: of the schedule", "guidance": "number|null: scale",
            "loop": "text: host or device", "policy": "object|null: what the checkpoint says of its policy",
            "profiles": "list: name, and min, opt and max of each dimension in latent units",
            "codecs": "list: names", "engines": "list: name and size_bytes",
            "verdicts": "list: subject, stage, verdict, note", "files": "count: of the bundle",
            "size_bytes": "count: of all files", "created": "text: time of the build", "tools": "object: versions",
        },
    ),
    "bundle-pack": Document(
        "bundle pack",
        {"bundle": "path: as given", "archive": "path: that was written", "size_bytes": "count: of the archive"},
    ),
    "bundle-unpack": Document(
        "bundle unpack",
        {"archive": "path: as given", "bundle": "path: that was written", "files": "count: besides the manifest"},
    ),
    "bundle-diff": Document(
        "bundle diff",
        {
            "first": "path: as given", "second": "path: as given", "same": "flag: whether nothing differs",
            "settings": "list: name, first, second", "files": "list: path, role, first_bytes, second_bytes",
            "same_files": "count: of both with the same bytes", "same_bytes": "count: their size",
        },
    ),
    "cache-ls": Document("cache ls", {"entries": "list: recorded engines"}),
    "cache-why": Document(
        "cache why",
        {"first": "object: an engine", "second": "object: another", "differ": "list: inputs that differ"},
    ),
    "cache-prune": Document("cache prune", {"forgotten": "list: engines that are no longer recorded"}),
    "bench": Document(
        "bench",
        {
            "benchmark": "text: bench", "schema": "count: of a measurement", "dry_run": "flag: it measures nothing",
            "command": "text: that made it", "subject": "text: what was measured", "model": "text: size",
            "workload": "text: of the request", "recipe": "text: name", "backend": "text: name",
            "device": "text: kind and index", "kernels": "list: that were used", "card": "text|null: GPU",
            "steps": "count: of the schedule", "forwards": "count: of the generator",
            "extrapolated": "text: what was not run in full; empty where all was", "covers": "text: parts of a request",
            "request_s": "number: seconds of a request", "forward_s": "number|null: seconds of a forward",
            "memory_bytes": "count|null: of the device", "components": "list: times of each part",
            "baselines": "list: others in the same run", "baselines_left_out": "list: sentences",
            "published": "list: published times", "during": "object|null: clock and power",
            "machine": "object: processor, cards, versions", "verdicts?": "object: what the build left open",
        },
    ),
    "bench-compare": Document(
        "bench compare",
        {
            "ratios": "list: name, before_s, after_s, ratio", "unlike": "list: what differs between the measurements",
            "regressions": "list: names that are slower than allowed",
        },
    ),
    "doctor": Document(
        "doctor",
        {"findings": "list: check, state, found, hint", "blockers": "count: checks that stand in the way"},
    ),
    "targets": Document("targets", {"targets": "list: records of docs/targets.md"}),
    "recipes-ls": Document("recipes ls", {"recipes": "list: records of docs/precision.md"}),
    "recipes-choose": Document(
        "recipes choose",
        {"chosen": "text: name", "tried": "list: recipe, refusal, weights_bytes, fit, seconds"},
    ),
    "recipes-show": Document("recipes show", {"recipe": "object: a record of docs/precision.md"}),
    "explain": Document(
        "explain",
        {
            "code": "text: such as CX607", "status": "list: exit codes", "kind": "text: family of errors",
            "cause": "text: why it is raised", "example": "text: a case of it", "way_out": "text: what to do",
            "cases": "list: message and hint of each place that raises it",
        },
    ),
    "serve": Document(
        "serve, when the port is open",
        {
            "url": "text: of the port", "protocol": "text: openpi or gr00t",
            "bundle_id": "text: sha256 of the manifest", "embodiment": "text: robot",
            "limits": "text|null: sha256 of the limits; null without limits",
            "verdicts": "object: what the build of the bundle left open",
        },
    ),
    "audit-verify": Document(
        "audit verify",
        {
            "file": "path: as given", "lines": "count: of the trail", "events": "object: event → lines",
            "first": "text|null: time of the first line", "last": "text|null: time of the last line",
            "head": "text: sha256 of the last line, an anchor for later",
        },
    ),
    "version": Document("version", {"packages": "object: name → version, or null where it is not installed"}),
}  # fmt: skip


def labelled(name: str, content: Mapping[str, Any]) -> dict[str, Any]:
    """``content`` as the document ``name``. InternalError CX001 where it has other fields than are declared."""
    document = DOCUMENTS[name]
    fields = {field.removesuffix("?"): text for field, text in document.fields.items()}
    missing = {field for field in document.fields if not field.endswith("?")} - set(content)
    unknown = set(content) - set(fields)
    wrong = {field for field in set(content) & set(fields) if not _is(content[field], fields[field])}
    if missing or unknown or wrong:
        what = f"missing {sorted(missing)}, undeclared {sorted(unknown)}, of another type {sorted(wrong)}"
        raise InternalError("CX001", f"the JSON document `{name}` differs from its declaration: {what}")
    return {"document": name, "version": document.version, **content}


def _is(value: object, declared: str) -> bool:
    kinds = declared.partition(":")[0].split("|")
    return any(isinstance(value, _TYPES[kind]) for kind in kinds) and ("flag" in kinds or not isinstance(value, bool))


def schema() -> dict[str, Any]:
    """JSON Schema of all documents."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Documents of cosmos-export --json",
        "oneOf": [_schema(name, document) for name, document in DOCUMENTS.items()],
    }


def _schema(name: str, document: Document) -> dict[str, Any]:
    properties: dict[str, Any] = {"document": {"const": name}, "version": {"const": document.version}}
    for field, declared in document.fields.items():
        kinds, _, text = declared.partition(": ")
        types = list(dict.fromkeys(_SCHEMAS[kind] for kind in kinds.split("|")))
        properties[field.removesuffix("?")] = {"type": types[0] if len(types) == 1 else types, "description": text}
    required = ["document", "version", *(field for field in document.fields if not field.endswith("?"))]
    return {"title": name, "type": "object", "properties": properties, "required": required}
