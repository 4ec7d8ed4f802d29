"""The build process: one request on stdin, JSON lines on stdout. Started by `common`, never by hand.

Messages: ``progress`` (permille), ``log`` (text), then either ``failure`` (stage, details) or ``result``.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import importlib
import json
import mmap
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any, NoReturn

from cosmos_export.machine.process import own_peak_resident


class Channel:
    """Messages to the parent. The builder prints where it likes, so stdout itself is turned to stderr first."""

    def __init__(self) -> None:
        self._stream = os.fdopen(os.dup(1), "wb", buffering=0)
        os.dup2(2, 1)
        self.broken = False

    def send(self, kind: str, **fields: Any) -> None:
        try:
            self._stream.write(json.dumps({"kind": kind, **fields}).encode() + b"\n")
        except OSError:
            self.broken = True

    def fail(self, stage: str, details: list[str]) -> NoReturn:
        self.send("failure", stage=stage, details=details)
        os._exit(1)


_ADDR_NO_RANDOMIZE = 0x0040000
_BLOCK_BYTES = 1 << 20
_ZEROS = bytes(_BLOCK_BYTES)


def fix_addresses() -> None:
    """Start again without address randomization, once; where that is not allowed, go on with it."""
    if sys.argv[1:] == ["again"]:
        return
    try:
        libc = ctypes.CDLL(None)
        persona = libc.personality(0xFFFFFFFF)
        if persona == -1 or persona & _ADDR_NO_RANDOMIZE or libc.personality(persona | _ADDR_NO_RANDOMIZE) == -1:
            return
    except (OSError, AttributeError):
        return
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:], "again"])


_PR_SET_PDEATHSIG = 1


def die_with_parent(parent: int) -> None:
    """End this process when the one that started it, ``parent``, is gone, also if it is gone already.

    A builder reports seldom, so it would notice a broken pipe only minutes later.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before the system was told
        os._exit(1)


def main() -> None:
    channel = Channel()
    request = json.load(sys.stdin)
    die_with_parent(int(request["parent"]))
    try:
        trt = importlib.import_module(request["module"])
    except Exception as error:
        channel.fail("import", [str(error)])

    first = request["first_version"]
    if first is not None and _version(trt) < tuple(first):
        channel.fail("version", [f"{trt.__version__} is installed, {first[0]}.{first[1]} or later is needed"])
    errors: list[str] = []
    warnings: list[str] = []

    class Logger(trt.ILogger):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, text: str) -> None:
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                errors.append(text)
                channel.send("log", text=text[:500])
            elif severity == trt.ILogger.WARNING and text not in warnings:
                warnings.append(text)

    logger = Logger()
    builder = trt.Builder(logger)
    if builder is None:
        channel.fail("build", ["the builder does not start on this machine", *errors])
    plugins = request["settings"].get("plugins")
    if plugins is not None:
        from cosmos_export.targets.trt.plugins import register_plugins

        register_plugins(trt, importlib.import_module(f"{request['module']}.plugin"), Path(plugins))
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, logger)
    started = time.monotonic()
    if not parser.parse_from_file(request["onnx"]):
        # Files that cannot be opened are named in the log only.
        found = [_parser_error(parser.get_error(index)) for index in range(parser.num_errors)]
        channel.fail("parse", found + [text for text in errors if "external weights" in text or "open file" in text])
    # Bytes that are no ONNX at all parse as an empty graph.
    if network.num_layers == 0 or network.num_outputs == 0:
        channel.fail("parse", ["the file holds no graph"])
    parse_s = time.monotonic() - started
    attentions = _attentions(trt, network)
    for attention in attentions:
        attention.decomposable = request["decomposable_attention"]

    config = builder.create_builder_config()
    if request["compute_capability"] is not None:
        name = "SM" + request["compute_capability"].replace(".", "")
        config.num_compute_capabilities = 1
        if not config.set_compute_capability(getattr(trt.ComputeCapability, name), 0):
            channel.fail("build", [f"{name} is refused", *errors])
    if not request["allow_tf32"]:
        config.clear_flag(trt.BuilderFlag.TF32)
    settings = request["settings"]
    cache = _apply(trt, config, settings)
    problems = _add_profiles(builder, network, config, request["profiles"])
    if problems:
        channel.fail("profile", problems + errors)
    monitor = _monitor(trt, channel)
    config.progress_monitor = monitor
    try:
        writer = _writer(trt, Path(request["output"]))
    except OSError as error:
        channel.fail("write", [str(error)])
    started = time.monotonic()
    succeeded = builder.build_serialized_network_to_stream(network, config, writer)
    build_s = time.monotonic() - started
    writer.finish()
    if writer.error:
        channel.fail("write", [writer.error])
    if not succeeded or channel.broken:
        Path(request["output"]).unlink(missing_ok=True)  # if the parent is gone, nobody else does
        channel.fail("build", errors or ["no reason was given"])
    if cache is not None:
        with contextlib.suppress(OSError):  # the next build is slower without it, and no worse
            _write_whole(Path(settings["timing_cache"]), bytes(config.get_timing_cache().serialize()))
    layers = _layers(trt, logger, Path(request["output"])) if settings.get("inspect") else None
    if layers is not None and not layers:
        channel.fail("build", ["the engine was written and does not load", *errors])
    channel.send(
        "result",
        layers=None if layers is None else len(layers),
        layers_in=_tokens(layers or []),
        version=trt.__version__,
        size_bytes=writer.size,
        sha256=writer.digest.hexdigest(),
        inputs=[_describe(network.get_input(index)) for index in range(network.num_inputs)],
        outputs=[_describe(network.get_output(index)) for index in range(network.num_outputs)],
        attention=len(attentions),
        plugins=_plugins(trt, network),
        parse_s=parse_s,
        build_s=build_s,
        peak_memory_bytes=own_peak_resident(),
        warnings=warnings,
    )
    if channel.broken:
        Path(request["output"]).unlink(missing_ok=True)
    os._exit(0)  # tearing the builder down costs time and has nothing to add


def _parser_error(error: Any) -> str:
    where = f"node `{error.node_name()}` ({error.node_operator()}): " if error.node_operator() else ""
    return where + " ".join(str(error.desc()).split())


def _attentions(trt: Any, network: Any) -> list[Any]:
    """The attention operations of a parsed network."""
    found = []
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        if layer.type == trt.LayerType.ATTENTION_INPUT:
            layer.__class__ = trt.IAttentionInputLayer  # the bindings hand out the base class; this is their cast
            found.append(layer.attention)
    return found


def _plugins(trt: Any, network: Any) -> int:
    return sum(network.get_layer(i).type == trt.LayerType.PLUGIN_V3 for i in range(network.num_layers))


def _version(trt: Any) -> tuple[int, ...]:
    return tuple(int(part) for part in trt.__version__.split(".")[:2])


def _apply(trt: Any, config: Any, settings: dict[str, Any]) -> Any:
    """Settings of full TensorRT on ``config``; the timing cache in use, if any."""
    level = settings.get("hardware_compatibility", "none")
    if level != "none":
        config.hardware_compatibility_level = getattr(trt.HardwareCompatibilityLevel, level.replace("-", "_").upper())
    if settings.get("version_compatible"):
        config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
    if settings.get("weight_streaming"):
        config.set_flag(trt.BuilderFlag.WEIGHT_STREAMING)
    if settings.get("inspect"):
        config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    path = settings.get("timing_cache")
    if path is None:
        return None
    known = Path(path).read_bytes() if Path(path).is_file() else b""
    cache = config.create_timing_cache(known)
    if cache is None or not config.set_timing_cache(cache, False):  # another GPU's or version's: timed anew
        cache = config.create_timing_cache(b"")
        config.set_timing_cache(cache, False)
    return cache


def _write_whole(path: Path, data: bytes) -> None:
    partial = path.with_name(f".{path.name}.partial")
    partial.unlink(missing_ok=True)
    with partial.open("xb") as file:  # where the folder is shared, a link of that name could lead anywhere
        file.write(data)
    partial.replace(path)


def _layers(trt: Any, logger: Any, path: Path) -> list[Any]:
    """The engine inspector's record of each layer of the engine at ``path``; empty where it does not load."""
    runtime = trt.Runtime(logger)
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        engine = runtime.deserialize_cuda_engine(data)
    if engine is None:
        return []
    inspector = engine.create_engine_inspector()
    text = inspector.get_engine_information(trt.LayerInformationFormat.JSON)
    layers = json.loads(text).get("Layers", [])
    return list(layers)


def _tokens(layers: list[Any]) -> dict[str, int]:
    """How many layers name each kind of operand or kernel."""
    texts = [json.dumps(layer).lower() for layer in layers]
    kinds = ("fp8", "bf16", "fp16", "fp32", "int4", "fp4", "mha", "gemm", "softmax", "dequantize")
    return {kind: count for kind in kinds if (count := sum(kind in text for text in texts))}


def _add_profiles(builder: Any, network: Any, config: Any, profiles: list[dict[str, Any]]) -> list[str]:
    """Give ``config`` the optimization profiles; what is wrong with them, if anything."""
    inputs = {tensor.name: tensor for tensor in (network.get_input(index) for index in range(network.num_inputs))}
    dynamic = [name for name, tensor in inputs.items() if any(size < 0 for size in tensor.shape)]
    problems = []
    if dynamic and not profiles:
        problems.append(f"no profile is given, but these inputs are dynamic: {', '.join(dynamic)}")
    for number, profile in enumerate(profiles):
        problems += [f"profile {number} names `{name}`, which is no input" for name in profile if name not in inputs]
        problems += [f"profile {number} lacks the dynamic input `{name}`" for name in dynamic if name not in profile]
        optimization = builder.create_optimization_profile()
        for name, span in profile.items():
            if name not in inputs:
                continue
            shape = tuple(inputs[name].shape)
            if any(
                len(point) != len(shape) or any(own not in (-1, size) for own, size in zip(shape, point, strict=True))
                for point in span
            ):
                problems.append(f"profile {number} gives `{name}` {span}, but its shape is {list(shape)}")
            elif name in dynamic:
                optimization.set_shape(name, *(tuple(point) for point in span))
        if not problems and dynamic and config.add_optimization_profile(optimization) < 0:
            problems.append(f"profile {number} is refused")
    return problems


def _monitor(trt: Any, channel: Channel) -> Any:
    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        """Folds the builder's nested phases into one fraction: a phase fills the step of its parent it runs in."""

        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self._phases: dict[str, tuple[str | None, int, int]] = {}
            self._sent = -1

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self._phases[phase_name] = (parent_phase, int(num_steps), 0)

        def step_complete(self, phase_name: str, step: int) -> bool:
            parent, total, _ = self._phases.get(phase_name, (None, 1, 0))
            self._phases[phase_name] = (parent, total, int(step) + 1)
            permille = int(1000 * self._fraction(phase_name, 0.0))
            if permille > self._sent:
                self._sent = permille
                channel.send("progress", permille=permille)
            return not channel.broken  # nobody listens any more: stop building

        def phase_finish(self, phase_name: str) -> None:
            self._phases.pop(phase_name, None)

        def _fraction(self, phase: str | None, inside: float) -> float:
            for _ in range(16):
                if phase is None or phase not in self._phases:
                    break
                phase, total, done = self._phases[phase]
                inside = min(1.0, (done + inside) / max(1, total))
            return inside

    return Monitor()


def _writer(trt: Any, path: Path) -> Any:
    class Writer(trt.IStreamWriter):  # type: ignore[misc]
        """Writes the engine as it is serialized, so that it is never whole in memory."""

        def __init__(self) -> None:
            trt.IStreamWriter.__init__(self)
            self._stream = path.open("xb", buffering=0)
            self.digest = hashlib.sha256()
            self.size = 0
            self.error = ""

        def write(self, data: bytes, size: int | None = None) -> int:
            try:
                for start in range(0, len(data), _BLOCK_BYTES):
                    self._write(data[start : start + _BLOCK_BYTES])
            except OSError as error:
                self.error = str(error)
                return 0
            self.digest.update(data)
            self.size += len(data)
            return len(data)

        def _write(self, block: bytes) -> None:
            """``block`` behind what is written; one of zeros becomes a hole, as it may be in the weights' file."""
            if block == _ZEROS:
                self._stream.seek(len(block), os.SEEK_CUR)
                return
            rest = memoryview(block)
            while rest:
                rest = rest[self._stream.write(rest) :]

        def finish(self) -> None:
            try:
                self._stream.truncate(self.size)
                os.fsync(self._stream.fileno())
                self._stream.close()
            except OSError as error:
                self.error = self.error or str(error)

    return Writer()


def _describe(tensor: Any) -> dict[str, Any]:
    return {"name": tensor.name, "dtype": tensor.dtype.name.lower(), "shape": [int(size) for size in tensor.shape]}


if __name__ == "__main__":
    fix_addresses()
    main()
