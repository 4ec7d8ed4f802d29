"""Options of the verbs that the Python API has no function for: one record per verb, as in
`cosmos_export.options`. Imports nothing heavy, since help is made from it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from cosmos_export.files import MIB
from cosmos_export.option_fields import Cli
from cosmos_export.options import WORKLOAD

Protocol = Literal["openpi", "gr00t"]
Attention = Literal["sdpa", "triton"]
WeightType = Literal["float32", "bfloat16", "float16"]

FEWEST_RUNS = 5
"""Runs that a median is taken of, at least."""
DEFAULT_SHARD_SIZE = 5_000_000_000

_OUTPUT, _BUNDLE, _GEOMETRY, _MEASURING, _COMPARE = (
    "Output", "For a bundle", "For a geometry", "Measuring", "For compare",
)  # fmt: skip
_MADE, _SIZES, _WEIGHTS = "What is made", "Sizes", "Weights"
_SERVICE, _ROBOT, _MACHINE = "Service", "Robots", "Machine and files"
_SIZE = "nano|super|edge"


@dataclass(frozen=True)
class NoOptions:
    """A verb without options of its own."""


# -- before a build ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DoctorOptions:
    """The machine as `doctor` looks at it."""

    target: Annotated[str | None, Cli(names="targets", metavar="TARGET")] = None
    """Target to check for. Default: the GPUs of this machine."""
    folder: Annotated[Path, Cli(metavar="DIR", shown_default="the current directory")] = Path()
    """Directory for bundles, whose disk is looked at."""


@dataclass(frozen=True)
class TargetsOptions:
    """The targets that `targets` shows."""

    name: Annotated[str | None, Cli(argument=True, names="targets", metavar="TARGET")] = None
    """Show this target only, with its traps and sources."""


@dataclass(frozen=True)
class RecipesLsOptions:
    """The recipes that `recipes ls` lists."""

    target: Annotated[str | None, Cli(names="targets", metavar="TARGET")] = None
    """List only recipes that run on this target."""


@dataclass(frozen=True)
class RecipesChooseOptions:
    """The model, target and requests that `recipes choose` chooses for: ``checkpoint`` or the published size
    ``like``."""

    checkpoint: Annotated[Path | None, Cli(argument=True, metavar="CHECKPOINT")] = None
    """Checkpoint directory. Only headers are read."""
    like: Annotated[str | None, Cli(names="sizes", metavar=_SIZE)] = None
    """Published size in place of a checkpoint."""
    target: Annotated[str, Cli(names="targets", metavar="TARGET")] = "rtx-pro-6000"
    """Target to build for."""
    workloads: Annotated[
        tuple[str, ...], Cli("--workload", reads="repeated", metavar="MODE-SIZE", shown_default=WORKLOAD)
    ] = (WORKLOAD,)
    """Requests, as in `plan`. Repeat it for several."""


@dataclass(frozen=True)
class RecipesShowOptions:
    """The recipe that `recipes show` shows."""

    name: Annotated[str, Cli(argument=True, names="recipes", metavar="RECIPE")]
    """A recipe of `recipes ls`, or FILE.toml."""


@dataclass(frozen=True)
class InspectOptions:
    """The checkpoint that `inspect` reads."""

    checkpoint: Annotated[Path, Cli(argument=True, metavar="CHECKPOINT")]
    """A checkpoint directory, as downloaded."""


@dataclass(frozen=True)
class DemoOptions:
    """The checkpoint that `demo-checkpoint` makes. Sizes are those of the preset unless they are given: tiny, or the
    published size that is named."""

    output: Annotated[Path, Cli("--output", "-o", group=_OUTPUT, metavar="DIR")]
    """Directory to create."""
    variant: Annotated[str | None, Cli(group=_MADE, metavar="omni|edge")] = None
    """Family: omni (Nano and Super) or edge. Default: that of the published size that is named, or omni."""
    true_width: Annotated[str | None, Cli(group=_MADE, names="sizes", metavar=_SIZE)] = None
    """Take the widths of a published size; 2 layers unless --layers says otherwise."""
    like: Annotated[str | None, Cli(group=_MADE, names="sizes", metavar=_SIZE)] = None
    """Make a published size in full, with codecs and vision encoder, in bfloat16; with --layers fewer layers."""
    sparse: Annotated[bool, Cli(group=_MADE)] = False
    """Make all weights zero but the first page of each tensor, as holes in the files: any size in seconds and a few MiB
    of disk."""
    policy: Annotated[str | None, Cli(group=_MADE, metavar="DOMAIN")] = None
    """Make a policy for this robot, such as droid_lerobot, in checkpoint.json."""
    use_state: Annotated[bool | None, Cli("--use-state/--no-use-state", group=_MADE)] = None
    """Whether the policy is given the robot's state. Default: checkpoint.json does not say."""
    distilled: Annotated[bool, Cli(group=_MADE)] = False
    """Give it the sampler of a checkpoint that was distilled to four steps."""
    layers: Annotated[int | None, Cli(group=_SIZES, metavar="N")] = None
    """Layers of each tower."""
    hidden: Annotated[int | None, Cli(group=_SIZES, metavar="N")] = None
    """Model width."""
    heads: Annotated[int | None, Cli(group=_SIZES, metavar="N")] = None
    """Query heads."""
    kv_heads: Annotated[int | None, Cli(group=_SIZES, metavar="N")] = None
    """Key/value heads."""
    head_dim: Annotated[int | None, Cli(group=_SIZES, metavar="N")] = None
    """Width of a head."""
    intermediate: Annotated[int | None, Cli(group=_SIZES, metavar="N")] = None
    """Width of the MLP."""
    vocab: Annotated[int | None, Cli(group=_SIZES, metavar="N")] = None
    """Size of the vocabulary."""
    latent_channels: Annotated[int | None, Cli(group=_SIZES, metavar="N")] = None
    """Channels of the video latents."""
    action_dim: Annotated[int | None, Cli(group=_SIZES, metavar="N")] = None
    """Width of an action."""
    domains: Annotated[int | None, Cli(group=_SIZES, metavar="N")] = None
    """Embodiment domains."""
    sound_dim: Annotated[int | None, Cli(group=_SIZES, metavar="N")] = None
    """Channels of the sound latents (omni only)."""
    dtype: Annotated[WeightType | None, Cli(group=_WEIGHTS)] = None
    """Type of the weights. Default: float32, or bfloat16 with --like."""
    seed: Annotated[int, Cli(group=_WEIGHTS, metavar="N")] = 0
    """Seed. The same seed and options give the same bytes."""
    shard_size: Annotated[int, Cli(group=_OUTPUT, metavar="BYTES")] = DEFAULT_SHARD_SIZE
    """Largest size of one weight file."""
    force: Annotated[bool, Cli(group=_OUTPUT)] = False
    """Replace an existing checkpoint directory."""


# -- bundles and caches -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class BundleOptions:
    """The bundle that `bundle show` reads."""

    directory: Annotated[Path, Cli(argument=True, metavar="DIR")]
    """The bundle."""


@dataclass(frozen=True)
class BundlePackOptions:
    """The bundle that `bundle pack` makes one file of."""

    directory: Annotated[Path, Cli(argument=True, metavar="DIR")]
    """The bundle."""
    output: Annotated[Path, Cli("--output", "-o", metavar="FILE.tar")]
    """Archive to create."""


@dataclass(frozen=True)
class BundleUnpackOptions:
    """The archive that `bundle unpack` makes a bundle of."""

    archive: Annotated[Path, Cli(argument=True, metavar="FILE.tar")]
    """Archive of `bundle pack`."""
    output: Annotated[Path, Cli("--output", "-o", metavar="DIR")]
    """Directory to create."""


@dataclass(frozen=True)
class BundleDiffOptions:
    """The two bundles that `bundle diff` compares."""

    first: Annotated[Path, Cli(argument=True, metavar="FIRST")]
    """A bundle."""
    second: Annotated[Path, Cli(argument=True, metavar="SECOND")]
    """Another one."""


@dataclass(frozen=True)
class BundleVerifyOptions:
    """The bundle that `bundle verify` checks."""

    directory: Annotated[Path, Cli(argument=True, metavar="DIR")]
    key: Annotated[Path | None, Cli(metavar="FILE")] = None
    """Public key (PEM) whose owner must have signed the bundle."""


@dataclass(frozen=True)
class BundleSignOptions:
    """The bundle that `bundle sign` signs."""

    directory: Annotated[Path, Cli(argument=True, metavar="DIR")]
    key: Annotated[Path, Cli(metavar="FILE")]
    """Private key (PEM): ECDSA on P-256, P-384 or P-521."""
    force: Annotated[bool, Cli()] = False
    """Replace a signature that is there."""


_FOLDER = Cli(metavar="DIR", shown_default="$COSMOS_EXPORT_CACHE, or ~/.cache/cosmos-export")


@dataclass(frozen=True)
class CacheOptions:
    """The cache that `cache ls` lists."""

    cache: Annotated[Path | None, _FOLDER] = None
    """Directory of the cache."""


@dataclass(frozen=True)
class CacheWhyOptions:
    """The two entries that `cache why` compares."""

    first: Annotated[str, Cli(argument=True, metavar="KEY")]
    """Beginning of a key, as `cache ls` shows it."""
    second: Annotated[str | None, Cli(argument=True, metavar="OTHER")] = None
    """Beginning of another. Default: the nearest of the same name."""
    cache: Annotated[Path | None, _FOLDER] = None


@dataclass(frozen=True)
class CachePruneOptions:
    """The entries that `cache prune` forgets."""

    everything: Annotated[bool, Cli("--all")] = False
    """Forget all entries, and remove the graphs."""
    cache: Annotated[Path | None, _FOLDER] = None


# -- running ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class AuditVerifyOptions:
    """The trail that `audit verify` checks."""

    file: Annotated[Path, Cli(argument=True, metavar="FILE")]
    """The audit trail."""
    anchor: Annotated[str | None, Cli(metavar="SHA256")] = None
    """SHA-256 of a line that the trail must have, as an earlier `audit verify` printed it."""


@dataclass(frozen=True)
class BenchOptions:
    """A measurement as the user asks for it: of a bundle, of a geometry, or the comparison of two."""

    what: Annotated[tuple[str, ...], Cli(argument=True, reads="repeated", metavar="BUNDLE | compare A B")] = ()
    """A bundle; or `compare A.json B.json`; nothing with --geometry."""
    profile: Annotated[str | None, Cli(group=_BUNDLE, metavar="PROFILE")] = None
    """One of the bundle's profiles, at its optimum. Default: the first."""
    prompt_tokens: Annotated[tuple[int, int] | None, Cli(group=_BUNDLE, reads="pair", metavar="N[:NEGATIVE]")] = None
    """Tokens of the prompt and of the negative prompt. Default: those of the profile's optimum."""
    backend: Annotated[str | None, Cli(group=_BUNDLE, names="backends", metavar="BACKEND")] = None
    """Backend that runs the engines. Default: the one that the bundle was built for."""
    geometry: Annotated[str | None, Cli(group=_GEOMETRY, names="sizes", metavar=_SIZE)] = None
    """Measure random weights of the true size. No checkpoint is needed."""
    workload: Annotated[
        str | None,
        Cli(group=_MEASURING, metavar="WORKLOAD", shown_default=f"{WORKLOAD}; for a bundle what it was built for"),
    ] = None
    """Request. For a geometry: t2i-720p, t2v-480p-189f, policy-droid, … as `plan` has them, or reasoner. For a bundle:
    a mode of `run`, av (video with sound) or reasoner, in its profile."""
    recipe: Annotated[str | None, Cli(group=_GEOMETRY, names="recipes", metavar="RECIPE", shown_default="bf16")] = None
    """Recipe, as `build` takes it."""
    places: Annotated[tuple[str, ...], Cli("--set", group=_GEOMETRY, reads="repeated", metavar="PLACE=SCHEME")] = ()
    """Change of the recipe's rules, as in `build`. Repeat it for several."""
    device: Annotated[str | None, Cli(group=_MEASURING, metavar="DEVICE")] = None
    """cuda, cuda:N or cpu. Default: cuda for a geometry, and the backend's first for a bundle."""
    attention: Annotated[Attention | None, Cli(group=_GEOMETRY)] = None
    """Attention where the recipe does not have it in FP8."""
    kernels: Annotated[tuple[str, ...], Cli(group=_GEOMETRY, reads="commas", names="own-kernels", metavar="NAMES")] = ()
    """This project's kernels in place of the compiler's code, with commas between them."""
    graphs: Annotated[Path | None, Cli(group=_GEOMETRY, metavar="DIR")] = None
    """Graphs of benchmarks/geometry.py that were captured elsewhere."""
    eager: Annotated[bool, Cli(group=_GEOMETRY)] = False
    """Run one operation after another, for comparison."""
    baselines: Annotated[bool, Cli(group=_GEOMETRY)] = False
    """Measure diffusers too, eager and regionally compiled, in the same run."""
    runs: Annotated[int, Cli(group=_MEASURING, metavar="N")] = FEWEST_RUNS
    """Measured runs. The median is taken."""
    warm_up: Annotated[int, Cli(group=_MEASURING, metavar="N")] = 1
    """Runs before them, after the one that compiles."""
    allow_unlike: Annotated[bool, Cli(group=_COMPARE)] = False
    """Compare different models, workloads or dry runs too."""
    max_regression: Annotated[float, Cli(group=_COMPARE, metavar="SHARE")] = 0.05
    """Share by which B may be slower than A."""
    dry_run: Annotated[bool, Cli(group=_MEASURING)] = False
    """Run a tiny geometry on the CPU, or a bundle too few times for a measurement, to try the command."""
    output: Annotated[Path | None, Cli("--output", "-o", group=_OUTPUT, metavar="FILE")] = None
    """Write the measurement as JSON."""
    force: Annotated[bool, Cli(group=_OUTPUT)] = False
    """Replace an existing measurement."""


@dataclass(frozen=True)
class ServeOptions:
    """How a policy is served."""

    protocol: Annotated[Protocol, Cli(group=_SERVICE)] = "openpi"
    """openpi (WebSocket) or gr00t (ZeroMQ)."""
    host: Annotated[str, Cli(group=_SERVICE, metavar="ADDRESS")] = "127.0.0.1"
    """Address to listen at. Any but this machine's own needs --token-file."""
    port: Annotated[int | None, Cli(group=_SERVICE, metavar="N")] = None
    """Port to listen at; 0: any that is free. Default: 8000, or 5555 for gr00t."""
    token: Annotated[str | None, Cli(hidden=True)] = None
    """Token of clients."""
    metrics_port: Annotated[int | None, Cli(group=_SERVICE, metavar="N")] = None
    """Port of this machine alone for /metrics. openpi has it at its own port, too."""
    max_message_bytes: Annotated[int, Cli("--max-message", group=_SERVICE, metavar="MIB", scale=MIB)] = 16 * MIB
    """Largest message, in MiB."""
    max_connections: Annotated[int, Cli("--connections", group=_SERVICE, metavar="N")] = 8
    """Most connections at a time."""
    deadline_s: Annotated[float | None, Cli("--deadline", group=_SERVICE, metavar="SECONDS")] = None
    """Age at which an observation is refused, and a chunk of actions marked stale. Default: none."""
    seed: Annotated[int, Cli(group=_SERVICE, metavar="N")] = 0
    """Seed of the first request. Each one has the next."""


@dataclass(frozen=True)
class PolicyOptions:
    """Options that all requests of a service have in common."""

    embodiment: Annotated[str | None, Cli(group=_ROBOT, names="embodiments", metavar="NAME")] = None
    """Robot that the actions are for. Default: the checkpoint's own."""
    viewpoint: Annotated[str | None, Cli(group=_ROBOT, names="viewpoints", metavar="VIEW")] = None
    """Camera. Default: the embodiment's."""
    action_stats: Annotated[Path | None, Cli(group=_ROBOT, metavar="FILE")] = None
    """Statistics of the data. Actions are then returned in the units of the data."""
    action_normalization: Annotated[str | None, Cli(group=_ROBOT, metavar="NAME")] = None
    """Pair of statistics that is used: quantile, minmax or meanstd."""
    action_width: Annotated[int | None, Cli(group=_ROBOT, metavar="N")] = None
    """Columns of an action, where the embodiment does not fix them."""
    steps: Annotated[int | None, Cli(group=_ROBOT, metavar="N")] = None
    """Denoising steps. Default: as built, or the policy's."""


@dataclass(frozen=True)
class ServeCommand:
    """`serve` on the command line."""

    bundle: Annotated[Path, Cli(argument=True, metavar="BUNDLE")]
    """The bundle of a policy."""
    service: ServeOptions = field(default_factory=ServeOptions)
    """How it is served."""
    token_file: Annotated[Path | None, Cli(group=_SERVICE, metavar="FILE")] = None
    """File with the token that clients must know."""
    policy: PolicyOptions = field(default_factory=PolicyOptions)
    """The requests."""
    limits: Annotated[Path | None, Cli(group=_ROBOT, metavar="FILE")] = None
    """limits.toml of the robot."""
    no_limits: Annotated[bool, Cli(group=_ROBOT)] = False
    """Serve without limits; only what is not finite is rejected."""
    audit: Annotated[Path | None, Cli(group=_OUTPUT, metavar="FILE")] = None
    """Audit trail to go on with, or to begin."""
    backend: Annotated[str | None, Cli(group=_MACHINE, names="backends", metavar="BACKEND")] = None
    """Backend that runs the engines. Default: the bundle's own."""
    device: Annotated[str | None, Cli(group=_MACHINE, metavar="DEVICE")] = None
    """cpu, cuda or cuda:N. Default: the backend's first."""
    require_signature: Annotated[Path | None, Cli(group=_MACHINE, metavar="FILE")] = None
    """Public key (PEM): a bundle that it did not sign is not served."""


# -- help -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ExplainOptions:
    """The code that `explain` explains."""

    code: Annotated[str, Cli(argument=True, metavar="CODE")]
    """Code of an error, such as CX607."""
