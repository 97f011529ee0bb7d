# SPDX-License-Identifier: Apache-2.0
"""Finds which of its two package names Lightning has in this program."""

from __future__ import annotations

import sys
from importlib import import_module
from typing import Any

from mpi_ckpt.errors import LaunchError

_NAMES = ("lightning.pytorch", "pytorch_lightning")


def classes(module: str) -> Any:  # noqa: ANN401 (a module)
    """Return a module of the Lightning that the program has or can import. No MPI.

    Args:
        module: Name below ``lightning.pytorch`` or ``pytorch_lightning``.

    Raises:
        LaunchError: If there is none.
    """
    used = [name for name in _NAMES if name in sys.modules]
    failures = []
    for name in [*used, *_NAMES]:
        try:
            return import_module(f"{name}.{module}")
        except ImportError as error:
            failures.append(str(error))
    raise LaunchError(
        f"PyTorch Lightning cannot be imported ({'; '.join(dict.fromkeys(failures))}): "
        "pip install 'mpi_ckpt[lightning]'"
    )
