"""``cosmos-export serve``: a policy bundle behind openpi's or GR00T's protocol."""

from __future__ import annotations

import dataclasses

from cosmos_export.cli.verbs import Verbs
from cosmos_export.verb_options import ServeCommand


def register(app: Verbs) -> None:
    """Add the verb to ``app``."""

    @app.verb(
        "serve",
        ServeCommand,
        "cosmos-export serve policy.bundle --limits limits.toml --audit robot.jsonl",
        "cosmos-export serve policy.bundle --protocol gr00t --no-limits --port 0",
    )
    def serve(asked: ServeCommand, as_json: bool) -> None:
        """Serve a policy to robots. The bundle is verified and a golden request made before the port opens.

        Every chunk of actions is reviewed by --limits before it leaves. This is no safety function of the robot.
        docs/serve.md has the protocols, the limits and the audit trail.
        """
        from cosmos_export.serve import require_installed

        require_installed()

        from contextlib import nullcontext

        from cosmos_export import bundle as bundles
        from cosmos_export.audit import AuditTrail
        from cosmos_export.bundle import open_verdicts
        from cosmos_export.cli import console, verbs
        from cosmos_export.diagnostics import UserError
        from cosmos_export.runtime.limits import read_limits
        from cosmos_export.runtime.model import LoadedModel
        from cosmos_export.runtime.recorded import record_opened
        from cosmos_export.serve import server
        from cosmos_export.serve.policy import BundlePolicy

        if (asked.limits is None) != asked.no_limits:
            said = "--limits and --no-limits are both given" if asked.no_limits else "no limits of the robot"
            raise UserError("CX644", said, "--limits FILE.toml (docs/serve.md), or --no-limits to do without")
        token = None if asked.token_file is None else server.read_token(asked.token_file)
        options = dataclasses.replace(asked.service, token=token)
        settings = server.check(options)
        allowed = None if asked.limits is None else read_limits(asked.limits)
        files = bundles.open_bundle(asked.bundle)
        if asked.require_signature is not None:
            bundles.require_signature(files, asked.require_signature)
        verdicts = open_verdicts(files.manifest)
        with (
            LoadedModel(files, backend=asked.backend, device=asked.device) as model,
            AuditTrail(asked.audit) if asked.audit is not None else nullcontext() as trail,
        ):
            policy = BundlePolicy(model, asked.policy)
            console.log_open(verdicts)
            policy.require()
            model.load(console.progress())
            record_opened(trail, model)

            def ready(opened: int) -> None:
                kind = "without limits" if allowed is None else f"limits {allowed.digest[:12]}"
                url = f"{'ws' if options.protocol == 'openpi' else 'tcp'}://{settings.host}:{opened}"
                if as_json:
                    console.emit_json(
                        "serve",
                        {
                            "url": url,
                            "protocol": options.protocol,
                            "bundle_id": f"sha256:{files.bundle_id}",
                            "embodiment": policy.robot.name,
                            "limits": None if allowed is None else f"sha256:{allowed.digest}",
                            "verdicts": dataclasses.asdict(verdicts),
                        },
                    )
                console.verdict(f"serving {policy.robot.name} of bundle {files.bundle_id[:12]} at {url}, {kind}", True)

            number = server.serve(policy, options, allowed, trail=trail, ready=ready)
        raise verbs.SignalledError(number)
