# SPDX-License-Identifier: Apache-2.0
"""Merges the failures of several ranks into one error, the same on all ranks.

A failure that many ranks share is reported once, and the messages are bounded. Otherwise
each of a thousand ranks would receive, and print, a thousand reports.
"""

from __future__ import annotations

import socket
import traceback
from collections.abc import Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from itertools import chain
from typing import TYPE_CHECKING, Any, overload

import numpy as np

from mpi_ckpt import errors
from mpi_ckpt.errors import CheckpointError, RankFailure, cut_lines

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = [
    *("AlikeFailures", "RemoteTraceback", "capture_failure", "concerning"),
    *("group_failures", "merge_failures", "name_ranks", "rank_ranges", "without_rank"),
]

_TEXT_CHARACTERS_MAX = 8 << 10
_PROBLEMS_CHARACTERS_MAX = 8 << 20
"""Of all failures together. Ranks that fail alike send them once, and no rank holds more
than 34 different ones."""
_DIFFERENT_MAX = 64
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
    length = _TEXT_CHARACTERS_MAX
    share = _PROBLEMS_CHARACTERS_MAX // min(size, _DIFFERENT_MAX)
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
        problems=_cut_list(ours.problems, share) if ours else [],
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


def without_rank(failure: RankFailure) -> RankFailure:
    """Return what two ranks that fail alike have in common. Pure."""
    return replace(failure, rank=0, host="", problems=tuple(failure.problems), traceback="")


def group_failures(
    kinds: Sequence[tuple[RankFailure | None, Sequence[int]]],
) -> list[AlikeFailures]:
    """Return the failures that an error reports, in the order of the lowest ranks.

    Not collective. Thread-safe. If there are more than 16 kinds, the last group holds all
    the rest.

    Args:
        kinds: Each kind of failure, in this order: that of its lowest rank, which may be
            unknown for all after the first 16; and its ranks, ascending.
    """
    told = kinds[: _GROUPS_MAX - (len(kinds) > _GROUPS_MAX)]
    groups = [AlikeFailures(first, tuple(ranks)) for first, ranks in told if first]
    rest = kinds[len(told) :]
    if rest and rest[0][0]:
        ranks = tuple(sorted(chain.from_iterable(ranks for _, ranks in rest)))
        first = replace(rest[0][0], message=_UNTOLD, problems=(), traceback="")
        groups.append(AlikeFailures(first, ranks))
    return groups


class RankFailures(Sequence[RankFailure]):
    """The failures of all failing ranks, in rank order, each made when it is read.

    Not collective. All ranks raise the error: so many records on each would take more
    memory on a host than the failures of the job are worth.

    Args:
        groups: As `group_failures` gives them.
        hosts: Host names of all ranks.
    """

    def __init__(self, groups: Sequence[AlikeFailures], hosts: Sequence[str]) -> None:
        self._groups, self._hosts = tuple(groups), hosts
        ranks = np.concatenate([np.array(group.ranks, np.int64) for group in groups])
        order = np.argsort(ranks)
        self._ranks = ranks[order]
        self._group_of = np.repeat(
            np.arange(len(groups)), [len(group.ranks) for group in groups]
        )[order]

    def __len__(self) -> int:
        return len(self._ranks)

    @overload
    def __getitem__(self, index: int) -> RankFailure: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[RankFailure]: ...
    def __getitem__(self, index: int | slice) -> RankFailure | Sequence[RankFailure]:
        if isinstance(index, slice):
            return tuple([self[at] for at in range(*index.indices(len(self)))])
        rank = int(self._ranks[index])
        first: RankFailure = self._groups[self._group_of[index]].first
        return replace(first, rank=rank, host=self._hosts[rank])

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and tuple(self) == tuple(other)

    __hash__ = None  # type: ignore[assignment]

    def __reduce__(self) -> tuple[Any, ...]:
        return tuple, (list(self),)


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
    share = max(1, _LINES_MAX // len(groups) - 1)
    lines = [cut_lines(group.text(hosts), share) for group in groups]
    error = _class_of(first.kind, default)(
        "\n  ".join([f"{first.operation} failed; {safe}", *lines]),
        path=first.path,
        generation=first.generation,
        errno=first.errno,
        failures=RankFailures(groups, hosts),
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
