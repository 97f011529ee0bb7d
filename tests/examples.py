# SPDX-License-Identifier: Apache-2.0
"""Examples that Hypothesis draws on root, and that all ranks of a job check together.

Were each rank to draw for itself, a failure on one would make it shrink while the others
go on. Root draws and shrinks alone, and sends each example; it hears how all ranks fared.
"""

import math
import time
import traceback
from zlib import crc32

from hypothesis import Phase, given, seed, settings

from tests.draws import SEED, STRESS, TIMES
from tests.every_rank import TIMEOUT_SECONDS, exchange

# Shrinking would go on beyond the limit of a test: the smallest found by then is told.
_SHRINK_SECONDS = TIMEOUT_SECONDS / 3


class _EnoughError(BaseException):
    """Ends a search; Hypothesis lets it pass."""


def on_every_rank(comm, drawn, check, *, count, shrink_seconds=_SHRINK_SECONDS):
    """Check examples on all ranks; if one fails on any, fail on all with the smallest.

    Collective. A check may be collective; it must not leave another rank waiting.

    Args:
        comm: All ranks of the job.
        drawn: A strategy of examples that can be pickled.
        check: Takes an example; raises on a rank that finds a fault.
        count: Examples of a plain run.
        shrink_seconds: Time for finding a smaller example that fails.
    """
    failure = None
    if comm.rank == 0:
        try:
            failure = _draw(drawn, check, count, shrink_seconds)
        finally:
            exchange((None, failure), "an example")
    else:
        while (told := exchange(None, "an example")[0])[0] is not None:
            _check(check, told[0])
        failure = told[1]
    assert failure is None, failure


def _draw(drawn, check, count, shrink_seconds):
    """Draw examples on root, and shrink the first that fails; return how it did."""
    failed: list[tuple[int, str]] = []
    end = math.inf

    @seed(SEED + crc32(check.__qualname__.encode()))
    @settings(
        max_examples=20 * count if STRESS else count * TIMES,
        database=None,
        derandomize=False,
        report_multiple_bugs=False,
        # What others do is not traced: nothing could be explained.
        phases=[Phase.generate, Phase.shrink],
    )
    @given(drawn)
    def every_rank_checks(example):
        nonlocal end
        if time.monotonic() > end:
            raise _EnoughError
        exchange((example,), "an example")
        if text := _check(check, example):
            end = min(end, time.monotonic() + shrink_seconds)
            failed.append((len(repr(example)), f"{text}{example}"))
            raise AssertionError(text)

    try:
        every_rank_checks()
    except (_EnoughError, AssertionError):
        return min(failed)[1]
    return None


def _check(check, example):
    """Check an example on this rank; return how it failed, on every rank that it did."""
    failed = None
    try:
        check(example)
    except Exception:
        failed = traceback.format_exc()
    everyone = exchange(failed, "the outcome of an example")
    return "\n".join(
        f"rank {rank}: {text}" for rank, text in enumerate(everyone) if text is not None
    )
