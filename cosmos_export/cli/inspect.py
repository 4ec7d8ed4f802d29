"""``cosmos-export inspect``: what a checkpoint is, from its headers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cosmos_export import units
from cosmos_export.cli.tables import Table, facts, numbers
from cosmos_export.cli.verbs import Verbs
from cosmos_export.verb_options import InspectOptions

if TYPE_CHECKING:
    from cosmos_export.checkpoint.describe import Summary

_SHOWN = 10


def register(app: Verbs) -> None:
    """Add the verb to ``app``."""

    @app.verb(
        "inspect",
        InspectOptions,
        "cosmos-export inspect Cosmos3-Nano",
        "cosmos-export inspect Cosmos3-Nano --json",
    )
    def inspect(options: InspectOptions, as_json: bool) -> None:
        """Check a checkpoint and show its towers, sizes, modalities and sampler. Reads headers only."""
        from cosmos_export.checkpoint import open_checkpoint
        from cosmos_export.checkpoint.describe import describe
        from cosmos_export.cli import console

        summary = describe(open_checkpoint(options.checkpoint))
        if as_json:
            console.emit_json("inspect", summary.to_json())
        else:
            console.show(facts(_facts(summary), console.out().width), "", _sizes(summary), *_remarks(summary))


def _facts(summary: Summary) -> list[tuple[str, object]]:
    geometry = summary.geometry
    heads = f"{geometry['num_attention_heads']} query, {geometry['num_key_value_heads']} key/value"
    values = {
        "model": f"Cosmos 3 {summary.variant} ({summary.family}, {summary.precision})",
        "from": f"{summary.repository} @ {summary.revision}" if summary.repository else summary.path,
        "layers": f"{geometry['num_hidden_layers']} in each tower, width {geometry['hidden_size']:,}",
        "heads": f"{heads}, {geometry['head_dim']} wide",
        "MLP": f"{geometry['intermediate_size']:,} {geometry['hidden_act']}",
        "prompt": f"{summary.kv_bytes_per_prompt_token:,} bytes of K/V per token (BF16)",
        "generates": ", ".join(summary.modalities),
        "sampler": summary.schedule,
    }
    if summary.step_policy is not None:
        first, last = summary.step_policy["first_steps"], summary.step_policy["last_steps"]
        values["steps"] = f"first {first} and last {last} with 16-bit activations"
    if summary.policy is not None:
        values["policy"] = ", ".join(f"{key} {value}" for key, value in summary.policy.items())
    return list(values.items())


def _sizes(summary: Summary) -> Table:
    table = Table(("part", *numbers("parameters", "on disk", "linears")))
    for name, tower in summary.towers.items():
        table.add(f"{name} tower", units.count(tower.parameters), units.size(tower.size_bytes), tower.linears)
    rows = {**summary.shared, "transformer": summary.transformer, **summary.components}
    for name, size in rows.items():
        table.add(name, units.count(size.parameters), units.size(size.size_bytes), "")
    return table


def _remarks(summary: Summary) -> list[str]:
    """Unused contents of the directory. Tensors are grouped by reason: a quantized model leaves a thousand."""
    lines = []
    by_reason: dict[str, list[str]] = {}
    for name, reason in summary.unused_tensors:
        by_reason.setdefault(reason, []).append(name)
    for reason, names in by_reason.items():
        lines.append(f"unused: {len(names)} tensors ({names[0]}{', …' if len(names) > 1 else ''}): {reason}")
    lines += [f"not read: {name}: {reason}" for name, reason in summary.ignored_files]
    lines += [f"`build` converts: {note}" for note in summary.conversions]
    if summary.adapters:
        lines.append(
            f"adapters, not merged and not read: {', '.join(summary.adapters)}; `build` asks for --adapter or "
            "--ignore-adapters (CX125)"
        )
    if summary.wants_state:
        lines.append("this policy is given the robot's state as its first action row: run --state")
    elif summary.policy is not None and summary.wants_state is None:
        lines.append("checkpoint.json does not say whether this policy is given the robot's state (use_state)")
    if summary.policy_unread:
        lines.append(f"fields of the policy in checkpoint.json that are not read: {', '.join(summary.policy_unread)}")
    if summary.unknown_config_keys:
        keys = summary.unknown_config_keys
        rest = f" and {len(keys) - _SHOWN} more" if len(keys) > _SHOWN else ""
        lines.append(f"configuration keys that the model ignores: {', '.join(keys[:_SHOWN])}{rest}")
    return ["", *lines] if lines else []
