"""The micro world's renderer: the same clips from the same seed, and facts that a second computation finds too."""

from __future__ import annotations

import hashlib
from itertools import combinations

import numpy as np
import pytest

from benchmarks.microworld import sound, world


def _clips(count: int, held_out: bool = False) -> list[world.Clip]:
    random = np.random.default_rng(5)
    return [world.sample(random, "scene" if index % 2 else "push", held_out) for index in range(count)]


def test_clips_follow_from_the_seed() -> None:
    digest = hashlib.sha256()
    for clip in _clips(20):
        digest.update(clip.caption.encode())
        digest.update(world.render(clip).tobytes())
        digest.update(np.round(world.click_track(clip, 34_560) * 1000).astype(np.int16).tobytes())
        digest.update(b"" if clip.actions is None else np.round(clip.actions * 1e6).astype(np.int64).tobytes())
    assert digest.hexdigest()[:16] == "a64ce1f1d416421d"


@pytest.mark.parametrize("held_out", [False, True])
def test_motion_is_that_of_a_simulation(held_out: bool) -> None:
    """Position and velocity, one frame after the other, instead of the closed form."""
    for clip in _clips(200, held_out):
        position, turned = clip.centres[0].copy(), None
        assert clip.what.held_out == held_out
        if isinstance(clip.what, world.Combination):
            velocity = np.array(world.DIRECTIONS[clip.what.direction]) * float(world.SPEEDS[clip.what.speed])
            axis = int(np.flatnonzero(velocity)[0])
            for frame in range(1, world.FRAMES):
                position = position + velocity
                if position[axis] in (world.LOW, world.HIGH):
                    velocity, turned = -velocity, frame
                assert np.allclose(position, clip.centres[frame])
            assert turned == clip.bounce_frame
            assert (turned is not None) == clip.what.bounces and (turned is None or 5 <= turned <= 11)
        else:
            assert clip.actions is not None
            for frame, action in enumerate(clip.actions, start=1):
                position = np.minimum(np.maximum(position + 2 * action, 10), 54)
                assert np.allclose(position, clip.centres[frame])


def test_pixels_are_where_the_facts_say() -> None:
    """Edges of the painted area, found by comparing pixels with the ground, lie half a shape from the centre."""
    for clip in _clips(40):
        for frame, (x, y) in zip(world.render(clip), clip.centres, strict=True):
            painted = np.abs(frame.astype(int) - world.GROUND).max(-1) > 60
            rows, columns = np.flatnonzero(painted.any(1)), np.flatnonzero(painted.any(0))
            edges = np.array([columns[0], columns[-1] + 1, rows[0], rows[-1] + 1])
            assert np.abs(edges - [x - 8, x + 8, y - 8, y + 8]).max() <= 1
            assert painted[int(y), int(x)] == (clip.what.shape == "box")


def test_held_out_combinations_leave_every_pair_in_training() -> None:
    assert sum(what.held_out for what in world.COMBINATIONS) == 16 == len(world.COMBINATIONS) // 8
    assert sum(task.held_out for task in world.TASKS) == 4
    names = ("colour", "shape", "direction", "speed", "bounces")
    trained = [what for what in world.COMBINATIONS if not what.held_out]
    for first, second in combinations(names, 2):
        wanted = {(getattr(what, first), getattr(what, second)) for what in world.COMBINATIONS}
        assert {(getattr(what, first), getattr(what, second)) for what in trained} == wanted
    captions = [what.caption for what in (*world.COMBINATIONS, *world.TASKS)]
    assert len(set(captions)) == len(captions)


def test_full_pushes_reach_their_goal_and_others_do_not() -> None:
    random = np.random.default_rng(1)
    for task in world.TASKS:
        clip = world.push(task, random)
        if task.goal is not None:
            assert clip.actions is not None and world.reached(task.goal, clip.centres)
            assert not world.reached(task.goal, world.execute(clip.centres[0], np.zeros((16, 2)))) or (
                task.goal == "centre" and np.hypot(*(clip.centres[0] - world.CENTRE)) <= 3
            )


def test_a_click_is_at_the_bounce_and_louder_on_its_side() -> None:
    sides = set()
    for clip in _clips(100):
        track = world.click_track(clip, 34_560)
        if clip.bounce_frame is None:
            assert not track.any() and not sound.latents(clip).any()
            continue
        begin = int(np.flatnonzero(np.abs(track).max(0) > 0.01)[0])
        assert abs(begin / 48_000 - clip.bounce_frame / 24) <= 0.021
        assert int(sound.latents(clip)[0].argmax()) == (begin + 2) // 1920
        left, right = np.abs(track).max(1)
        assert isinstance(clip.what, world.Combination)
        sides.add(clip.what.direction)
        assert (left > right, left < right) == (clip.what.direction == "left", clip.what.direction == "right")
    assert sides == set(world.DIRECTIONS)
