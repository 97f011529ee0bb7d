# SPDX-License-Identifier: Apache-2.0
"""Defines the contract of a state: what the engine asks of a piece of training.

``State`` is adaptdl's: three methods to override. ``LeafState`` gives the engine the
tensors themselves, which makes a save fast: nothing is pickled, only differences are sent,
and bytes go straight into live memory. ``PartsState`` is for states that are split over the
ranks, one part each.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

from mpi_ckpt.errors import RegistrationError, StageError
from mpi_ckpt.leaves.buckets import Leaves
from mpi_ckpt.leaves.leaf import Form
from mpi_ckpt.storage.format.layout import check_state_name
from mpi_ckpt.storage.format.tensorfile import fill_leaves, read_form, write_leaves

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from typing import BinaryIO

    from mpi_ckpt.comm import Communicator
    from mpi_ckpt.leaves.leaf import Leaf, LeafSpec

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
        try:
            return self._name
        except AttributeError:
            raise RegistrationError(
                f"a {type(self).__name__} has no name: call super().__init__(name) in its "
                "__init__"
            ) from None

    def save(self, fileobj: BinaryIO) -> None:
        """Write the state. Called on root only; must not communicate."""

    def load(self, fileobj: BinaryIO) -> None:
        """Read the state. Called on every rank with the same bytes."""

    def sync(self) -> None:
        """Make the state equal on all ranks. Called on every rank before a save."""


class Capture:
    """The contents of a leaf state at one moment, by reference.

    Args:
        structure: The contents that are not tensors, as JSON values.
        leaves: The tensors, with unique names, in the same order on every rank; a leaf
            that is cut over the ranks may be on some ranks only.

    Attributes:
        is_lasting: Whether the state keeps the leaves, and returns these same objects again
            as long as they are right.

    Raises:
        StageError: On the calling rank, if two leaves have one name.
    """

    def __init__(self, structure: Structure, leaves: Sequence[Leaf]) -> None:
        self.structure = structure
        self.leaves = Leaves(leaves)
        if len({leaf.spec.name for leaf in self.leaves}) != len(self.leaves):
            raise StageError("two leaves of a state have one name")
        self.is_lasting = False

    @classmethod
    def known(
        cls,
        structure: Structure,
        leaves: Sequence[Leaf],
        specs: tuple[LeafSpec, ...],
        *,
        is_lasting: bool,
    ) -> Capture:
        """Return a capture of whole leaves whose names have been looked at before.

        Not collective.

        Args:
            structure: As that of the class.
            leaves: As those of the class.
            specs: Their specs.
            is_lasting: See the attribute.
        """
        made = cls(structure, ())
        made.leaves = leaves if isinstance(leaves, Leaves) else Leaves(leaves)
        made.cut, made.whole, made.whole_specs = (), made.leaves, specs
        made.is_lasting = is_lasting
        return made

    @property
    def names(self) -> list[str]:
        """The names of the leaves. Not collective."""
        return [leaf.spec.name for leaf in self.leaves]

    # Cached: a state of the same arrays as before may return the same object again.
    @cached_property
    def cut(self) -> tuple[Leaf, ...]:
        """The leaves that are cut over the ranks. Not collective."""
        return tuple([leaf for leaf in self.leaves if leaf.tiles is not None])

    @cached_property
    def whole(self) -> tuple[Leaf, ...]:
        """The other leaves. Not collective."""
        if not self.cut:
            return self.leaves
        return tuple([leaf for leaf in self.leaves if leaf.tiles is None])

    @cached_property
    def whole_specs(self) -> tuple[LeafSpec, ...]:
        """Their specs. Not collective."""
        return tuple([leaf.spec for leaf in self.whole])


@dataclass(frozen=True, slots=True)
class Arrival:
    """The destination of saved contents in a state, known before a byte moves.

    Attributes:
        leaves: The destination of each saved leaf; None if the program has no such leaf.
            The program may have a leaf cut that was saved whole, and the other way round.
        adopt: Lets the state take over the leaves, once all of them are filled. Not
            collective.
        missing: Names of the program's leaves that were not saved.
        unexpected: Names of saved leaves that the program lacks.
        elsewhere: Gives the saved leaf of an index private memory, if another leaf turned
            out to have the same place in ``leaves``; None if the state has no other place
            for it. Not collective.
    """

    leaves: Sequence[Leaf | None]
    adopt: Callable[[], None]
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    elsewhere: Callable[[int], Leaf | None] = lambda _: None


@dataclass(frozen=True, slots=True)
class Change:
    """What a restore with another number of ranks has changed in a state.

    Attributes:
        text: The change in a few words; empty for none.
        is_unusual: Whether it changes what is trained, not only how ranks share the work.
    """

    text: str = ""
    is_unusual: bool = False


class LeafState(State):
    """A state that gives the engine its tensors.

    Args:
        name: As for `State`.
        sync: What a save does if replicas differ. ``"root"``: root's value wins.
            ``"mean"``: leaves with 16 bits or more per real number are averaged; integers,
            8-bit floats and long doubles are root's. ``"check"``: raise an error that names
            them. ``"none"``: nothing is made equal; a save raises for values that differ.

    Raises:
        RegistrationError: On every rank that makes it, if the name or mode is illegal.
    """

    takes_any_replica: bool = False
    """Whether a save takes the bytes of any rank for a box that several ranks have."""

    def __init__(self, name: str, *, sync: SyncMode = "root") -> None:
        super().__init__(name)
        if sync not in SYNC_MODES:
            raise RegistrationError(
                f"state {name!r}: sync is {sync!r}, expected one of {SYNC_MODES}"
            )
        self.sync_mode: SyncMode = sync
        self._form = Form(())

    def form_of(self, specs: tuple[LeafSpec, ...]) -> Form:
        """Return the form of captured leaves; the previous object, if it is equal.

        Not collective. Called by the manager.
        """
        if specs is not self._form.specs and specs != self._form.specs:
            self._form = Form(specs)
        return self._form

    def bind(self, comm: Communicator) -> None:
        """Take the manager's communicator. Not collective. Called by the manager."""

    def join(self, states: Mapping[str, State]) -> None:
        """Take the manager's states, by name: a live view.

        Not collective. Called by the manager, after `bind`.
        """

    def observe_resize(
        self,
        structure: Structure,  # noqa: ARG002
        saved_size: int,  # noqa: ARG002
        size: int,  # noqa: ARG002
    ) -> Callable[[], Change]:
        """Look at the state before a restore with another number of ranks.

        Not collective. Called on every rank before anything is changed.

        Args:
            structure: The saved structure, which fits the state.
            saved_size: Number of ranks that saved.
            size: Number of ranks now.

        Returns:
            A function that root calls after the restore: it returns what has changed.
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
        """Compare saved contents with the state, and return where they go.

        Not collective. Called on every rank before a byte is moved; must not change
        the state.

        Args:
            structure: As captured on root, now or in an earlier run.
            specs: The saved leaves, in this order; of cut leaves the whole shape.
            strict: Whether a leaf that only one side has is a mismatch; if not, it is left
                out and named, if the state works without it. A leaf of another dtype or
                shape is always a mismatch. A leaf that was saved cut may be on other ranks:
                that this one lacks it is none.

        Raises:
            StateMismatchError: On every rank, with every leaf that does not fit.
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
    """A leaf state that is split over the ranks; root joins the parts."""

    def part(self) -> bytes:
        """Return this rank's part. Not collective. Called before each capture."""
        raise NotImplementedError

    def combine(self, parts: Sequence[bytes]) -> None:
        """Join the parts of all ranks, in rank order. Called on root only.

        Takes effect in `combined`: if `combine` fails, nothing has changed.
        """
        raise NotImplementedError

    def combined(self) -> None:
        """Note that root has all parts. Called on every rank once that is true."""
