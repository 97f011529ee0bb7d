# SPDX-License-Identifier: Apache-2.0
"""The Python blocks of the documents, by page and number, and which test runs which."""

from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar, cast

if TYPE_CHECKING:
    from collections.abc import Callable

REPOSITORY = Path(__file__).parents[2]

_BLOCK = re.compile(
    r"(<!-- (examples/\w+\.py) -->\n\n)?^```python\n(.*?)^```", re.DOTALL | re.MULTILINE
)
_Test = TypeVar("_Test", bound="Callable[..., object]")


class Block(NamedTuple):
    """A block of Python of a page, and the program of which it is a copy, if it is one."""

    page: str
    number: int
    text: str
    listing: str | None


def blocks_of(page: str) -> list[Block]:
    """Return the blocks of a page, which is named by its path in the repository."""
    found = _BLOCK.finditer((REPOSITORY / page).read_text())
    return [Block(page, at, one[3], one[2]) for at, one in enumerate(found)]


def all_blocks() -> list[Block]:
    """Return the blocks of README and of all pages of the documentation."""
    pages = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").rglob("*.md"))]
    names = [str(page.relative_to(REPOSITORY)) for page in pages]
    return [block for name in names for block in blocks_of(name)]


RUN_BY: dict[tuple[str, int], str] = {}
"""The function that runs a block, for each block that some function has said to run."""

_taken: set[tuple[str, int]] = set()


def take(page: str, number: int) -> str:
    """Return the text of a block for a function that runs it."""
    _taken.add((page, number))
    return blocks_of(page)[number].text


def shows(page: str, *numbers: int) -> Callable[[_Test], _Test]:
    """Have a function fail that does not take these blocks of a page, all of them."""
    blocks = {(page, number) for number in numbers}

    def wrap(test: _Test) -> _Test:
        RUN_BY.update(dict.fromkeys(blocks, test.__name__))

        @functools.wraps(test)
        def checked(*args: Any, **kwargs: Any) -> object:
            _taken.difference_update(blocks)
            result = test(*args, **kwargs)
            assert blocks <= _taken, f"{test.__name__} did not run {blocks - _taken}"
            return result

        return cast("_Test", checked)

    return wrap
