# SPDX-License-Identifier: Apache-2.0
"""``mpirun -n N python -m benchmarks save sync``, and what is made of its figures."""

from __future__ import annotations

import sys

__all__ = ["main"]


def main(argv: list[str]) -> None:
    """Measure cases, or hand on to a command that has a name of its own."""
    command, rest = (argv[0], argv[1:]) if argv else ("run", [])
    # Each is imported where it is called: none needs what the others need.
    if command == "plot":
        from benchmarks import plot

        plot.main(rest)
    elif command == "scaling":
        from benchmarks import scaling

        scaling.main(rest)
    elif command == "targets":
        from benchmarks import targets

        targets.main(rest)
    elif command == "start":
        from benchmarks import start

        start.main(rest)
    elif command == "recovery":
        from benchmarks import recovery

        recovery.main(rest)
    else:
        from benchmarks import run

        run.main(rest if command == "run" else argv)


if __name__ == "__main__":
    main(sys.argv[1:])
