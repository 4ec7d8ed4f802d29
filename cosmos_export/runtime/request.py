"""A request in the model's own terms: what the front end makes of a prompt and media, and what the generator runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from numpy.typing import NDArray

from cosmos_export.sampling import Schedule

Array = NDArray[Any]


@dataclass(frozen=True)
class ActionPart:
    """The action rows of a request."""

    rows: int
    domain: int
    """Embodiment domain, an index into the model's domain matrices."""
    raw_dim: int
    """Width of an action of this embodiment; the columns behind it are padding and stay zero."""
    given: Array | None = None
    """float32 [n, raw_dim] of the first n rows, which are given: every row of forward dynamics, or the state of a
    policy; None: all rows are generated."""
    first_position: int = 1
    """Temporal index of row 0 in frames: 0 where row 0 is the state at the first frame."""

    @property
    def given_rows(self) -> int:
        """How many rows are given, from the first on."""
        return 0 if self.given is None else len(self.given)


@dataclass(frozen=True)
class Request:
    """Everything that decides a result. Sizes are checked against the bundle's profiles before this is made."""

    mode: str
    """Name of one of `cosmos_export.sampling.MODES`."""
    input_ids: Array
    """int64 [und_len] of the prompt."""
    negative_ids: Array | None
    """int64 [negative_und_len]; None where no step is guided."""
    schedule: Schedule
    frames: int
    """Pixel frames, 1 + 4·n; 1 is an image."""
    height: int
    """Latent rows of the generated video."""
    width: int
    """Latent columns."""
    fps: float
    clean_frames: tuple[int, ...] = ()
    """Latent frames that are given, not generated."""
    pixels: Array | None = None
    """float32 [1, 3, frames, H, W] in [−1, 1]: the frames that make the clean latents, in order, and no more.

    The canvas may be larger than 16·height × 16·width, padded at the right and bottom: latents are cropped."""
    sound: bool = False
    action: ActionPart | None = None
    seed: int = 0
    noise: Mapping[str, Array] = field(default_factory=dict)
    """float32 initial noise by modality, in place of the seed's: ``vision`` [1, C, T, h, w], ``sound`` [C, T_s],
    ``action`` [T_a, D]. ``{modality}_steps`` [steps, …] is that of a stochastic sampler."""
