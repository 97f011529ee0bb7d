# SPDX-License-Identifier: Apache-2.0
"""Puts whole programs into documents: ``python -m tests.project.listings --write``.

A comment that names a program stands before its listing.
"""

import re
import sys
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
DOCUMENTS = sorted((REPOSITORY / "docs").rglob("*.md"))

_LISTING = re.compile(r"<!-- (examples/\w+\.py) -->\n(?:\n```python\n.*?```\n)?", re.DOTALL)


def with_listings(text):
    """Return the text of a document with the present programs in it."""

    def listing(match):
        lines = (REPOSITORY / match[1]).read_text().splitlines()
        code = "\n".join(line for line in lines if not line.startswith("# SPDX"))
        return f"<!-- {match[1]} -->\n\n```python\n{code}\n```\n"

    return _LISTING.sub(listing, text)


if __name__ == "__main__" and sys.argv[1:] == ["--write"]:
    for document in DOCUMENTS:
        text = document.read_text()
        if with_listings(text) != text:
            document.write_text(with_listings(text))
