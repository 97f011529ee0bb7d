# SPDX-License-Identifier: Apache-2.0
"""The data, the network and the log of train.py: nothing here knows of checkpoints."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.utils.data import TensorDataset

if TYPE_CHECKING:
    from pathlib import Path

    from mpi4py import MPI

__all__ = ["Log", "count_correct", "digest", "load_data", "make_model"]

TRAINING_SAMPLES = 1500


def load_data(comm: MPI.Intracomm) -> tuple[TensorDataset, TensorDataset]:
    """Read the digits on root, send them to all; the last 297 are for testing."""
    arrays = None
    if comm.rank == 0:
        from sklearn.datasets import load_digits

        pixels, digits = load_digits(return_X_y=True)
        order = np.random.default_rng(0).permutation(len(digits))
        arrays = (pixels[order] / 16).astype(np.float32), digits[order]
    images, labels = (torch.from_numpy(array) for array in comm.bcast(arrays))
    first = slice(TRAINING_SAMPLES)
    rest = slice(TRAINING_SAMPLES, None)
    return (
        TensorDataset(images[first], labels[first]),
        TensorDataset(images[rest], labels[rest]),
    )


def make_model() -> torch.nn.Module:
    """Make a network with dropout, so that random streams matter."""
    return torch.nn.Sequential(
        torch.nn.Linear(64, 128),
        torch.nn.LayerNorm(128),
        torch.nn.ReLU(),
        torch.nn.Dropout(0.3),
        torch.nn.Linear(128, 10),
    )


def count_correct(model: torch.nn.Module, data: TensorDataset, comm: MPI.Intracomm) -> int:
    """Test this rank's share of the samples."""
    images, labels = data[comm.rank :: comm.size]
    model.eval()
    with torch.no_grad():
        return int((model(images).argmax(1) == labels).sum())


def digest(model: torch.nn.Module) -> str:
    """Return a fingerprint of all weights, to compare runs by."""
    tensors = model.state_dict().values()
    return hashlib.sha256(b"".join(t.numpy().tobytes() for t in tensors)).hexdigest()


class Log:
    """Events as JSON lines; to a path of None nothing is written."""

    def __init__(self, path: Path | None) -> None:
        self.file = path.open("a") if path else None

    def write(self, event: str, **values: object) -> None:
        """Append a line at once: the next moment may be the last."""
        if self.file is not None:
            print(json.dumps({"event": event, **values}), file=self.file, flush=True)
