"""Options of the verbs, and of the functions of the Python API: one record per verb. Imports nothing heavy, since help
is made from it.

Paths are those of files and directories; None is the default that the docstring states.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from cosmos_export.in_memory import InMemory
from cosmos_export.option_fields import Cli

LoopMode = Literal["host", "device"]
WeightsMode = Literal["embedded", "external"]
QualityMode = Literal["enforce", "report"]
ParityMode = Literal["auto", "always", "never"]
Grid = Literal["karras", "flow", "native"]
LatentSource = Literal["auto", "rollout", "noise"]
Keep = Literal["first", "last"]
ObserverMethod = Literal["absmax", "percentile", "mse"]
Picture = Path | InMemory[Any]
"""A picture in a file or in memory."""

WORKLOAD = "t2v-480p-189f"
"""The request that is planned and measured unless another one is named."""

_SAMPLING, _PRECISION, _MODEL, _DEBUG = "Sampling", "Precision", "What is built", "Looking inside"
_MACHINE, _OUTPUT = "Machine and files", "Output"


@dataclass(frozen=True)
class Overrides:
    """Changes of the schedule of a request. None: as the checkpoint, the mode or the bundle has it."""

    grid: Annotated[Grid | None, Cli("--schedule", group=_SAMPLING)] = None
    """Grid of sigmas. Default: the checkpoint's own."""
    steps: Annotated[int | None, Cli(group=_SAMPLING, metavar="N")] = None
    """Denoising steps. Default: the checkpoint's own, or the mode's."""
    shift: Annotated[float | None, Cli(group=_SAMPLING, metavar="X")] = None
    """Shift of a flow or native grid."""
    guidance: Annotated[float | None, Cli(group=_SAMPLING, metavar="X")] = None
    """Guidance scale. 1 runs one branch: no guidance. Default: the checkpoint's own, or the mode's."""
    guidance_interval: Annotated[tuple[float, float] | None, Cli(group=_SAMPLING, reads="pair", metavar="LOW:HIGH")] = (
        None
    )
    """Timesteps that are guided, from 0 to 1000; 0:1000 guides every step."""


@dataclass(frozen=True)
class BuildOptions:
    """A build request as the user gives it. ``output`` is None with ``until``: dumps only."""

    checkpoint: Annotated[Path, Cli(argument=True, metavar="CHECKPOINT", manifest="inputs")]
    """Checkpoint directory in the published layout, or the name of one in the Hugging Face cache, such as
    nvidia/Cosmos3-Nano@fp8."""
    output: Annotated[Path | None, Cli("--output", "-o", group=_OUTPUT, metavar="DIR")] = None
    """Bundle directory to create."""
    target: Annotated[str, Cli(group=_MODEL, names="targets", metavar="TARGET", manifest="target")] = "cpu"
    """GPU to build for, or cpu."""
    backend: Annotated[str | None, Cli(group=_MODEL, names="backends", metavar="BACKEND", manifest="target")] = None
    """Backend of the target, one of those that `targets` shows for it. Default: its first."""
    profiles: Annotated[
        tuple[str, ...],
        Cli(
            "--profile",
            group=_MODEL,
            reads="repeated",
            metavar="PROFILE",
            shown_default="480p-121f",
            manifest="profiles",
        ),
    ] = ("480p-121f",)
    """Sizes that the bundle accepts: a name such as 480p-121f, 720p-189f+sound or policy-droid, and dim=min:opt:max
    items after commas. Repeat it for several."""
    modalities: Annotated[
        tuple[str, ...] | None,
        Cli(group=_MODEL, reads="commas", names="modalities", metavar="NAMES", manifest="options"),
    ] = None
    """Modalities, with commas between them: vision, sound, action. Default: all that the checkpoint generates."""
    outputs: Annotated[
        tuple[str, ...] | None, Cli(group=_MODEL, reads="commas", metavar="NAMES", manifest="options")
    ] = None
    """Velocities to compute, such as action_velocity for inverse dynamics. Default: all of the modalities."""
    components: Annotated[
        tuple[str, ...] | None,
        Cli(group=_MODEL, reads="commas", names="components", metavar="NAMES", manifest="options"),
    ] = None
    """Components besides the transformer: vae-decoder, vae-encoder, sound-decoder, tokenizer; or all, or none.
    Default: all that the checkpoint has and the modalities use."""
    mode: Annotated[str, Cli(group=_SAMPLING, names="modes", metavar="MODE", manifest="options")] = "t2v"
    """Mode whose defaults the schedule has."""
    steps: Annotated[int | None, Cli(group=_SAMPLING, metavar="N", manifest="options.schedule.steps")] = None
    grid: Annotated[Grid | None, Cli("--schedule", group=_SAMPLING, manifest="options.schedule.grid")] = None
    shift: Annotated[float | None, Cli(group=_SAMPLING, metavar="X", manifest="options.schedule.shift")] = None
    guidance: Annotated[float | None, Cli(group=_SAMPLING, metavar="X", manifest="options.schedule.guidance")] = None
    guidance_interval: Annotated[
        tuple[float, float] | None,
        Cli(group=_SAMPLING, reads="pair", metavar="LOW:HIGH", manifest="options.schedule.guidance_interval"),
    ] = None
    loop: Annotated[LoopMode, Cli(group=_SAMPLING, manifest="options")] = "host"
    """host: one call per step; device: guidance, sampler and all steps run inside engines, one engine for each segment
    of the schedule."""
    recipe: Annotated[str | None, Cli(group=_PRECISION, names="recipes", metavar="RECIPE", manifest="recipe")] = None
    """Number formats of the products: FILE.toml, auto (the fastest that fits, by prediction), or a name. Default: as
    the checkpoint is."""
    overrides: Annotated[
        tuple[str, ...],
        Cli("--set", group=_PRECISION, reads="repeated", metavar="PLACE=SCHEME", manifest="precision.overrides"),
    ] = ()
    """Change of the recipe's rules, such as gen.mlp.down=fp8. Repeat it for several."""
    calibration: Annotated[Path | None, Cli(group=_PRECISION, metavar="DIR", manifest="precision.calibration")] = None
    """Scale table of `calibrate`, for recipes that quantize activations."""
    kernels: Annotated[
        tuple[str, ...], Cli(group=_PRECISION, reads="commas", names="kernels", metavar="NAMES", manifest="options")
    ] = ()
    """This project's kernels that TensorRT runs as plugins, with commas between them; for --backend tensorrt."""
    weights: Annotated[WeightsMode, Cli(group=_MODEL, manifest="options")] = "embedded"
    """embedded: in the engines; external: large weights are inputs of the engines, and the bundle has one copy."""
    quality: Annotated[QualityMode, Cli(group=_PRECISION, manifest="evaluation")] = "enforce"
    """Effect of a loss of whole steps or requests beyond its limit (gates G2 and G3): enforce ends the build without a
    bundle, report only records it."""
    parity: Annotated[ParityMode, Cli(group=_DEBUG, manifest="options")] = "auto"
    """When every stage is compared with diffusers: auto does so if the models fit in memory."""
    until: Annotated[str | None, Cli(group=_DEBUG, names="passes", metavar="PASS")] = None
    """Stop after this pass. No bundle is written."""
    dump: Annotated[Path | None, Cli(group=_DEBUG, metavar="DIR")] = None
    """Directory for the graphs as text, one file per pass."""
    force: Annotated[bool, Cli(group=_OUTPUT)] = False
    """Replace what exists under the name of the output."""
    resume: Annotated[bool, Cli(group=_OUTPUT)] = False
    """Go on from what an interrupted build of the same output has finished."""
    memory_budget: Annotated[str | None, Cli(group=_MACHINE, metavar="SIZE", manifest="chains")] = None
    """Memory that the build may take, such as 16GiB. An engine that needs more is split into several. Default: what
    this machine has free, less a margin."""
    adapters: Annotated[
        tuple[str, ...],
        Cli("--adapter", group=_MODEL, reads="repeated", metavar="PATH[:SCALE]", manifest="options.adapters"),
    ] = ()
    """LoRA adapter to add to the weights: a file or a folder in the layout of PEFT, diffusers or kohya, and a factor.
    Repeat it for several."""
    ignore_adapters: Annotated[bool, Cli(group=_MODEL, manifest="options.ignored_adapters")] = False
    """Take the weights without the adapters beside them."""
    created_by: Annotated[str | None, Cli(group=_OUTPUT, metavar="URI", manifest="options")] = None
    """Who builds, for the provenance in the bundle: the URI of a build service's workflow, for instance."""
    cache: Annotated[
        Path | None, Cli(group=_MACHINE, metavar="DIR", shown_default="$COSMOS_EXPORT_CACHE, or ~/.cache/cosmos-export")
    ] = None
    """Directory that records engines of other bundles, so that equal ones are reused, and captured graphs."""
    graphs: Annotated[Path | None, Cli(hidden=True)] = None
    """Directory of captured graphs, which may be the same. Default: every graph is captured."""


@dataclass(frozen=True)
class BuildCommand:
    """`build` on the command line, which has a cache unless it is told not to."""

    options: BuildOptions
    no_cache: Annotated[bool, Cli(group=_MACHINE)] = False
    """Capture every graph, build every engine, and record none."""


@dataclass(frozen=True)
class PlanOptions:
    """A plan as the user asks for it: of ``checkpoint`` or of the published size ``like``."""

    checkpoint: Annotated[Path | None, Cli(argument=True, metavar="CHECKPOINT")] = None
    """Checkpoint directory. Only headers are read."""
    like: Annotated[str | None, Cli(names="published", metavar="nano|super|edge|…")] = None
    """Published size in place of a checkpoint, or a policy: nano-policy-droid, edge-policy-droid."""
    targets: Annotated[
        tuple[str, ...],
        Cli("--target", reads="commas", names="targets", metavar="TARGETS", shown_default="rtx-pro-6000"),
    ] = ("rtx-pro-6000",)
    """Targets, with commas between them."""
    workloads: Annotated[
        tuple[str, ...], Cli("--workload", reads="repeated", metavar="MODE-SIZE", shown_default=WORKLOAD)
    ] = (WORKLOAD,)
    """Requests, such as t2v-480p-189f, i2v-720p-121f+sound, t2i-720p or policy-droid. Repeat it for several."""
    recipe: Annotated[str | None, Cli(group=_PRECISION, names="recipes", metavar="RECIPE")] = None
    overrides: Annotated[tuple[str, ...], Cli("--set", group=_PRECISION, reads="repeated", metavar="PLACE=SCHEME")] = ()
    prompt_tokens: Annotated[tuple[int, int] | None, Cli(reads="pair", metavar="N[:NEGATIVE]")] = None
    """Tokens of the prompt and of the negative prompt. Default: the lengths of the official prompts."""
    steps: Annotated[int | None, Cli(group=_SAMPLING, metavar="N")] = None
    guidance: Annotated[float | None, Cli(group=_SAMPLING, metavar="X")] = None
    guidance_interval: Annotated[tuple[float, float] | None, Cli(group=_SAMPLING, reads="pair", metavar="LOW:HIGH")] = (
        None
    )
    loop: Annotated[LoopMode, Cli(group=_SAMPLING)] = "host"
    memory_budget: Annotated[str | None, Cli(group=_MACHINE, metavar="SIZE")] = None
    """Memory of the build, such as 16GiB. Engines that need more are split. Default: none is split."""


@dataclass(frozen=True)
class CalibrateOptions:
    """A calibration as the user gives it."""

    checkpoint: Annotated[Path, Cli(argument=True, metavar="CHECKPOINT")]
    """Checkpoint directory with bf16 or fp32 weights."""
    output: Annotated[Path, Cli("--output", "-o", group=_OUTPUT, metavar="DIR")]
    """Directory to create."""
    data: Annotated[tuple[str, ...], Cli(reads="repeated", metavar="PATH[,KEY=VALUE…]")]
    """Prompts (.txt, .jsonl, .json captions), pictures, clips or folders of them, LeRobot data sets, actions (.json)
    or latents (.safetensors). Keys: licence, origin (real, synthetic), prompt, negative, mode, embodiment, video, fps,
    frames, limit, camera, cameras, actions, state, stats, normalization. Repeat it for several."""
    profile: Annotated[
        str,
        Cli(
            metavar="PROFILE",
            shown_default="a policy's own, else every size up to 48 latent frames of 384 × 384 pixels",
        ),
    ] = "frames=1:5:48,height=3:12:24,width=3:20:24,und_len=1:512:4096,sound_len=0:0:400,action_len=0:16:128"
    """Sizes that requests must fit, as in `build`; the optimum is the size of clips."""
    modalities: Annotated[tuple[str, ...] | None, Cli(reads="commas", names="modalities", metavar="NAMES")] = None
    """Modalities that must be covered, with commas between them. Default: all that the checkpoint generates."""
    samples: Annotated[int, Cli(metavar="N")] = 128
    """Forward passes, spread over items, steps and branches."""
    frames: Annotated[int | None, Cli(metavar="N")] = None
    """Pixel frames of a clip at most. Default: the profile's optimum, 17."""
    latents: LatentSource = "auto"
    """Latents of prompts. auto: of a clip of another source; rollout: of the model's own sampling, which needs the
    whole model in memory; noise: pure noise at every step, which is not what the model sees."""
    negative: Annotated[str, Cli(metavar="TEXT")] = ""
    """Negative prompt, as text or FILE.json, for items without one."""
    overrides: Overrides = field(default_factory=Overrides)
    """Changes of the schedule that will run."""
    observer: Annotated[ObserverMethod, Cli(group="Algorithm")] = "absmax"
    """How a range follows from what was seen: absmax, percentile or mse."""
    margin: Annotated[float, Cli(group="Algorithm", metavar="X")] = 1.1
    """Factor on every range that was observed."""
    percentile: Annotated[float, Cli(group="Algorithm", metavar="X")] = 99.999
    """Percentile of the observer of that name."""
    algorithm: Annotated[str, Cli(group="Algorithm", names="algorithms", metavar="NAME")] = "none"
    """Search on top of the ranges: none, awq, modelopt-awq, modelopt-svdquant or modelopt-auto (which writes a
    recipe)."""
    rank: Annotated[int | None, Cli(group="Algorithm", metavar="N")] = None
    """Rank for modelopt-svdquant. Default: 32."""
    bits: Annotated[float | None, Cli(group="Algorithm", metavar="X")] = None
    """Bits per weight on average for modelopt-auto. Default: 6."""
    seed: Annotated[int, Cli(group=_SAMPLING, metavar="N")] = 0
    """Seed of the noise."""
    adapters: Annotated[tuple[str, ...], Cli("--adapter", reads="repeated", metavar="PATH[:SCALE]")] = ()
    ignore_adapters: bool = False
    force: Annotated[bool, Cli(group=_OUTPUT)] = False


@dataclass(frozen=True)
class QuantizeRequest:
    """A quantization as the user asks for it."""

    checkpoint: Annotated[Path, Cli(argument=True, metavar="CHECKPOINT")]
    """Checkpoint directory with bf16 weights."""
    calibration: Annotated[Path, Cli(metavar="DIR")]
    """Scale table of `calibrate`."""
    output: Annotated[Path, Cli("--output", "-o", group=_OUTPUT, metavar="DIR")]
    """Directory to create."""
    format: Annotated[str, Cli(names="formats", metavar="FORMAT")] = "fp8"
    """Scheme of the stored weights, one that checkpoints have a layout for."""
    towers: Annotated[tuple[str, ...], Cli(reads="commas", metavar="NAMES", shown_default="reasoner,generator")] = (
        "reasoner",
        "generator",
    )
    """Towers whose linears are quantized."""
    fp8_rounding: Literal["exact", "modelopt"] = "exact"
    """exact: once, from float32; modelopt: twice, as in NVIDIA's files."""
    step_policy: Annotated[bool, Cli("--step-policy/--no-step-policy")] = True
    """Record 16-bit activations in the reasoner and in the first and last three steps, as published."""
    link: Annotated[bool, Cli(group=_OUTPUT)] = False
    """Make hard links to unchanged files in place of copies."""
    adapters: Annotated[tuple[str, ...], Cli("--adapter", reads="repeated", metavar="PATH[:SCALE]")] = ()
    ignore_adapters: bool = False
    force: Annotated[bool, Cli(group=_OUTPUT)] = False


_SIZE, _PROMPT, _ROBOT = "Size", "Prompt", "Robots"


@dataclass(frozen=True)
class GenerateOptions:
    """The options of a request as a user gives them; None (and no path) is the default of the mode or the bundle.

    In memory, pictures and clips are uint8 [frames, height, width, 3], actions float32 [rows, width], statistics the
    object that a file has, and noise arrays by modality.
    """

    prompt: Annotated[str | InMemory[str], Cli("--prompt", "-p", group=_PROMPT, metavar="TEXT")]
    """Text, a JSON caption or a request as FILE.json; the task of an action. In memory it is text, whatever it looks
    like."""
    negative: Annotated[str | InMemory[str] | None, Cli(group=_PROMPT, metavar="TEXT")] = None
    """Negative prompt: text or FILE.json. Default: none."""
    mode: Annotated[str | None, Cli(names="modes", metavar="MODE")] = None
    """Mode of the request. Default: the one that the files and the bundle imply."""
    image: Annotated[
        Picture | Mapping[str, Picture] | None, Cli(group="Start from", metavar="[NAME=]FILE", reads="named")
    ] = None
    """Picture that i2v or an action starts with. Several cameras of a robot: repeat it, with the name of each."""
    video: Annotated[Path | InMemory[Any] | None, Cli(group="Start from", metavar="FILE")] = None
    """Clip that v2v or an action starts with."""
    state: Annotated[Path | InMemory[Any] | None, Cli(group="Start from", metavar="FILE")] = None
    """Where the robot is, for a policy that is given it: numbers in a .json file."""
    actions: Annotated[Path | InMemory[Any] | None, Cli(group="Start from", metavar="FILE")] = None
    """Actions for forward-dynamics: rows in a .json or .safetensors file."""
    frames: Annotated[int | None, Cli(group=_SIZE, metavar="N")] = None
    """Frames, 4·n + 1. Default: the bundle's profile."""
    height: Annotated[int | None, Cli(group=_SIZE, metavar="N")] = None
    """Pixels. Default: the bundle's profile."""
    width: Annotated[int | None, Cli(group=_SIZE, metavar="N")] = None
    """Pixels. Default: the bundle's profile."""
    fps: Annotated[float | None, Cli(group=_SIZE, metavar="X")] = None
    """Frames per second. Default: 24, or the embodiment's own."""
    seed: Annotated[int, Cli(group=_SAMPLING, metavar="N")] = 0
    """Seed of the initial noise."""
    sampling: Overrides = field(default_factory=Overrides)
    """Changes of the schedule."""
    sound: bool = False
    """Generate sound with the video."""
    keep: Annotated[Keep | None, Cli(group="Start from")] = None
    """End of a longer clip that v2v continues. Default: first."""
    metadata: Annotated[bool | None, Cli("--metadata/--no-metadata", group=_PROMPT)] = None
    """Whether sentences on duration and resolution follow the prompt. Default: unless it is a JSON caption."""
    system: Annotated[bool | None, Cli("--system/--no-system", group=_PROMPT)] = None
    """Whether there is a system message before the prompt. Default: as the checkpoint has it."""
    literal: Annotated[bool, Cli("--literal/--no-literal", group=_PROMPT)] = False
    """Read control tokens in prompts, such as <|im_end|>, as text. Default: as tokens, as published."""
    embodiment: Annotated[str | None, Cli(group=_ROBOT, names="embodiments", metavar="NAME")] = None
    """Robot that the actions are for, such as droid_lerobot, umi or av."""
    viewpoint: Annotated[str | None, Cli(group=_ROBOT, names="viewpoints", metavar="VIEW")] = None
    """Camera: ego_view, third_person_view, wrist_view, concat_view, wrist_over_two_view or
    third_person_beside_wrist_view. Default: the embodiment's own."""
    chunk: Annotated[int | None, Cli(group=_ROBOT, metavar="N")] = None
    """Actions in the request. The clip has one frame more. Default: the embodiment's own."""
    tier: Annotated[int | None, Cli(group=_ROBOT, metavar="N")] = None
    """Resolution of an action's canvas: 256, 480, 704 or 720."""
    action_width: Annotated[int | None, Cli(group=_ROBOT, metavar="N")] = None
    """Columns of an action, where the embodiment does not fix them."""
    action_stats: Annotated[Path | InMemory[Any] | None, Cli(group=_ROBOT, metavar="FILE")] = None
    """Statistics of the data. Actions are then given and returned in the units of the data."""
    action_normalization: Annotated[str | None, Cli(group=_ROBOT, metavar="NAME")] = None
    """Pair of statistics that is used: quantile, minmax or meanstd."""
    action_clamp: Annotated[bool, Cli("--action-clamp/--no-action-clamp", group=_ROBOT)] = False
    """Cut given actions off at the bounds of the statistics. Models are trained without."""
    noise: Annotated[Path | InMemory[Any] | None, Cli(group=_SAMPLING, metavar="FILE")] = None
    """Initial noise in place of the seed's: .safetensors with vision, sound, action."""


@dataclass(frozen=True)
class RunCommand:
    """`run` on the command line: a request, the bundle that it goes to and the files that it makes."""

    request: GenerateOptions
    bundle: Annotated[Path, Cli(argument=True, metavar="BUNDLE")]
    """Bundle to run."""
    outputs: Annotated[tuple[Path, ...], Cli("--output", "-o", group=_OUTPUT, reads="repeated", metavar="FILE")] = ()
    """File to write, by its name: .mp4, .png, .wav, .json or .safetensors (actions). Repeat it for several."""
    save_latents: Annotated[Path | None, Cli(group=_OUTPUT, metavar="FILE")] = None
    """Write what was sampled: .safetensors."""
    save_frames: Annotated[Path | None, Cli(group=_OUTPUT, metavar="FILE")] = None
    """Write frames in [0, 1]: .npy [frames, height, width, 3]."""
    backend: Annotated[str | None, Cli(group=_MACHINE, names="backends", metavar="BACKEND")] = None
    """Backend that runs the engines. Default: the bundle's own."""
    device: Annotated[str | None, Cli(group=_MACHINE, metavar="DEVICE")] = None
    """cpu, cuda or cuda:N. Default: the backend's first."""
    limits: Annotated[Path | None, Cli(group=_ROBOT, metavar="FILE")] = None
    """limits.toml of the robot: actions pass, are clipped or rejected."""
    require_signature: Annotated[Path | None, Cli(group=_MACHINE, metavar="FILE")] = None
    """Public key (PEM): a bundle that it did not sign is refused."""
    audit: Annotated[Path | None, Cli(group=_OUTPUT, metavar="FILE")] = None
    """Audit trail to go on with, or to begin."""
    force: Annotated[bool, Cli(group=_OUTPUT)] = False
    """Replace existing outputs."""
