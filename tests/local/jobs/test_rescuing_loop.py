# SPDX-License-Identifier: Apache-2.0
"""``mpi-ckpt run --rescue`` on virtual hosts: it copies what surviving hosts keep."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from mpi_ckpt.storage.reading.proving import verify
from mpi_ckpt.storage.reading.reader import GenerationReader
from tests.hosts import SCRIPT, hosts_up, installed_mpi, virtual_hosts
from tests.jobs import PROGRAMS
from tests.loop import PATIENCE_SECONDS, Loop, write_script

if TYPE_CHECKING:
    from collections.abc import Iterator

PROGRAM = PROGRAMS / "local_training.py"


@pytest.fixture
def hosts() -> Iterator[str]:
    with hosts_up(3) as state:
        yield state


class Rescuing(Loop):
    """The loop around a training that keeps three steps on its hosts.

    Args:
        hosts: Where the virtual hosts are noted.
        folder: A new folder for notes and scripts.
        how: How the training ends, see the program.
        listing: Lines of bash that list the hosts.
        words: Options of the loop.
    """

    def __init__(
        self, hosts: str, folder: Path, how: str, listing: str, *words: object
    ) -> None:
        known = f"export VIRTUAL_HOSTS={hosts} MPI={installed_mpi()}"
        listed = write_script(folder / "hosts-script", f"{known}\n{listing}\ntrue")
        mpirun = write_script(folder / "mpirun", f'{known}; exec {SCRIPT} run "$@"')
        self.run = Path(hosts, "shared", "run")
        self.note = Path(hosts, "shared", "note.json")
        place = Path(hosts, "local", "ckpt")
        super().__init__(
            folder,
            *("--np", 3, "--launcher", mpirun, "--hosts-script", listed),
            *("--backoff", 0.1, "--rescue", place, self.run, *words),
            *("--", "python", PROGRAM, self.run, place, 3, how, self.note),
        )

    def saved(self) -> list[int]:
        """Return the steps of the generations in the directory, all proven."""
        steps = []
        for path in sorted(self.run.glob("checkpoint-*")):
            with GenerationReader(path) as reader:
                verify(reader)
                steps.append(reader.manifest.step)
        return steps


@pytest.mark.timeout(2 * PATIENCE_SECONDS)
def test_what_surviving_hosts_keep_is_copied_before_an_attempt_without_one(hosts, tmp_path):
    listing = """
        if [ -e "$0.asked" ]; then echo host1:3; echo host2
        else touch "$0.asked"; echo host1; echo host2; echo host3; fi"""
    with Rescuing(hosts, tmp_path, "loses", listing) as loop:
        answer = loop.finish()
        assert answer["finished"], loop.told()
        first, second = answer["attempts"]
        assert first["hosts"] == ["host1", "host2", "host3"], loop.told()
        # The disk of host1 alone does not have all.
        assert second["hosts"] == ["host1"], loop.told()
        assert (first["step_to"], second["step_from"], second["step_to"]) == (0, 3, 3)
        found = json.loads(loop.note.read_text())
        assert (found["level"], found["step"]) == ("directory", 3)
        # The first attempt has saved nothing there, and the second one as its last act.
        assert loop.saved() == [3, 3], loop.told()


@pytest.mark.long
@pytest.mark.timeout(2 * PATIENCE_SECONDS)
def test_what_surviving_hosts_keep_is_copied_when_the_loop_gives_up(hosts, tmp_path):
    alive = f"{SCRIPT} on host$n true 2>/dev/null && echo host$n"
    words = ("--max-restarts", 0, "--timeout", 15)
    listing = f"for n in 1 2 3; do {alive}; done"
    with Rescuing(hosts, tmp_path, "waits", listing, *words) as loop:
        loop.wait_until(loop.note.exists)
        assert virtual_hosts(hosts, "off", "host3").returncode == 0
        answer = loop.finish()
        assert not answer["finished"]
        assert answer["attempts"][0]["hosts"] == ["host1", "host2", "host3"]
        assert loop.saved() == [3], loop.told()
