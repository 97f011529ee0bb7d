# SPDX-License-Identifier: Apache-2.0
"""What a checkpoint directory holds, apart from files on which nothing depends."""

from __future__ import annotations

import os

from mpi_ckpt.storage.format.layout import HISTORY, STATUS

LOSSY = (HISTORY, STATUS)
"""They are no part of what a crash may leave."""


def names_in(path) -> list[str]:
    """Return the sorted names in a directory, but those files."""
    return sorted(name for name in os.listdir(path) if name not in LOSSY)
