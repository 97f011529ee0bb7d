# SPDX-License-Identifier: Apache-2.0
"""Broadcasts any Python object: its arrays without a copy, the rest pickled."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

from mpi_ckpt.comm import agree, bcast_buffers, bcast_bytes, bcast_json
from mpi_ckpt.errors import StageError
from mpi_ckpt.integrations.horovod.attach import attached
from mpi_ckpt.integrations.horovod.packing import Packed, pack, unpack
from mpi_ckpt.integrations.horovod.receive_buffers import allocate_buffers

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from mpi4py import MPI

    from mpi_ckpt.comm import Communicator

__all__ = ["allgather_object", "broadcast_object"]

Result = TypeVar("Result")

_SAFE = "no object was changed"
_NOTHING = Packed(b"", ())


def broadcast_object(
    obj: Any,  # noqa: ANN401
    root_rank: int = 0,
    name: str | None = None,
    process_set: Any = None,  # noqa: ANN401 (hvd.ProcessSet)
    *,
    in_place: bool = False,
    comm: MPI.Intracomm | None = None,
    deadline_seconds: float = 600.0,
) -> Any:  # noqa: ANN401
    """Give every rank root's object.

    Collective. Main thread only. Arrays and tensors of any size are received in their final
    memory, without a copy; root's pickle of the rest is small. Small arrays of one object
    may share memory of up to 16 MiB; up to 256 MiB of the memory of large ones is kept for
    the next object after they are gone.

    Args:
        obj: On root, anything that pickles (by cloudpickle if that is installed, as with
            Horovod); ignored elsewhere, unless ``in_place``.
        root_rank: Horovod's number of the rank that has the object, among all of its ranks.
        name: Name for errors.
        process_set: As for `communicator`.
        in_place: If a rank's own ``obj`` differs from root's only in the contents of
            arrays, the rank receives into these, and returns it. Otherwise a new object is
            made as usual.
        comm: As for `communicator`.
        deadline_seconds: How long a wait may take.

    Returns:
        ``obj`` itself on root, an equal one elsewhere.

    Raises:
        StageError: On every rank, if root cannot pickle it, or another rank lacks memory
            for it or cannot unpickle it.
        CheckpointError: On every rank, for any other failure.
    """
    with attached(root_rank, process_set, comm, deadline_seconds) as private:
        return _broadcast(private, obj, name, in_place=in_place)


def allgather_object(
    obj: Any,  # noqa: ANN401
    name: str | None = None,
    process_set: Any = None,  # noqa: ANN401 (hvd.ProcessSet)
    *,
    comm: MPI.Intracomm | None = None,
    deadline_seconds: float = 600.0,
) -> list[Any]:
    """Give every rank the objects of all ranks, in rank order.

    Collective. Main thread only. As many broadcasts as there are ranks.

    Args:
        obj: As for `broadcast_object`; its type may differ between ranks.
        name: Name for errors.
        process_set: As for `communicator`.
        comm: As for `communicator`.
        deadline_seconds: How long a wait may take.

    Raises:
        StageError: On every rank, as `broadcast_object` does.
        CheckpointError: On every rank, for any other failure.
    """
    gathered = []
    first = 0 if process_set is None else process_set.ranks[0]
    with attached(first, process_set, comm, deadline_seconds) as private:
        for rank in range(private.size):
            private.root = rank
            gathered.append(_broadcast(private, obj, name))
    return gathered


def _broadcast(
    comm: Communicator,
    obj: Any,  # noqa: ANN401
    name: str | None,
    *,
    in_place: bool = False,
) -> Any:  # noqa: ANN401
    doing = f"broadcasting object {name!r}" if name else "broadcasting an object"

    def agreed(part: str, work: Callable[[], Result]) -> Result:
        return agree(comm, f"{doing}, {part}", work, error=StageError, safe=_SAFE)

    packed = agreed("pickling", lambda: pack(obj) if comm.is_root else _NOTHING)
    pickled = bcast_bytes(comm, packed.pickled, doing)
    lengths = bcast_json(comm, packed.lengths, doing)

    def find_room() -> tuple[Sequence[memoryview], bool]:
        if comm.is_root:
            return packed.buffers, True
        if in_place and (own := pack(obj)).fits(pickled, lengths):
            return own.buffers, True
        return allocate_buffers(lengths), False

    room, is_there = agreed("making room", find_room)
    bcast_buffers(comm, room, doing)
    return agreed("unpickling", lambda: obj if is_there else unpack(pickled, room))
