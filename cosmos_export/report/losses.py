"""Losses by quantization, as a page: a map of layers and modules, and the steps."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

_STYLE = """
body { font: 14px/1.4 system-ui, sans-serif; margin: 2em auto; max-width: 72em; color: #1b1b1b; background: #fff; }
table { border-collapse: collapse; margin: 1em 0; }
th, td { border: 1px solid #d0d0d0; padding: .25em .6em; text-align: right; font-variant-numeric: tabular-nums; }
th { background: #f3f3f3; font-weight: 600; }
th:first-child, td:first-child { text-align: left; }
.over { outline: 2px solid #b00020; outline-offset: -2px; }
caption { text-align: left; font-weight: 600; padding: .3em 0; }
"""


def loss_page(document: Mapping[str, Any]) -> str:
    """The report of a build (`report/quantization.json`) as HTML without scripts and without anything from outside.

    A cell is the relative error of one linear, and its colour how much of what its scheme may lose that is.
    """
    recipe = escape(str(document["recipe"]))
    overrides = "".join(f" <code>--set {escape(str(one))}</code>" for one in document["overrides"])
    tables = "".join(_tower(tower, document["linears"]) for tower in ("gen", "und"))
    problems = "".join(f"<li>{escape(str(one))}</li>" for one in document["problems"])
    return (
        f'<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n<title>Quantization: {recipe}</title>\n'
        f"<style>{_STYLE}</style>\n<h1>Quantization: {recipe}{overrides}</h1>\n"
        f"<p>Measured on {escape(str(document['measured_on']))}.</p>\n{tables}{_steps(document)}{_ends(document)}"
        + (f"<h2>Beyond the limits</h2>\n<ul>{problems}</ul>\n" if problems else "")
        + "</html>\n"
    )


def _tower(tower: str, linears: list[Mapping[str, Any]]) -> str:
    """Layers down, modules across; a module with several schemes over the steps has a column for each."""
    own = [one for one in linears if one["tower"] == tower]
    if not own:
        return ""
    columns = list(dict.fromkeys((one["kind"], one["scheme"]) for one in own))
    cells = {(one["layer"], one["kind"], one["scheme"]): one for one in own}
    head = "".join(f"<th>{escape(kind)}<br>{escape(scheme)}</th>" for kind, scheme in columns)
    rows = "".join(
        f"<tr><th>{layer}</th>" + "".join(_cell(cells.get((layer, *column))) for column in columns) + "</tr>\n"
        for layer in sorted({one["layer"] for one in own})
    )
    title = {"gen": "Generator", "und": "Reasoner"}[tower]
    caption = f"<caption>{title}: relative error of each linear</caption>"
    return f"<table>\n{caption}\n<tr><th>layer</th>{head}</tr>\n{rows}</table>\n"


def _cell(loss: Mapping[str, Any] | None) -> str:
    if loss is None:
        return "<td></td>"
    lost, decibels = loss["relative"], loss["sqnr_db"]
    share = 1.0 if lost is None else min(lost / loss["limit"], 1.0)
    # From white to red: the limit is full colour.
    colour = f"hsl(8 80% {97 - 42 * share:.0f}%)"
    over = "" if loss["passed"] else ' class="over"'
    ratio = "exact" if lost == 0 else f"SQNR {'−∞' if decibels is None else decibels} dB"
    hint = f"{ratio}, allowed {loss['limit']:.4f}"
    return f'<td{over} style="background:{colour}" title="{hint}">{_number(lost, 4)}</td>'


def _number(value: float | None, digits: int) -> str:
    return "∞" if value is None else f"{value:.{digits}f}"


def _steps(document: Mapping[str, Any]) -> str:
    limits = document["limits"]["steps"]
    rows = "".join(
        f"<tr><td>{one['step'] + 1}</td><td>{_number(one['relative'], 4)}</td><td>{one['cosine']:.6f}</td>"
        f"<td>{'–' if one['rounding'] is None else _number(one['share'], 2)}</td></tr>\n"
        for one in document["steps"]
    )
    allowed = f"median ≤ {limits['median']}, each ≤ {limits['largest']}, cosine ≥ {limits['cosine']}"
    if limits["median_share"] is not None:
        allowed += f"; times rounding alone: median ≤ {limits['median_share']}, each ≤ {limits['largest_share']}"
    return (
        f"<table>\n<caption>Velocity of whole steps against the unquantized model ({allowed})</caption>\n"
        "<tr><th>step</th><th>relative L2</th><th>cosine</th><th>times what rounding alone loses</th></tr>\n"
        f"{rows}</table>\n"
    )


def _ends(document: Mapping[str, Any]) -> str:
    """The end of a whole request: a row for each modality, and one for each column of actions."""
    rows = columns = ""
    for one in document["ends"]:
        name, frames = escape(str(one["modality"])), [frame for frame in one["frames"] if frame is not None]
        by_frame = f"{min(frames):.4f} to {max(frames):.4f}" if frames else "–"
        rows += (
            f"<tr><td>{name}</td><td>{_number(one['relative'], 4)}</td><td>{_number(one['floor'], 4)}</td>"
            f"<td>{by_frame}</td></tr>\n"
        )
        for column in one["columns"]:
            columns += (
                f"<tr><td>{escape(str(column['name']))}</td><td>{_number(column['rms'], 5)}</td>"
                f"<td>{_number(column['largest'], 5)}</td><td>{_number(column['floor'], 5)}</td>"
                f"<td>{escape(str(column['unit']))}</td></tr>\n"
            )
    if not rows:
        return ""
    limit = document["ends"][0]["limit"]
    found = (
        f"<table>\n<caption>End of a whole request against the unquantized model (relative L2 ≤ {limit})</caption>\n"
        "<tr><th>modality</th><th>relative L2</th><th>unquantized in its own precision</th>"
        f"<th>latent frames</th></tr>\n{rows}</table>\n"
    )
    if columns:
        found += (
            "<table>\n<caption>Error of each column of actions over the chunk</caption>\n"
            "<tr><th>column</th><th>root mean square</th><th>largest</th><th>unquantized in its own precision</th>"
            f"<th>unit</th></tr>\n{columns}</table>\n"
        )
    return found
