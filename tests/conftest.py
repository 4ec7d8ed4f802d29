"""For every test: interrupts work, also where the run was started in the background of a shell, which ignores them."""

from __future__ import annotations

import signal

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # Processes the tests start inherit what is ignored, and not what is handled.
    signal.signal(signal.SIGINT, signal.default_int_handler)
