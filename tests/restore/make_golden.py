# SPDX-License-Identifier: Apache-2.0
"""Writes the golden generation of a format version. Run once per version, then committed::

    python -m tests.restore.make_golden v1
    mpirun -n 3 python -m tests.restore.make_golden hosts

golden/v1, v3, parts and hosts were written so by version 0.1.0 (CPython 3.11, NumPy 2.4,
torch 2.13); v2 in one process, without a job. They are not written again: every later
release must read those very bytes.
"""

from __future__ import annotations

import math
import shutil
import socket
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from mpi4py import MPI

from mpi_ckpt import (
    ArrayState,
    Block,
    CheckpointManager,
    Local,
    ModuleState,
    ObjectState,
    Options,
    PerRankState,
    RNGState,
    ShardedArrayState,
    State,
)
from mpi_ckpt.decomposition.boxes import Box
from mpi_ckpt.storage.format.manifest_codec import decode, encode
from mpi_ckpt.storage.local.lineage import read_lineage, write_lineage
from tests.cutting import CutArray, write_cut
from tests.making import joined, publish

if TYPE_CHECKING:
    from mpi_ckpt.states.unshared.ranked import RankedState

GOLDEN = Path(__file__).parent / "golden"
STEP = 1234
METRICS = {"loss": 0.25, "worst": math.nan, "best": math.inf}
TEXT = b"what a plain state wrote\n" * 3


class Words(State):
    """A plain state with a name that is no file name."""

    data = TEXT

    def save(self, fileobj) -> None:
        fileobj.write(self.data)

    def load(self, fileobj) -> None:
        self.data = fileobj.read()


def arrays() -> dict[str, np.ndarray]:
    """Return arrays of every kind the format has a rule for."""
    return {
        "float64": np.array([[1.5, -0.0], [math.inf, 5e-324]]),
        "nan": np.array([0x7FC00001, 0xFFC12345], "<u4").view("<f4"),
        "int8": np.arange(-2, 3, dtype=np.int8),
        "bool": np.array([True, False]),
        "complex": np.array([1 + 2j, -3j], np.complex64),
        "dates": np.array(["1970-01-02", "NaT"], "M8[D]"),
        "words": np.array(["ä", "bc"]),
        "scalar": np.array(7, np.uint16),
        "empty": np.empty((0, 3), np.float32),
        "big endian": np.array([1, 256], ">i4"),
    }


def module() -> torch.nn.Module:
    """Return a module with tied bfloat16 parameters."""
    made = torch.nn.ParameterDict()
    made["weight"] = torch.arange(6).reshape(2, 3).to(torch.bfloat16)
    made["tied"] = made["weight"]
    return made


def value() -> dict:
    """Return an object with everything that JSON lacks."""
    return {
        "epoch": 3,
        "text": "ä/b",
        "pair": (1, 2.5),
        "keys": {1: "one", None: "none"},
        "inf": -math.inf,
        "complex": 1 + 2j,
        "bytes": b"\x00\xff",
        "seen": np.arange(3, dtype=np.int64),
    }


def states() -> list[State]:
    """Return the states of the golden generation, in order."""
    return [
        ArrayState("arrays", arrays()),
        ModuleState("model", module()),
        ObjectState("object", value()),
        Words("my/words"),
        Words(".hidden"),
    ]


def cut_arrays() -> dict[str, CutArray]:
    """Return arrays that four ranks hold in parts; the second rank has none of them."""
    field = np.arange(70, dtype=np.float64).reshape(7, 10) / 8
    quarters = [
        [Box((0, 0), (4, 6)), Box((4, 0), (3, 6))],
        [],
        [Box((0, 6), (4, 4))],
        [Box((4, 6), (3, 4))],
    ]
    cube = np.arange(2 * 3 * 4, dtype=np.int16).reshape(2, 3, 4)
    planes = [[Box((0, 0, 2 * n), (2, 3, 2))] for n in range(2)]
    particles = np.array([[1.5, -0.0], [math.inf, 3.0], [4.0, 5e-324]])
    return {
        "field": CutArray(field, quarters),
        "cube": CutArray(cube, [planes[0], [], [], planes[1]]),
        "particles": CutArray.by_rows(particles, [2, 0, 0, 1]),
        "ids": CutArray.by_rows(np.array([7, 8, 9], np.uint32), [2, 0, 0, 1]),
        "scalar": CutArray(np.array(1.5, np.float32), [[], [], [Box((), ())], []]),
        "complex": CutArray.by_rows(np.array([1 + 2j, -3j], np.complex64), [0, 0, 1, 1]),
        "words": CutArray.by_rows(np.array(["ä", "bc", ""]), [1, 0, 1, 1]),
        "flags": CutArray.by_rows(np.array([True, False, True]), [3, 0, 0, 0]),
        "empty": CutArray.by_rows(np.empty((0, 3), np.float32), [0, 0, 0, 0]),
    }


def whole_arrays() -> dict[str, np.ndarray]:
    """Return arrays of the same state that every rank holds whole."""
    return {"time": np.array(0.25), "spacing": np.array([1.0, 2.0, 0.5], np.float32)}


def write_v2() -> Path:
    """Write the golden generation of version 2: blocks are short, so tiles have several."""
    arrays, whole = cut_arrays(), whole_arrays()
    return write_cut(GOLDEN / "v2", arrays, whole=whole, block_bytes=64)


def write_v1() -> None:
    """Write the golden generation of version 1."""
    options = Options(preemption_signals=())
    root = GOLDEN / "v1"
    with CheckpointManager(root, states(), comm=MPI.COMM_SELF, options=options) as manager:
        manager.save(STEP, metrics=METRICS)
    (root / ".lock").unlink()


def write_v3() -> None:
    """Write the golden generation of version 3, of one host that holds all of it."""
    options = Options(preemption_signals=())
    with tempfile.TemporaryDirectory() as folder:
        local = Local(f"{folder}/disk", reserve=0)
        with CheckpointManager(
            Path(folder, "run"), states(), comm=MPI.COMM_SELF, options=options, local=local
        ) as manager:
            path = manager.save(STEP, metrics=METRICS, level="local").path
            root = GOLDEN / "v3" / path.name
            shutil.copytree(path, root)
    # Names that say nothing of the machine.
    manifest = decode((root / "manifest.json").read_bytes())
    names = {"hosts": ("host1",), "domains": ("rack1",), "directory": "/scratch/run"}
    manifest = replace(manifest, local=replace(manifest.local, **names))
    (root / "manifest.json").write_bytes(encode(manifest))


def parts() -> list[RankedState]:
    """Return states of which three ranks have parts, as root writes them."""
    values = [
        {"position": 7, "cache": np.arange(6.0).reshape(2, 3)},
        [np.arange(4, dtype=np.int16), "text", b"bytes" * 100],
        None,
    ]
    streams = RNGState(generators={"mine": np.random.RandomState(3)})
    return [
        joined(PerRankState("own"), values),
        joined(streams, [streams.own_value()] * len(values)),
    ]


def write_parts() -> None:
    """Write the golden generation of version 1 with parts of ranks."""
    publish(GOLDEN / "parts", parts())
    (GOLDEN / "parts" / ".lock").unlink()


def field() -> np.ndarray:
    """Return the array that three ranks hold in parts."""
    return np.arange(42, dtype=np.float64).reshape(7, 6) / 4


def value_of(rank: int) -> dict:
    """Return what one of three ranks has for itself."""
    return {"rank": rank, "cache": np.full((2, rank), 0.5), "text": "x" * rank}


def states_of(rank: int, size: int) -> list[State]:
    """Return the states of one rank of the golden generation on hosts."""
    first, last = 7 * rank // size, 7 * (rank + 1) // size
    block = Block(field()[first:last].copy(), shape=(7, 6), offset=(first, 0))
    return [
        ArrayState("whole", whole_arrays()),
        ShardedArrayState("field", {"rho": block}),
        PerRankState("own", value_of(rank)),
        Words("my/words"),
    ]


def write_hosts() -> None:
    """Write the golden generation of version 3 of three ranks on two hosts: a job of 3."""
    comm = MPI.COMM_WORLD
    name = "host1" if comm.rank < 2 else "host2"
    socket.gethostname = lambda: name
    root, options = GOLDEN / "hosts", Options(preemption_signals=())
    folder = comm.bcast(tempfile.mkdtemp())
    local = Local(f"{folder}/{{host}}", copies=1, reserve=0)
    manager = CheckpointManager(
        f"{folder}/run", states_of(comm.rank, comm.size), options=options, local=local
    )
    assert manager.save(STEP, metrics=METRICS, level="local").generation
    comm.Barrier()
    if comm.rank == 0:
        for host in ("host1", "host2"):
            (home,) = Path(folder, host).iterdir()
            path = home / "checkpoint-00000001"
            copied = Path(shutil.copytree(path, root / host / path.name))
            manifest = decode((copied / "manifest.json").read_bytes())
            local_set = replace(manifest.local, directory="/scratch/run")
            manifest = replace(manifest, local=local_set)
            (copied / "manifest.json").write_bytes(encode(manifest))
        lineage = read_lineage(Path(folder, "run"))
        run = replace(lineage.runs[-1], path="/local/{host}")
        write_lineage(root, lineage.with_run(run), run.job)
        shutil.rmtree(folder)
    comm.Barrier()


WRITERS = {
    "v1": write_v1,
    "v2": write_v2,
    "v3": write_v3,
    "parts": write_parts,
    "hosts": write_hosts,
}

if __name__ == "__main__":
    WRITERS[sys.argv[1]]()
