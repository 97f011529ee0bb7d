# SPDX-License-Identifier: Apache-2.0
"""The command line ``mpi-ckpt``: looks at checkpoints and looks after them.

No MPI and no torch: it works where no job runs, and a login node is enough. Commands that
read take no lock and change nothing, so a job may save and prune meanwhile.
"""

from __future__ import annotations

import sys
from importlib.util import find_spec

__all__ = ["main"]

_NEEDED = ("click", "rich")


def main() -> None:
    """Run the command line; exits with 0 (good), 1 (bad) or 2 (wrongly used)."""
    missing = [name for name in _NEEDED if find_spec(name) is None]
    if missing:
        sys.stderr.write(
            f"mpi-ckpt needs {' and '.join(missing)}, which training itself does not: "
            "pip install 'mpi_ckpt[cli]'\n"
        )
        raise SystemExit(2)
    from mpi_ckpt.cli.app import cli

    cli(prog_name="mpi-ckpt")
