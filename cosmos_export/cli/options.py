"""Options of a verb from the record that it takes (`cosmos_export.options`): one field is one option."""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

import typer

from cosmos_export.arguments import whole
from cosmos_export.cli import choices
from cosmos_export.diagnostics import UserError
from cosmos_export.option_fields import Option, described

Options = TypeVar("Options")


def parameter(option: Option) -> inspect.Parameter:
    """``option`` as a parameter of the function that typer calls."""
    cli = option.cli
    required = option.default is dataclasses.MISSING
    default = None if required or isinstance(option.default, tuple) else option.default
    if cli.scale is not None and default is not None:
        default //= cli.scale
    text = option.text if cli.shown_default is None else f"{option.text} Default: {cli.shown_default}."
    settings: dict[str, Any] = {"help": text, "metavar": cli.metavar}
    if cli.shown_default is not None or cli.argument or required:
        settings["show_default"] = False
    if cli.names is not None:
        settings["autocompletion"] = choices.completion(cli.names, cli.reads == "commas")
    kind = _type(option)
    info = typer.Argument(**settings) if cli.argument else typer.Option(*option.flags, **settings)
    return inspect.Parameter(
        option.name,
        inspect.Parameter.KEYWORD_ONLY,
        default=inspect.Parameter.empty if required else default,
        annotation=Annotated[kind if required else kind | None, info],
    )


def made(record: type[Options], values: Mapping[str, Any]) -> Options:
    """The record of what the command line gave; what is None has the field's default."""
    found: dict[str, Any] = {}
    fields: type = record
    for option in described(fields):
        if option.record is not None:
            found[option.name] = made(option.record, values)
        elif not option.cli.hidden and (value := _read(option, values[option.name])) is not None:
            found[option.name] = value
    return record(**found)


def _read(option: Option, value: Any) -> Any:
    if value is None or value == []:
        return None
    if option.cli.scale is not None:
        return value * option.cli.scale
    if option.cli.reads == "value":
        return value
    if option.cli.reads == "repeated":
        return tuple(value)
    if option.cli.reads == "named":
        return named_files(option.flags[0], value)
    if option.cli.reads == "commas":
        return tuple(part.strip() for part in value.split(",") if part.strip())
    return _PAIRS[option.name](value)


def _type(option: Option) -> Any:
    """The type that the command line reads."""
    if option.choices:
        return Literal[option.choices]
    if option.cli.reads == "named":
        return list[str]
    if option.cli.reads == "repeated":
        return list[Path] if option.kind == tuple[Path, ...] else list[str]
    if option.cli.reads in ("commas", "pair"):
        return str
    kinds = (option.kind, *get_args(option.kind))
    return next(kind for kind in (Path, bool, int, float, str) if kind in kinds)


def interval(text: str) -> tuple[float, float]:
    """``LOW:HIGH`` as two numbers; CX463 for anything else."""
    try:
        low, high = (float(part) for part in text.split(":"))
    except ValueError as error:
        raise UserError("CX463", f"guidance interval `{text}` is not LOW:HIGH", "for example 400:1000") from error
    return low, high


_NAMED = re.compile(r"([A-Za-z]\w*)=(.+)", re.DOTALL)


def named_files(flag: str, values: Sequence[str]) -> Path | dict[str, Path]:
    """``FILE``, or files by name of ``NAME=FILE`` items; CX604 for both, or for a name or a file that comes twice."""
    found: dict[str, Path] = {}
    for value in values:
        match = None if Path(value).exists() else _NAMED.fullmatch(value)
        if match is None and len(values) == 1:
            return Path(value)
        if match is None:
            raise UserError("CX604", f"{flag} {value} beside others has no name", f"{flag} NAME=FILE for each")
        if match[1] in found:
            raise UserError("CX604", f"{flag} {match[1]}=… is given twice", "each name once")
        found[match[1]] = Path(match[2])
    return found


def tokens(text: str) -> tuple[int, int]:
    """``N`` or ``N:NEGATIVE`` as two numbers of tokens above 0; CX481 for anything else."""
    numbers = [whole(number) for number in text.split(":")]
    first, last = numbers[0], numbers[-1]
    if len(numbers) > 2 or not first or not last:
        raise UserError("CX481", f"prompt tokens `{text}` are neither N nor N:NEGATIVE", "for example 512 or 1615:2863")
    return first, last


_PAIRS: Mapping[str, Callable[[str], Any]] = {"guidance_interval": interval, "prompt_tokens": tokens}
