# SPDX-License-Identifier: Apache-2.0
"""Defines states with a separate part for each rank."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from mpi_ckpt.errors import RestoreError, StateMismatchError
from mpi_ckpt.failures import concerning
from mpi_ckpt.leaves.leaf import Leaf, MemoryBuffer
from mpi_ckpt.state import Arrival, Capture, LeafState, Structure
from mpi_ckpt.states.packed import (
    cut_part_leaves,
    pack,
    packed_head,
    part_leaves,
    unpack,
)
from mpi_ckpt.storage.format.layout import find_parts

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from mpi_ckpt.comm import Communicator
    from mpi_ckpt.leaves.leaf import LeafSpec
    from mpi_ckpt.storage.format.layout import PartLeaves

__all__ = ["PerRankState", "RankedState"]

logger = logging.getLogger(__name__)


class RankedState(LeafState):
    """A state whose parts are saved unchanged, each with leaves of its own.

    A part is a nested value. Its tensors and arrays are saved as leaves of their own type
    and shape, so that tools can read them. In a save the bytes of each rank's leaves go to
    the rank that writes them, and no rank holds those of all.

    In a restore each rank gets one part: that of the saved rank which `source` returns or,
    if ``resizes`` is true and the number of ranks has changed, one that `resize` has made
    on root of all parts.

    Args:
        name: As for `mpi_ckpt.State`.

    Attributes:
        resizes: Whether to call `resize` if the number of ranks has changed.

    Raises:
        RegistrationError: On every rank that makes it, if the name is illegal.
    """

    contents: ClassVar[str]
    """What the parts hold, in messages and in the structure."""

    first_key: ClassVar[str]
    """Under which the structure of the first form has the number of parts."""

    is_large: ClassVar[bool] = False
    """Whether parts may be large: several writers then write them without root."""

    resizes: bool = False

    def __init__(self, name: str) -> None:
        super().__init__(name, sync="none")
        self._rank = 0
        self._size = 1

    def own_value(self) -> Any:  # noqa: ANN401 (any nested value)
        """Return this rank's part. Not collective. Called once a save."""
        raise NotImplementedError

    def compare(self, structures: Sequence[Structure]) -> None:
        """Compare the structures of the parts of all ranks, in rank order.

        Not collective. Called on root in each save.

        Raises:
            CheckpointError: On the calling rank, if they do not belong together.
        """

    def alike(self, structure: Structure) -> Structure:  # noqa: ARG002
        """Return what `compare` needs of the structure of a part.

        Not collective. If all ranks have the same, their parts belong together.
        """
        return None

    def source(self, rank: int, saved: int) -> int | None:
        """Return the saved rank whose part a rank gets, None for no part.

        Not collective.

        Args:
            rank: Any rank of this job.
            saved: Number of ranks that saved.
        """
        raise NotImplementedError

    def resize(self, parts: Sequence[bytes], size: int) -> Iterator[bytes]:
        """Yield parts for another number of ranks. Called on root only.

        Args:
            parts: The parts of all saved ranks, in rank order; read as they are used.
            size: Number of ranks now.
        """
        raise NotImplementedError

    def open_part(self, part: bytes, saved: int) -> Callable[[], None]:
        """Read this rank's part; return a function that takes it over.

        Not collective. Changes nothing yet, but finds mismatches.

        Args:
            part: The part; empty if there is none for this rank.
            saved: Number of saved parts.

        Raises:
            StateMismatchError: On the calling rank, if it does not fit.
            CorruptGenerationError: On the calling rank, if its bytes are not those saved.
        """
        raise NotImplementedError

    def bind(self, comm: Communicator) -> None:
        """See `LeafState`. Not collective."""
        self._rank = comm.rank
        self._size = comm.size

    def capture(self) -> Capture:
        """See `LeafState`: this rank's part, as if it were the only rank.

        Not collective.
        """
        return Capture(self.form(1), part_leaves(0, self.own_value()))

    def capture_own(self, *, cut: bool) -> Capture:
        """Return this rank's part among those of all.

        Not collective.

        Args:
            cut: Whether the rank writes it itself: as leaves of which other ranks have
                nothing.
        """
        leaves = cut_part_leaves if cut else part_leaves
        return Capture(self.form(self._size), leaves(self._rank, self.own_value()))

    def prepare(
        self,
        structure: Structure,
        specs: Sequence[LeafSpec],
        *,
        strict: bool,
    ) -> Arrival:
        """See `LeafState`: for callers that have all parts. Not collective."""
        parts = find_parts([spec.name for spec in specs])
        missing, unexpected = self.check(structure, len(parts), strict=strict)
        leaves = [Leaf(spec, MemoryBuffer.empty(spec.nbytes)) for spec in specs]
        return Arrival(leaves, lambda: self._choose(leaves, parts), missing, unexpected)

    def _choose(self, leaves: Sequence[Leaf], found: Sequence[PartLeaves]) -> None:
        with concerning(f"state {self.name!r}"):
            source = self.source(self._rank, len(found))
            if self.resizes and len(found) != self._size:
                parts = [_part_in(leaves, part) for part in found]
                parts = list(self.resize(parts, self._size))
                part, count = parts[self._rank], len(parts)
            else:
                part = b"" if source is None else _part_in(leaves, found[source])
                count = len(found)
            take = self.open_part(part, count)
        take()

    def check(
        self,
        structure: Structure,
        count: int,
        *,
        strict: bool,  # noqa: ARG002
    ) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Require a structure that `capture` has made from a number of parts.

        Not collective.

        Args:
            structure: The structure in the checkpoint.
            count: Number of its parts.
            strict: As for `LeafState.prepare`.

        Returns:
            The names that only the program has, and those that only the checkpoint has.

        Raises:
            StateMismatchError: On the calling rank, if it is another structure, or does not
                fit.
        """
        if not count or self._count_in(structure) != count:
            raise StateMismatchError(
                f"state {self.name!r}: the checkpoint holds no {self.contents}"
            )
        return (), ()

    def form(self, count: int) -> Structure:
        """Return the structure for a number of parts. Not collective."""
        # Not under the key of the first form: a release that knows only that one would
        # take a part for damaged, and set the generation aside.
        return {"parts": count, "of": self.contents}

    def _count_in(self, structure: Structure) -> object:
        if not isinstance(structure, dict):
            return None
        is_first = structure.get("of") != self.contents
        return structure.get(self.first_key if is_first else "parts")


def _part_in(leaves: Sequence[Leaf], part: PartLeaves) -> bytes:
    """Return a part from the leaves of all."""
    mine = [leaves[number] for number in part.numbers]
    head = b""
    if part.structure is not None:
        text = bytes(leaves[part.structure].buffer.read())
        head = packed_head(text, [leaf.spec for leaf in mine], part.names)
    return b"".join([head, *(leaf.buffer.read() for leaf in mine)])


class SavedValues(Sequence[Any]):
    """The values of all saved ranks, each made when it is asked for. Not collective.

    Args:
        parts: The parts of the ranks, in rank order.
    """

    def __init__(self, parts: Sequence[bytes]) -> None:
        self._parts = parts

    def __len__(self) -> int:
        return len(self._parts)

    def __getitem__(self, index: Any) -> Any:  # noqa: ANN401 (a number or a slice)
        if isinstance(index, slice):
            return [unpack(part) for part in self._parts[index]]
        return unpack(self._parts[index])

    def __iter__(self) -> Iterator[Any]:
        return map(unpack, self._parts)


class PerRankState(RankedState):
    """A Python value that each rank has for itself: a reader's position, a cache.

    With the same number of ranks, every rank gets its own value back. With another number,
    and without ``resize``, rank ``r`` gets the value of saved rank ``r``; a rank beyond the
    saved ones keeps its present value; values of saved ranks beyond the last rank are left
    out, and root warns of it.

    Args:
        name: As for `mpi_ckpt.State`; the same on every rank.
        value: This rank's value: None, numbers, text, bytes, tensors, arrays, and lists,
            tuples, sets and dicts of them. Ranks may hold values of different forms.
        resize: Function that a restore calls on root alone, if the number of ranks has
            changed, with the values of all saved ranks in rank order and the present number
            of ranks; it returns as many values. A generator function yields them: root then
            has in memory only what the function itself holds, since a value is read when
            the function asks for it, and sent before the next. None: as above.

    Attributes:
        value: The live value. Assign to it freely between saves; a restore assigns a new
            one.

    Raises:
        RegistrationError: On every rank that makes it, if the name is illegal.
    """

    contents = "values of ranks"
    first_key = "values"
    is_large = True

    def __init__(
        self,
        name: str,
        value: Any = None,  # noqa: ANN401 (any nested value)
        *,
        resize: Callable[[Any, int], Iterable[Any]] | None = None,
    ) -> None:
        super().__init__(name)
        self.value = value
        self._resize = resize
        self.resizes = resize is not None

    def own_value(self) -> Any:  # noqa: ANN401
        """See `RankedState`. Not collective."""
        return self.value

    def source(self, rank: int, saved: int) -> int | None:
        """See `RankedState`. Not collective."""
        return rank if rank < saved else None

    def resize(self, parts: Sequence[bytes], size: int) -> Iterator[bytes]:
        """See `RankedState`. Root only.

        Raises:
            RestoreError: On the calling rank, if the user's function returns another
                number of values.
        """
        assert self._resize is not None
        if inspect.isgeneratorfunction(self._resize):
            made: Iterator[Any] = iter(self._resize(SavedValues(parts), size))
        else:
            values = list(self._resize(list(SavedValues(parts)), size))
            self._check_count(len(values), size)
            made = iter(values)
        count = 0
        for count, value in enumerate(made, start=1):
            if count <= size:
                yield pack(value)
        self._check_count(count, size)

    def _check_count(self, count: int, size: int) -> None:
        if count != size:
            raise RestoreError(
                f"state {self.name!r}: resize returned {count} values for {size} ranks"
            )

    def open_part(self, part: bytes, saved: int) -> Callable[[], None]:
        """See `RankedState`. Not collective."""
        value = unpack(part) if part else None

        def take() -> None:
            if part:
                self.value = value
            if self._rank == 0 and saved > self._size:
                logger.warning(
                    "state %r: the values of saved %s go to no rank; give PerRankState a "
                    "resize to share them out",
                    self.name,
                    f"rank {self._size}"
                    if saved - 1 == self._size
                    else f"ranks {self._size} to {saved - 1}",
                )

        return take
