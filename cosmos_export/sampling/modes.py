"""The modes: what a request can ask for. One declaration each, and everything else asks it.

Nothing outside this package compares with a mode's name or keeps a table by it. A new mode is an entry of `MODES`: what
it starts from, which rows of latents are given, what it makes and how it is sampled. From that follow the options of
`run`, the noise that is drawn, the planner's workload, what calibration shows, and the case that parity is measured on.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from types import MappingProxyType
from typing import Literal

from cosmos_export.family import Family
from cosmos_export.sampling.defaults import ACTIONS, DROID_POLICY, IMAGES, VIDEOS, Default, Settings

Clean = int | Literal["all"]
"""How many rows are given and not generated, from the first on."""
Fit = Literal["cover", "stretch"]
"""How given frames come onto the canvas: scaled to cover it and cropped around its centre, or stretched to it."""


class Clue(StrEnum):
    """Clues to a mode where none is named; the first of these that there is decides."""

    ACTIONS = "actions"
    ROBOT = "embodiment"
    CLIP = "video"
    PICTURE = "image"
    ONE_FRAME = "one frame"
    NOTHING = "nothing else"


class PromptForm(StrEnum):
    """Treatment of the text of a prompt."""

    SCENE = "scene"
    """Sentences on duration and resolution follow it."""
    TASK = "task"
    """It is the task in the JSON caption of an action, with the viewpoint of the camera."""


@dataclass(frozen=True)
class Guidance:
    """The runs of the generator in a guided step, and what becomes of their velocities."""

    branches: tuple[str, ...]
    """Prompts of the runs. A step that is not guided has the first alone."""
    expression: str
    """The velocity of the step. c is the first branch, u the second, g the scale."""


CLASSIFIER_FREE = Guidance(("positive", "negative"), "u + g·(c − u)")


@dataclass(frozen=True)
class Sample:
    """The request on which parity is measured in a mode: small enough for a model of true width, of awkward sizes.

    ``prompt`` counts tokens; the others are latent sizes, and rows of sound and of actions.
    """

    prompt: int
    frames: int
    height: int
    width: int
    sound: int = 0
    actions: int = 0
    fps: float = 24.0


_FRAME_OPTIONS = ("frames", "height", "width", "metadata")
_ACTION_OPTIONS = (
    "embodiment", "viewpoint", "chunk", "tier", "action_width", "action_stats", "action_normalization",
)  # fmt: skip


@dataclass(frozen=True)
class Mode:
    """One mode of a request."""

    name: str
    title: str
    """Name of its case in evidence and reports, in words."""
    settings: Settings
    sample: Sample
    sources: tuple[str, ...] = ()
    """Files it starts from, as options of a request: exactly one of them is given. None: the prompt alone."""
    needs: tuple[str, ...] = ()
    """Options that a request must have besides."""
    options: tuple[str, ...] = _FRAME_OPTIONS
    """Options that mean something here and not in every mode."""
    single: bool = False
    """Whether a request is one frame, an image."""
    clean_frames: Clean = 0
    """Latent frames that are given."""
    clean_actions: Clean | None = None
    """Action rows that are given; None: there are no action rows."""
    state: bool = False
    """A policy's checkpoint may want the robot's state as the first action row, which is then given."""
    fit: Fit = "cover"
    decoded: tuple[str, ...] = ("vision",)
    """Modalities that a usual request decodes, beside sound. An action that is wanted needs no decoder."""
    prompt: PromptForm = PromptForm.SCENE
    guidance: Guidance = CLASSIFIER_FREE
    robots: Mapping[str, Settings] = field(default_factory=dict)
    """Settings of policy checkpoints instead, by the beginning of their embodiment's name."""
    distilled: bool = True
    """Whether distilled checkpoints were trained for it."""
    implied_by: Clue | None = None
    """The clue to this mode where none is named; None: it is asked for by its name."""
    shown_by: Clue | None = None
    """Data that calibration takes for this mode where none is named. Modes with the same kind of data take turns, and
    robot data stands for each of them."""
    aliases: tuple[str, ...] = ()
    """Other spellings of the name, in requests of NVIDIA's framework."""
    representative: bool = False
    """Whether it is one of the few in which a part of a large model is compared. Between them they have every modality,
    and clean rows beside noisy ones."""

    def __str__(self) -> str:
        return self.name

    def __repr__(self) -> str:
        return f"Mode({self.name})"

    @property
    def acts(self) -> bool:
        """Whether requests have action rows."""
        return self.clean_actions is not None

    @property
    def generated(self) -> tuple[str, ...]:
        """Modalities with rows that are noise at the start, beside sound."""
        rows = {"vision": self.clean_frames, "action": "all" if self.clean_actions is None else self.clean_actions}
        return tuple(name for name, clean in rows.items() if clean != "all")

    @property
    def least_frames(self) -> int:
        """Latent frames of the shortest request: one more than are given, and two where it is no image."""
        given = 0 if self.clean_frames == "all" else self.clean_frames
        return 1 if self.single else max(given + 1, 2)

    def modalities(self, sound: bool) -> tuple[str, ...]:
        """Modalities that the model must have for it, generated or given."""
        found = dict.fromkeys((*self.generated, *(["action"] if self.acts else []), *(["sound"] if sound else [])))
        return tuple(found)

    def given_frames(self, total: int) -> int:
        """How many of ``total`` latent frames are given."""
        return total if self.clean_frames == "all" else self.clean_frames

    def default(self, family: Family, policy: str | None) -> Default:
        """How it is sampled where a request does not say. ``policy`` is the embodiment of a policy checkpoint."""
        found = (own for start, own in self.robots.items() if (policy or "").startswith(start))
        return next(found, self.settings).defaults[family]


MODES: Mapping[str, Mode] = MappingProxyType(
    {
        mode.name: mode
        for mode in (
            Mode(
                "t2i",
                "text-to-image",
                IMAGES,
                Sample(prompt=33, frames=1, height=6, width=8),
                single=True,
                implied_by=Clue.ONE_FRAME,
                shown_by=Clue.PICTURE,
                aliases=("text2image",),
            ),
            Mode(
                "t2v",
                "text-to-video",
                VIDEOS,
                Sample(prompt=12, frames=5, height=5, width=6, sound=9, fps=16.0),
                options=(*_FRAME_OPTIONS, "sound"),
                implied_by=Clue.NOTHING,
                shown_by=Clue.CLIP,
                aliases=("text2video", "text2world"),
                representative=True,
            ),
            Mode(
                "i2v",
                "image-to-video",
                VIDEOS,
                Sample(prompt=1, frames=3, height=5, width=7),
                sources=("image",),
                options=(*_FRAME_OPTIONS, "sound"),
                clean_frames=1,
                implied_by=Clue.PICTURE,
                shown_by=Clue.CLIP,
                aliases=("image2video", "image2world"),
            ),
            Mode(
                "v2v",
                "video-to-video",
                VIDEOS,
                Sample(prompt=70, frames=5, height=4, width=6, sound=3, fps=30.0),
                sources=("video",),
                options=(*_FRAME_OPTIONS, "sound", "keep"),
                clean_frames=2,
                fit="stretch",
                implied_by=Clue.CLIP,
                shown_by=Clue.CLIP,
                aliases=("video2video", "video2world"),
            ),
            Mode(
                "policy",
                "policy",
                ACTIONS,
                Sample(prompt=20, frames=3, height=5, width=4, actions=8, fps=15.0),
                sources=("image", "video"),
                options=(*_ACTION_OPTIONS, "state"),
                clean_frames=1,
                clean_actions=0,
                state=True,
                decoded=(),
                prompt=PromptForm.TASK,
                robots={"droid": DROID_POLICY},
                distilled=False,
                implied_by=Clue.ROBOT,
                shown_by=Clue.ACTIONS,
                representative=True,
            ),
            Mode(
                "forward-dynamics",
                "forward-dynamics",
                ACTIONS,
                Sample(prompt=20, frames=3, height=4, width=5, actions=8, fps=5.0),
                sources=("image", "video"),
                needs=("actions",),
                options=(*_ACTION_OPTIONS, "actions", "action_clamp"),
                clean_frames=1,
                clean_actions="all",
                prompt=PromptForm.TASK,
                distilled=False,
                implied_by=Clue.ACTIONS,
                shown_by=Clue.ACTIONS,
                aliases=("forward_dynamics",),
            ),
            Mode(
                "inverse-dynamics",
                "inverse-dynamics",
                ACTIONS,
                Sample(prompt=20, frames=3, height=4, width=4, actions=8, fps=10.0),
                sources=("video",),
                options=_ACTION_OPTIONS,
                clean_frames="all",
                clean_actions=0,
                decoded=(),
                prompt=PromptForm.TASK,
                distilled=False,
                shown_by=Clue.ACTIONS,
                aliases=("inverse_dynamics",),
            ),
        )
    }
)
"""Every mode by its name, in the order in which they are listed."""


def implied_mode(clues: Collection[Clue]) -> Mode:
    """The mode of a request that names none, by what it has."""
    by_clue = {mode.implied_by: mode for mode in MODES.values()}
    return next(by_clue[clue] for clue in Clue if clue in clues or clue is Clue.NOTHING)


def modes_shown_by(data: Clue) -> tuple[str, ...]:
    """Names of the modes for which calibration takes ``data``."""
    return tuple(mode.name for mode in MODES.values() if mode.shown_by is data)


DEFAULT_MODE = implied_mode(()).name
"""The mode that is built for, planned and measured where none is named."""
IMAGE_MODE = implied_mode((Clue.ONE_FRAME,)).name
"""The mode that makes a picture."""
