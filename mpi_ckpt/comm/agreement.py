# SPDX-License-Identifier: Apache-2.0
"""One verdict for all ranks: local work, then every rank goes on or every rank raises.

INVARIANT: no collective stands where one rank alone may not reach it. What can fail is
wrapped here; the outcomes meet in one small allreduce (`mpi_ckpt.comm.vote`); only if one
failed is more said.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from mpi_ckpt.comm.transfer import bcast_json, gather_bytes
from mpi_ckpt.comm.vote import UNTOUCHED, Vote
from mpi_ckpt.digest import digest_bytes
from mpi_ckpt.errors import (
    CheckpointError,
    RankFailure,
    merge_failures,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from mpi_ckpt.comm.communicator import Communicator

__all__ = ["agree", "agree_on_root", "any_of", "compare_texts", "differing_digests"]

Result = TypeVar("Result")


def agree(
    comm: Communicator,
    doing: str,
    work: Callable[[], Result],
    *,
    error: type[CheckpointError],
    safe: str = UNTOUCHED,
) -> Result:
    """Do local work on every rank; raise the same error on all if it failed on any.

    Collective. Main thread only.

    Args:
        comm: The communicator.
        doing: The work, told in the error.
        work: Must not communicate.
        error: Class for failures from outside this package's family.
        safe: What is still safe when the work failed.

    Returns:
        What ``work`` returned on this rank.

    Raises:
        CheckpointError: On every rank, if the work failed on any: the class of the
            lowest failing rank, naming all of them.
        CollectiveError: On every live rank, if one never arrives or does other work.
    """
    failure: BaseException | None = None
    try:
        result = work()
    # Also KeyboardInterrupt and SystemExit: the others must hear of them.
    except BaseException as caught:
        failure = caught
    (failed,) = any_of(comm, doing, failure is not None)
    if not failed:
        return result
    agreed = _exchange(comm, doing, failure, error, safe)
    if failure is None:
        raise agreed
    if not isinstance(failure, Exception):
        raise failure
    raise agreed from failure


def agree_on_root(
    comm: Communicator,
    doing: str,
    work: Callable[[], Result],
    *,
    error: type[CheckpointError],
    safe: str = UNTOUCHED,
) -> Result | None:
    """Do local work on root alone; raise the same error on all ranks if it failed.

    Collective. Main thread only.

    Args:
        comm: The communicator.
        doing: The work, told in the error.
        work: Done on root; must not communicate.
        error: Class for failures from outside this package's family.
        safe: What is still safe when the work failed.

    Returns:
        What ``work`` returned, on root; None elsewhere.

    Raises:
        CheckpointError: On every rank, if the work failed.
        CollectiveError: On every live rank, if one never arrives.
    """

    def on_root() -> Result | None:
        return work() if comm.is_root else None

    return agree(comm, doing, on_root, error=error, safe=safe)


def any_of(comm: Communicator, doing: str, *flags: bool) -> tuple[bool, ...]:
    """Tell whether each of some flags is set on any rank.

    Collective. Main thread only. One allreduce of 40 bytes, however many flags.

    Args:
        comm: The communicator.
        doing: What the ranks meet for; the same on every rank.
        flags: At most 64.

    Raises:
        CollectiveError: On every live rank, if one never arrives or meets for something
            else.
    """
    mine = sum(1 << place for place, flag in enumerate(flags) if flag)
    joined = Vote(comm, doing).exchange(mine)
    return tuple(bool(joined >> place & 1) for place in range(len(flags)))


def compare_texts(comm: Communicator, doing: str, texts: Sequence[str]) -> list[str]:
    """Tell how lists of text differ between ranks; an empty answer means not at all.

    Collective. Main thread only. When all are equal it costs one small allreduce.

    Args:
        comm: The communicator.
        doing: What the ranks meet for, told when one does not come.
        texts: This rank's list.

    Returns:
        One line for each rank whose list is not root's; the same on every rank.

    Raises:
        CollectiveError: On every live rank, if one never arrives.
    """
    encoded = json.dumps(list(texts)).encode()
    if not differing_digests(comm, [digest_bytes(encoded)], doing).any():
        return []
    gathered = [json.loads(one) for one in gather_bytes(comm, encoded, doing)]
    lines = [
        f"rank {rank} on {comm.hosts[rank]} has {theirs}, root has {gathered[comm.root]}"
        for rank, theirs in enumerate(gathered)
        if theirs != gathered[comm.root]
    ]
    found: list[str] = bcast_json(comm, lines, doing)
    return found


def differing_digests(
    comm: Communicator, digests: Sequence[bytes], doing: str
) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
    """Tell which of a list of digests are not equal on all ranks.

    Collective. Main thread only. One allreduce of 32 bytes a digest: the minimum and,
    as the minimum of the complements, the maximum.

    Args:
        comm: The communicator.
        digests: 16 bytes each; as many on every rank.
        doing: What the ranks meet for, told when one does not come.

    Returns:
        One truth value for each digest, the same on every rank.

    Raises:
        CollectiveError: On every live rank, if one never arrives.
    """
    mine = np.frombuffer(b"".join(digests), np.uint64)
    if comm.size == 1 or len(mine) == 0:
        return np.zeros(len(digests), np.bool_)
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
    mine = None
    if failure is not None:
        mine = RankFailure.capture(
            failure, rank=comm.rank, size=comm.size, operation=doing
        ).to_json()
    gathered = gather_bytes(comm, json.dumps(mine).encode(), doing)
    failed = [record for one in gathered if (record := json.loads(one)) is not None]
    agreed = bcast_json(comm, failed, doing)
    return merge_failures([RankFailure(**record) for record in agreed], default, safe)
