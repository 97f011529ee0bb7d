# SPDX-License-Identifier: Apache-2.0
"""The loop over epochs, resumed where it was cut off."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mpi_ckpt.errors import StateMismatchError
from mpi_ckpt.state import Arrival, Capture, LeafState, Structure

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from mpi_ckpt.leaf import LeafSpec

__all__ = ["EpochState", "remaining_epochs_until"]


class EpochState(LeafState):
    """How many epochs are finished, and which one is running.

    The running epoch is not saved as such: after a restart it is entered again, and an
    `ElasticSampler` says where in it.

    Args:
        name: As for `mpi_ckpt.State`.

    Attributes:
        finished: Number of finished epochs.
        current: Number of the running epoch, None outside of the loop.

    Raises:
        RegistrationError: On every rank that makes it, if the name is illegal.
    """

    def __init__(self, name: str = "epochs") -> None:
        super().__init__(name)
        self.finished = 0
        self.current: int | None = None

    def capture(self) -> Capture:
        """See `LeafState`. Not collective."""
        return Capture({"finished": self.finished}, ())

    def prepare(
        self,
        structure: Structure,
        specs: Sequence[LeafSpec],  # noqa: ARG002
        *,
        strict: bool,  # noqa: ARG002
    ) -> Arrival:
        """See `LeafState`. Not collective."""
        finished = structure.get("finished") if isinstance(structure, dict) else None
        if type(finished) is not int or finished < 0:
            raise StateMismatchError(f"state {self.name!r} was not saved from epochs")

        def adopt() -> None:
            self.finished = finished

        return Arrival((), adopt)


def remaining_epochs_until(limit: int, epochs: EpochState) -> Iterator[int]:
    """Iterate over the epochs that are left.

    Not collective: every rank iterates by itself, to the same numbers. An epoch counts
    as finished when its body ends in any way, as in adaptdl; a save inside the body has
    it unfinished.

    Args:
        limit: Number of the first epoch that is not wanted.
        epochs: The state that a manager saves and restores.

    Raises:
        RuntimeError: On every rank that calls, if a loop over the same epochs is running.
    """
    if epochs.current is not None:
        raise RuntimeError(f"a loop over {epochs.name!r} is running already")
    while epochs.finished < limit:
        epochs.current = epochs.finished
        try:
            yield epochs.current
        finally:
            epochs.finished += 1
            epochs.current = None
