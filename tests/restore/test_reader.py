# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import errno
import mmap
import os
import resource
import shutil

import numpy as np
import pytest

from mpi_ckpt.errors import (
    CorruptGenerationError,
    ReadError,
    UnsupportedFormatError,
)
from mpi_ckpt.leaves.digest import Digest
from mpi_ckpt.states.arrays import ArrayState
from mpi_ckpt.storage import filesystem
from mpi_ckpt.storage.reading import proving
from mpi_ckpt.storage.reading.reader import GenerationReader, read_manifest
from tests.making import Stream, document_of, publish, sealed_document

MANIFEST = "manifest.json"


@pytest.fixture
def generation(tmp_path):
    return publish(tmp_path / "root")


def verify(path) -> None:
    with GenerationReader(path) as reader:
        proving.verify(reader)


def refused(path) -> None:
    with pytest.raises(CorruptGenerationError) as caught:
        verify(path)
    assert str(path) in str(caught.value)


def test_whole_generation_verifies(generation):
    with GenerationReader(generation) as reader:
        proving.verify(reader)
        sizes = sum(f.stat().st_size for f in generation.iterdir() if f.name != MANIFEST)
        assert reader.bytes_read == sizes


def test_every_flipped_byte_of_every_file_is_found(generation):
    for file in sorted(generation.iterdir()):
        data = file.read_bytes()
        descriptor = os.open(file, os.O_WRONLY)
        try:
            for position, byte in enumerate(data):
                os.pwrite(descriptor, bytes([byte ^ 0x10]), position)
                with pytest.raises(CorruptGenerationError):
                    verify(generation)
                os.pwrite(descriptor, bytes([byte]), position)
        finally:
            os.close(descriptor)
    verify(generation)


def test_every_truncation_of_every_file_is_found(generation):
    for file in sorted(generation.iterdir()):
        data = file.read_bytes()
        for length in range(len(data) - 1, -1, -1):
            os.truncate(file, length)
            with pytest.raises(CorruptGenerationError):
                verify(generation)
        file.write_bytes(data)
    verify(generation)


def test_appended_bytes_are_found(generation):
    for file in sorted(generation.iterdir()):
        data = file.read_bytes()
        file.write_bytes(data + b"\0")
        refused(generation)
        file.write_bytes(data)


def test_missing_file_is_found_before_any_byte_is_read(generation):
    for file in sorted(generation.iterdir()):
        moved = file.rename(generation.parent / "moved")
        with pytest.raises(CorruptGenerationError, match="ENOENT"):
            GenerationReader(generation)
        moved.rename(file)
    shutil.rmtree(generation)
    refused(generation)


def test_further_files_change_nothing(generation):
    # Network file systems leave .nfs* beside a file that is removed while open.
    (generation / ".nfs0000001").write_bytes(b"x")
    (generation / "rank-00001.safetensors").write_bytes(b"x")
    (generation / "notes").mkdir()
    verify(generation)


def test_files_swapped_among_one_generation_are_found(tmp_path):
    states = [Stream("a", b"first"), Stream("b", b"other")]
    generation = publish(tmp_path, states)
    first, other = generation / "a.bin", generation / "b.bin"
    first.rename(tmp_path / "swap")
    other.rename(first)
    (tmp_path / "swap").rename(other)
    refused(generation)


def test_file_of_another_generation_is_found(tmp_path):
    paths = [publish(tmp_path, [ArrayState("a", {"x": np.full(3, n)})]) for n in (1, 2)]
    shutil.copy(paths[0] / "rank-00000.safetensors", paths[1])
    refused(paths[1])
    verify(paths[0])


def test_manifest_of_another_generation_is_found(tmp_path):
    paths = [publish(tmp_path) for _ in range(2)]
    shutil.copy(paths[0] / MANIFEST, paths[1])
    with pytest.raises(CorruptGenerationError, match="manifest of generation 1"):
        GenerationReader(paths[1])


def test_generation_under_another_number_is_found_and_under_any_other_name_is_read(
    tmp_path,
):
    generation = publish(tmp_path)
    copied = shutil.copytree(generation, tmp_path / "my copy")
    verify(copied)
    renumbered = generation.rename(tmp_path / "checkpoint-00000007")
    refused(renumbered)


REPLACEMENTS = {
    "symlink": lambda file, kept: file.symlink_to(kept),
    "fifo": lambda file, _: os.mkfifo(file),
    "directory": lambda file, _: file.mkdir(),
    "device": lambda file, _: file.symlink_to("/dev/zero"),
    "dangling": lambda file, _: file.symlink_to("nowhere"),
    "itself": lambda file, _: file.symlink_to(file),
}


@pytest.mark.parametrize("kind", REPLACEMENTS)
def test_what_is_no_regular_file_is_refused_and_nothing_blocks(generation, kind):
    for file in sorted(generation.iterdir()):
        kept = file.rename(generation.parent / "kept")
        REPLACEMENTS[kind](file, kept)
        refused(generation)
        shutil.rmtree(file) if file.is_dir() and not file.is_symlink() else file.unlink()
        kept.rename(file)
    verify(generation)


def test_generation_that_is_a_file_or_a_fifo_is_refused(tmp_path):
    (tmp_path / "file").write_bytes(b"x")
    os.mkfifo(tmp_path / "fifo")
    for name in ("file", "fifo", "missing"):
        refused(tmp_path / name)


def test_hostile_manifest_with_a_right_digest_reads_nothing_outside(generation):
    secret = generation.parent / "secret"
    secret.write_bytes(bytes(100))
    document = document_of(generation)
    for entry in (*document["files"], *(s.get("stream", {}) for s in document["states"])):
        for key in ("name", "file"):
            if entry.get(key) == "stream.bin":
                entry[key] = "../secret"
    (generation / MANIFEST).write_bytes(sealed_document(document))
    with pytest.raises(CorruptGenerationError, match="not a file name"):
        GenerationReader(generation)


def test_sizes_are_checked_before_memory_is_taken(generation):
    document = document_of(generation)
    shard = next(f for f in document["files"] if f["name"].startswith("rank"))
    shard["bytes"] = shard["header_bytes"] = 1 << 40
    document["states"] = []
    (generation / MANIFEST).write_bytes(sealed_document(document))
    os.truncate(generation / shard["name"], 1 << 40)  # sparse
    refused(generation)


def test_manifest_of_absurd_size_is_refused_unread(generation):
    os.truncate(generation / MANIFEST, (256 << 20) + 1)
    with pytest.raises(CorruptGenerationError, match="no manifest"):
        read_manifest(generation)


def test_newer_version_is_told_as_such(generation):
    document = document_of(generation)
    document["version"] = 4
    (generation / MANIFEST).write_bytes(sealed_document(document))
    with pytest.raises(UnsupportedFormatError, match="version 4") as caught:
        GenerationReader(generation)
    assert caught.value.generation == 1
    assert caught.value.path.endswith(MANIFEST)


class FailingReads:
    """Fails reads, or opening, with an error of the system."""

    def __init__(self, call: str, code: int) -> None:
        self.call, self.code = call, code

    def __getattr__(self, name):
        if name != self.call:
            return getattr(os, name)

        def fail(target, *_):
            raise OSError(self.code, os.strerror(self.code))

        return fail


@pytest.mark.parametrize("code", [errno.EIO, errno.EACCES, errno.ESTALE, errno.EMFILE])
@pytest.mark.parametrize("call", ["open", "preadv"])
def test_trouble_reading_is_not_taken_for_damage(generation, monkeypatch, call, code):
    monkeypatch.setattr(filesystem, "os", FailingReads(call, code))
    with pytest.raises(ReadError) as caught:
        GenerationReader(generation)
    assert caught.value.errno == code


def test_trouble_reading_a_block_is_not_taken_for_damage(generation, monkeypatch):
    with GenerationReader(generation) as reader:
        monkeypatch.setattr(filesystem, "os", FailingReads("preadv", errno.EIO))
        with pytest.raises(ReadError, match="EIO"):
            proving.verify(reader)


def test_file_changed_after_opening_is_found(generation):
    with GenerationReader(generation) as reader:
        proving.verify(reader)
        os.truncate(generation / "stream.bin", 50)
        with pytest.raises(CorruptGenerationError, match=r"stream\.bin"):
            proving.verify(reader)


def test_zeros_that_are_gone_are_missed(tmp_path):
    generation = publish(tmp_path, [Stream("s", bytes(5000))])
    with GenerationReader(generation) as reader:
        os.truncate(generation / "s.bin", 4999)
        with pytest.raises(CorruptGenerationError, match="ends at 4999"):
            proving.verify(reader)


def test_blocks_are_proven_one_by_one(tmp_path):
    generation = publish(tmp_path, [Stream("s", b"0123456789abcdefXYZ")])
    document = document_of(generation)
    digest = Digest.of(b"0123456789abcdefXYZ", 8)
    stream = document["states"][0]["stream"]
    stream["digest"], stream["blocks"] = digest.whole.hex(), b"".join(digest.blocks).hex()
    document["block_bytes"] = 8
    (generation / MANIFEST).write_bytes(sealed_document(document))
    verify(generation)
    (generation / "s.bin").write_bytes(b"0123456789abcdeFXYZ")
    with GenerationReader(generation) as reader:
        (leaf,) = reader.manifest.states[0].leaves
        reader.prove(leaf, 0, memoryview(b"01234567"))
        reader.prove(leaf, 2, memoryview(b"XYZ"))
        for block, data in ((0, b"01234568"), (1, b"89abcdeF"), (2, b"XY"), (2, b"XYZ ")):
            with pytest.raises(CorruptGenerationError, match=f"bytes {8 * block} to "):
                reader.prove(leaf, block, memoryview(data))
        with pytest.raises(CorruptGenerationError, match="bytes 8 to 16"):
            proving.verify(reader)


def aligned(nbytes: int) -> memoryview:
    return memoryview(mmap.mmap(-1, nbytes))


def test_direct_reads_give_the_bytes_of_the_file(generation):
    file = generation / "rank-00000.safetensors"
    with GenerationReader(generation) as reader:
        before, into = reader.bytes_read, aligned(8192)
        count = reader.read_direct(file.name, into, 0)
        assert bytes(into[:count]) == file.read_bytes()
        assert reader.read_direct(file.name, into[:4096], 4096) == count - 4096
        assert reader.bytes_read == before + 2 * count - 4096
        with pytest.raises(CorruptGenerationError, match=f"ends at {count}"):
            reader.expect(file.name, count, count + 1)


class Picky:
    """A file system that refuses direct reads: at the opening, or only at the reading."""

    def __init__(self, call: str) -> None:
        self.call = call
        self.direct: set[int] = set()

    def __getattr__(self, name):
        return getattr(os, name)

    def open(self, path, flags, *mode):
        if flags & os.O_DIRECT and self.call == "open":
            raise OSError(errno.EINVAL, "no direct reads", str(path))
        descriptor = os.open(path, flags & ~os.O_DIRECT, *mode)
        if flags & os.O_DIRECT:
            self.direct.add(descriptor)
        return descriptor

    def preadv(self, descriptor, buffers, offset):
        # As Lustre: alignment is asked for also where the file has ended.
        if descriptor in self.direct and (self.call == "read" or offset % 4096):
            raise OSError(errno.EINVAL, "not aligned")
        return os.preadv(descriptor, buffers, offset)


@pytest.mark.parametrize("call", ["open", "read", "end"])
def test_file_systems_that_take_no_direct_reads_are_read_all_the_same(
    generation, monkeypatch, call
):
    monkeypatch.setattr(filesystem, "os", Picky(call))
    file = generation / "rank-00000.safetensors"
    with GenerationReader(generation) as reader:
        into = aligned(8192)
        count = reader.read_direct(file.name, into, 0)
        assert bytes(into[:count]) == file.read_bytes()


def test_trouble_of_direct_reads_is_told(generation, monkeypatch):
    with GenerationReader(generation) as reader:
        monkeypatch.setattr(filesystem, "os", FailingReads("preadv", errno.EIO))
        with pytest.raises(ReadError, match="EIO"):
            reader.read_direct("stream.bin", aligned(4096), 0)


def test_files_stay_open_and_are_closed_with_the_reader(generation):
    reader = GenerationReader(generation)
    for file in reader.manifest.files:
        (generation / file.name).unlink()
    proving.verify(reader)
    reader.close()  # what is left open, every test here is asked for
    reader.close()


def test_more_files_than_a_process_may_open(tmp_path):
    path = publish(tmp_path, [Stream(f"s{n}", b"%d" % n) for n in range(400)])
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (300, hard))
    try:
        with GenerationReader(path) as reader:
            proving.verify(reader)
            for file in reader.manifest.files:
                assert reader.read_direct(file.name, aligned(4096), 0) == file.nbytes
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
