# SPDX-License-Identifier: Apache-2.0
"""Provides a plugin by which Lightning's checkpoints are durable, atomic and proven."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mpi_ckpt.errors import NoCheckpointError, OptionsError, StageError
from mpi_ckpt.integrations.lightning.package import classes
from mpi_ckpt.integrations.lightning.single_state import (
    load_alone,
    remove_alone,
    save_alone,
)
from mpi_ckpt.states.nested import ObjectState
from mpi_ckpt.storage import filesystem

__all__ = ["MPICheckpointIO"]

_NAME = "lightning"


class MPICheckpointIO(classes("plugins").CheckpointIO):  # type: ignore[misc]
    """Writes each checkpoint of ``ModelCheckpoint`` or ``save_checkpoint`` as a generation.

    ``Trainer(plugins=[MPICheckpointIO()])``. Instead of a file, it writes a directory of
    the same name with one generation in it. Lightning calls the plugin on rank 0 to save
    and on every rank to load, so nothing here is collective and MPI is not needed. It still
    reads files that Lightning itself has written.

    Args:
        pickle: Keep values of any type, such as hyper-parameters that are objects, and
            allow unpickling: anyone who can write to a checkpoint can then run code in your
            job. Otherwise a save refuses such values.
    """

    def __init__(self, *, pickle: bool = False) -> None:
        self._pickle = pickle

    def save_checkpoint(
        self,
        checkpoint: dict[str, Any],
        path: str | Path,
        storage_options: Any = None,  # noqa: ANN401
    ) -> None:
        """Write a checkpoint, durable when this returns. Root only.

        Args:
            checkpoint: Lightning's checkpoint.
            path: Path of the directory.
            storage_options: Must be None; there are none.

        Raises:
            SaveError: On root; an earlier checkpoint is untouched.
            OptionsError: On root, if options are given, or the path is not a local one.
        """
        if storage_options is not None:
            raise OptionsError("MPICheckpointIO takes no storage_options")
        state = ObjectState(_NAME, checkpoint, pickle=self._pickle)
        try:
            save_alone(_local(path), state, int(checkpoint.get("global_step", 0)))
        except StageError as error:
            raise StageError(
                f"{error}. Where it is a hyper-parameter: "
                'self.save_hyperparameters(ignore=["..."]), or MPICheckpointIO(pickle=True)'
            ) from error

    def load_checkpoint(
        self,
        path: str | Path,
        map_location: Any = None,  # noqa: ANN401
        weights_only: bool | None = None,
    ) -> dict[str, Any]:
        """Read a checkpoint, every byte proven. Not collective; on every rank.

        Args:
            path: Path of a directory of `save_checkpoint`, or of a Lightning file.
            map_location: For a Lightning file; otherwise tensors are on the host.
            weights_only: For a Lightning file. None: True, so that no code runs.

        Raises:
            RestoreError: On the calling rank, if it is missing, damaged or unreadable.
        """
        where = _local(path)
        if where.is_file():
            safe = True if weights_only is None else weights_only
            found: dict[str, Any] = (
                classes("plugins")
                .TorchCheckpointIO()
                .load_checkpoint(path, map_location, weights_only=safe)
            )
            return found
        if not where.exists():
            raise NoCheckpointError(f"there is no checkpoint {where}", path=where)
        state = ObjectState(_NAME, pickle=self._pickle)
        load_alone(where, state)
        return dict(state.value)

    def remove_checkpoint(self, path: str | Path) -> None:
        """Delete a checkpoint, if it exists. Root only.

        Raises:
            SaveError: On root, if it holds anything else, or cannot be deleted.
        """
        where = _local(path)
        if where.is_symlink() or where.is_file():
            filesystem.remove_file(where)
        else:
            remove_alone(where)


def _local(path: str | Path) -> Path:
    if "://" in str(path):
        raise OptionsError(f"{path}: MPICheckpointIO writes to local paths only")
    return Path(path).absolute()
