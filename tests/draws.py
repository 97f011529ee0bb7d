# SPDX-License-Identifier: Apache-2.0
"""How much the tests try, what they draw, and what they have tried.

A plain run draws the same each time: if it fails, what was changed is the cause. What was
never drawn is looked for by another ``MPI_CKPT_TEST_SEED``, by ``MPI_CKPT_TEST_TIMES=3``,
which draws three times as many, and by ``MPI_CKPT_TEST_STRESS=1``, which draws anew and
tries all that there is, for hours.
"""

from __future__ import annotations

import os
import random
from collections import Counter

TIMES = int(os.environ.get("MPI_CKPT_TEST_TIMES") or 1)
STRESS = bool(os.environ.get("MPI_CKPT_TEST_STRESS"))
SEED = int(
    os.environ.get("MPI_CKPT_TEST_SEED")
    or (random.SystemRandom().randrange(10**6) if STRESS else 1)
)

COUNTS: Counter[str] = Counter()
"""How much was tried: shown at the end of a run."""

JUDGED: set[bytes] = set()
"""Digests of the crash states that were judged: a state that comes twice counts once."""
