# SPDX-License-Identifier: Apache-2.0
"""How much the tests try, and what they draw.

A plain run draws the same each time: if it fails, what was changed is the cause. What was
never drawn is looked for by ``MPI_CKPT_TEST_STRESS=1``, which tries more and draws anew, or
by another ``MPI_CKPT_TEST_SEED``.
"""

from __future__ import annotations

import os
import random

STRESS = bool(os.environ.get("MPI_CKPT_TEST_STRESS"))
SEED = int(
    os.environ.get("MPI_CKPT_TEST_SEED")
    or (random.SystemRandom().randrange(10**6) if STRESS else 1)
)
