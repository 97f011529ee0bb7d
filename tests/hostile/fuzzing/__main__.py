# SPDX-License-Identifier: Apache-2.0
"""Fuzzes one target with atheris, led by what code each input reaches::

    python -m tests.hostile.fuzzing manifest CORPUS [options of libFuzzer]

An input that makes a target raise, or takes more than a second or 64 MiB beyond the most
that any before it took, is written to a file, and the exit code is not 0.
"""

from __future__ import annotations

import random
import resource
import sys
import time
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["mpi_ckpt"]):
    from tests.hostile.fuzzing.mutate import mutate
    from tests.hostile.fuzzing.targets import TARGETS, seeds
    from tests.hostile.watch import CPU_SECONDS_MAX, EXTRA_BYTES_MAX

TARGET, CORPUS = sys.argv[1], Path(sys.argv[2])


def change(data: bytes, most: int, seed: int) -> bytes:
    """Change an input: half the time as who knows the format, else as libFuzzer does."""
    rng = random.Random(seed)
    if rng.random() < 0.5:
        return mutate(TARGET, data, rng)[:most]
    return bytes(atheris.Mutate(data, most))


def peak_bytes() -> int:
    """Return the most memory that this process ever had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


def main() -> None:
    CORPUS.mkdir(parents=True, exist_ok=True)
    for number, data in enumerate(seeds(TARGET)):
        (CORPUS / f"seed-{number}").write_bytes(data)
    run = TARGETS[TARGET]

    def try_one(data: bytes) -> None:
        start, most = time.process_time(), peak_bytes()
        run(data)
        assert time.process_time() - start <= CPU_SECONDS_MAX
        assert peak_bytes() - most <= EXTRA_BYTES_MAX

    arguments = [sys.argv[0], str(CORPUS), *sys.argv[3:]]
    atheris.Setup(arguments, try_one, custom_mutator=change)
    atheris.Fuzz()


main()
