"""``cosmos-export inspect``: what a checkpoint is, from its headers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from cosmos_export.checkpoint.describe import Summary

_SHOWN = 10


def register(app: typer.Typer) -> None:
    """Add the verb to ``app``."""

    @app.command("inspect")
    def inspect(
        path: Annotated[Path, typer.Argument(help="A checkpoint directory, as downloaded.", metavar="CHECKPOINT")],
        as_json: Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")] = False,
    ) -> None:
        """Check a checkpoint and show its towers, sizes, modalities and sampler. Reads headers only."""
        from cosmos_export.checkpoint import open_checkpoint
        from cosmos_export.checkpoint.describe import describe
        from cosmos_export.cli import console

        summary = describe(open_checkpoint(path))
        if as_json:
            console.emit_json(summary.to_json())
        else:
            for part in _report(summary):
                console.out().print(part)


def _report(summary: Summary) -> list[Any]:
    return [_facts(summary), _sizes(summary), *_remarks(summary)]


def _facts(summary: Summary) -> Any:
    geometry = summary.geometry
    heads = f"{geometry['num_attention_heads']} query, {geometry['num_key_value_heads']} key/value"
    facts = {
        "model": f"Cosmos 3 {summary.variant} ({summary.family}, {summary.precision})",
        "from": f"{summary.repository} @ {summary.revision}" if summary.repository else summary.path,
        "layers": f"{geometry['num_hidden_layers']} in each tower, width {geometry['hidden_size']:,}",
        "heads": f"{heads}, {geometry['head_dim']} wide",
        "MLP": f"{geometry['intermediate_size']:,} {geometry['hidden_act']}",
        "prompt": f"{summary.kv_bytes_per_prompt_token:,} bytes of K/V a token (BF16)",
        "generates": ", ".join(summary.modalities),
        "sampler": summary.schedule,
    }
    if summary.step_policy is not None:
        first, last = summary.step_policy["first_steps"], summary.step_policy["last_steps"]
        facts["steps"] = f"first {first} and last {last} with 16-bit activations"
    if summary.policy is not None:
        facts["policy"] = ", ".join(f"{key} {value}" for key, value in summary.policy.items())
    table = _table()
    table.show_header = False
    table.add_column(style="dim")
    table.add_column()
    for name, value in facts.items():
        table.add_row(name, _plain(value))
    return table


def _sizes(summary: Summary) -> Any:
    table = _table()
    table.add_column("part")
    for title in ("parameters", "on disk", "linears"):
        table.add_column(title, justify="right")
    for name, tower in summary.towers.items():
        table.add_row(f"{name} tower", _count(tower.parameters), _bytes(tower.size_bytes), str(tower.linears))
    for name, size in summary.shared.items():
        table.add_row(name, _count(size.parameters), _bytes(size.size_bytes), "")
    total = summary.transformer
    table.add_row("transformer", _count(total.parameters), _bytes(total.size_bytes), "", style="bold")
    for name, size in summary.components.items():
        table.add_row(name, _count(size.parameters), _bytes(size.size_bytes), "")
    return table


def _remarks(summary: Summary) -> list[Any]:
    """What is in the directory and not used. Tensors are grouped by reason: a quantized model leaves a thousand."""
    lines = []
    by_reason: dict[str, list[str]] = {}
    for name, reason in summary.unused_tensors:
        by_reason.setdefault(reason, []).append(name)
    for reason, names in by_reason.items():
        lines.append(f"unused: {len(names)} tensors ({names[0]}{', …' if len(names) > 1 else ''}): {reason}")
    lines += [f"not read: {name}: {reason}" for name, reason in summary.ignored_files]
    if summary.adapters:
        lines.append(f"adapters, not merged and not read: {', '.join(summary.adapters)}; `build` refuses them (CX125)")
    if summary.wants_state:
        lines.append("this policy is given the robot's state as its first action row; `run` cannot give it yet (CX605)")
    elif summary.policy is not None and summary.wants_state is None:
        lines.append("checkpoint.json does not say whether this policy is given the robot's state (use_state)")
    if summary.policy_unread:
        lines.append(f"fields of the policy in checkpoint.json that are not read: {', '.join(summary.policy_unread)}")
    if summary.unknown_config_keys:
        keys = summary.unknown_config_keys
        rest = f" and {len(keys) - _SHOWN} more" if len(keys) > _SHOWN else ""
        lines.append(f"configuration keys that the model ignores: {', '.join(keys[:_SHOWN])}{rest}")
    return [_plain(line) for line in lines]


def _table() -> Any:
    from rich import box
    from rich.table import Table

    return Table(box=box.SIMPLE, pad_edge=False)


def _plain(text: str) -> Any:
    """Text of the checkpoint, shown as it is: no markup, no control characters."""
    from rich.text import Text

    return Text("".join(character if character.isprintable() else "�" for character in text))


def _count(number: int) -> str:
    for unit, factor in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= factor:
            return f"{number / factor:,.3f} {unit}"
    return str(number)


def _bytes(number: int) -> str:
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if number >= factor:
            return f"{number / factor:,.2f} {unit}"
    return f"{number} B"
