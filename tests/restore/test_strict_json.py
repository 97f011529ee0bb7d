# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpi_ckpt.storage.format.strict_json import read_json, shown

texts = st.text(st.characters(exclude_categories=["Cs"]))
values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | texts,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4),
    max_leaves=20,
)


@given(values, st.booleans())
def test_json_is_read_as_it_was_written(value, ascii_only):
    data = json.dumps(value, ensure_ascii=ascii_only).encode()
    assert read_json(data) == value
    assert read_json(bytearray(data)) == value


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"", "Expecting"),
        (b"{} {}", "Extra data"),
        (b"\xef\xbb\xbf{}", "BOM"),
        ("{}".encode("utf-16"), "utf-8"),
        ('"a"'.encode("utf-16-le"), r"."),
        (b'{"a":"\xff"}', "utf-8"),
        (b'{"a":"\xed\xa0\x80"}', "utf-8"),
        (b'{"a":1,"a":1}', "key 'a' twice"),
        (b'[{"b":{"a":1,"\\u0061":2}}]', "key 'a' twice"),
        (b"NaN", "NaN"),
        (b"[-Infinity]", "Infinity"),
        (b"[1, -2e999]", "'-2e999' is out of range"),
        (b"9" * 400 + b".0", "is out of range"),
        (b"9" * 5000, "5000 digits"),
        (b"[" * 100_000, "deep"),
        (b'{"a":' * 100_000, "deep"),
        (b'"\\ud800"', "surrogate"),
        (b'{"\\uDFFF":1}', "surrogate"),
        (b'"\\ud83d and \\ude00"', "surrogate"),
        (b'"a\nb"', "control"),
        (b"\x00", "Expecting"),
    ],
    ids=range(21),
)
def test_what_is_no_strict_json_is_refused(data, why):
    with pytest.raises(ValueError, match=why):
        read_json(data)


def test_escapes_that_make_text_are_read():
    assert read_json(b'"\\ud83d\\ude00 \\\\ud800 \\u0061"') == "\U0001f600 \\ud800 a"


def test_a_key_that_comes_twice_among_many_is_found_at_once():
    keys = ",".join(f'"{number}":0' for number in range(100_000))
    data = f'{{{keys},"last":0,"last":1}}'.encode()
    start = time.process_time()
    with pytest.raises(ValueError, match="'last' twice"):
        read_json(data)
    # Counting each key in all of them took minutes.
    assert time.process_time() - start < 5


@given(st.recursive(st.integers() | st.text() | st.binary(), st.lists))
def test_what_is_shown_is_short_and_on_one_line(value):
    for document in (
        value,
        value * 1000 if isinstance(value, (str, bytes, list)) else value,
    ):
        assert len(shown(document)) < 20_000
        assert shown(document).isprintable()
