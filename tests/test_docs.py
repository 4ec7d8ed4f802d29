"""Pages name files that are there."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), ROOT / "benchmarks/README.md"])
LINK = re.compile(r"\[[^\]]*\]\((?!https?:|#)([^)#\s]+)[^)]*\)")
PATH = re.compile(r"(?<=[`\s])((?:cosmos_export|passes|kernels|calibration|targets|tests|benchmarks|docs)/[\w./-]+)")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_to_files(page: Path) -> None:
    missing = [link for link in LINK.findall(page.read_text(encoding="utf-8")) if not (page.parent / link).exists()]
    assert not missing


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_paths_that_are_named_are_there(page: Path) -> None:
    """Not in the history of changes, which names what there was, nor in recipes of what is to be written."""
    if page.name == "CHANGELOG.md":
        return
    named = set(PATH.findall(page.read_text(encoding="utf-8")))
    examples = {name for name in named if "NAME" in name or "verb_object" in name}
    assert not {name for name in named - examples if not (ROOT / name.rstrip("/.")).exists()}


def test_every_page_is_reached_from_the_readme() -> None:
    reached, new = set[Path](), {ROOT / "README.md"}
    while new:
        reached |= new
        links = {(page.parent / link).resolve() for page in new for link in LINK.findall(page.read_text("utf-8"))}
        new = {page for page in links if page.suffix == ".md" and page.exists()} - reached
    assert not {page for page in PAGES if "decisions" not in page.parts} - reached


def test_the_repository_has_no_path_of_a_machine() -> None:
    files = subprocess.run(["git", "ls-files", "*.py", "*.md", "*.toml"], cwd=ROOT, capture_output=True, text=True)
    if files.returncode:
        pytest.skip("not a checkout")
    pattern = re.compile(r"(?<![\w.])/(?:home|Users)/\w+/|(?<![\w.])/root/(?!\.)")
    found = [n for n in files.stdout.split() if pattern.search((ROOT / n).read_text("utf-8")) and "tests/" not in n]
    assert not found


SOURCES = [
    path
    for folder in ("cosmos_export", "passes", "kernels", "calibration", "targets", "benchmarks", "docs")
    for path in sorted((ROOT / folder).rglob("*"))
    if path.suffix in (".py", ".md")
]
PRIVATE = re.compile(r'"""(?:Of|That|Whose|What) |\b(?:is|are) none of\b| of ours\b')
"""Turns of phrase that readers had to translate."""


def test_prose_is_plain() -> None:
    assert len(SOURCES) > 250
    assert not {path.relative_to(ROOT).as_posix() for path in SOURCES if PRIVATE.search(path.read_text("utf-8"))}
