# SPDX-License-Identifier: Apache-2.0
"""Provides the command line ``mpi-ckpt``, which inspects and maintains checkpoints.

No MPI and no torch: it works without a running job, on a login node. Commands that read
take no lock and change nothing, so a job may save and prune meanwhile.
"""

from __future__ import annotations

import json
import sys
from importlib.util import find_spec

__all__ = ["main"]

_NEEDED = ("click", "rich")


def main() -> None:
    """Run the command line; exits with 0 (good), 1 (bad) or 2 (wrongly used)."""
    missing = [name for name in _NEEDED if find_spec(name) is None]
    if missing:
        message = (
            f"mpi-ckpt needs {' and '.join(missing)}, which training itself does not: "
            "pip install 'mpi_ckpt[cli]'"
        )
        if "--json" in sys.argv:
            facts = {"class": "ImportError", "kind": "usage", "exit_code": 2}
            sys.stdout.write(json.dumps({"error": {"message": message, **facts}}) + "\n")
        else:
            sys.stderr.write(f"{message}\n")
        raise SystemExit(2)
    from mpi_ckpt.cli.app import cli

    cli(prog_name="mpi-ckpt")
