"""Checkpoints with their bundles and generators, for tests that run requests."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import build_harness as harness

from cosmos_export.bundle import Manifest
from cosmos_export.compiler.driver import build
from cosmos_export.options import BuildOptions, GenerateOptions
from cosmos_export.runtime import Generator, load_bundle
from cosmos_export.runtime.frontend import Prepared, prepare

PROFILE = "und_len=1:256:4096,frames=1:3:5,height=3:5:16,width=3:7:20,sound_len=0:10:30,action_len=0:8:16"
"""One profile for all modes: odd grids, one frame, no sound, no action."""


@dataclass(frozen=True)
class Subject:
    """A checkpoint, and a bundle of it with a generator."""

    checkpoint: Path
    bundle: Path
    generator: Generator

    @property
    def manifest(self) -> Manifest:
        return self.generator.bundle.manifest

    def prepare(self, asked: GenerateOptions) -> Prepared:
        return prepare(asked, self.generator.bundle.files)


class Subjects:
    """Bundles by what was asked of the build; builds share one capture of a checkpoint."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._checkpoints: dict[str, Path] = {}
        self._built: dict[object, Subject] = {}

    def checkpoint(self, name: str) -> Path:
        if name not in self._checkpoints:
            backbone, _, kind = name.partition("-")
            path = harness.checkpoint(self._folder, backbone, "float32")
            make = {"distilled": harness.distilled, "policy": harness.policy}.get(kind)
            self._checkpoints[name] = path if make is None else make(path, self._folder / name)
        return self._checkpoints[name]

    def __call__(self, name: str, **options: Any) -> Subject:
        key = (name, *sorted(options.items()))
        if key not in self._built:
            silent = name == "edge" or options.get("modalities") == ("vision",)
            profile = PROFILE.replace("0:10:30", "0") if silent else PROFILE
            profile = profile.replace("0:8:16", "0") if "modalities" in options else profile
            path = self._folder / f"bundle-{len(self._built)}"
            chosen = {"parity": "never", "profiles": (profile,), **options}
            build(BuildOptions(self.checkpoint(name), path, **chosen))
            self._built[key] = Subject(self.checkpoint(name), path, Generator(load_bundle(path)))
        return self._built[key]
