# SPDX-License-Identifier: Apache-2.0
"""Gives all ranks one verdict: after local work all ranks go on, or all raise.

INVARIANT: no collective is in a place that one rank alone may fail to reach. These
functions wrap work that can fail; its outcomes meet in one small allreduce, a `Vote`. Ranks
send more only if one has failed, or if root has a result to send.

- `agree`: each rank works, and keeps its own result.
- `on_root`: root works, and every rank gets the result.
- `collect`: each rank gives bytes, root combines them, and every rank gets the result.
- `meet` underlies all three: it also returns whether all ranks have the same result.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, TypeVar

import numpy as np

from mpi_ckpt.comm.broadcast import bcast_buffers
from mpi_ckpt.comm.collectives import bcast_json
from mpi_ckpt.comm.liveness import UNDER_WAY
from mpi_ckpt.comm.rank_tree import gather_bytes, gather_findings
from mpi_ckpt.errors import CheckpointError, CollectiveError, Printing, RankFailure
from mpi_ckpt.failures import (
    AlikeFailures,
    capture_failure,
    group_failures,
    merge_failures,
    name_ranks,
    without_rank,
)
from mpi_ckpt.leaves.digest import DIGEST_BYTES, digest_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from mpi4py import MPI

    from mpi_ckpt.comm.communicator import Communicator


UNTOUCHED = "published generations are untouched"

_NOTHING = bytes(DIGEST_BYTES)
# The message: the flags, both digests, and their complements. Half a digest distinguishes
# the few calls of ranks, and keeps the message below the smallest `message_bytes`.
_DOING, _ALIKE = 1, slice(2, 4)
_DIGESTS, _COMPLEMENTS, _OF_ALIKE = slice(1, 4), slice(4, 7), slice(5, 7)


class Joined(NamedTuple):
    """The outcome of a vote, the same on every rank.

    Attributes:
        flags: The flags that any rank has set.
        is_alike: Whether all ranks gave the same digest.
    """

    flags: int
    is_alike: bool


class Vote:
    """Joins flags over all ranks, again and again, one vote at a time.

    Main thread only. A message is 56 bytes, whatever the flags: ranks that do different
    things must still meet in messages of one length.

    Args:
        comm: The communicator.
        doing: What the ranks meet for; the same on every rank.
    """

    def __init__(self, comm: Communicator, doing: str) -> None:
        self._comm = comm
        self._doing = doing
        self._mine = np.zeros(_COMPLEMENTS.stop, np.uint64)
        self._mine[_DOING] = int.from_bytes(digest_bytes(doing.encode())[:8], "little")
        self._all = np.empty_like(self._mine)
        self._request: MPI.Request | None = None
        self._confusions = 0

    @property
    def is_posted(self) -> bool:
        """Whether a vote is posted; the same on every rank. Not collective."""
        # A confused rank may have posted more votes than another: votes posted before all
        # ranks learned of the confusion do not count.
        return self._request is not None and self._confusions == self._comm.confusions

    def post(self, flags: int, digest: bytes = _NOTHING) -> None:
        """Start a vote. No other vote may be posted.

        Collective. Returns at once.

        Args:
            flags: This rank's flags, as bits of a non-negative number below 2**64.
            digest: 16 bytes, which the ranks compare; empty if this rank has none.
        """
        if self._request is not None:
            # MPI may still write to arrays given up after a confusion.
            self._mine, self._all = self._mine.copy(), self._all.copy()
        self._mine[0] = flags
        self._mine[_ALIKE] = np.frombuffer(digest or _NOTHING, np.uint64)
        self._mine[_COMPLEMENTS] = ~self._mine[_DIGESTS]
        if not digest:  # nothing set on either side differs from no other rank's
            self._mine[_OF_ALIKE] = 0
        self._request = self._comm.start_all_reduce(self._mine, self._all, "bor")
        self._confusions = self._comm.confusions  # if it has been started
        UNDER_WAY.add(self)

    def take(self) -> Joined:
        """Wait for the posted vote.

        Collective.

        Raises:
            CollectiveError: On every live rank, if one never arrives or meets for
                something else.
        """
        request, self._request = self._request, None
        assert request is not None
        UNDER_WAY.discard(self)
        self._comm.wait([request], self._doing, buffers=(self._mine, self._all))
        # A bit that differs between ranks is set in the complement too, after a bitwise or.
        of_calls, *of_values = self._all[_DIGESTS] & self._all[_COMPLEMENTS]
        if of_calls:
            self._refuse_confusion()
        self._comm.note_meeting(self._doing)
        return Joined(int(self._all[0]), not any(of_values))

    def exchange(self, flags: int, digest: bytes = _NOTHING) -> Joined:
        """Vote and wait for the outcome.

        Collective. One allreduce of 56 bytes.

        Raises:
            CollectiveError: On every live rank, as `take` does.
        """
        self.post(flags, digest)
        return self.take()

    def _refuse_confusion(self) -> None:
        comm, doing = self._comm, self._doing
        comm.confusions += 1
        found = gather_findings(comm, digest_bytes(doing.encode()), doing, doing)
        lines = [
            f"{name_ranks(ranks, comm.hosts)}: {text}"
            for text, ranks in found[:_DIFFERENCES_MAX]
        ]
        differing = bcast_json(comm, [*lines, *_and_more(len(found))], doing)
        error = CollectiveError(
            f"the ranks do different things; {UNTOUCHED}. Each collective call must "
            "be made by all ranks, in the same order:\n  " + "\n  ".join(differing),
            problems=differing,
        )
        raise printed_by(comm, error)


Error = TypeVar("Error", bound=CheckpointError)


def printed_by(comm: Communicator, error: Error, *printers: int) -> Error:
    """Return an error that all ranks will raise, with the ranks that print it noted.

    Not collective.

    Args:
        comm: The communicator.
        error: The error, the same on every rank.
        printers: The ranks that print it in full if it is uncaught; none for root.
    """
    by = printers or (comm.root,)
    brief = f"{type(error).__name__}, reported in full by rank {by[0]}"
    error.printing = Printing(comm.name, "" if comm.rank in by else brief)
    return error


Result = TypeVar("Result")

_FAILED, _FLAGGED, _LENGTH_SHIFT = 1, 2, 2
_DIFFERENCES_MAX = 16
_CHARACTERS_MAX = 2000
_ALL_SHOWN = 8  # of a longer list only what differs is shown
_NO_DIGEST = bytes(DIGEST_BYTES)


class Deferred:
    """Keeps a failure between two meetings, to be raised in the next one.

    Not collective. While ranks exchange bytes, a rank that raises alone would leave the
    others waiting: it goes on to the next meeting, and fails there.
    """

    def __init__(self) -> None:
        self._failure: BaseException | None = None

    def attempt(self, work: Callable[[], object]) -> None:
        """Do work; if it fails, keep the failure, unless there is an earlier one."""
        try:
            work()
        except BaseException as error:
            self._failure = self._failure or error

    def raise_failure(self) -> None:
        """Raise the kept failure. Called within the work of a meeting."""
        if self._failure is not None:
            raise self._failure


@dataclass(frozen=True, slots=True)
class Meeting(Generic[Result]):
    """The outcome of work that has succeeded on all ranks.

    Attributes:
        result: What this rank's work returned.
        is_alike: Whether the results of all ranks have one digest.
        message: Bytes that root has sent to all ranks.
        is_flagged: Whether any rank has flagged its result.
    """

    result: Result
    is_alike: bool
    message: bytes
    is_flagged: bool = False


def meet(
    comm: Communicator,
    doing: str,
    work: Callable[[], Result],
    *,
    error: type[CheckpointError],
    safe: str = UNTOUCHED,
    digest: Callable[[Result], bytes] | None = None,
    encode: Callable[[Result], bytes] | None = None,
    flag: Callable[[Result], bool] | None = None,
) -> Meeting[Result]:
    """Do local work on every rank; raise the same error on all if it failed on any.

    Collective. Main thread only. One allreduce of 56 bytes, and a broadcast if root has
    bytes to send.

    Args:
        comm: The communicator.
        doing: The work, for the error.
        work: The work; must not communicate.
        error: Class for exceptions that this package does not define.
        safe: What is still safe if the work fails.
        digest: Returns 16 bytes for a result, which the ranks compare; nothing on a rank
            that has nothing to compare.
        encode: Returns the bytes of its result that root sends to all. Called on root.
        flag: Returns whether a rank's result has a property that all ranks must know of.

    Raises:
        CheckpointError: On every rank, if the work failed on any: in the class of the
            lowest failing rank's error, with the names of all failing ranks.
        CollectiveError: On every live rank, if one never arrives or does other work.
    """
    comm.require_usable()  # before work that is useless unless all ranks meet
    failure: BaseException | None = None
    mine, message, is_flagged = _NO_DIGEST, b"", False
    try:
        result = work()
        if digest is not None:
            mine = digest(result)
        if encode is not None and comm.is_root:
            message = encode(result)
        if flag is not None:
            is_flagged = flag(result)
    # Also KeyboardInterrupt and SystemExit: the other ranks must learn of them.
    except BaseException as caught:
        failure = caught
    # Only root sets the length, so joining the flags of all ranks does not change it.
    flags = (failure is not None) * _FAILED | is_flagged * _FLAGGED
    joined = Vote(comm, doing).exchange(flags | len(message) << _LENGTH_SHIFT, mine)
    if joined.flags & _FAILED:
        agreed = _exchange(comm, doing, failure, error, safe)
        if failure is None:
            raise agreed
        if not isinstance(failure, Exception):
            raise failure
        raise agreed from failure
    length = joined.flags >> _LENGTH_SHIFT
    if length:
        room = bytearray(message or length)
        bcast_buffers(comm, [memoryview(room)], doing)
        message = bytes(room)
    return Meeting(result, joined.is_alike, message, bool(joined.flags & _FLAGGED))


def agree(
    comm: Communicator,
    doing: str,
    work: Callable[[], Result],
    *,
    error: type[CheckpointError],
    safe: str = UNTOUCHED,
) -> Result:
    """Do local work on every rank; raise the same error on all if it failed on any.

    Collective. Main thread only. Arguments and errors are those of `meet`.

    Returns:
        What ``work`` returned on this rank.
    """
    return meet(comm, doing, work, error=error, safe=safe).result


def on_root(
    comm: Communicator,
    doing: str,
    work: Callable[[], Any],
    *,
    error: type[CheckpointError],
    safe: str = UNTOUCHED,
    others: Callable[[], object] = lambda: None,
) -> Any:  # noqa: ANN401 (JSON)
    """Do local work on root alone; all ranks get the result, or raise the same error.

    Collective. Main thread only. Arguments and errors are those of `meet`; ``others`` is
    the work of the other ranks.

    Returns:
        What ``work`` returned on root, JSON values, on every rank.
    """

    def work_on_root() -> Any:  # noqa: ANN401
        return work() if comm.is_root else others()

    met = meet(comm, doing, work_on_root, error=error, safe=safe, encode=_encode)
    return json.loads(met.message) if met.message else None


def collect(
    comm: Communicator,
    doing: str,
    part: Callable[[], bytes],
    combine: Callable[[list[bytes]], Any],
    *,
    error: type[CheckpointError],
    safe: str = UNTOUCHED,
) -> Any:  # noqa: ANN401 (JSON)
    """Gather the bytes of all ranks on root, which combines them; all get the result.

    Collective. Main thread only.

    Args:
        comm: The communicator.
        doing: The work, for the error.
        part: Returns this rank's bytes. Must not communicate.
        combine: Makes JSON values of all ranks' bytes, in rank order. Called on root.
        error: Class for exceptions that this package does not define.
        safe: What is still safe if the work fails.

    Raises:
        CheckpointError: On every rank, if ``part`` or ``combine`` failed on any.
        CollectiveError: On every live rank, if one never arrives or does other work.
    """
    mine = agree(comm, doing, part, error=error, safe=safe)
    parts = gather_bytes(comm, mine, doing)
    return on_root(comm, doing, lambda: combine(parts), error=error, safe=safe)


def any_of(comm: Communicator, doing: str, *flags: bool) -> tuple[bool, ...]:
    """Return whether each of some flags is set on any rank.

    Collective. Main thread only. One allreduce of 56 bytes, however many flags.

    Args:
        comm: The communicator.
        doing: What the ranks meet for; the same on every rank.
        flags: At most 64.

    Raises:
        CollectiveError: On every live rank, if one never arrives or meets for something
            else.
    """
    mine = sum(1 << place for place, flag in enumerate(flags) if flag)
    joined = Vote(comm, doing).exchange(mine).flags
    return tuple(bool(joined >> place & 1) for place in range(len(flags)))


def compare_texts(comm: Communicator, doing: str, texts: Sequence[str]) -> list[str]:
    """Return how lists of text differ between ranks; empty if they do not differ.

    Collective. Main thread only. If all are equal, it costs one small allreduce.

    Args:
        comm: The communicator.
        doing: What the ranks meet for, for the error if one never arrives.
        texts: This rank's list.

    Returns:
        A line for each list that differs from root's, for 16 at most; the same on every
        rank.

    Raises:
        CollectiveError: On every live rank, if one never arrives.
    """
    encoded = json.dumps(list(texts)).encode()
    if not differing_digests(comm, [digest_bytes(encoded)], doing).any():
        return []
    found = gather_findings(comm, digest_bytes(encoded), encoded.decode(), doing)
    lines: list[str] = bcast_json(comm, _differences(comm, found), doing)
    return lines


def _differences(comm: Communicator, found: Sequence[tuple[str, list[int]]]) -> list[str]:
    """Return a line for each list that differs from root's; on root, elsewhere nothing."""
    (roots, _), *others = found or [("[]", [])]
    lines = []
    for text, ranks in others[:_DIFFERENCES_MAX]:
        mine, theirs = json.loads(roots), json.loads(text)
        lines.append(
            f"{name_ranks(ranks, comm.hosts)} {'has' if len(ranks) == 1 else 'have'} "
            f"{_shortened(theirs, mine)}, root has {_shortened(mine, theirs)}"
        )
    return [*lines, *_and_more(len(others))]


def _and_more(count: int) -> list[str]:
    """Return a line for what a list of so many does not show."""
    more = count - _DIFFERENCES_MAX
    return [f"and {more:,} more"] if more > 0 else []


def _shortened(texts: Sequence[str], others: Sequence[str]) -> str:
    """Return a list as text; of a long one only what differs from one as long."""
    if len(texts) == len(others) > _ALL_SHOWN:
        texts = [text for text, other in zip(texts, others, strict=True) if text != other]
    text = str(texts)
    if len(text) <= _CHARACTERS_MAX:
        return text
    return f"{text[:_CHARACTERS_MAX]}... ({len(texts):,} in all)"


def differing_digests(
    comm: Communicator, digests: Sequence[bytes], doing: str
) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
    """Return which digests of a list differ between ranks.

    Collective. Main thread only. One allreduce of 32 bytes a digest: the minimum and,
    as the minimum of the complements, the maximum.

    Args:
        comm: The communicator.
        digests: 16 bytes each, or several in a row; as many on every rank.
        doing: What the ranks meet for, for the error if one never arrives.

    Returns:
        One truth value for each digest, the same on every rank.

    Raises:
        CollectiveError: On every live rank, if one never arrives.
    """
    mine = np.frombuffer(b"".join(digests), np.uint64)
    if comm.size == 1 or len(mine) == 0:
        return np.zeros(len(mine) // 2, np.bool_)
    least = comm.all_reduce(np.concatenate([mine, ~mine]), "min", doing)
    differs = least[: len(mine)] != ~least[len(mine) :]
    found: np.ndarray[tuple[int], np.dtype[np.bool_]] = differs.reshape(-1, 2).any(axis=1)
    return found


def _exchange(
    comm: Communicator,
    doing: str,
    failure: BaseException | None,
    default: type[CheckpointError],
    safe: str,
) -> CheckpointError:
    key, text = b"", ""
    if failure is not None:
        mine = capture_failure(failure, rank=comm.rank, size=comm.size, operation=doing)
        key = digest_bytes(json.dumps(without_rank(mine).to_json()).encode())
        text = json.dumps(mine.to_json())
    found = gather_findings(comm, key, text, doing)
    kinds = [
        (RankFailure(**json.loads(text)) if text else None, ranks) for text, ranks in found
    ]
    groups = group_failures(kinds)
    sent = bcast_json(comm, [[g.first.to_json(), g.ranks] for g in groups], doing)
    agreed = [AlikeFailures(RankFailure(**first), tuple(ranks)) for first, ranks in sent]
    error = merge_failures(agreed, default, safe, comm.hosts)
    return printed_by(comm, error, error.failures[0].rank, comm.root)


def _encode(value: Any) -> bytes:  # noqa: ANN401 (JSON)
    return b"" if value is None else json.dumps(value).encode()
