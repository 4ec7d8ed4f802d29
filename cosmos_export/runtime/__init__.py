"""Running a bundle: requests, media, sessions and the generation driver. numpy and a backend: no torch, no diffusers.

generator = Generator(load_bundle(path))
result = generator.generate(request)
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cosmos_export.runtime.generator import Generator, Result
    from cosmos_export.runtime.loading import LoadedBundle, load_bundle

__all__ = ["Generator", "LoadedBundle", "Result", "load_bundle"]

_HOMES = {"Generator": "generator", "Result": "generator", "LoadedBundle": "loading", "load_bundle": "loading"}


def __getattr__(name: str) -> Any:
    # Late: a part that wants nothing but positions or a canvas does not load the driver.
    from importlib import import_module

    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
