# SPDX-License-Identifier: Apache-2.0
"""A checkpoint directory as one job owns it: what is in it, sweeping, setting aside."""

from mpi_ckpt.storage.directory.checkpoint_directory import CheckpointDirectory

__all__ = ["CheckpointDirectory"]
