"""Differences of two bundles by their manifests: settings by name, and files by role and digest."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from cosmos_export.bundle import strict
from cosmos_export.bundle.manifest import Manifest

_NOT_SETTINGS = frozenset({"files", "volatile", "evaluation", "plan_checks"})
"""Fields of a manifest that follow from the others, or are measured anew by each build."""


@dataclass(frozen=True)
class SettingChange:
    """A setting with another value in each bundle; None: the bundle does not have it."""

    name: str
    first: Any
    second: Any


@dataclass(frozen=True)
class FileChange:
    """A file that is not the same in both; its size in bytes in each, None where it is not there."""

    path: str
    role: str
    first_bytes: int | None
    second_bytes: int | None


@dataclass(frozen=True)
class Differences:
    """Everything that tells two bundles apart."""

    settings: tuple[SettingChange, ...]
    files: tuple[FileChange, ...]
    same_files: int
    same_bytes: int
    """Files that both have with the same bytes, and their size."""

    @property
    def none(self) -> bool:
        """Whether the bundles do the same with the same files."""
        return not self.settings and not self.files


def differences(first: Manifest, second: Manifest) -> Differences:
    """The settings and files in which ``second`` differs from ``first``. Times of builds and measurements are not
    compared."""
    settings = tuple(_settings("", _plain(first), _plain(second)))
    one, other = ({record.path: record for record in manifest.files} for manifest in (first, second))
    changed, same = [], []
    for path in sorted({*one, *other}):
        a, b = one.get(path), other.get(path)
        if a is not None and b is not None and a.sha256 == b.sha256:
            same.append(a.size_bytes)
            continue
        role = (a or b).role  # type: ignore[union-attr]  # one of them has it
        changed.append(FileChange(path, role, a.size_bytes if a else None, b.size_bytes if b else None))
    return Differences(settings, tuple(changed), len(same), sum(same))


def _plain(manifest: Manifest) -> Mapping[str, Any]:
    document: Mapping[str, Any] = strict.encode(manifest)
    return {name: value for name, value in document.items() if name not in _NOT_SETTINGS}


def _settings(prefix: str, first: Any, second: Any) -> Iterator[SettingChange]:
    """Leaves that differ, by the names on the way to them; lists of objects with a name go by it."""
    first, second = _named(first), _named(second)
    if isinstance(first, Mapping) and isinstance(second, Mapping):
        for name in dict.fromkeys([*first, *second]):
            yield from _settings(f"{prefix}.{name}" if prefix else name, first.get(name), second.get(name))
    elif first != second:
        yield SettingChange(prefix, first, second)


def _named(value: Any) -> Any:
    """A list of objects that all have a ``name`` or a ``path`` of their own, as a mapping."""
    if not isinstance(value, list | tuple) or not value or not all(isinstance(one, Mapping) for one in value):
        return value
    for key in ("name", "path"):
        names = [one.get(key) for one in value]
        if all(isinstance(name, str) for name in names) and len(set(names)) == len(names):
            return dict(zip(names, value, strict=True))
    return value
