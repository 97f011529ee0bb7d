# SPDX-License-Identifier: Apache-2.0
"""The ranks that read a generation: root, and others by option."""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

import numpy as np

from mpi_ckpt.comm import agree
from mpi_ckpt.engine.writers import choose_ranks
from mpi_ckpt.errors import CorruptGenerationError, ReadError, RestoreError
from mpi_ckpt.storage.layout import generation_name
from mpi_ckpt.storage.reader import GenerationReader

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from mpi_ckpt.engine.find import Found
    from mpi_ckpt.engine.session import Session

__all__ = ["Readers", "open_readers"]


class Readers:
    """A generation, open on the ranks that read it.

    Attributes:
        ranks: Those ranks, root first.
        mine: The open generation on them; None elsewhere.
    """

    def __init__(self, ranks: tuple[int, ...], mine: GenerationReader | None) -> None:
        self.ranks = ranks
        self.mine = mine

    def bytes_read(self, session: Session) -> int:
        """Return the bytes that all of them have read. Collective."""
        mine = np.array([0 if self.mine is None else self.mine.bytes_read])
        return int(session.comm.all_reduce(mine, "sum", "counting what was read")[0])


@contextmanager
def open_readers(session: Session, found: Found) -> Iterator[Readers]:
    """Open a generation on all ranks that the options name; root has it open already.

    Collective. Main thread only.

    Args:
        session: The manager's.
        found: The generation.

    Raises:
        ReadError: On every rank, if one that shall read cannot open it.
    """
    comm = session.comm
    ranks = choose_ranks(session.options.readers, comm.topology)
    path = session.directory.root / generation_name(found.generation)
    with ExitStack() as stack:

        def open_here() -> GenerationReader | None:
            if comm.is_root or comm.rank not in ranks:
                return found.reader
            return stack.enter_context(_open(path))

        if len(ranks) == 1:
            mine = found.reader
        else:
            mine = agree(comm, "opening a generation", open_here, error=RestoreError)
        yield Readers(ranks, mine)


def _open(path: Path) -> GenerationReader:
    try:
        return GenerationReader(path)
    except CorruptGenerationError as error:
        # Root has found it good: what is wrong is what this host sees of it.
        raise ReadError(
            f"{error}. Root reads it well; several readers need a directory that all see, "
            "Options(readers='root') does not",
            path=path,
        ) from error
