"""Commands that are killed at random moments and repeated: does every result end as that of an uninterrupted command?

    python benchmarks/kills.py [--kills 60] [--commands build,calibrate,quantize] [--target cpu] [-o FILE.json]

A tiny checkpoint, through whole commands: `build --resume`, `calibrate` and `quantize`, each in a process forked from
this one when everything is imported, so that kills fall on the work. Each result is made by commands that get SIGKILL
after a random time, until one of them ends; then `--force` makes it anew, killed in the same way. There are as many
results as it takes for all kills. Every file of every result is compared with that of a command that nobody killed
(of a bundle's manifest everything except `volatile`), and after each success nothing is in the directory except the
result. "kept" is how many finished files a killed build left behind; how that is distributed says where kills fell.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, NoReturn

SHARE = 0.95
"""Share of an uninterrupted command's time within which a kill comes."""
PROFILE = "frames=1:2:48,height=3:6:24,width=3:8:24,und_len=1:512:4096,sound_len=0:0:400,action_len=0:16:128"


@dataclass(frozen=True)
class Inputs:
    """Inputs of the commands."""

    checkpoint: Path
    prompts: Path
    scales: Path
    target: str


def build(inputs: Inputs, output: Path) -> list[str]:
    return [
        "build", str(inputs.checkpoint), "-o", str(output), "--resume", "--target", inputs.target, "--components",
        "none", "--modalities", "vision", "--parity", "never", "--no-cache",
    ]  # fmt: skip


def calibrate(inputs: Inputs, output: Path) -> list[str]:
    return [
        "calibrate", str(inputs.checkpoint), "-o", str(output), "--data", str(inputs.prompts), "--modalities", "vision",
        "--samples", "24", "--steps", "6", "--latents", "noise", "--profile", PROFILE,
    ]  # fmt: skip


def quantize(inputs: Inputs, output: Path) -> list[str]:
    return ["quantize", str(inputs.checkpoint), "-o", str(output), "--calibration", str(inputs.scales)]


COMMANDS: dict[str, Callable[[Inputs, Path], list[str]]] = {
    "build": build, "calibrate": calibrate, "quantize": quantize,
}  # fmt: skip


def run(arguments: list[str], kill_after: float | None) -> int:
    """The exit status of the command, in a child that is forked from this process; −9 where it was killed."""
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        _command(arguments)
    deadline = time.perf_counter() + (float("inf") if kill_after is None else kill_after)
    status = None
    while status is None and time.perf_counter() < deadline:
        found, code = os.waitpid(child, os.WNOHANG)
        status = os.waitstatus_to_exitcode(code) if found else None
        time.sleep(0.002)
    if status is None:
        os.kill(child, signal.SIGKILL)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if status not in (0, -signal.SIGKILL):
        sys.exit(f"a command ended with {status}: cosmos-export {' '.join(arguments)}")
    return status


def _command(arguments: list[str]) -> NoReturn:
    """The command line with ``arguments``, and nothing of this program after it."""
    from cosmos_export.cli import main as command_line

    sys.argv = ["cosmos-export", *arguments, "--quiet"]
    status = 70
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        command_line()
    except SystemExit as ending:
        status = int(ending.code or 0)
    finally:
        os._exit(status)


def load() -> None:
    """Import what the commands import: kills are to fall on their work."""
    import diffusers
    import onnx.checker

    import cosmos_export.calibration.calibrate
    import cosmos_export.calibration.write_quantized
    import cosmos_export.compiler.stages

    assert diffusers.Cosmos3OmniTransformer and diffusers.Cosmos3OmniPipeline
    assert onnx.checker and cosmos_export.compiler.stages and cosmos_export.calibration.write_quantized


def contents(result: Path) -> dict[str, Any]:
    """Digest of every file; of a bundle's manifest what two builds have in common."""
    found: dict[str, Any] = {}
    for path in sorted(result.rglob("*")):
        name = path.relative_to(result).as_posix()
        if name == "manifest.json":
            found[name] = {k: v for k, v in json.loads(path.read_bytes()).items() if k not in ("volatile", "digest")}
        elif path.is_file():
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def kept(output: Path) -> int:
    return len(list(output.parent.glob(f".{output.name}.partial-*/.state/*.json")))


def left_over(output: Path) -> list[str]:
    """Entries beside ``output`` and its report."""
    return sorted(path.name for path in output.parent.iterdir() if path.name.removesuffix(".build.json") != output.name)


def measure(name: str, inputs: Inputs, kills: int, moments: random.Random, root: Path) -> dict[str, Any]:
    """``kills`` kills of the command ``name``, and how its results compare."""
    command, left, results, killed = COMMANDS[name], Counter[int](), 0, 0
    start = time.perf_counter()
    run(command(inputs, root / "whole"), None)
    seconds = time.perf_counter() - start
    whole = contents(root / "whole")
    output = root / "killed" / name
    output.parent.mkdir()
    while killed < kills:
        done = False
        while not done:
            after = None if killed == kills else moments.uniform(0, SHARE * seconds)
            force = ["--force"] if output.exists() else []  # also where the kill came after all was done
            done = run([*command(inputs, output), *force], after) == 0
            if not done:
                killed += 1
                left[kept(output)] += 1
                print(f"{name}: {killed} kills, {results} results", file=sys.stderr, flush=True)
        if contents(output) != whole:
            sys.exit(f"{name}: result {results}, after {killed} kills, is not that of an uninterrupted command")
        if left_over(output):
            sys.exit(f"{name}: after {killed} kills and a success there is {', '.join(left_over(output))}")
        results += 1
    return {
        "command": name, "kills": killed, "results": results, "identical": results, "left_over": 0,
        "seconds_uninterrupted": round(seconds, 1),
        "kept_when_killed": {str(count): times for count, times in sorted(left.items())},
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--commands", default=",".join(COMMANDS))
    parser.add_argument("--target", default="cpu", help="rtx-pro-6000 builds engines, too")
    parser.add_argument("-o", "--output", type=Path)
    arguments = parser.parse_args()
    from cosmos_export.checkpoint.demo import write_demo_checkpoint

    os.environ["OMP_NUM_THREADS"] = "1"
    load()
    names, rows = arguments.commands.split(","), []
    moments = random.Random(arguments.seed)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        checkpoint = write_demo_checkpoint(root / "in/checkpoint", layers=1, dtype="bfloat16")
        inputs = Inputs(checkpoint, root / "in/prompts.txt", root / "in/scales", arguments.target)
        inputs.prompts.write_text("A robot folds a towel.\nA red car turns left.\n", encoding="utf-8")
        run(calibrate(inputs, inputs.scales), None)
        for number, name in enumerate(names):
            share = arguments.kills * (number + 1) // len(names) - arguments.kills * number // len(names)
            (root / name).mkdir()
            rows.append(measure(name, inputs, share, moments, root / name))
    print("| command | kills | results | identical | left over | finished files when killed: times |")
    print("|---|---|---|---|---|---|")
    for row in rows:
        found = ", ".join(f"{count}: {times}" for count, times in row["kept_when_killed"].items())
        counts = f"{row['kills']} | {row['results']} | {row['identical']} | {row['left_over']}"
        print(f"| {row['command']} | {counts} | {found if row['command'] == 'build' else '–'} |")
    if arguments.output is not None:
        document = {
            "benchmark": "kills",
            "command": f"python benchmarks/kills.py --kills {arguments.kills} --commands {arguments.commands} "
            f"--target {arguments.target}",
            "machine": {"cores": os.cpu_count(), "processor": platform.machine(), "threads": 1},
            "versions": {n: metadata.version(n) for n in ("cosmos-export", "torch")},
            "seed": arguments.seed,
            "rows": rows,
        }
        arguments.output.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
