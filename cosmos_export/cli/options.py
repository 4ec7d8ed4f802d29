"""Options of a verb from the record that it makes (`cosmos_export.options`): one field is one option."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

import typer

from cosmos_export.cli import choices
from cosmos_export.diagnostics import UserError
from cosmos_export.option_fields import Option, described

Verb = TypeVar("Verb", bound=Callable[..., Any])
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]
"""The option of every verb that prints data."""


def takes(record: type, **groups: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Make the fields of ``record`` options of a verb whose first parameter, ``options``, is the record.

    The verb's other parameters are options of its own; ``groups`` are headings of the help for some of those, by name.
    """
    given = list(_flat(record))

    def decorate(verb: Callable[..., Any]) -> Callable[..., Any]:
        own = list(inspect.signature(verb, eval_str=True).parameters.values())[1:]

        @functools.wraps(verb)
        def run(**values: Any) -> None:
            verb(_record(record, values), **{one.name: values[one.name] for one in own})

        parameters = [_parameter(option) for option in given]
        parameters += [one.replace(kind=inspect.Parameter.KEYWORD_ONLY) for one in own]
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {one.name: one.annotation for one in parameters}
        run.groups = {option.name: option.cli.group for option in given} | groups  # type: ignore[attr-defined]
        run.names = {o.name: o.cli.names for o in given if o.cli.names is not None}  # type: ignore[attr-defined]
        return run

    return decorate


def grouped(**groups: str) -> Callable[[Verb], Verb]:
    """Headings of the help for options of a verb, by parameter."""

    def decorate(verb: Verb) -> Verb:
        verb.groups = groups  # type: ignore[attr-defined]
        return verb

    return decorate


def _flat(record: type) -> Iterator[Option]:
    for option in described(record):
        if dataclasses.is_dataclass(option.kind):
            yield from _flat(option.kind)  # type: ignore[arg-type]
        elif not option.cli.hidden:
            yield option


def _record(record: type, values: Mapping[str, Any]) -> Any:
    """The record of what the command line gave; what is None has the field's default."""
    found = {}
    for option in described(record):
        if dataclasses.is_dataclass(option.kind):
            found[option.name] = _record(option.kind, values)  # type: ignore[arg-type]
        elif not option.cli.hidden and (value := _read(option, values[option.name])) is not None:
            found[option.name] = value
    return record(**found)


def _read(option: Option, value: Any) -> Any:
    if value is None or value == [] or option.cli.reads == "value":
        return None if value == [] else value
    if option.cli.reads == "repeated":
        return tuple(value)
    if option.cli.reads == "commas":
        return tuple(part.strip() for part in value.split(",") if part.strip())
    return _PAIRS[option.name](value)


def _parameter(option: Option) -> inspect.Parameter:
    cli = option.cli
    required = option.default is dataclasses.MISSING
    default = None if required or isinstance(option.default, tuple) else option.default
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


def _type(option: Option) -> Any:
    """The type that the command line reads."""
    if option.choices:
        return Literal[option.choices]
    if option.cli.reads == "repeated":
        return list[str]
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


def tokens(text: str) -> tuple[int, int]:
    """``N`` or ``N:NEGATIVE`` as two numbers of tokens; CX481 for anything else."""
    numbers = text.split(":")
    if len(numbers) > 2 or not all(number.isdecimal() for number in numbers):
        raise UserError("CX481", f"prompt tokens `{text}` are neither N nor N:NEGATIVE", "for example 512 or 1615:2863")
    return int(numbers[0]), int(numbers[-1])


_PAIRS: Mapping[str, Callable[[str], Any]] = {"guidance_interval": interval, "prompt_tokens": tokens}
