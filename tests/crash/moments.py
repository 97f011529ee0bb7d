# SPDX-License-Identifier: Apache-2.0
"""Stand-ins that act once, before, inside or after one chosen change or collective.

What they do then is given: a process is killed, or power is cut.
"""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import os
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mpi4py import MPI

from mpi_ckpt.comm.communicator import Communicator

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

MOMENTS = ("before", "inside", "after")

_CHANGES = frozenset(
    {
        "mkdir",
        "pwrite",
        "posix_fallocate",
        "ftruncate",
        "fsync",
        "rename",
        "link",
        "unlink",
        "rmdir",
    }
)
_COLLECTIVES = (
    *("Iallreduce", "Iallgather", "Ibcast", "Igather"),
    *("Iscatter", "Isend", "Irecv"),
)
_ALIGNED = 4096


@dataclass(frozen=True)
class Moment:
    """When to act: at the ``number``-th call, counted from 1; 0 for never."""

    number: int
    when: str


class Changes:
    """An ``os`` that counts changes of the file system, and acts at one of them.

    Args:
        moment: When to act. Inside a write half of its bytes are written; any other call
            is one system call, and what is done is done from a thread while it runs.
        act: What to do then.

    Attributes:
        count: Number of changes so far.
    """

    def __init__(self, moment: Moment, act: Callable[[], None]) -> None:
        self.count = 0
        self._numbers = itertools.count(1)  # right from several threads
        self._moment, self._act = moment, act

    def __getattr__(self, name: str) -> Any:
        function = getattr(os, name)
        return self._counted(function) if name in _CHANGES else function

    def open(self, path: Any, flags: int, mode: int = 0o777) -> int:
        if flags & os.O_CREAT:
            return self._counted(os.open)(path, flags, mode)
        return os.open(path, flags, mode)

    def _counted(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            number = next(self._numbers)
            self.count = max(number, self.count)
            self._act_if(number, "before")
            if self._moment != Moment(number, "inside"):
                result = function(*args, **kwargs)
            elif function is os.pwrite:
                result = self._act_in_mid_write(*args)
            else:
                with _beside(self._act):
                    result = function(*args, **kwargs)
            self._act_if(number, "after")
            return result

        return call

    def _act_if(self, number: int, when: str) -> None:
        if self._moment == Moment(number, when):
            self._act()

    def _act_in_mid_write(self, descriptor: int, data: Any, offset: int) -> int:
        view = memoryview(data).cast("B")
        is_direct = fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT
        unit = _ALIGNED if is_direct else 1
        half = len(view) // unit // 2 * unit
        done = os.pwrite(descriptor, view[:half], offset) if half else 0
        self._act()
        return done + os.pwrite(descriptor, view[done:], offset + done)


@contextlib.contextmanager
def _beside(act: Callable[[], None]) -> Iterator[None]:
    """Act from another thread while the block runs."""
    thread = threading.Thread(target=act)
    thread.start()
    try:
        yield
    finally:
        thread.join()


class Collectives:
    """Counts this rank's part in communication, and acts at one of them.

    While it is entered every wait of the library counts, and every message that it posts
    on a communicator made by `watch`: before is before it is posted, inside is when it is
    posted and not yet waited for, after is behind the wait.

    Args:
        moment: When to act.
        act: What to do then.

    Attributes:
        count: Number of posts and waits so far.
    """

    def __init__(self, moment: Moment, act: Callable[[], None]) -> None:
        self.count = 0
        self._moment, self._act = moment, act

    def watch(self, comm: MPI.Intracomm) -> MPI.Intracomm:
        """Return the communicator as one whose duplicates are counted."""
        counted = {name: self._posting(name) for name in _COLLECTIVES}
        # mpi4py makes a duplicate of the class of what it duplicates.
        return type("Watched", (MPI.Intracomm,), counted)(comm)

    def __enter__(self) -> Collectives:
        self._wait = Communicator.wait
        Communicator.wait = self._waiting(self._wait)  # type: ignore[method-assign]
        return self

    def __exit__(self, *_: object) -> None:
        Communicator.wait = self._wait  # type: ignore[method-assign]

    def _posting(self, name: str) -> Callable[..., Any]:
        function = getattr(MPI.Intracomm, name)

        def post(*args: Any, **kwargs: Any) -> Any:
            self.count += 1
            self._act_if("before")
            request = function(*args, **kwargs)
            self._act_if("inside")
            return request

        return post

    def _waiting(self, function: Callable[..., None]) -> Callable[..., None]:
        def wait(*args: Any, **kwargs: Any) -> None:
            function(*args, **kwargs)
            self._act_if("after")

        return wait

    def _act_if(self, when: str) -> None:
        if self._moment == Moment(self.count, when):
            self._act()
