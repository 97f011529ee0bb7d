# SPDX-License-Identifier: Apache-2.0
"""How failures of several ranks become one error, the same on all of them."""

from __future__ import annotations

import socket
import traceback
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

from mpi_ckpt import errors
from mpi_ckpt.errors import CheckpointError, RankFailure

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

__all__ = ["RemoteTraceback", "capture_failure", "concerning", "merge_failures"]


class RemoteTraceback(Exception):
    """Carries the tracebacks of the failing ranks as the cause of an agreed error."""


class _Concern(str):
    """A note on an exception (PEP 678) that is also told by the other ranks."""

    __slots__ = ()


@contextmanager
def concerning(what: str) -> Iterator[None]:
    """Let an exception that leaves the block say what it concerns, wherever it is told.

    Not collective. Thread-safe. For what runs code of others on behalf of one state or
    leaf: their errors say what went wrong, and know nothing of where.

    Args:
        what: Such as ``"state 'model'"``; blocks within one another are told outermost
            first.
    """
    try:
        yield
    except Exception as error:
        # Some classes take no attributes; they are told without.
        with suppress(AttributeError, TypeError):
            error.__notes__ = [*_notes_of(error), _Concern(what)]  # type: ignore[attr-defined]
        raise


def capture_failure(
    error: BaseException, *, rank: int, size: int, operation: str
) -> RankFailure:
    """Describe an exception of this rank. Not collective. Thread-safe."""
    # Anybody's exception may call anything `errno` or `problems`.
    ours = error if isinstance(error, CheckpointError) else None
    known = ours or (error if isinstance(error, OSError) else None)
    return RankFailure(
        rank=rank,
        size=size,
        host=socket.gethostname(),
        operation=operation,
        kind=type(error).__name__,
        message=_message_of(error),
        errno=known.errno if known else None,
        path=_path_of(error),
        generation=ours.generation if ours else None,
        problems=list(ours.problems) if ours else [],
        traceback="".join(traceback.format_exception(error)),
    )


def merge_failures(
    failures: Sequence[RankFailure], default: type[CheckpointError], safe: str
) -> CheckpointError:
    """Make the one error that all ranks raise from the failures of some.

    Not collective. Thread-safe. The class is that of the lowest failing rank where it
    belongs to this package's family, else ``default``.

    Args:
        failures: At least one, ordered by rank.
        default: Class for exceptions from outside the family.
        safe: One clause that says what is still safe.

    Returns:
        The error, its ``__cause__`` holding the tracebacks of the failing ranks.
    """
    first = failures[0]
    lines = [str(failure) for failure in failures]
    error = _class_of(first.kind, default)(
        "\n  ".join([f"{first.operation} failed; {safe}", *lines]),
        path=first.path,
        generation=first.generation,
        errno=first.errno,
        failures=failures,
        # Ranks mostly find the same: each finding is told once.
        problems=list(dict.fromkeys(p for f in failures for p in f.problems or [str(f)])),
    )
    error.__cause__ = RemoteTraceback(
        "\n".join(
            f"\nrank {f.rank} of {f.size} on {f.host}:\n{f.traceback}" for f in failures
        )
    )
    return error


def _class_of(kind: str, default: type[CheckpointError]) -> type[CheckpointError]:
    found: type[CheckpointError] = vars(errors)[kind] if kind in errors.__all__ else default
    return found


def _message_of(error: BaseException) -> str:
    text = _text_of(error)
    concerns = [note for note in _notes_of(error) if isinstance(note, _Concern)]
    told = [concern for concern in reversed(concerns) if concern not in text]
    return f"{', '.join(told)}: {text}" if told else text


def _notes_of(error: BaseException) -> Sequence[object]:
    notes = getattr(error, "__notes__", ())
    return notes if isinstance(notes, (list, tuple)) else ()


def _text_of(error: BaseException) -> str:
    # The other ranks wait for this text, so making it must not fail.
    try:
        return str(error) or type(error).__name__
    except Exception as failure:
        return f"its text cannot be made ({type(failure).__name__})"


def _path_of(error: BaseException) -> str | None:
    path = getattr(error, "path", None) or getattr(error, "filename", None)
    return None if path is None else str(path)
