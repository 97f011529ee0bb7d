# SPDX-License-Identifier: Apache-2.0
"""Files of tiles that are damaged, missing or out of sight: one verdict on all ranks."""

import errno
import json
import os
import shutil

import pytest

from mpi_ckpt.errors import CorruptGenerationError, ReadError
from mpi_ckpt.options import IO
from mpi_ckpt.storage import filesystem
from tests.cut import cuts
from tests.cut.mixture import Mixture
from tests.ranks import assert_same, manager, on_first, plain, same_error
from tests.restore.parallel.test_fallback import flip

GOOD, BAD = "checkpoint-00000001", "checkpoint-00000002"


def tile_file(path, rank):
    return path / f"tiles-{rank:05d}.safetensors"


def data_of(path, leaf):
    """Return where the bytes of each tile of a leaf begin in a file."""
    with open(path, "rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        start = file.tell()
    return [
        start + entry["data_offsets"][0]
        for name, entry in header.items()
        if name.startswith(leaf)
    ]


DAMAGES = {
    "first byte of the header": lambda file: flip(file, 0),
    "list of the tiles": lambda file: flip(file, 100),
    "end of the header": lambda file: flip(file, 4095),
    "first tile": lambda file: flip(file, 4096),
    "last byte": lambda file: flip(file, -1),
    "short": lambda file: os.truncate(file, file.stat().st_size - 1),
    "empty": lambda file: os.truncate(file, 0),
    "long": lambda file: os.truncate(file, file.stat().st_size + 1),
    "missing": os.unlink,
    "a directory": lambda file: (os.unlink(file), os.mkdir(file)),
    "of another rank": lambda file: shutil.copy(
        next(f for f in file.parent.glob("tiles-*") if f != file), file
    ),
    "of another generation": lambda file: shutil.copy(
        file.parent.parent / GOOD / file.name, file
    ),
}


def save(comm, root, step, size, cut):
    def work(part):
        job = Mixture(part, cut)
        job.move(step)
        with manager(root, *job.states, comm=part) as ours:
            assert ours.save(step=step).generation == step

    on_first(comm, size, work)


def damage(comm, file, how):
    if comm.rank == 0:
        DAMAGES[how](file)
    comm.barrier()


def restored_older(comm, root, size, cut, *, saved_by, **options):
    """Restore by the first ranks, and require generation 1, whole, on all of them."""

    def work(part):
        job = Mixture(part, cut)
        job.move(9)
        with manager(root, *job.states, comm=part, **options) as ours:
            report = ours.restore()
            assert_same(part, plain(report))
            assert (report.generation, list(report.quarantined)) == (1, [str(root / BAD)])
            assert job.problems(1, same_size=size == saved_by) == []
            assert [info.generation for info in ours.generations()] == [1]
            job.move(3)
            assert ours.save(step=3).generation == 3
            job.move(9)
            assert ours.restore().generation == 3
            assert job.problems(3) == []
        return report

    report = on_first(comm, size, work)
    if comm.rank == 0:
        aside = root / ".quarantine" / BAD
        reason = json.loads((aside / "reason.json").read_text())["reason"]
        assert reason == report.quarantined[str(root / BAD)]
        assert "tiles-" in reason
    comm.barrier()


@pytest.mark.parametrize("how", DAMAGES)
def test_an_older_one_of_other_ranks_and_another_cut_is_used(peers, shared_path, how):
    few, most = peers.size - 1, peers.size
    # Ranks that saved the good one, ranks that saved the bad one, ranks that restore.
    for good, bad, here in ((few, most, most), (most, few, most), (most, most, few)):
        if how == "of another rank" and bad == 1:
            continue  # there is none
        root = shared_path / f"{good}-{bad}-{here}"
        # With the same rows, only the digest of the header tells two generations apart.
        save(peers, root, 1, good, cuts.columns if good != bad else cuts.rows)
        save(peers, root, 2, bad, cuts.rows)
        damage(peers, tile_file(root / BAD, min(good, bad) - 1), how)
        restored_older(peers, root, here, cuts.grid, saved_by=good)


@pytest.mark.parametrize("readers", ["root", "node"])
@pytest.mark.parametrize("leaf", ["field/x", "rows/at"])
def test_a_byte_that_another_rank_than_its_reader_wants(peers, shared_path, leaf, readers):
    """The last rank wants all of the field: others read for it, and learn of the fault."""
    for rank in range(peers.size):
        root = shared_path / f"{rank}"
        save(peers, root, 1, peers.size, cuts.several)
        save(peers, root, 2, peers.size, cuts.rows)
        if peers.rank == 0:
            file = tile_file(root / BAD, rank)
            flip(file, data_of(file, leaf)[-1])
        peers.barrier()
        io = IO(readers=readers, window_bytes=1)
        restored_older(
            *(peers, root, peers.size, cuts.last_has_all), saved_by=peers.size, io=io
        )


def test_a_byte_of_a_state_that_nobody_asked_for(peers, shared_path):
    """All states must be of one generation: the first partial restore proves them all."""
    save(peers, shared_path, 1, peers.size - 1, cuts.grid)
    save(peers, shared_path, 2, peers.size, cuts.rows)
    if peers.rank == 0:
        file = tile_file(shared_path / BAD, peers.size - 1)
        flip(file, data_of(file, "field/x")[0])
    peers.barrier()
    job = Mixture(peers)
    with manager(shared_path, *job.states, comm=peers) as ours:
        report = ours.restore(only=["rows"])
        assert (report.generation, len(report.quarantined)) == (1, 1)
        assert ours.restore(only=["field", "whole"]).generation == 1
        assert set(job.problems(1)) == {"object", "random", "sampler"}


def listing(comm, root):
    """Return what a directory holds, as root sees it."""
    mine = sorted(str(path.relative_to(root)) for path in root.rglob("*"))
    return comm.bcast(mine)


@pytest.mark.parametrize("how", DAMAGES)
def test_one_that_was_requested_stays_where_it_is(peers, shared_path, how):
    for step in (1, 2, 3):
        save(peers, shared_path, step, peers.size, cuts.rows)
    last = peers.size - 1
    damage(peers, tile_file(shared_path / BAD, last), how)
    before = listing(peers, shared_path)
    job = Mixture(peers, cuts.grid)
    job.move(9)
    with manager(shared_path, *job.states, comm=peers) as ours:
        with same_error(
            *(peers, CorruptGenerationError, f"tiles-{last:05d}"),
            *("eneration 2 was requested", "1 (step 1), 3 (step 3)"),
        ) as caught:
            ours.restore(generation=2)
        assert caught.error.generation == 2
        if how in ("first tile", "last byte"):
            # Leaves that all ranks have whole had arrived before.
            assert "do not train on them" in str(caught.error)
        else:
            assert job.problems(9) == []
        peers.barrier()
        assert listing(peers, shared_path) == before
        assert ours.restore(generation=1).generation == 1
        assert job.problems(1) == []


def test_none_is_good(peers, shared_path):
    save(peers, shared_path, 1, peers.size - 1, cuts.grid)
    save(peers, shared_path, 2, peers.size, cuts.rows)
    damage(peers, tile_file(shared_path / GOOD, 0), "last byte")
    damage(peers, tile_file(shared_path / BAD, 0), "last byte")
    job = Mixture(peers, cuts.columns)
    with manager(shared_path, *job.states, comm=peers) as ours:
        with same_error(
            peers, CorruptGenerationError, "no generation in", ".quarantine"
        ) as caught:
            ours.restore()
        assert len(caught.error.problems) == 2
        job.move(3)
        assert ours.save(step=3).generation == 3
        assert ours.restore().generation == 3
    assert job.problems(3) == []


class TestOutOfSight:
    """A rank that cannot read what root reads well: nothing is bad, nothing set aside."""

    @pytest.fixture
    def saved(self, peers, shared_path):
        save(peers, shared_path, 1, peers.size - 1, cuts.columns)
        save(peers, shared_path, 2, peers.size, cuts.rows)
        return shared_path

    def test_a_directory_of_its_own(self, peers, saved, tmp_path):
        root = tmp_path / "elsewhere" if peers.rank == peers.size - 1 else saved
        job = Mixture(peers, cuts.grid)
        last = f"rank {peers.size - 1} of"
        with (
            manager(root, *job.states, comm=peers) as ours,
            same_error(peers, ReadError, last, "a directory that all ranks see"),
        ):
            ours.restore()
        self.nothing_is_bad(peers, saved)

    @pytest.mark.parametrize("code", [errno.ENOENT, errno.EACCES, errno.ESTALE, errno.EIO])
    def test_a_file_that_it_cannot_open(self, peers, saved, monkeypatch, code):
        real = filesystem.open_for_reading

        def refusing(path, **options):
            if path.name.startswith("tiles-"):
                raise OSError(code, os.strerror(code), str(path))
            return real(path, **options)

        advice = "a directory that all ranks see" if code != errno.EIO else ""
        job = Mixture(peers, cuts.grid)
        with monkeypatch.context() as patch:
            if peers.rank == peers.size - 1:
                patch.setattr(filesystem, "open_for_reading", refusing)
            with (
                manager(saved, *job.states, comm=peers) as ours,
                same_error(
                    *(peers, ReadError, f"rank {peers.size - 1} of", "tiles-"),
                    *(errno.errorcode[code], advice),
                ),
            ):
                ours.restore()
        self.nothing_is_bad(peers, saved)

    def nothing_is_bad(self, peers, saved):
        peers.barrier()
        assert not any(".quarantine" in name for name in listing(peers, saved))
        job = Mixture(peers, cuts.grid)
        with manager(saved, *job.states, comm=peers) as ours:
            assert ours.restore().quarantined == {}
        assert job.problems(2) == []
