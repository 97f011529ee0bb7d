# SPDX-License-Identifier: Apache-2.0
"""Merges the failures of several ranks into one error, the same on all ranks.

A failure that many ranks share is reported once, and the messages are bounded. Otherwise
each of a thousand ranks would receive, and print, a thousand reports.
"""

from __future__ import annotations

import socket
import traceback
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from mpi_ckpt import errors
from mpi_ckpt.errors import CheckpointError, RankFailure, cut_lines

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

__all__ = [
    *("AlikeFailures", "RemoteTraceback", "capture_failure", "concerning"),
    *("group_failures", "merge_failures", "name_ranks", "rank_ranges"),
]

_TEXT_CHARACTERS_MAX = 8 << 10
_TEXT_CHARACTERS_MIN = 500
_GATHERED_CHARACTERS_MAX = 16 << 20
"""Of all ranks together, which root holds at once; divided by their number."""
_PROBLEMS_MAX = 1000
_PROBLEM_CHARACTERS_MAX = 500
_LINES_MAX = 20
"""Of all failures together; each has its share, at least one line."""
_GROUPS_MAX = 16
_UNTOLD = "failed in a different way; its own output has the details"


class RemoteTraceback(Exception):
    """Carries the tracebacks of the failing ranks as the cause of an agreed error."""


class _Concern(str):
    """A note on an exception (PEP 678) that the other ranks report too."""

    __slots__ = ()


@contextmanager
def concerning(what: str) -> Iterator[None]:
    """Add to an exception from the block what it concerns, for every report of it.

    Not collective. Thread-safe. For code of the user or of a library, run for one state or
    leaf: its errors say what went wrong, but not for which state or leaf.

    Args:
        what: Such as ``"state 'model'"``; nested blocks are reported outermost first.
    """
    try:
        yield
    except Exception as error:
        # Some classes take no attributes; their errors are reported without the note.
        with suppress(AttributeError, TypeError):
            error.__notes__ = [*_notes_of(error), _Concern(what)]  # type: ignore[attr-defined]
        raise


def capture_failure(
    error: BaseException, *, rank: int, size: int, operation: str
) -> RankFailure:
    """Describe an exception of this rank. Not collective. Thread-safe."""
    # Exceptions of other packages may have any `errno` or `problems`.
    ours = error if isinstance(error, CheckpointError) else None
    share = _GATHERED_CHARACTERS_MAX // size
    length = min(max(share // 4, _TEXT_CHARACTERS_MIN), _TEXT_CHARACTERS_MAX)
    known = ours or (error if isinstance(error, OSError) else None)
    return RankFailure(
        rank=rank,
        size=size,
        host=socket.gethostname(),
        operation=operation,
        kind=type(error).__name__,
        message=_cut(cut_lines(_message_of(error)), length),
        errno=known.errno if known else None,
        path=_path_of(error),
        generation=ours.generation if ours else None,
        problems=_cut_list(ours.problems, share // 2) if ours else [],
        traceback=_cut("".join(traceback.format_exception(error)), length),
    )


@dataclass(frozen=True, slots=True)
class AlikeFailures:
    """One failure that several ranks share.

    Attributes:
        first: The failure of the lowest of them.
        ranks: All of them, in ascending order.
    """

    first: RankFailure
    ranks: tuple[int, ...]

    def text(self, hosts: Sequence[str]) -> str:
        """Return the report of the failure. Not collective. Thread-safe.

        Args:
            hosts: Host names of all ranks.
        """
        if len(self.ranks) == 1:
            return str(self.first)
        alone = f"rank {self.first.rank} of {self.first.size} on {self.first.host}"
        return f"{name_ranks(self.ranks, hosts)}{str(self.first).removeprefix(alone)}"


def name_ranks(ranks: Sequence[int], hosts: Sequence[str]) -> str:
    """Return a list of ranks and their hosts in words. Pure.

    Args:
        ranks: At least one, in ascending order.
        hosts: Host names of all ranks.
    """
    where = sorted({hosts[rank] for rank in ranks})
    on = ", ".join(where) if len(where) <= 2 else f"{len(where):,} hosts"
    if len(ranks) == 1:
        return f"rank {ranks[0]} on {on}"
    return f"ranks {rank_ranges(ranks)} ({len(ranks):,} of {len(hosts):,}) on {on}"


def group_failures(failures: Sequence[RankFailure]) -> list[AlikeFailures]:
    """Group failures that several ranks share, in the order of the lowest ranks.

    Not collective. Thread-safe. If there are more than 16 kinds, the last group holds all
    the rest.

    Args:
        failures: At least one, ordered by rank.
    """
    found: dict[RankFailure, list[int]] = {}
    for failure in failures:
        bare = replace(
            failure, rank=0, host="", problems=tuple(failure.problems), traceback=""
        )
        found.setdefault(bare, []).append(failure.rank)
    by_rank = {failure.rank: failure for failure in failures}
    groups = [AlikeFailures(by_rank[ranks[0]], tuple(ranks)) for ranks in found.values()]
    rest = groups[_GROUPS_MAX - 1 :]
    if len(rest) <= 1:
        return groups
    ranks = tuple(sorted(rank for group in rest for rank in group.ranks))
    untold = replace(by_rank[ranks[0]], message=_UNTOLD, problems=(), traceback="")
    return [*groups[: _GROUPS_MAX - 1], AlikeFailures(untold, ranks)]


def merge_failures(
    groups: Sequence[AlikeFailures],
    default: type[CheckpointError],
    safe: str,
    hosts: Sequence[str],
) -> CheckpointError:
    """Make from the failures of some ranks the one error that all ranks raise.

    Not collective. Thread-safe. The class is that of the lowest failing rank's error if
    this package defines it, else ``default``.

    Args:
        groups: At least one, as `group_failures` gives them.
        default: Class for exceptions that this package does not define.
        safe: A clause that says what is still safe.
        hosts: Host names of all ranks.

    Returns:
        The error. Its ``__cause__`` holds the traceback of the first failing rank, and of
        the first rank that failed in another way.
    """
    first = groups[0].first
    failures = [
        replace(group.first, rank=rank, host=hosts[rank])
        for group in groups
        for rank in group.ranks
    ]
    failures.sort(key=lambda failure: failure.rank)
    share = max(1, _LINES_MAX // len(groups) - 1)
    lines = [cut_lines(group.text(hosts), share) for group in groups]
    error = _class_of(first.kind, default)(
        "\n  ".join([f"{first.operation} failed; {safe}", *lines]),
        path=first.path,
        generation=first.generation,
        errno=first.errno,
        failures=failures,
        # Ranks mostly find the same: each finding is reported once.
        problems=list(
            dict.fromkeys(
                problem
                for group, line in zip(groups, lines, strict=True)
                for problem in group.first.problems or [line]
            )
        ),
    )
    shown = [group.first for group in groups if group.first.traceback][:2]
    error.__cause__ = RemoteTraceback(
        "\n".join(f"\nrank {f.rank} of {f.size} on {f.host}:\n{f.traceback}" for f in shown)
    )
    return error


def rank_ranges(ranks: Sequence[int]) -> str:
    """Return ascending ranks in words: ``0 to 6, 8, 10 to 12``; at most 16 ranges. Pure."""
    spans: list[list[int]] = []
    for rank in ranks:
        if spans and rank == spans[-1][1] + 1:
            spans[-1][1] = rank
        else:
            spans.append([rank, rank])
    texts = [str(a) if a == b else f"{a} to {b}" for a, b in spans]
    more = len(texts) - _GROUPS_MAX
    return ", ".join(texts[:_GROUPS_MAX]) + (
        f" and {more:,} more ranges" if more > 0 else ""
    )


def _cut(text: str, length: int) -> str:
    """Keep the start and the end of a text that is too long to be sent to all ranks."""
    if len(text) <= length:
        return text
    half = length // 2
    left_out = len(text) - 2 * half
    return f"{text[:half]}\n[{left_out:,} characters left out]\n{text[-half:]}"


def _cut_list(problems: Sequence[str], length: int) -> list[str]:
    """Keep the first of a list of texts, as many as fit into a length."""
    cut: list[str] = []
    for problem in problems[:_PROBLEMS_MAX]:
        length -= min(len(problem), _PROBLEM_CHARACTERS_MAX)
        if length < 0 and cut:
            break
        cut.append(problem[:_PROBLEM_CHARACTERS_MAX])
    more = len(problems) - len(cut)
    return [*cut, f"and {more:,} more"] if more > 0 else cut


def _class_of(kind: str, default: type[CheckpointError]) -> type[CheckpointError]:
    found: type[CheckpointError] = vars(errors)[kind] if kind in errors.__all__ else default
    return found


def _message_of(error: BaseException) -> str:
    text = _text_of(error)
    concerns = [note for note in _notes_of(error) if isinstance(note, _Concern)]
    prefixes = [concern for concern in reversed(concerns) if concern not in text]
    return f"{', '.join(prefixes)}: {text}" if prefixes else text


def _notes_of(error: BaseException) -> Sequence[object]:
    notes = getattr(error, "__notes__", ())
    return notes if isinstance(notes, (list, tuple)) else ()


def _text_of(error: BaseException) -> str:
    # The other ranks wait for this text, so making it must not fail.
    try:
        return str(error) or type(error).__name__
    except Exception as failure:
        return f"the error has no text: str() failed ({type(failure).__name__})"


def _path_of(error: BaseException) -> str | None:
    path = getattr(error, "path", None) or getattr(error, "filename", None)
    return None if path is None else str(path)
