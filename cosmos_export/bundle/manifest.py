"""The manifest: the schema of ``manifest.json``, the only entry point of a bundle, and what must hold within it.

The classes are the schema; ``docs/manifest.schema.json`` is generated from them by ``make schema``.
Everything but ``volatile`` is a function of the inputs, the options and the tools. The file is a sealed document:
one canonical form, with a digest of the rest in it.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Annotated, Literal

from cosmos_export.bundle import strict
from cosmos_export.bundle.embodiment import Embodiment, embodiment_problems
from cosmos_export.bundle.strict import AtLeast, AtMost, Pattern, StrictError
from cosmos_export.diagnostics import shown

SCHEMA_VERSION = 3
MANIFEST_NAME = "manifest.json"
MAX_MANIFEST_BYTES = 16 * 1024 * 1024
"""The manifest of Super has some tens of kilobytes; what is larger was not written by a build."""
MAX_PATH_LENGTH = 240
MAX_PATH_DEPTH = 8
MAX_NAME_LENGTH = 128
MAX_STEPS = 1000
"""Steps of a schedule."""

# Each component starts with a letter or digit and ends with neither dot nor anything a file system might drop. The list
# is one of what is allowed: `..`, absolute paths, backslashes, drive letters, control characters and all Unicode
# look-alikes are outside it and need no rule of their own.
_COMPONENT = r"[A-Za-z0-9](?:[A-Za-z0-9._+\-]*[A-Za-z0-9_+\-])?"
BundlePath = Annotated[
    str,
    Pattern(
        rf"(?=[\s\S]{{1,{MAX_PATH_LENGTH}}}$){_COMPONENT}(?:/{_COMPONENT}){{0,{MAX_PATH_DEPTH - 1}}}",
        "a relative path of letters, digits and ._+- that stays in the bundle",
    ),
]
# The build reads these and no reader of a bundle opens them, so any name a checkpoint may have is allowed.
InputPath = Annotated[
    str,
    Pattern(
        r"(?!/)(?![\s\S]*(?:^|/)\.{0,2}(?:/|$))[^\x00-\x1f\x7f\\]{1,1024}",
        "a normalised relative path below the checkpoint",
    ),
]
Sha256 = Annotated[str, Pattern(r"[0-9a-f]{64}", "a SHA-256 digest in lower-case hexadecimal")]
Bytes = Annotated[int, AtLeast(0)]
Width = Annotated[int, AtLeast(1), AtMost(1 << 20)]
"""A width of the model or a step of one of its grids: memory is asked for by their products."""
Extent = Annotated[int, AtLeast(0), AtMost(1 << 26)]
"""A value of a dynamic dimension."""
Name = Annotated[str, Pattern(r"[^\x00-\x1f\x7f-\x9f]{1,256}", "a name of at most 256 printable characters")]
GraphName = Annotated[
    str, Pattern(rf"(?=[\s\S]{{1,{MAX_NAME_LENGTH}}}$){_COMPONENT}", "a graph's name of letters, digits and ._+-")
]
"""Files are named after graphs."""
Scalar = str | int | float | bool | None

# Names that Windows resolves to devices in every directory, whatever the extension.
_DEVICE_NAMES = frozenset(
    ["con", "prn", "aux", "nul", *(f"{port}{digit}" for port in ("com", "lpt") for digit in range(10))]
)


@dataclass(frozen=True)
class ModelRecord:
    """The model the bundle was built from."""

    id: Name
    """Name as published, or that of the checkpoint directory."""
    variant: Name
    revision: Name | None
    """The commit of the published repository where it is known."""
    geometry: Mapping[str, Scalar]
    """Layers, widths and heads: enough to see which model it is."""


@dataclass(frozen=True)
class InputFile:
    """A file of the checkpoint that the build read."""

    path: InputPath
    size_bytes: Bytes
    sha256: Sha256


@dataclass(frozen=True)
class TargetRecord:
    """The target that the engines were built for."""

    name: Name
    backend: Name
    compute_capability: Name | None


@dataclass(frozen=True)
class DimRecord:
    """The range of one dynamic dimension."""

    min: Extent
    opt: Extent
    max: Extent


@dataclass(frozen=True)
class ProfileRecord:
    """A shape profile the engines accept."""

    name: Name
    dims: Mapping[str, DimRecord]


@dataclass(frozen=True)
class Tensor:
    """An input or output of a graph; a dim is a size or an expression over the profile's dims."""

    name: Name
    dtype: Name
    dims: tuple[Bytes | Name, ...]


@dataclass(frozen=True)
class GraphContract:
    """The tensors that go in and out of a graph, in order."""

    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]


@dataclass(frozen=True)
class EdgeRecord:
    """`output` of graph `source` is `input` of graph `target`."""

    source: GraphName
    output: Name
    target: GraphName
    input: Name
    instance: Name | None = None
    """The run of `source` that is meant where it runs more than once: `negative` is the one on the negative prompt."""


@dataclass(frozen=True)
class SegmentRecord:
    """A run of steps that needs no host: one graph with the loop inside."""

    graph: GraphName
    steps: Annotated[int, AtLeast(1), AtMost(MAX_STEPS)]
    rows: tuple[Name, ...] = ()
    """Inputs that hold a row for each of its steps, [steps, …]: the noise of a stochastic sampler."""


@dataclass(frozen=True)
class LoopRecord:
    """The denoising loop: `body` is one step, and `carried` maps its inputs to the outputs their next value follows
    from. `segments` run all the steps by themselves, one after the other; none where a host runs `body` once a step.

    A segment takes the samples as ``{modality}_sample`` and returns them as ``{modality}_sample_final``. What else a
    sampler carries goes from one segment to the next along `Manifest.edges`.
    """

    body: GraphName
    carried: Mapping[str, Name]
    segments: tuple[SegmentRecord, ...] = ()
    bodies: tuple[GraphName, ...] = ()
    """Where a host's steps compute differently: the body of each step of the compiled schedule, like `body` in all but
    its precision."""


@dataclass(frozen=True)
class StreamRecord:
    """A codec that works through a clip one latent frame per call: `first` on the first, `next` on each further one.

    `carried` maps the inputs of `next` to the outputs, of either graph, that they come from.
    """

    first: GraphName
    next: GraphName
    carried: Mapping[str, Name]


@dataclass(frozen=True)
class VideoRecord:
    """Latent video of the model: channels, and what one latent (row or column, frame) and one token (rows or columns of
    latents) stand for."""

    channels: Width
    spatial: Width
    """Pixels per latent row or column."""
    temporal: Width
    """Frames per latent frame; the first latent frame is one frame."""
    patch: Width
    """Latent rows or columns per token."""
    base_fps: float
    fps_modulation: bool
    """Whether temporal positions follow the frame rate."""


@dataclass(frozen=True)
class SoundRecord:
    """Latent sound of the model."""

    channels: Width
    latent_fps: float
    sampling_rate: Width
    hop: Width
    """Samples per latent."""


@dataclass(frozen=True)
class ActionRecord:
    """Actions of the model: width of a row with its padding, how many embodiment domains there are, and the robots."""

    dim: Width
    domains: Width
    embodiments: tuple[Embodiment, ...] = ()
    """The robots that the model acts for; of a policy its own alone."""


@dataclass(frozen=True)
class PromptRecord:
    """How a prompt becomes token ids: the checkpoint's chat template, applied when the bundle was built.

    The text that is tokenized is ``plain[0] + user + plain[1]``, or with a system message
    ``system[0] + message + system[1] + user + system[2]``; `suffix_ids` follow its ids.
    """

    tokenizer: BundlePath
    plain: tuple[str, ...]
    system: tuple[str, ...]
    use_system: bool
    """Whether requests have the system message unless they say otherwise."""
    suffix_ids: tuple[Bytes, ...]


@dataclass(frozen=True)
class SamplingRecord:
    """The checkpoint's own settings of sampling: `cosmos_export.sampling.CheckpointSampling`."""

    scheduler: Mapping[str, Scalar | tuple[Scalar, ...]]
    native: bool
    distilled_sigmas: tuple[float, ...] | None
    edge: bool
    policy: Name | None


@dataclass(frozen=True)
class PolicyRecord:
    """The actions of a policy checkpoint, as it describes them; null where it does not say, and its embodiment
    decides."""

    domain: Name | None
    width: Annotated[int, AtLeast(1)] | None
    """Columns of an action."""
    chunk: Annotated[int, AtLeast(1)] | None
    """Actions in a request."""
    fps: float | None
    state: bool | None
    """Whether the robot's state is the first row of its actions."""


@dataclass(frozen=True)
class RequestRecord:
    """Facts of the model that a request needs besides its graphs."""

    video: VideoRecord
    sound: SoundRecord | None
    action: ActionRecord | None
    prompt: PromptRecord | None
    """None in a bundle without its tokenizer: requests bring token ids."""
    sampling: SamplingRecord
    policy: PolicyRecord | None = None
    """None: the checkpoint is no policy."""


@dataclass(frozen=True)
class WeightInput:
    """An engine's input for a weight: ``size_bytes`` from ``offset`` of a file of the bundle, as they are."""

    name: Name
    path: BundlePath
    offset: Bytes
    size_bytes: Bytes
    dtype: Name
    dims: tuple[Bytes, ...]


@dataclass(frozen=True)
class EngineRecord:
    """An engine file and the graph it runs."""

    name: Name
    graph: GraphName
    path: BundlePath
    profiles: tuple[Name, ...]
    weights: tuple[WeightInput, ...]
    """Weights that are not in the engine, in the order of its inputs, which come after the graph's own."""


@dataclass(frozen=True)
class FileRecord:
    """A file of the bundle."""

    path: BundlePath
    size_bytes: Bytes
    sha256: Sha256
    role: Name


@dataclass(frozen=True)
class Verdict:
    """One comparison against the reference; `not-measured` says so instead of leaving it out.

    The number itself is in `Volatile.measured`: its last digits follow the machine's CPU and threads.
    """

    stage: Name
    subject: Name
    metric: Name
    threshold: float | None
    verdict: Literal["pass", "fail", "not-measured"]
    note: str


@dataclass(frozen=True)
class EngineCheck:
    """The contents of an engine, compared with what was planned."""

    engine: Name
    check: Name
    expected: str
    found: str
    passed: bool


@dataclass(frozen=True)
class Planned:
    """A number of the plan, and what became of it."""

    planned: int
    found: int


@dataclass(frozen=True)
class GoldenRecord:
    """The actions of a policy's golden request (docs/serve.md), as the build made them with the reference backend."""

    embodiment: Name
    seed: Annotated[int, AtLeast(0)]
    actions: tuple[tuple[float, ...], ...]
    """Rows in the robot's numbers."""
    limit: float
    """Largest relative L2 distance with the reference backend."""
    limit_elsewhere: float
    """The same with another one."""


@dataclass(frozen=True)
class Volatile:
    """The only fields that may differ between two builds of the same inputs with the same options and tools."""

    created: Annotated[str, Pattern(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", "a UTC time like 2026-01-31T12:00:00Z")]
    build_seconds: float
    peak_memory_bytes: Bytes | None
    stage_seconds: Mapping[str, float]
    measured: Mapping[str, float]
    """The value behind each verdict, by stage."""
    planned: Mapping[str, Planned]
    """Bytes: of engines, and of memory that no file backs."""
    golden: GoldenRecord | None = None
    """None: no policy, or a model too large to be run by its build."""


@dataclass(frozen=True)
class CalibrationRecord:
    """The scale table that quantizers of activations were made from."""

    checkpoint: Sha256
    """Identity of the checkpoint it was made of."""
    scales_sha256: Sha256
    lineage_sha256: Sha256
    lineage: BundlePath
    """A copy of what it says of its data."""


@dataclass(frozen=True)
class PrecisionRecord:
    """The number formats in which the products of the towers compute."""

    recipe: Name
    overrides: tuple[Name, ...]
    table: Mapping[str, Name]
    """Place (tower, kind, layers, steps) → scheme; what is not here is in the model's own type."""
    rounding: Name
    """How weights were rounded: `exact` is once, from float32; `as stored`: the checkpoint has them in FP8."""
    calibration: CalibrationRecord | None
    report: BundlePath
    """The report of what each linear and each step loses."""


@dataclass(frozen=True)
class Manifest:
    """A bundle: what it was built from, what is in it, and what was measured."""

    model: ModelRecord
    inputs: tuple[InputFile, ...]
    target: TargetRecord
    profiles: tuple[ProfileRecord, ...]
    recipe: Name
    graphs: Mapping[GraphName, GraphContract]
    edges: tuple[EdgeRecord, ...]
    loop: LoopRecord | None
    streams: Mapping[GraphName, StreamRecord]
    request: RequestRecord
    engines: tuple[EngineRecord, ...]
    tools: Mapping[str, str]
    options: Mapping[str, Scalar | tuple[Scalar, ...]]
    evaluation: tuple[Verdict, ...]
    plan_checks: tuple[EngineCheck, ...]
    volatile: Volatile
    precision: PrecisionRecord | None = None
    """None where nothing is quantized."""
    chains: Mapping[GraphName, tuple[GraphName, ...]] = field(default_factory=dict)
    """Graph → the graphs that it was cut into, in the order in which they run. Each takes by name what it reads of the
    graph's inputs and of the outputs of those before it; the graph itself has no model and no engine then."""
    files: tuple[FileRecord, ...] = ()
    """Left empty by the build: `BundleWriter.commit` fills it in."""
    schema_version: Literal[3] = 3

    def __repr__(self) -> str:
        counts = f"{len(self.graphs)} graphs, {len(self.engines)} engines, {len(self.files)} files"
        return f"Manifest({self.model.id}, {self.target.name}, {self.recipe}, {counts})"

    def to_bytes(self) -> bytes:
        """The canonical form with its digest, as written to ``manifest.json``."""
        return strict.seal(strict.encode(self))


@dataclass(frozen=True)
class Open:
    """Findings that a bundle's build leaves open, each a line of text."""

    failed: tuple[str, ...]
    """Checks that failed; the bundle was written all the same."""
    not_measured: tuple[str, ...]

    @property
    def line(self) -> str:
        """Both in one line for a reader; empty where there are no findings."""
        said = {"this bundle failed checks of its build": self.failed, "not measured": self.not_measured}
        return "; ".join(f"{what}: {'; '.join(lines)}" for what, lines in said.items() if lines)


def open_verdicts(manifest: Manifest) -> Open:
    """The verdicts of ``manifest`` that are not a pass; those with one reason together."""
    lines: dict[str, dict[str, list[str]]] = {"fail": {}, "not-measured": {}}
    for v in manifest.evaluation:
        if v.verdict in lines:
            lines[v.verdict].setdefault(v.note, []).append(f"{v.stage} of {v.subject}")
    for check in manifest.plan_checks:
        if not check.passed:
            lines["fail"].setdefault(check.found, []).append(f"plan of {check.engine}")
    failed, not_measured = (
        tuple(_printable(f"{', '.join(what)}{f' ({note})' * bool(note)}") for note, what in reasons.items())
        for reasons in lines.values()
    )
    return Open(failed, not_measured)


def _printable(text: str) -> str:
    """A manifest may hold anything, escape sequences of the terminal included."""
    return text if text.isprintable() else ascii(text)


def schema_text() -> str:
    """The JSON Schema of a manifest, as checked in. It cannot say what `problems` says."""
    schema = strict.json_schema(Manifest, f"cosmos-export bundle manifest, version {SCHEMA_VERSION}")
    fields = schema["$defs"]["Manifest"]
    fields["properties"][strict.DIGEST] = {
        "type": "string", "pattern": "^[0-9a-f]{64}$",
        "description": "the SHA-256 of the canonical form of all other fields",
    }  # fmt: skip
    fields["required"].append(strict.DIGEST)
    return json.dumps(schema, indent=2) + "\n"


def parse_manifest(data: bytes) -> Manifest:
    """The manifest in ``data``. Raises `StrictError` for anything that is not a consistent manifest."""
    if len(data) > MAX_MANIFEST_BYTES:
        raise StrictError("", f"larger than the {MAX_MANIFEST_BYTES:,} bytes a manifest may have")
    document = strict.parse_object(data)
    version = document.get("schema_version")
    if isinstance(version, int) and not isinstance(version, bool) and version != SCHEMA_VERSION:
        reads = f"is not {SCHEMA_VERSION}, the version this reader knows"
        raise StrictError("schema_version", f"{shown(version)} {reads}; build the bundle again")
    if strict.DIGEST not in document:
        raise StrictError("", f"field `{strict.DIGEST}` is missing")
    manifest = strict.decode(Manifest, {name: v for name, v in document.items() if name != strict.DIGEST})
    strict.check_seal(document, data)
    for problem in problems(manifest):
        raise problem
    return manifest


def check_path(path: str, where: str = "") -> None:
    """``path`` may name a file of a bundle, or `StrictError`."""
    strict.decode(_PathOnly, {"path": path}, where)
    for component in path.split("/"):
        if component.split(".")[0].lower() in _DEVICE_NAMES:
            raise StrictError(where, f"{shown(path)} is a device name on some systems")
    if path.lower() == MANIFEST_NAME:
        raise StrictError(where, f"{shown(path)} is the manifest itself")


@dataclass(frozen=True)
class _PathOnly:
    path: BundlePath


# ---------------------------------------------------------------------------------------------------------------------
# Consistency


def problems(manifest: Manifest) -> Iterator[StrictError]:
    """Rules that do not hold within ``manifest``, although each field by itself is well formed."""
    yield from _path_problems(manifest)
    yield from _file_problems(manifest)
    yield from _engine_problems(manifest)
    yield from _dim_problems(manifest)
    yield from _edge_problems(manifest)
    yield from _loop_problems(manifest)
    yield from _chain_problems(manifest)
    yield from _geometry_problems(manifest)
    yield from _request_problems(manifest)
    yield from _schedule_problems(manifest)


def _path_problems(manifest: Manifest) -> Iterator[StrictError]:
    directories: dict[str, str] = {}
    for i, record in enumerate(manifest.files):
        try:
            check_path(record.path, f"files[{i}].path")
        except StrictError as error:
            yield error
        # One spelling for each directory, too: `A/x` and `a/y` are one directory on some systems and two on others.
        for parent in list(PurePosixPath(record.path).parents)[:-1]:
            spelling = directories.setdefault(str(parent).lower(), str(parent))
            if spelling != str(parent):
                yield StrictError(f"files[{i}].path", f"{shown(str(parent))} and {shown(spelling)} differ only in case")
    folded = Counter(record.path.lower() for record in manifest.files)
    for i, record in enumerate(manifest.files):
        if folded[record.path.lower()] > 1:
            yield StrictError(
                f"files[{i}].path", f"{shown(record.path)} is listed twice (upper and lower case are one)"
            )
        if record.path.lower() in directories:
            yield StrictError(f"files[{i}].path", f"{shown(record.path)} is a file and a directory")
    yield from _repeated("inputs", "path", [record.path for record in manifest.inputs])


def _engine_problems(manifest: Manifest) -> Iterator[StrictError]:
    yield from _repeated("engines", "name", [engine.name for engine in manifest.engines])
    yield from _repeated("profiles", "name", [profile.name for profile in manifest.profiles])
    for i, profile in enumerate(manifest.profiles):
        for dim, span in profile.dims.items():
            if not span.min <= span.opt <= span.max:
                yield StrictError(f"profiles[{i}].dims", f"{shown(dim)} does not satisfy min <= opt <= max")
    roles = {record.path: record.role for record in manifest.files}
    sizes = {record.path: record.size_bytes for record in manifest.files}
    yield from _repeated("engines", "path", [engine.path for engine in manifest.engines])
    profiles = {profile.name for profile in manifest.profiles}
    engines = {engine.name for engine in manifest.engines}
    for i, engine in enumerate(manifest.engines):
        if engine.graph not in manifest.graphs:
            yield StrictError(f"engines[{i}].graph", f"{shown(engine.graph)} is not a graph of this manifest")
        if engine.path not in sizes:
            yield StrictError(f"engines[{i}].path", f"{shown(engine.path)} is not a file of this manifest")
        elif roles[engine.path] != "engine":
            yield _role_problem(f"engines[{i}].path", engine.path, roles[engine.path], "engine")
        for j, weight in enumerate(engine.weights):
            if weight.offset + weight.size_bytes > sizes.get(weight.path, 0):
                what = f"{shown(weight.name)} is not within a file of this manifest"
                yield StrictError(f"engines[{i}].weights[{j}]", what)
            elif roles[weight.path] != "weights":
                yield _role_problem(f"engines[{i}].weights[{j}].path", weight.path, roles[weight.path], "weights")
        for name in engine.profiles:
            if name not in profiles:
                yield StrictError(f"engines[{i}].profiles", f"{shown(name)} is not a profile of this manifest")
    if manifest.engines and manifest.target.compute_capability is None:
        yield StrictError("target.compute_capability", "engines are for one, and the target has none")
    for i, check in enumerate(manifest.plan_checks):
        if check.engine not in engines:
            yield StrictError(f"plan_checks[{i}].engine", f"{shown(check.engine)} is not an engine of this manifest")


def _role_problem(where: str, path: str, role: str, wanted: str) -> StrictError:
    return StrictError(where, f"{shown(path)} has the role {shown(role)}, not {shown(wanted)}")


def _file_problems(manifest: Manifest) -> Iterator[StrictError]:
    """Files that other fields name are there, in the role that the field is for."""
    roles = {record.path: record.role for record in manifest.files}
    named: list[tuple[str, str, str]] = []
    if manifest.request.prompt is not None:
        named.append(("request.prompt.tokenizer", manifest.request.prompt.tokenizer, "tokenizer"))
    if manifest.precision is not None:
        named.append(("precision.report", manifest.precision.report, "report"))
        if manifest.precision.calibration is not None:
            named.append(("precision.calibration.lineage", manifest.precision.calibration.lineage, "calibration"))
    for where, path, role in named:
        if path not in roles:
            yield StrictError(where, f"{shown(path)} is not a file of this manifest")
        elif roles[path] != role:
            yield _role_problem(where, path, roles[path], role)


def _edge_problems(manifest: Manifest) -> Iterator[StrictError]:
    outputs = {(name, t.name): t for name, graph in manifest.graphs.items() for t in graph.outputs}
    inputs = {(name, t.name): t for name, graph in manifest.graphs.items() for t in graph.inputs}
    for name, graph in manifest.graphs.items():
        yield from _repeated(f"graphs.{shown(name)}.inputs", "name", [t.name for t in graph.inputs])
        yield from _repeated(f"graphs.{shown(name)}.outputs", "name", [t.name for t in graph.outputs])
    fed = Counter((edge.target, edge.input) for edge in manifest.edges)
    for i, edge in enumerate(manifest.edges):
        source, target = outputs.get((edge.source, edge.output)), inputs.get((edge.target, edge.input))
        if source is None:
            yield StrictError(f"edges[{i}]", f"{shown(edge.source)} has no output {shown(edge.output)}")
        if target is None:
            yield StrictError(f"edges[{i}]", f"{shown(edge.target)} has no input {shown(edge.input)}")
        if source is not None and target is not None:
            # Another run of the source has sizes of its own, which have names of their own.
            fits = _same(source, target) if edge.instance is None else _connects(source, target)
            if not fits:
                yield StrictError(f"edges[{i}]", f"{_form(source)} cannot be {_form(target)}")
            negative = any(isinstance(dim, str) and _NEGATIVE in dim for dim in target.dims)
            if edge.instance is not None and not (negative and edge.instance == _NEGATIVE.removesuffix("_")):
                yield StrictError(f"edges[{i}].instance", f"{shown(edge.instance)}; {_form(target)} is not of that run")
        if fed[edge.target, edge.input] > 1:
            yield StrictError(f"edges[{i}]", f"input {shown(edge.input)} of {shown(edge.target)} has two edges")


def _chain_problems(manifest: Manifest) -> Iterator[StrictError]:
    for name, parts in manifest.chains.items():
        where = f"chains.{shown(name)}"
        missing = [part for part in (name, *parts) if part not in manifest.graphs]
        for part in missing:
            yield StrictError(where, f"{shown(part)} is not a graph of this manifest")
        if len(set(parts)) < 2 or len(set(parts)) < len(parts) or set(parts) & manifest.chains.keys():
            yield StrictError(where, "a chain is of two different graphs or more, and of no chains")
        if missing:
            continue
        known = {tensor.name: tensor for tensor in manifest.graphs[name].inputs}
        for part in parts:
            for tensor in manifest.graphs[part].inputs:
                if tensor.name not in known:
                    yield StrictError(where, f"nothing before {shown(part)} gives its input {shown(tensor.name)}")
                elif not _connects(known[tensor.name], tensor):
                    yield StrictError(where, f"{_form(known[tensor.name])} cannot be {_form(tensor)}")
            known |= {tensor.name: tensor for tensor in manifest.graphs[part].outputs}
        for tensor in manifest.graphs[name].outputs:
            if tensor.name not in known or not _connects(known[tensor.name], tensor):
                yield StrictError(where, f"no part returns {_form(tensor)}")


def _loop_problems(manifest: Manifest) -> Iterator[StrictError]:
    if manifest.loop is not None:
        body = manifest.loop.body
        yield from _carried_problems(manifest, "loop", body, [body], manifest.loop.carried)
        for name in dict.fromkeys(manifest.loop.bodies):
            if name not in manifest.graphs or body not in manifest.graphs:
                yield StrictError("loop.bodies", f"{shown(name)} is not a graph of this manifest")
            elif manifest.graphs[name] != manifest.graphs[body]:
                yield StrictError("loop.bodies", f"{shown(name)} takes or returns other tensors than {shown(body)}")
        for i, segment in enumerate(manifest.loop.segments):
            graph = manifest.graphs.get(segment.graph)
            if graph is None:
                yield StrictError(f"loop.segments[{i}]", f"{shown(segment.graph)} is not a graph of this manifest")
                continue
            for name in set(segment.rows) - {t.name for t in graph.inputs}:
                yield StrictError(f"loop.segments[{i}].rows", f"{shown(segment.graph)} has no input {shown(name)}")
    for name, stream in manifest.streams.items():
        sources = [stream.first, stream.next]
        yield from _carried_problems(manifest, f"streams.{shown(name)}", stream.next, sources, stream.carried)


def _carried_problems(
    manifest: Manifest, where: str, body: str, sources: list[str], carried: Mapping[str, str]
) -> Iterator[StrictError]:
    """``carried`` goes from outputs of every one of ``sources`` to inputs of ``body``."""
    missing = [name for name in dict.fromkeys([body, *sources]) if name not in manifest.graphs]
    for name in missing:
        yield StrictError(where, f"{shown(name)} is not a graph of this manifest")
    if missing:
        return
    inputs = {t.name: t for t in manifest.graphs[body].inputs}
    outputs = {source: {t.name: t for t in manifest.graphs[source].outputs} for source in sources}
    for name, output in carried.items():
        if name not in inputs:
            yield StrictError(f"{where}.carried", f"{shown(body)} has no input {shown(name)}")
        for source in sources:
            if output not in outputs[source]:
                yield StrictError(f"{where}.carried", f"{shown(source)} has no output {shown(output)}")
            elif name in inputs and not _same(outputs[source][output], inputs[name]):
                what = f"{_form(outputs[source][output])} cannot be {_form(inputs[name])}"
                yield StrictError(f"{where}.carried", what)


def _connects(source: Tensor, target: Tensor) -> bool:
    """Equal type and rank, and equal sizes where both are numbers; expressions are compared by the build."""
    if source.dtype != target.dtype or len(source.dims) != len(target.dims):
        return False
    pairs = zip(source.dims, target.dims, strict=True)
    return all(a == b for a, b in pairs if isinstance(a, int) and isinstance(b, int))


def _same(source: Tensor, target: Tensor) -> bool:
    """Equal type, and equal dims as they are written."""
    return source.dtype == target.dtype and source.dims == target.dims


_DIM = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_DIMS = re.compile(r"[A-Za-z0-9_ +*/()\-]+")
_NEGATIVE = "negative_"
"""Beginning of the names of sizes of the negative prompt."""


def _dim_problems(manifest: Manifest) -> Iterator[StrictError]:
    """Dims of graphs are expressions over the dims that all profiles have."""
    for i, profile in enumerate(manifest.profiles):
        if profile.dims.keys() != manifest.profiles[0].dims.keys():
            yield StrictError(f"profiles[{i}].dims", "not the dims of the first profile")
    known = manifest.profiles[0].dims.keys() if manifest.profiles else ()
    for name, graph in manifest.graphs.items():
        for tensor in (*graph.inputs, *graph.outputs):
            for dim in tensor.dims:
                if isinstance(dim, int):
                    continue
                where = f"graphs.{shown(name)}"
                if not _DIMS.fullmatch(dim):
                    yield StrictError(where, f"{shown(dim)} of {shown(tensor.name)} is not an expression over dims")
                for used in _DIM.findall(dim):
                    if used.removeprefix(_NEGATIVE) not in known:
                        yield StrictError(where, f"{shown(used)} of {shown(tensor.name)} is not a dim of the profiles")


def _geometry_problems(manifest: Manifest) -> Iterator[StrictError]:
    """Sizes of the model are ones that a model can have, and those that requests are told of too are the same."""
    request, geometry = manifest.request, manifest.model.geometry
    for name, value in geometry.items():
        if isinstance(value, int) and not isinstance(value, bool) and not 0 < value <= _MAX_SIZE:
            yield StrictError(f"model.geometry.{shown(name)}", f"{value} is outside 1 … {_MAX_SIZE:,}")
    told = {
        "latent_channel": request.video.channels,
        "action_dim": request.action.dim if request.action else None,
        "sound_dim": request.sound.channels if request.sound else None,
    }
    for name, width in told.items():
        found = geometry.get(name)
        if found is not None and width is not None and (found != width or isinstance(found, bool)):
            yield StrictError(f"model.geometry.{name}", f"{shown(found)}; requests are told of {width}")


_MAX_SIZE = 2**31 - 1


def _request_problems(manifest: Manifest) -> Iterator[StrictError]:
    """The facts of the model that requests use fit the inputs of its loop."""
    request, graphs = manifest.request, manifest.graphs
    names = [manifest.loop.body, *(s.graph for s in manifest.loop.segments)] if manifest.loop is not None else []
    taken = {t.name: t for name in names if name in graphs for t in graphs[name].inputs}
    widths = {
        "vision": (1, request.video.channels),
        "sound": (0, request.sound.channels if request.sound else None),
        "action": (1, request.action.dim if request.action else None),
    }
    for name, tensor in taken.items():
        kind, _, what = name.rpartition("_")
        if what in ("latent", "sample") and kind in widths:
            axis, width = widths[kind]
            if len(tensor.dims) <= axis or tensor.dims[axis] != width:
                yield StrictError("request", f"{width} channels of {kind}; the loop takes {_form(tensor)}")
    if request.action is not None:
        yield from embodiment_problems(request.action.embodiments, request.action.dim, request.action.domains)
    rates = {"video.base_fps": request.video.base_fps}
    if request.sound is not None:
        rates["sound.latent_fps"] = request.sound.latent_fps
    for name, rate in rates.items():
        if not 0 < rate <= _MAX_RATE:
            yield StrictError(f"request.{name}", f"{rate:g} is outside 0 … {_MAX_RATE}")
    prompt = request.prompt
    if prompt is not None and (len(prompt.plain), len(prompt.system)) != (2, 3):
        yield StrictError("request.prompt", "a template has 2 pieces, and 3 with a system message")


_MAX_RATE = 1_000_000


def _schedule_problems(manifest: Manifest) -> Iterator[StrictError]:
    """The schedule that was compiled: numbers, one for each step, and as many steps as the loop takes."""
    steps = manifest.options.get("schedule.steps")
    if steps is None:
        return
    if not isinstance(steps, int) or isinstance(steps, bool) or not 1 <= steps <= MAX_STEPS:
        yield StrictError("options.schedule.steps", f"{shown(steps)} is not a number of steps, 1 … {MAX_STEPS}")
        return
    for name, count in (("sigmas", steps + 1), ("timesteps", steps)):
        values = manifest.options.get(f"schedule.{name}", ())
        if not isinstance(values, tuple) or any(not _number(value) for value in values):
            yield StrictError(f"options.schedule.{name}", "not numbers")
        elif len(values) not in (0, count):
            yield StrictError(f"options.schedule.{name}", f"{len(values)} numbers, {count} for {steps} steps")
    if manifest.loop is None:
        return
    if manifest.loop.segments and sum(segment.steps for segment in manifest.loop.segments) != steps:
        yield StrictError("loop.segments", f"not the {steps} steps of the schedule")
    if len(manifest.loop.bodies) not in (0, steps):
        yield StrictError("loop.bodies", f"{len(manifest.loop.bodies)} bodies for {steps} steps")


def _number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _form(tensor: Tensor) -> str:
    return f"{shown(tensor.name)} {shown(tensor.dtype)}{shown(list(tensor.dims))}"


def _repeated(where: str, field: str, values: list[str]) -> Iterator[StrictError]:
    for value, count in Counter(values).items():
        if count > 1:
            yield StrictError(where, f"{field} {shown(value)} is used {count} times")
