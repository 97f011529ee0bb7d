# SPDX-License-Identifier: Apache-2.0
"""Trainings over hosts that exist in name: each rank, or some, on a host of its own."""

from __future__ import annotations

import shutil

import numpy as np

from mpi_ckpt import (
    ArrayState,
    CheckpointManager,
    Local,
    ObjectState,
    Options,
    PerRankState,
    RNGState,
    State,
)

LEAVES = 12


class Crash(Exception):
    """The end of all processes of a job, as far as a test can play it."""


class Plain(State):
    """A state that only root writes."""

    text = b""

    def save(self, fileobj):
        fileobj.write(self.text)

    def load(self, fileobj):
        self.text = fileobj.read()


class Values:
    """The states of a training, whose values follow from the step."""

    def __init__(self, comm):
        self.comm = comm
        self.arrays = {f"x{n}": np.zeros(2000 + 7 * n) for n in range(LEAVES)}
        self.same = np.zeros(3)
        self.plain, self.own = Plain("plain"), PerRankState("own", None)
        self.object = ObjectState("object", {})
        self.states = [
            ArrayState("arrays", self.arrays, sync="check"),
            ArrayState("roots", {"same": self.same}, sync="root"),
            self.object,
            self.plain,
            self.own,
            RNGState(),
        ]

    def go_to(self, step):
        for number, array in enumerate(self.arrays.values()):
            array[:] = 100 * step + number
        # Root's value wins: the others have another before each save.
        self.same[:] = step + 0.001 * self.comm.rank
        self.object.value = {"step": step}
        self.plain.text = b"step %d" % step if self.comm.rank == 0 else b"nothing"
        self.own.value = [self.comm.rank, step]

    def check(self, step, ranks):
        """Require the values of a step that so many ranks have saved."""
        for number, array in enumerate(self.arrays.values()):
            assert (array == 100 * step + number).all()
        assert (self.same == step).all()
        assert self.object.value == {"step": step}
        assert self.plain.text == b"step %d" % step
        rank = self.comm.rank
        assert self.own.value == ([rank, step] if rank < ranks else None)


class Scene:
    """One training in a directory, whose jobs run on hosts of any names."""

    def __init__(self, comm, on_hosts, path, kind=Values):
        self.comm, self.on_hosts, self.path, self.kind = comm, on_hosts, path, kind
        self.hosts = [f"h{rank}" for rank in range(comm.size)]
        self.directory = path / "run"
        self.saved_by = {}

    def local(self, **settings):
        settings.setdefault("reserve", 0)
        return Local(f"{self.path}/local/{{host}}", **settings)

    def manager(self, values, *, comm=None, local=None, memory=None, **options):
        options = {"deadline_seconds": 35.0, "preemption_signals": (), **options}
        return CheckpointManager(
            self.directory,
            values.states,
            comm=comm,
            options=Options(**options),
            memory=memory,
            local=self.local() if local is None else local,
        )

    def run(self, upto, *, hosts=None, comm=None, durable=(), closes=False, **given):
        """Restore, check what was restored, go on to a step with a save at each; crash.

        Returns:
            The report of the restore, and those of the saves by step.
        """
        comm = comm or self.comm
        self.on_hosts(hosts or self.hosts)
        values, reports, restored = self.kind(comm), {}, None
        try:
            with self.manager(values, comm=comm, **given) as manager:
                restored = manager.restore()
                step = 0 if restored is None else restored.step
                if restored is not None:
                    values.check(step, self.saved_by[step])
                while step < upto:
                    step += 1
                    values.go_to(step)
                    level = "directory" if step in durable else "local"
                    reports[step] = manager.save(step, level=level).wait()
                    self.saved_by[step] = comm.size
                if not closes:
                    raise Crash
        except Crash:
            pass
        comm.Barrier()
        return restored, reports

    def home(self, host):
        """Return the folder of the training on a host."""
        (home,) = (self.path / "local" / host).iterdir()
        return home

    def on_root(self, work):
        """Let one rank change files while the others wait."""
        self.comm.Barrier()
        if self.comm.rank == 0:
            work()
        self.comm.Barrier()

    def wipe(self, *hosts):
        """Lose the disks of hosts."""

        def remove():
            for host in hosts:
                shutil.rmtree(self.path / "local" / host, ignore_errors=True)

        self.on_root(remove)

    def files(self, host, generation):
        """Return the names of a generation's files on a host, without the manifest."""
        folder = self.home(host) / f"checkpoint-{generation:08d}"
        return {path.name for path in folder.iterdir()} - {"manifest.json"}


def flip(path, place):
    """Flip one bit of a file; a negative place counts from its end."""
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)
