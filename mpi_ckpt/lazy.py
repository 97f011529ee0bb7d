# SPDX-License-Identifier: Apache-2.0
"""Lets a package import the module of a public name when the name is first used.

For all packages but the outermost, whose import loads no other module, not even this one.
"""

from __future__ import annotations

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

__all__ = ["lazy_names"]


def lazy_names(
    package: str, modules: Mapping[str, str]
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Return a package's ``__getattr__`` and ``__dir__``. Not collective. Thread-safe.

    Args:
        package: Its name.
        modules: Public name -> the module that defines it; if its name there differs, a
            colon and that name follow.
    """

    def get(name: str) -> Any:  # noqa: ANN401 (any public name)
        if name not in modules:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        module, _, inside = modules[name].partition(":")
        value = getattr(import_module(module), inside or name)
        # The next access finds the name without this function.
        setattr(sys.modules[package], name, value)
        return value

    def show() -> list[str]:
        return sorted(modules)

    return get, show
