# SPDX-License-Identifier: Apache-2.0
"""``python -m mpi_ckpt`` is ``mpi-ckpt``."""

from mpi_ckpt.cli import main

if __name__ == "__main__":
    main()
