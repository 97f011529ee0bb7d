# SPDX-License-Identifier: Apache-2.0
"""What lets a training go on with another number of ranks: epochs, samples, sums, stops."""

from mpi_ckpt.memory import Memory

__all__ = ["Memory"]
