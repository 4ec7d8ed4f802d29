"""``cosmos-export bundle verify``: is a bundle what its build wrote? ``bundle show``: what it is and takes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import typer

from cosmos_export import units
from cosmos_export.cli import verbs
from cosmos_export.cli.tables import facts
from cosmos_export.cli.verbs import Verbs
from cosmos_export.verb_options import (
    BundleDiffOptions,
    BundleOptions,
    BundlePackOptions,
    BundleSignOptions,
    BundleUnpackOptions,
    BundleVerifyOptions,
)

if TYPE_CHECKING:
    from cosmos_export.bundle import BundleFiles, Manifest, ProfileRecord, Signed, VerifyReport
    from cosmos_export.bundle.differences import Differences


def register(app: Verbs) -> None:
    """Add the verbs to ``app``."""
    group = verbs.group("bundle", "Verify bundles and show what they are.")
    app.add_typer(group)

    @group.callback()
    def bundle(context: typer.Context) -> None:
        verbs.require_verb(context)

    @group.verb(
        "verify",
        BundleVerifyOptions,
        "cosmos-export bundle verify nano.bundle",
        "cosmos-export bundle verify nano.bundle --json",
    )
    def verify(options: BundleVerifyOptions, as_json: bool) -> None:
        """Check every file of a bundle against its manifest: PASS, FAIL or SKIP for each, exit code 1 on any mismatch.

        It says that the bundle is complete and unchanged since its build. Who built it, only a signature says: with
        --key it is required and checked first. docs/bundle.md has the details.
        """
        from cosmos_export import bundle as bundles
        from cosmos_export.cli import console
        from cosmos_export.diagnostics import ExitCode
        from cosmos_export.runtime.contents import with_contents

        signed = None
        if options.key is None:
            report = bundles.verify_bundle(options.directory, console.progress())
        else:
            files = bundles.open_bundle(options.directory)
            signed = bundles.require_signature(files, options.key)
            report = bundles.verify_files(files, console.progress())
        report = with_contents(report)
        if as_json:
            console.emit_json("bundle-verify", _document(report, signed))
        else:
            for line in _lines(report):
                typer.echo(line)
        console.verdict(_verdict(report, signed), report.ok)
        if not report.ok:
            raise typer.Exit(int(ExitCode.FINDING))

    @group.verb(
        "sign",
        BundleSignOptions,
        "cosmos-export bundle sign nano.bundle --key private.pem",
        "cosmos-export bundle sign nano.bundle --key private.pem --force",
    )
    def sign(options: BundleSignOptions, as_json: bool) -> None:
        """Sign a bundle: `manifest.sig` in it, in the format of OpenSSF Model Signing, which `model_signing` reads.

        Every file is verified first. A key with a passphrase takes it from $COSMOS_EXPORT_KEY_PASSPHRASE. Readers ask
        for the signature with `bundle verify --key`, `run --require-signature` and `serve --require-signature`.
        """
        import os

        from cosmos_export import bundle as bundles
        from cosmos_export.bundle.signature import PASSPHRASE
        from cosmos_export.cli import console

        directory = options.directory
        files = bundles.read_files(directory, console.progress())
        passphrase = os.environ.get(PASSPHRASE)
        signed = bundles.sign(files, options.key, None if passphrase is None else passphrase.encode(), options.force)
        if as_json:
            ids = {"bundle_id": f"sha256:{signed.bundle_id}", "signed_with": f"sha256:{signed.key}"}
            console.emit_json("bundle-sign", {"bundle": str(directory), **ids})
        console.verdict(f"{directory} is signed with the key {signed.key[:16]}", True)

    @group.verb(
        "show",
        BundleOptions,
        "cosmos-export bundle show nano.bundle",
        "cosmos-export bundle show nano.bundle --json",
    )
    def show(options: BundleOptions, as_json: bool) -> None:
        """Show what a bundle was built from and for, the requests it takes, and what was measured. Reads its
        manifest."""
        from cosmos_export.bundle import open_bundle
        from cosmos_export.cli import console

        files = open_bundle(options.directory)
        if as_json:
            console.emit_json("bundle-show", _data(files))
        else:
            console.show(facts(list(_facts(files.manifest).items()), console.out().width))

    @group.verb(
        "pack",
        BundlePackOptions,
        "cosmos-export bundle pack nano.bundle -o nano.tar",
        "cosmos-export bundle pack nano.bundle -o nano.tar --json",
    )
    def pack(options: BundlePackOptions, as_json: bool) -> None:
        """Verify a bundle and write it as one file: a tar archive with the manifest first."""
        from cosmos_export.bundle.archive import pack as packed
        from cosmos_export.cli import console

        size = packed(options.directory, options.output, console.progress())
        if as_json:
            document = {"bundle": str(options.directory), "archive": str(options.output), "size_bytes": size}
            console.emit_json("bundle-pack", document)
        console.verdict(f"{options.output}: {units.size(size)}", True)

    @group.verb(
        "unpack",
        BundleUnpackOptions,
        "cosmos-export bundle unpack nano.tar -o nano.bundle",
        "cosmos-export bundle unpack nano.tar -o nano.bundle --json",
    )
    def unpack(options: BundleUnpackOptions, as_json: bool) -> None:
        """Make a bundle of an archive of `bundle pack`. Every file is verified as it is written."""
        from cosmos_export.bundle.archive import unpack as unpacked
        from cosmos_export.cli import console

        manifest = unpacked(options.archive, options.output, console.progress())
        if as_json:
            document = {"archive": str(options.archive), "bundle": str(options.output), "files": len(manifest.files)}
            console.emit_json("bundle-unpack", document)
        console.verdict(f"{options.output}: {_files(len(manifest.files))}, verified", True)

    @group.verb(
        "diff",
        BundleDiffOptions,
        "cosmos-export bundle diff nano.bundle nano-style.bundle",
        "cosmos-export bundle diff nano.bundle nano-style.bundle --json",
    )
    def diff(options: BundleDiffOptions, as_json: bool) -> None:
        """Show in which settings and files two bundles differ; exit code 1 where they do. Reads their manifests.

        Measurements and times of builds are not compared.
        """
        from cosmos_export.bundle import open_bundle
        from cosmos_export.bundle.differences import differences
        from cosmos_export.cli import console
        from cosmos_export.diagnostics import ExitCode

        found = differences(open_bundle(options.first).manifest, open_bundle(options.second).manifest)
        if as_json:
            bundles = {"first": str(options.first), "second": str(options.second)}
            console.emit_json("bundle-diff", {**bundles, "same": found.none, **asdict(found)})
        else:
            for line in _differences(found):
                typer.echo(line)
        same = f"{_files(found.same_files)} of {units.size(found.same_bytes)} are the same"
        what = (
            "they do the same"
            if found.none
            else f"{len(found.settings)} settings and {_files(len(found.files))} differ"
        )
        console.verdict(f"{what}; {same}", found.none)
        if not found.none:
            raise typer.Exit(int(ExitCode.FINDING))


_LONGEST = 100


def _differences(found: Differences) -> Iterator[str]:
    """A line for each setting and each file."""
    for setting in found.settings:
        first, second = (_short(value) for value in (setting.first, setting.second))
        yield f"{_printable(setting.name)}: {first} → {second}"
    for file in found.files:
        sizes = [("none" if size is None else units.size(size)) for size in (file.first_bytes, file.second_bytes)]
        yield f"{_printable(file.path)} ({file.role}): {sizes[0]} → {sizes[1]}"


def _short(value: object) -> str:
    text = "none" if value is None else _printable(str(value))
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"


def _data(files: BundleFiles) -> dict[str, Any]:
    """The document of `bundle show --json`: the same facts as values."""
    manifest = files.manifest
    options, sizes = manifest.options, {record.path: record.size_bytes for record in manifest.files}
    return {
        "bundle_id": f"sha256:{files.bundle_id}",
        "model": {"id": manifest.model.id, "variant": manifest.model.variant},
        "target": {
            "name": manifest.target.name, "backend": manifest.target.backend,
            "compute_capability": manifest.target.compute_capability,
        },
        "recipe": manifest.recipe,
        "modalities": list(_listed(options.get("modalities"))),
        "mode": options.get("mode"),
        "steps": options.get("schedule.steps"),
        "guidance": options.get("schedule.guidance"),
        "loop": "device" if _on_device(manifest) else "host",
        "policy": None if manifest.request.policy is None else asdict(manifest.request.policy),
        "profiles": [
            {"name": p.name, "dims": {name: asdict(span) for name, span in p.dims.items()}} for p in manifest.profiles
        ],
        "codecs": _codecs(manifest),
        "engines": [{"name": e.name, "size_bytes": sizes.get(e.path)} for e in manifest.engines],
        "verdicts": [
            {"subject": v.subject, "stage": v.stage, "verdict": v.verdict, "note": v.note} for v in manifest.evaluation
        ],
        "files": len(sizes),
        "size_bytes": sum(sizes.values()),
        "created": manifest.volatile.created,
        "tools": dict(manifest.tools),
    }  # fmt: skip


def _on_device(manifest: Manifest) -> bool:
    return manifest.loop is not None and bool(manifest.loop.segments)


def _codecs(manifest: Manifest) -> list[str]:
    from cosmos_export.runtime.generate_options import SOUND_DECODER

    return [*manifest.streams, *(name for name in manifest.graphs if name == SOUND_DECODER)]


def _facts(manifest: Manifest) -> dict[str, Any]:
    options, target = manifest.options, manifest.target
    loop = "on the device" if _on_device(manifest) else "on the host"
    guidance = options.get("schedule.guidance")
    sizes = {record.path: record.size_bytes for record in manifest.files}
    engines = [f"{e.name}: {units.size(sizes.get(e.path, 0))}" for e in manifest.engines] or ["none"]
    return {
        "model": f"{manifest.model.id} ({manifest.model.variant})",
        "target": ", ".join(filter(None, (target.name, target.backend, target.compute_capability))),
        "recipe": manifest.recipe,
        "generates": ", ".join(str(name) for name in _listed(options.get("modalities"))),
        "mode": f"{options.get('mode')}, {options.get('schedule.steps')} steps, guidance {guidance}, loop {loop}",
        **_policy(manifest),
        "profiles": [f"{p.name}: {_takes(p, manifest)}" for p in manifest.profiles],
        "codecs": ", ".join(_codecs(manifest)) or "none",
        "engines": engines,
        "checked": _checked(manifest) or ["nothing was compared"],
        "size": f"{units.size(sum(sizes.values()))} in {_files(len(sizes))}",
        "built": f"{manifest.volatile.created} by cosmos-export {manifest.tools.get('cosmos-export', 'unknown')}",
    }  # fmt: skip


def _policy(manifest: Manifest) -> dict[str, str]:
    """The policy of the bundle's checkpoint, where it is one."""
    found = None if manifest.request is None else manifest.request.policy
    if found is None:
        return {}
    said = {
        "columns": found.width, "actions in a chunk": found.chunk, "frames per second": found.fps,
    }  # fmt: skip
    numbers = [f"{value:g} {what}" for what, value in said.items() if value is not None]
    parts = [found.domain or "of no domain", *numbers]
    robots = () if manifest.request.action is None else manifest.request.action.embodiments
    if len(robots) == 1 and robots[0].history:
        parts.append(f"is given {robots[0].history} of the robot's state (run --state)")
    if len(robots) == 1 and robots[0].views.cameras:
        views = robots[0].views
        parts.append(f"sees {', '.join(views.short or views.cameras)} in one picture ({views.layout})")
    return {"policy": ", ".join(parts)}


def _checked(manifest: Manifest) -> list[str]:
    """Checks that passed, by subject; for the others the reason, those with one reason together."""
    passed: dict[str, list[str]] = {}
    others: dict[str, list[str]] = {}
    for v in manifest.evaluation:
        if v.verdict == "pass":
            passed.setdefault(v.subject, []).append(v.stage)
        else:
            others.setdefault(f"{v.verdict}{f' ({v.note})' * bool(v.note)}", []).append(f"{v.stage} of {v.subject}")
    lines = [f"{subject}: pass ({', '.join(stages)})" for subject, stages in passed.items()]
    return lines + [f"{reason}: {', '.join(what)}" for reason, what in others.items()]


def _listed(value: object) -> tuple[object, ...]:
    return value if isinstance(value, tuple) else () if value is None else (value,)


def _takes(profile: ProfileRecord, manifest: Manifest) -> str:
    """The requests of ``profile`` in the user's terms."""
    from cosmos_export.runtime.fitting import allowed

    shown = [name for name, span in profile.dims.items() if span.max or name not in ("sound_len", "action_len")]
    return ", ".join(allowed(name, profile.dims[name], manifest.request) for name in shown)


_LABELS = {"pass": "PASS", "fail": "FAIL", "skipped": "SKIP"}


def _lines(report: VerifyReport) -> list[str]:
    last = sorted(report.checks, key=lambda check: check.status.value == "fail")  # where it is seen
    return [
        f"{_LABELS[check.status.value]}  {_printable(check.path)}" + (f": {check.detail}" if check.detail else "")
        for check in last
    ]


def _verdict(report: VerifyReport, signed: Signed | None) -> str:
    if report.ok and report.manifest is not None:
        size = sum(record.size_bytes for record in report.manifest.files)
        what = f"{_files(len(report.manifest.files))}, {size:,} bytes, as the manifest says"
        return f"PASS: {report.bundle}: {what}{_signature(report, signed)}"
    first, count = _printable(report.failures[0].path), len(report.failures)
    failed = first if count == 1 else f"{first} and {count - 1} more"
    return f"FAIL: {report.bundle}: {failed}, of {len(report.checks)} checks; do not use this bundle"


def _signature(report: VerifyReport, signed: Signed | None) -> str:
    if signed is not None:
        return f"; signed with the key {signed.key[:16]}"
    present = report.files is not None and report.files.has_signature
    return "; its signature is not checked: pass --key PUBLIC.pem" if present else ""


def _document(report: VerifyReport, signed: Signed | None) -> dict[str, Any]:
    return {
        "bundle": str(report.bundle),
        "ok": report.ok,
        "signed_with": None if signed is None else f"sha256:{signed.key}",
        "checks": [
            {"path": check.path, "status": check.status.value, "detail": check.detail} for check in report.checks
        ],
    }


def _printable(path: str) -> str:
    """A name found on disk may hold anything, escape sequences of the terminal included."""
    return path if path.isprintable() else ascii(path)


def _files(count: int) -> str:
    return f"{count} file" + ("" if count == 1 else "s")
