# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import errno
from pathlib import Path

import pytest

from mpi_ckpt.errors import LockedError, ReadError, SaveError, WriteError
from mpi_ckpt.storage.faults import os_errors_as, read_errors_as_save_errors

PATH = Path("/data/run")


def raised(cause: BaseException):
    with pytest.raises(WriteError) as caught, os_errors_as(WriteError, "writing", PATH):
        raise cause
    return caught.value


def test_error_says_what_where_and_why():
    error = raised(OSError(errno.EIO, "I/O"))
    assert str(error) == "writing /data/run failed: EIO (Input/output error)"
    assert (error.errno, error.path) == (errno.EIO, "/data/run")
    assert isinstance(error.__cause__, OSError)


def test_file_that_the_system_names_wins():
    assert raised(FileNotFoundError(errno.ENOENT, "no", "/other")).path == "/other"


@pytest.mark.parametrize(
    ("code", "advice"),
    [
        (errno.ENOSPC, "file system is full"),
        (errno.EDQUOT, "quota"),
        (errno.EROFS, "read-only"),
        (errno.EFBIG, "limit"),
        (errno.EXDEV, "several file systems"),
    ],
)
def test_common_causes_are_put_in_words(code, advice):
    assert advice in str(raised(OSError(code, "x")))


def test_error_without_a_number_keeps_its_text():
    assert "odd thing" in str(raised(OSError("odd thing")))


def test_other_errors_pass():
    for error in (ValueError("x"), LockedError("x"), ReadError("x"), KeyboardInterrupt()):
        with (
            pytest.raises(type(error)) as caught,
            os_errors_as(WriteError, "writing", PATH),
        ):
            raise error
        assert caught.value is error


def test_what_a_save_cannot_read_fails_it_as_a_save():
    with pytest.raises(SaveError, match="listing") as caught, read_errors_as_save_errors():
        raise ReadError("listing failed", path=PATH, errno=errno.EIO, generation=3)
    error = caught.value
    assert (error.path, error.errno, error.generation) == (str(PATH), errno.EIO, 3)
    with pytest.raises(WriteError), read_errors_as_save_errors():
        raise WriteError("as it is")
