"""The policy behind a server: observations in, chunks of actions out; the bundle behind it, and the golden request."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from cosmos_export.bundle.embodiment import Embodiment
from cosmos_export.diagnostics import FindingError, UserError
from cosmos_export.in_memory import InMemory
from cosmos_export.options import GenerateOptions
from cosmos_export.runtime.conversion import Units
from cosmos_export.runtime.embodiments import Actions, robot_of
from cosmos_export.runtime.frontend import Prepared
from cosmos_export.runtime.generate_options import request_record
from cosmos_export.runtime.model import LoadedModel
from cosmos_export.runtime.recorded import array_digest
from cosmos_export.sampling import Overrides
from cosmos_export.serve.observation import Observation
from cosmos_export.targets.backends import reference_backend
from cosmos_export.verb_options import PolicyOptions

GOLDEN_SEED = 0


@dataclass(frozen=True)
class Expected:
    """The actions of the golden request as the build had them."""

    actions: Actions
    limit: float
    """Largest relative L2 distance from them."""


@dataclass(frozen=True)
class Golden:
    """The result of the golden request."""

    digest: str
    """SHA-256 of its actions, in hexadecimal digits."""
    distance: float | None
    """Relative L2 from those of the build; None where the build had none, or with other options."""


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

    def expected(self) -> Expected | None:
        """The actions for `example` as the build had them; None where it had none, or with other options."""

    def act(self, observation: Observation, seed: int) -> Chunk:
        """Actions for ``observation``. UserError, UnsupportedError: it cannot be a request of this bundle;
        FindingError: results are not finite. Called by one thread at a time."""


class BundlePolicy:
    """The policy in a bundle."""

    def __init__(self, model: LoadedModel, options: PolicyOptions) -> None:
        """UserError CX610: the bundle is no policy, and no embodiment is given."""
        self._model, self._options = model, options
        self._record = request_record(model.manifest)
        self.robot = robot_of(options.embodiment, self._record)
        self.units: Units = "model" if options.action_stats is None else "raw"
        self.fps = self.robot.fps
        self.width = self._width()

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

    def example(self) -> Observation:
        """A picture without noise and a task, the same every time."""
        height, width = self.robot.views.size or self._profile_size()
        rows, columns = np.mgrid[0:height, 0:width]
        planes = [(rows * 255) // height, (columns * 255) // width, (rows + columns) % 256]
        picture = np.stack(planes, axis=-1).astype(np.uint8)
        state = np.linspace(-0.5, 0.5, self.width)[None] if self.robot.history else None
        if state is not None:
            state = np.repeat(state, self.robot.history, axis=0)
        return Observation("Pick up the cube.", {self.robot.views.whole: picture}, state)

    def expected(self) -> Expected | None:
        """See `Policy.expected`. It loads the model."""
        found = self._model.manifest.volatile.golden
        default = replace(self._options, embodiment=None) == PolicyOptions()
        if found is None or not default or found.embodiment != self.robot.name:
            return None
        reference = self._model.load().bundle.executor.name == reference_backend().name
        limit = found.limit if reference else found.limit_elsewhere
        return Expected(np.asarray(found.actions, dtype=np.float32), limit)

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
        return Chunk(actions, made - started, ended - made)

    def require(self) -> None:
        """Look whether the bundle can do this at all, before anything is loaded; the errors are those of `act`."""
        self._prepared(self.example(), GOLDEN_SEED)

    def _prepared(self, observation: Observation, seed: int) -> Prepared:
        options, state = self._options, observation.state
        # A policy that is given no state has it for the review of limits alone.
        given = state is not None and bool(self.robot.history)
        return self._model.prepare(
            GenerateOptions(
                prompt=InMemory(observation.prompt, "the prompt"),
                mode="policy",
                image={name: InMemory(one[None], f"`{name}`") for name, one in observation.pictures.items()},
                state=InMemory(state, "the observation") if given else None,
                literal=True,  # a stranger's words are no control tokens
                seed=seed,
                viewpoint=options.viewpoint,
                embodiment=options.embodiment,
                action_stats=options.action_stats,
                action_normalization=options.action_normalization,
                action_width=options.action_width,
                sampling=Overrides(steps=options.steps),
            )
        )


def golden(policy: ServedPolicy) -> Golden:
    """Make the same request twice, and compare its actions with those of the build.

    FindingError CX645: the results differ, or are not finite, or are further from the build's than its limit. It also
    loads everything, so that the first robot does not wait for it.
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
    distance, expected = None, policy.expected()
    if expected is not None:
        same = first.shape == expected.actions.shape
        apart = float(np.linalg.norm(first - expected.actions)) if same else float("inf")
        distance = apart / max(float(np.linalg.norm(expected.actions)), 1e-30)
        if not distance <= expected.limit:
            raise FindingError(
                "CX645",
                f"the golden request gives actions that are {distance:.3g} from those of the build (relative L2; "
                f"allowed: {expected.limit:g})",
                "the port stays closed: this backend computes something else here than the build did",
            )
    return Golden(array_digest(first), distance)
