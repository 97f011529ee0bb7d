# SPDX-License-Identifier: Apache-2.0
"""Provides a callback that saves a Lightning training and resumes an interrupted one."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from mpi_ckpt.comm.ordering import Claim, order_ranks
from mpi_ckpt.errors import LaunchError, StateMismatchError
from mpi_ckpt.integrations.lightning.package import classes
from mpi_ckpt.integrations.lightning.trainer_state import TrainerState
from mpi_ckpt.manager import CheckpointManager
from mpi_ckpt.options import Options
from mpi_ckpt.states.packed import pack
from mpi_ckpt.states.unshared.rng import RNGState

if TYPE_CHECKING:
    from collections.abc import Sequence
    from os import PathLike

    from mpi4py import MPI

    from mpi_ckpt.integrations.lightning.loader import ElasticLoader
    from mpi_ckpt.state import State, SyncMode

__all__ = ["MPICheckpoint"]

_ADVICE = (
    "start it as `mpirun -n N python train.py` with Trainer(strategy='ddp', "
    "devices=RANKS_PER_HOST, num_nodes=HOSTS)"
)
# All ranks are already running: they have met in torch.
_MEETING_SECONDS = 120.0
_REPLICATED = ("SingleDeviceStrategy", "DDPStrategy")


class MPICheckpoint(classes("callbacks").Checkpoint):  # type: ignore[misc]
    """Saves at steps of the trainer, durably, and restores when ``fit`` starts.

    The same command, with any number of ranks, goes on from the last acknowledged save, in
    mid-epoch with an `ElasticLoader`. A save has all contents of a Lightning checkpoint
    file, and the random streams of each rank. After a request to stop on any rank, ``fit``
    saves and leaves by ``SystemExit(143)`` on all ranks.

    A generation takes precedence over ``fit(ckpt_path=)``, which may serve a first start.

    Args:
        root: Directory of the generations.
        loader: The loader given to ``fit``, if it is an `ElasticLoader`.
        states: More states to save, the same on every rank.
        options: As for `mpi_ckpt.CheckpointManager`. A step is a batch, or the number of
            batches over which the trainer accumulates gradients.
        comm: Communicator of the trainer's ranks, in any order; None is the world.
        sync: What a save does if replicas differ; see `mpi_ckpt.LeafState`.

    Attributes:
        manager: The manager, during ``fit``; None otherwise.
    """

    def __init__(
        self,
        root: str | PathLike[str],
        *,
        loader: ElasticLoader | None = None,
        states: Sequence[State] = (),
        options: Options | None = None,
        comm: MPI.Intracomm | None = None,
        sync: SyncMode = "root",
    ) -> None:
        super().__init__()
        self._root = root
        self._sampler = None if loader is None else loader.sampler
        self._states = tuple(states)
        self._options = options
        self._comm = comm
        self._sync: SyncMode = sync
        self._trainer_state: TrainerState | None = None
        self._rng = RNGState()
        self._streams: bytes | None = None
        self._ordered: MPI.Intracomm | None = None
        self.manager: CheckpointManager | None = None

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:  # noqa: ANN401, ARG002
        """Make the manager, read the newest generation. Collective.

        Raises:
            LaunchError: On every rank, if Lightning and MPI see different ranks, or the
                strategy does not use replicas.
            CheckpointError: On every rank, as `CheckpointManager.restore` does.
        """
        if stage != "fit":
            return
        _refuse_sharded(trainer)
        self._ordered = _order_as(trainer, self._comm)
        self._trainer_state = TrainerState(trainer, sync=self._sync)
        position = [] if self._sampler is None else [self._sampler]
        self.manager = CheckpointManager(
            self._root,
            [self._trainer_state, self._rng, *position, *self._states],
            comm=self._ordered,
            options=self._options,
        )
        # Before the loader is asked for batches.
        if self.manager.restore() is not None:
            self._streams = pack(self._rng.own_value())

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:  # noqa: ANN401, ARG002
        """Pass the restored contents to Lightning. Not collective.

        Raises:
            StateMismatchError: On every rank, if it does not fit the module.
        """
        assert self._trainer_state is not None
        try:
            restored = self._trainer_state.hand_over()
        except (RuntimeError, KeyError, ValueError) as error:
            raise StateMismatchError(
                f"Lightning cannot load what was saved in {self._root}: {error}"
            ) from error
        if restored is not None:
            self._place_sampler(restored["loops"]["fit_loop"])
        if (self._options or Options()).preemption_signals:
            _silence(trainer)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:  # noqa: ANN401, ARG002
        """Set the random streams, make fresh replicas equal. Collective."""
        assert self.manager is not None
        if self._streams is None:
            self.manager.sync()
        else:
            # Last: random numbers drawn in between do not count.
            self._rng.open_part(self._streams, sys.maxsize)()

    def on_train_batch_end(
        self,
        trainer: Any,  # noqa: ANN401
        pl_module: Any,  # noqa: ANN401, ARG002
        outputs: Any,  # noqa: ANN401, ARG002
        batch: Any,  # noqa: ANN401, ARG002
        batch_idx: int,
    ) -> None:
        """Save if a save is due. Collective.

        Raises:
            SystemExit: On every rank, after all is saved, if any was asked to stop.
            CheckpointError: On every rank, as `CheckpointManager.save` does.
        """
        if self._sampler is not None:
            self._sampler.record_batch()
        # After the last batch Lightning still has to validate and to end the epoch: a
        # restart from a save here would skip both. Accumulated gradients are not saved.
        adds_up = (batch_idx + 1) % trainer.accumulate_grad_batches
        if not trainer.is_last_batch and not adds_up:
            self._step()

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:  # noqa: ANN401, ARG002
        """Save if the epoch's last batch has made a save due. Collective.

        Raises:
            SystemExit: On every rank, after all is saved, if any was asked to stop.
            CheckpointError: On every rank, as `CheckpointManager.save` does.
        """
        if trainer.is_last_batch:
            self._step(_metrics_of(trainer))

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:  # noqa: ANN401, ARG002
        """Save the end, so that the same command has nothing left to do. Collective.

        Raises:
            CheckpointError: On every rank, as `CheckpointManager.save` does.
        """
        assert self.manager is not None
        self.manager.save(metrics=_metrics_of(trainer)).wait()

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:  # noqa: ANN401, ARG002
        """Close the manager. Collective."""
        manager, self.manager = self.manager, None
        if manager is not None:
            manager.close()
            assert self._ordered is not None
            self._ordered.Free()

    def on_exception(
        self,
        trainer: Any,  # noqa: ANN401, ARG002
        pl_module: Any,  # noqa: ANN401, ARG002
        exception: BaseException,
    ) -> None:
        """Leave the manager as after an exception in its block. Not collective."""
        manager, self.manager = self.manager, None
        if manager is not None:
            manager.__exit__(type(exception), exception, exception.__traceback__)

    def _step(self, metrics: dict[str, float] | None = None) -> None:
        assert self.manager is not None
        if self.manager.step(metrics=metrics):
            sys.exit(self.manager.exit_code)

    def _place_sampler(self, loops: dict[str, Any]) -> None:
        if self._sampler is None:
            return
        # A loader with workers requests batches before Lightning sets its epoch.
        self._sampler.set_epoch(loops["epoch_progress"]["current"]["processed"])
        done = loops["epoch_loop.batch_progress"]["current"]["ready"]
        whole, left = len(self._sampler), self._sampler.remaining
        if self._sampler.consumed and done + left != whole:
            raise StateMismatchError(
                f"Lightning has counted {done} batches of epoch {self._sampler.epoch}, and "
                f"{left} are left of {whole}: batch_size must not change in "
                "mid-epoch"
            )


def _silence(trainer: Any) -> None:  # noqa: ANN401
    # Lightning would put its own SIGTERM handler before this package's. It broadcasts from
    # within the handler: if only one rank gets the signal, all hang.
    trainer._signal_connector._sigterm_notifier_fn = lambda *_: None  # noqa: SLF001


def _metrics_of(trainer: Any) -> dict[str, float]:  # noqa: ANN401
    return {name: float(value) for name, value in trainer.callback_metrics.items()}


def _refuse_sharded(trainer: Any) -> None:  # noqa: ANN401
    kinds = {kind.__name__ for kind in type(trainer.strategy).__mro__}
    if not kinds & set(_REPLICATED):
        raise LaunchError(
            f"Lightning's {type(trainer.strategy).__name__} does not keep a replica on "
            "each rank; mpi_ckpt saves replicas: use strategy='ddp', or Lightning's own "
            "checkpoints"
        )


def _order_as(trainer: Any, comm: MPI.Intracomm | None) -> MPI.Intracomm | None:  # noqa: ANN401
    def ask() -> Claim:
        ranks = trainer.num_nodes * trainer.num_devices
        if ranks != trainer.world_size:
            raise LaunchError(
                f"Lightning runs {trainer.world_size} ranks, but is set up for "
                f"{trainer.num_nodes} nodes with {trainer.num_devices} devices: its "
                f"samplers would share out the data among {ranks}; {_ADVICE}"
            )
        return Claim(0, trainer.global_rank, trainer.world_size)

    return order_ranks(
        comm,
        ask,
        library="Lightning",
        advice=_ADVICE,
        deadline_seconds=_MEETING_SECONDS,
    )
