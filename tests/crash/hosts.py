# SPDX-License-Identifier: Apache-2.0
"""Jobs that save to hosts: recorded, and started again on one host of what is left."""

from __future__ import annotations

import contextlib
import functools
import json
import pickle
import shutil
import socket
from pathlib import Path
from typing import TYPE_CHECKING

from mpi_ckpt import Local
from tests.crash.crashes import ROOT, Scenario, assert_explained
from tests.crash.recorder import merge
from tests.crash.world import Saved, Training, fault_of_restore, leftovers, scratch
from tests.launch import run_job

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from tests.crash.recorder import Op
    from tests.crash.replay import Image

PROGRAMS = Path(__file__).parent / "programs"
RECORD_HOSTS = str(PROGRAMS / "record_hosts.py")
JUDGE_PAIRS = str(PROGRAMS / "judge_pairs.py")
HOSTS = ("host0", "host1")


class Killed(Exception):
    """Ends a job without its last steps, as a kill does."""


@contextlib.contextmanager
def ignoring_kills() -> Iterator[None]:
    with contextlib.suppress(Killed):
        yield


def place(sandbox: Path) -> str:
    return f"{sandbox}/local/{{host}}"


def local_level(sandbox: Path) -> Local:
    return Local(place(sandbox), copies=2, keep=2, reserve=0)


@functools.cache
def recorded_on_hosts(way: str) -> list[Op]:
    """Return what two hosts do in local saves, in saves to the directory and a rescue."""
    sandbox = scratch()
    try:
        out = sandbox / "records"
        disk = sandbox / "disk"
        disk.mkdir()
        outcome = run_job(2, [RECORD_HOSTS, str(disk), str(out), *way.split()], timeout=100)
        assert outcome.code == 0, outcome.text
        ops = merge(json.loads(out.read_text()))
        assert_explained(Scenario(way, {}, ops), disk)
        return ops
    finally:
        shutil.rmtree(sandbox)


def saves_on_hosts(way: str) -> Scenario:
    saves = [Saved.of(step) for step in range(1, 9)]
    ops = recorded_on_hosts(way)
    return Scenario(f"two hosts, {way}", {}, ops, saves=saves, cut="cut" in way.split())


def judge_host(host: str, sandbox: Path, scenario: Scenario, acked: int) -> str | None:
    """Start again on one host alone, as a crash left its disk and the directory.

    Each host has all of a generation, as there are two copies on two hosts. Returns what
    `world.judge` does.
    """
    local = local_level(sandbox)
    name, socket.gethostname = socket.gethostname, lambda: host
    try:
        with Training(sandbox / ROOT, local=local, cut=scenario.cut) as training:
            if fault := fault_of_restore(training, scenario.saves, acked):
                return fault
            return _go_on(training, sandbox, host)
    finally:
        socket.gethostname = name


def judge_pairs(
    scenario: Scenario, seed: int, states: Sequence[tuple[int, Image]]
) -> list[str]:
    """Start again on both hosts in each state, one damaged; return what is wrong."""
    place = scratch()
    try:
        given, told = place / "given", place / "told"
        given.write_bytes(pickle.dumps((scenario, seed, states)))
        # An error on one rank alone ends the other by mpi4py.
        program = ["-m", "mpi4py", JUDGE_PAIRS]
        outcome = run_job(2, [*program, str(given), str(told)], timeout=100)
        assert outcome.code == 0, outcome.text
        wrong: list[str] = json.loads(told.read_text())
    finally:
        shutil.rmtree(place)
    return wrong


def _go_on(training: Training, sandbox: Path, host: str) -> str | None:
    training.move(900)
    if not training.manager.save(900, level="local").wait().generation:
        return "STUCK a local save fails"
    training.plain.value = b""
    if training.restore() != Saved.of(900):
        return "STUCK the next save does not come back"
    training.manager.wait()  # also for what is pruned behind the training
    homes = list((sandbox / "local" / host).iterdir())
    # A run that nobody has entered into the lineage leaves a folder that nobody uses.
    left = [name for home in homes for name in leftovers(home) if len(homes) == 1]
    if left:
        return f"LEFTOVER {left}"
    return None
