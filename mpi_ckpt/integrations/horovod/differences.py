# SPDX-License-Identifier: Apache-2.0
"""Reports all differences between a rank and root at once."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mpi_ckpt.errors import StateMismatchError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mpi_ckpt.leaves.leaf import LeafSpec


def spec_differences(root: Sequence[LeafSpec], own: Sequence[LeafSpec]) -> list[str]:
    """Return how tensors of the same name differ in form. Not collective. Thread-safe.

    Args:
        root: Specs on root.
        own: Specs on this rank.
    """
    ours = {spec.name: spec for spec in own}
    return [
        f"root has {spec}, this rank {ours[spec.name]}"
        for spec in root
        if spec.name in ours and ours[spec.name] != spec
    ]


def raise_differences(what: str, problems: Sequence[str]) -> None:
    """Raise if there are differences. Not collective. Thread-safe.

    Args:
        what: Name of the broadcast values.
        problems: All differences.

    Raises:
        StateMismatchError: On the calling rank, if the list is not empty.
    """
    if problems:
        ordered = sorted(problems)
        raise StateMismatchError(
            f"its {what} do not fit root's; nothing was changed:\n    "
            + "\n    ".join(ordered),
            problems=ordered,
        )
