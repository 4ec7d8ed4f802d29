"""The last stage of a build for a backend whose engines are built on the GPU itself: engines into a bundle that waits.

    python -m cosmos_export.compiler.finish BUNDLE

needs the builder and the GPU, and neither torch nor the checkpoint. The bundle is verified first; its manifest is
replaced when every engine is there and has been checked. What an interrupted run leaves is found and built again.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated

from cosmos_export import streams
from cosmos_export.bundle import (
    BundleFiles,
    EngineCheck,
    EngineRecord,
    FileRecord,
    Manifest,
    WeightInput,
    open_bundle,
    read_files,
)
from cosmos_export.bundle.files import SIGNATURE_NAME, hash_file
from cosmos_export.bundle.manifest import MANIFEST_NAME, GraphName, Name
from cosmos_export.bundle.provenance import ENGINES_FILE, provenance_of_engines
from cosmos_export.bundle.staging import remove_partials
from cosmos_export.bundle.strict import AtLeast, StrictError, canonical, decode, parse_object
from cosmos_export.bundle.writer import DESCRIPTION_ROLE, replace_manifest
from cosmos_export.diagnostics import CosmosExportError, ExitCode, FindingError, ToolError, UserError, shown
from cosmos_export.kernels.description import DOCUMENT, PLUGIN_FOLDER
from cosmos_export.printable import printable
from cosmos_export.progress import Progress, Silent
from cosmos_export.targets import Target, load_target
from cosmos_export.targets.backends import backend_of
from cosmos_export.targets.backends.protocol import Engines
from cosmos_export.targets.profiles import ShapeRange
from cosmos_export.targets.trt.checks import WantedEngine
from cosmos_export.targets.trt.engines import EngineOrder
from cosmos_export.targets.trt.plugins import parse_document

REQUESTS = "engines/requests.json"
REQUESTS_ROLE, PLUGIN_ROLE = "engine-requests", "plugin"
SCRIPT = "finish.sh"
Count = Annotated[int, AtLeast(0)]


@dataclass(frozen=True)
class EngineRequest:
    """An engine that is still to be built."""

    graph: GraphName
    profiles: tuple[Name, ...]
    shapes: tuple[Mapping[str, ShapeRange], ...]
    """Input → smallest, optimal and largest shape, for each profile."""
    decomposable_attention: bool
    attention: Count
    """Attentions in the graph."""
    weights: tuple[WeightInput, ...] = ()
    """Weights that the engine takes as inputs."""
    plugins: Count = 0
    """Nodes of the model that are this project's kernels."""


@dataclass(frozen=True)
class EngineRequests:
    """``engines/requests.json``."""

    engines: tuple[EngineRequest, ...]


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


def script_text(version: str, extra: str) -> str:
    """``finish.sh``: everything that is left to do, on the machine that has the GPU. ``extra`` installs the builder."""
    return f"""#!/bin/sh
# Builds the engines of this bundle on the GPU they are for, and completes its manifest.
set -e
here=$(cd "$(dirname "$0")" && pwd)
python=${{PYTHON:-python3}}
if ! "$python" -c 'import cosmos_export; raise SystemExit(cosmos_export.__version__ != "{version}")' 2>/dev/null; then
    echo "finish.sh: $python does not have cosmos-export {version}: pip install '.[{extra}]' in its checkout," >&2
    echo "or name the Python that has it: PYTHON=/path/to/python sh $0" >&2
    exit 3
fi
exec "$python" -m cosmos_export.compiler.finish "$here"
"""


def finish(root: Path, progress: Progress | None = None) -> Manifest:
    """Build the engines that the bundle at ``root`` waits for, and return its new manifest.

    UserError CX455: nothing is left to do. UnsupportedError: no builder (CX404), another GPU (CX405). FindingError
    CX450: an engine is not what was planned, CX711: the bundle does not verify. The manifest changes only at the end.
    """
    progress = progress or Silent()
    root = Path(root).resolve()
    files = open_bundle(root)
    _remove_leftovers(files)
    manifest = read_files(files, progress).manifest
    if manifest.engines or REQUESTS not in {file.path for file in manifest.files}:
        raise UserError("CX455", f"{root} does not wait for engines", "`cosmos-export bundle verify` shows what it has")
    requests = read_requests(files)
    target = load_target(manifest.target.name).on(manifest.target.backend)
    engines = backend_of(target).engines
    if engines is None or engines.built_here:
        raise UserError("CX455", f"{root} does not wait for engines", "`cosmos-export bundle verify` shows what it has")
    engines.require()
    engines.require_gpu(target)
    try:
        complete = _with_engines(root, manifest, requests, engines, target, progress)
        complete = _described(root, complete, files.bundle_id)
    except BaseException:
        _remove_leftovers(files)  # or the bundle would not verify
        raise
    replace_manifest(root, complete)
    if files.has_signature:  # it is of the bundle that waited
        (root / SIGNATURE_NAME).unlink()
    return complete


def _with_engines(
    root: Path,
    manifest: Manifest,
    requests: Sequence[EngineRequest],
    builder: Engines,
    target: Target,
    progress: Progress,
) -> Manifest:
    """The manifest with every engine, which are built."""
    engines: list[EngineRecord] = []
    checks: list[EngineCheck] = []
    files: list[FileRecord] = []
    tools: dict[str, str] = {}
    timings = _timing_cache(root)
    for request in requests:
        path = root / "engines" / f"{request.graph}.engine"
        plugins = root / PLUGIN_FOLDER if request.plugins else None
        order = EngineOrder(request.shapes, request.decomposable_attention, timings, plugins)
        report = builder.build(root / "onnx" / f"{request.graph}.onnx", path, order, target, progress)
        with path.open("rb", buffering=0) as file:
            size, digest = hash_file(file.fileno())
        name = f"engines/{path.name}"
        files.append(FileRecord(name, size, digest, "engine"))
        engines.append(EngineRecord(request.graph, request.graph, name, request.profiles, request.weights))
        wanted = WantedEngine(
            request.graph,
            target.compute_capability or "",
            len(request.profiles),
            request.attention,
            request.decomposable_attention,
            request.plugins,
        )
        checks += builder.checks(wanted, report, builder.inspect(path))
        tools[report.builder] = report.builder_version
    complete = replace(
        manifest,
        engines=tuple(engines),
        plan_checks=(*manifest.plan_checks, *checks),
        files=tuple(sorted((*manifest.files, *files), key=lambda file: file.path)),
        tools={**manifest.tools, **tools},
    )
    wrong = [f"{check.engine}: {check.check}: {check.found}" for check in checks if not check.passed]
    for engine in engines:
        with (root / engine.path).open("rb") as stream:
            problem = builder.problem(stream, engine.path, complete)
        wrong += [] if problem is None else [f"{engine.name}: {problem}"]
    if wrong:
        lines = " | ".join(wrong)
        raise FindingError("CX450", f"engines do not contain what was planned: {lines}", "the bundle is as it was")
    return complete


def _described(root: Path, complete: Manifest, waiting_id: str) -> Manifest:
    """``complete`` with the provenance of its engines, which is written."""
    data = canonical(provenance_of_engines(complete, waiting_id))
    (root / ENGINES_FILE).write_bytes(data)
    record = FileRecord(ENGINES_FILE, len(data), hashlib.sha256(data).hexdigest(), DESCRIPTION_ROLE)
    return replace(complete, files=tuple(sorted((*complete.files, record), key=lambda file: file.path)))


def read_requests(files: BundleFiles) -> tuple[EngineRequest, ...]:
    """Engine requests of the bundle, which fit its manifest and the kernels that it has; FindingError CX711."""
    read = REQUESTS
    try:
        requests = decode(EngineRequests, parse_object(files.read(REQUESTS, REQUESTS_ROLE))).engines
        for problem in _request_problems(requests, files.manifest):
            raise problem
        if any(request.plugins for request in requests):
            read = f"{PLUGIN_FOLDER}/{DOCUMENT}"
            for record in parse_document(files.read(read, PLUGIN_ROLE)):
                files.record(f"{PLUGIN_FOLDER}/{record.name}.ptx", PLUGIN_ROLE)
    except StrictError as error:
        raise FindingError(
            "CX711", f"{files.path} fails verification: {read}: {error}", "build the bundle again"
        ) from error
    return requests


def _request_problems(requests: Sequence[EngineRequest], manifest: Manifest) -> Iterator[StrictError]:
    roles = {file.path: file.role for file in manifest.files}
    sizes = {file.path: file.size_bytes for file in manifest.files}
    profiles = {profile.name for profile in manifest.profiles}
    asked = Counter(request.graph for request in requests)
    for i, request in enumerate(requests):
        where, contract = f"engines[{i}]", manifest.graphs.get(request.graph)
        if contract is None or asked[request.graph] > 1:
            what = "is not a graph of this manifest" if contract is None else "is asked for twice"
            yield StrictError(where, f"{shown(request.graph)} {what}")
            continue
        if roles.get(model := f"onnx/{request.graph}.onnx") != "onnx":
            yield StrictError(where, f"{model} is not a model of this manifest")
        if not request.profiles or not set(request.profiles) <= profiles:
            yield StrictError(f"{where}.profiles", f"{shown(request.profiles)} are not profiles of this manifest")
        if len(request.shapes) != len(request.profiles):
            yield StrictError(f"{where}.shapes", f"{len(request.shapes)} for {len(request.profiles)} profiles")
        for spans in request.shapes:
            for name, span in spans.items():
                if len(span) != 3 or len({len(point) for point in span}) != 1:
                    yield StrictError(f"{where}.shapes", f"{shown(name)} has no smallest, optimal and largest shape")
                elif any(not 0 <= low <= best <= high for low, best, high in zip(*span, strict=True)):
                    yield StrictError(f"{where}.shapes", f"{shown(name)} does not satisfy 0 <= min <= opt <= max")
        for weight in request.weights:
            end = weight.offset + weight.size_bytes
            if roles.get(weight.path) != "weights" or end > sizes[weight.path]:
                yield StrictError(f"{where}.weights", f"{shown(weight.name)} is not within weights of this manifest")


def _timing_cache(root: Path) -> Path | None:
    """Where timings of kernels are kept between runs; None, and a line on stderr, where somebody else could write it.

    A builder is given these bytes, and another may have put them beside a bundle in a shared directory.
    """
    path = root.parent / f".{root.name}.timing-cache"
    try:
        status = path.lstat()
    except FileNotFoundError:
        return path
    others = stat.S_IWGRP | stat.S_IWOTH
    if stat.S_ISREG(status.st_mode) and status.st_uid == os.geteuid() and not status.st_mode & others:
        return path
    _say(f"not used: {path} is not a file that you alone may write to; every kernel is timed anew")
    return None


def _remove_leftovers(files: BundleFiles) -> None:
    """Engines that an interrupted run of this user wrote, whole or in part: the manifest does not list them, so nothing
    would run them. What belongs to somebody else stays, and the bundle does not verify."""
    root, listed = files.path, {file.path for file in files.manifest.files}
    remove_partials(root, MANIFEST_NAME)
    for pattern in ("engines/*.engine", "engines/.*.partial", ENGINES_FILE):
        for path in root.glob(pattern):
            status = path.lstat()
            own = stat.S_ISREG(status.st_mode) and status.st_uid == os.geteuid()
            if own and path.relative_to(root).as_posix() not in listed:
                path.unlink()


def main(arguments: Sequence[str]) -> int:
    streams.guard()
    if len(arguments) != 1:
        _say("usage: python -m cosmos_export.compiler.finish BUNDLE")
        return 2
    try:
        root = Path(arguments[0])
        signed = (root / SIGNATURE_NAME).exists()
        manifest = finish(root)
    except CosmosExportError as error:
        return _failed(error)
    except OSError as error:  # of the bundle's directory: it may be read-only, or full
        return _failed(ToolError("CX801", str(error), "make the bundle's directory writable, and run it again"))
    except KeyboardInterrupt:
        _say("interrupted: the bundle is as it was; run it again to build its engines")
        return int(ExitCode.INTERRUPTED)
    _say(f"finished {arguments[0]}: {len(manifest.engines)} engines")
    if signed:
        _say(
            f"its signature was of the bundle without engines and is removed; sign it again with a key of this device: "
            f"cosmos-export bundle sign {arguments[0]} --key PRIVATE.pem"
        )
    return 0


def _failed(error: CosmosExportError) -> int:
    _say(f"error[{error.code}]: {error.message}" + (f"\n\nhint: {error.hint}" if error.hint else ""))
    return int(error.exit_code)


def _say(text: str) -> None:
    """Lines on stderr, with nothing in them that a terminal would act on: models and builders may say anything."""
    print(printable(text), file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
