"""``cosmos-export serve``: a policy bundle behind openpi's or GR00T's protocol."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cosmos_export.cli.options import Json
from cosmos_export.cli.verbs import Verbs


def register(app: Verbs) -> None:
    """Add the verb to ``app``."""

    @app.command(
        "serve",
        "cosmos-export serve policy.bundle --limits limits.toml --audit robot.jsonl",
        "cosmos-export serve policy.bundle --protocol gr00t --no-limits --port 0",
    )
    def serve(
        bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="The bundle.", show_default=False)],
        protocol: Annotated[str, typer.Option(help="openpi (WebSocket) or gr00t (ZeroMQ).")] = "openpi",
        host: Annotated[
            str, typer.Option(help="Address; any but this machine's own needs --token-file.")
        ] = "127.0.0.1",
        port: Annotated[int | None, typer.Option(help="Default: 8000, or 5555 for gr00t. 0: any free one.")] = None,
        token_file: Annotated[Path | None, typer.Option(help="File with what a client must know.")] = None,
        limits: Annotated[Path | None, typer.Option(help="limits.toml of the robot.")] = None,
        no_limits: Annotated[
            bool, typer.Option("--no-limits", help="Serve without limits; only what is not finite is rejected.")
        ] = False,
        audit: Annotated[Path | None, typer.Option(help="Audit trail to go on with, or to begin.")] = None,
        deadline: Annotated[
            float | None, typer.Option(help="Seconds: an older observation is refused, an older chunk marked stale.")
        ] = None,
        metrics_port: Annotated[
            int | None, typer.Option(help="Port of this machine for /metrics; openpi has it at its own.")
        ] = None,
        max_message: Annotated[int, typer.Option(help="Largest message, in MiB.")] = 16,
        connections: Annotated[int, typer.Option(help="Most connections at a time.")] = 8,
        embodiment: Annotated[str | None, typer.Option(help="Default: the checkpoint's own.")] = None,
        viewpoint: Annotated[str | None, typer.Option(help="Default: the embodiment's.")] = None,
        action_stats: Annotated[Path | None, typer.Option(help="Statistics of the data: actions in its units.")] = None,
        action_normalization: Annotated[
            str | None, typer.Option(help="What the statistics are used for: quantile, minmax or meanstd.")
        ] = None,
        action_width: Annotated[int | None, typer.Option(help="Columns of an action, where not the usual.")] = None,
        steps: Annotated[int | None, typer.Option(help="Default: as built, or the policy's.")] = None,
        seed: Annotated[int, typer.Option(help="Of the first request; each has the next.")] = 0,
        backend: Annotated[str | None, typer.Option(help="What runs the engines. Default: the bundle's.")] = None,
        device: Annotated[str | None, typer.Option(help="Where. Default: the backend's first.")] = None,
        require_signature: Annotated[
            Path | None, typer.Option(help="Public key (PEM): a bundle that it did not sign is not served.")
        ] = None,
        as_json: Json = False,
    ) -> None:
        """Serve a policy to robots. The bundle is verified and a golden request made before the port opens.

        Every chunk of actions is reviewed by --limits before it leaves. This is no safety function of the robot.
        docs/serve.md has the protocols, the limits and the audit trail.
        """
        from cosmos_export.serve import require_installed

        require_installed()

        import dataclasses
        from contextlib import nullcontext

        import cosmos_export
        from cosmos_export import bundle as bundles
        from cosmos_export.audit import AuditTrail
        from cosmos_export.bundle import open_verdicts
        from cosmos_export.cli import console, verbs
        from cosmos_export.diagnostics import UserError
        from cosmos_export.runtime.limits import read_limits
        from cosmos_export.runtime.model import Model
        from cosmos_export.serve import server
        from cosmos_export.serve.policy import BundlePolicy, PolicyOptions

        if (limits is None) != no_limits:
            said = "--limits and --no-limits are both given" if no_limits else "no limits of the robot"
            raise UserError("CX644", said, "--limits FILE.toml (docs/serve.md), or --no-limits to do without")
        options = server.ServeOptions(
            protocol=protocol,  # type: ignore[arg-type]
            host=host,
            port=port,
            token=None if token_file is None else server.read_token(token_file),
            metrics_port=metrics_port,
            max_message_bytes=max_message << 20,
            max_connections=connections,
            deadline_s=deadline,
            seed=seed,
        )
        settings = server.check(options)
        allowed = None if limits is None else read_limits(limits)
        files = bundles.open_bundle(bundle)
        if require_signature is not None:
            bundles.require_signature(files, require_signature)
        verdicts = open_verdicts(files.manifest)
        with (
            Model(files, backend=backend, device=device) as model,
            AuditTrail(audit) if audit is not None else nullcontext() as trail,
        ):
            policy = BundlePolicy(
                model,
                PolicyOptions(embodiment, viewpoint, action_stats, action_normalization, action_width, steps),
            )
            console.log_open(verdicts)
            policy.require()
            generator = model.load(console.progress())
            if trail is not None:
                facts = {"failed": list(verdicts.failed), "not_measured": list(verdicts.not_measured)}
                trail.record("verified", bundle=files.bundle_id, **facts)
                running = generator.bundle.executor
                trail.record("loaded", backend=running.name, device=running.device, version=cosmos_export.__version__)

            def ready(opened: int) -> None:
                kind = "without limits" if allowed is None else f"limits {allowed.digest[:12]}"
                url = f"{'ws' if protocol == 'openpi' else 'tcp'}://{settings.host}:{opened}"
                if as_json:
                    console.emit_json(
                        "serve",
                        {
                            "url": url,
                            "protocol": protocol,
                            "bundle_id": f"sha256:{files.bundle_id}",
                            "embodiment": policy.robot.name,
                            "limits": None if allowed is None else f"sha256:{allowed.digest}",
                            "verdicts": dataclasses.asdict(verdicts),
                        },
                    )
                console.verdict(f"serving {policy.robot.name} of bundle {files.bundle_id[:12]} at {url}, {kind}", True)

            number = server.serve(policy, options, allowed, trail=trail, ready=ready)
        raise verbs.SignalledError(number)
