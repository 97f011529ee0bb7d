# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import os
import re
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpi_ckpt.errors import RegistrationError
from mpi_ckpt.storage.format import layout

names = st.text(min_size=1, max_size=30)


def is_legal(name: str) -> bool:
    try:
        layout.check_state_name(name)
    except RegistrationError:
        return False
    return True


@given(st.integers(0, 10**17))
def test_number_of_a_generation_is_read_from_its_name(number):
    assert layout.generation_number(layout.generation_name(number)) == number


@pytest.mark.parametrize(
    "name",
    [
        "checkpoint-foo",
        "checkpoint-",
        "checkpoint-0000042",
        "checkpoint-000000042",
        "checkpoint-0000004٢",
        "checkpoint--0000042",
        "checkpoint-00000042\n",
        "xcheckpoint-00000042",
        "checkpoint-00000042.old",
        "checkpoint-" + "9" * 30,
    ],
)
def test_foreign_names_have_no_number(name):
    assert layout.generation_number(name) is None


@pytest.mark.parametrize(
    ("name", "is_theirs"),
    [
        ("checkpoint-0", True),
        ("checkpoint-12", True),
        ("checkpoint-1234567", True),
        ("checkpoint-00000012", False),
        ("checkpoint-foo", False),
        ("_checkpoint", False),
    ],
)
def test_names_of_adaptdl_are_told_apart(name, is_theirs):
    assert layout.is_adaptdl_name(name) is is_theirs


def test_partials_are_known_by_their_name_and_are_hidden():
    name = layout.partial_name(42, "9f3c2a61b07e")
    assert layout.is_partial_name(name)
    assert layout.partial_number(name) == 42
    assert name.startswith(".")
    assert layout.generation_number(name) is None
    assert not layout.is_partial_name(name + "/..")
    assert not layout.is_partial_name(".partial-x")
    assert not layout.is_partial_name("checkpoint-00000042")


def test_leftovers_tell_whose_they_are():
    name = layout.partial_name(42, "9f3c")
    moved = layout.condemned_name(name, "ab12")
    assert moved == ".partial-00000042-9f3cxab12"
    assert layout.is_partial_name(moved)
    assert layout.partial_number(moved) == 42
    assert [layout.is_condemned_name(leftover) for leftover in (name, moved)] == [
        False,
        True,
    ]
    assert [layout.is_partial_of(name, job) for job in ("9f3c", "ab12")] == [True, False]
    assert [layout.is_partial_of(moved, job) for job in ("9f3c", "ab12")] == [False, True]


@given(names)
def test_file_of_a_legal_name_stays_in_its_directory(name):
    if not is_legal(name):
        return
    file = layout.stream_file_name(name)
    assert layout.check_file_name(file) == file
    assert "/" not in file
    assert not file.startswith(".")
    assert len(file.encode()) <= layout.STATE_NAME_BYTES_MAX
    carried = layout.carried_file_name(file, 42)
    assert layout.check_file_name(carried) == carried
    assert len(carried.encode()) <= 255


@given(names, names)
def test_different_names_have_different_files(first, second):
    if first != second and is_legal(first) and is_legal(second):
        assert layout.stream_file_name(first) != layout.stream_file_name(second)


@pytest.mark.parametrize(
    ("first", "second"),
    [("a/b", "a%2Fb"), (".a", "%2Ea"), ("a b", "a%20b"), ("ä", "%C3%A4")],
)
def test_encoded_looking_names_do_not_meet(first, second):
    assert layout.stream_file_name(first) != layout.stream_file_name(second)


@pytest.mark.parametrize(
    "name",
    [
        "",
        "   ",
        "/etc/passwd",
        "..",
        ".",
        "a/../b",
        "a/..",
        "nul\0",
        "line\nbreak",
        "\x7f",
        "lone \ud800",
        "x" * 201,
        "ä" * 40,
        None,
        5,
        b"bytes",
    ],
)
def test_illegal_state_names_are_refused(name):
    with pytest.raises(RegistrationError, match="state name"):
        layout.check_state_name(name)


@pytest.mark.parametrize("name", ["a", "a/b", ".hidden", "ä ö", "x" * 196, "a..b", "[*]?"])
def test_usual_state_names_are_taken(name):
    layout.check_state_name(name)


@pytest.mark.parametrize(
    "name",
    [
        "",
        "a/b",
        "/a",
        "..",
        "..a",
        "a\0",
        "a\n",
        "ä",
        "a b",
        "x" * 256,
        "." + "x" * 255,
        "a\\b",
        None,
        7,
        ["a"],
    ],
)
def test_file_names_that_lead_elsewhere_are_refused(name):
    with pytest.raises(ValueError, match="not a file name"):
        layout.check_file_name(name)


def test_names_equal_but_for_case_or_form_collide():
    composed, decomposed = "é", unicodedata.normalize("NFD", "é")
    layout.check_names_differ(["a", "b", "ab", "é"])
    with pytest.raises(RegistrationError, match="'a' is given twice"):
        layout.check_names_differ(["a", "b", "a"])
    for names in (["Model", "model"], [composed, decomposed], ["ß", "SS"]):
        told = re.escape(f"{names[0]!r} and {names[1]!r} differ only in case or form")
        with pytest.raises(RegistrationError, match=told):
            layout.check_names_differ(names)


def test_all_collisions_are_named_at_once():
    with pytest.raises(RegistrationError) as caught:
        layout.check_names_differ(["a", "A", "b", "b", "c"])
    assert len(caught.value.problems) == 2
    assert isinstance(caught.value, ValueError)


def test_carried_file_is_renamed_once():
    assert layout.shard_file_name(0) == "rank-00000.safetensors"
    assert layout.tile_file_name(3) == "tiles-00003.safetensors"
    first = layout.carried_file_name("rank-00000.safetensors", 7)
    assert first == "rank-00000.from-00000007.safetensors"
    assert layout.carried_file_name(first, 7) == first
    assert layout.carried_file_name(first, 9) == "rank-00000.from-00000009.safetensors"


def test_longest_carried_name_can_be_made(tmp_path):
    name = layout.carried_file_name(layout.stream_file_name("x" * 196), 10**17)
    (tmp_path / name).write_bytes(b"")
    assert os.listdir(tmp_path) == [name]
