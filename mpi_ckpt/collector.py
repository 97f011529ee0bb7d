# SPDX-License-Identifier: Apache-2.0
"""Python's garbage collector, out of the way where thousands of small values are made."""

from __future__ import annotations

import functools
import gc
from typing import TYPE_CHECKING, ParamSpec, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["without_collections"]

Args = ParamSpec("Args")
Result = TypeVar("Result")


def without_collections(function: Callable[Args, Result]) -> Callable[Args, Result]:
    """Pause the search for cycles while a function runs.

    Every leaf is a few small values that all stay alive. Each thousand of them sets off
    a look at all objects of the process, torch's too: with 20,000 leaves that was two
    fifths of a restore (benchmarks/README.md). What is not in a cycle is freed as ever.

    Thread-safe: whoever ends last lets the collector work again, if it did before.
    """

    @functools.wraps(function)
    def paused(*args: Args.args, **kwargs: Args.kwargs) -> Result:
        was_enabled = gc.isenabled()
        gc.disable()
        try:
            return function(*args, **kwargs)
        finally:
            if was_enabled:
                gc.enable()

    return paused
