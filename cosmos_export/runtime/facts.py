"""Statements of a manifest that are there twice, or that this version knows by itself: target, schedule, model sizes.

A manifest that was changed and sealed again is well formed. Here its statements are held to each other and to what is
known without the checkpoint. What nothing else tells (names, versions, times, verdicts, texts of the prompt's template)
is the builder's word, which only a signature covers: docs/limits.md lists it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, get_args

import numpy as np

from cosmos_export.bundle import GraphContract, Manifest, RequestRecord, Tensor
from cosmos_export.diagnostics import UserError, shown
from cosmos_export.kernels.description import PLUGINS
from cosmos_export.options import LoopMode, Overrides, ParityMode, WeightsMode
from cosmos_export.runtime.scheduling import checkpoint_sampling, recorded_schedule
from cosmos_export.sampling import MODES, resolve_schedule
from cosmos_export.targets import load_target
from cosmos_export.targets.backends import backends

_WIDE = {"fp32": "float32", "bf16": "bfloat16"}
"""Recipes that quantize nothing → the type that keys have then."""
MODALITIES = ("vision", "sound", "action")
_KEY = re.compile(r"(?:key|value)_(\d{1,6})")
_SIGMA_TOLERANCE, _TIMESTEP_TOLERANCE = 2e-6, 1.0
"""Powers of NumPy differ in the last digit between processors, and timesteps are cut off to whole numbers."""


def fact_problems(manifest: Manifest) -> Iterator[str]:
    """Fields of ``manifest`` that are wrong, each with the reason."""
    yield from _target_problems(manifest)
    yield from _recipe_problems(manifest)
    yield from _geometry_problems(manifest)
    yield from _codec_problems(manifest.request, manifest.graphs)
    yield from _option_problems(manifest)
    yield from _schedule_problems(manifest)


def _target_problems(manifest: Manifest) -> Iterator[str]:
    said = manifest.target
    try:
        known = load_target(said.name)
    except UserError as error:
        yield f"target.name: {error.message}"
        return
    if said.compute_capability != known.compute_capability:
        has = known.compute_capability or "none"
        yield f"target.compute_capability: {shown(said.compute_capability)}; {said.name} has {has}"
    allowed = (known.backend, *known.other_backends)
    if said.backend not in allowed:
        yield f"target.backend: {shown(said.backend)}; {said.name} has {', '.join(allowed)}"
        return
    builds = backends()[said.backend].engines is not None
    waits = any(record.role == "engine-requests" for record in manifest.files)
    if manifest.engines and not builds:
        yield f"target.backend: {said.backend} has no engines, and this bundle has {len(manifest.engines)}"
    if builds and not (manifest.engines or waits):
        yield f"target.backend: this bundle has no engine for {said.backend}, and waits for none"
    if any(record.role == "graph" for record in manifest.files) != backends()[said.backend].compiles_when_run:
        yield f"target.backend: {said.backend}; the files of this bundle are those of another"


def _recipe_problems(manifest: Manifest) -> Iterator[str]:
    """A recipe is that of the precision record; without one, keys have the type of the recipe."""
    if manifest.precision is not None:
        if manifest.recipe != manifest.precision.recipe:
            yield f"recipe: {shown(manifest.recipe)}; precision.recipe is {shown(manifest.precision.recipe)}"
        return
    types = {t.dtype for graph in manifest.graphs.values() for t in graph.outputs if _KEY.fullmatch(t.name)}
    wide = _WIDE.get(manifest.recipe)
    if types and wide is not None and types != {wide}:
        yield f"recipe: {manifest.recipe}, and keys are {', '.join(sorted(types))}"
    if wide is None:
        yield f"recipe: {shown(manifest.recipe)} quantizes, and `precision` says nothing of it"


def _geometry_problems(manifest: Manifest) -> Iterator[str]:
    """Layers, heads and widths of the model are those of its keys and of its embedding of time; it has the tokens that
    end every prompt."""
    geometry = manifest.model.geometry
    keys: dict[int, Tensor] = {}
    for graph in manifest.graphs.values():
        for tensor in graph.outputs:
            if found := _KEY.fullmatch(tensor.name):
                keys[int(found[1])] = tensor
            if tensor.name == "time_embedding":
                yield from _differs("hidden_size", geometry, tensor.dims[-1:])
    vocabulary, prompt = geometry.get("vocab_size"), manifest.request.prompt
    if prompt is not None and isinstance(vocabulary, int) and max(prompt.suffix_ids, default=0) >= vocabulary:
        yield f"request.prompt.suffix_ids: {max(prompt.suffix_ids)}; the vocabulary has {vocabulary} entries"
    if keys:
        yield from _differs("num_hidden_layers", geometry, (max(keys) + 1,))
    for tensor in keys.values():
        if len(tensor.dims) == 3:
            yield from _differs("num_key_value_heads", geometry, tensor.dims[1:2])
            yield from _differs("head_dim", geometry, tensor.dims[2:])


def _differs(name: str, geometry: Mapping[str, Any], found: tuple[int | str, ...]) -> Iterator[str]:
    if name in geometry and isinstance(found[0], int) and (geometry[name],) != found:
        yield f"model.geometry.{name}: {shown(geometry[name])}; graphs have {found[0]}"


def _codec_problems(request: RequestRecord, graphs: Mapping[str, GraphContract]) -> Iterator[str]:
    """Pixels, frames and samples of a latent are those that the codecs make of one."""
    video, hop = request.video, request.sound.hop if request.sound is not None else None
    for name, graph in graphs.items():
        tensors = {tensor.name: tensor.dims for tensor in (*graph.inputs, *graph.outputs)}
        pixels, latent = tensors.get("pixels", ()), tensors.get("latent", ())
        if len(pixels) == len(latent) == 5:
            if [_times(video.spatial, size) for size in latent[3:]] != list(pixels[3:]):
                yield f"request.video.spatial: {video.spatial}; {shown(name)} has {shown(list(pixels))} pixels"
            if pixels[2] not in (1, _times(video.temporal, latent[2])):
                yield f"request.video.temporal: {video.temporal}; {shown(name)} has {shown(list(pixels))} pixels"
        waveform, sound = tensors.get("waveform", ()), tensors.get("sound_latent", ())
        if hop is not None and len(waveform) == len(sound) == 2 and waveform[1] != _times(hop, sound[1]):
            yield f"request.sound.hop: {hop}; {shown(name)} makes {shown(waveform[1])} samples"
        rows, patch = tensors.get("row_positions", ()), video.patch
        wanted = "height" if patch == 1 else f"((height + {patch - 1})//{patch})"
        if len(rows) == 1 and isinstance(rows[0], str) and rows[0] != wanted:
            yield f"request.video.patch: {patch}; {shown(name)} has {shown(rows[0])} rows"


def _times(factor: int, size: int | str) -> int | str:
    """The product as a contract writes it."""
    if isinstance(size, int):
        return factor * size
    return size if factor == 1 else f"{factor}*{size}"


def _option_problems(manifest: Manifest) -> Iterator[str]:
    """Options that say what is in the bundle are those of what is in it. Bundles may lack some: other builders' do."""
    options, loop = manifest.options, manifest.loop
    choices = {"mode": tuple(MODES), "parity": get_args(ParityMode), "loop": get_args(LoopMode),
               "weights": get_args(WeightsMode)}  # fmt: skip
    for name, allowed in choices.items():
        if name in options and options[name] not in allowed:
            yield f"options.{name}: {shown(options[name])}; known: {', '.join(allowed)}"
    there: dict[str, set[str]] = {}
    if loop is not None and loop.body in manifest.graphs:
        body = manifest.graphs[loop.body]
        there["outputs"] = {tensor.name for tensor in body.outputs}
        latents = {f"{name}_latent": name for name in MODALITIES}
        there["modalities"] = {latents[tensor.name] for tensor in body.inputs if tensor.name in latents}
        if (options.get("loop") == "device") != bool(loop.segments) and "loop" in options:
            yield f"options.loop: {shown(options['loop'])}, with {len(loop.segments)} segments that run by themselves"
    codecs = {*manifest.streams, *manifest.graphs}
    there["components"] = {
        name for name in ("vae-decoder", "vae-encoder", "sound-decoder") if name.replace("-", "_") in codecs
    } | ({"tokenizer"} if manifest.request.prompt is not None else set())  # fmt: skip
    for name, found in there.items():
        said = options.get(name, ())
        if name in options and (not isinstance(said, tuple) or set(said) != found):
            yield f"options.{name}: {shown(said)}; in this bundle: {', '.join(sorted(found)) or 'none'}"
    if unknown := set(_listed(options.get("kernels", ()))) - PLUGINS.keys():
        yield f"options.kernels: {shown(min(unknown))} is not among {', '.join(PLUGINS)}"
    if options.get("weights") == "embedded" and any(engine.weights for engine in manifest.engines):
        yield "options.weights: 'embedded', and engines take weights of files"


def _listed(value: object) -> tuple[str, ...]:
    return tuple(map(str, value)) if isinstance(value, tuple) else (str(value),)


def _schedule_problems(manifest: Manifest) -> Iterator[str]:
    """The schedule is the one that the sampling settings give for its steps, grid, shift and guidance."""
    try:
        said = recorded_schedule(manifest)
        if said is None:
            return
        distilled = manifest.request.sampling.distilled_sigmas is not None
        asked = Overrides() if distilled else Overrides(
            said.grid, said.steps, said.shift, said.guidance, said.guidance_interval  # type: ignore[arg-type]
        )  # fmt: skip
        mode = manifest.options.get("mode")
        found = resolve_schedule(checkpoint_sampling(manifest.request), str(mode), asked)
    except UserError as error:
        yield f"options.schedule: {error.message}"
        return
    for name in ("sampler", "grid", "steps", "shift", "guidance"):
        if getattr(said, name) != getattr(found, name):
            yield f"options.schedule.{name}: {shown(getattr(said, name))}; the settings give {getattr(found, name)}"
    if said.guidance_interval is not None and said.guidance_interval != found.guidance_interval:
        yield f"options.schedule.guidance_interval: {shown(said.guidance_interval)}"
    for name, tolerance in (("sigmas", _SIGMA_TOLERANCE), ("timesteps", _TIMESTEP_TOLERANCE)):
        ours, theirs = np.asarray(getattr(found, name)), np.asarray(getattr(said, name))
        if ours.shape != theirs.shape or not np.abs(ours - theirs).max() <= tolerance:
            yield f"options.schedule.{name}: not those of the sampling settings"
