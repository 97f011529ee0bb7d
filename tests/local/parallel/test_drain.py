# SPDX-License-Identifier: Apache-2.0
"""Copies of what hosts keep, made for the directory behind a training."""

import errno
import logging
import time

import pytest

from mpi_ckpt import Hooks, StopWhen
from mpi_ckpt.engine.hosts.copying import directory_copy, drain, token_bucket
from mpi_ckpt.errors import FencedError, SaveError, WriteError
from mpi_ckpt.storage.journal import read_history, read_status
from mpi_ckpt.storage.local.host_directory import HostDirectory
from mpi_ckpt.storage.reading.proving import verify
from mpi_ckpt.storage.reading.reader import GenerationReader
from mpi_ckpt.storage.writing.partial import Partial
from tests.local.cut_values import CutValues
from tests.local.scene import Crash, Values, flip
from tests.ranks import assert_same, same_error
from tests.waiting import limit

pytestmark = pytest.mark.filterwarnings("error")

FAST, SLOW = 1e12, 1.0


class Training:
    """A training that steps; hosts keep every second step, every sixth is due to go on."""

    def __init__(
        self,
        scene,
        *,
        drain=FAST,
        every=2,
        interval=6,
        hosts=None,
        values=Values,
        **options,
    ):
        scene.comm.Barrier()
        scene.on_hosts(hosts or scene.hosts)
        self.scene, self.values = scene, values(scene.comm)
        self.reports = []
        self.manager = scene.manager(
            self.values,
            local=scene.local(every=every, drain=drain),
            interval=interval,
            hooks=Hooks(on_save=self.reports.append),
            **options,
        )

    def __enter__(self):
        self.manager.__enter__()
        self.restored = self.manager.restore()
        if self.restored is not None:
            self.values.check(self.restored.step, self.scene.comm.size)
        return self

    def __exit__(self, *error):
        return self.manager.__exit__(*error) or error[0] is Crash

    def go_to(self, step):
        stops = False
        while self.manager.steps < step and not stops:
            self.values.go_to(self.manager.steps + 1)
            stops = self.manager.step()
        return stops

    def go_until_saved(self):
        """Step until something is in the directory, at the pace of this rank's threads.

        So it takes a few steps, on a slow machine too.
        """
        start = time.monotonic()
        while self.manager.last_save is None:
            while self.is_at_work:
                assert time.monotonic() - start < limit(90)
                time.sleep(0.01)
            assert time.monotonic() - start < limit(90)
            self.go_to(self.manager.steps + 1)

    @property
    def is_at_work(self):
        manager = self.manager
        return manager._saver.is_writing or manager._session.hosts.drain.is_copying


def generations(scene):
    found = {}
    for path in sorted(scene.directory.glob("checkpoint-*")):
        with GenerationReader(path) as reader:
            assert reader.manifest.local is None
            verify(reader)
            found[reader.manifest.generation] = reader.manifest.step
    return found


def elsewhere(scene):
    return [f"new{rank}" for rank in range(scene.comm.size)]


@pytest.mark.parametrize("asynchronous", [False, True])
def test_due_saves_reach_the_directory_from_the_hosts(scene, comm, caplog, asynchronous):
    with (
        caplog.at_level(logging.INFO, "mpi_ckpt"),
        Training(scene, interval=20, asynchronous=asynchronous) as training,
    ):
        training.go_to(21)
        training.go_until_saved()
        saved = training.manager.last_save
        training.go_to(41)
        job = training.manager
    assert_same(comm, (saved.generation, saved.path, saved.metrics, saved.bytes_written))
    assert (saved.step, saved.level, saved.size) == (20, "directory", comm.size)
    assert saved.copied_from > 0
    assert saved.lag >= 1
    assert saved.survives >= {"process"}
    assert job.last_save.step == 40  # which close() has waited for
    if comm.rank == 0:
        assert generations(scene) == {1: 20, 2: 40}
        told = [line for line in caplog.messages if "from the hosts:" in line]
        assert len(told) == 2
        assert "step 20" in told[0]
        assert "steps behind the training, 0 due saves left out; 1 kept" in told[0]
        directory = [one for one in training.reports if one.level == "directory"]
        assert [one.step for one in directory] == [20, 40]
    events = [one for one in read_history(scene.directory) if one.event == "saved"]
    assert [(one.step, one.generation) for one in events] == [(20, 1), (40, 2)]
    assert (events[0].copied_from, events[0].lag) == (saved.copied_from, saved.lag)
    status = read_status(scene.directory)
    assert status["copy"] is None
    assert (status["last_save"]["step"], status["kept"]["step"]) == (40, 40)
    scene.wipe(*scene.hosts)
    with Training(scene, hosts=elsewhere(scene)) as training:
        assert (training.restored.level, training.restored.step) == ("directory", 40)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_state_that_is_cut_over_the_ranks_is_copied_too(scene, comm, asynchronous):
    with Training(scene, values=CutValues, asynchronous=asynchronous) as training:
        training.go_to(7)
    if comm.rank == 0:
        assert generations(scene) == {1: 6}
    scene.wipe(*scene.hosts)
    with Training(scene, values=CutValues, hosts=elsewhere(scene)) as training:
        assert (training.restored.level, training.restored.step) == ("directory", 6)


def test_newer_steps_on_hosts_come_before_an_older_copy(scene, comm):
    with Training(scene, drain=SLOW) as training:
        training.go_to(9)
        training.manager.wait()  # it is copied at once, while hosts keep step 8 already
        assert (training.manager.last_save.step, training.manager.last_save.lag) == (6, 3)
        raise Crash
    with Training(scene) as training:
        assert (training.restored.level, training.restored.step) == ("local", 8)
        raise Crash
    # Without the hosts it is the copy; and what they kept after it is no more on the way.
    with Training(scene, hosts=elsewhere(scene)) as training:
        assert (training.restored.level, training.restored.step) == ("directory", 6)
        training.go_to(7)
        training.manager.save(level="local").wait()
        raise Crash
    scene.wipe(*elsewhere(scene))
    with Training(scene) as training:
        assert (training.restored.level, training.restored.step) == ("local", 6)
        raise Crash


def test_a_host_is_lost_in_the_middle_of_a_copy_and_it_leaves_nothing(scene, comm):
    with Training(scene, drain=SLOW) as training:
        training.go_to(9)
        assert not list(scene.directory.glob("checkpoint-*"))
        raise Crash
    assert list(scene.directory.glob(".partial-*"))
    if comm.size > 1:
        scene.wipe(scene.hosts[-1])  # all processes have died with it
    with Training(scene) as training:
        assert (training.restored.level, training.restored.step) == ("local", 8)
        training.go_to(12)
    if comm.rank == 0:
        assert generations(scene) == {1: 12}
        assert not list(scene.directory.glob(".partial-*"))


def test_a_due_save_is_left_out_while_a_copy_is_under_way(scene, comm, caplog):
    with (
        caplog.at_level(logging.INFO, "mpi_ckpt"),
        Training(scene, drain=SLOW) as training,
    ):
        training.go_to(20)
        manager = training.manager
    saved = manager.last_save
    assert (saved.step, saved.skipped, saved.lag) == (6, 2, 14)
    told = [line for line in caplog.messages if "is left out, since the copy" in line]
    assert len(told) == 2 * (comm.rank == 0)
    if comm.rank == 0:
        assert "due at step 18" in told[1]
        assert "2 left out so far" in told[1]
        assert generations(scene) == {1: 6}
    # Hosts have newer steps than the directory: they stay.
    with Training(scene) as training:
        assert (training.restored.level, training.restored.step) == ("local", 20)


def test_the_status_shows_how_far_a_copy_is(scene, comm, monkeypatch):
    monkeypatch.setattr("mpi_ckpt.engine.observer._SHOWN_SECONDS", 0.0)
    monkeypatch.setattr("mpi_ckpt.reports._NOTICED_SECONDS", 0.0)
    seen, real = [], token_bucket.TokenBucket.take

    def take(self, nbytes):
        seen.append(read_status(scene.directory)["copy"])
        real(self, nbytes)

    with Training(scene, drain=SLOW) as training:
        training.go_to(13)
        copy = read_status(scene.directory)["copy"]
        assert (copy["step"], copy["lag"], copy["skipped"]) == (6, 7, 1)
        assert copy["failed"] == copy["bytes_done"] == 0
        drain = training.manager._session.hosts.drain
        assert copy["bytes_expected"] == comm.bcast(drain._copy.nbytes) > 0
        assert time.time() - limit(90) < copy["since"] <= time.time()
        monkeypatch.setattr(token_bucket.TokenBucket, "take", take)
        comm.Barrier()
        training.manager.wait()
        comm.Barrier()
        assert read_status(scene.directory)["copy"] is None
    # It goes on while all wait for the rest, by the thread that copies.
    moved = [one["bytes_done"] for one in seen if one is not None]
    assert moved == sorted(moved)
    if comm.rank == 0 and len(moved) > 1:
        assert 0 < moved[-1] < copy["bytes_expected"]


def test_hosts_keep_what_is_being_copied(scene, comm):
    with Training(scene, drain=SLOW) as training:
        training.go_to(17)  # they would have only 14 and 16 otherwise
        training.manager.wait()
        assert training.manager.last_save.step == 6
        training.go_to(18)
    if comm.rank == 0:
        assert generations(scene) == {1: 6, 2: 18}


def test_a_save_of_the_program_waits_for_the_copy(scene, comm):
    with Training(scene, drain=SLOW) as training:
        training.go_to(7)
        assert training.manager.save().wait().generation == 2
    if comm.rank == 0:
        assert generations(scene) == {1: 6, 2: 7}
        assert not list((scene.home("h0")).glob("checkpoint-*"))  # all is in the directory


def test_the_next_save_shares_what_a_copy_has_unchanged(scene, comm):
    with Training(scene) as training:
        training.go_to(6)
        training.manager.wait()
        again = training.manager.save().wait()
        assert again.generation == 2
        assert again.bytes_reused > again.bytes_written / 2
    if comm.rank == 0:
        assert generations(scene) == {1: 6, 2: 6}
    scene.wipe(*scene.hosts)
    with Training(scene, hosts=elsewhere(scene)) as training:
        assert (training.restored.level, training.restored.generation) == ("directory", 2)


def test_the_last_save_before_a_stop_takes_its_place(scene, comm):
    asked = []
    stop = StopWhen(asked=lambda: bool(asked), wall_time=False)
    with Training(scene, drain=SLOW, stop=stop) as training:
        training.go_to(7)
        asked.append(True)
        time.sleep(1.1)
        assert training.go_to(40)
        assert training.manager.last_save.copied_from == 0
        last = training.manager.steps
    if comm.rank == 0:
        assert generations(scene) == {1: last}
        assert not list(scene.directory.glob(".partial-*"))


@pytest.mark.parametrize(
    ("save_seconds", "level"), [(None, "local"), (1e4, "local"), (40.0, "directory")]
)
def test_the_last_save_goes_where_it_fits(scene, comm, caplog, save_seconds, level):
    """The job ends in 50 s, by a clock of its own: a save takes longer, or does not."""
    asked = []
    stop = StopWhen(asked=lambda: 50.0 if asked else None, margin_seconds=40.0)
    with Training(scene, drain=SLOW, stop=stop) as training:
        if save_seconds is not None:
            training.manager._saver.durations.note_durable(save_seconds)
        training.go_to(7)
        asked.append(True)
        time.sleep(1.1)
        with caplog.at_level(logging.WARNING):
            assert training.go_to(40)
        stopped_at = training.manager.steps
    told = [line for line in caplog.messages if line.startswith("asked to stop (the job")]
    assert len(told) == (comm.rank == 0)
    advice = f"`mpi-ckpt rescue {scene.path}/local/{{host}} {scene.directory}`"
    assert all((advice in line) == (level == "local") for line in told)
    if comm.rank == 0:
        saved = generations(scene)
        assert saved == ({1: stopped_at} if level == "directory" else {})
    with Training(scene) as training:
        assert (training.restored.level, training.restored.step) == (level, stopped_at)


def test_a_last_save_that_hosts_cannot_keep_goes_to_the_directory(scene, comm, monkeypatch):
    def fail(*_):
        raise WriteError("no disk", path=scene.path)

    stop = StopWhen(asked=lambda: 1.0)
    if comm.rank == comm.size - 1:
        monkeypatch.setattr(HostDirectory, "begin", fail)
    with Training(scene, drain=SLOW, every=None, interval=None, stop=stop) as training:
        assert training.go_to(400)
        assert training.manager.last_save.step == training.manager.steps


def test_a_successor_fences_the_copy_off(scene, comm):
    with (
        same_error(comm, FencedError, "taken over"),
        Training(scene, drain=SLOW) as training,
    ):
        training.go_to(7)
        take_over = (scene.directory / ".lock").write_text
        scene.on_root(lambda: take_over("job abcdef, process 1 on elsewhere\n"))
        training.manager.wait()
    comm.Barrier()
    assert not list(scene.directory.glob("checkpoint-*"))
    scene.on_root((scene.directory / ".lock").unlink)
    with Training(scene) as training:
        assert (training.restored.level, training.restored.step) == ("local", 6)


def test_a_successor_that_swept_ends_the_copy(scene, comm, monkeypatch):
    """All ranks learn it at a step, though only some were still writing."""
    real = directory_copy._proven_runs

    def taken_over(reader, file):
        (scene.directory / ".lock").write_text("job abcdef, process 1 on elsewhere\n")
        for path in scene.directory.glob(".partial-*"):
            path.rename(scene.path / "swept")
        yield from real(reader, file)

    with (
        same_error(comm, FencedError, "taken over"),
        Training(scene, drain=FAST) as training,
    ):
        training.go_to(5)
        if comm.rank == 0:
            monkeypatch.setattr(directory_copy, "_proven_runs", taken_over)
        training.go_until_saved()
    assert not list(scene.directory.glob("checkpoint-*"))


def test_a_bad_copy_on_a_host_is_replaced_by_another(scene, comm, caplog):
    if comm.size == 1:
        pytest.skip("one host has no other copy")
    with Training(scene, drain=SLOW, interval=7) as training:
        training.go_to(6)

        def damage():
            number = max(int(path.name[-8:]) for path in scene.home("h0").glob("check*"))
            for name in scene.files("h0", number):
                if name.startswith("share"):
                    flip(scene.home("h0") / f"checkpoint-{number:08d}" / name, -1)

        training.manager.wait()
        scene.on_root(damage)
        drain = training.manager._session.hosts.drain
        drain.begin(training.manager._session, training.manager._saver.workshop)
        training.manager.wait()
        assert training.manager.last_save.step == 6
        set_aside = list((scene.home("h0") / ".quarantine").glob("*"))
        assert bool(set_aside)
        raise Crash
    if comm.rank == 0:
        assert generations(scene) == {1: 6}


def test_a_lost_disk_is_no_failure_while_another_host_has_a_copy(scene, comm):
    if comm.size == 1:
        pytest.skip("one host has no other copy")
    with Training(scene, drain=SLOW, interval=7) as training:
        training.go_to(6)
        training.manager.wait()
        scene.wipe(scene.hosts[-1])
        drain = training.manager._session.hosts.drain
        drain.begin(training.manager._session, training.manager._saver.workshop)
        training.manager.wait()
        assert training.manager.last_save.step == 6
        raise Crash
    if comm.rank == 0:
        assert generations(scene) == {1: 6}


def fails(scene, times):
    """Return a `write_shard` that fails so many times in the directory."""
    real, left = Partial.write_shard, [times]

    def write(self, name, runs, nbytes, **how):
        if self.path.parent == scene.directory and left[0]:
            left[0] -= 1
            raise WriteError("no space left", path=self.path, errno=errno.ENOSPC)
        return real(self, name, runs, nbytes, **how)

    return write


def test_a_failed_try_is_repeated_with_the_newest(scene, comm, caplog, monkeypatch):
    monkeypatch.setattr(drain, "_PAUSES_SECONDS", (0.01, 0.01))
    with caplog.at_level(logging.WARNING), Training(scene) as training:
        if comm.rank == comm.size - 1:
            monkeypatch.setattr(Partial, "write_shard", fails(scene, 2))
        training.go_until_saved()
        assert training.manager.last_save.step >= 6
        assert training.manager.last_save.step % 2 == 0
    told = [line for line in caplog.messages if "is tried again in" in line]
    assert len(told) == 2 * (comm.rank == 0)
    if comm.rank == 0:
        assert "no space left" in told[0]
        assert not list(scene.directory.glob(".partial-*"))


def test_a_full_directory_is_an_error_at_the_next_save(scene, comm, caplog, monkeypatch):
    monkeypatch.setattr(drain, "_PAUSES_SECONDS", (0.01, 0.01))
    with Training(scene) as training, monkeypatch.context() as patch:
        if comm.rank == comm.size - 1:
            patch.setattr(Partial, "write_shard", fails(scene, 3))
        with same_error(comm, SaveError, "has failed 3 times", "no space left", "rescue"):
            for _ in range(1000):
                training.go_to(training.manager.steps + 1)
                time.sleep(0.002)
        assert not list(scene.directory.glob("checkpoint-*"))
        # Whoever goes on after it has a training as before.
        training.go_until_saved()
    errors = [one for one in caplog.records if one.levelno == logging.ERROR]
    assert len(errors) == (comm.rank == 0)


def test_close_raises_what_a_copy_failed_of(scene, comm, monkeypatch):
    with (
        same_error(comm, SaveError, "has failed 3 times"),
        Training(scene, drain=SLOW) as training,
    ):
        training.go_to(5)
        monkeypatch.setattr(Partial, "write_shard", fails(scene, 3 * 9))
        training.go_to(7)


def test_the_ranks_write_what_hosts_could_not_keep(scene, comm, monkeypatch):
    def fail(*_):
        raise WriteError("no disk", path=scene.path)

    with Training(scene, asynchronous=True) as training:
        training.go_to(5)
        if comm.rank == comm.size - 1:
            monkeypatch.setattr(HostDirectory, "begin", fail)
        training.go_until_saved()
        saved = training.manager.last_save
        assert (saved.level, saved.copied_from) == ("directory", 0)
        assert saved.step >= 6
        # Local saves are off by and by: then all due saves are written so.
        training.go_to(30)
        assert training.manager._session.hosts.is_off
        training.manager.wait()
        assert training.manager.last_save.step == 30
