# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import signal
import subprocess
import sys

import pytest

PROGRAM = """
import sys, time
from mpi_ckpt.comm.ulfm.guard import Guard
code = int(sys.argv[1]) if sys.argv[1:] else None
with Guard("what is quick", 60):
    pass
with Guard("what is slow", 0.1, code):
    time.sleep(60)
"""


# The others are told of a signal, of an exit code they are not.
@pytest.mark.parametrize(("words", "code"), [((), -signal.SIGKILL), (("3",), 3)])
def test_what_does_not_return_ends_the_process(words, code):
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *words], capture_output=True, text=True, check=False
    )
    assert done.returncode == code, done.stderr
    assert "what is slow takes more than 0.1 s" in done.stderr
    assert "what is quick" not in done.stderr
