# SPDX-License-Identifier: Apache-2.0
"""What ``import mpi_ckpt`` gives, and what it leaves alone."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
from importlib import import_module

import pytest

import mpi_ckpt
from tests.waiting import limit


def test_names_are_sorted_unique_and_few():
    names = sorted(set(mpi_ckpt.__all__), key=lambda name: (not name.isupper(), name))
    assert mpi_ckpt.__all__ == names
    assert set(mpi_ckpt.__all__) == set(mpi_ckpt._MODULES)
    # 30 names for replicas and per-rank values, and three for arrays cut over the ranks:
    # Block, ShardedArrayState, ConcatState. One for programs that log elsewhere: Hooks; one
    # for saves on the hosts' own disks: Local.
    assert len(mpi_ckpt.__all__) <= 35


@pytest.mark.parametrize("name", mpi_ckpt.__all__)
def test_every_name_is_importable_documented_and_where_it_says(name):
    value = getattr(mpi_ckpt, name)
    module = import_module(mpi_ckpt._MODULES[name])
    assert getattr(module, name) is value
    assert name in module.__all__
    assert value.__module__ == module.__name__
    assert inspect.getdoc(value)


def test_type_checkers_see_the_same_names():
    source = inspect.getsource(mpi_ckpt)
    block = source.split("if TYPE_CHECKING:")[1].split("__version__")[0]
    names = {
        name.strip(" \n(),")
        for line in block.strip().splitlines()
        for name in line.split(" import ")[-1].split(",")
    }
    assert names - {""} == set(mpi_ckpt.__all__)


def test_unknown_names_are_no_attributes():
    with pytest.raises(AttributeError, match="'mpi_ckpt' has no attribute 'nonsense'"):
        _ = mpi_ckpt.nonsense
    assert not hasattr(mpi_ckpt, "_hidden")
    assert set(mpi_ckpt.__all__) <= set(dir(mpi_ckpt))
    assert "__version__" in dir(mpi_ckpt)


def test_star_import_gives_what_is_public():
    found: dict = {}
    exec("from mpi_ckpt import *", found)
    assert set(found) - {"__builtins__"} == set(mpi_ckpt.__all__)


def ask(program: str) -> object:
    """Run a program in a new interpreter; return the JSON it prints."""
    command = [sys.executable, "-c", program]
    done = subprocess.run(
        command, check=True, capture_output=True, text=True, timeout=limit(60)
    )
    return json.loads(done.stdout)


LOOK = """
import json, logging, signal, sys, threading
before = {n: signal.getsignal(n) for n in signal.valid_signals()}
import mpi_ckpt
assert mpi_ckpt.__version__ and dir(mpi_ckpt)
print(json.dumps({
    "heavy": sorted({"mpi4py", "torch", "numpy", "xxhash"} & set(sys.modules)),
    "signals": sum(signal.getsignal(n) != h for n, h in before.items()),
    "handlers": sum(len(logging.getLogger(n).handlers) for n in ("", "mpi_ckpt")),
    "threads": threading.active_count(),
    "modules": sorted(name for name in sys.modules if name.startswith("mpi_ckpt")),
}))
"""


def test_import_starts_and_installs_nothing():
    assert ask(LOOK) == {
        "heavy": [], "signals": 0, "handlers": 0, "threads": 1, "modules": ["mpi_ckpt"],
    }  # fmt: skip


USE = """
import json, sys
import mpi_ckpt
for name in mpi_ckpt.__all__:
    getattr(mpi_ckpt, name)
print(json.dumps(sorted({"mpi4py.MPI", "torch"} & set(sys.modules))))
"""


def test_touching_every_name_starts_no_mpi_and_imports_no_torch():
    assert ask(USE) == []


TIME = """
import json, time
start = time.perf_counter()
import mpi_ckpt
print(json.dumps(time.perf_counter() - start))
"""


def test_import_costs_next_to_nothing():
    # The best of some: others may be using the machine.
    assert min(ask(TIME) for _ in range(5)) < 0.05


WITHOUT = """
import json, sys
sys.modules["torch"] = None
from mpi_ckpt import ArrayState, ElasticSampler, ObjectState, RNGState
import io, numpy
stream = io.BytesIO()
for state in (ArrayState("a", {"x": numpy.ones(2)}), ObjectState("o", [1]), RNGState()):
    state.save(stream)
print(json.dumps(len(stream.getvalue()) > 0))
"""


def test_states_without_torch_work_without_torch():
    assert ask(WITHOUT) is True


HOROVOD = """
import json, sys
from mpi_ckpt.integrations import horovod
for name in horovod.__all__:
    getattr(horovod, name)
heavy = {"mpi4py.MPI", "torch", "horovod", "pickle5", "cloudpickle"}
print(json.dumps([sorted(heavy & set(sys.modules)), horovod.__all__, dir(horovod)]))
"""


def test_names_beside_horovod_are_lazy_sorted_and_documented():
    heavy, names, listed = ask(HOROVOD)
    assert heavy == []
    assert names == listed == sorted(set(names))
    from mpi_ckpt.integrations import horovod

    assert set(names) == set(horovod._MODULES)
    for name in names:
        value = getattr(horovod, name)
        assert value.__module__ == horovod._MODULES[name].partition(":")[0]
        assert inspect.getdoc(value)
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = horovod.nonsense
