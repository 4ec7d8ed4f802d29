"""Which cameras of a data set the model is shown: those of the embodiment, or those that are named, and never depth."""

from __future__ import annotations

import glob
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cosmos_export.bundle.embodiment import Embodiment
from cosmos_export.calibration.lerobot_files import refuse
from cosmos_export.diagnostics import shown


def choose_cameras(
    root: Path, info: Mapping[str, Any], robot: Embodiment, asked: Sequence[str] | None
) -> tuple[tuple[str, ...], list[str]]:
    """The cameras that are shown, one or in the order in which the views of ``robot`` compose them, and notes on those
    that are not. CX342: one has no video, is a depth map, or the composition lacks one."""
    pictures, depth = _pictures(root, info)
    cameras = [name for name in pictures if name not in depth]
    if not cameras:
        refuse(root, f"no feature is a picture; depth maps: {', '.join(depth)}" if depth else "no feature is a video")
    present = [camera for camera in cameras if any((root / "videos").rglob(f"{glob.escape(camera)}/**/*.mp4"))]
    if asked is None and not present:
        refuse(root, f"no video of any camera: {', '.join(cameras)}", "download videos/ too (git lfs pull)")
    chosen = _by_views(root, robot, present) if asked is None else _asked(root, robot, asked, cameras, depth, present)
    missing = [name for name in cameras if name not in present]
    notes = [f"no video of {', '.join(missing)}; {' and '.join(chosen)} is shown"] if missing and not asked else []
    others = [name for name in present if name not in chosen]
    if others:
        verb, way = ("are", "cameras=… chooses others") if len(chosen) > 1 else ("is", "camera=… chooses another")
        notes.append(f"of the cameras {', '.join(chosen)} {verb} shown, and not {', '.join(others)}: {way}")
    if depth:
        notes.append(f"depth maps are not shown: {', '.join(depth)}")
    return chosen, notes


def _pictures(root: Path, info: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """The names of all pictures, and of the depth maps among them."""
    features = info.get("features")
    if not isinstance(features, dict):
        refuse(root, "meta/info.json has no features")
    found = {k: v for k, v in features.items() if isinstance(v, dict) and v.get("dtype") in ("video", "image")}
    for name in found:
        if not name.isprintable() or "/" in name or name in ("", ".", "..") or len(name) > 200:
            refuse(root, f"{shown(name)} in meta/info.json is not a name of a camera")
    return sorted(found), sorted(name for name, feature in found.items() if _is_depth(name, feature))


def _by_views(root: Path, robot: Embodiment, present: Sequence[str]) -> tuple[str, ...]:
    """The cameras of ``robot``'s views; the first there is where it has none."""
    views = robot.views
    if not views.cameras:
        return (present[0],)
    found = {camera: [name for name in present if _is_called(name, camera)] for camera in views.cameras}
    if any(len(names) != 1 for names in found.values()):
        missing = ", ".join(camera for camera, names in found.items() if len(names) != 1)
        order = ",".join(views.short or views.cameras)
        refuse(
            root,
            f"`{robot.name}` is shown {' and '.join(views.cameras)} in one picture ({views.layout}); there is no video "
            f"of {missing}; videos are of {', '.join(present)}",
            f"cameras=… names them in the order {order}; camera=… names one that has the whole picture",
        )
    return tuple(names[0] for names in found.values())


def _asked(
    root: Path,
    robot: Embodiment,
    asked: Sequence[str],
    cameras: Sequence[str],
    depth: Sequence[str],
    present: Sequence[str],
) -> tuple[str, ...]:
    views = robot.views
    if len(asked) > 1 and len(asked) != len(views.cameras):
        wanted = f"one camera, or {len(views.cameras)} ({views.layout})" if views.cameras else "one camera"
        refuse(root, f"cameras={','.join(asked)}: `{robot.name}` is shown {wanted}", "camera=… names one")
    full = dict(zip(views.short, views.cameras, strict=False))
    chosen = tuple(_named(root, one, full.get(one, one), cameras, depth, present) for one in asked)
    for name in chosen:
        if name not in present:
            refuse(root, f"no video of {name}; videos there are of {', '.join(present) or 'none'}")
    return chosen


def _named(
    root: Path, asked: str, full: str, cameras: Sequence[str], depth: Sequence[str], present: Sequence[str]
) -> str:
    """The camera that is ``asked`` for by its name, the end of it, or a short name that stands for ``full``; one that
    has a video before others."""
    ways = ((present, asked), (present, full), ((*cameras, *depth), asked))
    matching = next((found for names, word in ways if (found := [n for n in names if _is_called(n, word)])), [])
    if len(matching) != 1:
        refuse(root, f"no camera {shown(asked)}; cameras: {', '.join(cameras)}")
    if matching[0] in depth:
        refuse(root, f"{matching[0]} is a depth map, which is no picture; cameras: {', '.join(cameras)}")
    return matching[0]


def _is_called(name: str, word: str) -> bool:
    return name == word or name.endswith((f".{word}", f"/{word}"))


def _is_depth(name: str, feature: Mapping[str, Any]) -> bool:
    """Whether a feature is a depth map, by what it says, or by its name where it says nothing."""
    places = [place for key in ("info", "video_info") if isinstance(place := feature.get(key), dict)]
    for place in (feature, *places):
        for key in ("is_depth_map", "video.is_depth_map"):
            if isinstance(place.get(key), bool):
                return bool(place[key])
    return "depth" in name.rpartition(".")[2].lower()
