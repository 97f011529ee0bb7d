# SPDX-License-Identifier: Apache-2.0
"""All that Lightning would put into a checkpoint file, as a state."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mpi_ckpt.errors import LaunchError, StageError
from mpi_ckpt.states.nested import NestedState

if TYPE_CHECKING:
    from mpi_ckpt.state import Capture, SyncMode


class TrainerState(NestedState):
    """A Lightning trainer: module, optimizers, schedulers, loops, callbacks, hooks' own.

    Asks Lightning for the contents and lets Lightning take them back, so that all hooks
    run as with a checkpoint file. What arrives stays here until `hand_over`: a trainer
    can only take it when its optimizers are there.

    Args:
        trainer: The trainer, in ``fit``.
        name: As for `mpi_ckpt.State`.
        sync: As for `LeafState`. What is no tensor stays each rank's own; root's is saved.
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
        # Once it trains this is a sync, which has written tensors in place; the loops
        # would take anything else for a restart.
        if not self.is_ready:
            self.arrived = value

    def hand_over(self) -> dict[str, Any] | None:
        """Let Lightning restore what has arrived. Not collective.

        Called when the optimizers are made: the trainer itself goes on with loops,
        optimizers and schedulers.

        Returns:
            What has arrived; None for nothing.
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
    # Lightning has no public way to a checkpoint that is no file.
    connector = getattr(trainer, "_checkpoint_connector", None)
    needed = (
        *("dump_checkpoint", "_loaded_checkpoint"),
        *("restore_model", "restore_datamodule", "restore_callbacks"),
    )
    missing = [name for name in needed if not hasattr(connector, name)]
    if missing:
        raise LaunchError(
            f"this version of Lightning keeps its checkpoints otherwise (no {missing}); "
            "mpi_ckpt was tested with 2.6"
        )
    return connector
