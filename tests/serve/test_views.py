"""Several cameras in one picture: to the bit what torch makes of it, and no camera lost."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from serve_samples import DROID, picture

from cosmos_export.bundle.embodiment import Views, embodiment_problems
from cosmos_export.diagnostics import UserError
from cosmos_export.embodiments import EMBODIMENTS, policy_embodiment
from cosmos_export.runtime.prompts import VIEWPOINTS
from cosmos_export.runtime.views import LAYOUTS, bilinear, compose

SIZES = [
    (360, 640, 180, 320), (270, 320, 540, 640), (480, 640, 180, 320), (224, 224, 180, 320), (100, 33, 540, 640),
    (719, 1279, 180, 320), (7, 9, 5, 4), (1, 1, 4, 4), (2, 2, 1, 1), (5, 5, 5, 5),
]  # fmt: skip


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_interpolation_is_torch_s(sizes: tuple[int, ...]) -> None:
    torch = pytest.importorskip("torch")
    height, width, to_height, to_width = sizes
    source = picture(sum(sizes), height, width)
    planes = torch.from_numpy(source).permute(2, 0, 1)[None].float()
    made = torch.nn.functional.interpolate(planes, size=(to_height, to_width), mode="bilinear", align_corners=False)
    np.testing.assert_array_equal(bilinear(source, to_height, to_width), made[0].permute(1, 2, 0).numpy().astype("u1"))


NAMES = DROID.views.cameras


def three(height: int = 360, width: int = 640) -> dict[str, Any]:
    return {name: picture(i, height, width) for i, name in enumerate(NAMES)}


def test_the_wrist_over_two() -> None:
    """By hand: each pixel below is the mean of four, cut to a whole level."""
    pictures = three()
    found = compose(DROID.views, pictures)
    assert found.shape == (540, 640, 3) and found.dtype == np.uint8
    np.testing.assert_array_equal(found[:360], pictures[NAMES[0]])
    for i, name in enumerate(NAMES[1:]):
        source = pictures[name].astype(int)
        mean = (source[0::2, 0::2] + source[1::2, 0::2] + source[0::2, 1::2] + source[1::2, 1::2]) // 4
        np.testing.assert_array_equal(found[360:, 320 * i : 320 * (i + 1)], mean)


def test_other_sizes_are_resized_and_not_padded() -> None:
    assert compose(DROID.views, three(180, 320)).shape == (540, 640, 3)
    assert compose(DROID.views, {"image": picture(0, 224, 224)}).shape == (540, 640, 3)
    whole = picture(0, 540, 640)
    assert compose(DROID.views, {"image": whole}) is whole
    mixed = three() | {NAMES[1]: picture(8, 480, 640)}
    assert compose(DROID.views, mixed).shape == (540, 640, 3)


@pytest.mark.parametrize(
    ("pictures", "said"),
    [
        ({}, "no picture `wrist_image_left`, `exterior_image_1_left`, `exterior_image_2_left`"),
        (dict(list(three().items())[:2]), "no picture `exterior_image_2_left`"),
        (three() | {"image": picture()}, "is the whole picture, and"),
        (three() | {"extra": picture()}, "`extra` has no place"),
        (three(361), "both are even"),
        (three() | {NAMES[0]: picture()[..., :1]}, "uint8 [height, width, 3]"),
        (three() | {NAMES[0]: picture().astype(np.float32)}, "uint8 [height, width, 3]"),
    ],
)
def test_no_camera_is_lost(pictures: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError) as caught:
        compose(DROID.views, pictures)
    assert caught.value.code == "CX640" and said in f"{caught.value.message} {caught.value.hint}"


def test_side_by_side() -> None:
    """LIBERO: both at 256 × 256, of any size."""
    views = policy_embodiment("libero", width=7).views
    front, wrist = picture(1, 512, 512), picture(2, 256, 256)
    found = compose(views, {"front": front, "wrist": wrist})
    assert found.shape == (256, 512, 3)
    np.testing.assert_array_equal(found[:, 256:], wrist)
    np.testing.assert_array_equal(found[:, :256], bilinear(front, 256, 256))
    assert compose(views, {"composed": found}) is found


def test_one_camera() -> None:
    plain = EMBODIMENTS["bridge_orig_lerobot"].views
    one = picture()
    assert compose(plain, {"image": one}) is one
    with pytest.raises(UserError, match="no picture `image`"):
        compose(plain, {})


def test_rows_of_data() -> None:
    """What each row names is there, and a policy of another width has no row."""
    rows = [*EMBODIMENTS.values(), DROID]
    for robot in rows:
        views = robot.views
        assert bool(views.cameras) == (views.layout in LAYOUTS)
        assert views.viewpoint is None or views.viewpoint in VIEWPOINTS
        assert not list(embodiment_problems((robot,), 64, 32)), robot
    assert policy_embodiment("droid_lerobot", width=10).views == Views()
    assert DROID.mirrored == (7,)
    assert VIEWPOINTS["wrist_over_two_view"].startswith(VIEWPOINTS["concat_view"] + " The top row")
