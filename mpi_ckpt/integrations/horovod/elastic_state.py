# SPDX-License-Identifier: Apache-2.0
"""Horovod elastic's states, with commits that last."""

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
    """Attributes that are committed together, and brought back together.

    Every attribute without a leading underscore is tracked, also one that is given later:
    modules, optimizers, samplers, anything with ``state_dict`` and ``load_state_dict``,
    the states of this package, and plain values, tensors and arrays, nested as you like.
    `restore` undoes what was changed in place, too. What an attribute holds may be
    replaced at any time; the last commit is then still of what was there before.

    Not collective to make, nor is getting and setting attributes. A context manager that
    closes itself; `run` does so for you.

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
                raise RegistrationError(f"{name!r} means something else in a state")
            self._tracked.check(name, value)
        super().__setattr__(name, value)

    @property
    def commits(self) -> int:
        """Commits made, over all runs; known after the first `sync`. Not collective."""
        return self._commits.count

    def commit(self, *, durable: bool = False) -> None:
        """Save, as `save` does, and look whether the ranks shall stop or meet anew.

        Collective.

        Args:
            durable: Whether it must be on disk when this returns, on any rank.

        Raises:
            HostsUpdatedInterrupt: On every rank, if any was told so; it is committed.
            SystemExit: On every rank, if the job was asked to stop: all is on disk.
            CheckpointError: On every rank, if it failed on any.
        """
        if self._commits.commit("commit()", durable=durable):
            raise hosts_updated()

    def save(self) -> None:
        """Keep what the attributes hold: in memory, and on disk if that is due.

        Collective.

        Raises:
            SystemExit: On every rank, if the job was asked to stop: all is on disk.
            CheckpointError: On every rank, if it failed on any.
        """
        if self._commits.commit("save()", durable=False):
            self._commits.note_hosts_updated()

    def restore(self) -> None:
        """Go back to the last commit, in everything that is tracked.

        Collective.

        Raises:
            NoCheckpointError: On every rank, if there is none.
            CheckpointError: On every rank, for anything else that went wrong.
        """
        self._commits.restore("restore()")

    def sync(self) -> None:
        """Make all ranks equal to root, and let `restore` lead there from now on.

        Collective. The first time in a process, everything is as in the last durable
        commit of an earlier run, whatever its number of ranks, if there is one.

        Raises:
            CheckpointError: On every rank, if it failed on any.
        """
        self._commits.sync("sync()")

    def check_host_updates(self) -> None:
        """Look whether the ranks shall stop or meet anew, as `commit` does besides.

        Collective. Every rank's view counts. A stop saves what the attributes hold now.

        Raises:
            HostsUpdatedInterrupt: On every rank, if any was told so.
            SystemExit: On every rank, if the job was asked to stop: all is on disk.
            CheckpointError: On every rank, if it failed on any.
        """
        if self._commits.check("check_host_updates()"):
            raise hosts_updated()

    def on_hosts_updated(self, timestamp: float = 0, update_res: int = 0) -> None:  # noqa: ARG002 (Horovod's)
        """Have all ranks meet anew when they next look.

        Not collective: any rank may call it. Thread-safe. No launcher of MPI calls it.

        Args:
            timestamp: Not looked at.
            update_res: Not looked at: the ranks are always synced.
        """
        self._commits.note_hosts_updated()

    def register_reset_callbacks(self, callbacks: Iterable[Callable[[], object]]) -> None:
        """Have functions called by `on_reset`. Not collective.

        Args:
            callbacks: Called without arguments, in this order, before the ranks sync.
        """
        self._callbacks.extend(callbacks)

    def on_reset(self) -> None:
        """Adapt to the ranks of now: samplers share out what is left.

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
        """Override to do something whenever the ranks meet anew. Not collective."""

    def close(self) -> None:
        """Commit what there is, durably, and let go of directory and ranks.

        Collective. The state stays usable: its next call brings the ranks of then
        together.

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
            # INVARIANT: one rank alone may be here, so nothing collective.
            self._commits.leave(error)


class TorchState(HorovodState):
    """A `HorovodState` with a model and its optimizer.

    Args:
        model: A module; more of them among the attributes.
        optimizer: Its optimizer, also one wrapped by Horovod.
        attributes: Anything else to begin with; see `HorovodState`.

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
    """Return what is behind a state. Not collective."""
    commits: Commits = vars(state)["_commits"]
    return commits
