"""Shape profiles: the range of each dynamic dimension an engine accepts, and the input shapes that follow from it.

A profile speaks in the symbolic dimensions of the program, never in tensors. `input_shapes` turns it into shapes for a
graph whose input dimensions are integers or expressions over those dimensions. Knows no backend.
"""

from __future__ import annotations

import ast
import difflib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from cosmos_export.arguments import whole
from cosmos_export.diagnostics import InternalError, UserError
from cosmos_export.embodiments import EMBODIMENTS
from cosmos_export.sampling.action_canvas import plan_action_canvas

DIMS: Mapping[str, str] = MappingProxyType(
    {
        "und_len": "prompt tokens",
        "frames": "latent frames: (pixel frames − 1)/4 + 1",
        "height": "latent rows: pixels/16",
        "width": "latent columns: pixels/16",
        "sound_len": "sound latents; 0 without sound",
        "action_len": "action rows; 0 without actions",
    }
)
_MAY_BE_ZERO = ("sound_len", "action_len")

Shape = tuple[int, ...]
ShapeRange = tuple[Shape, Shape, Shape]
"""Smallest, optimal and largest shape of one input."""


@dataclass(frozen=True)
class DimRange:
    """Values one dimension may take, and the one to tune for."""

    min: int
    opt: int
    max: int

    def __str__(self) -> str:
        return str(self.min) if self.min == self.max else f"{self.min}:{self.opt}:{self.max}"


@dataclass(frozen=True)
class Profile:
    """Named ranges of all dimensions in `DIMS`."""

    name: str
    dims: Mapping[str, DimRange]

    def __post_init__(self) -> None:
        unknown, missing = sorted(set(self.dims) - set(DIMS)), sorted(set(DIMS) - set(self.dims))
        if unknown or missing:
            raise UserError(
                "CX410", f"profile `{self.name}`: unknown dimensions {unknown}, missing {missing}", _known_dims()
            )
        for dim, span in self.dims.items():
            floor = 0 if dim in _MAY_BE_ZERO else 1
            if not floor <= span.min <= span.opt <= span.max:
                raise UserError(
                    "CX410",
                    f"profile `{self.name}`: `{dim}` = {span.min}:{span.opt}:{span.max} "
                    f"does not satisfy {floor} <= min <= opt <= max",
                )
        object.__setattr__(self, "dims", MappingProxyType({dim: self.dims[dim] for dim in DIMS}))

    def __str__(self) -> str:
        return ",".join(f"{dim}={span}" for dim, span in self.dims.items())

    def points(self) -> tuple[Mapping[str, int], Mapping[str, int], Mapping[str, int]]:
        """Values of all dimensions at the minimum, the optimum and the maximum."""
        return (
            {dim: span.min for dim, span in self.dims.items()},
            {dim: span.opt for dim, span in self.dims.items()},
            {dim: span.max for dim, span in self.dims.items()},
        )


@dataclass(frozen=True)
class ModelLimits:
    """Limits of the requests to a checkpoint. The defaults are the range of the captured graph."""

    max_position: int
    """Rotary positions the model was trained for (``max_position_embeddings``)."""
    temporal_margin: int = 15_000
    """Positions between the prompt and the first frame."""
    max_und_len: int = 4096
    max_frames: int = 4096
    min_grid: int = 3
    """Latent rows and columns: torch.export reasons with patch grids of two and more."""
    max_height: int = 1024
    max_width: int = 1024
    max_rows: int = 65_536
    """Largest number of rows of sound, and of actions."""
    sound: bool = True
    action: bool = True

    @property
    def reaches_generation(self) -> bool:
        """Whether ``max_position`` is of the whole sequence. Below the margin it can be of the prompt alone: nothing
        could be generated, and the published pipeline, which has no such limit, generates."""
        return self.temporal_margin < self.max_position


# ---------------------------------------------------------------------------------------------------------------------
# Names

UND_LEN = DimRange(1, 512, 4096)
"""The official negative prompt has 2,863 tokens; the published pipelines cut prompts at 4,096."""

MAX_PIXEL_FRAMES = 189
SOUND_LATENTS_PER_S = 25
_SOUND_FPS = 24

# Pixel (width, height) of each resolution and aspect ratio, as the published pipelines bin them.
CANVASES: Mapping[str, Mapping[str, tuple[int, int]]] = MappingProxyType(
    {
        "256p": {"16:9": (320, 192), "9:16": (192, 320), "4:3": (320, 256), "3:4": (256, 320), "1:1": (256, 256)},
        "480p": {"16:9": (832, 480), "9:16": (480, 832), "4:3": (736, 544), "3:4": (544, 736), "1:1": (640, 640)},
        "720p": {"16:9": (1280, 720), "9:16": (720, 1280), "4:3": (1104, 832), "3:4": (832, 1104), "1:1": (960, 960)},
    }
)
_NAMED = re.compile(r"(?P<size>\d+p)(?:-(?P<aspect>\d+:\d+))?(?:-(?P<frames>[0-9]{1,9})f)?(?P<sound>\+sound)?")

_ROBOT = re.compile(r"policy-(?P<robot>[a-z0-9_-]+?)(?:-(?P<width>[0-9]{1,9})x(?P<height>[0-9]{1,9}))?")
_TASK_LEN = DimRange(1, 132, 4096)
"""The JSON prompt of a one-sentence task has 132 tokens."""

NAMED_PROFILES: Mapping[str, Mapping[str, DimRange]] = MappingProxyType(
    {
        # 540 × 640 pixels of content (the latents are cropped to it), 33 pixel frames, 32 actions, and one more row
        # when the state is given.
        "policy-droid": {
            "und_len": _TASK_LEN,
            "frames": DimRange(9, 9, 9),
            "height": DimRange(33, 33, 33),
            "width": DimRange(40, 40, 40),
            "sound_len": DimRange(0, 0, 0),
            "action_len": DimRange(32, 33, 33),
        },
    }
)


def parse_profile(text: str) -> Profile:
    """A profile from its name, from ``dim=min:opt:max`` items, or from a name followed by such items.

    ``480p``, ``480p-121f``, ``720p-9:16-189f+sound``, ``policy-droid``, ``policy-umi-640x480`` (a robot and the size of
    its picture), ``480p-121f,und_len=1:900:3000``, ``frames=1:24:48,height=30,width=52``.
    """
    head, *rest = (item.strip() for item in text.split(","))
    items: list[str] = [head, *rest]
    dims: dict[str, DimRange] = {}
    if "=" not in head:
        dims, items = dict(_named(head)), rest
    given = [_item(text, item) for item in items]
    duplicate = [dim for dim, _ in given if [other for other, _ in given].count(dim) > 1]
    if duplicate:
        raise UserError("CX410", f"profile `{text}`: `{duplicate[0]}` is given twice")
    defaults = {"und_len": UND_LEN, "sound_len": DimRange(0, 0, 0), "action_len": DimRange(0, 0, 0)}
    return Profile(text.strip(), defaults | dims | dict(given))


def pixel_to_latent_frames(pixel_frames: int) -> int:
    """Latent frames of a clip: the first pixel frame is one latent, each further four are one."""
    if pixel_frames < 1 or (pixel_frames - 1) % 4:
        near = max(1, (pixel_frames - 1) // 4 * 4 + 1)
        raise UserError(
            "CX410", f"{pixel_frames} pixel frames are not 4·n + 1", f"use {near} or {near + 4}: the codec packs four"
        )
    return (pixel_frames - 1) // 4 + 1


def _named(name: str) -> Mapping[str, DimRange]:
    if name in NAMED_PROFILES:
        return NAMED_PROFILES[name]
    if robot := _robot(name):
        return _of_robot(name, robot)
    match = _NAMED.fullmatch(name)
    other = f"or give ranges: frames=1:24:48,height=30,width=52; {_known_dims()}"
    if match is None or match["size"] not in CANVASES or (match["aspect"] or "16:9") not in CANVASES[match["size"]]:
        known = [*CANVASES, "480p-121f", "480p-9:16-121f", "720p-189f+sound", *NAMED_PROFILES]
        raise UserError(
            "CX410", f"unknown profile `{name}`; examples: {', '.join(known)}", _meant(name, known) or other
        )
    width, height = CANVASES[match["size"]][match["aspect"] or "16:9"]
    last = int(match["frames"] or MAX_PIXEL_FRAMES)
    first = last if match["frames"] else 1
    if last > MAX_PIXEL_FRAMES:
        raise UserError("CX410", f"profile `{name}`: more than {MAX_PIXEL_FRAMES} pixel frames", "give ranges instead")
    frames = DimRange(pixel_to_latent_frames(first), pixel_to_latent_frames(last), pixel_to_latent_frames(last))
    sound = (-(-count * SOUND_LATENTS_PER_S // _SOUND_FPS) if match["sound"] else 0 for count in (first, last, last))
    return {
        "frames": frames,
        "height": DimRange(*(height // 16,) * 3),
        "width": DimRange(*(width // 16,) * 3),
        "sound_len": DimRange(*sound),
    }


def _of_robot(name: str, match: re.Match[str]) -> Mapping[str, DimRange]:
    """The profile of a robot by its usual chunk and tier, for pictures of one size; with room for a row of state."""
    if match["width"] is None:
        raise UserError("CX410", f"profile `{name}` has no size of the robot's picture", f"for example {name}-640x480")
    robot = EMBODIMENTS[match["robot"]]
    canvas = plan_action_canvas(int(match["height"]), int(match["width"]), robot.tier)
    height, width = (max(pixels // 16, 1) for pixels in (canvas.content_height, canvas.content_width))
    latents = pixel_to_latent_frames(robot.chunk + 1)
    return {
        "und_len": _TASK_LEN,
        "frames": DimRange(latents, latents, latents),
        "height": DimRange(height, height, height),
        "width": DimRange(width, width, width),
        "sound_len": DimRange(0, 0, 0),
        "action_len": DimRange(robot.chunk, robot.chunk, robot.chunk + 1),
    }


def _robot(name: str) -> re.Match[str] | None:
    match = _ROBOT.fullmatch(name)
    return match if match is not None and match["robot"] in EMBODIMENTS else None


def is_named(name: str) -> bool:
    """Whether ``name`` is a profile of a robot, whose name begins as a workload's does."""
    return name in NAMED_PROFILES or _robot(name) is not None


def _meant(name: str, known: Sequence[str]) -> str:
    """A hint with the profile that ``name`` means; empty where none is near. Another size is never a spelling of it."""
    size = re.match(r"([0-9]{1,9})(p|k)?\b", name.lower())
    if size is not None:
        sizes = sorted(CANVASES, key=lambda one: int(one.removesuffix("p")))
        lines = int(size[1]) * (540 if size[2] == "k" else 1)
        smaller = [one for one in sizes if int(one.removesuffix("p")) <= lines] or sizes[:1]
        if smaller[-1] != size[0]:
            return f"the sizes are {', '.join(sizes)}; the largest up to it is `{smaller[-1]}`"
        known = [one for one in known if one.startswith(size[0])]
    near = difflib.get_close_matches(name, known, n=1)
    return f"did you mean `{near[0]}`?" if near else ""


def _item(text: str, item: str) -> tuple[str, DimRange]:
    dim, _, value = (part.strip() for part in item.partition("="))
    numbers = value.split(":")
    if dim not in DIMS:
        near = difflib.get_close_matches(dim, DIMS, n=1)
        raise UserError(
            "CX410",
            f"profile `{text}`: unknown dimension `{dim}`",
            f"did you mean `{near[0]}`?" if near else _known_dims(),
        )
    sizes = [size for number in numbers if (size := whole(number)) is not None]
    if len(numbers) not in (1, 3) or len(sizes) != len(numbers):
        raise UserError("CX410", f"profile `{text}`: `{item}` is neither {dim}=N nor {dim}=MIN:OPT:MAX")
    return dim, DimRange(*(sizes if len(sizes) == 3 else sizes * 3))


def _known_dims() -> str:
    return "dimensions: " + "; ".join(f"{dim} ({meaning})" for dim, meaning in DIMS.items())


# ---------------------------------------------------------------------------------------------------------------------
# Limits


def check_limits(profile: Profile, limits: ModelLimits) -> None:
    """Return if the model can serve every shape of ``profile``, else raise one `UserError` listing all violations."""
    allowed = {
        "und_len": limits.max_und_len,
        "frames": limits.max_frames,
        "height": limits.max_height,
        "width": limits.max_width,
        "sound_len": limits.max_rows if limits.sound else 0,
        "action_len": limits.max_rows if limits.action else 0,
    }
    problems = [
        f"`{dim}` reaches {profile.dims[dim].max}, allowed {ceiling}"
        + ("" if ceiling else f" (no {dim.removesuffix('_len')} is generated)")
        for dim, ceiling in allowed.items()
        if profile.dims[dim].max > ceiling
    ]
    problems += [
        f"`{dim}` goes down to {profile.dims[dim].min}, allowed from {limits.min_grid}"
        for dim in ("height", "width")
        if profile.dims[dim].min < limits.min_grid
    ]
    prompt = profile.dims["und_len"].max
    last = prompt + limits.temporal_margin + profile.dims["frames"].max
    if not limits.reaches_generation and prompt > limits.max_position:
        problems.append(f"`und_len` reaches position {prompt}, allowed {limits.max_position}")
    elif limits.reaches_generation and last > limits.max_position:
        problems.append(f"`und_len` and `frames` reach position {last}, allowed {limits.max_position}")
    if problems:
        raise UserError(
            "CX411",
            f"profile `{profile.name}` is outside the model's limits: {'; '.join(problems)}",
            "leave it out of the profile"
            if problems[0].endswith("is generated)")
            else "give another range with an item such as `und_len=1:512:4096`",
        )


# ---------------------------------------------------------------------------------------------------------------------
# Input shapes


def input_shapes(profile: Profile, spec: Mapping[str, Sequence[int | str]]) -> dict[str, ShapeRange]:
    """Smallest, optimal and largest shape of every input in ``spec``, in its order.

    A dimension is an integer or an expression such as ``frames*((height+1)//2)*((width+1)//2)+action_len``.
    """
    low, opt, high = (
        {name: tuple(evaluate_dim(dim, point) for dim in dims) for name, dims in spec.items()}
        for point in profile.points()
    )
    for name in spec:
        if not all(a <= b <= c for a, b, c in zip(low[name], opt[name], high[name], strict=True)):
            raise InternalError(
                "CX412", f"input `{name}` shrinks where profile `{profile.name}` grows: {low[name]}, {high[name]}"
            )
    return {name: (low[name], opt[name], high[name]) for name in spec}


_OPERATORS: Mapping[type[ast.operator], Callable[[int, int], int]] = {
    ast.Add: lambda a, b: a + b,
    ast.Sub: lambda a, b: a - b,
    ast.Mult: lambda a, b: a * b,
    ast.FloorDiv: lambda a, b: a // b,
}


def evaluate_dim(dim: int | str, values: Mapping[str, int]) -> int:
    """The value of a dimension: integers, names in ``values``, ``+ - * //`` and brackets; nothing else is evaluated."""

    def value(node: ast.expr) -> int:
        if isinstance(node, ast.Constant) and type(node.value) is int:
            return node.value
        if isinstance(node, ast.Name) and node.id in values:
            return values[node.id]
        if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
            return _OPERATORS[type(node.op)](value(node.left), value(node.right))
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            return -value(node.operand)
        raise InternalError(
            "CX412", f"dimension `{dim}`: `{ast.unparse(node)}` is neither a name, integer nor + - * //"
        )

    if isinstance(dim, int):
        result = dim
    else:
        try:
            result = value(ast.parse(dim, mode="eval").body)
        except (SyntaxError, ValueError, RecursionError, MemoryError, ZeroDivisionError) as error:
            raise InternalError("CX412", f"dimension `{dim[:200]}` cannot be evaluated: {error}") from error
    if result < 0:
        raise InternalError("CX412", f"dimension `{dim}` is {result} at {dict(values)}")
    return result
