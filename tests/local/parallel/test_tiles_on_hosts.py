# SPDX-License-Identifier: Apache-2.0
"""Parts of ranks and state that is cut over them, on the hosts of the ranks and others."""

import logging
import tracemalloc

import numpy as np
import pytest

from mpi_ckpt import (
    Block,
    CheckpointManager,
    Options,
    PerRankState,
    RNGState,
    ShardedArrayState,
)
from mpi_ckpt.engine.hosts import handed_tiles, tile_copies
from mpi_ckpt.engine.hosts.copying.promoting import rescue
from mpi_ckpt.engine.save.cut import own_tiles
from mpi_ckpt.errors import DivergedError, SaveError, StageError, WriteError
from mpi_ckpt.memory import Memory
from mpi_ckpt.storage.format import tile_table
from mpi_ckpt.storage.format.tile_table import decode_tile_header
from mpi_ckpt.storage.reading.proving import verify
from mpi_ckpt.storage.reading.reader import GenerationReader, read_manifest
from mpi_ckpt.storage.writing.partial import Partial
from tests.local.cut_values import CutValues
from tests.local.scene import Crash, Scene, Values, flip
from tests.ranks import RecordingHandle, groupings, same_error

pytestmark = pytest.mark.filterwarnings("error")

OPTIONS = {"deadline_seconds": 35.0, "preemption_signals": ()}


@pytest.fixture
def scene(comm, on_hosts, shared_path):
    """A training with state that is cut over its ranks, each on a host of its own."""
    return Scene(comm, on_hosts, shared_path, CutValues)


def crash_after(work):
    with pytest.raises(Crash):
        work()


@pytest.mark.parametrize("asynchronous", [False, True])
def test_each_host_in_turn_loses_its_disk(scene, comm, asynchronous):
    step = 0
    for lost in scene.hosts if comm.size > 1 else ["nobody"]:
        step += 2
        restored, saves = scene.run(step, asynchronous=asynchronous)
        assert all(report.generation for report in saves.values())
        assert restored is None or (restored.level, restored.step) == ("local", step - 2)
        scene.wipe(lost)
    restored, _ = scene.run(step)
    assert (restored.level, restored.step) == ("local", step)


def test_other_numbers_of_ranks_and_hosts(scene, comm):
    sizes = [*range(1, comm.size + 1), comm.size, *range(comm.size, 0, -1)]
    for step, size in enumerate(sizes, 1):
        part = comm.Split(int(comm.rank >= size), comm.rank)
        if comm.rank < size:
            restored, _ = scene.run(step, comm=part)
            assert restored is None or (restored.level, restored.step) == (
                "local",
                step - 1,
            )
        part.Free()
        scene.saved_by = comm.bcast(scene.saved_by)


def test_every_way_to_lay_ranks_on_hosts(scene, comm):
    for step, hosts in enumerate(groupings(comm.size), 1):
        scene.wipe(*"abcd")
        restored, _ = scene.run(step, hosts=list(hosts), durable=[step])
        assert restored is None or restored.step == step - 1
        scene.run(step + 1, hosts=list(hosts))
        again, _ = scene.run(step, hosts=list(hosts))
        assert (again.level, again.step) == ("local", step + 1)
        # Back to the generation of the directory, for the next hosts.
        scene.wipe(*"abcd")
        scene.run(0, hosts=list(hosts))


def test_the_tiles_of_a_host_are_one_file_on_it_and_on_another(scene, comm):
    scene.run(2)
    manifests = {
        (scene.home(host) / "checkpoint-00000002" / "manifest.json").read_bytes()
        for host in scene.hosts
    }
    assert len(manifests) == 1
    manifest = read_manifest(scene.home("h0") / "checkpoint-00000002")
    local = manifest.local
    held = dict(zip([file.name for file in manifest.files], local.holders, strict=True))
    for rank, host in enumerate(scene.hosts):
        name = f"tiles-{rank:05d}.safetensors"
        assert rank in held[name]
        assert len(held[name]) == min(2, comm.size)
        assert name in scene.files(host, 2)
    # Each holder has as much of other hosts as any.
    tiles = [holders for name, holders in held.items() if name.startswith("tiles")]
    counts = [sum(rank in holders for holders in tiles) for rank in range(comm.size)]
    assert set(counts) == {min(2, comm.size)}
    assert not any(name.startswith("rank-") for name in held)
    for state in ("own", "rng", "field", "particles"):
        assert manifest.state(state).cut
        assert not len(manifest.state(state).leaves)


def test_copies_are_the_same_bytes_and_each_proves_what_it_has(scene, comm):
    scene.run(1)
    found = {}
    for host in scene.hosts:
        folder = scene.home(host) / "checkpoint-00000001"
        for name in scene.files(host, 1):
            found.setdefault(name, set()).add((folder / name).read_bytes())
        with GenerationReader(folder) as reader:
            verify(reader)
            names = {leaf.extent.file for leaf in reader.leaves()}
            assert names == {n for n in scene.files(host, 1) if n != "manifest.json"}
    assert all(len(copies) == 1 for copies in found.values())


@pytest.mark.parametrize("place", [-1, 20, 5000])
def test_a_bad_copy_of_tiles_is_set_aside_on_its_host(scene, comm, place):
    if comm.size == 1:
        pytest.skip("one host has no other copy")
    scene.run(2)
    name = f"tiles-{comm.size - 1:05d}.safetensors"
    holders = [host for host in scene.hosts if name in scene.files(host, 2)]
    path = scene.home(holders[0]) / "checkpoint-00000002" / name
    scene.on_root(lambda: flip(path, place))
    restored, _ = scene.run(2)
    assert (restored.level, restored.step) == ("local", 2)
    # The other copy may have been asked alone; if the bad one was, it is set aside.
    aside = list(scene.path.glob(f"local/*/*/.quarantine/*/{name}"))
    assert all(holders[0] in str(one) for one in aside)
    assert bool(aside) == (not path.exists())
    if place == 20:  # headers are proven where a generation is found
        assert aside


def test_no_good_copy_of_tiles_leads_to_the_generation_before(scene, comm):
    scene.run(3)
    name = f"tiles-{comm.size - 1:05d}.safetensors"

    def damage():
        for host in scene.hosts:
            path = scene.home(host) / "checkpoint-00000003" / name
            if path.exists():
                flip(path, -1)

    scene.on_root(damage)
    restored, _ = scene.run(3)
    assert (restored.level, restored.step) == ("local", 2)


def test_more_lost_hosts_than_copies_are_told_of(scene, comm, caplog):
    if comm.size < 3:
        pytest.skip("needs three hosts")
    scene.run(4, durable=[2])
    scene.wipe(*scene.hosts[:-1])
    with caplog.at_level(logging.WARNING):
        restored, _ = scene.run(4)
    assert (restored.level, restored.step) == ("directory", 2)
    assert sum("of step 4" in line for line in caplog.messages) == (comm.rank == 0)


def test_a_rescue_takes_the_tiles_along(scene, comm):
    scene.run(3)
    scene.on_hosts(scene.hosts)
    comm.Barrier()
    rescued = rescue(f"{scene.path}/local/{{host}}", scene.directory, comm)
    assert rescued.step == 3
    if comm.rank == 0:
        with GenerationReader(scene.directory / "checkpoint-00000001") as reader:
            assert reader.manifest.local is None
            verify(reader)
            assert reader.tiles()["field", "rho"]
    scene.wipe(*scene.hosts)
    restored, _ = scene.run(3, hosts=[f"new{rank}" for rank in range(comm.size)])
    assert (restored.level, restored.step) == ("directory", 3)


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("fault", ["write_shard", "seal", "hand", "stage", "changed"])
def test_a_fault_on_one_rank_fails_the_save_on_all(
    scene, comm, monkeypatch, caplog, fault, asynchronous
):
    if fault == "stage" and not asynchronous:
        pytest.skip("nothing is copied")
    # Two ranks on the first host, if there are as many: the other is no leader.
    hosts = ["h0", "h0", *scene.hosts[2:]][: comm.size]
    scene.on_hosts(hosts)
    values = CutValues(comm)

    def no_more(*_, **__):
        raise WriteError("no more", path=scene.path, errno=28)

    def no_memory(*_, **__):
        raise OSError(12, "no memory")

    def no_tile(leaf):
        raise ValueError("unreadable")
        yield leaf

    def other_bytes(leaf):
        yield memoryview(bytes(leaf.spec.nbytes))

    def train():
        with scene.manager(values, asynchronous=asynchronous) as manager:
            values.go_to(1)
            assert manager.save(1, level="local").wait().generation == 1
            values.go_to(2)
            real = tile_copies.TileCopies.pass_on

            def pass_on(self, keep):
                # Only while bytes are moved: they were digested before.
                with monkeypatch.context() as patch:
                    runs = {"hand": no_tile, "changed": other_bytes}.get(fault)
                    if runs is not None and comm.rank == min(1, comm.size - 1):
                        patch.setattr(handed_tiles, "runs_of", runs)
                    real(self, keep)

            with monkeypatch.context() as patch, caplog.at_level(logging.WARNING):
                patch.setattr(tile_copies.TileCopies, "pass_on", pass_on)
                if comm.rank == comm.size - 1 and fault in ("write_shard", "seal"):
                    patch.setattr(Partial, fault, no_more)
                level = manager._session.hosts
                if comm.rank == 0 and fault == "stage":
                    patch.setattr(level.tile_memory, "take", no_memory)
                report = manager.save(2, level="local").wait()
            leads = comm.rank in manager._session.comm.topology.leaders
            applies = fault not in ("write_shard", "seal") or comm.bcast(
                leads, comm.size - 1
            )
            assert report.generation == (0 if applies else 2)
            told = [line for line in caplog.messages if "step 2 has failed" in line]
            assert len(told) == (applies and comm.rank == 0)
            values.go_to(3)
            assert manager.save(3, level="local").wait().generation == 3
            raise Crash

    crash_after(train)
    comm.Barrier()
    assert not list(scene.path.glob("local/*/*/.partial-*"))
    scene.saved_by[3] = comm.size
    restored, _ = scene.run(3, hosts=hosts)
    assert (restored.level, restored.step) == ("local", 3)


def test_too_many_tiles_of_a_host_are_an_error_whose_advice_applies(
    scene, comm, monkeypatch
):
    scene.on_hosts(scene.hosts)
    values = CutValues(comm)
    with scene.manager(values) as manager:
        values.go_to(1)
        with monkeypatch.context() as patch:
            own_tiles._plan_of.cache_clear()  # an earlier test may have had such tiles
            patch.setattr(tile_table, "TABLE_BYTES_MAX", 4095)
            with same_error(comm, SaveError, "in one file need a header", "use more hosts"):
                manager.save(1, level="local")
            with same_error(comm, SaveError, "in one file need a header", "more ranks"):
                manager.save(1)
        values.go_to(2)
        assert manager.save(2, level="local").generation == 1


def test_shared_tiles_and_streams_that_differ_are_errors(scene, comm):
    if comm.size == 1:
        pytest.skip("nothing differs")
    scene.on_hosts(scene.hosts)
    values = CutValues(comm)
    generator = np.random.default_rng(comm.rank)
    shared = RNGState("shared", generators={"g": generator}, shared=["g"])
    with scene.manager(values) as manager:
        values.go_to(1)
        values.table[0] = comm.rank
        with same_error(comm, DivergedError, "'table'"):
            manager.save(1, level="local")
        values.go_to(1)
        manager.add(shared)
        with same_error(comm, DivergedError, "'shared'", "declared shared"):
            manager.save(1, level="local")
        manager.remove("shared")
        kind = np.random.RandomState if comm.rank else np.random.default_rng
        manager.add(RNGState("kinds", generators={"g": kind(1)}))
        with same_error(comm, StageError, "'kinds'", "has the streams"):
            manager.save(1, level="local")
        manager.remove("kinds")
        assert manager.save(1, level="local").generation


def test_values_are_resized_on_root_from_the_parts_of_all_hosts(scene, comm):
    scene.kind = Values
    scene.on_hosts(scene.hosts)

    def states():
        def resize(values, size):
            return [[sum(one[0] for one in values), size]] * size

        return [PerRankState("own", [comm.rank, "x" * comm.rank], resize=resize)]

    def save():
        with CheckpointManager(
            scene.directory, states(), options=Options(**OPTIONS), local=scene.local()
        ) as manager:
            assert manager.save(1, level="local").generation
            raise Crash

    crash_after(save)
    comm.Barrier()
    fewer = max(1, comm.size - 1)
    part = comm.Split(int(comm.rank >= fewer), comm.rank)
    if comm.rank < fewer:
        mine = states()
        with CheckpointManager(
            scene.directory,
            mine,
            comm=part,
            options=Options(**OPTIONS),
            local=scene.local(),
        ) as manager:
            assert manager.restore().level == "local"
        total = sum(range(comm.size))
        assert mine[0].value == ([total, fewer] if comm.size > 1 else [0, ""])
    part.Free()
    comm.Barrier()


def test_large_tiles_go_in_pieces(scene, comm):
    """Tiles of several blocks and pieces, not contiguous, from two ranks of a host."""
    scene.on_hosts(["h0", "h0", *scene.hosts[2:]][: comm.size])
    rows, columns = 1 << 11, 1100
    assert rows * columns * 8 > 2 * handed_tiles.PIECE_BYTES
    whole = np.arange(comm.size * rows * columns, dtype=np.float64).reshape(-1, columns)

    def made(value):
        array = np.full((rows + 2, columns + 2), -1.0)
        if value is not None:
            array[1:-1, 1:-1] = value
        block = Block(array, shape=whole.shape, offset=(rows * comm.rank, 0), ghosts=1)
        return array, ShardedArrayState("field", {"rho": block})

    mine = whole[rows * comm.rank : rows * (comm.rank + 1)]

    def save():
        _, state = made(mine)
        with CheckpointManager(
            scene.directory, [state], options=Options(**OPTIONS), local=scene.local()
        ) as manager:
            assert manager.save(1, level="local").generation
            raise Crash

    crash_after(save)
    comm.Barrier()
    array, state = made(None)
    with CheckpointManager(
        scene.directory, [state], options=Options(**OPTIONS), local=scene.local()
    ) as manager:
        assert manager.restore().level == "local"
    np.testing.assert_array_equal(array[1:-1, 1:-1], mine)


def test_a_rank_sends_its_own_part_and_no_other(scene, comm):
    """Bytes of one host's parts, whatever the number of ranks; root is like any other."""
    scene.on_hosts(scene.hosts)
    nbytes = 3 << 20
    state = PerRankState("own", np.full(nbytes, comm.rank, np.uint8))
    with CheckpointManager(
        scene.directory,
        [state, RNGState()],
        options=Options(**OPTIONS),
        local=scene.local(),
    ) as manager:
        manager.save(1, level="local")
        state.value[:] += 1
        with RecordingHandle(manager._session.comm) as handle:
            assert manager.save(2, level="local").generation == 2
    sent = sum(n for name, n in handle.messages if name == "Isend")
    came = sum(n for name, n in handle.messages if name == "Irecv")
    others = min(comm.size, 2) - 1
    assert others * nbytes <= sent <= others * nbytes + (1 << 16)
    assert others * nbytes <= came <= others * nbytes + (1 << 16)
    assert max([0, *(n for _, n in handle.messages)]) <= 8 << 20


def test_a_leader_holds_a_few_pieces_and_no_rank_more(scene, comm):
    """Not the parts of its ranks, nor its own, nor those that other hosts send."""
    scene.on_hosts(["h0", "h0", *scene.hosts[2:]][: comm.size])
    nbytes = 6 * handed_tiles.PIECE_BYTES
    state = PerRankState("own", np.full(nbytes, comm.rank, np.uint8))
    with CheckpointManager(
        scene.directory, [state], options=Options(**OPTIONS), local=scene.local()
    ) as manager:
        manager.save(1, level="local")
        tracemalloc.start()
        try:
            assert manager.save(2, level="local").generation == 2
            _, most = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
    # A piece that is passed on, the next one, one of each rank, and one that comes.
    assert most <= 4 * handed_tiles.PIECE_BYTES + (1 << 20)


def test_a_copy_in_memory_has_the_parts_and_the_hosts_have_them_too(scene, comm):
    scene.kind = Values
    scene.on_hosts(scene.hosts)
    values, memory = Values(comm), Memory()

    def train():
        with scene.manager(values, memory=memory) as manager:
            values.go_to(1)
            assert manager.save(1, level="local").wait().generation
            assert memory.step == 1
            raise Crash

    crash_after(train)
    comm.Barrier()
    scene.saved_by[1] = comm.size
    restored, _ = scene.run(1)
    assert (restored.level, restored.step) == ("local", 1)


def test_cut_state_is_in_the_memory_and_on_the_hosts(scene, comm):
    scene.on_hosts(scene.hosts)
    values, memory = CutValues(comm), Memory()

    def train():
        with scene.manager(values, memory=memory) as manager:
            for step in (1, 2):
                values.go_to(step)
                assert manager.save(step, level="local").wait().generation
                assert memory.step == step
            raise Crash

    crash_after(train)
    comm.Barrier()
    values = CutValues(comm)
    with scene.manager(values, memory=memory) as manager:
        restored = manager.restore()
        assert (restored.level, restored.step) == ("memory", 2)
        values.check(2, comm.size)
    scene.saved_by[2] = comm.size
    restored, _ = scene.run(2)
    assert (restored.level, restored.step) == ("local", 2)


def test_a_header_names_the_tiles_of_all_ranks_of_a_host(scene, comm):
    scene.run(1, hosts=["h0"] * comm.size)
    folder = scene.home("h0") / "checkpoint-00000001"
    manifest = read_manifest(folder)
    (file,) = [one for one in manifest.files if one.name.startswith("tiles")]
    with GenerationReader(folder) as reader:
        header = reader.read_header(file)
    tiles = decode_tile_header(header, file, manifest.block_bytes)
    own = {spec.name for state, spec, _ in tiles if state == "own"}
    assert {f"rank-{rank:05d}.json" for rank in range(comm.size)} <= own
    # The table is on every rank, and written once.
    assert len([1 for _, spec, _ in tiles if spec.name == "table"]) == 1
