# SPDX-License-Identifier: Apache-2.0
"""Drop-in for ``adaptdl.checkpoint``: change the import line, keep the code.

``MPI_CKPT_DIR`` names the directory, else ``ADAPTDL_CHECKPOINT_PATH``, else `configure`.
docs/adaptdl.md lists what is the same and what is better.

``State``, ``Accumulator`` and the epoch functions keep one registry for the process, as
adaptdl's users expect. Everything else in this package has no global state.
"""

from __future__ import annotations

import atexit
import os
import re
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mpi_ckpt import state as contract
from mpi_ckpt.elastic import accumulator, epochs
from mpi_ckpt.errors import RegistrationError
from mpi_ckpt.manager import CheckpointManager
from mpi_ckpt.options import Options, StopWhen
from mpi_ckpt.storage.format.layout import check_names_differ
from mpi_ckpt.storage.notes import Notes

if TYPE_CHECKING:
    from collections.abc import Iterator
    from os import PathLike

    from mpi4py import MPI

__all__ = [
    "Accumulator",
    "State",
    "close",
    "configure",
    "current_epoch",
    "finished_epochs",
    "load_state",
    "register",
    "remaining_epochs_until",
    "save_all_states",
    "save_state",
    "unregister",
]

_EPOCHS = ".adaptdl-epoch"
_ACCUMULATOR = re.compile(r"adaptdl-accumulator-epoch(\d+)-\d+")


class _Surface:
    """The registry of the process and its managers, one for each directory."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.states: dict[str, contract.State] = {}
        self.managers: dict[Path | None, CheckpointManager] = {}
        self.accumulators: Counter[int | None] = Counter()
        self.seen: set[str] = set()
        self.directory: Path | None = None
        self.comm: MPI.Intracomm | None = None
        self.options: Options | None = None

    def find_directory(self) -> Path | None:
        given = os.environ.get("MPI_CKPT_DIR") or os.environ.get("ADAPTDL_CHECKPOINT_PATH")
        return Path(given).absolute() if given else self.directory

    def manager(self, directory: Path | None) -> CheckpointManager:
        """Return the manager of a directory, with the states registered now."""
        if directory not in self.managers:
            # Without a directory, states are only synced: nothing is read or written.
            if not self.managers:
                atexit.register(self.note_end)
            self.managers[directory] = CheckpointManager(
                directory or Path(os.devnull),
                comm=self.comm,
                options=self.options or _default_options(),
            )
        manager = self.managers[directory]
        for name in manager.names:
            manager.remove(name)
        for state in self.states.values():
            manager.add(state)
        return manager

    def note_end(self) -> None:
        """Report the end of the program to `mpi-ckpt run`. Not collective."""
        # Programs for adaptdl close nothing. ``sys.last_value`` is set unless the program
        # ended by its last line or by sys.exit, whose code the restart loop sees.
        if getattr(sys, "last_value", None) is None:
            notes = Notes.from_environment()
            for directory, manager in self.managers.items():
                if manager.is_root:
                    where = str(directory or os.devnull)
                    notes.add("finished", step=manager.steps, directory=where)


def _default_options() -> Options:
    # adaptdl's checkpoint module leaves signals alone and accepts any set of states. No
    # program calls ``step()`` here, so no program would notice a request to stop.
    nothing = StopWhen(wall_time=False, halt_file=None)
    return replace(Options.from_env(), strict=False, preemption_signals=(), stop=nothing)


class RegisteredState(contract.State):
    """A named piece of training that registers itself when it is made.

    Override `save`, `load` and `sync`. The registry keeps it until `unregister`.

    Args:
        name: Unique in the process; see `mpi_ckpt.State` for what it may be.

    Raises:
        RegistrationError: On every rank that makes it, if the name is illegal or taken
            (a ValueError, as in adaptdl).
    """

    def __init__(self, name: str) -> None:
        super().__init__(name)
        register(self)


State = RegisteredState
"""As adaptdl calls it."""


def configure(
    directory: str | PathLike[str] | None = None,
    *,
    comm: MPI.Intracomm | None = None,
    options: Options | None = None,
) -> None:
    """Set the options, and the directory to use if no environment variable names one.

    Not collective, but every rank must do the same, before the first save or load.

    Args:
        directory: The checkpoint directory; None for none.
        comm: Communicator of the ranks that train; None for all ranks.
        options: Options of the managers. Default: `Options.from_env`, but not strict and
            without signal handlers.
    """
    _surface.directory = None if directory is None else Path(directory).absolute()
    _surface.comm = comm
    _surface.options = options


def register(state: contract.State) -> None:
    """Register a state that does not register itself, so that `save_all_states` saves it.

    Not collective, but every rank must register the same, in the same order.

    Raises:
        RegistrationError: On every rank that calls, if its name is taken.
    """
    check_names_differ([*_surface.states, state.name])
    _surface.states[state.name] = state
    _surface.seen.add(state.name)


def unregister(state: contract.State) -> None:
    """Forget a state: it is no longer saved, and its memory can be freed.

    Not collective, but every rank must do the same.

    Raises:
        RegistrationError: On every rank that calls, if it is not registered.
    """
    if _surface.states.get(state.name) is not state:
        raise RegistrationError(f"state {state.name!r} is not registered")
    del _surface.states[state.name]


def save_all_states() -> str | None:
    """Sync and save every state whose ``skip`` is false, as one new generation.

    Collective. (adaptdl's text says "whose skip is True", which is wrong, and its states
    have no such attribute.) The new generation also takes over saved states that this run
    has not made yet, so a state made late still finds its contents. Without a directory,
    states are synced only.

    Returns:
        The directory of the new generation on root, None elsewhere.

    Raises:
        CheckpointError: On every rank, if the save failed on any.
    """
    directory = _surface.find_directory()
    manager = _surface.manager(directory)
    if directory is None:
        manager.sync()
        return None
    names = [state.name for state in _surface.states.values() if not state.skip]
    report = manager.save(only=names, carry=_may_still_come).wait()
    return str(report.path) if manager.is_root else None


def save_state(
    state: contract.State, checkpoint_dir: str | PathLike[str], sync: bool = True
) -> None:
    """Save one state in a new generation; the other states come from the newest one.

    Collective.

    Args:
        state: A registered state; its ``skip`` is ignored.
        checkpoint_dir: Directory of the generations.
        sync: Whether to sync the state first.

    Raises:
        CheckpointError: On every rank, if the save failed on any.
    """
    manager = _surface.manager(Path(checkpoint_dir).absolute())
    manager.save(only=[state.name], sync=sync).wait()


def load_state(state: contract.State) -> bool:
    """Load one state from the newest good generation.

    Collective: root reads, every rank's ``load`` gets the same bytes.

    Args:
        state: A registered state.

    Returns:
        True if the generation held the state and it was loaded; False otherwise.

    Raises:
        CheckpointError: On every rank, if the load failed on any.
    """
    directory = _surface.find_directory()
    if directory is None:
        return False
    report = _surface.manager(directory).restore(only=[state.name])
    return report is not None and not report.missing


def close() -> None:
    """Release directories and communicators, and forget all states.

    Collective. For programs that go on without checkpoints, and for tests.
    """
    for manager in _surface.managers.values():
        manager.close()
    _surface.reset()


class EpochAccumulator(accumulator.Accumulator):
    """Sums over ranks and restarts, with adaptdl's interface.

    Collective to make. An accumulator is named after the running epoch, so make them in the
    same order on every rank. Making one unregisters those of earlier, finished epochs.

    Args:
        args: As for ``dict``: sums to start from.
        kwargs: As for ``dict``.

    Raises:
        CheckpointError: On every rank, if its saved sums cannot be loaded.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401
        epoch_state = _epoch_state()
        epoch = epoch_state.current
        _forget_finished(epoch)
        count = _surface.accumulators[epoch]
        _surface.accumulators[epoch] += 1
        super().__init__(
            dict(*args, **kwargs),
            epochs=epoch_state,
            name=f"adaptdl-accumulator-epoch{epoch}-{count}",
        )
        self.made_in = epoch
        register(self)
        if not load_state(self):
            _surface.manager(_surface.find_directory())  # binds the new state to the ranks


Accumulator = EpochAccumulator
"""As adaptdl calls it."""


def remaining_epochs_until(limit: int) -> Iterator[int]:
    """Iterate over the remaining epochs; see `mpi_ckpt.remaining_epochs_until`.

    Collective when first called: loads the saved states.

    Args:
        limit: Number of the first epoch not to run.

    Raises:
        RuntimeError: On every rank, if such a loop is running.
    """
    return epochs.remaining_epochs_until(limit, _epoch_state())


def current_epoch() -> int | None:
    """Return the running epoch, None outside of the loop.

    Collective when first called: loads the saved states.
    """
    return _epoch_state().current


def finished_epochs() -> int:
    """Return the number of finished epochs.

    Collective when first called: loads the saved states.
    """
    return _epoch_state().finished


def _epoch_state() -> epochs.EpochState:
    known = _surface.states.get(_EPOCHS)
    if isinstance(known, epochs.EpochState):
        return known
    made = epochs.EpochState(_EPOCHS)
    register(made)
    load_state(made)
    return made


def _may_still_come(name: str) -> bool:
    """Return whether this run may still make a state of an earlier run."""
    made_in = _ACCUMULATOR.fullmatch(name)
    finished = _surface.states.get(_EPOCHS)
    if made_in is not None and isinstance(finished, epochs.EpochState):
        return int(made_in[1]) >= finished.finished and name not in _surface.seen
    return name not in _surface.seen


def _forget_finished(epoch: int | None) -> None:
    for state in list(_surface.states.values()):
        made_in = getattr(state, "made_in", None)
        if epoch is not None and made_in is not None and made_in < epoch:
            unregister(state)


_surface = _Surface()
