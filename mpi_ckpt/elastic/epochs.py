# SPDX-License-Identifier: Apache-2.0
"""Loops over epochs, and resumes at the interrupted one."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mpi_ckpt.elastic.sampler import ElasticSampler
from mpi_ckpt.errors import StateMismatchError
from mpi_ckpt.state import Arrival, Capture, LeafState, Structure

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from mpi_ckpt.leaves.leaf import LeafSpec
    from mpi_ckpt.state import State

__all__ = ["EpochState", "remaining_epochs_until"]


class EpochState(LeafState):
    """The number of finished epochs, and the running one.

    The running epoch is not saved as such: a restart enters it again, and an
    `ElasticSampler` gives the position in it. Before a save at the end of the loop's body,
    when all of the epoch's work is done, call `done`.

    Args:
        name: As for `mpi_ckpt.State`.

    Attributes:
        finished: Number of finished epochs.
        current: Number of the running epoch, None outside of the loop.
        entered: How often this process has entered an epoch.

    Raises:
        RegistrationError: On every rank that makes it, if the name is illegal.
    """

    def __init__(self, name: str = "epochs") -> None:
        super().__init__(name)
        self.finished = 0
        self.current: int | None = None
        self.entered = 0
        self._states: Mapping[str, State] = {}

    def done(self) -> None:
        """Mark the running epoch as done: a restart from a later save does not repeat it.

        Not collective, but every rank must call it alike. Call it in the last line of a
        loop's body, or just before its save; a second call in an epoch has no effect.

        Raises:
            RuntimeError: On every rank that calls, if no loop over the epochs is running.
        """
        if self.current is None:
            raise RuntimeError(f"no loop over {self.name!r} is running: no epoch to end")
        self.finished = max(self.finished, self.current + 1)

    @property
    def is_repeatable(self) -> bool:
        """Whether a restart from here would repeat the present code of this rank.

        False outside of an epoch, in one that is `done`, and in a loop over batches, whose
        position an `ElasticSampler` restores.
        """
        is_open = self.current is not None and self.current >= self.finished
        return is_open and not any(sampler.is_within for sampler in self._samplers())

    def join(self, states: Mapping[str, State]) -> None:
        """See `LeafState`. Not collective."""
        self._states = states

    def restored(self) -> str:
        """See `LeafState`. Not collective."""
        at_end = [
            sampler.name
            for sampler in self._samplers()
            if sampler.is_exhausted and sampler.epoch == self.finished
        ]
        if not at_end:
            return ""
        return (
            f"epoch {self.finished} is about to be repeated: it was saved after the last "
            f"batch of {', '.join(map(repr, at_end))}, so no batch is left, and the code "
            "after the batches runs again if it ran before the save; call "
            f"{self.name}.done() before a save at the end of the loop body"
        )

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

    def _samplers(self) -> list[ElasticSampler]:
        return [
            state for state in self._states.values() if isinstance(state, ElasticSampler)
        ]


def remaining_epochs_until(limit: int, epochs: EpochState) -> Iterator[int]:
    """Iterate over the remaining epochs.

    Not collective: every rank iterates by itself, over the same numbers. An epoch counts as
    finished when its body ends in any way, as in adaptdl; in a save inside the body it is
    unfinished, unless `EpochState.done` was called before.

    Args:
        limit: Number of the first epoch not to run.
        epochs: The state that a manager saves and restores.

    Raises:
        RuntimeError: On every rank that calls, if a loop over the same epochs is running.
    """
    if epochs.current is not None:
        raise RuntimeError(f"a loop over {epochs.name!r} is running already")
    while epochs.finished < limit:
        epochs.current = epochs.finished
        epochs.entered += 1
        try:
            yield epochs.current
        finally:
            epochs.done()
            epochs.current = None
