# SPDX-License-Identifier: Apache-2.0
"""Starts a job again until it has finished: ``mpi-ckpt run``."""
