"""Every reader of files that somebody else may have made: how it is called, and on which files.

A reader is called in this process, through the command line where there is one. It accepts by returning.
"""

from __future__ import annotations

import contextlib
import json
import re
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from random import Random
from typing import Any

import fuzz_seeds as seeds

from cosmos_export import files
from cosmos_export.diagnostics import CosmosExportError, ExitCode


class Refused(Exception):
    """A command ended with an exit code that is not 0: as a person would see it."""

    def __init__(self, exit_code: int, code: str, message: str) -> None:
        super().__init__(message)
        self.exit_code, self.code = exit_code, code


class Wrong(Exception):
    """A reader did something that it must not do with any input."""


@dataclass(frozen=True)
class Call:
    """What a reader is called with: its tree, the names that were changed, and choices that the case fixes."""

    root: Path
    changed: Sequence[str]
    random: Random

    def choose(self, *options: Any) -> Any:
        return self.random.choice(options)

    def first(self, *patterns: str) -> str:
        """The first changed file that matches; or, where none does, one of the tree."""
        for name in (*self.changed, *_names(self.root)):
            if _matches(name, patterns):
                return name
        raise FileNotFoundError(patterns)


@dataclass(frozen=True)
class Reader:
    """One reader and its files."""

    name: str
    seed: Callable[[Path], None]
    """Makes the files that cases begin with."""
    call: Callable[[Call], None]
    files: tuple[str, ...] = ("*",)
    """Patterns of names that are changed."""
    unchanged_only: bool = False
    """Whether accepting any change of these files is wrong."""
    confined: bool = True
    """Whether nothing outside the tree may be touched."""
    tools: tuple[str, ...] = ()
    """Codes of exit 4 that say the truth: another library refuses what was given to it."""
    writes: bool = False
    """Whether the reader changes its files, so that each case begins with a new copy."""
    compared: tuple[str, ...] = ()
    """Patterns of safetensors files that are accepted only where the reference implementation accepts them."""
    starts: bool = False
    """Whether it starts processes, which another user may not be able to."""
    resealed: bool = False
    """Whether the manifest is made to fit the changed files, as somebody who can write both would do."""
    share: float = 1.0
    """Share of the cases of other readers that it gets: less where one takes long."""
    slow: bool = False
    """Left out of the short run, as its files take long to make."""

    def names(self, tree: Sequence[str]) -> list[str]:
        return [name for name in tree if _matches(name, self.files)]

    def is_compared(self, name: str) -> bool:
        return name.endswith(".safetensors") and _matches(name, self.compared)


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch(name, pattern) for pattern in patterns)


def _names(root: Path) -> Iterator[str]:
    for path in sorted(root.rglob("*")):
        if not path.is_dir():
            yield path.relative_to(root).as_posix()


# -- the command line -------------------------------------------------------------------------------------------------

_CODE = re.compile(r"^error\[(CX\d{3})\]: (.*)$", re.MULTILINE)
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def command(*arguments: object) -> str:
    """What `cosmos-export ARGUMENTS` prints on stdout; `Refused` for any exit code but 0."""
    from cosmos_export.cli import main

    before = sys.argv, sys.stdout, sys.stderr
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="backslashreplace") as out, \
            tempfile.TemporaryFile("w+", encoding="utf-8", errors="backslashreplace") as err:  # fmt: skip
        sys.argv, sys.stdout, sys.stderr = ["cosmos-export", *map(str, arguments)], out, err
        try:
            main()
            status: object = 0
        except SystemExit as ending:
            status = ending.code
        finally:
            sys.argv, sys.stdout, sys.stderr = before
        printed, said = (_read(file) for file in (out, err))
    for text in (printed, said):
        if found := _CONTROL.search(text):
            raise Wrong(f"a control character reaches the terminal: {text[max(found.start() - 40, 0) : found.end()]!r}")
    if "--json" in arguments and printed:
        try:
            json.loads(printed, parse_constant=_no_constant)
        except ValueError as error:
            raise Wrong(f"what is printed is not JSON: {error}") from error
    if status not in (None, 0):
        found = _CODE.search(said)
        code, message = found.groups() if found else ("", said[-300:])
        raise Refused(int(status) if isinstance(status, int) else 4, code, message)
    return printed


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no number")


def _read(file: Any) -> str:
    file.flush()
    file.seek(0)
    text: str = file.read()
    return text


# -- checkpoints ------------------------------------------------------------------------------------------------------


def _inspect(call: Call) -> None:
    command("inspect", call.root / "checkpoint", *call.choose((), ("--json",)))


def _plan(call: Call) -> None:
    command(
        "plan",
        call.root / "checkpoint",
        "--workload",
        call.choose("t2v-480p-189f", "t2i-720p"),
        *call.choose((), ("--json",)),
    )


def _options(call: Call, **more: Any) -> Any:
    from cosmos_export.options import BuildOptions

    return BuildOptions(
        call.root / "checkpoint", call.root.parent / "never", profiles=(seeds.SIZES,), parity="never", **more
    )


def _resolve(call: Call) -> None:
    from cosmos_export.compiler.options import resolve

    resolve(_options(call, components=call.choose(None, ("none",))))


def _resolve_quantized(call: Call) -> None:
    """The published FP8 layout, whose recipe is stored in it."""
    from cosmos_export.compiler.options import resolve

    command("plan", call.root / "checkpoint", *call.choose((), ("--json",)))
    resolve(_options(call, components=("none",)))


def _codecs(call: Call) -> None:
    """Everything a build does with a codec's configuration before it captures the model."""
    from cosmos_export.capture import codec as capturing
    from cosmos_export.capture.sources import weight_sources
    from cosmos_export.checkpoint.codecs import CODECS, codec_tensors
    from cosmos_export.compiler.captures import capture_codec
    from cosmos_export.compiler.options import resolve
    from cosmos_export.compiler.selection import codec_config

    job = resolve(_options(call))
    before = capturing._Capture.graph

    def stop(*_: object, **__: object) -> Any:
        raise _Enough

    capturing._Capture.graph = stop  # type: ignore[method-assign]
    try:
        for name in CODECS:
            with contextlib.suppress(_Enough):
                config = codec_config(job.checkpoint, CODECS[name].folder)
                capture_codec(name, config, weight_sources(codec_tensors(job.checkpoint, name)))
    finally:
        capturing._Capture.graph = before  # type: ignore[method-assign]


class _Enough(Exception):
    """The reader has read what it reads."""


def _tokenizer(call: Call) -> None:
    from cosmos_export.checkpoint import open_checkpoint
    from cosmos_export.compiler.prompt import compile_chat_template

    compile_chat_template(open_checkpoint(call.root / "checkpoint"))


# -- bundles ----------------------------------------------------------------------------------------------------------


def _verify(call: Call) -> None:
    from cosmos_export.bundle import read_bundle, verify_bundle

    report = verify_bundle(call.root / "x.bundle")
    if report.ok:
        read_bundle(call.root / "x.bundle")
        return
    raise Refused(1, "", "; ".join(f"{check.path}: {check.detail}" for check in report.failures[:2]))


def _verify_command(call: Call) -> None:
    command("bundle", "verify", call.root / "x.bundle", *call.choose((), ("--json",)))


def _show(call: Call) -> None:
    command("bundle", "show", call.root / "x.bundle", *call.choose((), ("--json",)))


class _Ready(Exception):
    """A request was prepared and its bundle loaded; what follows is not reading."""


def _prepare(call: Call) -> None:
    _run(call, "--prompt", "A red cube.", "--steps", 2)


def _prepare_request(call: Call) -> None:
    """A request of files: a caption and noise, beside a bundle that is as it was built."""
    arguments: list[object] = ["--frames", 5, "--height", 48, "--width", 80, "--steps", 2]
    arguments += ["--prompt", call.root / "caption.json", "--negative", call.root / "negative.json"]
    _run(call, *arguments, "--noise", call.root / "noise.safetensors")


def _prepare_robot(call: Call) -> None:
    arguments: list[object] = ["--prompt", "Pour.", "--embodiment", "umi", "--image", call.root / "own.png"]
    file = call.first("actions.json", "actions.safetensors") if call.changed else "actions.json"
    given = call.choose(("--actions", call.root / file), ("--mode", "policy"))
    if "stats.json" in call.changed or call.choose(True, False):
        arguments += ["--action-stats", call.root / "stats.json"]
    _run(call, *arguments, *given, "--chunk", 16, "--steps", 2)


def _run(call: Call, *arguments: object) -> None:
    """`run` up to the first engine."""
    from cosmos_export.runtime.generator import Generator

    def ready(*_: object, **__: object) -> Any:
        raise _Ready

    before = Generator.generate
    Generator.generate = ready  # type: ignore[method-assign,assignment]
    output = call.root.parent / "latents.safetensors"
    backend = ("--backend", "onnxruntime") if "--backend" not in arguments else ()
    try:
        command("run", call.root / "x.bundle", *arguments, *backend, "--save-latents", output, "--force")
    except Refused as refusal:
        if "_Ready" not in str(refusal):
            raise
    finally:
        Generator.generate = before  # type: ignore[method-assign]


def _run_whole(call: Call) -> None:
    """A request on a bundle whose manifest fits whatever its files are."""
    output = call.root.parent / "latents.safetensors"
    command(
        "run", call.root / "x.bundle", "--prompt", "x", "--backend", "onnxruntime", "--save-latents", output, "--force"
    )


def _graphs(call: Call) -> None:
    """The graphs of a bundle, as PyTorch takes them; nothing is compiled."""
    from cosmos_export.runtime import load_bundle

    loaded = load_bundle(call.root / "x.bundle", backend="inductor", device="cpu")
    try:
        for name in loaded.manifest.graphs:
            loaded.executor.open(name)
    finally:
        loaded.executor.close()


def _loose_graphs(call: Call) -> None:
    from cosmos_export.bench.geometry import read_graphs

    read_graphs(call.root / "graphs")


def _engine_requests(call: Call) -> None:
    """What is left to build of a bundle, as `finish` reads it."""
    from cosmos_export.bundle import read_files
    from cosmos_export.compiler.finish import read_requests

    read_requests(read_files(call.root / "x.bundle"))


# -- tables, recipes, results -----------------------------------------------------------------------------------------


def _scales(call: Call) -> None:
    from cosmos_export.calibration.table import read_scale_table

    table = read_scale_table(call.root / "scales")
    for value in table.amax.values():
        _require(0 < value < float("inf"), "a range that is not a finite number above 0")


def _recipe(call: Call) -> None:
    from cosmos_export.precision.recipe import load_recipe, resolve_recipe
    from cosmos_export.targets import load_target

    name = call.root / call.first("*.toml")
    command("recipes", "show", name, *call.choose((), ("--json",)))
    recipe = load_recipe(str(name))
    resolve_recipe(recipe, (), load_target("rtx-pro-6000"), layers=4, steps=10, distilled=False)


def _compare(call: Call) -> None:
    arguments = call.choose((), ("--json",), ("--allow-unlike",), ("--allow-unlike", "--json"))
    command("bench", "compare", call.root / "a.json", call.root / "b.json", *arguments)


def _require(holds: bool, otherwise: str) -> None:
    if not holds:
        raise Wrong(otherwise)


def _actions(call: Call) -> None:
    import numpy as np

    from cosmos_export.runtime.embodiments import read_actions, read_scale

    width = 10
    values = None
    for name in [name for name in call.changed if name.startswith("actions.")] or ["actions.json"]:
        values = read_actions(call.root / name).values
        _require(bool(np.isfinite(values).all()), "actions that are not finite")
        width = values.shape[1]
    scale = read_scale(call.root / "stats.json", width, call.choose(None, "quantile", "minmax", "meanstd"))
    model = np.linspace(-1, 1, width, dtype=np.float32)[None]
    with np.errstate(all="ignore"):
        made = [scale.to_raw(model), scale.to_model(model if values is None else values)]
    _require(all(bool(np.isfinite(one).all()) for one in made), "statistics that make values that are not finite")
    raw = scale.to_raw(np.array([[-1.0] * width, [1.0] * width], np.float32))
    _require(bool((raw[0] <= raw[1]).all()), "statistics that turn actions round")


# -- data -------------------------------------------------------------------------------------------------------------


def _picture(call: Call) -> None:
    from cosmos_export.runtime.read_media import read_image

    found = read_image(call.root / call.first("*.png", "*.jpg", "*.webp", "*.bmp"))
    _require(found.ndim == 3 and found.shape[2] == 3, f"a picture of shape {found.shape}")


def _clip(call: Call) -> None:
    from cosmos_export.runtime.read_media import has_sound, read_clip, read_sound

    path = call.root / call.first("*.mp4", "*.webm")
    found = read_clip(path, 5, last=call.choose(True, False))
    _require(found.frames.ndim == 4 and 1 <= len(found.frames) <= 5, f"a clip of shape {found.frames.shape}")
    if has_sound(path):
        read_sound(path, 0.0, 4800, 48_000)


def _source(call: Call) -> None:
    import bundle_samples

    from cosmos_export.calibration.requests import read_latents
    from cosmos_export.calibration.sources import read_source

    read_source(str(call.root / call.first("*.txt", "*.jsonl", "items.json", "caption.json", "latents.safetensors")))
    read_source(str(call.root / call.choose("items.jsonl", "pictures")))
    record = bundle_samples.manifest().request
    assert record is not None
    read_latents(call.root / "latents.safetensors", record, "latents")


def _lerobot(call: Call) -> None:
    from cosmos_export.calibration.sources import read_source
    from cosmos_export.runtime.read_media import read_clip

    found = read_source(f"{call.root / 'data'},embodiment=umi")
    for item in found.items[:1]:
        assert item.clip is not None
        read_clip(item.clip.path, item.clip.count or 1, skip=item.clip.skip)


# -- what builds keep -------------------------------------------------------------------------------------------------


def _cache(call: Call) -> None:
    from cosmos_export.compiler.cache import Cache

    folder = call.root / "cache"
    keys = sorted(path.stem for path in folder.iterdir() if _KEY.fullmatch(path.stem)) or ["0"]
    asked = (
        ("ls",),
        ("ls", "--json"),
        ("why", keys[0]),
        ("why", keys[0][:9], keys[-1]),
        ("prune",),
        ("prune", "--all"),
    )
    what: tuple[str, ...] = call.choose(*asked)
    cache = Cache(folder)
    cache.why("generator", {"graph": "x"})
    found = [cache.find(key) for key in keys]
    for key, entry in zip(keys, found, strict=True):
        _require(entry is None or entry.key == key, "an entry under another key than its own")
    _require(bool(call.changed) or None not in found, "entries of a cache are not found")
    command("cache", *what, "--cache", folder)


_KEY = re.compile("[0-9a-f]{64}")


def _captured(call: Call) -> None:
    """Graphs of the cache whose digest is right."""
    from cosmos_export.capture.document import read_program
    from cosmos_export.capture.sources import weight_sources
    from cosmos_export.checkpoint import open_checkpoint

    sources = weight_sources(open_checkpoint(call.root / "checkpoint").tensors)
    try:
        read_program(files.read_bytes(call.root / "step.json"), sources)
    except (OSError, ValueError) as error:  # the graphs are captured then
        raise Refused(1, "", str(error)) from error


def _state(call: Call) -> None:
    import hashlib

    from cosmos_export.bundle import BundleWriter

    with contextlib.suppress(_Enough), BundleWriter(call.root / "x.bundle", resume=True) as writer:
        _require(bool(call.changed) or len(writer.all_kept()) == 2, "finished files are not taken over")
        for kept in writer.all_kept():
            path = writer.path(kept.name, "weights")
            _require(path.is_file() and not path.is_symlink(), f"{kept.name!r} is kept and no file")
            if kept.sha256 == hashlib.sha256(kept.name.encode() * 100).hexdigest():
                found = hashlib.sha256(path.read_bytes()).hexdigest()
                _require(found == kept.sha256, f"{kept.name!r} is kept with another digest than it has")
        raise _Enough


def _limits(call: Call) -> None:
    import numpy as np

    from cosmos_export.runtime.limits import read_limits, review

    limits = read_limits(call.root / "limits.toml")
    limits.require(8, "raw")
    found = review(np.zeros((4, 8), np.float32), limits, fps=15.0, state=np.zeros(8), age_s=0.5)
    finite = found.actions is None or bool(np.isfinite(found.actions).all())
    _require(finite, "a review made a value that is not finite")


def _trail(call: Call) -> None:
    """A trail with the digest of its last line, kept where nobody could change it."""
    anchor = (call.root / "anchor").read_text()
    path = call.root / "trail.jsonl"
    command("audit", "verify", path, "--anchor", anchor)
    _require(path.read_bytes() == (call.root / "kept").read_bytes(), "another trail is accepted")


def _signature(call: Call) -> None:
    """The same statement may be written in several ways; what it is of has one form."""
    bundle = call.root / "x.bundle"
    command("bundle", "verify", bundle, "--key", call.root / "public.pem")
    _require(
        (bundle / "manifest.json").read_bytes() == (call.root / "kept").read_bytes(), "another manifest is accepted"
    )


def _message(call: Call) -> None:
    """A message of a robot's client, until the policy is asked."""
    import numpy as np

    from cosmos_export.embodiments import policy_embodiment
    from cosmos_export.serve import wire
    from cosmos_export.serve.observation import from_groot, from_openpi

    name = call.first("*.msgpack")
    try:
        data = files.read_bytes(call.root / name, 16 << 20)  # as much as a message may have
    except OSError as error:  # a message comes through a socket, and no file can be in its place
        raise Refused(2, "CX641", str(error)) from error
    message, robot = wire.unpack(data), policy_embodiment("droid_lerobot")
    if name == "openpi.msgpack":
        observation = from_openpi(message, robot)
    else:
        given = message.get("data") if isinstance(message, dict) else None
        observation = from_groot(given.get("observation") if isinstance(given, dict) else None, robot)
    finite = observation.state is None or bool(np.isfinite(observation.state).all())
    _require(finite, "a state that is not finite")


def _robot_state(call: Call) -> None:
    import numpy as np

    from cosmos_export.embodiments import policy_embodiment
    from cosmos_export.runtime.conversion import read_state

    state = read_state(call.root / "state.json", policy_embodiment("droid_lerobot"), 8)
    _require(state.shape[1:] == (8,) and bool(np.isfinite(state).all()), f"a state of shape {state.shape}")


READERS = (
    Reader("inspect", seeds.checkpoint, _inspect, confined=False, compared=("*",)),
    Reader(
        "inspect-shards",
        seeds.shards,
        _inspect,
        ("*.json", "checkpoint/transformer/*"),
        confined=False,
        compared=("*",),
    ),
    Reader("inspect-fp8", seeds.quantized, _inspect, confined=False, compared=("*",)),
    Reader("plan", seeds.checkpoint, _plan, ("*.json",), confined=False),
    Reader("build-resolve", seeds.checkpoint, _resolve, ("*.json", "*.safetensors"), confined=False, compared=("*",)),
    Reader("build-fp8", seeds.quantized, _resolve_quantized, confined=False, compared=("*",)),
    Reader(
        "build-codecs",
        seeds.checkpoint,
        _codecs,
        ("*/vae/config.json", "*/sound_tokenizer/config.json"),
        confined=False,
        share=0.4,
    ),
    Reader(
        "build-tokenizer",
        seeds.checkpoint,
        _tokenizer,
        ("*/text_tokenizer/*", "*/model_index.json"),
        starts=True,
        confined=False,
        share=0.6,
    ),
    Reader("verify", seeds.graphs_bundle, _verify, unchanged_only=True),
    Reader("verify-command", seeds.graphs_bundle, _verify_command, unchanged_only=True, share=0.5),
    Reader("show", seeds.graphs_bundle, _show, ("*/manifest.json",), unchanged_only=True),
    Reader("run-prepare", seeds.graphs_bundle, _prepare, unchanged_only=True),
    Reader(
        "run-resealed-manifest", seeds.graphs_bundle, _prepare, ("*/manifest.json", "*/tokenizer.json"), resealed=True
    ),
    Reader(
        "run-resealed", seeds.full_bundle, _run_whole, tools=("CX502", "CX501"), resealed=True, slow=True, share=0.4
    ),
    Reader(
        "graphs", seeds.graphs_bundle, _graphs, ("*/graphs/*", "*/tables/*"), tools=("CX502",), resealed=True, share=0.4
    ),
    Reader(
        "finish", seeds.waiting_bundle, _engine_requests, ("*/engines/requests.json", "*/plugins.json"), resealed=True
    ),
    Reader("graphs-loose", seeds.tiny_graphs, _loose_graphs),
    Reader(
        "run-files",
        seeds.requests,
        _prepare_request,
        ("caption.json", "negative.json", "noise.safetensors"),
        compared=("*",),
        slow=True,
        share=0.5,
    ),
    Reader("run-robot", seeds.requests, _prepare_robot, ("actions.*", "stats.json", "own.png"), slow=True, share=0.5),
    Reader("scales", seeds.scales, _scales, compared=("*",)),
    Reader("recipes", seeds.recipes, _recipe),
    Reader("bench-compare", seeds.measurements, _compare),
    Reader("actions", seeds.actions, _actions, compared=("*",)),
    Reader("pictures", seeds.media, _picture, ("*.png", "*.jpg", "*.webp", "*.bmp")),
    Reader("clips", seeds.media, _clip, ("*.mp4", "*.webm")),
    Reader("sources", seeds.sources, _source, confined=False, compared=("latents.safetensors",)),
    Reader("lerobot-2", seeds.lerobot_2, _lerobot, share=0.6),
    Reader("lerobot-3", seeds.lerobot_3, _lerobot, share=0.6),
    Reader("cache", seeds.cache, _cache, ("cache/*",), writes=True),
    Reader("captured", seeds.captured, _captured, ("step.json",), share=0.6),
    Reader("state", seeds.state, _state, writes=True, tools=("CX707",)),
    Reader("limits", seeds.limits, _limits),
    Reader("audit", seeds.trail, _trail, ("trail.jsonl",)),
    Reader("signature", seeds.signed_bundle, _signature, ("x.bundle/*",), share=0.6),
    Reader("messages", seeds.messages, _message, ("*.msgpack",)),
    Reader("robot-state", seeds.messages, _robot_state, ("state.json",)),
)
BY_NAME = {reader.name: reader for reader in READERS}


# -- outcomes ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    """What came of one call: ``accepted``, ``refused``, ``tool``, or what is wrong with it."""

    kind: str
    code: str = ""
    said: str = ""
    trace: str = ""


GOOD = ("accepted", "refused", "tool")


def outcome(reader: Reader, call: Call) -> Outcome:
    """Whether ``reader`` accepts, refuses or breaks."""
    try:
        reader.call(call)
    except Refused as refusal:
        return judge(reader, refusal.exit_code, refusal.code, str(refusal))
    except CosmosExportError as error:
        return judge(reader, int(error.exit_code), error.code, error.message, traceback.format_exc())
    except Wrong as wrong:
        return Outcome("wrong", "", str(wrong))
    except MemoryError:
        return Outcome("memory", "", "MemoryError", traceback.format_exc())
    except OSError as error:
        return Outcome("CX801", "CX801", f"{type(error).__name__}: {error}", traceback.format_exc())
    except Exception as error:
        return Outcome("CX000", "CX000", f"{type(error).__name__}: {error}", traceback.format_exc())
    return Outcome("accepted")


def judge(reader: Reader, exit_code: int, code: str, message: str, trace: str = "") -> Outcome:
    """An error by its exit code: 1 to 3 with a code of its own refuse, a verdict of 1 may have none."""
    if code == "CX000" and ("MemoryError" in message or "alloc" in message):
        return Outcome("memory", code, message, trace)
    if exit_code == ExitCode.FINDING or (code and exit_code in (ExitCode.USAGE, ExitCode.UNSUPPORTED)):
        return Outcome("refused", code, message)
    if code in reader.tools:
        return Outcome("tool", code, message)
    return Outcome(code or "no code", code, f"exit {exit_code}: {message}", trace)


def reference_accepts(path: Path) -> bool:
    """Whether the reference implementation reads ``path`` as a safetensors file."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np") as file:
            list(file.keys())
    except (SafetensorError, OSError, ValueError):
        return False
    return True
