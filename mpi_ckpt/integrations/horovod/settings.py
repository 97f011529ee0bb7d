# SPDX-License-Identifier: Apache-2.0
"""Where commits go, and how: one set of settings for the process."""

from __future__ import annotations

import os
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from mpi_ckpt.comm.horovod_checks import find_horovod
from mpi_ckpt.comm.horovod_ranks import find_communicator
from mpi_ckpt.errors import OptionsError
from mpi_ckpt.options import Options

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from os import PathLike

    from mpi4py import MPI

__all__ = ["Settings", "configure", "settings"]

DIRECTORY = "MPI_CKPT_DIR"

_EVERY = timedelta(seconds=60)


@dataclass(frozen=True, slots=True)
class Settings:
    """What `configure` was given.

    Attributes:
        directory: Of the generations; None if no one was named.
        options: Of the manager.
        memory: Who holds the last commit in memory; None for nobody.
        comm: Communicator of the ranks that train; None for Horovod's, or all.
        process_set: Horovod's, if only some of its ranks train.
        process_sets: What Horovod is given when it is started again.
    """

    directory: Path | None
    options: Options | None
    memory: Literal["root", "all"] | None
    comm: MPI.Intracomm | None
    process_set: Any
    process_sets: tuple[Any, ...]

    @property
    def first_deadline_seconds(self) -> float:
        """How long the ranks wait for one another before they know their options."""
        return (self.options or Options()).deadline_seconds

    def find_directory(self) -> Path:
        """Return the directory. Not collective.

        Raises:
            OptionsError: On the calling rank, if there is none.
        """
        named = os.environ.get(DIRECTORY)
        directory = Path(named).absolute() if named else self.directory
        if directory is None:
            raise OptionsError(
                "commits need a directory to be durable in: set the environment variable "
                f"{DIRECTORY}, or call configure(directory)"
            )
        return directory

    def find_options(self) -> Options:
        """Return the options. Not collective.

        Raises:
            OptionsError: On the calling rank, if a variable of the environment is none.
        """
        if self.options is not None:
            return self.options
        # Horovod's scripts commit as often as each batch: to memory each time, to disk
        # when it costs next to nothing beside the training.
        options = Options.from_env()
        return replace(
            options,
            asynchronous=True,
            sync=False,
            interval=_EVERY if options.interval is None else options.interval,
        )

    @contextmanager
    def training_ranks(self) -> Iterator[MPI.Intracomm]:
        """Give a communicator of the ranks that train, to be duplicated.

        Collective over them. Main thread only.

        Raises:
            LaunchError: On every rank of them, see `communicator`.
        """
        comm, is_new = find_communicator(
            self.comm, self.process_set, deadline_seconds=self.first_deadline_seconds
        )
        yield comm
        # After an error that one rank alone may have, it is left to MPI_Finalize.
        if is_new:
            comm.Free()

    def find_place(self) -> tuple[int, int]:
        """Return rank and size of this rank among those that train. Not collective.

        Raises:
            LaunchError: On every rank, if launcher and MPI disagree about the job.
        """
        horovod = find_horovod()
        if horovod is None:
            comm, _ = find_communicator(self.comm)
            return comm.rank, comm.size
        ranks = horovod if self.process_set is None else self.process_set
        return ranks.rank(), ranks.size()


_NOTHING = Settings(None, None, "root", None, None, ())


class _Process:
    """What the process was told last."""

    settings = _NOTHING


def configure(
    directory: str | PathLike[str] | None = None,
    *,
    options: Options | None = None,
    memory: Literal["root", "all"] | None = "root",
    comm: MPI.Intracomm | None = None,
    process_set: Any = None,  # noqa: ANN401 (Horovod's class)
    process_sets: Sequence[Any] = (),
) -> None:
    """Say where commits go and how; counts for states that are first synced after it.

    Not collective, but every rank must do the same.

    Args:
        directory: Of the generations; MPI_CKPT_DIR goes before it.
        options: How to do it. Default: `Options.from_env`, but asynchronous, without
            comparing the replicas in each save, and every 60 s if no interval is named.
        memory: Who holds the last commit in memory, one copy of the state each:
            ``"root"`` (default), ``"all"``, or None for nobody: a restore then goes back
            to the last durable commit.
        comm: Communicator of the ranks that train. Default: Horovod's, else all ranks.
        process_set: Horovod's process set that trains, if that is not all of its ranks.
        process_sets: The sets that Horovod was initialised with: it is given them again
            when a run starts it again.
    """
    _Process.settings = Settings(
        None if directory is None else Path(directory).absolute(),
        options,
        memory,
        comm,
        process_set,
        tuple(process_sets),
    )


def settings() -> Settings:
    """Return what counts now. Not collective."""
    return _Process.settings
