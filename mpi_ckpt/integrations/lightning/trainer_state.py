# SPDX-License-Identifier: Apache-2.0
"""Provides the contents of a Lightning checkpoint file as a state."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mpi_ckpt.errors import LaunchError, StageError
from mpi_ckpt.states.nested import NestedState

if TYPE_CHECKING:
    from mpi_ckpt.state import Capture, SyncMode


class TrainerState(NestedState):
    """A Lightning trainer: module, optimizers, schedulers, loops, callbacks, data of hooks.

    Gets the contents from Lightning and returns them to it, so that all hooks run as with a
    checkpoint file. Restored contents stay here until `hand_over`: a trainer can only take
    them after its optimizers are made.

    Args:
        trainer: The trainer, in ``fit``.
        name: As for `mpi_ckpt.State`.
        sync: As for `LeafState`. Contents that are not tensors stay each rank's own; root's
            are saved.
    """

    def __init__(
        self,
        trainer: Any,  # noqa: ANN401 (a Trainer)
        *,
        name: str = "lightning",
        sync: SyncMode = "root",
    ) -> None:
        super().__init__(name, sync=sync)
        self._connector = _connector_of(trainer)
        self.is_ready = False
        """Whether the trainer has all its parts: before, contents are only kept."""
        self.arrived: dict[str, Any] | None = None
        """Contents that were restored and not handed over yet."""

    def capture(self) -> Capture:
        """See `LeafState`. Not collective.

        Raises:
            StageError: On the calling rank, for a value without a safe form on disk.
        """
        try:
            return super().capture()
        except StageError as error:
            raise StageError(
                f"{error}. Where it is a hyper-parameter: "
                'self.save_hyperparameters(ignore=["..."])'
            ) from error

    def nested(self) -> Any:  # noqa: ANN401
        """See `NestedState`. Not collective."""
        return self._connector.dump_checkpoint(weights_only=False) if self.is_ready else {}

    def accept(self, value: Any) -> None:  # noqa: ANN401
        """See `NestedState`. Not collective."""
        # During training this is a sync, which has written tensors in place; anything else
        # would look like a restart to the loops.
        if not self.is_ready:
            self.arrived = value

    def hand_over(self) -> dict[str, Any] | None:
        """Let Lightning take over the arrived contents. Not collective.

        Called after the optimizers are made: the trainer itself then restores loops,
        optimizers and schedulers.

        Returns:
            The arrived contents; None if there are none.
        """
        value, self.arrived, self.is_ready = self.arrived, None, True
        if value is not None:
            connector = self._connector
            connector._loaded_checkpoint = value  # noqa: SLF001 (as its resume_start does)
            connector.restore_model()
            connector.restore_datamodule()
            connector.restore_callbacks()
        return value


def _connector_of(trainer: Any) -> Any:  # noqa: ANN401
    # Lightning has no public access to a checkpoint without a file.
    connector = getattr(trainer, "_checkpoint_connector", None)
    needed = (
        *("dump_checkpoint", "_loaded_checkpoint"),
        *("restore_model", "restore_datamodule", "restore_callbacks"),
    )
    missing = [name for name in needed if not hasattr(connector, name)]
    if missing:
        raise LaunchError(
            "this version of Lightning makes its checkpoints in another way (no "
            f"{missing}); mpi_ckpt was tested with 2.6"
        )
    return connector
