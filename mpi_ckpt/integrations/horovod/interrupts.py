# SPDX-License-Identifier: Apache-2.0
"""Defines the exceptions that make a run go back or meet again, Horovod's or its own.

Horovod is not imported here: its exceptions can only be raised after the program has
imported it.
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

    A state raises it on all ranks if they call different methods of it.
    """


class HostsUpdatedInterrupt(RuntimeError):
    """The ranks must meet again and keep their values, as in Horovod.

    Args:
        skip_sync: As in Horovod; ignored here, since ranks are always synced.
    """

    def __init__(self, skip_sync: bool = False) -> None:
        super().__init__("the ranks meet again")
        self.skip_sync = skip_sync


def roll_backs() -> tuple[type[Exception], ...]:
    """Return the exceptions after which a run goes back. Not collective."""
    return (RollBackError, *_of_horovod("HorovodInternalError"))


def updates() -> tuple[type[Exception], ...]:
    """Return the exceptions after which the ranks of a run meet again. Not collective."""
    return (HostsUpdatedInterrupt, *_of_horovod("HostsUpdatedInterrupt"))


def hosts_updated() -> Exception:
    """Make the exception that a program expects: Horovod's, if it uses Horovod.

    Not collective.
    """
    return updates()[-1](False)


def _of_horovod(name: str) -> tuple[type[Exception], ...]:
    known: Any = sys.modules.get(_EXCEPTIONS)
    return () if known is None else (getattr(known, name),)
