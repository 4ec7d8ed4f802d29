"""An option is one field of a record with one docstring. The API, the command line, its help and the reference page
are made from these.

A field without a docstring has that of the first record of the same module that has one for its name. How an option is
written on the command line, if not as ``--field-name``, is in its type (`Cli`).
"""

from __future__ import annotations

import ast
import inspect
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass
from functools import cache
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

Reading = Literal["value", "commas", "repeated", "pair", "named"]
"""How the command line reads a list: several with commas in one value, an option that is repeated, ``A:B``, or an
option that is given once with a file, or repeated with ``NAME=FILE``."""


class Cli:
    """How an option is written on the command line; stands in the ``Annotated`` type of its field."""

    def __init__(
        self,
        *flags: str,
        metavar: str | None = None,
        names: str | None = None,
        reads: Reading = "value",
        group: str = "Options",
        argument: bool = False,
        shown_default: str | None = None,
        hidden: bool = False,
        scale: int | None = None,
        manifest: str | None = None,
    ) -> None:
        """``flags``: other spellings than ``--field-name``. ``names``: the registry that has its values
        (`cosmos_export.cli.choices`), for help and completion. ``group``: heading of the help. ``argument``: it is
        positional. ``shown_default``: what help says in place of the field's default. ``hidden``: the
        command line decides it by other options. ``scale``: how many units of the field are one on the command line.
        ``manifest``: the field of a bundle's manifest that has it; ``options`` is the entry of its own name there, and
        None an option that changes nothing in the bundle."""
        self.hidden, self.scale, self.manifest = hidden, scale, manifest
        self.flags, self.metavar, self.names, self.reads = flags, metavar, names, reads
        self.group, self.argument, self.shown_default = group, argument, shown_default


@dataclass(frozen=True)
class Option:
    """One field of a record of options."""

    name: str
    kind: Any
    """Its type."""
    default: Any
    """`dataclasses.MISSING` where it must be given."""
    text: str
    """Its docstring on one line."""
    cli: Cli

    @property
    def flags(self) -> tuple[str, ...]:
        return self.cli.flags or (f"--{self.name.replace('_', '-')}",)

    @property
    def choices(self) -> tuple[str, ...]:
        """Allowed values where the type lists them."""
        kinds = [self.kind, *get_args(self.kind)]
        return next((get_args(kind) for kind in kinds if get_origin(kind) is Literal), ())

    @property
    def record(self) -> type | None:
        """The record whose options these are, where the field is no option itself."""
        return self.kind if isinstance(self.kind, type) and is_dataclass(self.kind) else None


@cache
def described(record: type) -> tuple[Option, ...]:
    """The options of ``record``, a dataclass, in the order of their fields."""
    hints, documented = get_type_hints(record, include_extras=True), docstrings(record.__module__)
    own = documented.get(record.__name__, {})
    shared = {name: text for texts in reversed(list(documented.values())) for name, text in texts.items()}
    found = []
    for one in fields(record):
        hint = hints[one.name]
        annotated = get_origin(hint) is Annotated
        kind, cli = get_args(hint)[:2] if annotated else (hint, Cli())
        found.append(Option(one.name, kind, one.default, own.get(one.name) or shared.get(one.name, ""), cli))
    return tuple(found)


def flat(record: type) -> Iterator[Option]:
    """The options of ``record`` that the command line has, with those of the records in it."""
    for option in described(record):
        if option.record is not None:
            yield from flat(option.record)
        elif not option.cli.hidden:
            yield option


@cache
def docstrings(module: str) -> Mapping[str, Mapping[str, str]]:
    """Class → field → docstring, on one line, of every class in the source of ``module``."""
    found: dict[str, dict[str, str]] = {}
    for node in ast.parse(inspect.getsource(sys.modules[module])).body:
        if not isinstance(node, ast.ClassDef):
            continue
        texts = found.setdefault(node.name, {})
        for before, after in zip(node.body, node.body[1:], strict=False):
            text = after.value if isinstance(after, ast.Expr) else None
            if isinstance(before, ast.AnnAssign) and isinstance(text, ast.Constant) and isinstance(text.value, str):
                texts[ast.unparse(before.target)] = " ".join(text.value.split())
    return found
