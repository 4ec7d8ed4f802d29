"""The published pipeline as the reference of a whole request: the same prompt, media, schedule and noise."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from numpy.typing import NDArray

from cosmos_export.sampling import MODES, Schedule

Array = NDArray[Any]


@dataclass(frozen=True)
class PublishedAction:
    """`CosmosActionCondition` in plain values; ``raw`` are the given actions of forward dynamics, [rows, width]."""

    domain: str
    rows: int
    tier: int
    view_point: str = "ego_view"
    raw: Array | None = None


@dataclass(frozen=True)
class PublishedRequest:
    """A request as the pipeline takes it. ``image`` is uint8 [H, W, 3], ``video`` uint8 [T, H, W, 3]."""

    mode: str
    prompt: str
    negative_prompt: str | None
    schedule: Schedule
    noise: Sequence[Array]
    """float32, in the order in which the pipeline draws: vision, sound, action, then that of each stochastic step."""
    frames: int = 1
    height: int = 0
    width: int = 0
    fps: float = 24.0
    image: Array | None = None
    video: Array | None = None
    sound: bool = False
    action: PublishedAction | None = None
    use_system_prompt: bool | None = None
    metadata: bool = True
    """Whether sentences on duration and resolution follow the prompt."""


@dataclass
class Published:
    """Results: final latents by modality, frames float32 [T, H, W, 3] in [0, 1], waveform, actions."""

    latents: dict[str, Array] = field(default_factory=dict)
    frames: Array | None = None
    waveform: Array | None = None
    actions: Array | None = None
    seconds: float = 0.0
    """Duration of the pipeline's call, without loading it."""


def run_published(checkpoint: Path, request: PublishedRequest) -> Published:
    """Run ``request`` through the pipeline that diffusers ships for this checkpoint, in fp32 on the CPU.

    The pipeline does all of the work: prompt templates, media, packing, both branches, scheduler and decoding. What is
    put in its place is what a request fixes: the noise it would draw, the sigmas of the schedule, and for a guidance
    interval, which it does not know, its switch for guidance before each step.
    """
    from diffusers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    return (_run_distilled if request.schedule.sampler == "distilled-sde" else _run)(Path(checkpoint), request)


def _run(checkpoint: Path, request: PublishedRequest) -> Published:
    from diffusers import Cosmos3OmniPipeline

    pipe = Cosmos3OmniPipeline.from_pretrained(
        str(checkpoint), torch_dtype=torch.float32, use_safetensors=True, local_files_only=True
    )
    pipe.set_progress_bar_config(disable=True)
    result, schedule = Published(), request.schedule
    steps = iter(schedule.guided)

    def before_step() -> None:
        # The scale of the published loop is fixed; whether a step is guided is read anew for each.
        pipe._guidance_scale = schedule.guidance if next(steps, False) else 1.0

    def after_step(_: Any, index: int, t: Any, values: dict[str, Any]) -> dict[str, Any]:
        result.latents["vision"] = values["latents"].numpy().copy()
        before_step()
        return {}

    def decode_sound(latent: torch.Tensor) -> Any:
        result.latents["sound"] = latent.numpy().copy()
        return decode(latent)

    decode, set_timesteps = pipe.decode_sound, pipe.scheduler.set_timesteps

    def fixed_timesteps(*args: Any, **kwargs: Any) -> None:
        set_timesteps(schedule.steps)
        pipe.scheduler.sigmas = torch.tensor(schedule.sigmas, dtype=torch.float32)
        pipe.scheduler.timesteps = torch.tensor(schedule.timesteps, dtype=pipe.scheduler.timesteps.dtype)
        before_step()

    pipe.decode_sound, pipe.scheduler.set_timesteps = decode_sound, fixed_timesteps
    arguments: dict[str, Any] = {"enable_sound": request.sound}
    if request.action is None:
        arguments |= {"num_frames": request.frames, "height": request.height, "width": request.width}
        arguments |= {"image": _image(request.image), "video": _video(request.video)}
        if request.video is not None:
            clean = MODES[request.mode].given_frames((request.frames - 1) // pipe.vae.config.scale_factor_temporal + 1)
            arguments["condition_frame_indexes_vision"] = tuple(range(clean))
    else:
        arguments["action"] = _action(request)
    started = time.perf_counter()
    with _drawn(request.noise, "pipelines.cosmos.pipeline_cosmos3_omni"), torch.no_grad():
        out = pipe(
            request.prompt,
            request.negative_prompt,
            fps=request.fps,
            num_inference_steps=schedule.steps,
            guidance_scale=schedule.guidance,
            use_system_prompt=request.use_system_prompt,
            add_resolution_template=request.metadata,
            add_duration_template=request.metadata,
            enable_safety_check=False,
            callback_on_step_end=after_step,
            output_type="np",
            **arguments,
        )
    result.seconds = time.perf_counter() - started
    result.frames = np.asarray(out.video, dtype=np.float32)
    result.waveform = None if out.sound is None else out.sound.numpy()
    result.actions = None if out.action is None else out.action[0].numpy()
    return result


def _run_distilled(checkpoint: Path, request: PublishedRequest) -> Published:
    import diffusers
    import transformers
    from diffusers.modular_pipelines.cosmos import Cosmos3DistilledBlocks

    own: dict[str, Any] = {"torch_dtype": torch.float32, "use_safetensors": True, "local_files_only": True}
    pipe: Any = Cosmos3DistilledBlocks().init_pipeline()
    pipe.set_progress_bar_config(disable=True)
    # Component by component: what a published modular index names are repositories, not folders.
    pipe.update_components(
        transformer=diffusers.Cosmos3OmniTransformer.from_pretrained(checkpoint / "transformer", **own),
        vae=diffusers.AutoencoderKLWan.from_pretrained(checkpoint / "vae", **own),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler.from_pretrained(checkpoint / "scheduler"),
        text_tokenizer=transformers.AutoTokenizer.from_pretrained(checkpoint / "text_tokenizer", local_files_only=True),
        distilled_sigmas=list(request.schedule.sigmas[:-1]),
        is_distilled=True,
        enable_safety_checker=False,
    )
    media = {"image": _image(request.image), "video": _video(request.video)}
    drawn, started = iter(request.noise), time.perf_counter()
    with (
        _drawn(drawn, "modular_pipelines.cosmos.before_denoise"),
        _drawn(drawn, "schedulers.scheduling_flow_match_euler_discrete"),
        torch.no_grad(),
    ):
        state = pipe(
            prompt=request.prompt,
            num_frames=request.frames,
            height=request.height,
            width=request.width,
            fps=request.fps,
            use_system_prompt=request.use_system_prompt,
            add_resolution_template=request.metadata,
            add_duration_template=request.metadata,
            output_type="np",
            **{name: value for name, value in media.items() if value is not None},
        )
    result = Published(latents={"vision": state.get("latents").numpy()}, seconds=time.perf_counter() - started)
    result.frames = np.asarray(state.get("videos"), dtype=np.float32)
    return result


@contextmanager
def _drawn(noise: Iterator[Array] | Sequence[Array], module: str) -> Iterator[None]:
    """``noise`` in place of what ``module`` of diffusers would draw."""
    values = iter(noise)

    def next_noise(shape: Sequence[int], **_: Any) -> torch.Tensor:
        value = torch.from_numpy(np.ascontiguousarray(next(values)))
        return value.reshape(tuple(shape))

    with mock.patch(f"diffusers.{module}.randn_tensor", next_noise):
        yield


def _image(pixels: Array | None) -> Any:
    from PIL import Image

    return None if pixels is None else Image.fromarray(pixels)


def _video(pixels: Array | None) -> Any:
    return None if pixels is None else [_image(frame) for frame in pixels]


def _action(request: PublishedRequest) -> Any:
    from diffusers.pipelines.cosmos.pipeline_cosmos3_omni import CosmosActionCondition

    action = request.action
    assert action is not None
    return CosmosActionCondition(
        mode=request.mode.replace("-", "_"),
        chunk_size=action.rows,
        domain_name=action.domain,
        resolution_tier=action.tier,
        raw_actions=None if action.raw is None else torch.from_numpy(action.raw),
        image=_image(request.image),
        video=_video(request.video),
        view_point=action.view_point,
    )


# -- measures ---------------------------------------------------------------------------------------------------------


def peak_signal_to_noise(found: Array, expected: Array) -> float:
    """PSNR in dB of values in [0, 1]; infinite where both are equal, minus infinite for another shape or NaN."""
    if found.shape != expected.shape or not np.isfinite(found).all():
        return float("-inf")
    error = float(np.mean((found.astype(np.float64) - expected.astype(np.float64)) ** 2))
    return float("inf") if error == 0 else -10 * float(np.log10(error))


def distances(found: Mapping[str, Array], expected: Mapping[str, Array]) -> dict[str, float]:
    """‖found − expected‖ / ‖expected‖ of each entry of ``expected``."""
    from cosmos_export.evaluation.reference import relative_error

    return {
        name: relative_error(
            {name: torch.from_numpy(found[name])} if name in found else {}, {name: torch.from_numpy(value)}
        )
        for name, value in expected.items()
    }
