# SPDX-License-Identifier: Apache-2.0
"""Save and restore of every state: the bytes of root, on every rank, read once."""

import builtins
import os
import random

import numpy as np
import pytest

from mpi_ckpt import (
    Accumulator,
    ArrayState,
    ElasticSampler,
    EpochState,
    ModuleState,
    ObjectState,
    OptimizerState,
    RNGState,
    SchedulerState,
    State,
    TrainState,
    remaining_epochs_until,
)
from mpi_ckpt.options import IO
from mpi_ckpt.storage import filesystem
from mpi_ckpt.storage.reading.reader import read_manifest
from tests.making import use_blocks_of
from tests.ranks import assert_same, manager, plain
from tests.sync.parallel.test_sync import contents, make_model, train

torch = pytest.importorskip("torch")


class Stream(State):
    """A plain state: text that it writes itself."""

    def __init__(self, name, text):
        super().__init__(name)
        self.text = text

    def save(self, fileobj):
        for character in self.text:
            fileobj.write(character.encode())

    def load(self, fileobj):
        self.text = fileobj.read().decode()


def everything(seed):
    """Make one of each state, with contents that depend on a seed."""
    model = make_model(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1 * (seed + 1))
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 3)
    for _ in range(seed + 1):
        train(model, optimizer)
        scheduler.step()
    other = make_model(seed + 1)
    momentum = torch.optim.SGD(other.parameters(), lr=0.5, momentum=0.9)
    train(other, momentum)
    epochs = EpochState()
    epochs.finished = seed
    sampler = ElasticSampler(1000, 40, seed=7)
    sampler.set_epoch(seed)
    sampler.consumed = 40 * seed
    stream = np.random.default_rng(seed)
    arrays = {
        "f8": stream.standard_normal((3, 4)),
        "big end": stream.integers(0, 99, 5).astype(">i4"),
        "fortran": np.asfortranarray(stream.standard_normal((4, 5))),
        "bool": stream.random(9) > 0.5,
        "empty": np.zeros((0, 7)),
        "date": np.array(["2020-01-01", f"202{seed}-02-03"], "M8[D]"),
        "text": np.array([f"seed {seed}", "a"], "U8"),
        "0-d": np.array(seed),
    }
    value = {
        "name": f"run {seed}",
        "seen": {1, seed},
        "t": (1, 2.5, None, np.float64(seed)),
    }
    return [
        ModuleState("model", model),
        OptimizerState("optimizer", optimizer),
        SchedulerState("scheduler", scheduler),
        TrainState(module=other, optimizer=momentum),
        ArrayState("arrays", arrays),
        ObjectState("object", value),
        ObjectState("pickle", complex(seed, 2), pickle=True),
        Accumulator({"loss": 10 * seed, "counts": np.arange(3) + seed}, epochs=epochs),
        sampler,
        epochs,
        Stream("plain stream/ä", f"the seed is {seed}" * 1000),
        Stream("nothing", ""),
    ]


def described(states):
    """Return all that states hold, in a form that can be compared."""
    return [
        state.text if isinstance(state, Stream) else contents(state) for state in states
    ]


def test_every_state_comes_back(comm, shared_path):
    saved = everything(seed=2)
    expected = described(saved)
    with manager(shared_path, *saved) as checkpoints:
        report = checkpoints.save(step=17, metrics={"loss": 0.25})
    assert report.sync.bytes_sent == 0
    assert_same(comm, plain(report))
    fresh = everything(seed=comm.rank if comm.rank != 2 else 9)
    pointers = [p.data_ptr() for p in fresh[0]._module.parameters()]
    with manager(shared_path, *fresh) as checkpoints:
        report = checkpoints.restore()
        assert checkpoints.steps == 17
    assert described(fresh) == expected
    assert [p.data_ptr() for p in fresh[0]._module.parameters()] == pointers
    assert_same(comm, plain(report))
    assert (report.generation, report.step) == (1, 17)
    assert (report.saved_size, report.size) == (comm.size, comm.size)
    assert report.metrics == {"loss": 0.25}
    assert report.path == shared_path / "checkpoint-00000001"
    assert report.missing == report.unexpected == ()
    assert report.quarantined == {}


def test_training_goes_on_as_if_nothing_had_happened(comm, shared_path):
    def make(seed):
        model = make_model(seed)
        optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, gamma=0.5)
        return model, optimizer, scheduler

    def go_on(model, optimizer, scheduler):
        for _ in range(3):
            train(model, optimizer)
            scheduler.step()

    training = make(0)
    go_on(*training)
    with manager(
        shared_path,
        TrainState(module=training[0], optimizer=training[1], scheduler=training[2]),
    ) as m:
        m.save()
    go_on(*training)
    other = make(comm.rank + 1)
    state = TrainState(module=other[0], optimizer=other[1], scheduler=other[2])
    with manager(shared_path, state) as m:
        m.restore()
    go_on(*other)
    for ours, theirs in zip(training[0].parameters(), other[0].parameters(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.fixture
def only_root_touches_files(comm, shared_path, monkeypatch):
    """Makes every file function fail on the other ranks."""
    if comm.rank == 0:
        return

    def forbid(module, name):
        function = getattr(module, name)

        def refuse(path, *arguments, **options):
            if module is filesystem or str(path).startswith(str(shared_path)):
                raise AssertionError(f"{name}({path}) on rank {comm.rank}")
            return function(path, *arguments, **options)

        monkeypatch.setattr(module, name, refuse)

    for name in filesystem.__all__:
        forbid(filesystem, name)
    for name in (
        "open",
        "stat",
        "lstat",
        "listdir",
        "mkdir",
        "unlink",
        "rename",
        "scandir",
    ):
        forbid(os, name)
    forbid(builtins, "open")


@pytest.mark.usefixtures("only_root_touches_files")
def test_other_ranks_never_touch_a_file(comm, shared_path):
    states = everything(seed=1)
    root = shared_path / "deep" / "directory"
    with manager(root, *states) as checkpoints:
        checkpoints.restore()
        checkpoints.save()
        checkpoints.save(only=["model"])
        checkpoints.restore()
        checkpoints.restore(only=["arrays"])
        assert len(checkpoints.generations()) == 2
    with manager(root, *everything(seed=0)) as checkpoints:
        checkpoints.restore()


def test_root_reads_each_byte_once(comm, shared_path, monkeypatch):
    states = everything(seed=1)
    with manager(shared_path, *states) as checkpoints:
        checkpoints.save()
    reads = []
    read_at = filesystem.read_at

    def recorded(descriptor, into, offset):
        name = os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}"))
        reads.append((name, offset, len(into)))
        return read_at(descriptor, into, offset)

    monkeypatch.setattr(filesystem, "read_at", recorded)
    with manager(shared_path, *states) as checkpoints:
        report = checkpoints.restore()
    if comm.rank > 0:
        assert reads == []
        return
    directory = shared_path / "checkpoint-00000001"
    sizes = {path.name: path.stat().st_size for path in directory.iterdir()}
    for name, size in sizes.items():
        end = 0
        for _, offset, length in sorted(r for r in reads if r[0] == name and r[2]):
            assert offset >= end, f"{name} is read twice at {offset}"
            end = offset + length
        assert end < size + 4096, "direct reads end on a block of the disk"
    data = sum(size for name, size in sizes.items() if name != "manifest.json")
    assert report.bytes_read == data


@pytest.mark.parametrize("window_bytes", [1, 100, 1 << 20])
def test_windows_of_any_size(comm, shared_path, window_bytes, monkeypatch):
    # Blocks of a manifest of our own making: a leaf of many blocks need not be large.
    use_blocks_of(64, monkeypatch)
    lengths = [0, 1, 63, 64, 65, 127, 128, 129, 1000]
    arrays = {str(n): np.frombuffer(random.Random(n).randbytes(n), "u1") for n in lengths}
    strided = np.arange(60.0).reshape(6, 10)[:, ::2]
    streams = [Stream(f"stream {n}", "x" * n) for n in (0, 64, 65, 500)]
    states = [ArrayState("a", {k: v.copy() for k, v in arrays.items()}), *streams]
    states.append(ArrayState("strided", {"s": strided.copy(order="F")}))
    with manager(shared_path, *states) as checkpoints:
        path = checkpoints.save().path
    if comm.rank == 0:
        assert read_manifest(path).block_bytes == 64
    for array in (*states[0].arrays.values(), *states[-1].arrays.values()):
        array[...] = 0
    for stream in streams:
        stream.text = ""
    with manager(
        shared_path, *states, io=IO(window_bytes=window_bytes, message_bytes=64)
    ) as checkpoints:
        checkpoints.restore()
    for name, array in arrays.items():
        assert np.array_equal(states[0].arrays[name], array)
    assert np.array_equal(states[-1].arrays["s"], strided)
    assert [len(stream.text) for stream in streams] == [0, 64, 65, 500]


def test_leaves_of_several_blocks(comm, shared_path):
    size = 40 << 20
    whole = np.arange(size // 4, dtype="i4")
    arrays = {"large": whole.copy(), "small": np.arange(10)}
    with manager(shared_path, ArrayState("a", arrays)) as checkpoints:
        checkpoints.save()
        arrays["large"][:] = 0
        report = checkpoints.restore()
    assert np.array_equal(arrays["large"], whole)
    # The manifest, and the header and the end of the file in blocks of the disk.
    assert report.bytes_read < size + 20_000


def draw(generators):
    """Take a few numbers from every stream."""
    return [
        random.random(),
        *np.random.rand(3).tolist(),
        np.random.standard_normal(),
        *torch.rand(3).tolist(),
        *generators["numpy"].random(3).tolist(),
        *torch.rand(3, generator=generators["torch"]).tolist(),
        generators["python"].random(),
    ]


def make_generators(seed):
    return {
        "numpy": np.random.default_rng(seed),
        "torch": torch.Generator().manual_seed(seed),
        "python": random.Random(seed),
    }


def test_every_rank_gets_its_own_random_streams_back(comm, shared_path):
    seed = 100 + comm.rank
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    generators = make_generators(seed)
    draw(generators)
    with manager(shared_path, RNGState(generators=generators)) as checkpoints:
        report = checkpoints.save()
        expected = [draw(generators) for _ in range(4)]
    assert report.sync.differing == {}
    generators = make_generators(0)
    with manager(shared_path, RNGState(generators=generators)) as checkpoints:
        checkpoints.restore()
        assert [draw(generators) for _ in range(4)] == expected
        checkpoints.restore()
        assert [draw(generators) for _ in range(4)] == expected
    firsts = [drawn[0][0] for drawn in comm.allgather(expected)]
    assert len(set(firsts)) == comm.size


def test_a_later_save_has_the_streams_of_then(comm, shared_path):
    np.random.seed(comm.rank)
    with manager(shared_path, RNGState()) as checkpoints:
        checkpoints.save()
        np.random.rand(5)
        for sync in (True, False):
            checkpoints.save(sync=sync)
            expected = np.random.rand(3).tolist()
            checkpoints.restore()
            assert np.random.rand(3).tolist() == expected


def test_an_accumulator_saves_what_is_pending_on_any_rank(comm, shared_path):
    sums = Accumulator(name="sums")
    with manager(shared_path, sums) as checkpoints:
        sums["n"] += comm.rank + 1
        sums["list"] += np.array([1.0, comm.rank])
        checkpoints.save()
        checkpoints.save()
        with sums.synchronized():
            found = dict(sums)
    total = comm.size * (comm.size + 1) // 2
    assert found["n"] == total
    assert found["list"].tolist() == [comm.size, total - comm.size]
    fresh = Accumulator(name="sums")
    with manager(shared_path, fresh) as checkpoints:
        fresh["n"] += 1000  # an update of a run that starts over is not counted
        checkpoints.restore()
        fresh["n"] += 1
        with fresh.synchronized(replayed=False):
            assert fresh["n"] == total + comm.size
            assert_same(comm, fresh["n"])


def test_the_sampler_goes_on_where_it_was(comm, shared_path):
    sampler = ElasticSampler(50, 12, seed=3)
    seen = []
    with manager(shared_path, sampler) as checkpoints:
        sampler.set_epoch(4)
        batches = iter(sampler)
        for _ in range(2):
            seen += next(batches)
            sampler.record_batch()
        checkpoints.save()
    fresh = ElasticSampler(50, 12, seed=3)
    with manager(shared_path, fresh) as checkpoints:
        checkpoints.restore()
        fresh.set_epoch(4)
        rest = [index for batch in fresh for index in batch]
        assert_same(comm, len(list(fresh)))
    everyone = comm.allgather(seen + rest)
    assert sorted(index for mine in everyone for index in mine) == list(range(50))


def test_epochs_go_on_where_they_were(comm, shared_path):
    epochs = EpochState()
    with manager(shared_path, epochs) as checkpoints:
        for epoch in remaining_epochs_until(5, epochs):
            if epoch == 2:
                checkpoints.save()
                break
    fresh = EpochState()
    with manager(shared_path, fresh) as checkpoints:
        checkpoints.restore()
        assert list(remaining_epochs_until(5, fresh)) == [2, 3, 4]
    assert_same(comm, fresh.finished)


def test_what_root_saved_is_what_all_get_without_a_sync(comm, shared_path):
    arrays = {"x": np.full(3, comm.rank)}
    with manager(shared_path, ArrayState("a", arrays)) as checkpoints:
        report = checkpoints.save(sync=False)
        assert report.sync.bytes_hashed == 0
        assert arrays["x"].tolist() == [comm.rank] * 3
        checkpoints.restore()
    assert arrays["x"].tolist() == [0, 0, 0]


def test_ranks_of_a_part_of_the_job_have_a_root_of_their_own(comm, shared_path):
    part = comm.Split(color=comm.rank % 2)
    arrays = {"x": np.full(3, comm.rank)}
    root = shared_path / str(comm.rank % 2)
    with manager(root, ArrayState("a", arrays, sync="root"), comm=part) as checkpoints:
        assert checkpoints.is_root == (part.rank == 0)
        assert checkpoints.save().size == part.size
        arrays["x"][:] = -1
        checkpoints.restore()
    assert arrays["x"].tolist() == [comm.rank % 2] * 3
    part.Free()


def test_a_job_of_one_on_each_rank(comm, shared_path):
    from mpi4py import MPI

    arrays = {"x": np.full(3, comm.rank)}
    with manager(
        shared_path / str(comm.rank), ArrayState("a", arrays), comm=MPI.COMM_SELF
    ) as m:
        if comm.rank % 2 == 0:  # nobody waits for the others
            m.save()
            arrays["x"][:] = -1
            m.restore()
    assert arrays["x"].tolist() == [comm.rank] * 3
