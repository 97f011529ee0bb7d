# SPDX-License-Identifier: Apache-2.0
"""Trains a small network under mpirun. If the job is killed, it begins anew."""

import torch
from mpi4py import MPI
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

comm = MPI.COMM_WORLD
torch.manual_seed(1)
inputs = torch.randn(4096, 8)
dataset = TensorDataset(inputs, inputs.sum(1, keepdim=True).sin())
model = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.Tanh(), torch.nn.Linear(32, 1))
optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.9)
sampler = DistributedSampler(dataset, comm.size, comm.rank)
loader = DataLoader(dataset, batch_size=256 // comm.size, sampler=sampler)


def average_gradients() -> None:
    """Replace this rank's gradients by the mean over all ranks."""
    for parameter in model.parameters():
        comm.Allreduce(MPI.IN_PLACE, parameter.grad.numpy())
        parameter.grad /= comm.size


def main() -> None:
    """Train."""
    for epoch in range(10):
        sampler.set_epoch(epoch)
        for batch, wanted in loader:
            loss = torch.nn.functional.mse_loss(model(batch), wanted)
            optimizer.zero_grad()
            loss.backward()
            average_gradients()
            optimizer.step()
        scheduler.step()
        if comm.rank == 0:
            print(f"epoch {epoch}  loss {loss.item():.6f}", flush=True)


main()
