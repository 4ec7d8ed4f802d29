"""Which consecutive pieces of a model become one engine, where memory does not allow one engine for all of it."""

from __future__ import annotations

from collections.abc import Sequence


def partition(sizes: Sequence[float], costs: Sequence[float], limit: float) -> list[int]:
    """Where to cut a row of pieces so that none of the runs between cuts is larger than ``limit``.

    ``sizes``: of each piece. ``costs``: of the cut before each piece; that before the first is no cut. As few cuts as
    possible, of these the cheapest together, of these those whose largest run is smallest. A piece that is larger than
    ``limit`` by itself is a run, with none but empty ones. Returns the index of the first piece of every run but the
    first, in order.
    """
    best: list[tuple[int, float, float]] = [(0, 0.0, 0.0)]
    previous = [0]
    for end in range(1, len(sizes) + 1):
        options = []
        run = one = 0.0
        for start in range(end - 1, -1, -1):
            run, one = run + sizes[start], max(one, sizes[start])
            if run > max(limit, one):
                break
            runs, cost, largest = best[start]
            options.append(((runs + 1, cost + (costs[start] if start else 0.0), max(largest, run)), start))
        value, start = min(options)
        best.append(value)
        previous.append(start)
    cuts = []
    at = len(sizes)
    while at:
        at = previous[at]
        if at:
            cuts.append(at)
    return cuts[::-1]
