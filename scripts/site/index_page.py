# SPDX-License-Identifier: Apache-2.0
"""Makes the README and the metadata of a release fit for the page of a package index.

::

    python scripts/site/index_page.py DIRECTORY [URL]

Links there lead nowhere unless they are absolute. With a URL of the repository they are
made so, and the metadata name it; without one they keep their text only.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

_LINK = re.compile(r"\[((?:[^\[\]]|`[^`]*`)*)\]\(([^)\s]+)\)")


def with_absolute_links(text: str, url: str) -> str:
    """Return a README whose links work anywhere.

    Args:
        text: The README.
        url: Address of the repository; empty for none.
    """

    def absolute(match: re.Match[str]) -> str:
        words, target = match.groups()
        if "://" in target:
            return match[0]
        return f"[{words}]({url.rstrip('/')}/blob/main/{target})" if url else words

    return _LINK.sub(absolute, text)


def with_urls(project: str, url: str) -> str:
    """Return the text of pyproject.toml with the addresses of the project.

    Args:
        project: The text.
        url: Address of the repository; empty for none.
    """
    if not url:
        return project
    url = url.rstrip("/")
    table = "\n".join(
        [
            "[project.urls]",
            f'Repository = "{url}"',
            f'Issues = "{url}/issues"',
            f'Changelog = "{url}/blob/main/CHANGELOG.md"',
            f'Documentation = "{url}/blob/main/docs/index.md"',
        ]
    )
    return project.replace("[project.scripts]", f"{table}\n\n[project.scripts]", 1)


def main(directory: str, url: str = "") -> None:
    """Rewrite the files of a directory."""
    root = Path(directory)
    readme, project = root / "README.md", root / "pyproject.toml"
    readme.write_text(with_absolute_links(readme.read_text(), url))
    project.write_text(with_urls(project.read_text(), url))


if __name__ == "__main__":
    main(*sys.argv[1:])
