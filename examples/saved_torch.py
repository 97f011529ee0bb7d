# SPDX-License-Identifier: Apache-2.0
"""Trains a small network under mpirun. If the job is killed, it goes on from a save."""

import sys

import torch
from mpi4py import MPI
from torch.utils.data import DataLoader, TensorDataset

from mpi_ckpt import CheckpointManager, ElasticSampler, Options, RNGState, TrainState

comm = MPI.COMM_WORLD
torch.manual_seed(1)
inputs = torch.randn(4096, 8)
dataset = TensorDataset(inputs, inputs.sum(1, keepdim=True).sin())
model = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.Tanh(), torch.nn.Linear(32, 1))
optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.9)
sampler = ElasticSampler(len(dataset), batch_size=256)
loader = DataLoader(dataset, batch_sampler=sampler, generator=torch.Generator())


def average_gradients() -> None:
    """Replace this rank's gradients by the mean over all ranks."""
    for parameter in model.parameters():
        comm.Allreduce(MPI.IN_PLACE, parameter.grad.numpy())
        parameter.grad /= comm.size


def main() -> None:
    """Train, and go on where the last run was cut off."""
    training = TrainState(module=model, optimizer=optimizer, scheduler=scheduler)
    states = [training, sampler, RNGState()]
    with CheckpointManager("run", states, options=Options(interval=20)) as manager:
        if manager.restore() is None:
            manager.sync()
        for epoch in range(sampler.epoch, 10):
            sampler.set_epoch(epoch)
            for batch, wanted in loader:
                loss = torch.nn.functional.mse_loss(model(batch), wanted)
                optimizer.zero_grad()
                loss.backward()
                average_gradients()
                optimizer.step()
                sampler.record_batch()
                if manager.step():
                    sys.exit(manager.exit_code)
            scheduler.step()
            sampler.set_epoch(epoch + 1)
            manager.save()
            if comm.rank == 0:
                print(f"epoch {epoch}  loss {loss.item():.6f}", flush=True)


main()
