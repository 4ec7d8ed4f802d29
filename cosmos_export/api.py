"""The public API: what `import cosmos_export as cx` offers.

Wherever a path is taken, text and `os.PathLike` are too; where a picture, a clip, actions, statistics or noise are
taken, so are arrays and PIL images. None is always the default, which the record of options has: `BuildOptions`,
`PlanOptions`, `CalibrateOptions`, `QuantizeRequest`, `GenerateOptions`. Errors are `CosmosExportError` with a stable
``code`` (docs/errors.md) and a ``hint``. Every function reports long work to ``progress``, a
`cosmos_export.progress.Progress`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cosmos_export.arguments import callbacks, made, taken
from cosmos_export.diagnostics import UserError
from cosmos_export.progress import Progress

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from PIL.Image import Image

    from cosmos_export.bundle import Manifest
    from cosmos_export.calibration.write_quantized import QuantizeResult
    from cosmos_export.compiler.calibrate_checkpoint import CalibrateResult
    from cosmos_export.compiler.evidence import BuildResult
    from cosmos_export.options import GenerateOptions
    from cosmos_export.plan import Estimate
    from cosmos_export.precision.recipe import Recipe
    from cosmos_export.precision.scheme import Scheme
    from cosmos_export.runtime.model import Generation, LoadedModel, Step
    from cosmos_export.sampling.modes import Mode
    from cosmos_export.targets import Target

PathLike = str | os.PathLike[str]
Names = str | Sequence[str]
"""One name or several."""

__all__ = [
    "Compiled", "Model", "calibrate", "compile", "modes", "open", "plan", "quantize", "recipes", "schemes", "targets",
]  # fmt: skip


# -- making bundles ---------------------------------------------------------------------------------------------------


class Compiled:
    """The result of `compile`."""

    def __init__(self, result: BuildResult, output: Path | None) -> None:
        from cosmos_export.compiler.document import build_document

        self.output = output
        """The bundle; None where only graphs were dumped."""
        self.manifest: Manifest | None = result.manifest
        self.report: Mapping[str, Any] = build_document(result, output)
        """The document of `build --json`: passes, parity, engines, losses, seconds and memory of every stage."""
        self.dumps: tuple[Path, ...] = tuple(result.dumps)
        """Files of the graphs as text, where they were asked for."""

    def __repr__(self) -> str:
        engines, seconds = len(self.report["engines"]), self.report["seconds"]
        return f"Compiled({str(self.output)!r}, recipe {self.report['recipe']}, {engines} engines, {seconds:.0f} s)"


def compile(
    checkpoint: PathLike,
    output: PathLike | None = None,
    *,
    target: str | None = None,
    backend: str | None = None,
    profiles: Names | None = None,
    modalities: Names | None = None,
    outputs: Names | None = None,
    components: Names | None = None,
    mode: str | None = None,
    steps: int | None = None,
    grid: str | None = None,
    shift: float | None = None,
    guidance: float | None = None,
    guidance_interval: tuple[float, float] | None = None,
    loop: str | None = None,
    recipe: str | None = None,
    overrides: Names | None = None,
    calibration: PathLike | None = None,
    kernels: Names | None = None,
    weights: str | None = None,
    quality: str | None = None,
    parity: str | None = None,
    until: str | None = None,
    dump: PathLike | None = None,
    force: bool | None = None,
    resume: bool | None = None,
    memory_budget: str | None = None,
    adapters: Names | None = None,
    ignore_adapters: bool | None = None,
    created_by: str | None = None,
    cache: PathLike | None = None,
    graphs: PathLike | None = None,
    progress: Progress | None = None,
) -> Compiled:
    """Compile ``checkpoint`` into the bundle ``output``, which appears when all of it is right.

    The options are the fields of `cosmos_export.options.BuildOptions`. Unlike the command, no engine is taken
    from other bundles unless ``cache`` names the folder that records them, and every graph is captured unless
    ``graphs`` names the folder that keeps them. Raises UserError and UnsupportedError before
    any work, FindingError where results or engines are not what they should be; `cosmos_export.compiler.driver.build`
    has the codes.
    """
    given = dict(locals())
    from cosmos_export.compiler.document import build
    from cosmos_export.options import BuildOptions

    del given["progress"]
    callbacks("compile", progress=progress)
    options = made(BuildOptions, "compile", given)
    return Compiled(build(options, progress), options.output)


def plan(
    checkpoint: PathLike | None = None,
    *,
    like: str | None = None,
    targets: Names | None = None,
    workloads: Names | None = None,
    recipe: str | None = None,
    overrides: Names | None = None,
    prompt_tokens: int | tuple[int, int] | None = None,
    steps: int | None = None,
    guidance: float | None = None,
    guidance_interval: tuple[float, float] | None = None,
    loop: str | None = None,
    memory_budget: str | None = None,
) -> Estimate:
    """Predict sizes, memory, disk and times of a build and its bundle, before there is either. Nothing is run.

    ``checkpoint`` may also be the name of a published size, as ``like`` is, where there is no such directory:
    ``nano``, ``super``, ``edge``, or a policy such as ``nano-policy-droid``. The options are the fields of
    `cosmos_export.options.PlanOptions`.
    """
    given = dict(locals())
    from cosmos_export.checkpoint.published import POLICIES, PUBLISHED
    from cosmos_export.compiler.plan_checkpoint import plan_checkpoint
    from cosmos_export.options import PlanOptions

    if (
        isinstance(checkpoint, str)
        and like is None
        and checkpoint in (*PUBLISHED, *POLICIES)
        and not Path(checkpoint).exists()
    ):
        given |= {"checkpoint": None, "like": checkpoint}
    if isinstance(prompt_tokens, int):
        given["prompt_tokens"] = (prompt_tokens, prompt_tokens)
    return plan_checkpoint(made(PlanOptions, "plan", given))


def calibrate(
    checkpoint: PathLike,
    output: PathLike,
    *,
    data: Names,
    profile: str | None = None,
    modalities: Names | None = None,
    samples: int | None = None,
    frames: int | None = None,
    latents: str | None = None,
    negative_prompt: str | None = None,
    steps: int | None = None,
    grid: str | None = None,
    shift: float | None = None,
    guidance: float | None = None,
    guidance_interval: tuple[float, float] | None = None,
    observer: str | None = None,
    margin: float | None = None,
    percentile: float | None = None,
    algorithm: str | None = None,
    rank: int | None = None,
    bits: float | None = None,
    seed: int | None = None,
    adapters: Names | None = None,
    ignore_adapters: bool | None = None,
    force: bool | None = None,
    progress: Progress | None = None,
) -> CalibrateResult:
    """Find the ranges of all activations of ``checkpoint`` on ``data`` and write the scale table ``output``.

    ``data`` are items as `calibrate --data` takes them: ``PATH[,key=value…]``. The options are the fields of
    `cosmos_export.options.CalibrateOptions`. Call it again after an interruption: what is
    finished is kept.
    """
    given = dict(locals())
    from cosmos_export.compiler.calibrate_checkpoint import calibrate_checkpoint
    from cosmos_export.options import CalibrateOptions

    del given["progress"]
    callbacks("calibrate", progress=progress)
    given["negative"] = given.pop("negative_prompt")
    given["overrides"] = _sampling("calibrate", given)
    return calibrate_checkpoint(made(CalibrateOptions, "calibrate", given), progress)


def quantize(
    checkpoint: PathLike,
    output: PathLike,
    *,
    calibration: PathLike,
    format: str | None = None,
    towers: Names | None = None,
    fp8_rounding: str | None = None,
    step_policy: bool | None = None,
    link: bool | None = None,
    adapters: Names | None = None,
    ignore_adapters: bool | None = None,
    force: bool | None = None,
    progress: Progress | None = None,
) -> QuantizeResult:
    """Write ``checkpoint`` in the published ModelOpt layout, quantized with the scale table ``calibration``.

    The options are the fields of `cosmos_export.options.QuantizeRequest`.
    """
    given = dict(locals())
    from cosmos_export.compiler.quantize_checkpoint import quantize_checkpoint
    from cosmos_export.options import QuantizeRequest

    del given["progress"]
    callbacks("quantize", progress=progress)
    return quantize_checkpoint(made(QuantizeRequest, "quantize", given), progress)


# -- running bundles --------------------------------------------------------------------------------------------------


def open(
    bundle: PathLike,
    *,
    backend: str | None = None,
    device: str | None = None,
    require_signature: PathLike | None = None,
    progress: Progress | None = None,
) -> Model:
    """Verify every byte of ``bundle`` and open what runs it; use the result in a ``with`` statement.

    ``backend``: another one than the bundle was built for, such as ``onnxruntime``; ``device``: such as ``cuda:1``;
    ``require_signature``: a public key (PEM) whose owner must have signed the bundle.
    UserError CX504: no such backend or device; FindingError CX711: the bundle is not what its manifest says; CX721 to
    CX723: it is not signed with that key; UnsupportedError CX503 and CX505: the backend is not installed or has no
    device.
    """
    from cosmos_export import bundle as bundles
    from cosmos_export.runtime.model import LoadedModel

    callbacks("open", progress=progress)
    files = bundles.open_bundle(taken("open", "bundle", bundle, Path))
    key = taken("open", "require_signature", require_signature, Path | None)
    if key is not None:
        bundles.require_signature(files, key)
    model = LoadedModel(
        files,
        backend=taken("open", "backend", backend, str | None),
        device=taken("open", "device", device, str | None),
    )
    model.load(progress)
    return Model(model)


class Model:
    """A bundle that requests run on, as `open` returns it."""

    def __init__(self, model: LoadedModel) -> None:
        self._model = model

    def __repr__(self) -> str:
        return repr(self._model)

    def __enter__(self) -> Model:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Give memory and device back."""
        self._model.close()

    @property
    def path(self) -> Path:
        """The bundle's directory."""
        return self._model.path

    @property
    def manifest(self) -> Manifest:
        """The manifest of the bundle: docs/bundle.md."""
        return self._model.manifest

    @property
    def bundle_id(self) -> str:
        """SHA-256 of the manifest in hexadecimal digits."""
        return self._model.bundle_id

    def generate(
        self,
        prompt: str,
        *,
        negative_prompt: str | None = None,
        image: PathLike | NDArray[Any] | Image | Mapping[str, PathLike | NDArray[Any] | Image] | None = None,
        state: PathLike | Mapping[str, Any] | Sequence[float] | NDArray[Any] | None = None,
        video: PathLike | NDArray[Any] | Sequence[NDArray[Any] | Image] | None = None,
        condition_video_keep: str | None = None,
        num_frames: int | None = None,
        frames: int | None = None,
        height: int | None = None,
        width: int | None = None,
        fps: float | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        guidance_interval: tuple[float, float] | None = None,
        grid: str | None = None,
        shift: float | None = None,
        enable_sound: bool | None = None,
        use_system_prompt: bool | None = None,
        metadata: bool | None = None,
        literal: bool | None = None,
        mode: str | None = None,
        seed: int | None = None,
        noise: PathLike | Mapping[str, NDArray[Any]] | None = None,
        actions: PathLike | NDArray[Any] | None = None,
        embodiment: str | None = None,
        viewpoint: str | None = None,
        chunk: int | None = None,
        tier: int | None = None,
        action_width: int | None = None,
        action_stats: PathLike | Mapping[str, Any] | None = None,
        action_normalization: str | None = None,
        action_clamp: bool | None = None,
        on_step: Callable[[Step], object] | None = None,
        progress: Progress | None = None,
    ) -> Generation:
        """Generate an image, a video, sound or actions.

        Keywords have diffusers' names where diffusers has them; ``frames`` is short for ``num_frames``. The others
        are the fields of `cosmos_export.options.GenerateOptions`. Arrays of pictures are uint8 or
        float in [0, 1], [height, width, 3] or [frames, height, width, 3]; ``image`` may be a mapping from cameras to
        pictures; ``actions`` are [rows, width], and ``state`` is [width] or [rows, width]. ``on_step`` is called after
        every denoising step; what it raises ends the request.

        The errors are those of `cosmos_export.runtime.frontend.prepare`, and FindingError CX665 where results are not
        finite.
        """
        given = dict(locals())
        for name in ("self", "on_step", "progress"):
            del given[name]
        callbacks("generate", on_step=on_step, progress=progress)
        prepared = self._model.prepare(_generate_options(given))
        return self._model.run(prepared, on_step, progress)

    def act(
        self,
        images: PathLike | NDArray[Any] | Image | Mapping[str, PathLike | NDArray[Any] | Image],
        state: PathLike | Mapping[str, Any] | Sequence[float] | NDArray[Any] | None = None,
        task: str = "",
        **options: Any,
    ) -> Generation:
        """Actions for what a robot sees: ``actions`` of the result, float32 [rows, width] in the robot's own numbers.

        ``images``: a picture for each camera by its name, or one that is composed already. ``state``: where the robot
        is, as a mapping from the parts of an action to numbers, or numbers in the order of its columns; without it a
        policy that is given one refuses (CX619). ``task`` is text, whatever it looks like, and control tokens in it
        are letters. ``options`` are the other arguments of `generate`, such as ``seed`` and ``embodiment``.
        """
        return self.generate(task, **{"mode": _acting(), "literal": True, **options, "image": images, "state": state})


def _acting() -> str:
    """The mode in which a robot's policy acts."""
    from cosmos_export.sampling.modes import Clue, implied_mode

    return implied_mode([Clue.ROBOT]).name


_DIFFUSERS = {
    "negative_prompt": "negative",
    "condition_video_keep": "keep",
    "enable_sound": "sound",
    "use_system_prompt": "system",
    "num_inference_steps": "steps",
    "guidance_scale": "guidance",
}
"""Keyword of diffusers → field of the options here."""


def _generate_options(given: dict[str, Any]) -> GenerateOptions:
    from cosmos_export.in_memory import InMemory
    from cosmos_export.options import GenerateOptions
    from cosmos_export.runtime import passed

    count = given.pop("num_frames")
    if count is not None and given["frames"] not in (None, count):
        raise UserError(
            "CX005", f"`generate` got num_frames={count} and frames={given['frames']}", "they mean the same: pass one"
        )
    given["frames"] = given["frames"] if count is None else count
    given = {_DIFFUSERS.get(name, name): value for name, value in given.items()}
    given["sampling"] = _sampling("generate", given)
    if isinstance(given["image"], Mapping):
        given["image"] = {str(name): passed.picture(f"`{name}`", one) for name, one in given["image"].items()}
    for name in ("image", "video"):
        if given[name] is not None and not isinstance(given[name], Mapping):
            given[name] = passed.picture(f"the {name} passed", given[name], name)
    for name, converted in (
        ("actions", passed.rows), ("action_stats", passed.statistics), ("noise", passed.noise),
        ("state", passed.numbers),
    ):  # fmt: skip
        if given[name] is not None and not isinstance(given[name], str | os.PathLike):
            given[name] = InMemory(converted(given[name]), f"the {name} passed")
    return made(GenerateOptions, "generate", given)


def _sampling(where: str, given: dict[str, Any]) -> Any:
    """The options of the schedule, taken out of ``given``."""
    from cosmos_export.sampling import Overrides

    names = ("grid", "steps", "shift", "guidance", "guidance_interval")
    return made(Overrides, where, {name: given.pop(name) for name in names})


# -- what there is ----------------------------------------------------------------------------------------------------


def targets() -> tuple[Target, ...]:
    """The GPUs (and the CPU) that bundles can be built for."""
    from cosmos_export.targets import load_target, target_names

    return tuple(load_target(name) for name in target_names())


def recipes() -> tuple[Recipe, ...]:
    """The precision recipes that are shipped."""
    from cosmos_export.precision.recipe import load_recipe, recipe_names

    return tuple(load_recipe(name) for name in recipe_names())


def schemes() -> tuple[Scheme, ...]:
    """The schemes of quantization that recipes and ``overrides`` name, and the model's own type."""
    from cosmos_export.precision.schemes import SCHEMES

    return tuple(SCHEMES.values())


def modes() -> tuple[Mode, ...]:
    """The modes of requests: t2v, i2v and so on, with what each starts from and makes."""
    from cosmos_export.sampling.modes import MODES

    return tuple(MODES.values())
