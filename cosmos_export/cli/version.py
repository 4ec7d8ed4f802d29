"""``cosmos-export version``: what is installed."""

from __future__ import annotations

from typing import Annotated

import typer

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


def register(app: typer.Typer) -> None:
    """Add the verb to ``app``."""

    @app.command("version")
    def version(
        as_json: Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")] = False,
    ) -> None:
        """Print the versions of cosmos-export, Python and the optional packages."""
        from cosmos_export.cli import console

        found = installed()
        if as_json:
            console.emit_json(found)
            return
        width = max(map(len, found))
        for name, value in found.items():
            console.out().print(f"{name:<{width}}  {value or 'not installed'}")


def installed() -> dict[str, str | None]:
    """Version of each package, from its metadata; None where it is not installed."""
    import cosmos_export
    from cosmos_export.machine.packages import installed_release
    from cosmos_export.machine.system import python_version

    own: dict[str, str | None] = {"cosmos-export": cosmos_export.__version__, "python": python_version()}
    return own | {name: installed_release(name) for name in OPTIONAL}
