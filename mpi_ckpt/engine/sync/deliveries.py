# SPDX-License-Identifier: Apache-2.0
"""Makes differing states equal: sends root's leaves to their destinations."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import TYPE_CHECKING, cast

import numpy as np

from mpi_ckpt.comm import Deferred, agree, meet, on_root
from mpi_ckpt.engine.overlaps import differing_overlaps, find_overlaps, separate_overlaps
from mpi_ckpt.engine.sync.sending import average_leaves, look_at, send_leaves
from mpi_ckpt.errors import StageError
from mpi_ckpt.failures import concerning
from mpi_ckpt.leaves import dtypes
from mpi_ckpt.leaves.digest import Digest, Digests, digest_bytes
from mpi_ckpt.leaves.leaf import Form, Leaf, LeafSpec
from mpi_ckpt.states.mismatch import raise_mismatch

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    from numpy.typing import NDArray

    from mpi_ckpt.comm import Communicator
    from mpi_ckpt.engine.overlaps import Overlap
    from mpi_ckpt.engine.sync.captured import CapturedState
    from mpi_ckpt.engine.sync.comparing import StateDifference
    from mpi_ckpt.options import Options
    from mpi_ckpt.state import Arrival, Structure

_FITTING = "fitting root's states"


@dataclass(frozen=True, slots=True)
class Delivered:
    """The result of making states equal.

    Attributes:
        names: State -> names of its differences, for a report.
        nbytes: Bytes sent or averaged.
        averaged: The states whose values changed on root as well.
    """

    names: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    nbytes: int = 0
    averaged: Mapping[str, CapturedState] = field(default_factory=dict)


def deliver(
    comm: Communicator,
    captured: Sequence[CapturedState],
    differences: Sequence[StateDifference],
    options: Options,
) -> Delivered:
    """Give all ranks root's contents of the states that differ, or the average.

    Collective. Main thread only.

    Args:
        comm: The communicator.
        captured: The compared states, with each rank's own contents.
        differences: How they differ; the same on every rank.
        options: Its threads and window are used.

    Raises:
        StageError: On every rank, if any rank cannot store bytes.
        StateMismatchError: On every rank, if root's contents do not fit on any.
    """
    if not differences:
        return Delivered()
    deliveries = _prepare(comm, captured, differences)
    deferred = Deferred()
    averaged = _transfer(comm, captured, deliveries, options, deferred)
    _adopt(comm, captured, deliveries, deferred)
    return Delivered(
        {captured[delivery.index].name: delivery.names for delivery in deliveries},
        sum(delivery.nbytes for delivery in deliveries),
        averaged,
    )


@dataclass(frozen=True, slots=True)
class _Delivery:
    """How one differing state becomes equal.

    Attributes:
        index: Index of the state.
        names: Names of the differences, for a report.
        form: Specs of root's leaves.
        sent: Indices of the leaves that root sends.
        averaged: Indices of the leaves that are averaged instead.
        targets: All leaves of the state on this rank: the sources on root, the destinations
            elsewhere.
        arrival: How this rank takes over the contents; None if it keeps its own.
    """

    index: int
    names: tuple[str, ...]
    form: Form
    sent: tuple[int, ...]
    averaged: tuple[int, ...]
    targets: tuple[Leaf, ...]
    arrival: Arrival | None

    @property
    def nbytes(self) -> int:
        """Bytes that are sent or averaged."""
        return int(self.sent_sizes.sum() + self.form.sizes[list(self.averaged)].sum())

    @property
    def sent_leaves(self) -> Sequence[Leaf]:
        """The leaves that root sends."""
        return _chosen(self.targets, self.sent)

    @property
    def sent_sizes(self) -> NDArray[np.int64]:
        """The bytes of each of them."""
        return self.form.sizes[np.array(self.sent, np.int64)]


def _prepare(
    comm: Communicator,
    captured: Sequence[CapturedState],
    differences: Sequence[StateDifference],
) -> list[_Delivery]:
    forms = _send_forms(comm, captured, differences)
    overlaps: list[Overlap] = []

    def prepare() -> list[_Delivery]:
        deliveries = []
        for difference, form in zip(differences, forms, strict=True):
            with concerning(f"state {captured[difference.index].name!r}"):
                deliveries.append(
                    _deliver(
                        captured[difference.index], difference, *form, is_root=comm.is_root
                    )
                )
        overlaps.extend([] if comm.is_root else _overlaps(captured, deliveries))
        return deliveries

    met = meet(
        comm,
        _FITTING,
        prepare,
        error=StageError,
        digest=lambda _: digest_bytes(repr(overlaps).encode()),
    )
    deliveries = met.result
    if not met.is_alike:
        differing = differing_overlaps(
            comm, overlaps, _RootsBytes(captured), doing=_FITTING, error=StageError
        )
        deliveries = agree(
            comm,
            _FITTING,
            lambda: _without_overlaps(captured, deliveries, differing),
            error=StageError,
        )
    return deliveries


def _send_forms(
    comm: Communicator,
    captured: Sequence[CapturedState],
    differences: Sequence[StateDifference],
) -> list[tuple[Structure, Form]]:
    """Return root's structure and form of each state; those that are equal are not sent."""
    own = [captured[difference.index] for difference in differences]
    forms = [(json.loads(json.dumps(one.structure)), one.form) for one in own]
    differing = [number for number, one in enumerate(differences) if one.form]

    def encode() -> list[object]:
        return [[forms[n][0], [s.to_json() for s in own[n].specs]] for n in differing]

    if differing:
        doing = "sending the form of the states"
        received = on_root(comm, doing, encode, error=StageError)
        for number, (structure, specs) in zip(differing, received, strict=True):
            forms[number] = structure, Form(LeafSpec.from_json(spec) for spec in specs)
    return forms


def _deliver(
    own: CapturedState,
    difference: StateDifference,
    structure: Structure,
    form: Form,
    *,
    is_root: bool,
) -> _Delivery:
    """Find the destinations of root's leaves on this rank."""
    averaged = _averaged(own, difference)
    specs, taken = form.specs, set(averaged)
    differing = range(len(specs)) if difference.leaves is None else difference.leaves
    sent = tuple([n for n in differing if n not in taken] if taken else differing)
    targets, arrival = own.leaves, None
    if averaged or not is_root:
        # Tiles stay where they are, but the state expects all of its leaves.
        cut = [leaf.spec for leaf in own.cut]
        arrival = own.state.prepare(structure, [*specs, *cut], strict=True)
        arriving = arrival.leaves[: len(specs)]
        # A restore may leave a leaf to other stages of a pipeline; a save compares it.
        if not all(arriving):
            pairs = zip(specs, arriving, strict=True)
            lacking = [f"{spec} is on root, not here" for spec, to in pairs if to is None]
            raise_mismatch(own.name, lacking)
        targets = tuple(cast("Sequence[Leaf]", arriving))
        look_at(_chosen(targets, sent), form.sizes[np.array(sent, np.int64)])
        if difference.leaves is not None:
            _keep_equal(own.leaves, targets, set() if is_root else set(sent))
    return _Delivery(
        index=difference.index,
        names=difference.names(form.names),
        form=form,
        sent=sent,
        averaged=averaged,
        targets=targets,
        arrival=arrival,
    )


def _chosen(leaves: Sequence[Leaf], numbers: Sequence[int]) -> Sequence[Leaf]:
    # Where all differ there are none to pick out.
    return leaves if len(numbers) == len(leaves) else [leaves[n] for n in numbers]


def _averaged(own: CapturedState, difference: StateDifference) -> tuple[int, ...]:
    if own.state.sync_mode != "mean" or difference.form:
        return ()
    specs = own.specs
    return tuple(n for n in difference.leaves or () if specs[n].dtype in dtypes.FLOATING)


def _keep_equal(
    leaves: Sequence[Leaf], targets: Sequence[Leaf], sent: Collection[int]
) -> None:
    """Fill targets that receive nothing with this rank's own bytes, which are equal."""
    equal = set(range(len(leaves))) - set(sent) if len(sent) < len(leaves) else ()
    for number in sorted(equal):
        leaf, target = leaves[number], targets[number]
        if leaf is not target and not _same_memory(leaf, target):
            target.buffer.write(leaf.buffer.read())


def _same_memory(leaf: Leaf, target: Leaf) -> bool:
    place = leaf.buffer.place()
    if place is not None and place == target.buffer.place():
        return True  # on a device, which has no view
    source, destination = leaf.buffer.view(), target.buffer.view()
    if source is None or destination is None or not len(source):
        return False
    pair = np.frombuffer(source, "u1"), np.frombuffer(destination, "u1")
    return bool(np.shares_memory(*pair))


class _RootsBytes:
    """Root's bytes of each leaf of all compared states."""

    def __init__(self, captured: Sequence[CapturedState]) -> None:
        self._leaves = [leaf for content in captured for leaf in content.leaves]

    def bytes_of(self, index: int) -> memoryview:
        return self._leaves[index].buffer.read()

    def digest_of(self, index: int) -> bytes:
        return Digest.of(self.bytes_of(index)).whole


def _destinations(
    captured: Sequence[CapturedState], deliveries: Sequence[_Delivery]
) -> list[tuple[Leaf, ...]]:
    """Return for each compared state the destinations of root's leaves."""
    targets = {delivery.index: delivery.targets for delivery in deliveries}
    return [targets.get(index, content.leaves) for index, content in enumerate(captured)]


def _homes(places: Sequence[Sequence[Leaf]]) -> list[tuple[int, int]]:
    return [(state, n) for state, leaves in enumerate(places) for n in range(len(leaves))]


def _overlaps(
    captured: Sequence[CapturedState], deliveries: Sequence[_Delivery]
) -> list[Overlap]:
    """Return this rank's overlaps in which a leaf is about to be overwritten."""
    places = _destinations(captured, deliveries)
    found = find_overlaps(list(chain.from_iterable(places)))
    if not found:
        return []
    homes = _homes(places)
    changing = {(one.index, n) for one in deliveries for n in (*one.sent, *one.averaged)}
    return [
        overlap
        for overlap in found
        if any(homes[index] in changing for index in overlap.leaves)
    ]


def _without_overlaps(
    captured: Sequence[CapturedState],
    deliveries: Sequence[_Delivery],
    overlaps: Sequence[Overlap],
) -> list[_Delivery]:
    """Return the deliveries with private memory for one leaf of each overlap."""
    places = _destinations(captured, deliveries)
    homes = _homes(places)
    found = {delivery.index: delivery for delivery in deliveries}

    def name_of(index: int) -> str:
        state, n = homes[index]
        return f"state {captured[state].name!r}, leaf {places[state][n].spec.name!r}"

    def move(index: int) -> bool:
        state, n = homes[index]
        arrival = found[state].arrival if state in found else None
        leaf = None if arrival is None else arrival.elsewhere(n)
        if leaf is None:
            return False
        if n not in found[state].sent:
            leaf.buffer.write(places[state][n].buffer.read())
        targets = list(found[state].targets)
        targets[n] = leaf
        found[state] = replace(found[state], targets=tuple(targets))
        return True

    separate_overlaps(overlaps, move, name_of)
    return [found[delivery.index] for delivery in deliveries]


def _transfer(
    comm: Communicator,
    captured: Sequence[CapturedState],
    deliveries: Sequence[_Delivery],
    options: Options,
    deferred: Deferred,
) -> dict[str, CapturedState]:
    """Send and average; return the states whose values changed on root as well."""
    averaged: dict[str, CapturedState] = {}
    for delivery in deliveries:
        if delivery.averaged:
            average_leaves(comm, [delivery.targets[n] for n in delivery.averaged], deferred)
            own = captured[delivery.index]
            averaged[own.name] = _with_new_digests(own, delivery)
    sent = list(chain.from_iterable(delivery.sent_leaves for delivery in deliveries))
    sizes = np.concatenate([delivery.sent_sizes for delivery in deliveries])
    send_leaves(comm, sent, sizes, options.io.window_bytes, deferred)
    return averaged


def _with_new_digests(own: CapturedState, delivery: _Delivery) -> CapturedState:
    if own.digests is None:  # compared by fingerprints, which are needed no more
        return replace(own, leaves=delivery.targets, fingerprints=None)
    digests = list(own.digests)
    for number in delivery.averaged:
        digests[number] = Digest.of(delivery.targets[number].buffer.read())
    return replace(own, leaves=delivery.targets, digests=Digests.of(digests))


def _adopt(
    comm: Communicator,
    captured: Sequence[CapturedState],
    deliveries: Sequence[_Delivery],
    deferred: Deferred,
) -> None:
    def adopt() -> None:
        deferred.raise_failure()
        for delivery in deliveries:
            if delivery.arrival is not None:
                with concerning(f"state {captured[delivery.index].name!r}"):
                    delivery.arrival.adopt()

    agree(comm, "taking over root's states", adopt, error=StageError)
