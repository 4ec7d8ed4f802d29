"""The micro world's checks: right on true clips, wrong on each planted fault, and intervals as SciPy has them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from benchmarks.microworld import checks, evaluate, world

SAMPLES = 34_560


def _truth(request: evaluate.Request) -> evaluate.Generated:
    return evaluate.Generated(
        world.render(request.clip), world.click_track(request.clip, SAMPLES), request.clip.actions
    )


@pytest.mark.parametrize("mode", [mode for mode in evaluate.MODES if mode not in ("reasoner", "codec")])
def test_true_clips_pass(mode: str) -> None:
    results = [evaluate.score(request, _truth(request)) for request in evaluate.requests(mode, 16)]
    assert checks.pooled([found for found, _ in results]).share >= 0.99
    for _, figures in results:
        assert all(value < 0.25 for value in figures.values())


def _scene(**facts: object) -> tuple[world.Combination, world.Clip]:
    what = replace(world.Combination("red", "ring", "left", "fast", True), **facts)  # type: ignore[arg-type]
    return what, world.scene(what, np.random.default_rng(4))


def _failed(what: world.Combination, frames: np.ndarray) -> set[str]:
    return {name for name, right in checks.scene_checks(what, checks.observe(frames)).items() if not right}


@pytest.mark.parametrize(
    ("fault", "expected"),
    [
        ({"colour": "yellow"}, {"colour"}),
        ({"shape": "box"}, {"shape"}),
        ({"direction": "up"}, {"direction"}),
        ({"speed": "slowly"}, {"speed"}),
        ({"bounces": False}, {"bounce"}),
    ],
)
def test_a_clip_of_something_else_fails_where_it_differs(fault: dict[str, object], expected: set[str]) -> None:
    what, _ = _scene()
    _, other = _scene(**fault)
    assert _failed(what, world.render(other)) == expected


def test_faults_of_pixels_are_seen() -> None:
    what, clip = _scene()
    frames = world.render(clip)
    vanished = frames.copy()
    vanished[7:10] = world.GROUND
    assert {"visible", "rigid"} <= _failed(what, vanished)
    squeezed = frames.copy()
    squeezed[:, ::2] = world.GROUND
    assert "rigid" in _failed(what, squeezed)
    assert {"direction"} <= _failed(what, frames[:, :, ::-1])
    noise = np.random.default_rng(0).integers(0, 256, frames.shape).astype(np.uint8)
    assert {"visible", "rigid"} <= _failed(what, noise)
    assert {"visible", "rigid", "bounce"} <= _failed(what, np.full_like(frames, world.GROUND[0]))


def test_a_path_beside_the_true_one_is_measured() -> None:
    _, clip = _scene()
    seen = checks.observe(world.render(replace(clip, centres=clip.centres + np.array([0.0, 3.0]))))
    assert checks.position_error(seen, clip.centres) == pytest.approx(3, abs=0.1)


@pytest.mark.parametrize(
    ("spoil", "expected"),
    [
        (lambda track: np.zeros_like(track), {"click", "click at the bounce"}),
        (lambda track: np.roll(track, 4800, axis=1), {"click at the bounce"}),
    ],
)
def test_a_missing_and_a_late_click_are_heard(spoil: Callable[[np.ndarray], np.ndarray], expected: set[str]) -> None:
    what, clip = _scene()
    seen = checks.observe(world.render(clip))
    found = checks.click_checks(what, seen, spoil(world.click_track(clip, SAMPLES)))
    assert {name for name, right in found.items() if not right} == expected
    silent, still = _scene(bounces=False)
    heard = checks.click_checks(silent, checks.observe(world.render(still)), world.click_track(clip, SAMPLES))
    assert heard == {"click": False}


def test_wrong_actions_fail() -> None:
    for mode, check in (("inverse dynamics", None), ("policy", "goal")):
        results = []
        for request in evaluate.requests(mode, 20):
            made = replace(_truth(request), actions=-np.asarray(request.clip.actions))
            found, _ = evaluate.score(request, made)
            results.append(found if check is None else {check: found[check]})
        assert checks.pooled(results).share < 0.6


def test_another_caption_scores_at_chance() -> None:
    asked = evaluate.requests("t2v", 80, held_out=False)
    results = []
    for request, other in zip(asked, asked[1:] + asked[:1], strict=True):
        results.append(evaluate.score(request, _truth(replace(other)))[0])
    shares = checks.table(results)
    for name, chance in (("colour", 1 / 4), ("shape", 1 / 2), ("direction", 1 / 4), ("speed", 1 / 2)):
        assert abs(shares[name].share - chance) < 0.2, name


def test_intervals_are_scipys() -> None:
    stats = pytest.importorskip("scipy.stats")
    for right, count in ((0, 12), (7, 20), (399, 400), (5, 5)):
        share = checks.wilson(right, count)
        expected = stats.binomtest(right, count).proportion_ci(0.95, method="wilson")
        assert (share.low, share.high) == pytest.approx((expected.low, expected.high), abs=1e-6)


def test_the_pooled_interval_counts_clips_not_checks() -> None:
    """Ten checks that fail together are one observation."""
    together = [{str(index): clip % 4 != 0 for index in range(10)} for clip in range(40)]
    alone = [{"0": clip % 4 != 0} for clip in range(40)]
    wide, same = checks.pooled(together), checks.pooled(alone)
    assert (wide.low, wide.high) == (same.low, same.high)
    assert wide.high - wide.low > 2 * (checks.wilson(300, 400).high - checks.wilson(300, 400).low)
