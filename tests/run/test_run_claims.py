"""A manifest that was changed in one field and sealed again: what it says twice is found, the rest is listed here.

docs/limits.md says of the list that it is the builder's word. A new field is refused or goes on it.
"""

from __future__ import annotations

import contextlib
import copy
import json
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
from subjects import Subjects

from cosmos_export.bundle import BundleFiles, Manifest, strict
from cosmos_export.bundle.manifest import problems
from cosmos_export.bundle.strict import StrictError
from cosmos_export.diagnostics import CosmosExportError, ExitCode
from cosmos_export.options import GenerateOptions
from cosmos_export.runtime.contents import content_problems
from cosmos_export.runtime.frontend import prepare

WORDS = ("evaluation.*", "plan_checks.*", "volatile.*", "tools.*", "inputs.*")
"""What happened at the build, which is over."""
CLAIMED = (
    *WORDS, "model.id", "model.revision", "model.variant",
    "model.geometry.hidden_act", "model.geometry.intermediate_size", "model.geometry.num_attention_heads",
    "model.geometry.vocab_size", "options.passes.*", "options.schedule.guidance", "profiles.*",
    "request.action.domains", "request.action.embodiments*",
    "request.prompt.plain.*", "request.prompt.system.*", "request.prompt.use_system",
    "request.prompt.suffix_ids.*", "request.policy*", "request.sampling.*", "request.sound.latent_fps",
    "request.sound.sampling_rate", "request.video.base_fps", "request.video.fps_modulation",
)  # fmt: skip
"""Fields of which nothing else in a bundle tells what they should be."""
HASHED = ("files.*.sha256", "files.*.size_bytes", "files.*.path")
"""Fields that the bytes of files are compared with."""
SCHEDULED = (
    "_class_name", "disable_corrector", "final_sigmas_type", "lower_order_final", "num_train_timesteps", "predict_x0",
    "prediction_type", "shift_terminal", "sigma_max", "sigma_min", "solver_order", "solver_p", "solver_type",
    "thresholding", "use_beta_sigmas", "use_dynamic_shifting", "use_exponential_sigmas", "use_flow_sigmas",
)  # fmt: skip
"""Fields of a scheduler's configuration that decide the schedule."""
REFUSED = (
    "target.name", "target.backend", "target.compute_capability", "recipe", "request.video.spatial",
    "request.video.temporal", "request.video.patch", "request.sound.hop", "graphs.*.inputs.*.name",
    "graphs.*.inputs.*.dtype", "graphs.*.inputs.*.dims.*", "graphs.*.outputs.*.name", "files.*.role",
    "edges.*.instance", "options.schedule.sigmas.*", "options.mode", "options.components.*", "options.kernels",
    "options.created_by", "options.parity",
)  # fmt: skip


def leaves(value: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[tuple[str | int, ...], Any]]:
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    if not inner or not value:
        yield path, value
        return
    for key, one in inner:
        yield from leaves(one, (*path, key))


def pattern(path: tuple[str | int, ...]) -> str:
    """``path`` without positions in lists and without names of graphs and of what is carried."""
    if path[0] == "graphs" and path[-1] != "dtype":
        path = ("graphs", "*", *path[2:])
    carried = path.index("carried") if "carried" in path else len(path)
    return ".".join("*" if isinstance(key, int) or i > carried else key for i, key in enumerate(path))


def others(name: str, value: Any) -> list[Any]:
    """Values of the same kind that could stand there."""
    known = {
        "target.name": ["h200", "unheard"], "target.backend": ["inductor", "tensorrt"], "recipe": ["fp8", "bf16"],
        "request.video.patch": [1],
    }  # fmt: skip
    if name in known:
        return [one for one in known[name] if one != value]
    if name.endswith(".dtype"):
        return ["bfloat16" if value != "bfloat16" else "float16"]
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int):
        return [value + 1]
    if isinstance(value, float):
        return [1.5 * value or 0.5]
    if isinstance(value, str):
        return ["f" * 64 if len(value) == 64 else f"{value}x"]
    return ["x"] if value is None else [["x"], {"x": "x"}] if value == [] else [{"x": "x"}]


def test_one_changed_field_is_found_or_only_a_claim(subjects: Subjects) -> None:
    bundle: Path = subjects("omni").bundle
    document = json.loads((bundle / "manifest.json").read_bytes())
    del document["digest"]
    assert not list(content_problems(BundleFiles(bundle)))
    accepted: set[str] = set()
    refused: set[str] = set()
    seen: set[str] = set()
    for path, value in leaves(document):
        name = pattern(path)
        if name in seen or any(fnmatch(name, one) for one in WORDS):
            continue
        seen.add(name)
        for other in others(name, value):
            changed = copy.deepcopy(document)
            place = changed
            for key in path[:-1]:
                place = place[key]
            place[path[-1]] = other
            try:
                manifest = strict.decode(Manifest, changed)  # as sealed again: the digest is that of what is read
            except StrictError:
                refused.add(name)
                continue
            files = BundleFiles(bundle, manifest)
            if next(problems(manifest), None) is not None or next(content_problems(files), None) is not None:
                refused.add(name)
                continue
            accepted.add(name)
            if path[0] not in ("request", "options", "profiles"):
                continue
            try:
                prepare(GenerateOptions("x"), files)
            except CosmosExportError as error:
                assert error.exit_code in (ExitCode.FINDING, ExitCode.USAGE, ExitCode.UNSUPPORTED), (name, error)
    unlisted = {name for name in accepted if not any(fnmatch(name, one) for one in (*CLAIMED, *HASHED))}
    assert not unlisted, sorted(unlisted)
    assert all(any(fnmatch(name, one) for name in refused) for one in REFUSED)
    assert not accepted & {f"request.sampling.scheduler.{name}" for name in SCHEDULED}
    assert not any(fnmatch(name, one) for name in accepted for one in REFUSED)


@pytest.mark.parametrize("data", [b"", b"\x00", b"\x3a\x02\x5a", b"\x3a" + b"\x80" * 10 + b"\x01", b"model"])
def test_what_is_no_model_is_refused(data: bytes) -> None:
    from cosmos_export.targets.onnx.declared import declared

    with pytest.raises(ValueError):
        declared(data)


def test_a_model_is_read_as_onnx_reads_it(subjects: Subjects) -> None:
    """And no byte of a model makes anything but a ValueError."""
    import onnx

    from cosmos_export.targets.onnx.declared import declared

    folder = subjects("omni").bundle / "onnx"
    for path in sorted(folder.glob("*.onnx")):
        data = path.read_bytes()
        graph = onnx.load(path, load_external_data=False).graph
        for mine, theirs in zip(declared(data), (graph.input, graph.output), strict=True):
            assert [(t.name, list(t.dims)) for t in mine] == [
                (v.name, [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim]) for v in theirs
            ]
            names = [onnx.TensorProto.DataType.Name(v.type.tensor_type.elem_type).lower() for v in theirs]
            assert [t.dtype.replace("float32", "float").replace("float64", "double") for t in mine] == names
    for at in range(0, len(data), max(len(data) // 300, 1)):
        for changed in (data[:at], data[:at] + bytes([data[at] ^ 0xFF]) + data[at + 1 :]):
            with contextlib.suppress(ValueError):
                declared(changed)
