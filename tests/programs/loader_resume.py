# SPDX-License-Identifier: Apache-2.0
"""Resumes in mid-epoch under loaders with workers: loader_resume.py FOLDER

With 3 ranks. The first part of an epoch is trained on by some of them, the next by
others: what the workers have fetched ahead of the last save is fetched again.
"""

import sys
from pathlib import Path

import torch
from mpi4py import MPI
from torch.utils.data import DataLoader, Dataset

LENGTH, BATCH = 60, 7
PARTS = (2, 3, 1, 3, 2)


class Numbers(Dataset):
    """Samples that are their own numbers."""

    def __len__(self) -> int:
        return LENGTH

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.tensor(index)


def train(comm: MPI.Intracomm, folder: Path, batches: int | None) -> list[int]:
    """Restore, train on some batches, save amid what was fetched ahead; return samples."""
    from mpi_ckpt import CheckpointManager, ElasticSampler

    sampler = ElasticSampler(LENGTH, BATCH, seed=3)
    samples: list[int] = []
    with CheckpointManager(folder, [sampler], comm=comm) as manager:
        manager.restore()
        loader = DataLoader(
            Numbers(),
            batch_sampler=sampler,
            num_workers=2,
            prefetch_factor=2,
            multiprocessing_context="fork",
        )
        for done, batch in enumerate(loader, 1):
            samples += batch.tolist()
            sampler.record_batch()
            if done == batches:
                break
        manager.save()
    return [sample for part in comm.allgather(samples) for sample in part]


def main() -> None:
    world, folder = MPI.COMM_WORLD, Path(sys.argv[1])
    seen: list[int] = []
    for number, size in enumerate(PARTS, 1):
        part = world.Split(int(world.rank >= size), world.rank)
        if world.rank < size:
            last = number == len(PARTS)
            seen += train(part, folder, None if last else 2)
        part.Free()
        world.Barrier()
    if world.rank == 0:
        assert sorted(seen) == list(range(LENGTH)), sorted(seen)
        print("each sample once")


if __name__ == "__main__":
    main()
