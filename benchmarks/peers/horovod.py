# SPDX-License-Identifier: Apache-2.0
"""Horovod's broadcasts and reductions of the same tensors."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from benchmarks import names
from benchmarks.peers.base import Peer

if TYPE_CHECKING:
    import torch

__all__ = ["Horovod"]


class Horovod(Peer):
    """See the module."""

    name = names.HOROVOD
    package = "horovod"
    can = frozenset({"equalize", "broadcast", "allreduce", "broadcast_object"})

    def begin(self) -> None:
        """Start its background thread: it polls, which would cost the others their time."""
        import horovod.torch as hvd

        hvd.init()

    def end(self) -> None:
        """Stop it again."""
        import horovod.torch as hvd

        hvd.shutdown()

    def equalize(self) -> None:
        """See `Peer`."""
        import horovod.torch as hvd

        hvd.broadcast_parameters(self.tensors(), root_rank=0)

    def equalize_training(
        self, module: torch.nn.Module, optimizer: torch.optim.Optimizer
    ) -> None:
        """Make a model and its optimizer equal to root's, as its examples do."""
        import horovod.torch as hvd

        hvd.broadcast_parameters(module.state_dict(), root_rank=0)
        hvd.broadcast_optimizer_state(optimizer, root_rank=0)

    def elastic_state(
        self, module: torch.nn.Module, optimizer: torch.optim.Optimizer
    ) -> Any:  # noqa: ANN401 (it has no types)
        """Make the state whose commits are kept in memory, on every rank."""
        import horovod.torch as hvd

        return hvd.elastic.TorchState(model=module, optimizer=optimizer)

    def broadcast(self, tensor: torch.Tensor) -> None:
        """Broadcast one tensor from root, in place."""
        import horovod.torch as hvd

        hvd.broadcast_(tensor, root_rank=0, name="sweep")

    def allreduce(self, tensor: torch.Tensor) -> None:
        """Average one tensor over the ranks, in place."""
        import horovod.torch as hvd

        hvd.allreduce_(tensor, name="sweep", op=hvd.Average)

    def broadcast_object(self, value: object) -> None:
        """Broadcast a value from root as one object."""
        import horovod.torch as hvd

        hvd.broadcast_object(value, root_rank=0, name="object")
