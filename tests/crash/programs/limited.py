# SPDX-License-Identifier: Apache-2.0
"""A job of one rank under a limit of the operating system.

Arguments: directory, and ``fsize`` (RLIMIT_FSIZE is set between two saves), ``other``
(restores, then tries to save, as another user) or ``files`` (RLIMIT_NOFILE). Prints what
came of it as JSON.
"""

import json
import os
import resource
import sys
from pathlib import Path

from mpi_ckpt.errors import CheckpointError
from tests.crash.faults import quiet
from tests.crash.world import Training, leftovers

root, limit = Path(sys.argv[1]), sys.argv[2]
told = {}


def try_to_save(training, step):
    try:
        training.save(step)
    except CheckpointError as error:
        return [type(error).__name__, str(error), error.errno]
    return None


def next_descriptor():
    descriptor = os.dup(0)
    os.close(descriptor)
    return descriptor


with quiet(), Training(root) as training:
    found = training.restore()
    told["restored"] = found and found.step
    kind = {"fsize": resource.RLIMIT_FSIZE, "files": resource.RLIMIT_NOFILE}.get(limit)
    if kind is not None:
        before = resource.getrlimit(kind)
        now = 10_000 if limit == "fsize" else next_descriptor()
        resource.setrlimit(kind, (now, before[1]))
    told["error"] = try_to_save(training, 2)
    if kind is not None:
        resource.setrlimit(kind, before)
    told["leftovers"] = leftovers(root)
    found = training.restore()
    told["again"] = found and found.step
    told["later"] = try_to_save(training, 3)
print(json.dumps(told))
