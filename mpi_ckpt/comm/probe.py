# SPDX-License-Identifier: Apache-2.0
"""Reports which MPI is here: ``python -m mpi_ckpt.comm.probe``, run by `mpi-ckpt doctor`.

It is a separate process, because a broken MPI may hang or end the process that loads it. It
prints one JSON object a line, each at once, so that the findings before a hang are known:
first mpi4py, then the library without starting it, then the result of starting it.
"""

from __future__ import annotations

import json
import sys
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from mpi_ckpt.comm.launch import load_mpi
from mpi_ckpt.errors import LaunchError

_LEVELS = ("SINGLE", "FUNNELED", "SERIALIZED", "MULTIPLE")


def main() -> None:
    """Print the findings. Collective: run as a job of one rank."""
    try:
        _print_found(mpi4py=version("mpi4py"))
    except PackageNotFoundError:
        _print_found(error="mpi4py is not installed")
        return
    import mpi4py

    mpi4py.rc.initialize = False
    mpi4py.rc.finalize = False
    try:
        mpi = load_mpi()
    except LaunchError as error:
        _print_found(error=str(error))
        return
    vendor, numbers = mpi.get_vendor()
    _print_found(
        vendor=vendor,
        version=".".join(map(str, numbers)),
        library=mpi.Get_library_version().splitlines()[0].strip("\0 "),
        standard=".".join(map(str, mpi.Get_version())),
    )
    level = mpi.Init_thread(mpi.THREAD_MULTIPLE)
    levels = dict(
        zip((getattr(mpi, f"THREAD_{name}") for name in _LEVELS), _LEVELS, strict=True)
    )
    _print_found(
        thread_level=levels.get(level, str(level)), funneled=level >= mpi.THREAD_FUNNELED
    )
    mpi.Finalize()


def _print_found(**found: Any) -> None:  # noqa: ANN401 (JSON)
    sys.stdout.write(json.dumps(found) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
