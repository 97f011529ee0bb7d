# SPDX-License-Identifier: Apache-2.0
"""Brings files from outside of docs/ into the site: mkdocs calls these hooks.

The documents link to programs and to documents of the repository. On the site each of them
is a page of its own, so that no link leaves it.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import TYPE_CHECKING

from mkdocs.structure.files import File

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

REPOSITORY = Path(__file__).resolve().parents[2]

DOCUMENTS = (
    "ARCHITECTURE.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md",
    "benchmarks/README.md", "benchmarks/results",
)  # fmt: skip
"""Documents that are pages of the site, below repository/."""

_LINK = re.compile(r"(\]\()([^)\s#]+)(#[^)\s]*)?(\))")
_LANGUAGES = {".py": "python", ".sbatch": "bash", ".toml": "toml"}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add a page for each document and each program that a page may link to."""
    for name in DOCUMENTS:
        path = REPOSITORY / name
        if path.is_file():
            files.append(_page(config, name, path.read_text()))
    for path in sorted(REPOSITORY.glob("examples/*.py")):
        files.append(_page(config, _listed(path), _listing(path)))
    script = REPOSITORY / "scripts/slurm/train.sbatch"
    files.append(_page(config, _listed(script), _listing(script)))
    return files


def on_page_markdown(
    markdown: str, *, page: Page, config: MkDocsConfig, files: Files
) -> str:
    """Let links to files of the repository lead to their pages."""
    here = _source_of(page.file.src_uri)

    def rewritten(match: re.Match[str]) -> str:
        opening, target, anchor, closing = match.groups()
        if "://" in target or target.startswith("mailto:"):
            return match[0]
        there = posixpath.normpath(posixpath.join(posixpath.dirname(here), target))
        uri = _uri_of(there)
        if uri is None or files.get_file_from_path(uri) is None:
            return match[0] if there.startswith("docs/") else _text_of(match)
        start = posixpath.dirname(page.file.src_uri) or "."
        return f"{opening}{posixpath.relpath(uri, start)}{anchor or ''}{closing}"

    text = _LINK.sub(rewritten, markdown)
    # A link to a script or a folder keeps its text, and loses the target.
    return re.sub(r"\[([^\]\n]*)\]\(#unlinked\)", r"\1", text)


def _page(config: MkDocsConfig, name: str, text: str) -> File:
    return File.generated(config, f"repository/{name}", content=text)


def _listed(path: Path) -> str:
    return f"{path.relative_to(REPOSITORY)}.md"


def _listing(path: Path) -> str:
    language = _LANGUAGES.get(path.suffix, "")
    lines = path.read_text().splitlines()
    code = "\n".join(line for line in lines if not line.startswith("# SPDX"))
    return f"# {path.relative_to(REPOSITORY)}\n\n```{language}\n{code.strip()}\n```\n"


def _source_of(uri: str) -> str:
    """Return the path in the repository of a page's text."""
    if uri.startswith("repository/"):
        return uri.removeprefix("repository/")
    return f"docs/{uri}"


def _uri_of(path: str) -> str | None:
    """Return the page of a path in the repository; None if it has none."""
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    if path == "README.md":
        return "index.md"
    if path in DOCUMENTS:
        return f"repository/{path}"
    if path.startswith(("examples/", "scripts/slurm/")):
        return f"repository/{path}.md"
    return None


def _text_of(match: re.Match[str]) -> str:
    return f"{match[1]}#unlinked{match[4]}"
