"""``cosmos-export explain``: what an error code means, and the way out."""

from __future__ import annotations

import json
from functools import cache
from importlib.resources import files
from typing import Any

from cosmos_export.cli.verbs import Verbs
from cosmos_export.verb_options import ExplainOptions

DATA = "errors.json"
"""File beside this module, made from the code, with the causes of `causes.toml` (`UPDATE_ERRORS=1 pytest
tests/test_errors.py`)."""


def register(app: Verbs) -> None:
    """Add the verb to ``app``."""

    @app.verb(
        "explain",
        ExplainOptions,
        "cosmos-export explain CX607",
        "cosmos-export explain 607 --json",
    )
    def explain(options: ExplainOptions, as_json: bool) -> None:
        """Explain an error code: its cause, an example, the way out, and what its messages say."""
        from cosmos_export.cli import console

        found = explanation(options.code)
        if as_json:
            console.emit_json("explain", found)
        else:
            console.show(text(found, console.out().width))


@cache
def codes() -> dict[str, Any]:
    """Code → what is known of it."""
    found = json.loads((files(__package__) / DATA).read_text(encoding="utf-8"))
    assert isinstance(found, dict)
    return found


def explanation(code: str) -> dict[str, Any]:
    """The explanation of ``code``, which may lack its letters. UserError CX100 where there is no such code."""
    from difflib import get_close_matches

    from cosmos_export.diagnostics import UserError

    name = code.strip().upper()
    name = name if name.startswith("CX") else f"CX{name}"
    known = codes()
    if name not in known:
        near = get_close_matches(name, known, n=3, cutoff=0.7)
        hint = f"near it: {', '.join(near)}; " if near else ""
        raise UserError("CX100", f"there is no error code `{code}`", f"{hint}docs/errors.md lists all of them")
    return {"code": name, **known[name]}


def text(found: dict[str, Any], width: int) -> str:
    """The explanation in lines of at most ``width`` columns."""
    import textwrap

    status = " or ".join(map(str, found["status"]))
    lines = [f"{found['code']}: {found['kind']} (exit status {status})"]
    for label, name in (("", "cause"), ("Example: ", "example"), ("Way out: ", "way_out")):
        lines += ["", *textwrap.wrap(label + found[name], width, break_on_hyphens=False)]
    for case in found["cases"]:
        if not any(map(str.isalpha, case["message"] + case["hint"])):
            continue  # the words are those of the case
        lines += ["", *textwrap.wrap(f"says: {case['message']}", width, subsequent_indent="      ")]
        if case["hint"]:
            lines += textwrap.wrap(f"hint: {case['hint']}", width, subsequent_indent="      ")
    return "\n".join(lines)
