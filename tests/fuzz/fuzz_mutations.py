"""Changes to real files: structure-aware by the kind of the file, and special files in place of any.

A mutation is drawn from a `random.Random` and is a function of it and of the file's bytes alone, so that a case is its
seed.
"""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

from fuzz_bytes import Mutation, mutate_bytes
from fuzz_json import mutate_json, mutate_lines
from fuzz_media import mutate_boxes, mutate_png
from fuzz_tables import mutate_parquet, mutate_safetensors
from fuzz_text import mutate_template, mutate_text, mutate_toml
from fuzz_tree import SPECIAL, Tree, place_special, shuffle_files


def change(random: Random, tree: Tree, names: Sequence[str], *, special: bool = True) -> None:
    """One mutation of one of the files ``names`` of ``tree``."""
    name = random.choice(names)
    draw = random.random()
    if special and draw < 0.06:
        place_special(tree, name, random.choice(SPECIAL))
    elif draw < 0.10:
        shuffle_files(random, tree, name, names)
    else:
        data = tree.read(name)
        mutate = random.choice((by_kind(name), by_kind(name), by_kind(name), mutate_bytes))
        changed, what = mutate(random, data)
        tree.write(name, changed, what)


def by_kind(name: str) -> Mutation:
    """The structure-aware mutation of a file of this name."""
    suffix = name.rpartition(".")[2].lower()
    return _KINDS.get(suffix, mutate_bytes)


_KINDS: dict[str, Mutation] = {
    "json": mutate_json,
    "jsonl": mutate_lines,
    "toml": mutate_toml,
    "txt": mutate_text,
    "jinja": mutate_template,
    "safetensors": mutate_safetensors,
    "png": mutate_png,
    "mp4": mutate_boxes,
    "webm": mutate_boxes,
    "parquet": mutate_parquet,
}
