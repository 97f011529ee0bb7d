# SPDX-License-Identifier: Apache-2.0
"""What a local level survives, on hosts that exist in name."""

import logging
import shutil
from itertools import product

import numpy as np
import pytest

from mpi_ckpt import ArrayState, CheckpointManager, Local, Options
from mpi_ckpt.errors import (
    CorruptGenerationError,
    OptionsError,
    ReadError,
    RestoreError,
)
from mpi_ckpt.storage.directory.rollback import bring_back, set_newer_aside
from mpi_ckpt.storage.journal import read_history
from mpi_ckpt.storage.reading.reader import read_manifest
from tests.local.cut_values import CutValues
from tests.local.scene import LEAVES, Crash, Values, flip
from tests.ranks import RecordingHandle, assert_same, groupings, same_error

pytestmark = pytest.mark.filterwarnings("error")


def test_all_processes_die_and_the_hosts_have_it(scene, comm):
    _, saves = scene.run(3)
    assert_same(comm, saves[3].path)
    assert saves[3].level == "local"
    assert saves[3].survives >= {"process"} | ({"host"} if comm.size > 1 else set())
    restored, _ = scene.run(3)
    assert (restored.level, restored.step, restored.generation) == ("local", 3, 3)
    assert not list(scene.directory.glob("checkpoint-*"))
    assert_same(comm, (restored.bytes_read, restored.path))


@pytest.mark.parametrize("asynchronous", [False, True])
def test_what_hosts_keep_is_seen_in_the_log_and_the_history(
    scene, comm, caplog, asynchronous
):
    with caplog.at_level(logging.INFO, "mpi_ckpt"):
        _, saves = scene.run(2, asynchronous=asynchronous)
    told = [line for line in caplog.messages if line.startswith("kept generation")]
    expected = [f"kept generation {n}, step {n}, on the hosts: " for n in (1, 2)]
    assert [line[: len(expected[0])] for line in told] == expected * (comm.rank == 0)
    kept = [event for event in read_history(scene.directory) if event.event == "kept"]
    assert [(event.generation, event.step) for event in kept] == [(1, 1), (2, 2)]
    assert kept[-1].nbytes == comm.bcast(saves[2].bytes_written)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_each_host_in_turn_loses_its_disk(scene, comm, asynchronous):
    if comm.size == 1:
        pytest.skip("one host has no other")
    step = 0
    for lost in scene.hosts:
        step += 2
        restored, _ = scene.run(step, asynchronous=asynchronous)
        assert restored is None or (restored.level, restored.step) == ("local", step - 2)
        scene.wipe(lost)


def test_a_host_that_is_gone_is_not_needed(scene, comm):
    if comm.size == 1:
        pytest.skip("one host has no other")
    scene.run(2)
    for gone in range(comm.size):
        others = [name for rank, name in enumerate(scene.hosts) if rank != gone]
        scene.wipe("new")
        restored, _ = scene.run(2, hosts=[*others, "new"])
        assert (restored.level, restored.step) == ("local", 2)


def test_more_lost_hosts_than_copies_are_told_of(scene, comm, caplog):
    if comm.size < 3:
        pytest.skip("needs three hosts")
    scene.run(4, durable=[2])
    scene.wipe(*scene.hosts[:-1])
    with caplog.at_level(logging.WARNING):
        restored, _ = scene.run(4)
    assert (restored.level, restored.step) == ("directory", 2)
    told = [line for line in caplog.messages if "hosts kept a generation of step 4" in line]
    assert len(told) == (comm.rank == 0)
    # The steps were made again, as another run: what the last host had is of no more use.
    restored, _ = scene.run(4)
    assert (restored.level, restored.step) == ("local", 4)


def test_lost_work_can_be_an_error(scene, comm):
    if comm.size < 3:
        pytest.skip("needs three hosts")
    scene.run(4, durable=[2])
    scene.wipe(*scene.hosts[:-1])
    with same_error(comm, RestoreError, "step 4", 'lost="warn"'):
        scene.run(4, local=scene.local(lost="raise"))
    restored, _ = scene.run(4)
    assert restored.step == 2


def test_two_of_three_hosts_are_off_and_the_third_goes_on_from_the_directory(
    scene, comm, caplog
):
    if comm.size != 3:
        pytest.skip("needs three hosts")
    scene.run(4, durable=[2], local=scene.local(copies=2))
    for left in range(3):
        part = comm.Split(int(comm.rank != left), comm.rank)
        caplog.clear()
        if comm.rank == left:
            with caplog.at_level(logging.WARNING):
                host = scene.hosts[left]
                restored, _ = scene.run(0, hosts=[host] * 3, comm=part)
            assert (restored.level, restored.step) == ("directory", 2)
            others = [name for name in scene.hosts if name != host]
            (told,) = [line for line in caplog.messages if "of step 4" in line]
            assert all(name in told for name in others)
        part.Free()
        comm.Barrier()
    # They are back, and nobody has gone on meanwhile.
    restored, _ = scene.run(4)
    assert (restored.level, restored.step) == ("local", 4)


@pytest.mark.parametrize("durable", [[1], []])
def test_all_hosts_lost_are_told_of(scene, comm, caplog, durable):
    scene.run(3, durable=durable)
    with caplog.at_level(logging.WARNING):
        restored, _ = scene.run(1, hosts=[f"new{rank}" for rank in range(comm.size)])
    if durable:
        assert (restored.level, restored.step) == ("directory", 1)
    else:
        assert restored is None
    told = [line for line in caplog.messages if "h0" in line and "are lost" in line]
    assert len(told) == (comm.rank == 0)


def test_a_host_that_comes_back_brings_nothing_of_an_older_run(scene, comm):
    if comm.size == 1:
        pytest.skip("one host has no other")
    scene.run(5, durable=[1])  # steps 2 to 5 are on h0, h1, ...
    others = [f"n{rank}" for rank in range(comm.size)]
    restored, _ = scene.run(3, hosts=others)  # which do not have them
    assert restored.step == 1
    # One of the new hosts beside the old ones, which together have step 5 as a whole.
    restored, _ = scene.run(3, hosts=[*others[:1], *scene.hosts[1:]])
    assert restored.step in (1, 3)
    restored, _ = scene.run(3, hosts=scene.hosts)
    assert restored.step in (1, 3)


def test_a_save_to_the_directory_is_newer_than_older_local_ones(scene, comm):
    scene.run(4, durable=[4])
    restored, _ = scene.run(6, durable=[])
    assert (restored.level, restored.step) == ("directory", 4)
    restored, _ = scene.run(6)
    assert (restored.level, restored.step) == ("local", 6)


def test_a_root_on_another_host_finds_no_fresh_start(scene, comm):
    scene.run(2)
    # The directory was on a disk of the old root.
    scene.on_root(lambda: scene.directory.rename(scene.path / "elsewhere"))
    with same_error(comm, ReadError, "keep local generations", "step 2", "root on h0"):
        scene.run(2)


def test_a_flipped_byte_in_one_copy_is_set_aside_on_its_host(scene, comm, caplog):
    if comm.size == 1:
        pytest.skip("one host has no other copy")
    scene.run(2)
    names = {host: scene.files(host, 2) for host in scene.hosts}
    # Of each file one copy is bad, each time on the host that is asked first.
    bad = {}
    for host in scene.hosts:
        for name in sorted(names[host]):
            bad.setdefault(name, host)

    def damage():
        for name, host in bad.items():
            flip(scene.home(host) / "checkpoint-00000002" / name, -1)

    scene.on_root(damage)
    restored, _ = scene.run(2)
    assert (restored.level, restored.step) == ("local", 2)
    aside = {
        (path.name, host)
        for host in scene.hosts
        for path in (scene.home(host) / ".quarantine").glob("checkpoint-00000002*/*")
        if path.name != "reason.json"
    }
    # Others were never asked; of those that were, each was set aside on its host alone.
    assert aside
    assert aside <= set(bad.items())
    assert all(name not in scene.files(host, 2) for name, host in aside)
    restored, _ = scene.run(2)
    assert (restored.level, restored.step) == ("local", 2)


@pytest.mark.parametrize("place", [0, 20])
def test_a_damaged_header_or_manifest_is_set_aside_too(scene, comm, place):
    if comm.size == 1:
        pytest.skip("one host has no other copy")
    scene.run(2)
    home = scene.home("h0") / "checkpoint-00000002"

    def damage():
        if place:
            flip(home / "manifest.json", place)
        else:
            for name in scene.files("h0", 2):
                flip(home / name, place)

    scene.on_root(damage)
    restored, _ = scene.run(2)
    assert (restored.level, restored.step) == ("local", 2)
    assert (scene.home("h0") / ".quarantine").exists()


def test_no_good_copy_leads_to_the_generation_before(scene, comm, caplog):
    scene.run(3, durable=[1])
    damaged = "tiles-00000.safetensors"

    def damage():
        for host in scene.hosts:
            path = scene.home(host) / "checkpoint-00000002" / damaged
            if path.exists():
                flip(path, -1)

    generation = 2  # of step 3: step 1 went to the directory
    assert scene.run(3)[0].generation == generation
    scene.on_root(damage)
    restored, _ = scene.run(3)
    assert (restored.level, restored.step) == ("local", 2)


def test_renames_cut_off_anywhere_leave_this_save_or_the_one_before(scene, comm):
    """Take back the last rename on any of the hosts, as a kill between them does."""
    scene.kind = CutValues
    for number, named in enumerate(product([False, True], repeat=comm.size)):
        last = scene.run(2 * number + 2)[1][2 * number + 2].generation
        files = {host: scene.files(host, last) for host in scene.hosts}
        every = set().union(*files.values())

        def take_back(named=named, last=last):
            for host, is_named in zip(scene.hosts, named, strict=True):
                if not is_named:
                    home = scene.home(host)
                    name = f"{last:08d}"
                    (home / f"checkpoint-{name}").rename(home / f".partial-{name}-abc")

        scene.on_root(take_back)
        there = [files[host] for host, yes in zip(scene.hosts, named, strict=True) if yes]
        is_whole = set().union(*there) == every
        restored, _ = scene.run(0)
        assert restored.step == 2 * number + 1 + is_whole
        assert not list(scene.path.glob("local/*/*/.partial-*"))
        scene.run(2 * number + 2)


def test_other_numbers_of_ranks_and_hosts(scene, comm):
    sizes = [*range(1, comm.size + 1), comm.size, *range(comm.size, 0, -1)]
    for step, size in enumerate(sizes, 1):
        part = comm.Split(int(comm.rank >= size), comm.rank)
        if comm.rank < size:
            restored, _ = scene.run(step, comm=part)
            assert restored is None or restored.step == step - 1
        part.Free()
        scene.saved_by = comm.bcast(scene.saved_by)


def test_every_way_to_lay_ranks_on_hosts(scene, comm):
    for step, hosts in enumerate(groupings(comm.size), 1):
        scene.wipe(*"abcd")
        restored, _ = scene.run(step, hosts=list(hosts), durable=[step])
        assert restored is None or restored.step == step - 1
        step_more, _ = scene.run(step, hosts=list(hosts))
        assert step_more.step == step


def test_one_path_for_two_hosts_is_refused(scene, comm):
    if comm.size == 1:
        pytest.skip("one host has no other")
    shared = Local(str(scene.path / "one"), reserve=0)
    with same_error(comm, OptionsError, "h0, h1", "see one directory"):
        scene.run(1, local=shared)


def test_manifests_are_the_same_bytes_on_all_hosts(scene, comm):
    scene.run(2)
    found = {
        (scene.home(host) / "checkpoint-00000002" / "manifest.json").read_bytes()
        for host in scene.hosts
    }
    assert len(found) == 1
    manifest = read_manifest(scene.home("h0") / "checkpoint-00000002")
    copies = min(2, comm.size)
    for file, holders in zip(manifest.files, manifest.local.holders, strict=True):
        assert len(holders) == copies
        for place, host in enumerate(scene.hosts):
            assert (file.name in scene.files(host, 2)) == (place in holders)


def test_hosts_write_as_much_each(scene, comm):
    scene.run(2)
    written = [
        sum((scene.home(h) / "checkpoint-00000002" / f).stat().st_size for f in names)
        for h in scene.hosts
        for names in [{name for name in scene.files(h, 2) if name.startswith("share")}]
    ]
    assert max(written) <= 1.1 * sum(written) / comm.size


def test_as_many_stay_as_are_kept(scene, comm):
    scene.run(5, local=scene.local(keep=3))
    comm.Barrier()
    for host in scene.hosts:
        there = {path.name for path in scene.home(host).glob("checkpoint-*")}
        assert there >= {f"checkpoint-{n:08d}" for n in (3, 4, 5)}
    restored, _ = scene.run(6, local=scene.local(keep=1))
    assert restored.generation == 5


def test_a_training_that_ends_well_leaves_nothing_on_the_hosts(scene, comm, caplog):
    scene.run(3, durable=[3], closes=True)
    assert not list(scene.path.glob("local/*/*/checkpoint-*"))
    # Neither lost nor told of: the directory has it all.
    with caplog.at_level(logging.WARNING):
        restored, _ = scene.run(3)
    assert (restored.level, restored.step) == ("directory", 3)
    assert not [line for line in caplog.messages if "lost" in line]


def test_a_training_whose_last_save_is_local_keeps_it(scene, comm):
    scene.run(3, durable=[2], closes=True)
    restored, _ = scene.run(3)
    assert (restored.level, restored.step) == ("local", 3)


def test_a_rollback_of_the_directory_takes_local_saves_back(scene, comm):
    scene.run(4, durable=[1, 3])
    scene.on_root(lambda: set_newer_aside(scene.directory, 1))
    restored, _ = scene.run(1)
    assert (restored.level, restored.step) == ("directory", 1)
    scene.on_root(lambda: bring_back(scene.directory))
    restored, _ = scene.run(4)
    assert (restored.level, restored.step) == ("local", 4)


def test_going_back_begins_another_branch(scene, comm):
    scene.run(5, durable=[2])
    scene.on_hosts(scene.hosts)
    values = Values(comm)

    def go_back():
        with scene.manager(values) as manager:
            assert manager.restore(generation=1).step == 2
            values.go_to(12)
            assert manager.save(12, level="local").wait().generation
            raise Crash

    with pytest.raises(Crash):
        go_back()
    comm.Barrier()
    scene.saved_by[12] = comm.size
    restored, _ = scene.run(12)
    assert (restored.level, restored.step) == ("local", 12)


def test_some_states_alone_are_refused_where_hosts_are_newer(scene, comm):
    scene.run(3, durable=[2])
    values = Values(comm)
    with (
        scene.manager(values) as manager,
        same_error(comm, RestoreError, "step 3", "restore all states"),
    ):
        manager.restore(only=["arrays"])
    scene.run(4, durable=[4])
    with scene.manager(values) as manager:
        assert manager.restore(only=["arrays"]).step == 4
        assert manager.restore(only=["plain"]).step == 4


def test_a_directory_whose_generations_are_all_bad_is_not_needed(scene, comm):
    scene.run(3, durable=[1])

    def damage():
        flip(scene.directory / "checkpoint-00000001" / "manifest.json", 30)

    scene.on_root(damage)
    restored, _ = scene.run(3)
    assert (restored.level, restored.step) == ("local", 3)


def test_a_damaged_lineage_is_an_error_that_names_it(scene, comm):
    scene.run(2, durable=[1])
    scene.on_root(lambda: flip(scene.directory / "lineage.json", 40))
    with same_error(comm, CorruptGenerationError, "lineage.json"):
        scene.run(2)


def test_hosts_that_hold_copies_of_a_copied_directory(scene, comm):
    """A directory that was moved takes its lineage along, and is found on the hosts."""
    scene.run(2)

    def move():
        shutil.move(scene.directory, scene.path / "moved")

    scene.on_root(move)
    scene.directory = scene.path / "moved"
    restored, _ = scene.run(2)
    assert (restored.level, restored.step) == ("local", 2)


def test_leaves_that_share_memory_are_compared_by_root(scene, comm):
    """Root decides what overlapping memory can hold, and may lack the bytes on its host."""
    scene.on_hosts(scene.hosts)

    def states():
        whole = np.arange(40.0)
        parts = {f"p{n}": whole[4 * n : 4 * n + 8] for n in range(9)}
        return whole, [ArrayState("overlapping", {"whole": whole, **parts})]

    options = Options(deadline_seconds=35, preemption_signals=())

    def save():
        _, mine = states()
        with CheckpointManager(
            scene.directory, mine, options=options, local=scene.local()
        ) as manager:
            assert manager.save(1, level="local").generation
            raise Crash

    with pytest.raises(Crash):
        save()
    comm.Barrier()
    if comm.size > 1:
        scene.wipe("h0")
    whole, mine = states()
    whole[:] = 0
    with CheckpointManager(
        scene.directory, mine, options=options, local=scene.local()
    ) as manager:
        assert manager.restore().level == "local"
    assert (whole == np.arange(40.0)).all()


def test_a_save_of_replicated_state_sends_next_to_nothing(scene, comm):
    scene.on_hosts(scene.hosts)
    arrays = {f"x{n}": np.zeros(20_000) for n in range(LEAVES)}
    options = Options(deadline_seconds=35, preemption_signals=())
    states = [ArrayState("arrays", arrays)]
    with CheckpointManager(
        scene.directory, states, options=options, local=scene.local()
    ) as manager:
        manager.save(1, level="local")
        arrays["x0"] += 1
        with RecordingHandle(manager._session.comm) as handle:
            assert manager.save(2, level="local").generation == 2
    assert sum(nbytes for _, nbytes in handle.messages) <= 2048
