# SPDX-License-Identifier: Apache-2.0
"""Runs the ``mpi-ckpt`` command as ``python -m mpi_ckpt``."""

from mpi_ckpt.cli import main

if __name__ == "__main__":
    main()
