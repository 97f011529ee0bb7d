# SPDX-License-Identifier: Apache-2.0
"""Trainings on virtual hosts, each with a disk of its own, which is lost now and then."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest

from mpi_ckpt.storage.reading.reader import read_manifest
from tests.hosts import hosts_up, virtual_hosts
from tests.jobs import PROGRAMS

PROGRAM = PROGRAMS / "local_training.py"


@dataclass
class Hosts:
    """Some virtual hosts, and the training that runs on them."""

    state: str

    @property
    def shared(self) -> Path:
        return Path(self.state, "shared")

    def disk(self, number: int) -> Path:
        """The disk of a host, as the machine sees it."""
        return Path(self.state, "local-of", f"host{number}", "ckpt")

    def use(self, *numbers: int) -> None:
        """Let jobs run on some hosts alone."""
        for name, form in (("openmpi", "host{} slots=1"), ("mpich", "host{}:1")):
            lines = "".join(form.format(number) + "\n" for number in numbers)
            Path(self.state, f"hostfile.{name}").write_text(lines)

    def train(
        self,
        upto: int,
        ranks: int,
        *,
        place: str = "",
        dies: bool = True,
        drain: tuple[float, ...] = (),
    ):
        """Run the training up to a step; return what it has noted, and its messages."""
        note = self.shared / "note.json"
        note.unlink(missing_ok=True)
        words = [
            *(self.shared / "run", place or Path(self.state, "local", "ckpt"), upto),
            *("dies" if dies else "ends", note, *drain),
        ]
        job = virtual_hosts(self.state, "run", "-n", ranks, "python", PROGRAM, *words)
        assert note.exists(), job.stderr
        return json.loads(note.read_text()), job.stderr


@pytest.fixture
def hosts():
    with hosts_up(3) as state:
        yield Hosts(state)


def test_disks_and_hosts_are_lost_and_the_training_goes_on(hosts):
    told, _ = hosts.train(3, 3)
    assert told == {"level": None, "step": None, "failures": 0}
    # All processes were killed; nothing is in the directory but the lineage.
    assert not list((hosts.shared / "run").glob("checkpoint-*"))
    step = 3
    for lost in (1, 2, 3):  # root's too
        shutil.rmtree(hosts.disk(lost))
        told, _ = hosts.train(step + 1, 3)
        assert told == {"level": "local", "step": step, "failures": 0}
        step += 1
    assert virtual_hosts(hosts.state, "off", "host1").returncode == 0
    hosts.use(2, 3)
    told, _ = hosts.train(step + 1, 2)
    assert (told["level"], told["step"]) == ("local", step)
    # Too many: the other disk was the only one left.
    shutil.rmtree(hosts.disk(2))
    shutil.rmtree(hosts.disk(3))
    told, text = hosts.train(1, 2, dies=False)
    assert (told["level"], told["step"]) == (None, None)
    assert "are lost" in text
    told, text = hosts.train(2, 2, dies=False)
    assert (told["level"], told["step"]) == ("directory", 1)
    assert "lost" not in text


def test_a_copy_to_the_directory_is_killed_and_a_host_lost(hosts):
    run = hosts.shared / "run"
    hosts.train(5, 3, drain=(1.0,))
    assert not list(run.glob("checkpoint-*"))
    (cut_off,) = run.glob(".partial-*")
    shutil.rmtree(hosts.disk(2))
    told, _ = hosts.train(24, 3, drain=(1e12,))
    assert told == {"level": "local", "step": 5, "failures": 0}
    assert not cut_off.exists()
    steps = [read_manifest(path).step for path in sorted(run.glob("checkpoint-*"))]
    assert steps
    assert set(steps) <= set(range(6, 25, 2))
    # Other hosts, or these without their disks: what was copied is there.
    for number in (1, 2, 3):
        shutil.rmtree(hosts.disk(number))
    told, _ = hosts.train(steps[-1], 3, dies=False)
    assert (told["level"], told["step"]) == ("directory", steps[-1])


def test_a_small_disk_on_one_host_fails_saves_and_not_the_training(hosts):
    made = virtual_hosts(
        hosts.state,
        *("on", "host2", "sh", "-c"),
        f"mkdir -p {hosts.state}/local/ckpt && "
        f"mount -t tmpfs -o size=64k tmpfs {hosts.state}/local/ckpt",
    )
    assert made.returncode == 0, made.stderr
    told, text = hosts.train(5, 3, dies=False)
    assert told["failures"] == 3
    assert text.count("has failed") == 2
    assert text.count("switched off") == 1
    assert "ENOSPC" in text
    told, _ = hosts.train(5, 3)
    assert (told["level"], told["step"]) == ("directory", 5)


def test_one_directory_for_all_hosts_is_refused(hosts):
    words = [hosts.shared / "run", hosts.shared / "ckpt", 1, "ends", hosts.shared / "note"]
    job = virtual_hosts(hosts.state, "run", "-n", 3, "python", PROGRAM, *words)
    assert job.returncode != 0
    assert "see one directory" in job.stderr
