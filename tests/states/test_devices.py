# SPDX-License-Identifier: Apache-2.0
"""The order of copies from and to a device, against a stand-in that works late."""

from __future__ import annotations

import gc
import itertools
import threading
import tracemalloc
from contextlib import closing
from unittest import mock

import numpy as np
import pytest
import torch

from mpi_ckpt import devices
from mpi_ckpt.devices import Lane, following, land
from mpi_ckpt.engine.save.cut.own_tiles import runs_of
from mpi_ckpt.engine.save.staging import land_leaves
from mpi_ckpt.engine.sync.captured import digest_leaves
from mpi_ckpt.leaves.digest import Digest
from mpi_ckpt.leaves.leaf import LeafSpec
from mpi_ckpt.leaves.target import Target
from mpi_ckpt.memory import Arena
from mpi_ckpt.states.buffers import device_bytes
from mpi_ckpt.states.buffers.device_bytes import DeviceBuffer
from mpi_ckpt.states.buffers.fingerprint import finish, row_sums
from mpi_ckpt.states.buffers.tensor_bytes import flat_bytes
from mpi_ckpt.states.tensors import tensor_leaf
from tests.stand_in import StandIn, install

CHUNK = 4096


@pytest.fixture(params=["late", "hasty"])
def device(request, monkeypatch):
    device = StandIn(hasty=request.param == "hasty")
    yield install(device, monkeypatch, chunk_bytes=CHUNK)
    assert device.faults == []


def numbers(count):
    return torch.arange(count, dtype=torch.float32)


def lane_of(device):
    return Lane.of(device, torch.device("cpu"))


def elsewhere(work):
    """Do work on another thread, whose current stream is another."""
    found = []
    thread = threading.Thread(target=lambda: found.append(work()))
    thread.start()
    thread.join()
    return found[0]


def trained_late(device, count=5000):
    """Return a leaf whose last step the device has not done, and what it will hold."""
    weights = device.tensor(numbers(count))
    with device.on(device.stream()):
        device.work(lambda: weights.mul_(3))
        leaf = tensor_leaf("weights", weights)
    return leaf, (numbers(count) * 3).numpy().tobytes()


def copied(leaf):
    target = memoryview(bytearray(leaf.spec.nbytes))
    leaf.buffer.copy_to(target)
    return bytes(target)


READS = {
    "read": lambda leaf: bytes(leaf.buffer.read()),
    "read_all": lambda leaf: bytes(leaf.buffer.read_all([leaf.buffer])[0]),
    "copy_to": copied,
    "pieces": lambda leaf: b"".join(map(bytes, leaf.buffer.pieces())),
}


@pytest.mark.parametrize("read", READS.values(), ids=READS)
def test_the_bytes_are_those_after_the_work_given_before(device, read):
    leaf, expected = trained_late(device)
    assert elsewhere(lambda: read(leaf)) == expected


def test_work_given_later_is_not_waited_for(device):
    leaf, expected = trained_late(device)
    with device.on(device.stream()):
        device.work(lambda: pytest.fail("done, though nobody waits for it"))
    assert elsewhere(lambda: copied(leaf)) == expected


def no_wait(device, monkeypatch):
    monkeypatch.setattr(device, "wait", lambda stream, event: None)


def event_of_the_wrong_stream(device, monkeypatch):
    monkeypatch.setattr(device, "current", lambda _: device.stream())


def no_end_of_a_copy(device, monkeypatch):
    monkeypatch.setattr(devices, "_landed", lambda flying: iter(flying.popleft()[0]))


def one_half(device, monkeypatch):
    monkeypatch.setattr(device_bytes, "cycle", lambda both: itertools.cycle(both[:1]))


def halves_filled_early(device, monkeypatch):
    real = devices._chunks

    def all_at_once(copies):
        yield [copy for group in real(copies) for copy in group]

    monkeypatch.setattr(devices, "_chunks", all_at_once)


def nothing_kept(device, monkeypatch):
    real = device_bytes.DeviceBuffer._copy

    def drop(buffer, source, data):
        copy = real(buffer, source, data)
        copy.begin()
        return copy._replace(begin=lambda: None)

    monkeypatch.setattr(device_bytes.DeviceBuffer, "_copy", drop)


@pytest.mark.parametrize(
    ("hasty", "read", "plant"),
    [
        (False, "copy_to", no_wait),
        (True, "copy_to", no_wait),
        (False, "copy_to", event_of_the_wrong_stream),
        (True, "pieces", event_of_the_wrong_stream),
        (False, "copy_to", no_end_of_a_copy),
        (False, "pieces", no_end_of_a_copy),
        (True, "pieces", one_half),
        (True, "pieces", halves_filled_early),
        (False, "pieces", nothing_kept),
    ],
)
def test_the_stand_in_shows_a_wrong_order(monkeypatch, hasty, read, plant):
    device = install(StandIn(hasty=hasty), monkeypatch, chunk_bytes=CHUNK)
    plant(device, monkeypatch)
    leaf, expected = trained_late(device)
    assert READS[read](leaf) != expected or device.faults


@pytest.mark.parametrize("count", [0, 1, 1023, 1024, 1025, 2048, 5000])
def test_every_length_passes_in_both_ways(device, count):
    leaf = tensor_leaf("x", device.tensor(numbers(count)))
    for read in READS.values():
        assert read(leaf) == numbers(count).numpy().tobytes()
    other = device.tensor(torch.zeros(count))
    tensor_leaf("x", other).buffer.write(memoryview(numbers(count).numpy()).cast("B"))
    assert torch.equal(other, numbers(count))


@pytest.mark.parametrize("shape", [(), (3, 4, 5)])
@pytest.mark.parametrize("dtype", [torch.bool, torch.bfloat16, torch.complex64])
def test_shapes_and_dtypes_pass(device, shape, dtype):
    value = torch.ones(shape, dtype=dtype)
    leaf = tensor_leaf("x", device.tensor(value))
    expected = value.reshape(-1).view(torch.uint8).numpy().tobytes()
    assert copied(leaf) == expected
    cleared = device.tensor(torch.zeros(shape, dtype=dtype))
    tensor_leaf("x", cleared).buffer.write(memoryview(expected))
    assert torch.equal(cleared, value)


def test_strided_tensors_pass(device):
    base = device.tensor(numbers(600))
    turned = base.view(20, 30).t()[::2]
    device.work(lambda: base.add_(1))
    leaf = tensor_leaf("x", turned)
    expected = (numbers(600) + 1).view(20, 30).t()[::2].contiguous().numpy().tobytes()
    for read in READS.values():
        assert read(leaf) == expected
    leaf.buffer.write(memoryview(bytes(len(expected))))
    assert not turned.any()


def test_parts_of_a_tile_come_from_the_device(device):
    leaf, _ = trained_late(device)
    part = leaf.buffer.part((slice(10, 20),))
    assert isinstance(part, DeviceBuffer)
    assert bytes(part.read()) == (numbers(5000) * 3)[10:20].numpy().tobytes()
    assert part.host_bytes() is None
    assert part.view() is None


@pytest.mark.parametrize("rows", [1, 3, 40])
@pytest.mark.parametrize("turned", [False, True])
def test_tiles_with_ghost_cells_pass_in_chunks_in_both_ways(device, rows, turned):
    """Never more than two chunks in host memory; rows longer than a chunk are cut, too."""
    like = numbers(rows * 6000).view(rows, 60, 100)
    base = device.tensor(like)
    inner = (slice(None), slice(1, -1), slice(2, -2))
    tile, expected = base[inner], like[inner] * 2
    if turned:
        tile, expected = tile.transpose(0, 2), expected.transpose(0, 2)
    with device.on(device.stream()):
        device.work(lambda: base.mul_(2))
        leaf = tensor_leaf("x", tile)
    expected = expected.contiguous().numpy().tobytes()
    sizes = [len(piece) for piece in leaf.buffer.pieces()]
    assert sum(sizes) == len(expected)
    assert max(sizes) <= CHUNK
    for read in READS.values():
        assert read(leaf) == expected
    assert b"".join(map(bytes, runs_of(leaf))) == expected
    around = like * 2
    around[inner] = 0
    leaf.buffer.write(memoryview(bytes(len(expected))))
    assert torch.equal(base, around)  # ghost cells keep theirs
    leaf.buffer.write(memoryview(expected))
    assert torch.equal(base, like * 2)


def fingerprints(leaves):
    return DeviceBuffer.fingerprint_all([leaf.buffer for leaf in leaves])


def test_fingerprints_are_those_after_the_work_given_before(device):
    leaf, expected = trained_late(device)
    with device.on(device.stream()):
        device.work(lambda: pytest.fail("done, though nobody waits for it"))
    again = tensor_leaf("x", torch.frombuffer(bytearray(expected), dtype=torch.float32))
    wanted = finish(row_sums([flat_bytes(again.buffer._tensor)]).numpy(), len(expected))
    assert elsewhere(lambda: fingerprints([leaf])) == [wanted]
    assert device.copied == {"to host": 0, "to device": 0}


def test_fingerprints_do_not_depend_on_layout_or_neighbours(device):
    values = [numbers(5), numbers(0), numbers(40_000), numbers(600).view(20, 30)]
    leaves = [tensor_leaf(str(n), device.tensor(one)) for n, one in enumerate(values)]
    turned = tensor_leaf("turned", device.tensor(numbers(600).view(20, 30).t()).t())
    together = fingerprints([*leaves, turned])
    assert device.calculated == 1
    assert together == [fingerprints([leaf])[0] for leaf in [*leaves, turned]]
    assert together[3] == together[4]  # the same elements, turned twice
    assert len(set(together)) == 4
    conj = torch.complex(numbers(30), numbers(30))
    lazy = tensor_leaf("lazy", device.tensor(conj).conj())
    plain = tensor_leaf("plain", device.tensor(conj.conj().resolve_conj()))
    assert fingerprints([lazy]) == fingerprints([plain])


def test_no_fingerprint_where_no_memory_is_left(device):
    device.has_memory = False
    assert fingerprints([trained_late(device)[0]]) is None


def test_one_event_for_all_leaves_of_a_capture(device):
    tensors = [device.tensor(numbers(10)) for _ in range(50)]
    with following():
        leaves = [tensor_leaf(str(n), tensor) for n, tensor in enumerate(tensors)]
        # Work that the capture itself gives the device.
        device.work(lambda: [tensor.neg_() for tensor in tensors])
    assert device.events == 1
    assert {copied(leaf) for leaf in leaves} == {(-numbers(10)).numpy().tobytes()}


def test_an_early_end_waits_for_what_flies(device):
    leaf, _ = trained_late(device)
    target = memoryview(bytearray(leaf.spec.nbytes))
    with closing(land(leaf.buffer.copies(target))) as landed:
        next(landed)
    del leaf, landed
    gc.collect()
    device.synchronize()  # what was still to be copied had its memory


def test_digests_are_those_of_the_bytes(device):
    leaves = [tensor_leaf(str(n), device.tensor(numbers(n))) for n in (0, 3, 9000, 5, 2048)]
    sizes = np.array([leaf.spec.nbytes for leaf in leaves])
    expected = [Digest.of(numbers(n).numpy().tobytes()) for n in (0, 3, 9000, 5, 2048)]
    assert list(digest_leaves(leaves, sizes, threads=2)) == expected
    places = [memoryview(bytearray(leaf.spec.nbytes)) for leaf in leaves]
    assert land_leaves(leaves, places, digested=True) == expected
    assert list(map(bytes, places)) == [bytes(leaf.buffer.read()) for leaf in leaves]
    assert land_leaves(leaves, places, digested=False) == []


def test_an_arena_is_pinned_once_and_let_go_before_it_is_unmapped(device):
    arena = Arena()
    memory = arena.take(100_000)
    for _ in range(3):
        arena.pin(lane_of(device))
    assert device.pin_calls == 1
    assert set(device.pinned.values()) == {len(memory)}
    memory.release()
    arena.take(500_000)  # grows: another mapping
    assert device.pinned == {}
    arena.pin(lane_of(device))
    assert device.pin_calls == 2
    del arena
    gc.collect()
    assert device.pinned == {}


def test_memory_that_cannot_be_pinned_serves_as_well(monkeypatch):
    device = install(StandIn(pins=False), monkeypatch, chunk_bytes=CHUNK)
    arena = Arena()
    arena.take(100)
    arena.pin(lane_of(device))
    arena.pin(lane_of(device))
    assert device.pin_calls == 1
    arena.close()
    leaf, expected = trained_late(device)
    assert READS["pieces"](leaf) == expected
    assert device.faults == []


def test_halves_are_lent_to_one_reader_at_a_time(device):
    leaf, expected = trained_late(device)
    first, second = leaf.buffer.pieces(), leaf.buffer.pieces()
    pairs = [(bytes(one), bytes(other)) for one, other in zip(first, second, strict=True)]
    assert b"".join(one for one, _ in pairs) == expected
    assert b"".join(other for _, other in pairs) == expected
    calls = device.pin_calls
    assert READS["pieces"](leaf) == expected
    assert device.pin_calls == calls  # those of before


def test_a_target_on_a_device_needs_no_copy_of_the_leaf(device):
    count = 1 << 20
    weights = device.tensor(torch.zeros(count))
    # Work of the program before the restore, which must not come after it.
    device.work(lambda: weights.fill_(7))
    spec = LeafSpec("x", "F32", (count,))
    target = Target(spec, tensor_leaf("x", weights))
    data = numbers(count).numpy().tobytes()
    tracemalloc.start()
    for start in range(0, len(data), 1000):
        target.put(start, memoryview(data)[start : start + 1000])
    target.finish()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < len(data) // 4
    assert torch.equal(weights, numbers(count))


def test_a_half_on_the_way_to_a_device_is_not_filled_again(monkeypatch):
    """The stand-in would show it: copies to it are made when somebody waits."""
    device = install(StandIn(), monkeypatch, chunk_bytes=CHUNK)
    finish = device.finish
    monkeypatch.setattr(device, "finish", lambda event: None)
    weights = device.tensor(torch.zeros(5000))
    tensor_leaf("x", weights).buffer.write(memoryview(numbers(5000).numpy()).cast("B"))
    monkeypatch.setattr(device, "finish", finish)
    device.synchronize()
    assert not torch.equal(weights, numbers(5000))


def test_lanes_are_the_same_for_all_threads(device):
    weights = device.tensor(numbers(3))
    lane = Lane.of(device, weights.device)
    assert elsewhere(lambda: Lane.of(device, weights.device)) is lane


def test_cuda_is_asked_by_the_names_that_torch_has(monkeypatch):
    """Without a device: what is called, in which order, with signatures of torch."""
    cuda = mock.create_autospec(torch.cuda)
    cudart = mock.Mock(spec=["cudaHostRegister", "cudaHostUnregister"])
    cuda.cudart.return_value = cudart
    torch_here = mock.Mock(cuda=cuda)
    monkeypatch.setattr(devices, "_torch", lambda: torch_here)
    link = devices.CudaLink()
    entered = []
    for guard in (cuda.device, cuda.stream):
        guard.return_value = mock.MagicMock()
    cuda.device.side_effect = lambda one: entered.append(one) or mock.MagicMock()
    stream = mock.Mock(device="cuda:1")

    assert link.current("cuda:1") is cuda.current_stream.return_value
    cuda.current_stream.assert_called_once_with("cuda:1")
    assert link.make_stream("cuda:1") is cuda.Stream.return_value
    event = link.record(stream)
    stream.record_event.assert_called_once_with(cuda.Event.return_value)
    cuda.Event.assert_called_once_with(blocking=True)
    link.wait(stream, event)
    stream.wait_event.assert_called_once_with(stream.record_event.return_value)
    assert entered == []  # these choose the device of the stream by themselves
    link.finish(event)
    stream.record_event.return_value.synchronize.assert_called_once_with()
    assert entered == ["cuda:1"]

    made = mock.Mock()
    assert link.calculate(made, stream) is made.return_value.cpu.return_value
    cuda.stream.assert_called_once_with(stream)
    cuda.stream.reset_mock()
    assert entered.pop() == "cuda:1"

    target, source = mock.Mock(), numbers(4)
    link.copy(target, source, stream)
    cuda.stream.assert_called_once_with(stream)
    (given,), options = target.copy_.call_args
    assert torch.equal(given, source)
    assert options == {"non_blocking": True}
    assert entered == ["cuda:1"] * 2

    cudart.cudaHostRegister.return_value = 0
    assert link.pin("cuda:1", 4096, 8192)
    cudart.cudaHostRegister.assert_called_once_with(4096, 8192, 0)
    assert not torch_here.zeros.called
    cudart.cudaHostRegister.return_value = 2
    torch_here.zeros.side_effect = RuntimeError("out of memory")  # what CUDA had kept
    assert not link.pin("cuda:1", 4096, 8192)
    torch_here.zeros.assert_called_once_with(1, device="cuda:1")
    link.unpin("cuda:1", 4096)
    cudart.cudaHostUnregister.assert_called_once_with(4096)
    assert entered == ["cuda:1"] * 5


@pytest.mark.parametrize(
    ("segments", "expected"),
    [
        ([], False),
        ([{"segment_pool_id": (0, 0)}, {}], False),
        ([{"segment_pool_id": (0, 0)}, {"segment_pool_id": (0, 1)}], True),
    ],
)
def test_a_pool_of_its_own_tells_of_a_graph(monkeypatch, segments, expected):
    cuda = mock.create_autospec(torch.cuda)
    monkeypatch.setattr(devices, "_torch", lambda: mock.Mock(cuda=cuda))
    cuda.memory_snapshot.return_value = segments
    cuda.is_initialized.return_value = True
    cuda.is_current_stream_capturing.return_value = True
    assert devices.keeps_graphs() is expected
    assert devices.is_capturing()
    cuda.is_initialized.return_value = False  # no device was used: none is asked
    assert not devices.keeps_graphs()
    assert not devices.is_capturing()
