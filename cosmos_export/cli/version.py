"""``cosmos-export version``: what is installed."""

from __future__ import annotations

from cosmos_export.cli.verbs import Verbs
from cosmos_export.verb_options import NoOptions

OPTIONAL = (
    "torch",
    "diffusers",
    "transformers",
    "safetensors",
    "onnx",
    "onnx-ir",
    "onnxruntime",
    "onnxruntime-gpu",
    "tensorrt-cu13",
    "tensorrt-rtx-cu13",
    "triton",
)
"""Distributions whose version matters to a result. None of them is imported to find out."""


def register(app: Verbs) -> None:
    """Add the verb to ``app``."""

    @app.verb(
        "version",
        NoOptions,
        "cosmos-export version",
        "cosmos-export version --json",
    )
    def version(_: NoOptions, as_json: bool) -> None:
        """Print the versions of cosmos-export, Python and the optional packages."""
        from cosmos_export.cli import console, tables

        found = installed()
        if as_json:
            console.emit_json("version", {"packages": found})
            return
        rows = [(name, value or "not installed") for name, value in found.items()]
        console.show(tables.facts(rows, console.out().width))


def installed() -> dict[str, str | None]:
    """Version of each package, from its metadata; None where it is not installed."""
    import cosmos_export
    from cosmos_export.machine.packages import installed_release
    from cosmos_export.machine.system import python_version

    own: dict[str, str | None] = {"cosmos-export": cosmos_export.__version__, "python": python_version()}
    return own | {name: installed_release(name) for name in OPTIONAL}
