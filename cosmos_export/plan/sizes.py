"""Bytes: of engines, of what a request holds on the device, and of what a build holds on the host and on disk.

Weights are counted exactly, from the geometry. The rest follows from constants that were measured on builds of true
size (`benchmarks/compile.py --builds`); each stands below with what it is.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from math import inf

from cosmos_export.checkpoint.codecs import CODECS
from cosmos_export.checkpoint.geometry import Geometry
from cosmos_export.checkpoint.layout import ExpectedTensor
from cosmos_export.diagnostics import UnsupportedError
from cosmos_export.plan.precision import Mix, PlannedPrecision
from cosmos_export.plan.subject import Subject
from cosmos_export.plan.work import decodes, encoded_frames
from cosmos_export.plan.workload import Workload
from cosmos_export.precision.scheme import WIDE_BITS
from cosmos_export.precision.schemes import SCHEMES, UNQUANTIZED
from cosmos_export.targets import Target
from cosmos_export.targets.backends import backend_of
from cosmos_export.targets.partition import partition

CODE_BYTES: Mapping[str, int] = {"conditioning": 440_000, "codec": 5_000_000}
"""Bytes of an engine on top of its weights: kernels and the description of its layers."""
TOWER_CODE_BYTES, LAYER_CODE_BYTES = 7_000_000, 50_000
"""The same of a tower, and for each of its layers."""
PROFILE_CODE_SHARE = 0.5
"""Code that each further profile adds, as a share of the first one's."""

CODEC_BUILDER_SHARE = 1.8
"""Anonymous memory of the builder per byte of weights, where these are of convolutions; `Scheme.builder_share` has that
of linears."""
BUILDER_BYTES = 300_000_000
"""Memory of the builder in bytes, on top of its weights."""
_BRIEF_BYTES = 100_000_000
"""Engines with fewer weight bytes are built in seconds."""
COMPILER_BYTES, COMPILER_LAYER_BYTES = 450_000_000, 4_000_000
"""Anonymous memory of the process that captures, lowers and waits, and for each layer."""

GATES_SHARE = 19
"""Bytes that measuring a quantized linear takes, for each of its parameters."""

LOOP_SHARE = 1.16
"""Activations of a loop on the device beside those of its body: it is unrolled a little."""

CODEC_ACTIVATIONS: Mapping[str, Mapping[str, int]] = {
    "vae-decoder": {"first": 248_000, "next": 1_409_500},
    "vae-encoder": {"first": 150_000, "next": 752_700},
    "sound-decoder": {"": 4_956_160},
}
"""Device bytes for each latent row and column of a frame (for sound, each latent), by graph of the codec."""
_CODEC_ENGINES = ("vae_", "sound_")
"""Beginning of the names of their engines."""
_TIME_CONVOLUTIONS = {"vae-decoder": 10_300_000, "vae-encoder": 900_000}
"""Parameters of a video codec that only its calls after the first read."""


@dataclass(frozen=True)
class PlannedEngine:
    """One engine: what it weighs on disk and on the device."""

    name: str
    parameters: int
    weight_bytes: int
    engine_bytes: int
    activation_bytes: int
    """Bytes at the profile's maximum."""
    scheme: str
    builder_weights: int
    """Anonymous memory that the builder takes for the weights of the engine, or of its largest part."""
    forms: tuple[tuple[int, ...], ...]
    """Bytes of its engines in each form that steps compute in, the most frequent first; all but the generator have one.
    A form is one engine, or several where one would take too much of the host to build."""

    @property
    def engines(self) -> int:
        """Number of engines in all forms together."""
        return sum(map(len, self.forms))

    @property
    def cut(self) -> bool:
        """Whether a form is more than one engine."""
        return self.engines > len(self.forms)


def components(
    subject: Subject,
    workloads: Sequence[Workload],
    chosen: PlannedPrecision,
    branches: int,
    memory_budget: int | None = None,
    *,
    external: bool = False,
) -> list[PlannedEngine]:
    """Every engine of a bundle that serves ``workloads``, in the order of a request.

    ``branches``: guidance branches that one call computes; 1 where the host runs the loop. ``memory_budget``: of the
    build, in bytes; None: nothing is cut. ``external``: the builder has no weights but those that a product widens.
    """

    def weigh(tensors: Sequence[ExpectedTensor], mix: Mix | None) -> float:
        return _builder_weights(tensors, mix, external)

    geometry, profiles = subject.geometry, len({workload.profile.name for workload in workloads})
    graphs = subject.graphs()
    mixes = {"reasoner": chosen.reasoner, "conditioning": None, "generator": chosen.generator}
    rows = {
        "reasoner": max(w.profile.dims["und_len"].max for w in workloads),
        "conditioning": 0,
        "generator": branches * max(w.most_rows for w in workloads),
    }
    keys = {"reasoner": 0, "conditioning": 0, "generator": rows["generator"] + branches * rows["reasoner"]}
    found = []
    for name, mix in mixes.items():
        if name not in graphs:
            continue
        weights = stored_bytes(graphs[name], mix)
        code = CODE_BYTES.get(name, TOWER_CODE_BYTES + geometry.num_hidden_layers * LAYER_CODE_BYTES)
        code = int(code * (1 + PROFILE_CODE_SHARE * (profiles - 1)))
        parameters = sum(tensor.elements for tensor in graphs[name])
        activations = activation_bytes(geometry, rows[name], keys[name]) if rows[name] else 0
        if name == "generator" and branches > 1:
            activations = int(activations * LOOP_SHARE)
        # What some steps compute in may take more to build than what most of them do, and be cut finer.
        forms = [
            (form, _runs_of(graphs[name], form, memory_budget, geometry, weigh)) for form in _forms(name, mix, chosen)
        ]
        largest = max(sum(weigh(unit, form) for unit in run) for form, runs in forms for run in runs)
        engines = tuple(tuple(sum(stored_bytes(u, mix) for u in run) + code for run in runs) for _, runs in forms)
        scheme = UNQUANTIZED if mix is None else mix.label
        found.append(
            PlannedEngine(name, parameters, weights, weights + code, activations, scheme, int(largest), engines)
        )
    for codec in subject.codecs:
        found += _codec(subject, codec, workloads)
    return found


def _forms(name: str, mix: Mix | None, chosen: PlannedPrecision) -> list[Mix | None]:
    """Every mix that graph ``name`` is built in, the most frequent first."""
    by_count = sorted(chosen.steps, key=lambda entry: entry[1], reverse=True)
    return [step for step, _ in by_count] if name == "generator" else [mix]


def _builder_weights(tensors: Sequence[ExpectedTensor], mix: Mix | None, external: bool) -> float:
    """Anonymous memory of the builder for ``tensors``; ``external``: for those that cannot be inputs of the engine."""
    wide = 0.0 if external else SCHEMES[UNQUANTIZED].builder_share
    if mix is None:
        return wide * stored_bytes(tensors, None)
    linear = sum(tensor.elements for tensor in tensors if tensor.linear)
    shares = {name: share for name, share in mix.linears.items() if not external or SCHEMES[name].weight_only}
    narrow = sum(share * SCHEMES[name].bits / 8 * SCHEMES[name].builder_share for name, share in shares.items())
    return narrow * linear + wide * 2 * sum(tensor.elements for tensor in tensors if not tensor.linear)


_LAYER = re.compile(r"layers\.(\d+)\.")
_AFTER_LAYERS = re.compile(r"norm|\w*proj_out|lm_head")
_Unit = tuple[ExpectedTensor, ...]


def _units(tensors: Sequence[ExpectedTensor]) -> list[_Unit]:
    """``tensors`` between the places where little crosses: attention and MLP of each layer, the first with what comes
    before the layers; and what comes after them."""

    def place(tensor: ExpectedTensor) -> tuple[float, bool]:
        layer = _LAYER.match(tensor.name)
        if layer is None:
            return (inf if _AFTER_LAYERS.match(tensor.name) else 0), False
        return int(layer[1]), ".mlp" in tensor.name or "post_attention" in tensor.name

    ordered = sorted(tensors, key=place)
    return [tuple(group) for _, group in groupby(ordered, place)]


def _runs_of(
    tensors: Sequence[ExpectedTensor],
    mix: Mix | None,
    memory_budget: int | None,
    geometry: Geometry,
    weigh: Callable[[Sequence[ExpectedTensor], Mix | None], float],
) -> list[list[_Unit]]:
    """``tensors`` as they are distributed over engines under ``memory_budget``: by the rule of the compiler."""
    limit = None if memory_budget is None else largest_part(memory_budget, geometry.num_hidden_layers)
    if limit is None or weigh(tensors, mix) <= limit:
        return [[tuple(tensors)]]
    units = _units(tensors)
    sizes = [weigh(unit, mix) for unit in units]
    cuts = partition(sizes, [1.0] * len(units), limit)
    return [units[start:end] for start, end in pairwise([0, *cuts, len(units)])]


def largest_part(memory_budget: int, layers: int) -> int:
    """Memory that the weights of one engine may take in the builder, where a build of a model of so many layers is to
    stay within ``memory_budget``."""
    return memory_budget - compiler_bytes(layers) - BUILDER_BYTES


def compiler_bytes(layers: int) -> int:
    """Anonymous memory of the process that captures, lowers and waits for the builder."""
    return COMPILER_BYTES + layers * COMPILER_LAYER_BYTES


def stored_bytes(tensors: Sequence[ExpectedTensor], mix: Mix | None) -> int:
    """Bytes of a graph's weights: linears as in ``mix``, everything else in bf16."""
    linear = sum(tensor.elements for tensor in tensors if tensor.linear)
    others = sum(tensor.elements for tensor in tensors if not tensor.linear)
    return int(linear * (WIDE_BITS if mix is None else mix.bits) / 8) + 2 * others


def activation_bytes(geometry: Geometry, rows: int, keys: int = 0) -> int:
    """Bytes of activations of a tower's engine at ``rows``, in bf16.

    All layers share the memory of the widest point of one, its MLP: gate, up and their product, or up alone, with what
    the stream still needs. ``keys``: rows of keys and values that are joined for attention.
    """
    facts = geometry.family.facts
    width = facts.mlp_activations * geometry.intermediate_size + facts.stream_width * geometry.hidden_size
    return int(2 * rows * width) + 2 * 2 * geometry.key_value_width * keys


def cache_bytes(subject: Subject, workload: Workload, guided: bool, share: float = 1.0) -> int:
    """Keys and values of the prompt, and of the negative prompt where a step is guided. ``share``: of what they take in
    bf16."""
    tokens = workload.prompt_tokens + (workload.negative_tokens if guided else 0)
    return int(subject.geometry.kv_bytes_per_token() * tokens * share)


def latent_bytes(subject: Subject, workload: Workload) -> int:
    """Latents and the sampler's three states, in fp32."""
    geometry = subject.geometry
    vision = geometry.latent_channel * workload.dim("frames") * workload.dim("height") * workload.dim("width")
    sound = (geometry.sound_dim or 0) * workload.dim("sound_len")
    action = (geometry.action_dim or 0) * workload.dim("action_len")
    return 4 * 4 * (vision + sound + action)


def _codec(subject: Subject, name: str, workloads: Sequence[Workload]) -> list[PlannedEngine]:
    served = [w for w in workloads if CODECS[name].modality != "sound" or w.profile.dims["sound_len"].max]
    if not served:
        return []
    result = []
    for graph, each in CODEC_ACTIVATIONS[name].items():
        size = max(_codec_size(name, w) for w in served)
        parameters = subject.codecs[name]
        if graph == "first":
            share = subject.codecs[name] / (555_060_892 if name == "vae-decoder" else 149_639_440)
            parameters -= int(_TIME_CONVOLUTIONS[name] * share)
        engine = 2 * parameters + CODE_BYTES["codec"]
        title = "_".join(filter(None, (name.replace("-", "_"), graph)))
        held = int(2 * parameters * CODEC_BUILDER_SHARE)
        forms = ((engine,),)
        result.append(PlannedEngine(title, parameters, 2 * parameters, engine, each * size, UNQUANTIZED, held, forms))
    return result


def _codec_size(name: str, workload: Workload) -> int:
    most = {dim: span.max for dim, span in workload.profile.dims.items()}
    return most["sound_len"] if name == "sound-decoder" else most["height"] * most["width"]


@dataclass(frozen=True)
class DeviceMemory:
    """Device memory of one request, by what holds it and by phase."""

    weights_bytes: int
    """Weights of all engines."""
    cache_bytes: int
    latent_bytes: int
    activations_bytes: int
    """Activations of the engine that needs the most. Engines run one after the other and share this memory."""
    phases: Mapping[str, int]
    """Bytes with only one phase's engines on the device: ``prefill``, ``denoise`` (of bodies that take turns one),
    ``decode``."""

    @property
    def resident_bytes(self) -> int:
        """Bytes with every engine on the device."""
        return self.weights_bytes + self.cache_bytes + self.latent_bytes + self.activations_bytes

    @property
    def phased_bytes(self) -> int:
        """Bytes with engines loaded for their phase and dropped after it."""
        return max(self.phases.values())


def weight_copies(target: Target, engines: int) -> int:
    """How many copies of the generator's weights the device has, where ``engines`` engines use them: each engine of
    a builder holds its own, and graphs in PyTorch read the same tensors."""
    return 1 if backend_of(target).shares_weights else engines


def device(
    subject: Subject,
    workload: Workload,
    parts: Sequence[PlannedEngine],
    guided: bool,
    copies: int = 1,
    cache_share: float = 1.0,
) -> DeviceMemory:
    """Device memory of ``workload`` on the engines ``parts``. ``copies``: of the generator's weights. ``cache_share``
    is that of `PlannedPrecision`."""
    cache, latents = cache_bytes(subject, workload, guided, cache_share), latent_bytes(subject, workload)
    used = [part for part in parts if _runs(part, workload)]
    of = {"prefill": ("reasoner",), "denoise": ("generator", "conditioning"), "decode": _CODEC_ENGINES}
    phases = {}
    for phase, names in of.items():
        own = [part for part in used if part.name.startswith(names)]
        if own:
            phases[phase] = sum(p.engine_bytes for p in own) + max(p.activation_bytes for p in own)
            phases[phase] += latents + (cache if phase != "decode" else 0)
    return DeviceMemory(
        weights_bytes=engine_bytes(used, copies),
        cache_bytes=cache,
        latent_bytes=latents,
        activations_bytes=max(part.activation_bytes for part in used),
        phases=phases,
    )


def _runs(part: PlannedEngine, workload: Workload) -> bool:
    frames = encoded_frames(workload)
    match part.name:
        case "vae_encoder_first":
            return frames > 0
        case "vae_encoder_next":
            return frames > 1
        case "vae_decoder_first":
            return decodes(workload)
        case "vae_decoder_next":
            return decodes(workload) and workload.dim("frames") > 1
        case "sound_decoder":
            return workload.dim("sound_len") > 0
    return True


@dataclass(frozen=True)
class Host:
    """Resources that the build takes of its machine."""

    peak_anonymous_bytes: int
    """Memory that no file backs: what the machine must really have."""
    largest: str
    """The engine whose build takes it."""
    disk_bytes: int
    """Size of the bundle: models with their weights, and engines."""
    seconds: tuple[float, float]
    """Range of seconds, from a fast disk and idle cores to a slow disk and shared ones."""


ENGINE_BYTES_PER_S = (50e6, 400e6)
WEIGHT_BYTES_PER_S = (100e6, 1200e6)
HASH_BYTES_PER_S = (400e6, 3000e6)
CAPTURE_S_PER_LAYER = (2.6, 0.6)
CODEC_S = (40.0, 12.0)
GATES_S = (110.0, 40.0)
"""Slow and fast: builder with its writing, weights, hashing, capture with passes, the capture of one codec, and the
measuring of a quantized model, of which no more than so much is looked at."""


def typical(rates: tuple[float, float]) -> float:
    """The geometric mean of the slow and the fast rate."""
    return float((rates[0] * rates[1]) ** 0.5)


def host(
    subject: Subject,
    parts: Sequence[PlannedEngine],
    segments: int,
    with_engines: bool,
    memory_budget: int | None = None,
    quantized: bool = False,
) -> Host:
    """The build of ``parts``; ``segments``: engines that have the generator's weights, each its own copy.
    ``with_engines``: whether the target's backend has any; otherwise models and graphs are all that is written.

    ``memory_budget``: within which two builders run at a time, as the compiler lets them; None: one at a time.
    ``quantized``: what that loses is measured beside the first towers.
    """
    layers = subject.geometry.num_hidden_layers
    compiler = compiler_bytes(layers)
    peaks = {part.name: builder_bytes(part) for part in parts} if with_engines else {}
    largest = max(peaks, key=peaks.__getitem__, default="")
    models, engines = model_bytes(subject, parts), engine_bytes(parts, segments) if with_engines else 0
    bundle = models + engines + subject.tokenizer_bytes
    low, high = (
        engines / ENGINE_BYTES_PER_S[i]
        + models / WEIGHT_BYTES_PER_S[i]
        + (bundle + subject.input_bytes) / HASH_BYTES_PER_S[i]
        + layers * CAPTURE_S_PER_LAYER[i]
        + len(subject.codecs) * CODEC_S[i]
        + quantized * GATES_S[i]
        for i in (1, 0)
    )
    limit = 0 if memory_budget is None else memory_budget - compiler
    together = _together(parts, peaks, segments, limit, gates_bytes(subject.geometry) if quantized else 0)
    return Host(compiler + max(together, peaks.get(largest, 0)), largest, bundle, (low, high))


def _together(parts: Sequence[PlannedEngine], peaks: Mapping[str, int], segments: int, limit: int, gates: int) -> int:
    """Most memory of two builders at a time, of those that do not take more than ``limit``: neighbours in the order
    of their turns. Codecs have theirs while the towers are captured, and ``gates`` run beside the first tower."""
    codecs, towers = (
        [
            peaks[part.name]
            for part in parts
            if part.name in peaks and part.builder_weights > _BRIEF_BYTES
            if part.name.startswith(_CODEC_ENGINES) == of_codecs
            for _ in range(max(part.engines, segments if part.name == "generator" else 1))
        ]
        for of_codecs in (True, False)
    )
    pairs = [a + b for turns in (codecs, towers) for a, b in pairwise(turns)]
    first = [gates + one for one in towers[:1]]
    return max((taken for taken in (*pairs, *first) if taken <= limit), default=0)


def gates_bytes(geometry: Geometry) -> int:
    """Anonymous memory of measuring a quantized model, one linear at a time: the largest is an MLP's first."""
    inputs = len(geometry.family.facts.mlp_inputs)
    return GATES_SHARE * inputs * geometry.intermediate_size * geometry.hidden_size


def builder_bytes(part: PlannedEngine) -> int:
    """Anonymous memory of the process that builds ``part``, or the largest of what it is cut into."""
    return part.builder_weights + BUILDER_BYTES


def require_budget(parts: Sequence[PlannedEngine], layers: int, memory_budget: int, *, loop: str) -> None:
    """UnsupportedError CX457: an engine needs more than the budget and cannot be cut, or not small enough. ``loop``: on
    the ``device`` it is one engine."""
    compiler = compiler_bytes(layers)
    for part in parts:
        needed = compiler + builder_bytes(part)
        if needed > memory_budget:
            gigabytes = needed / 2**30
            raise UnsupportedError(
                "CX457",
                f"building the engine of {part.name} takes {gigabytes:.1f} GiB of memory, and the budget is "
                f"{memory_budget / 2**30:.1f} GiB",
                f"`--memory-budget {int(gigabytes) + 1}GiB`, on a machine that has it",
            )
        if part.cut and part.name == "generator" and loop == "device":
            raise UnsupportedError(
                "CX457",
                f"a loop on the device is one engine, and building it passes the budget of "
                f"{memory_budget / 2**30:.1f} GiB: the generator would be cut into {max(map(len, part.forms))}",
                "`--loop host` cuts it; or a larger `--memory-budget`, or a recipe with smaller weights",
            )


def engine_bytes(parts: Sequence[PlannedEngine], segments: int) -> int:
    return sum(part.engine_bytes * (segments if part.name == "generator" else 1) for part in parts)


def model_bytes(subject: Subject, parts: Sequence[PlannedEngine]) -> int:
    """Weights beside the models: each once; a codec's two graphs share one file, and folded weights are fp32."""
    towers = sum(part.weight_bytes for part in parts if not part.name.startswith(_CODEC_ENGINES))
    time = sum(4 * tensor.elements for tensor in subject.graphs().get("schedule", ()))
    names = {part.name.replace("_first", "").replace("_next", "").replace("_", "-") for part in parts}
    codecs = sum(2 * subject.codecs[n] + 2 * subject.weight_norm.get(n, 0) for n in names & set(subject.codecs))
    return towers + time + codecs
