# SPDX-License-Identifier: Apache-2.0
"""Leaves read in columns are those read one by one, and are refused in the same words."""

from __future__ import annotations

import json
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpi_ckpt.leaves.digest import Digest, digest_bytes
from mpi_ckpt.leaves.leaf import LeafSpec
from mpi_ckpt.storage.format import leaf_list, manifest_codec, strict_json
from mpi_ckpt.storage.format.manifest import (
    Extent,
    Manifest,
    StoredFile,
    StoredLeaf,
    StoredLeaves,
    StoredState,
)
from mpi_ckpt.storage.format.manifest_codec import decode, encode
from tests.making import sealed, sealed_document

BLOCK = 8
FILES = ("rank-00000.safetensors", "rank-00001.safetensors")
ODD = [
    *(True, False, None, 0, 1, 1.0, -1, 8, 16, 10**19, 2**60, 2**60 + 1, 10**400),
    *("", "a", "F32", "F16", "F99", "numpy:<f16", "rank-00001.safetensors", "0" * 32),
    *(" " + "0" * 31, "0" * 64, "g" * 32, " 0" * 32, "0" * 31 + "\u00b2"),
    *([], [1], [2, 2], [True], [1.0], [-1], ["1"], [2**61], [1] * 65, [0, 2**60, 2**60]),
    *({}, {"a": 1}),
]
MEMBERS = ["name", "dtype", "shape", "file", "offset", "bytes", "digest", "blocks"]


def document() -> dict:
    """Return a manifest as JSON values, without its digest."""
    states, offset = [], 32
    for name, lengths in (("one", [4, 4, 0, 12, 4]), ("two", [20, 4, 4])):
        leaves = []
        for number, length in enumerate(lengths):
            spec = LeafSpec(f"leaf{number}", "F32", (length // 4,))
            place = Extent(FILES[number % 2], offset, length)
            digest = Digest.of(bytes([number]) * length, BLOCK)
            leaves.append(StoredLeaf(spec, place, digest))
            offset += length
        states.append(StoredState(name, None, StoredLeaves.of(leaves)))
    manifest = Manifest(
        generation=1,
        step=2,
        time=0.0,
        job="job",
        size=1,
        block_bytes=BLOCK,
        files=tuple(StoredFile(name, 200, 32, digest_bytes(b""), 1) for name in FILES),
        states=tuple(states),
    )
    found: dict = json.loads(encode(manifest))
    del found["digest"]
    return found


def outcome(data: bytes) -> str:
    """Return what reading a manifest gives: the manifest, or the error."""
    try:
        return repr(decode(data))
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def outcome_one_by_one(data: bytes) -> str:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(manifest_codec, "lift_leaves", lambda data: (data, {}))
        return outcome(data)


def test_whole_manifest_is_read_in_columns(monkeypatch):
    monkeypatch.setattr(leaf_list, "_decode_leaf", lambda *_: 1 / 0)
    assert "leaf4" in outcome(sealed_document(document()))


def test_names_that_need_no_escape_are_read_in_columns(monkeypatch):
    found = document()
    found["states"][0]["leaves"][0]["name"] = "größe/\u65e5\u672c \x7f'{}[],:"
    text = json.dumps(found, separators=(",", ":"), ensure_ascii=False)
    data = sealed(text.encode()[:-1])
    expected = outcome_one_by_one(data)
    monkeypatch.setattr(leaf_list, "_decode_leaf", lambda *_: 1 / 0)
    assert "größe" in expected
    assert outcome(data) == expected


CHANGES = st.lists(
    st.tuples(
        st.integers(0, 1),
        st.integers(0, 4),
        st.sampled_from(MEMBERS),
        st.one_of(st.sampled_from(ODD), st.just("remove"), st.just("of the next leaf")),
    ),
    max_size=3,
)


@given(CHANGES)
@settings(max_examples=400)
def test_columns_and_single_leaves_give_the_same_result_or_words(changes):
    found = document()
    for state, number, member, value in changes:
        leaves = found["states"][state]["leaves"]
        leaf = leaves[number % len(leaves)]
        if value == "remove":
            leaf.pop(member, None)
        elif value == "of the next leaf":
            leaf[member] = leaves[(number + 1) % len(leaves)].get(member, 0)
        else:
            leaf[member] = value
    data = sealed_document(found)
    assert outcome(data) == outcome_one_by_one(data)


def test_lists_around_one_that_is_read_one_by_one_are_read_in_columns(monkeypatch):
    found = document()
    odd = {
        "name": "odd",
        "structure": None,
        "leaves": [{**found["states"][0]["leaves"][4]}],
    }
    odd["leaves"][0] |= {"name": '"}],', "offset": 120}
    empty = {"name": "empty", "structure": None, "leaves": []}
    found["states"] = [
        empty,
        found["states"][0],
        odd,
        empty | {"name": "no"},
        found["states"][1],
    ]
    data, singles = sealed_document(found), []
    expected = outcome_one_by_one(data)
    decode_leaf = leaf_list._decode_leaf

    def note(entry, *rest):
        singles.append(entry["name"])
        return decode_leaf(entry, *rest)

    monkeypatch.setattr(leaf_list, "_decode_leaf", note)
    assert outcome(data) == expected
    assert "Manifest" in expected
    assert singles == ['"}],']


ENTRY = json.dumps(document()["states"][0]["leaves"][1], separators=(",", ":"))
PIECES = [
    *(
        b"",
        b" ",
        b",",
        b"[",
        b"]",
        b"{",
        b"}",
        b'"',
        b"\\",
        b"\n",
        b"0",
        b"-",
        b"\xff",
        b"e5",
    ),
    *(b',"leaves":[', b'"}]', b'"leaves":[]', b'"a":1,', b'"name":"twice",', b'"cut":[],'),
    *(b",%b" % ENTRY.encode(), b"%b," % ENTRY.encode(), b',"leaves":[%b]' % ENTRY.encode()),
]


@given(st.lists(st.tuples(st.floats(0, 1), st.integers(0, 12), st.sampled_from(PIECES))))
@settings(max_examples=400)
def test_text_that_was_changed_gives_the_same_result_or_words(changes):
    text = sealed_document(document())[: -len(sealed(b""))]
    for place, length, piece in changes:
        at = int(place * len(text))
        text = text[:at] + piece + text[at + length :]
    data = sealed(text)
    assert outcome(data) == outcome_one_by_one(data)


@pytest.mark.parametrize(
    "structure",
    [{"a": 1, "leaves": [json.loads(ENTRY)]}, ["b", '","leaves":[' + ENTRY + "]"]],
    ids=["values", "text"],
)
def test_list_of_leaves_in_a_structure_stays_there(structure):
    found = document()
    found["states"][0]["structure"] = structure
    data = sealed_document(found)
    assert outcome(data) == outcome_one_by_one(data)
    assert decode(data).states[0].structure == structure


def test_lists_without_an_end_are_searched_once():
    text = b'{"a":1' + b',"leaves":[' * 400_000
    started = time.process_time()
    assert leaf_list.lift_leaves(text) == (text, {})
    assert leaf_list.lift_leaves(text + b'"}]') == (text + b'"}]', {})
    assert time.process_time() - started < 20  # quadratic work takes hours


@pytest.mark.parametrize("entry", [None, [], [1] * 7, "leaf", 7, {}], ids=repr)
@pytest.mark.parametrize("place", [0, 2, 5])
def test_entries_of_another_kind_are_refused_in_the_same_words(entry, place):
    found = document()
    found["states"][0]["leaves"].insert(place, entry)
    data = sealed_document(found)
    assert outcome(data) == outcome_one_by_one(data)
    assert "ValueError" in outcome(data)


@given(st.lists(st.sampled_from(["9" * 3999, "9" * 4000, "-" + "9" * 4000, "9" * 4001,
    "0.5", "7", '"' + "9" * 5000 + '"', "-" + "9" * 3999, "9" * 4100 + ".0", " " * 1999]),
    max_size=4))  # fmt: skip
def test_long_integers_are_found_wherever_they_are(values):
    text = f"[{','.join(value if value.strip() else '1' + value for value in values)}]"
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(strict_json, "_may_have_long_integer", lambda _: True)
        expected = read(text)
    assert read(text) == expected


def read(text: str) -> str:
    try:
        return repr(strict_json.read_json(text.encode()))[:9000]
    except ValueError as error:
        return f"refused: {error}"
