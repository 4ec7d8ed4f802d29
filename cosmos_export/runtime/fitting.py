"""Shape profiles of a bundle: which one takes a request, and in the user's terms what they take if none does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from cosmos_export.bundle import DimRecord, ProfileRecord, RequestRecord
from cosmos_export.diagnostics import UserError


def fit_profile(
    profiles: Sequence[ProfileRecord],
    dims: Mapping[str, int | Sequence[int]],
    record: RequestRecord,
    least: Mapping[str, int] | None = None,
    refusal: str = "no profile of this bundle takes",
    hint: str | None = None,
) -> ProfileRecord:
    """The first profile in which every value of ``dims`` is allowed, and that reaches ``least``; or CX607.

    ``refusal`` is how the message begins; ``hint``: the way out of a height or width that nobody gave.
    """
    values = {name: [value] if isinstance(value, int) else list(value) for name, value in dims.items()}
    reached = least or {}
    misfits: list[str] = []
    concerned: dict[str, int] = {}
    hints: list[tuple[int, str]] = []
    silent = values.get("frames") == [1] or any(values.get("action_len", ()))
    for profile in profiles:
        wrong = [name for name, found in values.items() if not all(_within(profile.dims[name], v) for v in found)]
        wrong += [name for name, value in reached.items() if name not in wrong and profile.dims[name].max < value]
        if not wrong:
            return profile
        misfits.append(f"`{profile.name}` takes " + ", ".join(allowed(n, profile.dims[n], record) for n in wrong))
        concerned |= {name: max(values.get(name, [reached.get(name, 0)])) for name in wrong}
        said = _hint(wrong[0], concerned[wrong[0]], profile.dims[wrong[0]], silent)
        hints.append((len(wrong), hint if hint is not None and wrong[0] in ("height", "width") else said))
    wanted = ", ".join(_said(name, str(_size(name, value, record))) for name, value in concerned.items())
    raise UserError("CX607", f"{refusal} {wanted}: {'; '.join(misfits)}", min(hints)[1])


def _within(span: DimRecord, value: int) -> bool:
    return span.min <= value <= span.max


_UNITS = {"und_len": "prompt tokens", "sound_len": "sound latents", "action_len": "actions"}


def _size(name: str, value: int, record: RequestRecord) -> int:
    """A dimension in the user's terms: pixels, pixel frames, or a count."""
    if name in _UNITS:
        return value
    return (value - 1) * record.video.temporal + 1 if name == "frames" else value * record.video.spatial


def _said(name: str, value: str) -> str:
    return f"{value} {_UNITS[name]}" if name in _UNITS else f"{name} {value}"


def allowed(name: str, span: DimRecord, record: RequestRecord) -> str:
    """The range of a profile's dim ``name``, in the user's terms."""
    low, high = (_size(name, value, record) for value in (span.min, span.max))
    return _said(name, str(low) if low == high else f"{low} to {high}")


def _hint(name: str, found: int, span: DimRecord, silent: bool) -> str:
    """``silent``: a picture or an action, which has no sound."""
    if name == "sound_len":
        if not found and silent:
            return "build a profile without sound, as `480p`"
        if not found:
            return "this profile has sound: add --sound"
        return "fewer --frames" if span.max else "build a profile with sound, as 480p-121f+sound"
    if name == "action_len" and not found:
        return "this profile is for actions: --mode policy, forward-dynamics or inverse-dynamics"
    if name == "action_len":
        return f"build a profile with room for {found} rows of actions, as action_len={found}"
    if name == "und_len":
        return f"shorten the prompt, or build with a longer range, as `480p,und_len=1:512:{2 * span.max}`"
    if name == "frames":
        return "leave --frames to the profile, or build one that takes it: `480p` takes 1 to 189"
    return "leave the size to the profile, or build one for this size"
