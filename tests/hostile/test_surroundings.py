# SPDX-License-Identifier: Apache-2.0
"""What others may have left in, or made of, the checkpoint directory itself."""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
import sys
import tempfile
from contextlib import closing
from pathlib import Path

import pytest

from mpi_ckpt.errors import CheckpointError, CorruptGenerationError, SaveError
from mpi_ckpt.storage.directory.catalog import Catalog
from mpi_ckpt.storage.directory.checkpoint_directory import CheckpointDirectory
from tests.commands import run
from tests.directories import names_in
from tests.hostile.watch import watched
from tests.hostile.world import NEWEST, STREAM, Program, copy_of, make_root, make_socket
from tests.making import save
from tests.waiting import limit

NOBODY = 65534
FIRST = "checkpoint-00000001"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return make_root(tmp_path_factory.mktemp("whole") / "root")


@pytest.fixture
def root(whole, tmp_path):
    return copy_of(whole, tmp_path / "root")


@pytest.fixture
def elsewhere(tmp_path):
    """Give a directory of somebody's, with a file that must stay as it is."""
    theirs = tmp_path / "elsewhere"
    theirs.mkdir()
    (theirs / "file").write_bytes(b"theirs")
    yield theirs
    assert {p.name: p.read_bytes() for p in theirs.iterdir()} == {"file": b"theirs"}


KINDS = {
    "link": lambda path, theirs: path.symlink_to(theirs),
    "link to a file": lambda path, theirs: path.symlink_to(theirs / "file"),
    "dangling link": lambda path, _: path.symlink_to("nowhere"),
    "link to itself": lambda path, _: path.symlink_to(path.name),
    "link to a device": lambda path, _: path.symlink_to("/dev/zero"),
    "file": lambda path, _: path.write_bytes(b"x"),
    "FIFO": lambda path, _: os.mkfifo(path),
    "socket": lambda path, _: make_socket(path),
}


def spoil(path) -> None:
    (path / STREAM).write_bytes(b"x")


@pytest.mark.parametrize("kind", KINDS)
def test_what_stands_in_place_of_the_quarantine_receives_nothing(
    root, elsewhere, caplog, kind
):
    KINDS[kind](root / ".quarantine", elsewhere)
    spoil(root / NEWEST)
    program = Program()
    with watched(root):
        report = program.restore(root)
        program.save(root)
    assert (report.generation, program.holds) == (1, 1)
    assert "could not be set aside" in caplog.text
    assert (root / NEWEST).is_dir()
    assert os.path.lexists(root / ".quarantine")
    # The number of the bad one is not used again, though it could not be moved.
    assert (root / "checkpoint-00000003").is_dir()
    for command in ("ls", "doctor"):
        assert run(command, root).exit_code in (0, 1)


@pytest.mark.parametrize("kind", KINDS)
def test_no_fresh_start_where_the_quarantine_cannot_be_looked_into(
    tmp_path, elsewhere, kind
):
    root = tmp_path / "empty"
    root.mkdir()
    KINDS[kind](root / ".quarantine", elsewhere)
    with pytest.raises(
        CorruptGenerationError, match="it is not known whether there ever was one"
    ):
        Program().restore(root)
    (root / ".quarantine").unlink()
    assert Program().restore(root) is None


@pytest.mark.parametrize("kind", [*KINDS, "directory"])
def test_what_stands_in_place_of_the_lock_is_refused_and_old_saves_are_read(
    root, elsewhere, kind, caplog
):
    lock = root / ".lock"
    lock.mkdir() if kind == "directory" else KINDS[kind](lock, elsewhere)
    before = lock.lstat()
    program = Program()
    with watched(root):
        report = program.restore(root)
    assert (report.generation, program.holds) == (2, 2)
    if kind == "file":  # of any contents: a file is what it should be
        program.save(root)
        return
    assert "restoring without a lock" in caplog.text
    with pytest.raises(SaveError, match=r"\.lock"):
        program.save(root)
    after = lock.lstat()
    assert (after.st_ino, after.st_mode) == (before.st_ino, before.st_mode)
    assert len(list(root.glob("checkpoint-*"))) == 2


def test_a_lock_that_is_a_second_name_of_a_file_is_not_written_to(root, elsewhere):
    os.link(elsewhere / "file", root / ".lock")
    program = Program()
    with watched(root):
        assert program.restore(root).generation == 2
    with watched(root), pytest.raises(SaveError, match="has a second name"):
        program.save(root)
    assert (elsewhere / "file").read_bytes() == b"theirs"
    (root / ".lock").unlink()
    program.save(root)
    assert (root / "checkpoint-00000003").is_dir()


@pytest.mark.parametrize("kind", KINDS)
def test_leftovers_of_any_kind_are_removed_themselves_and_nothing_behind_them(
    root, elsewhere, kind
):
    leftover = root / ".partial-00000003-0123456789ab"
    KINDS[kind](leftover, elsewhere)
    with watched(root):
        Program(3).save(root)
    assert not os.path.lexists(leftover)
    assert Program().restore(root).generation == 3


def test_links_within_a_leftover_are_removed_and_not_followed(root, elsewhere):
    leftover = root / ".partial-00000003-0123456789ab"
    leftover.mkdir()
    (leftover / "directory").symlink_to(elsewhere)
    (leftover / "file").symlink_to(elsewhere / "file")
    os.mkfifo(leftover / "fifo")
    os.link(elsewhere / "file", leftover / "hard")
    with watched(root):
        Program(3).save(root)
    assert not leftover.exists()


@pytest.mark.parametrize("kind", ["link", "dangling link", "file", "FIFO"])
def test_a_partial_that_somebody_made_first_is_not_written_into(
    root, elsewhere, monkeypatch, kind
):
    monkeypatch.setattr("secrets.token_hex", lambda _: "foreseen")
    directory = CheckpointDirectory(root)
    with closing(directory):
        directory.own()
        # Between the sweep and the save, by somebody who knows the job's random name.
        monkeypatch.setattr("mpi_ckpt.storage.directory.recovery.sweep", lambda *_: None)
        partial = root / ".partial-00000003-foreseen"
        KINDS[kind](partial, elsewhere)
        monkeypatch.setattr(
            "mpi_ckpt.storage.format.layout.is_partial_name", lambda _: False
        )
        monkeypatch.setattr(
            "mpi_ckpt.storage.directory.recovery.is_partial_name", lambda _: False
        )
        with watched(root), pytest.raises(SaveError, match="EEXIST"):
            save(directory, Program(3).states)
    assert Program().restore(root).generation == 2


@pytest.mark.parametrize("kind", ["link to a file", "dangling link", "FIFO", "file"])
def test_a_file_that_somebody_made_first_is_not_written_into(
    root, elsewhere, monkeypatch, kind
):
    directory = CheckpointDirectory(root)
    with closing(directory):
        directory.own()
        begin = directory.begin

        def plant():
            partial = begin()
            KINDS[kind](partial.path / STREAM, elsewhere)
            return partial

        monkeypatch.setattr(directory, "begin", plant)
        with watched(root), pytest.raises(SaveError, match="EEXIST"):
            save(directory, Program(3).states)
    assert Program().restore(root).generation == 2


def test_a_directory_named_by_a_link_is_followed_as_its_user_says(root, tmp_path):
    link = tmp_path / "link"
    link.symlink_to(root)
    program = Program()
    assert program.restore(link).generation == 2
    program.save(link)
    assert (root / "checkpoint-00000003").is_dir()
    assert run("verify", link, "--all").exit_code == 0
    named = tmp_path / "of any name"
    named.symlink_to(root / NEWEST)
    assert run("verify", named).exit_code == 0


@pytest.mark.parametrize("target", [FIRST, "..", "latest", "nowhere", "/"])
def test_other_names_mean_nothing_whatever_they_are(root, target):
    (root / "latest").symlink_to(target)
    (root / "checkpoint-latest").symlink_to(target)
    for name in (
        "checkpoint-0000000?",
        "checkpoint-*",
        "checkpoint-00000009\n",
        "a\nb",
        "\\",
    ):
        (root / name).mkdir()
    (root / os.fsdecode(b"checkpoint-\xff")).mkdir()
    before = sorted(os.listdir(root))
    with watched(root):
        program = Program()
        assert program.restore(root).generation == 2
    assert names_in(root) == sorted([*before, ".lock"])
    assert run("ls", root).exit_code == 0


@pytest.mark.parametrize(
    "name", ["checkpoint-999999999999999999", ".partial-999999999999999999-x"]
)
def test_the_highest_number_there_is_does_not_hide_the_next_save(root, name):
    (root / name / "not empty").mkdir(parents=True)
    (root / name / "not empty" / "x").mkdir()  # so that it cannot be swept
    program = Program()
    assert program.restore(root).generation == 2
    with pytest.raises(SaveError, match="checkpoint-999999999999999999"):
        program.save(root)
    shutil.rmtree(root / name, ignore_errors=True)
    shutil.rmtree(root / ".quarantine", ignore_errors=True)
    program.save(root)
    assert Program().restore(root).generation == 3


def test_a_link_in_place_of_a_generation_is_not_counted_nor_pruned(root, elsewhere):
    (root / "checkpoint-00000003").symlink_to(NEWEST)
    catalog = Catalog(root)
    assert [info.generation for info in catalog.generations()] == [1, 2]


@pytest.mark.parametrize("step", ["manifest", "header"])
def test_a_file_that_changes_between_check_and_read_is_found(root, monkeypatch, step):
    """Bytes are proven in the memory from which they are sent on."""
    from mpi_ckpt.storage.reading.reader import GenerationReader

    opened = GenerationReader.__init__

    def open_then_change(self, path, **options):
        opened(self, path, **options)
        if path.name == NEWEST:
            name = STREAM if step == "manifest" else "rank-00000.safetensors"
            with (path / name).open("r+b") as file:
                file.seek(-1, os.SEEK_END)
                file.write(b"!")

    monkeypatch.setattr(GenerationReader, "__init__", open_then_change)
    program = Program()
    report = program.restore(root)
    assert (report.generation, program.holds) == (1, 1)
    assert str(root / NEWEST) in report.quarantined


@pytest.mark.parametrize(
    ("mode", "told"),
    [
        (0o777, "add, change and remove"),
        (0o1777, "any user of this system may add generations"),
        (0o2775, None),
        (0o770, None),
        (0o775, None),
        (0o700, None),
    ],
    ids=["777", "1777", "2775", "770", "775", "700"],
)
def test_a_directory_that_everybody_may_write_to_is_told_once(root, caplog, mode, told):
    root.chmod(mode)
    directory = CheckpointDirectory(root)
    with closing(directory):
        directory.own()
        directory.own()
    assert caplog.text.count("chmod o-w") == (told is not None)
    assert told is None or told in caplog.text


def as_nobody(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run code as a user that owns nothing."""
    switch = f"os.setgroups([]); os.setgid({NOBODY}); os.setuid({NOBODY})"
    command = [sys.executable, "-c", code.replace("# SWITCH", switch)]
    return subprocess.run(
        [*command, *map(str, arguments)],
        capture_output=True, text=True, timeout=limit(100), check=False, umask=0o022,
    )  # fmt: skip


needs_root = pytest.mark.skipif(
    os.geteuid() != 0, reason="becoming another user takes root"
)

RESTORE = """
import json, os, pathlib, sys, tempfile
from mpi_ckpt import CheckpointError
from tests.hostile.world import Program
with tempfile.TemporaryDirectory() as other:  # what is imported late is imported here
    Program(1).save(pathlib.Path(other))
    Program(2).restore(pathlib.Path(other))
# SWITCH
root, program = pathlib.Path(sys.argv[1]), Program()
answer = {"holds": None, "error": None, "saved": None}
try:
    answer["generation"] = program.restore(root).generation
    answer["holds"] = program.holds
    program.save(root)
    answer["saved"] = True
except CheckpointError as error:
    answer["error"] = [type(error).__name__, str(error)]
print(json.dumps(answer))
"""


@pytest.fixture
def reachable(whole):
    """Give a copy of the directory that another user can reach."""
    base = Path(tempfile.mkdtemp(prefix="mpi_ckpt-shared-"))
    try:
        base.chmod(0o711)
        if not all(above.stat().st_mode & stat.S_IXOTH for above in base.parents):
            pytest.skip(f"nobody else can reach {base}")
        yield copy_of(whole, base / "root")
    finally:
        shutil.rmtree(base)


def restored_by_nobody(root) -> dict:
    done = as_nobody(RESTORE, root)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@needs_root
def test_files_of_another_owner_are_read_and_shared_as_the_group_allows(reachable):
    # A directory of a group: one member saved, another goes on.
    os.chown(reachable, -1, NOBODY)
    reachable.chmod(0o2775)
    answer = restored_by_nobody(reachable)
    assert (answer["generation"], answer["holds"], answer["saved"]) == (2, 2, True)
    assert (reachable / "checkpoint-00000003").stat().st_uid == NOBODY
    assert Program().restore(reachable).generation == 3


@needs_root
def test_a_directory_that_one_may_only_read_is_restored_from_and_not_saved_to(reachable):
    answer = restored_by_nobody(reachable)
    assert (answer["generation"], answer["holds"], answer["saved"]) == (2, 2, None)
    kind, text = answer["error"]
    assert kind == "SaveError"
    assert "EACCES" in text
    assert sorted(os.listdir(reachable)) == [FIRST, NEWEST]


@needs_root
@pytest.mark.parametrize("name", [NEWEST, f"{NEWEST}/manifest.json", f"{NEWEST}/{STREAM}"])
def test_what_one_may_not_read_is_an_error_and_no_reason_to_go_back(reachable, name):
    (reachable / name).chmod(0)
    answer = restored_by_nobody(reachable)
    kind, text = answer["error"]
    assert kind == "ReadError"
    assert "EACCES" in text
    assert (reachable / NEWEST).exists()


@needs_root
def test_a_quarantine_that_one_may_not_look_into_is_in_nobodys_way(reachable):
    os.chown(reachable, -1, NOBODY)
    reachable.chmod(0o2775)
    (reachable / ".quarantine").mkdir(mode=0o700)
    answer = restored_by_nobody(reachable)
    assert (answer["generation"], answer["saved"]) == (2, True)


@needs_root
def test_devices_are_not_read(root):
    file = root / NEWEST / STREAM
    file.unlink()
    try:
        os.mknod(file, 0o600 | stat.S_IFCHR, os.makedev(1, 5))  # as /dev/zero
    except PermissionError:
        pytest.skip("no devices can be made here")
    program = Program()
    with watched(root):
        report = program.restore(root)
    assert (report.generation, program.holds) == (1, 1)
    (root / ".lock").unlink()
    os.mknod(root / ".lock", 0o600 | stat.S_IFCHR, os.makedev(1, 3))  # as /dev/null
    with pytest.raises(CheckpointError, match="no regular file"):
        program.save(root)
