"""Names that an option may have, from the registry that declares them: for help and for completion in a shell."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping


def names(registry: str) -> tuple[str, ...]:
    """The names of ``registry``, in the order of their declaration."""
    return _REGISTRIES[registry]()


def completion(registry: str, several: bool = False) -> Callable[[str], Iterator[str]]:
    """Completion of a value that begins like this; ``several``: the last of those with commas between them."""

    def complete(incomplete: str) -> Iterator[str]:
        before, comma, last = incomplete.rpartition(",") if several else ("", "", incomplete)
        return (f"{before}{comma}{name}" for name in names(registry) if name.startswith(last))

    return complete


def _targets() -> tuple[str, ...]:
    from cosmos_export.targets import target_names

    return target_names()


def _backends() -> tuple[str, ...]:
    from cosmos_export.targets import load_target, target_names

    found = (load_target(name) for name in target_names())
    return tuple(dict.fromkeys(name for target in found for name in (target.backend, *target.other_backends)))


def _recipes() -> tuple[str, ...]:
    from cosmos_export.precision.recipe import recipe_names

    return recipe_names()


def _modes() -> tuple[str, ...]:
    from cosmos_export.sampling.modes import MODES

    return tuple(MODES)


def _components() -> tuple[str, ...]:
    from cosmos_export.compiler.selection import COMPONENTS

    return (*COMPONENTS, "all", "none")


def _kernels() -> tuple[str, ...]:
    from cosmos_export.kernels.description import PLUGINS

    return tuple(PLUGINS)


def _own_kernels() -> tuple[str, ...]:
    from cosmos_export.kernels.description import KERNELS

    return tuple(KERNELS)


def _sizes() -> tuple[str, ...]:
    from cosmos_export.checkpoint.published import PUBLISHED

    return tuple(PUBLISHED)


def _published() -> tuple[str, ...]:
    from cosmos_export.checkpoint.published import POLICIES, PUBLISHED

    return (*PUBLISHED, *POLICIES)


def _passes() -> tuple[str, ...]:
    from cosmos_export.passes.pipeline import ORDER

    return ORDER


def _algorithms() -> tuple[str, ...]:
    from cosmos_export.calibration.algorithms import ALGORITHMS

    return tuple(ALGORITHMS)


def _formats() -> tuple[str, ...]:
    from cosmos_export.precision.schemes import stored_schemes

    return tuple(scheme.name for scheme in stored_schemes())


def _embodiments() -> tuple[str, ...]:
    from cosmos_export.embodiments import EMBODIMENTS

    return tuple(EMBODIMENTS)


def _viewpoints() -> tuple[str, ...]:
    from cosmos_export.runtime.prompts import VIEWPOINTS

    return tuple(VIEWPOINTS)


_REGISTRIES: Mapping[str, Callable[[], tuple[str, ...]]] = {
    "targets": _targets,
    "backends": _backends,
    "recipes": _recipes,
    "modes": _modes,
    "modalities": lambda: ("vision", "sound", "action"),
    "components": _components,
    "kernels": _kernels,
    "own-kernels": _own_kernels,
    "sizes": _sizes,
    "published": _published,
    "passes": _passes,
    "algorithms": _algorithms,
    "formats": _formats,
    "embodiments": _embodiments,
    "viewpoints": _viewpoints,
}
