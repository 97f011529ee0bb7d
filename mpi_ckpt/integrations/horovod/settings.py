# SPDX-License-Identifier: Apache-2.0
"""Keeps the settings for commits: one set for the process."""

from __future__ import annotations

import os
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from mpi_ckpt.comm.launch import find_horovod
from mpi_ckpt.comm.ordering import find_communicator
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
    """The arguments of `configure`.

    Attributes:
        directory: Directory of the generations; None if none was given.
        options: Options of the manager.
        memory: The ranks that hold the last commit in memory; None for no rank.
        comm: Communicator of the ranks that train; None for Horovod's, or all.
        process_set: Horovod's process set, if only some of its ranks train.
        process_sets: The process sets for Horovod's restart.
    """

    directory: Path | None
    options: Options | None
    memory: Literal["root", "all"] | None
    comm: MPI.Intracomm | None
    process_set: Any
    process_sets: tuple[Any, ...]

    @property
    def first_deadline_seconds(self) -> float:
        """How long the ranks wait for one another before their options are known."""
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
            OptionsError: On the calling rank, if an environment variable is invalid.
        """
        if self.options is not None:
            return self.options
        # Horovod's scripts may commit after each batch: to memory each time, to disk when
        # that costs almost nothing compared with the training.
        options = Options.from_env()
        return replace(
            options,
            asynchronous=True,
            sync=False,
            interval=_EVERY if options.interval is None else options.interval,
        )

    @contextmanager
    def training_ranks(self) -> Iterator[MPI.Intracomm]:
        """Yield a communicator of the ranks that train, which the caller duplicates.

        Collective over these ranks. Main thread only.

        Raises:
            LaunchError: On each of these ranks; see `communicator`.
        """
        comm, is_new = find_communicator(
            self.comm, self.process_set, deadline_seconds=self.first_deadline_seconds
        )
        yield comm
        # After an error that one rank alone may have, MPI_Finalize frees it.
        if is_new:
            comm.Free()

    def find_place(self) -> tuple[int, int]:
        """Return rank and size among the ranks that train. Not collective.

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
    """The latest settings of the process."""

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
    """Set where commits go and how, for states that are first synced later.

    Not collective, but every rank must do the same.

    Args:
        directory: Directory of the generations; MPI_CKPT_DIR overrides it.
        options: Options of the manager. Default: `Options.from_env`, but asynchronous,
            without comparing the replicas in each save, and every 60 s if no interval is
            given.
        memory: The ranks that hold the last commit in memory, a copy of the state each:
            ``"root"`` (default), ``"all"``, or None for no rank: a restore then goes back
            to the last durable commit.
        comm: Communicator of the ranks that train. Default: Horovod's, else all ranks.
        process_set: Horovod's process set that trains, if not all of its ranks do.
        process_sets: The process sets of ``hvd.init``: a run passes them when it starts
            Horovod again.
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
    """Return the present settings. Not collective."""
    return _Process.settings
