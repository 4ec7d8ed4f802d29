"""The searches of a calibration by name: this project's and ModelOpt's, with their settings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Any

from cosmos_export.calibration.search import Search
from cosmos_export.diagnostics import UnsupportedError, UserError

ALGORITHMS: Mapping[str, str] = {
    "none": "ranges alone",
    "awq": "a factor for each input channel of INT4 weights (AWQ), searched here",
    "modelopt-awq": "the same, searched by ModelOpt's awq_lite",
    "modelopt-svdquant": "the same, and the largest singular vectors of the weight in 16 bit beside it (SVDQuant)",
    "modelopt-auto": "the scheme of each product within a budget of bits, as a recipe (AutoQuantize)",
}
"""Name → what it finds."""
PROVIDER = "modelopt"
DEFAULT_RANK, DEFAULT_BITS = 32, 6.0
LARGEST_RANK = 256


@dataclass(frozen=True)
class Algorithm:
    """A search and its settings. CX325: no search has that name, or it does not have a given setting."""

    name: str = "none"
    rank: int | None = None
    """Rank of the part that ``modelopt-svdquant`` does not quantize."""
    bits: float | None = None
    """Bits of an average weight of a layer, for ``modelopt-auto``."""

    def __post_init__(self) -> None:
        if self.name not in ALGORITHMS:
            raise UserError("CX325", f"there is no algorithm `{self.name}`", f"one of {', '.join(ALGORITHMS)}")
        if self.rank is not None and self.name != "modelopt-svdquant":
            raise UserError("CX325", f"algorithm `{self.name}` has no rank", "`--rank` is for modelopt-svdquant")
        if self.bits is not None and self.name != "modelopt-auto":
            raise UserError("CX325", f"algorithm `{self.name}` has no budget of bits", "`--bits` is for modelopt-auto")
        if self.rank is not None and not 1 <= self.rank <= LARGEST_RANK:
            raise UserError("CX325", f"rank {self.rank} is not within 1 … {LARGEST_RANK}", f"--rank {DEFAULT_RANK}")
        if self.bits is not None and not 4.5 <= self.bits <= 16:
            raise UserError("CX325", f"{self.bits:g} bits are not within 4.5 … 16", f"--bits {DEFAULT_BITS:g}")

    @property
    def settings(self) -> dict[str, Any]:
        """Description for plans and lineage."""
        found: dict[str, Any] = {"name": self.name}
        if self.name == "modelopt-svdquant":
            found["rank"] = self.rank or DEFAULT_RANK
        if self.name == "modelopt-auto":
            found["bits"] = self.bits or DEFAULT_BITS
        if self.name.startswith(PROVIDER):
            from importlib import metadata

            found["modelopt"] = metadata.version("nvidia-modelopt")
        return found

    def search(self) -> Search | None:
        """The search itself; None for ranges alone. UnsupportedError CX326: its provider is not installed."""
        if self.name == "none":
            return None
        if self.name == "awq":
            from cosmos_export.calibration.awq import search_pre_scales

            return search_pre_scales
        require_provider(self)
        from cosmos_export.calibration import modelopt_search

        if self.name == "modelopt-auto":
            return partial(modelopt_search.choose_schemes, bits=self.bits or DEFAULT_BITS)
        rank = (self.rank or DEFAULT_RANK) if self.name == "modelopt-svdquant" else 0
        return partial(modelopt_search.search_pre_scales, rank=rank)


def require_provider(algorithm: Algorithm) -> None:
    """UnsupportedError CX326: what ``algorithm`` is from is not installed."""
    if algorithm.name.startswith(PROVIDER) and find_spec(PROVIDER) is None:
        raise UnsupportedError(
            "CX326",
            f"algorithm `{algorithm.name}` is NVIDIA ModelOpt's, which is not installed",
            'pip install ".[modelopt]" in the checkout, or `--algorithm awq`, which needs nothing',
        )
