# SPDX-License-Identifier: Apache-2.0
"""What Horovod says and does, done by mpi4py: for tests where there is no Horovod."""

from __future__ import annotations

import torch
from mpi4py import MPI


class Horovod:
    """Says what Horovod would that runs on a communicator; gathers by it."""

    def __init__(self, comm, *, mpi=True):
        self.comm = comm
        self.mpi = mpi

    def is_initialized(self):
        return self.comm is not None

    def mpi_enabled(self):
        return self.mpi

    def rank(self):
        return self.comm.rank

    def size(self):
        return self.comm.size

    def allgather(self, tensor, name, process_set=None):
        assert name == "mpi_ckpt.communicator"
        among = self.comm if process_set is None else process_set.comm
        return torch.cat(among.allgather(tensor))


class WholeHorovod(Horovod):
    """With what a script calls to train: runs on all ranks once it was initialised."""

    def __init__(self):
        super().__init__(None)

    def init(self):
        self.comm = MPI.COMM_WORLD

    def shutdown(self):
        self.comm = None

    def broadcast_parameters(self, parameters, root_rank):
        for name in parameters:
            self.comm.Bcast(parameters[name].detach().numpy(), root=root_rank)

    def broadcast_optimizer_state(self, optimizer, root_rank):
        optimizer.load_state_dict(self.comm.bcast(optimizer.state_dict(), root=root_rank))

    def DistributedOptimizer(self, optimizer, named_parameters):
        """Have an optimizer average the gradients of all ranks before each step."""

        def average(optimizer, args, kwargs):
            for _, parameter in named:
                self.comm.Allreduce(MPI.IN_PLACE, parameter.grad.numpy())
                parameter.grad /= self.comm.size

        named = list(named_parameters)
        optimizer.register_step_pre_hook(average)
        return optimizer
