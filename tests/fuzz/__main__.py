"""Readers of files under damaged and hostile input.

    python tests/fuzz [--reader NAME]… [--n 500] [--seed 0] [--seeds DIR] [--save DIR] [-o RESULTS.json]
    python tests/fuzz --reader NAME --seed S --only NUMBER [--save DIR]     # one case again, with its files
    python tests/fuzz --flips 3000                                          # single bits of a manifest, against verify

A case takes real files that the product wrote, changes one to three places of them by the structure of their format
(or puts a pipe, a device, a link … in their place) and calls a reader. Allowed are success and refusal: an exit code of
1 to 3 with a code of its own. Not allowed are an unexpected exception (CX000), 10 s, 1 GiB of memory above what the
reader takes anyway, the end of the process, a control character on the terminal, a touch of anything outside the files,
and acceptance where it is known to be wrong (a changed bundle, a safetensors file that the reference refuses). Exit
code 1 where there was such a thing.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from importlib import metadata
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import fuzz_campaign as fuzz
from fuzz_readers import BY_NAME, GOOD


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--reader", action="append", default=[], help=f"of {', '.join(BY_NAME)}; may repeat; default: all"
    )
    parser.add_argument("--n", type=int, default=500, help="cases of each reader")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="the number of one case")
    parser.add_argument("--flips", type=int, default=0, help="single bits of a manifest instead")
    parser.add_argument("--seconds", type=float, help="end after so long, whatever is left")
    parser.add_argument("--seeds", type=Path, help="keep the files that cases begin with here, and take them again")
    parser.add_argument("--save", type=Path, help="keep the files of what is found here")
    parser.add_argument("-o", "--output", type=Path, help="write the results as JSON, to those of other readers")
    asked = parser.parse_args()
    readers = fuzz.readers_named(asked.reader)
    started = time.perf_counter()
    with fuzz.seed_folder(asked.seeds) as folder:
        if asked.flips:
            readers = [BY_NAME["verify"]]
        fuzz.make_seeds(folder, readers)
        if asked.flips:
            rows = [fuzz.flips(folder, readers[0], "x.bundle/manifest.json", asked.flips, asked.seed)]
        elif asked.only is not None:
            return _one(folder, readers[0].name, asked.seed, asked.only, asked.save)
        else:
            rows = fuzz.campaign(
                folder, readers, asked.n, asked.seed, save=asked.save, seconds=asked.seconds,
                say=lambda text: print(text, file=sys.stderr, flush=True),
            )  # fmt: skip
    print(fuzz.table(rows))
    if asked.output is not None:
        _write(asked.output, rows, round(time.perf_counter() - started))
    return int(any(row.findings for row in rows))


def _write(path: Path, rows: list[fuzz.Row], seconds: int) -> None:
    """The results; rows of other readers that ``path`` has already stay, each with its own command."""
    packages = ("cosmos-export", "torch", "diffusers", "transformers", "tokenizers", "onnxruntime", "av", "pyarrow")
    words = [word for word in sys.argv[1:] if word not in ("-o", str(path))]
    settings = {"command": f"python tests/fuzz {' '.join(words)}", "seconds": seconds}
    found = {row.reader: {**row.document(), **settings} for row in rows}
    before = json.loads(path.read_bytes())["rows"] if path.exists() else []
    document = {
        "benchmark": "fuzz",
        "machine": {"processor": platform.machine(), "python": platform.python_version()},
        "versions": {name: metadata.version(name) for name in packages},
        "rows": [row for row in before if row["reader"] not in found] + list(found.values()),
    }
    path.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


def _one(folder: Path, reader: str, seed: int, number: int, save: Path | None) -> int:
    question: dict[str, object] = {"reader": reader, "seed": seed, "number": number}
    if save is not None:
        question["keep"] = str(save / f"{reader}-{seed}-{number}")
    with fuzz.Pool(folder) as pool:
        answer = pool.run(question)
    trace = answer.pop("trace")
    print(json.dumps(answer, indent=1))
    print(trace, file=sys.stderr)
    return int(answer["kind"] not in GOOD)


if __name__ == "__main__":
    sys.exit(main())
