"""The policy behind a server: observations in, chunks of actions out; the bundle behind it, and the golden request."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from cosmos_export.diagnostics import FindingError, UserError
from cosmos_export.in_memory import InMemory
from cosmos_export.options import GenerateOptions
from cosmos_export.runtime.embodiments import Actions, Embodiment, embodiment
from cosmos_export.runtime.frontend import Prepared
from cosmos_export.runtime.generate_options import request_record
from cosmos_export.runtime.limits import Units
from cosmos_export.runtime.model import LoadedModel
from cosmos_export.runtime.scenes import policy_of
from cosmos_export.runtime.views import Views, compose
from cosmos_export.sampling import Overrides
from cosmos_export.serve.observation import Observation, array_digest
from cosmos_export.verb_options import PolicyOptions

GOLDEN_SEED = 0


@dataclass(frozen=True)
class Chunk:
    """Actions for one observation."""

    actions: Actions
    """float32 [rows, width], as the robot takes them."""
    prepare_s: float
    """Time from the observation to the request: composition, canvas, tokens."""
    model_s: float


class ServedPolicy(Protocol):
    """The interface of a policy that a server serves."""

    @property
    def robot(self) -> Embodiment: ...

    @property
    def views(self) -> Views:
        """The parts of its observations."""

    @property
    def units(self) -> Units:
        """Units of the actions."""

    @property
    def fps(self) -> float:
        """Actions per second."""

    @property
    def width(self) -> int:
        """Columns of an action."""

    @property
    def bundle_id(self) -> str: ...

    def example(self) -> Observation:
        """An observation that it takes, the same every time."""

    def act(self, observation: Observation, seed: int) -> Chunk:
        """Actions for ``observation``. UserError, UnsupportedError: it cannot be a request of this bundle;
        FindingError: results are not finite. Called by one thread at a time."""


class BundlePolicy:
    """The policy in a bundle."""

    def __init__(self, model: LoadedModel, options: PolicyOptions) -> None:
        """UserError CX610: the bundle is no policy, and no embodiment is given."""
        self._model, self._options = model, options
        self._record = request_record(model.manifest)
        self.robot = embodiment(options.embodiment, policy_of(self._record))
        self.views = self.robot.views
        self.units: Units = "model" if options.action_stats is None else "raw"
        self.fps = self.robot.fps
        self.width = self._width()
        self._mirrored = self._columns(self.views.mirrored)

    @property
    def bundle_id(self) -> str:
        """SHA-256 of the manifest in hexadecimal digits."""
        return self._model.bundle_id

    def _width(self) -> int:
        width = self._options.action_width or self.robot.width
        if width is None:
            raise UserError(
                "CX611", f"actions of `{self.robot.name}` have no fixed width", "say it with --action-width"
            )
        return width

    def _columns(self, names: tuple[str, ...]) -> list[int]:
        """Columns of the parts ``names``."""
        found: list[int] = []
        first = 0
        for name, count in self.robot.parts:
            found += range(first, first + count) if name in names else ()
            first += count
        return found

    def example(self) -> Observation:
        """A picture without noise and a task, the same every time."""
        height, width = self.views.size or self._profile_size()
        rows, columns = np.mgrid[0:height, 0:width]
        planes = [(rows * 255) // height, (columns * 255) // width, (rows + columns) % 256]
        return Observation("Pick up the cube.", {self.views.whole: np.stack(planes, axis=-1).astype(np.uint8)})

    def _profile_size(self) -> tuple[int, int]:
        spatial = self._record.video.spatial
        for profile in self._model.manifest.profiles:
            if profile.dims["action_len"].max:
                return profile.dims["height"].opt * spatial, profile.dims["width"].opt * spatial
        raise UserError("CX607", "no profile of this bundle takes actions", "build it with a profile that does")

    def act(self, observation: Observation, seed: int) -> Chunk:
        """Actions for ``observation``; see `ServedPolicy.act`."""
        started = time.perf_counter()
        prepared = self._prepared(observation, seed)
        made = time.perf_counter()
        actions = self._model.run(prepared).actions
        assert actions is not None
        ended = time.perf_counter()
        actions = np.array(actions, dtype=np.float32)
        # Here alone: `run` and the API return the model's columns, and nothing after this knows of the embodiment.
        actions[:, self._mirrored] = 1 - actions[:, self._mirrored]
        return Chunk(actions, made - started, ended - made)

    def require(self) -> None:
        """Look whether the bundle can do this at all, before anything is loaded; the errors are those of `act`."""
        self._prepared(self.example(), GOLDEN_SEED)

    def _prepared(self, observation: Observation, seed: int) -> Prepared:
        picture = compose(self.views, observation.pictures)
        options = self._options
        # `observation.state` enters here, as the first row of the actions, as soon as a request takes one. Until then
        # `prepare` refuses bundles of policies that need it (CX605), and the state serves the review of limits alone.
        return self._model.prepare(
            GenerateOptions(
                prompt=InMemory(observation.prompt, "the prompt"),
                mode="policy",
                image=InMemory(picture[None], "the picture"),
                literal=True,  # a stranger's words are no control tokens
                seed=seed,
                viewpoint=options.viewpoint or self.views.viewpoint,
                embodiment=options.embodiment,
                action_stats=options.action_stats,
                action_normalization=options.action_normalization,
                action_width=options.action_width,
                sampling=Overrides(steps=options.steps),
            )
        )


def golden(policy: ServedPolicy) -> str:
    """Make the same request twice, and return the digest of its actions.

    FindingError CX645: the results differ, or they are not finite. It also loads everything, so that the first robot
    does not wait for it.
    """
    example = policy.example()
    first, second = (policy.act(example, GOLDEN_SEED).actions for _ in range(2))
    if not np.isfinite(first).all():
        raise FindingError("CX645", "the golden request gives actions that are not finite", "the port stays closed")
    if array_digest(first) != array_digest(second):
        most = float(np.abs(first - second).max())
        raise FindingError(
            "CX645",
            f"the golden request gives two results for one seed, up to {most:.3g} apart",
            "the port stays closed; `cosmos-export doctor` looks at this machine",
        )
    return array_digest(first)
