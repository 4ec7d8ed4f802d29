"""What a build costs is its own, whoever started it."""

import subprocess
import sys

_CHILD = (
    "from cosmos_export.compiler.metering import Meter\n"
    "with Meter() as meter, meter.stage('one'): pass\n"
    "print(meter.costs().peak_resident_bytes)\n"
)
_PARENT = (
    "import subprocess, sys\n"
    "held = b'x' * (600 << 20)\n"
    "print(subprocess.run([sys.executable, '-c', sys.argv[1]], capture_output=True, text=True, check=True).stdout)\n"
)


def test_the_peak_is_not_that_of_the_process_that_started_it() -> None:
    # `getrusage` hands a parent's peak down through exec: a test runner of 2 GiB made builds of 1 GiB look like it.
    command = [sys.executable, "-c", _PARENT, _CHILD]
    found = int(subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout)
    assert 5 << 20 < found < 400 << 20
