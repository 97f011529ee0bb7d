# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import errno
import io
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpi_ckpt.errors import CheckpointError, PublishError, SaveError, WriteError
from mpi_ckpt.leaves.digest import Digest
from mpi_ckpt.storage import filesystem
from mpi_ckpt.storage.directory.checkpoint_directory import CheckpointDirectory
from mpi_ckpt.storage.reading.proving import verify
from mpi_ckpt.storage.reading.reader import GenerationReader
from mpi_ckpt.storage.writing.partial import Partial
from tests.making import save, some_states
from tests.recording import RecordingOS


@pytest.fixture
def recorder(monkeypatch) -> RecordingOS:
    recorder = RecordingOS()
    monkeypatch.setattr(filesystem, "os", recorder)
    return recorder


@pytest.fixture
def directory(tmp_path):
    directory = CheckpointDirectory(tmp_path)
    directory.own()
    yield directory
    directory.close()


def names(path) -> list[str]:
    return sorted(name for name in os.listdir(path) if name != ".lock")


def test_shard_is_header_and_runs_in_a_row(tmp_path):
    partial = Partial(tmp_path, 1, "job")
    runs = (memoryview(run) for run in (b"head", b"abc", b"", b"de"))
    partial.write_shard("f.safetensors", runs, 9)
    assert (partial.path / "f.safetensors").read_bytes() == b"headabcde"
    assert partial.bytes_written == 9


def test_stream_is_digested_on_its_way(tmp_path):
    partial = Partial(tmp_path, 1, "job")
    data = os.urandom(3 << 20)

    def write(fileobj) -> None:
        fileobj.write(data[:5])
        assert fileobj.tell() == 5
        fileobj.writelines([data[5:10], memoryview(data)[10:].cast("B")])
        assert fileobj.tell() == len(data)

    assert partial.write_stream("s.bin", write) == (len(data), Digest.of(data))
    assert (partial.path / "s.bin").read_bytes() == data
    assert partial.bytes_written == len(data)


def test_stream_of_nothing_and_one_that_closes_itself(tmp_path):
    partial = Partial(tmp_path, 1, "job")
    assert partial.write_stream("a.bin", lambda _: None) == (0, Digest.of(b""))

    def write(fileobj) -> None:
        fileobj.write(b"x")
        fileobj.close()

    assert partial.write_stream("b.bin", write) == (1, Digest.of(b"x"))


@pytest.mark.parametrize("mode", ["auto", "direct", "buffered"])
def test_stream_is_written_in_any_order(tmp_path, mode):
    partial = Partial(tmp_path, 1, "job", mode=mode)
    data = bytearray(os.urandom(9 << 20))

    def write(fileobj) -> None:
        assert fileobj.writable()
        assert fileobj.readable()
        assert fileobj.seekable()
        fileobj.write(data)
        assert fileobj.seek(-(1 << 20), io.SEEK_END) == 8 << 20
        assert fileobj.read(10) == data[8 << 20 :][:10]
        fileobj.seek(3)
        fileobj.write(b"header")
        fileobj.seek(10 << 20)  # a hole
        fileobj.write(b"tail")
        fileobj.truncate((10 << 20) + 2)
        with pytest.raises(ValueError, match="before the start"):
            fileobj.seek(-1)

    expected = data + bytes(1 << 20) + b"ta"
    expected[3:9] = b"header"
    assert partial.write_stream("a.bin", write) == (len(expected), Digest.of(expected))
    assert (partial.path / "a.bin").read_bytes() == expected


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["write", "read", "seek"]),
            st.integers(0, 3000),
        ),
        max_size=12,
    )
)
def test_stream_is_what_a_file_in_memory_would_be(tmp_path_factory, steps):
    partial = Partial(tmp_path_factory.mktemp("root"), 1, "job")
    model = io.BytesIO()

    def write(fileobj) -> None:
        for what, n in steps:
            argument = bytes([n % 251]) * n if what == "write" else n
            assert getattr(fileobj, what)(argument) == getattr(model, what)(argument)
            assert fileobj.tell() == model.tell()

    nbytes, digest = partial.write_stream("a.bin", write)
    assert (nbytes, digest) == (len(model.getvalue()), Digest.of(model.getvalue()))
    assert (partial.path / "a.bin").read_bytes() == model.getvalue()


def test_carried_file_is_shared(tmp_path):
    partial = Partial(tmp_path, 2, "job")
    source = tmp_path / "old"
    source.write_bytes(b"abc")
    assert partial.carry(source, "new", copy=False)
    assert (partial.path / "new").samefile(source)
    assert partial.bytes_written == 0


@pytest.mark.parametrize("nbytes", [0, 10, 48])
def test_carried_file_is_copied_where_links_fail(tmp_path, recorder, monkeypatch, nbytes):
    monkeypatch.setattr("mpi_ckpt.storage.writing.partial._COPY_BYTES", 16)
    partial = Partial(tmp_path, 2, "job")
    source = tmp_path / "old"
    source.write_bytes(os.urandom(nbytes))
    recorder.fail, recorder.code = "link", errno.EPERM
    assert partial.carry(source, "new", copy=True)
    assert not (partial.path / "new").samefile(source)
    assert (partial.path / "new").read_bytes() == source.read_bytes()
    assert ("fsync", str(partial.path / "new")) in recorder.calls
    assert partial.bytes_written == nbytes


def test_file_that_need_not_be_carried_is_left_where_links_fail(tmp_path, recorder):
    partial = Partial(tmp_path, 2, "job")
    (tmp_path / "old").write_bytes(b"abc")
    recorder.fail = "link"
    assert not partial.carry(tmp_path / "old", "new", copy=False)
    assert names(partial.path) == []


def test_missing_file_cannot_be_carried(tmp_path):
    partial = Partial(tmp_path, 2, "job")
    assert not partial.carry(tmp_path / "missing", "new", copy=False)
    with pytest.raises(WriteError, match="ENOENT"):
        partial.carry(tmp_path / "missing", "new", copy=True)


def test_order_is_the_promise(directory, recorder):
    path = save(directory, some_states()).path
    seen = recorder.names()
    partial = next(name for call, name in seen if call == "mkdir")
    at = {step: index for index, step in enumerate(seen)}  # the last of each
    files = ["rank-00000.safetensors", "stream.bin", "nothing.bin"]
    manifest_opened = at["open", "manifest.json"]
    for name in files:
        assert at["open", name] < at["fsync", name] < manifest_opened
        assert at.get(("pwrite", name), 0) < at["fsync", name]
    manifest_written = at["pwrite", "manifest.json"]
    order = [
        manifest_written,
        at["fsync", "manifest.json"],
        at["fsync", partial],
        at["rename", partial],
        at["fsync", directory.root.name],
    ]
    assert order == sorted(order)
    assert [step for step in seen if step[0] == "rename"] == [("rename", partial)]
    # Nobody is told before the parent is durable, and nothing is changed after.
    assert seen[-2:] == [("fsync", directory.root.name), ("close", directory.root.name)]
    assert path.name == "checkpoint-00000001"
    assert names(path) == sorted([*files, "manifest.json"])


def test_every_file_is_fsynced_once_and_closed(directory, recorder):
    save(directory, some_states())
    assert len(recorder.synced) == len(set(recorder.synced))
    opened = sum(call == "open" for call, _ in recorder.calls)
    assert opened == sum(call == "close" for call, _ in recorder.calls)


CALLS = ["fsync", "mkdir", "open", "pwrite", "rename", "close"]


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC])
@pytest.mark.parametrize("call", CALLS)
def test_any_call_that_fails_publishes_nothing_and_leaves_nothing(
    directory, monkeypatch, call, code
):
    save(directory, some_states())
    before = names(directory.root)
    faults = 0
    for nth in range(1, 100):
        recorder = RecordingOS(call, nth, code)
        with monkeypatch.context() as patch:
            patch.setattr(filesystem, "os", recorder)
            try:
                path = save(directory, some_states(), step=9).path
            except SaveError as error:
                told = error
            else:
                assert not recorder.fired
                break
        assert recorder.fired
        faults += 1
        assert isinstance(told, (WriteError, PublishError))
        assert told.errno == code
        # An fsync that failed says nothing more of those bytes: it is not asked again.
        assert len(recorder.synced) == len(set(recorder.synced))
        left = [name for name in names(directory.root) if name not in before]
        renamed = [name for name, _ in recorder.calls].count("rename")
        # Withdrawn after the rename: its removal must wait until that is durable.
        assert len(left) == (renamed == 2)
        assert all(name.startswith(".partial-") for name in left)
        assert directory.catalog.generations()[-1].generation == 1
    assert faults >= {"mkdir": 1, "rename": 1}.get(call, 4)
    with GenerationReader(path) as reader:
        verify(reader)
        assert reader.manifest.step == 9
    assert names(directory.root) == sorted([*before, path.name])


def test_failed_withdrawal_is_told_as_a_failure_too(directory, recorder):
    # The parent's fsync fails, and then the rename back: the worst that can happen.
    class Worst(RecordingOS):
        def __getattr__(self, name):
            call = super().__getattr__(name)

            def worst(target, *given, **named):
                renamed = any(done == "rename" for done, _ in self.calls)
                if name in ("fsync", "rename") and renamed:
                    codes = {"fsync": errno.EIO, "rename": errno.EROFS}
                    raise OSError(codes[name], f"no {name}")
                return call(target, *given, **named)

            return worst if name in ("fsync", "rename") else call

    filesystem.os = Worst()  # put back by the fixture
    with pytest.raises(PublishError, match=r"EIO .* taken back: EROFS") as caught:
        save(directory, some_states())
    # The first is the cause; the second follows from it, as on a disk that has failed.
    assert caught.value.errno == errno.EIO


def test_interrupt_while_writing_leaves_nothing(directory):
    class Interrupts(type(some_states()[2])):
        def save(self, fileobj) -> None:
            fileobj.write(b"some")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        save(directory, [Interrupts("s")])
    assert names(directory.root) == []


def test_partial_is_never_made_over_another(tmp_path):
    Partial(tmp_path, 1, "job")
    with pytest.raises(WriteError, match="EEXIST"):
        Partial(tmp_path, 1, "job")


def test_generation_is_never_published_over_another(tmp_path):
    partial = Partial(tmp_path, 1, "job")
    (tmp_path / "checkpoint-00000001").mkdir()
    with pytest.raises(PublishError, match="EEXIST"):
        partial.publish(b"{}")
    assert names(tmp_path / "checkpoint-00000001") == []
    partial.drop()
    partial.drop()
    assert names(tmp_path) == ["checkpoint-00000001"]


def test_drop_that_fails_is_silent(tmp_path, recorder):
    partial = Partial(tmp_path, 1, "job")
    recorder.fail = "rmdir"
    partial.drop()
    assert recorder.fired
    assert isinstance(WriteError("x"), CheckpointError)
