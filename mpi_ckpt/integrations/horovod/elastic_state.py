# SPDX-License-Identifier: Apache-2.0
"""Provides Horovod elastic's states, with durable commits."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mpi_ckpt.errors import RegistrationError
from mpi_ckpt.integrations.horovod.commits import Commits
from mpi_ckpt.integrations.horovod.interrupts import hosts_updated
from mpi_ckpt.integrations.horovod.tracked import Tracked, tracked_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    import torch
    from typing_extensions import Self

__all__ = ["HorovodState", "TorchState", "commits_of"]


class HorovodState:
    """Attributes that are committed together and restored together.

    Every attribute without a leading underscore is tracked, also one added later: modules,
    optimizers, samplers, anything with ``state_dict`` and ``load_state_dict``, the states
    of this package, and plain values, tensors and arrays, in any nesting. `restore` also
    undoes changes in place. An attribute may get a new value at any time; the last commit
    then still holds the previous value.

    Not collective to make, nor is getting and setting attributes. A context manager that
    closes the state; `run` closes it for you.

    Args:
        attributes: The values to begin with.

    Raises:
        RegistrationError: On the rank that sets an attribute, if it cannot be saved, or
            its name is taken by a method.
    """

    def __init__(self, **attributes: Any) -> None:  # noqa: ANN401 (any value)
        self._tracked = Tracked(self)
        self._commits = Commits(self._tracked)
        self._callbacks: list[Callable[[], object]] = []
        for name, value in attributes.items():
            setattr(self, name, value)
        self._tracked.declared = frozenset(tracked_of(self))

    def __setattr__(self, name: str, value: Any) -> None:  # noqa: ANN401 (any value)
        if not name.startswith("_"):
            if hasattr(HorovodState, name):
                raise RegistrationError(
                    f"{name!r} has another meaning in a state: choose another name"
                )
            self._tracked.check(name, value)
        super().__setattr__(name, value)

    @property
    def commits(self) -> int:
        """Number of commits in all runs; known after the first `sync`. Not collective."""
        return self._commits.count

    def commit(self, *, durable: bool = False) -> None:
        """Save, as `save` does, and check whether the ranks must stop or meet again.

        Collective.

        Args:
            durable: Whether it must be on disk when this returns, on any rank.

        Raises:
            HostsUpdatedInterrupt: On every rank, if any rank was told to; the state is
                committed.
            SystemExit: On every rank, after a request to stop: all is on disk.
            CheckpointError: On every rank, if it failed on any.
        """
        if self._commits.commit("commit()", durable=durable):
            raise hosts_updated()

    def save(self) -> None:
        """Save the values of the attributes: in memory, and on disk if that is due.

        Collective.

        Raises:
            SystemExit: On every rank, after a request to stop: all is on disk.
            CheckpointError: On every rank, if it failed on any.
        """
        if self._commits.commit("save()", durable=False):
            self._commits.note_hosts_updated()

    def restore(self) -> None:
        """Restore all tracked attributes from the last commit.

        Collective.

        Raises:
            NoCheckpointError: On every rank, if there is none.
            CheckpointError: On every rank, for any other failure.
        """
        self._commits.restore("restore()")

    def sync(self) -> None:
        """Make all ranks equal to root, and make that the commit for `restore`.

        Collective. The first call in a process restores the last durable commit of an
        earlier run, with any number of ranks, if there is one.

        Raises:
            CheckpointError: On every rank, if it failed on any.
        """
        self._commits.sync("sync()")

    def check_host_updates(self) -> None:
        """Check whether the ranks must stop or meet again, without a commit.

        Collective. A request on any rank counts. A stop saves the present values of the
        attributes.

        Raises:
            HostsUpdatedInterrupt: On every rank, if any rank was told to.
            SystemExit: On every rank, after a request to stop: all is on disk.
            CheckpointError: On every rank, if it failed on any.
        """
        if self._commits.check("check_host_updates()"):
            raise hosts_updated()

    def on_hosts_updated(self, timestamp: float = 0, update_res: int = 0) -> None:  # noqa: ARG002 (Horovod's)
        """Make all ranks meet again at their next check.

        Not collective: any rank may call it. Thread-safe. No MPI launcher calls it.

        Args:
            timestamp: Ignored.
            update_res: Ignored: the ranks are always synced.
        """
        self._commits.note_hosts_updated()

    def register_reset_callbacks(self, callbacks: Iterable[Callable[[], object]]) -> None:
        """Register functions that `on_reset` calls. Not collective.

        Args:
            callbacks: Functions called without arguments, in this order, before the ranks
                sync.
        """
        self._callbacks.extend(callbacks)

    def on_reset(self) -> None:
        """Adapt to the present ranks: samplers divide the rest of the epoch.

        Collective. Then calls `reset` and the callbacks.

        Raises:
            CheckpointError: On every rank, if the ranks cannot meet.
        """
        self._commits.open()
        self._tracked.place(self._commits.ranks)
        self.reset()
        for callback in self._callbacks:
            callback()

    def reset(self) -> None:
        """Override to run code whenever the ranks meet again. Not collective."""

    def close(self) -> None:
        """Commit durably, and release directory and ranks.

        Collective. The state stays usable: its next call makes the ranks of that time meet.

        Raises:
            CheckpointError: On every rank, if it failed on any.
        """
        self._commits.finish()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, _: object, error: BaseException | None, *__: object) -> None:
        if error is None:
            self.close()
        else:
            # INVARIANT: one rank alone may be here, so no collective.
            self._commits.leave(error)


class TorchState(HorovodState):
    """A `HorovodState` with a model and its optimizer.

    Args:
        model: A module; further ones may be attributes.
        optimizer: Its optimizer, wrapped by Horovod or not.
        attributes: Further initial values; see `HorovodState`.

    Raises:
        RegistrationError: On the rank that sets an attribute, if it cannot be saved, or
            its name is taken by a method.
    """

    def __init__(
        self,
        model: torch.nn.Module | None = None,
        optimizer: torch.optim.Optimizer | None = None,
        **attributes: Any,  # noqa: ANN401 (any value)
    ) -> None:
        super().__init__(model=model, optimizer=optimizer, **attributes)


def commits_of(state: HorovodState) -> Commits:
    """Return the commits of a state. Not collective."""
    commits: Commits = vars(state)["_commits"]
    return commits
