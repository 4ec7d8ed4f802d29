"""What a recipe costs: bytes of a weight in each scheme, and the type its products are computed in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from cosmos_export.diagnostics import UnsupportedError, UserError
from cosmos_export.targets import Target


@dataclass(frozen=True)
class Scheme:
    """How a linear's weight is stored and multiplied.

    ``bits``: a weight with its share of the block scales; ``computes``: the key of `Target.peak_flops` its products run
    at; ``needs``: the target's precision without which the scheme has no kernel.
    """

    bits: float
    computes: str
    needs: str


SCHEMES: Mapping[str, Scheme] = {
    "bf16": Scheme(16, "bf16", "bf16"),
    "fp8": Scheme(8, "fp8", "fp8"),
    "fp8-w8a16": Scheme(8, "bf16", "fp8-w8a16"),
    "int4": Scheme(4 + 16 / 128, "bf16", "int4"),
    "nvfp4": Scheme(4 + 8 / 16, "nvfp4", "nvfp4"),
}
"""``int4``: groups of 128 with a 16-bit scale; ``nvfp4``: groups of 16 with an 8-bit scale."""


@dataclass(frozen=True)
class Precision:
    """Schemes of a recipe. The first and last ``wide_steps`` steps run with 16-bit activations."""

    name: str
    reasoner: str = "bf16"
    generator: str = "bf16"
    attention: str = "bf16"
    wide_steps: int = 0

    def wide(self) -> Scheme:
        """What the generator computes with in those steps: the same bytes, 16-bit products."""
        return SCHEMES["fp8-w8a16" if self.generator == "fp8" else self.generator]


PRECISIONS: Mapping[str, Precision] = {
    "bf16": Precision("bf16"),
    "fp8": Precision("fp8", reasoner="fp8-w8a16", generator="fp8", wide_steps=3),
}
"""``fp8`` is the published layout of the FP8 revisions."""


def precision(name: str) -> Precision:
    """The recipe called ``name``; UserError CX482 where there is none."""
    if name not in PRECISIONS:
        raise UserError("CX482", f"there is no recipe `{name}` to plan with", f"one of {', '.join(PRECISIONS)}")
    return PRECISIONS[name]


def require_schemes(chosen: Precision, target: Target) -> None:
    """Return if ``target`` computes in every scheme of ``chosen``, else UnsupportedError CX483 with the reason."""
    for scheme in dict.fromkeys((chosen.reasoner, chosen.generator)):
        needed = SCHEMES[scheme].needs
        if needed not in target.precisions:
            why = target.refused.get(needed, "it has no kernel for it")
            raise UnsupportedError(
                "CX483",
                f"recipe `{chosen.name}` needs {needed}, which target `{target.name}` does not run: {why}",
                f"its precisions: {', '.join(target.precisions)}",
            )
