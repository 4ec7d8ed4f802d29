"""A server of the policy without a model, as a process of its own: ``fake_server.py PROTOCOL PORT [TRAIL]``."""

from __future__ import annotations

import sys
from pathlib import Path

from serve_samples import LIMITS, FakePolicy

from cosmos_export.audit import AuditTrail
from cosmos_export.serve.server import serve
from cosmos_export.verb_options import ServeOptions

if __name__ == "__main__":
    options = ServeOptions("openpi" if sys.argv[1] == "openpi" else "gr00t", port=int(sys.argv[2]))
    trail = AuditTrail(Path(sys.argv[3])) if len(sys.argv) > 3 else None
    number = serve(FakePolicy(), options, LIMITS, trail=trail, ready=lambda opened: print(opened, flush=True))
    print(f"ended by {number}", flush=True)
