# SPDX-License-Identifier: Apache-2.0
"""States that can leave out leaves which only the program or only the checkpoint has."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mpi_ckpt.state import Common, LeafState, Structure

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mpi_ckpt.leaf import Leaf, LeafSpec

__all__ = ["MatchedState"]


class MatchedState(LeafState):
    """A leaf state with one comparison, of which a strict restore makes errors."""

    def match(
        self, structure: Structure, specs: Sequence[LeafSpec], *, strict: bool
    ) -> Common:
        """Compare contents that will come with those of the program.

        Not collective. Must not change the state.

        Args:
            structure: As for `LeafState.prepare`.
            specs: Likewise.
            strict: Whether a leaf that only one side has is a mismatch.

        Raises:
            StateMismatchError: On every rank, listing every leaf that does not fit.
        """
        raise NotImplementedError

    def prepare(self, structure: Structure, specs: Sequence[LeafSpec]) -> list[Leaf]:
        """See `LeafState`. Not collective."""
        common = self.match(structure, specs, strict=True)
        return [leaf for leaf in common.leaves if leaf is not None]

    def prepare_common(self, structure: Structure, specs: Sequence[LeafSpec]) -> Common:
        """See `LeafState`. Not collective."""
        return self.match(structure, specs, strict=False)
