"""A workload: a mode and a shape with the lengths of its prompts, by a name such as ``t2v-480p-189f``."""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from cosmos_export.diagnostics import UserError
from cosmos_export.sampling import MODES
from cosmos_export.targets.profiles import Profile, is_named, parse_profile


@dataclass(frozen=True)
class Workload:
    """One request. Sizes are latent: see `cosmos_export.targets.profiles.DIMS`."""

    name: str
    mode: str
    profile: Profile
    """The engine's profile for it; the request is at its optimum."""
    prompt_tokens: int
    negative_tokens: int

    def dim(self, name: str) -> int:
        return self.profile.dims[name].opt

    @property
    def frame_rows(self) -> int:
        """Rows of one latent frame: patches of two by two latents."""
        return ((self.dim("height") + 1) // 2) * ((self.dim("width") + 1) // 2)

    @property
    def rows(self) -> int:
        """Rows the generator computes: patches of all frames, sound and actions."""
        return self.dim("frames") * self.frame_rows + self.dim("sound_len") + self.dim("action_len")

    @property
    def most_rows(self) -> int:
        """Rows at the profile's maximum, which is what an engine reserves memory for."""
        most = {name: span.max for name, span in self.profile.dims.items()}
        patches = ((most["height"] + 1) // 2) * ((most["width"] + 1) // 2)
        return most["frames"] * patches + most["sound_len"] + most["action_len"]


def parse_workload(text: str, prompt_tokens: tuple[int, int] | None = None) -> Workload:
    """``MODE-PROFILE``: ``t2v-480p-189f``, ``t2i-720p``, ``i2v-720p-9:16-121f+sound``, ``policy-droid``, or
    ``t2v-frames=24,height=30,width=52``. An image has one frame. UserError CX481 for a mode that is none, CX410 for a
    profile that is none.
    """
    name = text.strip()
    mode = next((m for m in sorted(MODES, key=len, reverse=True) if name == m or name.startswith(f"{m}-")), None)
    if mode is None:
        head = name.partition("-")[0]
        near = difflib.get_close_matches(head, MODES, n=1)
        raise UserError(
            "CX481",
            f"workload `{text}` begins with no mode; modes: {', '.join(MODES)}",
            f"did you mean `{near[0]}`?" if near else "for example t2v-480p-189f, t2i-720p, policy-droid",
        )
    shape = name if is_named(name.split(",")[0]) else name.removeprefix(mode).removeprefix("-")
    if not shape:
        raise UserError("CX481", f"workload `{text}` has no size", f"for example {mode}-480p")
    if MODES[mode].single and "=" not in shape:
        shape += ",frames=1"
    return _workload(name, mode, shape, prompt_tokens)


def _workload(name: str, mode: str, shape: str, prompt_tokens: tuple[int, int] | None) -> Workload:
    positive, negative = prompt_tokens or MODES[mode].settings.prompt_tokens
    profile = parse_profile(shape)
    longest = profile.dims["und_len"].max
    if not 0 < max(positive, negative) <= longest or min(positive, negative) < 1:
        raise UserError(
            "CX481",
            f"prompts of {positive} and {negative} tokens do not fit profile `{profile.name}`: 1 … {longest}",
            "give --prompt-tokens N or N:NEGATIVE within it",
        )
    return Workload(name, mode, profile, positive, negative)
