"""``cosmos-export bundle verify``: is a bundle what its build wrote? ``bundle show``: what it is and takes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cosmos_export.cli.verbs import Verbs, require_verb

if TYPE_CHECKING:
    from cosmos_export.bundle import Manifest, ProfileRecord, VerifyReport


def register(app: typer.Typer) -> None:
    """Add the verbs to ``app``."""
    group = Verbs(name="bundle", help="Look after bundles.", invoke_without_command=True, rich_markup_mode=None)
    app.add_typer(group)

    @group.callback()
    def bundle(context: typer.Context) -> None:
        require_verb(context)

    @group.command("verify")
    def verify(
        directory: Annotated[Path, typer.Argument(metavar="DIR", help="The bundle.", show_default=False)],
        as_json: Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")] = False,
    ) -> None:
        """Check every file of a bundle against its manifest: PASS, FAIL or SKIP for each, exit code 1 on any mismatch.

        It says that the bundle is complete and unchanged since its build. It does not say who built it: the hashes lie
        beside the files. docs/bundle.md has the details.
        """
        from cosmos_export.bundle import verify_bundle
        from cosmos_export.cli import console
        from cosmos_export.diagnostics import ExitCode
        from cosmos_export.runtime.contents import with_contents

        report = with_contents(verify_bundle(directory, console.progress()))
        if as_json:
            console.emit_json(_document(report))
        else:
            for line in _lines(report):
                typer.echo(line)
        console.verdict(_verdict(report), report.ok)
        if not report.ok:
            raise typer.Exit(int(ExitCode.FINDING))

    @group.command("show")
    def show(
        directory: Annotated[Path, typer.Argument(metavar="DIR", help="The bundle.", show_default=False)],
        as_json: Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")] = False,
    ) -> None:
        """What a bundle was built from and for, the requests it takes, and what was measured. Reads its manifest."""
        from cosmos_export.bundle import read_manifest
        from cosmos_export.cli import console

        facts = _facts(read_manifest(directory))
        if as_json:
            console.emit_json(facts)
            return
        for name, value in facts.items():
            first, *rest = value if isinstance(value, list) else [value]
            typer.echo(f"{name:<12}{_printable(str(first))}")
            for line in rest:
                typer.echo(f"{'':<12}{_printable(str(line))}")


def _facts(manifest: Manifest) -> dict[str, Any]:
    from cosmos_export.runtime.generate_options import SOUND_DECODER

    options, target = manifest.options, manifest.target
    loop = "on the device" if manifest.loop is not None and manifest.loop.segments else "on the host"
    guidance = options.get("schedule.guidance")
    sizes = {record.path: record.size_bytes for record in manifest.files}
    engines = [f"{e.name}: {sizes.get(e.path, 0) / 1e6:,.1f} MB" for e in manifest.engines] or ["none"]
    codecs = [*manifest.streams, *(name for name in manifest.graphs if name == SOUND_DECODER)]
    return {
        "model": f"{manifest.model.id} ({manifest.model.variant})",
        "target": ", ".join(filter(None, (target.name, target.backend, target.compute_capability))),
        "recipe": manifest.recipe,
        "generates": ", ".join(str(name) for name in _listed(options.get("modalities"))),
        "mode": f"{options.get('mode')}, {options.get('schedule.steps')} steps, guidance {guidance}, loop {loop}",
        **_policy(manifest),
        "profiles": [f"{p.name}: {_takes(p, manifest)}" for p in manifest.profiles],
        "codecs": ", ".join(codecs) or "none",
        "engines": engines,
        "checked": _checked(manifest) or ["nothing was compared"],
        "bytes": f"{sum(sizes.values()):,} in {_files(len(sizes))}",
        "built": f"{manifest.volatile.created} by cosmos-export {manifest.tools.get('cosmos-export', 'unknown')}",
    }  # fmt: skip


def _policy(manifest: Manifest) -> dict[str, str]:
    """What the bundle's checkpoint says of its policy, where it is one."""
    found = None if manifest.request is None else manifest.request.policy
    if found is None:
        return {}
    said = {
        "columns": found.width, "actions in a chunk": found.chunk, "frames per second": found.fps,
    }  # fmt: skip
    numbers = [f"{value:g} {what}" for what, value in said.items() if value is not None]
    parts = [found.domain or "of no domain", *numbers]
    if found.state:
        parts.append("is given the robot's state, which `run` cannot give yet")
    return {"policy": ", ".join(parts)}


def _checked(manifest: Manifest) -> list[str]:
    """What passed, by what was looked at; of the others why not, those with one reason together."""
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


def _verdict(report: VerifyReport) -> str:
    if report.ok and report.manifest is not None:
        size = sum(record.size_bytes for record in report.manifest.files)
        return f"PASS: {report.bundle}: {_files(len(report.manifest.files))}, {size:,} bytes, as the manifest says"
    first, count = _printable(report.failures[0].path), len(report.failures)
    failed = first if count == 1 else f"{first} and {count - 1} more"
    return f"FAIL: {report.bundle}: {failed}, of {len(report.checks)} checks; do not use this bundle"


def _document(report: VerifyReport) -> dict[str, Any]:
    return {
        "bundle": str(report.bundle),
        "ok": report.ok,
        "checks": [
            {"path": check.path, "status": check.status.value, "detail": check.detail} for check in report.checks
        ],
    }


def _printable(path: str) -> str:
    """A name found on disk may hold anything, escape sequences of the terminal included."""
    return path if path.isprintable() else ascii(path)


def _files(count: int) -> str:
    return f"{count} file" + ("" if count == 1 else "s")
