# SPDX-License-Identifier: Apache-2.0
"""A rank is lost, then a host: one is survived in place, the other by a new attempt."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.hosts import SCRIPT, hosts_up, installed_mpi, virtual_hosts
from tests.jobs import EXAMPLES, logged
from tests.loop import PATIENCE_SECONDS, Loop, write_script

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

STEPS = 200


@pytest.fixture
def hosts() -> Iterator[str]:
    if installed_mpi() != "openmpi":
        pytest.skip("only Open MPI survives a rank")
    with hosts_up(4) as state:
        yield state


def wait_for_step(loop: Loop, log: Path, step: int) -> None:
    loop.wait_until(lambda: any(event.get("step", 0) >= step for event in logged(log)))


@pytest.mark.long
@pytest.mark.timeout(4 * PATIENCE_SECONDS)
def test_lost_rank_is_survived_in_place_and_a_lost_host_by_the_loop(hosts, tmp_path):
    known = f"export VIRTUAL_HOSTS={hosts} MPI=openmpi"
    mpirun = write_script(
        tmp_path / "mpirun",
        f'{known}; exec {SCRIPT} run --with-ft ulfm --mca mtl ^ofi "$@"',
    )
    alive = write_script(
        tmp_path / "hosts-script",
        f"{known}; for n in 1 2 3 4; do"
        f" {SCRIPT} on host$n true 2>/dev/null && echo host$n; done; true",
    )
    log = tmp_path / "log.jsonl"
    words = [
        *("--np", 4, "--min-np", 2, "--backoff", 0.1, "--timeout", 40),
        *("--launcher", mpirun, "--hosts-script", alive),
        *("--", "python", EXAMPLES / "recover.py"),
        *("--checkpoints", tmp_path / "checkpoints", "--log", log),
        *("--steps", STEPS, "--interval", 10, "--pace", 0.1, "--kill", "15:1"),
    ]
    with Loop(tmp_path, *words) as loop:
        wait_for_step(loop, log, 35)
        assert virtual_hosts(hosts, "off", "host4").returncode == 0
        answer = loop.finish()
    assert answer["finished"], loop.told()
    first, *_, last = answer["attempts"]
    assert (first["np"], last["np"]) == (4, 3), loop.told()
    assert last["hosts"] == ["host1", "host2", "host3"]
    starts = [event for event in logged(log) if event["event"] == "start"]
    assert [(event["size"], event["source"]) for event in starts] == [
        (4, "nothing"), (3, "memory"), (3, "files"),
    ]  # fmt: skip
    # The save of step 30 was acknowledged before the host went.
    assert 30 <= starts[-1]["step"] == last["step_from"]
    assert [event for event in logged(log) if event["event"] == "end"]
