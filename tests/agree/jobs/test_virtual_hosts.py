# SPDX-License-Identifier: Apache-2.0
"""A job over hosts of its own: scripts/virtual_hosts, and the library across a network."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from tests.hosts import CANNOT, SCRIPT, hosts_up, virtual_hosts
from tests.launch import environment

VALUES = 200_000

PROGRAM = f"""
import json, sys
from pathlib import Path
import numpy as np
from mpi4py import MPI
from mpi_ckpt import ArrayState, CheckpointManager
from mpi_ckpt.comm import Communicator

def received():
    return int(Path("/sys/class/net/net0/statistics/rx_bytes").read_text())

folder, world = Path(sys.argv[1]), Communicator()
weights = np.random.default_rng(world.rank).random({VALUES})
before = received()
states = [ArrayState("a", {{"w": weights}}, sync="root")]
with CheckpointManager(folder / "checkpoints", states) as manager:
    restored = manager.restore()
    if restored is None:
        manager.save(7)
told = MPI.COMM_WORLD.gather((weights.sum(), received() - before))
if world.is_root:
    sums, crossed = zip(*told)
    step = None if restored is None else restored.step
    note = dict(hosts=list(world.hosts), step=step, sums=sums, crossed=crossed)
    (folder / "note.json").write_text(json.dumps(note))
"""


@pytest.fixture(scope="module")
def hosts():
    with hosts_up(3, "--rate", "1gbit") as state:
        yield state


def test_a_job_saves_on_two_hosts_and_goes_on_there(hosts):
    shared = virtual_hosts(hosts, "shared").stdout.strip()
    program = Path(shared, "program.py")
    program.write_text(PROGRAM)
    notes = []
    for _ in range(2):
        job = virtual_hosts(hosts, "run", "-n", 2, "python", program, shared)
        assert job.returncode == 0, job.stderr
        notes.append(json.loads(Path(shared, "note.json").read_text()))
    first, second = notes
    assert first["hosts"] == second["hosts"] == ["host1", "host2"]
    assert (first["step"], second["step"]) == (None, 7)
    # Root's values everywhere, and they went over the link.
    (value,) = {*first["sums"], *second["sums"]}
    assert value > 0
    assert all(note["crossed"][1] > 8 * VALUES for note in notes)


def test_hosts_see_themselves_and_one_shared_folder(hosts):
    def on(host: str, command: str) -> str:
        done = virtual_hosts(hosts, "on", host, "sh", "-c", command)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    shared = virtual_hosts(hosts, "shared").stdout.strip()
    on("host1", f"touch {hosts}/local/mine {shared}/ours /dev/shm/mine")
    assert on("host2", f"ls {hosts}/local /dev/shm | grep mine || true") == ""
    assert on("host2", f"ls {shared}/ours") == f"{shared}/ours"
    assert int(on("host2", "ls -d /proc/[1-9]* | wc -l")) < 10
    assert on("host1", "cat /proc/sys/kernel/hostname") == "host1"


def test_a_second_set_and_an_unknown_word_are_refused(hosts):
    again = virtual_hosts(hosts, "up", 2)
    assert (again.returncode, "down" in again.stderr) == (2, True)
    assert virtual_hosts(hosts, "sideways").returncode == 2
    assert virtual_hosts(hosts, "on", "host9", "true").returncode == 255
    assert virtual_hosts(hosts, "off", "login").returncode == 255


def test_host_without_power_is_gone_and_the_others_are_not(hosts):
    assert virtual_hosts(hosts, "off", "host3").returncode == 0
    assert virtual_hosts(hosts, "on", "host3", "true").returncode == 255
    assert virtual_hosts(hosts, "on", "host2", "true").returncode == 0
    assert virtual_hosts(hosts, "off", "host3").returncode == 255


def test_whoever_is_not_root_is_told_so():
    if os.geteuid() != 0:
        assert virtual_hosts("/nonexistent/state", "up", 2).returncode == CANNOT
    else:
        asked = subprocess.run(
            [SCRIPT, "up", "2"],
            user="nobody",
            env=environment({"VIRTUAL_HOSTS": "/nonexistent/state"}),
            capture_output=True,
            text=True,
        )
        assert asked.returncode == CANNOT
        assert "root" in asked.stderr
