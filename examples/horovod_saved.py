# SPDX-License-Identifier: Apache-2.0
"""Trains with Horovod. If the job is killed, it goes on from the last epoch."""

import horovod.torch as hvd
import torch
from mpi4py import MPI  # noqa: F401 (before hvd.init(), which then joins this MPI)
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from mpi_ckpt import CheckpointManager, EpochState, TrainState, remaining_epochs_until

hvd.init()
torch.manual_seed(1)
inputs = torch.randn(2048, 8)
dataset = TensorDataset(inputs, inputs.sum(1, keepdim=True).sin())
model = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.Tanh(), torch.nn.Linear(32, 1))
optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
named = list(model.named_parameters())
hvd.broadcast_parameters(model.state_dict(), root_rank=0)
hvd.broadcast_optimizer_state(optimizer, root_rank=0)
optimizer = hvd.DistributedOptimizer(optimizer, named_parameters=named)
sampler = DistributedSampler(dataset, hvd.size(), hvd.rank())
loader = DataLoader(dataset, batch_size=64, sampler=sampler)


def main() -> None:
    """Train."""
    epochs = EpochState()
    manager = CheckpointManager("run", [TrainState(model, optimizer), epochs])
    manager.restore()
    for epoch in remaining_epochs_until(10, epochs):
        sampler.set_epoch(epoch)
        for batch, wanted in loader:
            optimizer.zero_grad()
            loss = torch.nn.functional.mse_loss(model(batch), wanted)
            loss.backward()
            optimizer.step()
        if hvd.rank() == 0:
            print(f"epoch {epoch}  loss {loss.item():.6f}", flush=True)
        epochs.done()
        manager.save()
    manager.close()


main()
