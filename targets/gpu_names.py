"""GPUs by the names that people write: which compute capability they have, so that only a target whose engines load on
them is ever suggested."""

from __future__ import annotations

import re

# Name without spaces, dashes and makers, compute capability. The first that fits the whole name counts.
_CHIPS: tuple[tuple[re.Pattern[str], str], ...] = tuple(
    (re.compile(pattern), capability)
    for pattern, capability in (
        (r"(rtx)?(pro)?(4|5|2|4\.5)?[2456]\d00(blackwell|serveredition|workstationedition|maxq)+", "12.0"),
        (r"rtxpro\d{4}\w*|(rtx)?6000pro\w*|gb20[2-7]", "12.0"),
        (r"(rtx)?50[5-9]0(ti|super|d|laptop|mobile)*", "12.0"),
        (r"(dgx)?spark|gb10|n1x?", "12.1"),
        (r"(rtx)?40[5-9]0(ti|super|d|laptop|mobile)*", "8.9"),
        (r"(rtx)?a?[2456]\d00(sff)?ada(generation)?", "8.9"),
        (r"l4|l40[sg]?|l20|l2|ad10\d|ada(lovelace)?", "8.9"),
        (r"(rtx)?30[5-9]0(ti|super|laptop|mobile)*", "8.6"),
        (r"(rtx)?a[2-6]0?00|a10g?|a16|a2|a40|ga10[2-7]", "8.6"),
        (r"a100\w*|a30|a800\w*|ga100|ampere", "8.0"),
        (r"(jetson)?(agx)?orin\w*", "8.7"),
        (r"(jetson)?(agx)?xavier\w*", "7.2"),
        (r"(jetson)?(agx)?thor\w*|t5000|t4000", "11.0"),
        (r"(rtx)?20[5-9]0(ti|super)*|titanrtx|t4|t1000|gtx16\d\d\w*|tu1\d\d|turing", "7.5"),
        (r"v100\w*|titanv|gv100|volta", "7.0"),
        (r"p100\w*|p4|p40|(gtx)?10[5-8]0(ti)?|pascal", "6.1"),
        (r"gh200|gh100|h100\w*|h200\w*|h800\w*|h20|hopper", "9.0"),
        (r"b100\w*|b200\w*|gb200\w*|gb10[02]", "10.0"),
        (r"b300|gb300\w*|blackwellultra", "10.3"),
    )
)
_MAKERS = re.compile(r"nvidia|geforce|quadro|tesla|tegra|[dh]gx(?!spark|[\s_-]*spark)|[\s_-]+")
_CAPABILITY = re.compile(r"(sm|compute|cc)?[_-]?(?P<major>1?\d)\.?(?P<minor>\d)[af]?")
_OTHER_MAKERS = re.compile(r"mi\d{2,3}x?|rx\d{4}\w*|gfx\w+|rocm|arc\w*|gaudi\w*|m[1-4](pro|max|ultra)?|mps|tpu\w*")
_CHIPS_OF = {"dgxspark": ("gb10", "spark"), "jetsonthor": ("thor", "agxthor", "jetsonagxthor", "t5000", "jetsont5000")}
_ANY = ("gpu", "cuda", "nvidia", "rtx", "auto", "native", "host", "local")


def plain(name: str) -> str:
    """``name`` without spaces, dashes and makers, in lower case."""
    return _MAKERS.sub("", name.lower())


def capability_of(name: str) -> str | None:
    """The compute capability of the GPU called ``name``, or that ``name`` itself is (``sm_120``, ``8.9``); None where
    it is not known."""
    short = plain(name)
    for pattern, capability in _CHIPS:
        if pattern.fullmatch(short):
            return capability
    written = _CAPABILITY.fullmatch(name.lower().strip())
    if written is not None and (not name[0].isdigit() or "." in name):
        return f"{written['major']}.{written['minor']}"
    return None


def other_maker(name: str) -> bool:
    """Whether ``name`` is a device that no NVIDIA library runs on."""
    return _OTHER_MAKERS.fullmatch(plain(name)) is not None


def same(name: str, target: str) -> bool:
    """Whether ``name`` is another spelling of ``target``, or the chip in it."""
    short, known = plain(name), plain(target)
    return short in (known, known.removeprefix("rtx"), *_CHIPS_OF.get(known, ()))


def any_gpu(name: str) -> bool:
    """Whether ``name`` says only that there is a GPU."""
    return plain(name).partition(":")[0] in _ANY
