# SPDX-License-Identifier: Apache-2.0
"""Runs one function of one of adaptdl's own test files on `mpi_ckpt.checkpoint`.

::

    mpirun -n N python adaptdl_file.py FILE FUNCTION RESULT

Every name that adaptdl's files import leads to mpi_ckpt, or to adaptdl's own reading of its
environment. Rank 0 writes what the function returned: the number of ranks of a restart.
"""

import importlib.util
import json
import os
import sys
import types
from pathlib import Path

from mpi4py import MPI

from mpi_ckpt import checkpoint

os.environ["ADAPTDL_REPLICA_RANK"] = str(MPI.COMM_WORLD.rank)

FILE, FUNCTION, RESULT = Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3])


def stand_in(name, **content):
    module = types.ModuleType(name)
    vars(module).update(content)
    sys.modules[name] = module
    parent, _, last = name.rpartition(".")
    if parent:
        setattr(sys.modules[parent], last, module)
    return module


def load(name, path):
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def once(function):
    """Return a function as it is: mpirun makes its ranks, the test its restarts."""
    return function


def run(function):
    if "accumulator" not in FILE.name:
        return function()
    # Its blocks are to be replayed, which mpi_ckpt does in the body of an epoch alone:
    # docs/adaptdl.md.
    for _ in checkpoint.remaining_epochs_until(1):
        return function()
    raise AssertionError("no epoch is left")


home = next(path for path in FILE.parents if path.name == "adaptdl")
stand_in("adaptdl")
sys.modules["adaptdl"].env = load("adaptdl.env", home / "env.py")
stand_in("adaptdl.checkpoint", **vars(checkpoint))
stand_in("adaptdl.collective", initialize=lambda *_: None)
stand_in("adaptdl.conftest", elastic_multiprocessing=once)
stand_in("adaptdl.torch")
stand_in("adaptdl.torch.accumulator", Accumulator=checkpoint.Accumulator)
names = ("remaining_epochs_until", "current_epoch", "finished_epochs")
stand_in("adaptdl.torch.epoch", **{name: getattr(checkpoint, name) for name in names})

returned = MPI.COMM_WORLD.allgather(run(getattr(load("tested", FILE), FUNCTION)))
assert len(set(returned)) == 1, returned
if MPI.COMM_WORLD.rank == 0:
    RESULT.write_text(json.dumps(returned[0]))
