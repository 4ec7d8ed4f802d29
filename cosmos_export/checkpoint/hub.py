"""Checkpoints by the names that Hugging Face has for them: looked up in the local cache, and never downloaded here."""

from __future__ import annotations

import contextlib
import difflib
import os
import re
from dataclasses import dataclass
from pathlib import Path

from cosmos_export import files
from cosmos_export.diagnostics import UserError

_PART = r"[A-Za-z0-9](?:[\w.-]{0,94}[\w-])?"
_NAME = re.compile(rf"(?P<owner>{_PART})/(?P<name>{_PART})(?:@(?P<revision>[\w./-]+))?")
_URL = re.compile(
    rf"(?:https?:/+)?(?:www\.)?(?:huggingface\.co|hf\.co)/+(?:models/)?(?P<owner>{_PART})/(?P<name>{_PART})"
    rf"(?:/(?:tree|resolve|blob)/(?P<revision>[\w.-]+)(?:/.*)?)?/*(?:\?.*)?(?:@(?P<at>[\w./-]+))?"
)
_SCHEME = re.compile(r"hf:/+(?:models/)?")
_BARE = re.compile(r"cosmos3-(nano|super|edge)[a-z0-9-]*(@(?P<revision>[\w./-]+))?", re.IGNORECASE)
_PUBLISHER = "nvidia"


@dataclass(frozen=True)
class Repository:
    """A repository of the hub, and the revision that was named; None: ``main``."""

    name: str
    revision: str | None = None

    @property
    def download(self) -> str:
        """The command that downloads it into the cache."""
        return f"hf download {self.name}" + (f" --revision {self.revision}" if self.revision else "")


def repository(text: str) -> Repository | None:
    """The repository that ``text`` names: ``OWNER/NAME``, with ``@REVISION``, as a URL or as ``hf://``; None where it
    names none. The models of Cosmos 3 may be named without their owner."""
    text = _SCHEME.sub("", text.strip())
    url = _URL.fullmatch(text)
    if url is not None:
        return Repository(f"{url['owner']}/{url['name']}", url["revision"] or url["at"])
    found = _NAME.fullmatch(text)
    if found is not None:
        return Repository(f"{found['owner']}/{found['name']}", found["revision"])
    bare = _BARE.fullmatch(text)
    if bare is not None:
        return Repository(f"{_PUBLISHER}/{text.partition('@')[0]}", bare["revision"])
    return None


def local_checkpoint(path: Path) -> Path:
    """``path`` where it exists; else the snapshot in the local cache that it names. CX105: there is neither, with the
    command that downloads it, or what is there under another name."""
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        path.lstat()
        return path
    found = repository(str(path))
    if found is None:
        raise UserError("CX105", f"{path} does not exist", _beside(path) or "give the path of a local checkpoint")
    cache = cache_folder()
    folder = cache / f"models--{found.name.replace('/', '--')}"
    snapshot = _snapshot(found, cache)
    if snapshot is not None:
        return snapshot
    revisions = _revisions(folder)
    if revisions:
        there = ", ".join(revisions)
        asked = found.revision or "main"
        raise UserError(
            "CX105",
            f"revision {asked} of {found.name} is not in the Hugging Face cache {cache}; there: {there}",
            f"`{found.download}`, or name what is there: {found.name}@{revisions[0]}",
        )
    typed = _beside(path)
    raise UserError(
        "CX105",
        f"{path} does not exist, and {found.name} is not in the Hugging Face cache {cache}",
        f"{typed}; or download it: `{found.download}`" if typed else f"`{found.download}`, then the same command again",
    )


def cache_folder() -> Path:
    """The folder that the hub's library downloads into, by the same variables."""
    home = os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface"
    own = os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE")
    return Path(own or Path(home) / "hub").expanduser()


def _snapshot(found: Repository, cache: Path) -> Path | None:
    """The snapshot of the revision in the cache, as the hub's library finds it; None where there is none."""
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
    except ImportError:
        return _snapshot_by_hand(found, cache)
    try:
        return Path(snapshot_download(found.name, revision=found.revision, cache_dir=cache, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError, OSError, ValueError):
        return None


def _snapshot_by_hand(found: Repository, cache: Path) -> Path | None:
    folder = cache / f"models--{found.name.replace('/', '--')}"
    revision = found.revision or "main"
    with contextlib.suppress(OSError):  # a commit names itself
        revision = files.read_bytes(folder / "refs" / revision, 256).decode("ascii", "replace").strip()
    snapshot = folder / "snapshots" / revision
    return snapshot if snapshot.is_dir() else None


def _revisions(folder: Path) -> list[str]:
    """Revisions of a repository that are in its ``folder`` of the cache: references first, then commits."""
    references, commits = [], set()
    for reference in sorted((folder / "refs").rglob("*")):
        try:
            commit = files.read_bytes(reference, 256).decode("ascii", "replace").strip()
        except OSError:
            continue
        if (folder / "snapshots" / commit).is_dir():
            references.append(reference.relative_to(folder / "refs").as_posix())
            commits.add(commit)
    there = sorted(child.name for child in (folder / "snapshots").glob("*/") if child.is_dir())
    return references + [name for name in there if name not in commits]


def _beside(path: Path) -> str:
    """A hint with the folders beside ``path``, where its folder exists and has something: the name may be mistyped."""
    parent = path.parent
    if not path.name or (str(parent) == "." and len(path.parts) < 2) or not parent.is_dir():
        return ""
    names = sorted(child.name for child in parent.iterdir() if child.is_dir())[:200]
    near = difflib.get_close_matches(path.name, names, n=1, cutoff=0.5)
    if near:
        return f"did you mean {parent / near[0]}?"
    return f"folders in {parent}: {', '.join(names[:6])}" if names else ""
