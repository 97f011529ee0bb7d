# SPDX-License-Identifier: Apache-2.0
"""Terminates a data-loader worker of a rank: loader_worker.py FOLDER fork|spawn"""

import multiprocessing
import os
import signal
import sys
import time
from pathlib import Path

import torch
from torch.utils.data import DataLoader, Dataset


class Numbers(Dataset):
    """Samples that come from a worker process."""

    def __len__(self) -> int:
        return 100

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.tensor([index, os.getpid()])


def main() -> None:
    # Not at the top: a spawned worker imports this file, and must not start MPI.
    from mpi_ckpt import CheckpointManager, ElasticSampler, ObjectState

    folder, method = Path(sys.argv[1]), sys.argv[2]
    sampler = ElasticSampler(100, 10)
    with CheckpointManager(folder, [sampler, ObjectState("number", 1)]) as manager:
        manager.save()
        loader = DataLoader(
            Numbers(), batch_sampler=sampler, num_workers=1, multiprocessing_context=method
        )
        batches = iter(loader)
        worker = next(batches)[0, 1].item()
        assert worker != os.getpid()
        sampler.record_batch()
        terminate_worker(worker, batches)
        terminate_child(method)
        assert not manager.step(), "the end of a worker was taken for a wish to stop"
        assert manager.exit_code == 0
        assert len(manager.generations()) == 1
    print("went on")


def terminate_worker(worker: int, batches) -> None:
    """Do what ends a worker that does not end by itself."""
    (process,) = (candidate for candidate in batches._workers if candidate.pid == worker)
    try:
        process.terminate()
        process.join(60)
    except RuntimeError:  # torch's own watch over its workers, from a handler of SIGCHLD
        process.join(60)
    # torch's workers leave with 0 when it is their parent that sends SIGTERM.
    assert process.exitcode in (0, -signal.SIGTERM)


def terminate_child(method: str) -> None:
    """The same with a process in which nobody has replaced our handlers."""
    context = multiprocessing.get_context(method)
    child = context.Process(target=time.sleep, args=(300,))
    child.start()
    time.sleep(0.2)
    child.terminate()
    child.join(60)
    assert child.exitcode == -signal.SIGTERM, child.exitcode


if __name__ == "__main__":
    main()
