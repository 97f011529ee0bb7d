# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json

import pytest

from mpi_ckpt.errors import SaveError
from mpi_ckpt.leaves.leaf import LeafSpec
from mpi_ckpt.storage.format import tensorfile
from mpi_ckpt.storage.format.tensorfile import encode_header, parse_header


def test_header_gives_its_length_and_is_padded_with_spaces():
    header = encode_header([("w", LeafSpec("w", "F32", (2, 3)))], {"by": "me"})
    length = int.from_bytes(header[:8], "little")
    assert len(header) == 8 + length == tensorfile.DATA_ALIGNMENT
    assert header.rstrip(b" ").endswith(b"}")
    assert parse_header(header[8:]) == {
        "__metadata__": {"by": "me"},
        "w": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
    }


@pytest.mark.parametrize("spare", [0, 1, 7, 8, 9])
def test_header_of_any_length_ends_at_the_border(spare):
    text = json.dumps({"__metadata__": {"": ""}}, separators=(",", ":"))
    filler = "x" * (tensorfile.DATA_ALIGNMENT - 8 - len(text) - spare)
    header = encode_header([], {"": filler})
    assert len(header) == tensorfile.DATA_ALIGNMENT
    assert len(encode_header([], {"": filler + "x" * (spare + 1)})) == 2 * len(header)


def test_header_that_safetensors_would_not_read_is_not_written(monkeypatch):
    monkeypatch.setattr(tensorfile, "HEADER_BYTES_MAX", 8192)
    assert encode_header([], {"": "x" * 8000})
    with pytest.raises(SaveError, match="at most 8192"):
        encode_header([], {"": "x" * 9000})


@pytest.mark.parametrize("text", [b"", b"[]", b"1", b"null", b"{", b"\xff", b'"text"'])
def test_headers_that_are_no_object_are_refused(text):
    with pytest.raises(ValueError, match=r".+"):
        parse_header(text)
