"""Hooks of the docs site: the README is its first page, and links out of `docs/` lead to the repository."""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
LINK = re.compile(r"(\[[^\]]*\]\()(?!https?:|#)([^)\s]+\))")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the README and the pages at the root."""
    for name, uri in (("README.md", "index.md"), *((f"{name}.md", f"{name}.md") for name in AT_ROOT)):
        text = LINK.sub(r"\1../\2", (ROOT / name).read_text(encoding="utf-8"))
        files.append(File.generated(config, uri, content=text))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links are written for the repository: those to pages of the site stay inside it, others go to the repository."""
    folder = posixpath.dirname(posixpath.join("docs", page.file.src_uri))

    def lead(match: re.Match[str]) -> str:
        target, mark, rest = match[2].partition("#")
        target = target.removesuffix(")")
        path = posixpath.normpath(posixpath.join(folder, target))
        end = f"{mark}{rest}" if mark else ")"
        if path.startswith("docs/"):
            uri = path.removeprefix("docs/")
        else:
            uri = "index.md" if path == "README.md" else path
            if files.get_file_from_path(uri) is None:
                return f"{match[1]}{config.repo_url}/blob/main/{path}{end}"
        return f"{match[1]}{posixpath.relpath(uri, posixpath.dirname(page.file.src_uri) or '.')}{end}"

    return LINK.sub(lead, markdown)


AT_ROOT = ("CONTRIBUTING", "SECURITY", "CHANGELOG")
