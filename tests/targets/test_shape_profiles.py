"""Shape profiles: names, ranges, limits, and the input shapes that follow."""

from __future__ import annotations

import pytest

from cosmos_export.diagnostics import InternalError, UserError
from cosmos_export.targets.profiles import (
    DIMS,
    DimRange,
    ModelLimits,
    Profile,
    check_limits,
    evaluate_dim,
    input_shapes,
    parse_profile,
    pixel_to_latent_frames,
)

TOKENS = "frames*((height+1)//2)*((width+1)//2)+sound_len+action_len"


def tokens(text: str) -> tuple[int, int, int]:
    low, opt, high = input_shapes(parse_profile(text), {"x": (1, TOKENS, 64)})["x"]
    return low[1], opt[1], high[1]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("256p", (60, 2880, 2880)),
        ("480p-1f", (390, 390, 390)),
        ("480p-121f", (12090, 12090, 12090)),
        ("480p-1:1-189f", (19200, 19200, 19200)),
        ("480p-4:3-121f", (12121, 12121, 12121)),
        ("720p-189f", (44160, 44160, 44160)),  # 45 latent rows: the 46th is padding
        ("720p-9:16-189f", (44160, 44160, 44160)),
        ("720p-189f+sound", (44357, 44357, 44357)),
        ("policy-droid", (3092, 3093, 3093)),
        ("frames=1:24:48,height=30,width=52", (390, 9360, 18720)),
    ],
)
def test_tokens_of_published_workloads(text: str, expected: tuple[int, int, int]) -> None:
    assert tokens(text) == expected


def test_a_name_can_be_refined() -> None:
    profile = parse_profile("480p-121f, und_len=1:900:3000")
    assert profile.dims["und_len"] == DimRange(1, 900, 3000)
    assert profile.dims["frames"] == DimRange(31, 31, 31)
    assert str(profile) == "und_len=1:900:3000,frames=31,height=30,width=52,sound_len=0,action_len=0"
    assert dict(parse_profile(str(profile)).dims) == dict(profile.dims)


def test_defaults() -> None:
    profile = parse_profile("480p")
    assert tuple(profile.dims) == tuple(DIMS)
    assert profile.dims["und_len"] == DimRange(1, 512, 4096)
    assert profile.dims["frames"] == DimRange(1, 48, 48)
    assert parse_profile("policy-droid").dims["action_len"] == DimRange(32, 33, 33)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("480p-120f", "120 pixel frames are not 4·n"),
        ("480p-193f", "more than 189"),
        ("481p", "unknown profile"),
        ("480p-2:1", "unknown profile"),
        ("480p-121f,frams=3", "unknown dimension `frams`"),
        ("frames=1:24:48,height=30", "missing \\['width'\\]"),
        ("frames=3:2:1,height=30,width=52", "min <= opt <= max"),
        ("frames=0,height=30,width=52", "1 <= min"),
        ("frames=1:2,height=30,width=52", "neither"),
        ("frames=-1,height=30,width=52", "neither"),
        ("frames=1e9,height=30,width=52", "neither"),
        ("frames=1,frames=2,height=30,width=52", "given twice"),
        ("", "unknown profile"),
        ("480p,", "unknown dimension"),
    ],
)
def test_wrong_profiles(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        parse_profile(text)
    assert caught.value.code == "CX410"


def test_hints() -> None:
    with pytest.raises(UserError) as caught:
        parse_profile("policy-droyd")
    assert caught.value.hint == "did you mean `policy-droid`?"
    with pytest.raises(UserError) as caught:
        parse_profile("480p-120f")
    assert "117" in caught.value.hint and "121" in caught.value.hint


def test_profile_needs_every_dimension() -> None:
    with pytest.raises(UserError, match="missing"):
        Profile("partial", {"frames": DimRange(1, 1, 1)})


@pytest.mark.parametrize(("pixels", "latents"), [(1, 1), (5, 2), (17, 5), (121, 31), (189, 48)])
def test_latent_frames(pixels: int, latents: int) -> None:
    assert pixel_to_latent_frames(pixels) == latents


def test_limits() -> None:
    nano = ModelLimits(max_position=262_144, max_frames=48)
    check_limits(parse_profile("720p-189f+sound"), nano)
    edge = ModelLimits(max_position=131_072, max_frames=38, max_width=52, sound=False)
    with pytest.raises(UserError) as caught:
        check_limits(parse_profile("720p-189f+sound"), edge)
    assert caught.value.code == "CX411"
    message = caught.value.message
    assert "`frames` reaches 48, allowed 38" in message and "`width` reaches 80, allowed 52" in message
    assert "`sound_len` reaches 197, allowed 0 (no sound is generated)" in message
    with pytest.raises(UserError, match="`und_len` reaches 5000, allowed 4096"):
        check_limits(parse_profile("480p,und_len=1:512:5000"), nano)
    with pytest.raises(UserError, match="reach position 19144, allowed 16000"):
        check_limits(parse_profile("480p"), ModelLimits(max_position=16_000))
    # Where generation begins beyond what is stated of the reasoner, that is a limit of the prompt.
    check_limits(parse_profile("480p"), ModelLimits(max_position=4096))
    with pytest.raises(UserError, match="`und_len` reaches position 4096, allowed 4000"):
        check_limits(parse_profile("480p"), ModelLimits(max_position=4000))
    with pytest.raises(UserError, match="no action"):
        check_limits(parse_profile("policy-droid"), ModelLimits(max_position=262_144, action=False))


def test_input_shapes_keep_order_and_static_inputs() -> None:
    spec = {"latents": (1, 48, "frames", "height", "width"), "table": (35, 64), "und_k": (1, "und_len", 64)}
    shapes = input_shapes(parse_profile("policy-droid"), spec)
    assert list(shapes) == list(spec)
    assert shapes["latents"] == ((1, 48, 9, 33, 40),) * 3
    assert shapes["table"] == ((35, 64),) * 3
    assert shapes["und_k"] == ((1, 1, 64), (1, 132, 64), (1, 4096, 64))


@pytest.mark.parametrize(
    "expression",
    [
        "frames**2",
        "frames/2",
        "__import__('os').getpid()",
        "frames.real",
        "(lambda: 1)()",
        "[1][0]",
        "depth",
        "1.5",
        "True",
        "frames if frames else 1",
        "frames//(height-height)",
        "frames-100",
        "",
        "(" * 500 + "1" + ")" * 500,
        "frames and 1",
    ],
)
def test_only_arithmetic_is_evaluated(expression: str) -> None:
    with pytest.raises(InternalError) as caught:
        evaluate_dim(expression, {"frames": 3, "height": 2})
    assert caught.value.code == "CX412"


def test_expressions_round_down() -> None:
    assert evaluate_dim("-(-frames//2)", {"frames": 3}) == 2
    assert evaluate_dim("2*(frames+1)//4-1", {"frames": 3}) == 1


def test_a_shape_that_shrinks_is_an_error() -> None:
    with pytest.raises(InternalError, match="shrinks"):
        input_shapes(parse_profile("256p"), {"x": ("100-frames",)})
