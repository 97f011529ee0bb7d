# SPDX-License-Identifier: Apache-2.0
"""What makes a run go back to the last commit, or meet anew: Horovod's exceptions, or ours.

Horovod is not imported here: its exceptions can only be raised once it was.
"""

from __future__ import annotations

import sys
from typing import Any

from mpi_ckpt.errors import CollectiveError

__all__ = [
    *("HostsUpdatedInterrupt", "RollBackError", "hosts_updated", "roll_backs", "updates"),
]

_EXCEPTIONS = "horovod.common.exceptions"


class RollBackError(CollectiveError):
    """Raised by a program on any rank: all ranks of a run go back to the last commit.

    Raised on all by a state whose ranks call different methods of it.
    """


class HostsUpdatedInterrupt(RuntimeError):
    """The ranks shall meet anew, with the values they have: what Horovod raises so.

    Args:
        skip_sync: As in Horovod; not looked at here, where ranks are always synced.
    """

    def __init__(self, skip_sync: bool = False) -> None:
        super().__init__("the ranks meet anew")
        self.skip_sync = skip_sync


def roll_backs() -> tuple[type[Exception], ...]:
    """Return the exceptions after which a run goes back. Not collective."""
    return (RollBackError, *_of_horovod("HorovodInternalError"))


def updates() -> tuple[type[Exception], ...]:
    """Return the exceptions after which the ranks of a run meet anew. Not collective."""
    return (HostsUpdatedInterrupt, *_of_horovod("HostsUpdatedInterrupt"))


def hosts_updated() -> Exception:
    """Make the exception that a program waits for: Horovod's, if it uses that.

    Not collective.
    """
    return updates()[-1](False)


def _of_horovod(name: str) -> tuple[type[Exception], ...]:
    known: Any = sys.modules.get(_EXCEPTIONS)
    return () if known is None else (getattr(known, name),)
