"""The last stage of a build for a backend whose engines are built on the GPU itself: engines into a bundle that waits.

    python -m cosmos_export.compile.finish BUNDLE

needs the builder and the GPU, and neither torch nor the checkpoint. The bundle is verified first; its manifest is
replaced when every engine is there and has been checked. What an interrupted run leaves is found and built again.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from cosmos_export import streams
from cosmos_export.bundle import EngineCheck, EngineRecord, FileRecord, Manifest, WeightInput, read_bundle
from cosmos_export.bundle.files import hash_file
from cosmos_export.bundle.writer import replace_manifest
from cosmos_export.checkpoint.strict_json import read_object
from cosmos_export.diagnostics import CosmosExportError, FindingError, UserError
from cosmos_export.kernels.description import PLUGIN_FOLDER
from cosmos_export.progress import Progress, Silent
from cosmos_export.targets import Target, load_target
from cosmos_export.targets.tensorrt import FLAVOR, build_engine, require_gpu
from cosmos_export.targets.trt_common import EngineReport, require_module

REQUESTS = "engines/requests.json"
SCRIPT = "finish.sh"


@dataclass(frozen=True)
class EngineRequest:
    """An engine that is still to be built."""

    graph: str
    profiles: tuple[str, ...]
    shapes: tuple[Mapping[str, Any], ...]
    """For each profile, input → smallest, optimal and largest shape."""
    decomposable_attention: bool
    attention: int
    """Attentions in the graph."""
    weights: tuple[WeightInput, ...] = ()
    """Weights that the engine takes as inputs."""
    plugins: int = 0
    """Nodes of the model that are kernels of ours."""


def requests_text(requests: Sequence[EngineRequest]) -> str:
    """``engines/requests.json``."""
    records = [
        {
            "graph": r.graph, "profiles": list(r.profiles), "attention": r.attention,
            "shapes": [{name: [list(point) for point in span] for name, span in one.items()} for one in r.shapes],
            "decomposable_attention": r.decomposable_attention, "weights": [asdict(weight) for weight in r.weights],
            "plugins": r.plugins,
        }
        for r in requests
    ]  # fmt: skip
    return json.dumps({"engines": records}, indent=1) + "\n"


def script_text(version: str) -> str:
    """``finish.sh``: everything that is left to do, on the machine that has the GPU."""
    return f"""#!/bin/sh
# Builds the engines of this bundle on the GPU they are for, and completes its manifest.
set -e
here=$(cd "$(dirname "$0")" && pwd)
python=${{PYTHON:-python3}}
if ! "$python" -c 'import cosmos_export; raise SystemExit(cosmos_export.__version__ != "{version}")' 2>/dev/null; then
    echo "finish.sh: $python does not have cosmos-export {version}: pip install '.[tensorrt]' in its checkout," >&2
    echo "or name the Python that has it: PYTHON=/path/to/python sh $0" >&2
    exit 3
fi
exec "$python" -m cosmos_export.compile.finish "$here"
"""


def finish(root: Path, progress: Progress | None = None) -> Manifest:
    """Build the engines that the bundle at ``root`` waits for, and return its new manifest.

    UserError CX455: nothing is left to do. UnsupportedError: no builder (CX404), another GPU (CX405). FindingError
    CX450: an engine is not what was planned, CX711: the bundle does not verify. The manifest changes only at the end.
    """
    progress = progress or Silent()
    root = Path(root).resolve()
    _remove_leftovers(root)
    manifest = read_bundle(root, progress)
    if manifest.engines or REQUESTS not in {file.path for file in manifest.files}:
        raise UserError("CX455", f"{root} does not wait for engines", "`cosmos-export bundle verify` shows what it has")
    target = load_target(manifest.target.name).on(manifest.target.backend)
    require_module(FLAVOR)
    require_gpu(target)
    try:
        complete = _with_engines(root, manifest, target, progress)
    except BaseException:
        _remove_leftovers(root)  # or the bundle would not verify
        raise
    replace_manifest(root, complete)
    return complete


def _with_engines(root: Path, manifest: Manifest, target: Target, progress: Progress) -> Manifest:
    """The manifest with every engine, which are built."""
    engines: list[EngineRecord] = []
    checks: list[EngineCheck] = []
    files: list[FileRecord] = []
    tools: dict[str, str] = {}
    for request in _read(root / REQUESTS):
        path = root / "engines" / f"{request.graph}.engine"
        report = build_engine(
            root / "onnx" / f"{request.graph}.onnx",
            path,
            target=target,
            profiles=list(request.shapes),
            progress=progress,
            decomposable_attention=request.decomposable_attention,
            timing_cache=root.parent / f".{root.name}.timing-cache",
            plugins=root / PLUGIN_FOLDER if request.plugins else None,
        )
        with path.open("rb", buffering=0) as file:
            size, digest = hash_file(file.fileno())
        name = f"engines/{path.name}"
        files.append(FileRecord(name, size, digest, "engine"))
        engines.append(EngineRecord(request.graph, request.graph, name, request.profiles, request.weights))
        checks += engine_checks(request, report)
        tools[report.builder] = report.builder_version
    failed = [check for check in checks if not check.passed]
    if failed:
        lines = " | ".join(f"{c.engine}: {c.check}: {c.found}" for c in failed)
        raise FindingError("CX450", f"engines do not contain what was planned: {lines}", "the bundle is as it was")
    return replace(
        manifest,
        engines=tuple(engines),
        plan_checks=(*manifest.plan_checks, *checks),
        files=tuple(sorted((*manifest.files, *files), key=lambda file: file.path)),
        tools={**manifest.tools, **tools},
    )


def engine_checks(request: EngineRequest, report: EngineReport) -> list[EngineCheck]:
    """What can be said of an engine from its own inspector."""
    fused = "nothing decomposed" if not request.decomposable_attention else "may be decomposed"
    found = f"{report.attention} attentions parsed, none of which the builder may decompose"
    layers = f"{report.layers} layers" + "".join(f", {n} × {kind}" for kind, n in report.layers_in.items())
    checks = [
        EngineCheck(
            request.graph, "attention", f"{request.attention} attentions, {fused}",
            found if not request.decomposable_attention else f"{report.attention} attentions parsed",
            report.attention >= request.attention or request.decomposable_attention,
        ),
        EngineCheck(request.graph, "layers", "an engine that loads", layers, bool(report.layers)),
    ]  # fmt: skip
    if request.plugins:
        wanted, parsed = f"{request.plugins} kernels of this bundle", f"{report.plugins} plugins parsed"
        checks.append(EngineCheck(request.graph, "plugins", wanted, parsed, report.plugins == request.plugins))
    return checks


def _read(path: Path) -> list[EngineRequest]:
    return [
        EngineRequest(
            graph=record["graph"],
            profiles=tuple(record["profiles"]),
            shapes=tuple(
                {name: tuple(tuple(point) for point in span) for name, span in one.items()} for one in record["shapes"]
            ),
            decomposable_attention=record["decomposable_attention"],
            attention=record["attention"],
            weights=tuple(WeightInput(**{**one, "dims": tuple(one["dims"])}) for one in record["weights"]),
            plugins=record["plugins"],
        )
        for record in read_object(path)["engines"]
    ]


def _remove_leftovers(root: Path) -> None:
    """Engines that an interrupted run wrote, whole or in part: the manifest does not list them, so nothing would run
    them."""
    listed = {record["path"] for record in read_object(root / "manifest.json").get("files", [])}
    for pattern in ("engines/*.engine", "engines/.*.partial", ".manifest.json.partial-*"):
        for path in root.glob(pattern):
            if path.relative_to(root).as_posix() not in listed:
                path.unlink()


def main(arguments: Sequence[str]) -> int:
    streams.guard()
    if len(arguments) != 1:
        print("usage: python -m cosmos_export.compile.finish BUNDLE", file=sys.stderr)
        return 2
    try:
        manifest = finish(Path(arguments[0]))
    except CosmosExportError as error:
        hint = f"\n\nhint: {error.hint}" if error.hint else ""
        print(f"error[{error.code}]: {error.message}{hint}", file=sys.stderr)
        return int(error.exit_code)
    print(f"finished {arguments[0]}: {len(manifest.engines)} engines", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
