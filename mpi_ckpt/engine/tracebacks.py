# SPDX-License-Identifier: Apache-2.0
"""Formats an error of this package: complete, but no longer than a screen. No MPI."""

from __future__ import annotations

import traceback
from pathlib import Path
from typing import TYPE_CHECKING

from mpi_ckpt.errors import CheckpointError
from mpi_ckpt.failures import RemoteTraceback

if TYPE_CHECKING:
    from collections.abc import Iterator

_LINES_MAX = 20
_FRAMES_MAX = 4
_LEVELS_MAX = 3
_PACKAGE = str(Path(__file__).parents[1])
_LED_TO = "which led to:\n"


def in_full(error: BaseException) -> str:
    """Return the text of an exception as Python prints it.

    Not collective. If an error of this package would take more than 20 lines, its traceback
    shows the frames of the program, but not those of this package.

    Args:
        error: The exception, with its traceback.
    """
    text = "".join(traceback.format_exception(error))
    if text.count("\n") <= _LINES_MAX or not isinstance(error, CheckpointError):
        return text
    levels = list(_chain(error))
    parts = [_LED_TO.join(_level(level, is_last=level is error) for level in levels)]
    return "".join(["Traceback, without the frames of mpi_ckpt:\n", *parts])


def _chain(error: BaseException) -> Iterator[BaseException]:
    """Yield the chain of an exception, first cause first, itself last."""
    chain: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in chain:
        chain.append(cause)
        hidden = cause.__suppress_context__ or cause.__cause__ is not None
        cause = cause.__cause__ if hidden else cause.__context__
    # Another rank prints its own traceback.
    causes = [cause for cause in chain[:0:-1] if not isinstance(cause, RemoteTraceback)]
    yield from [*causes[: _LEVELS_MAX - 1], error]


def _level(error: BaseException, *, is_last: bool) -> str:
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not frame.filename.startswith(_PACKAGE)
    ]
    half = _FRAMES_MAX // 2
    if len(frames) > _FRAMES_MAX:
        frames = frames[:half] + frames[-half:]
    places = [
        f'  File "{frame.filename}", line {frame.lineno}, in {frame.name}\n'
        + (f"    {frame.line}\n" if frame.line else "")
        for frame in frames
    ]
    headline = "".join(traceback.format_exception_only(error))
    if not is_last:
        headline = headline.split("\n")[0] + "\n"
    return "".join([*places, headline])
