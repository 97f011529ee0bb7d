# SPDX-License-Identifier: Apache-2.0
"""The contract of a state: what the engine asks of a piece of training.

``State`` is adaptdl's: three methods to override. ``LeafState`` adds what makes a save
fast: the tensors themselves, so that nothing is pickled, only what differs is sent, and
bytes go straight into live memory. ``PartsState`` is for states of which every rank holds
a part of its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from mpi_ckpt.errors import RegistrationError, StageError
from mpi_ckpt.leaf import Form
from mpi_ckpt.storage.format.layout import check_state_name
from mpi_ckpt.storage.format.tensorfile import fill_leaves, read_form, write_leaves

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from typing import BinaryIO

    from mpi_ckpt.comm import Communicator
    from mpi_ckpt.leaf import Leaf, LeafSpec

__all__ = [
    *("Arrival", "Capture", "Change", "LeafState", "PartsState", "State", "Structure"),
    "SyncMode",
]

Structure = Any
"""JSON values: what of a state is not a tensor."""

SyncMode = Literal["root", "mean", "check", "none"]

SYNC_MODES: tuple[SyncMode, ...] = ("root", "mean", "check", "none")


class State:
    """A named piece of training that writes itself to a file object.

    Subclasses override any of `save`, `load` and `sync`; each is a no-op here.

    Args:
        name: Unique among the states of a manager. Any text of 1 to 200 bytes that is
            not a path: no leading ``/``, no ``..`` part, no NUL.

    Attributes:
        skip: While true, the state is left out of saves.

    Raises:
        RegistrationError: On every rank that makes it, if the name is illegal.
    """

    skip: bool = False

    def __init__(self, name: str) -> None:
        check_state_name(name)
        self._name = name

    @property
    def name(self) -> str:
        """The name under which the state is saved."""
        return self._name

    def save(self, fileobj: BinaryIO) -> None:
        """Write the state. Called on root only; must not communicate."""

    def load(self, fileobj: BinaryIO) -> None:
        """Read the state. Called on every rank with the same bytes."""

    def sync(self) -> None:
        """Make the state equal on all ranks. Called on every rank before a save."""


class Capture:
    """The contents of a leaf state at one moment, by reference.

    Args:
        structure: JSON values, everything that is not a tensor.
        leaves: The tensors, unique names; the order is the same on every rank.

    Raises:
        StageError: On the calling rank, if two leaves have one name.
    """

    __slots__ = ("leaves", "structure")

    def __init__(self, structure: Structure, leaves: Sequence[Leaf]) -> None:
        self.structure = structure
        self.leaves = tuple(leaves)
        if len({leaf.spec.name for leaf in self.leaves}) != len(self.leaves):
            raise StageError("two leaves of a state have one name")


@dataclass(frozen=True, slots=True)
class Arrival:
    """Where saved contents go in a state of the program: known before a byte moves.

    Attributes:
        leaves: For each saved leaf where it goes; None if the program has no such leaf.
        adopt: Lets the state take over the leaves, once all of them are filled. Not
            collective.
        missing: Names of leaves of the program that were not saved.
        unexpected: Names of what was saved, and the program lacks.
        elsewhere: Gives the saved leaf of an index memory of its own, where its place in
            ``leaves`` turned out to be that of another leaf too; None if the state has no
            other place for it. Not collective.
    """

    leaves: Sequence[Leaf | None]
    adopt: Callable[[], None]
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    elsewhere: Callable[[int], Leaf | None] = lambda _: None


@dataclass(frozen=True, slots=True)
class Change:
    """What restoring with another number of ranks has changed of a state.

    Attributes:
        text: In a few words; empty for nothing.
        is_unusual: Whether it changes what is trained, not only who does how much of it.
    """

    text: str = ""
    is_unusual: bool = False


class LeafState(State):
    """A state that shows its tensors.

    Args:
        name: As for `State`.
        sync: What a save does about replicas that differ. ``"root"``: root's value wins.
            ``"mean"``: leaves of 16 bits and more to a real number are averaged, those
            of integers, of 8-bit floats and of long doubles are root's. ``"check"``:
            raise and name them. ``"none"``: root's is saved, nothing is compared.

    Raises:
        RegistrationError: On every rank that makes it, if the name or mode is illegal.
    """

    def __init__(self, name: str, *, sync: SyncMode = "root") -> None:
        super().__init__(name)
        if sync not in SYNC_MODES:
            raise RegistrationError(
                f"state {name!r}: sync is {sync!r}, expected one of {SYNC_MODES}"
            )
        self.sync_mode: SyncMode = sync
        self._form = Form(())

    def form_of(self, leaves: Sequence[Leaf]) -> Form:
        """Return the form of captured leaves: the last one again, if it is the same.

        Not collective. Called by the manager.
        """
        specs = tuple([leaf.spec for leaf in leaves])
        if specs != self._form.specs:
            self._form = Form(specs)
        return self._form

    def bind(self, comm: Communicator) -> None:
        """Take the manager's communicator. Not collective. Called by the manager."""

    def join(self, states: Mapping[str, State]) -> None:
        """Take the manager's states, by name: a view that goes on being true.

        Not collective. Called by the manager, after `bind`.
        """

    def observe_resize(
        self,
        structure: Structure,  # noqa: ARG002
        saved_size: int,  # noqa: ARG002
        size: int,  # noqa: ARG002
    ) -> Callable[[], Change]:
        """Look at the state before another number of ranks restores it.

        Not collective. Called on every rank before anything is changed.

        Args:
            structure: What was saved, with which the state has been found to fit.
            saved_size: Number of ranks that saved.
            size: Number of ranks now.

        Returns:
            Called on root once all is restored: says what has changed.
        """
        return Change

    def restored(self) -> str:
        """Return a warning about what was restored, empty for none.

        Not collective. Called on every rank once all states are restored.
        """
        return ""

    def capture(self) -> Capture:
        """Return the contents by reference: nothing is copied.

        Not collective. Called on every rank at each save.
        """
        raise NotImplementedError

    def prepare(
        self, structure: Structure, specs: Sequence[LeafSpec], *, strict: bool
    ) -> Arrival:
        """Compare contents that will come with the state, and say where they go.

        Not collective. Called on every rank before a byte is moved; must not change
        the state.

        Args:
            structure: As captured on root, now or in an earlier run.
            specs: Leaves that will come, in this order.
            strict: Whether a leaf that only one side has is a mismatch; if not, it is
                left out and named, where the state can do without it. A leaf of another
                dtype or shape is a mismatch in any case.

        Raises:
            StateMismatchError: On every rank, listing every leaf that does not fit.
        """
        raise NotImplementedError

    def save(self, fileobj: BinaryIO) -> None:
        """Write the state alone, as a safetensors stream. Not collective."""
        captured = self.capture()
        write_leaves(fileobj, captured.structure, captured.leaves)

    def load(self, fileobj: BinaryIO) -> None:
        """Read what `save` wrote. Not collective.

        Raises:
            StateMismatchError: On the calling rank, if the contents do not fit.
            CorruptGenerationError: On the calling rank, if the stream is damaged.
        """
        structure, specs = read_form(fileobj)
        arrival = self.prepare(structure, specs, strict=True)
        fill_leaves(fileobj, specs, arrival.leaves)
        arrival.adopt()


class PartsState(LeafState):
    """A leaf state of which each rank holds a part; root puts the parts together."""

    def part(self) -> bytes:
        """Return what this rank holds. Not collective. Called before each capture."""
        raise NotImplementedError

    def combine(self, parts: Sequence[bytes]) -> None:
        """Join the parts of all ranks, in rank order. Called on root only.

        It takes effect in `combined`: if it fails, nothing has changed.
        """
        raise NotImplementedError

    def combined(self) -> None:
        """Note that root has the parts of all. Called on every rank once it is so."""
