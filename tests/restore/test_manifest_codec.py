# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import copy
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpi_ckpt.errors import UnsupportedFormatError
from mpi_ckpt.leaves.digest import Digest, digest_bytes
from mpi_ckpt.leaves.leaf import LeafSpec
from mpi_ckpt.storage.format.manifest import (
    CutLeaf,
    Extent,
    Manifest,
    StoredFile,
    StoredLeaf,
    StoredLeaves,
    StoredState,
)
from mpi_ckpt.storage.format.manifest_codec import decode, encode
from tests.making import sealed, sealed_document

GOLDEN = Path(__file__).parent / "golden" / "v1" / "checkpoint-00000001"
HEADER = digest_bytes(b"header")
BLOCK = 16
NUMBER_MAX = 2**63 - 1

texts = st.text(st.characters(exclude_categories=["Cs"]))
finite = st.floats(allow_nan=False, allow_infinity=False)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | finite | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=8,
)


@st.composite
def manifests(draw):
    """Draw a manifest of a few states in one shard, and a stream in a file of its own."""
    states, offset = [], 32
    for number in range(draw(st.integers(0, 3))):
        leaves = []
        for name in draw(st.lists(st.text(), unique=True, max_size=3)):
            if any("\ud800" <= character <= "\udfff" for character in name):
                continue
            dtype = draw(st.sampled_from(["U8", "BF16", "C128", "numpy:<M8[ns]"]))
            spec = LeafSpec(
                name, dtype, tuple(draw(st.lists(st.integers(0, 3), max_size=3)))
            )
            digest = Digest.of(bytes(spec.nbytes), BLOCK)
            leaves.append(
                StoredLeaf(
                    spec, Extent("rank-00000.safetensors", offset, spec.nbytes), digest
                )
            )
            offset += spec.nbytes
        cut = tuple(CutLeaf(LeafSpec(f"/{n}", "F32", (5,)), 2) for n in range(number))
        files = ("tiles-00001.safetensors",) if cut else ()
        state = StoredState(f"s{number}", draw(json_values), StoredLeaves.of(leaves))
        states.append(replace(state, cut=cut, files=files))
    stream = draw(st.binary(max_size=70))
    states.append(
        StoredState.of_stream(
            "x", Extent("x.bin", 0, len(stream)), Digest.of(stream, BLOCK)
        )
    )
    return Manifest(
        generation=draw(st.integers(0, NUMBER_MAX)),
        step=draw(st.integers(-NUMBER_MAX, NUMBER_MAX)),
        time=draw(st.floats(0, 1e10)),
        job="9f3c2a61b07e",
        size=draw(st.integers(1, 2**31 - 1)),
        metrics=draw(st.dictionaries(st.just("loss"), st.floats(), max_size=1)),
        block_bytes=BLOCK,
        files=(
            StoredFile("rank-00000.safetensors", offset, 32, HEADER, 1),
            StoredFile("x.bin", len(stream), 0, digest_bytes(b""), 0),
            StoredFile("tiles-00001.safetensors", 60, 20, HEADER, 1),
        ),
        states=tuple(states),
    )


def same(manifest: Manifest, other: Manifest) -> bool:
    """Compare manifests; a NaN is the same as a NaN."""
    return repr(manifest) == repr(other)


@given(manifests())
def test_manifest_is_read_as_it_was_written(manifest):
    data = encode(manifest)
    assert same(decode(data), manifest)
    assert encode(decode(data)) == data


@given(manifests())
def test_manifest_is_plain_json_with_its_digest_last(manifest):
    data = encode(manifest)
    document = json.loads(data, parse_constant=lambda name: pytest.fail(name))
    assert list(document)[:2] == ["format", "version"]
    assert list(document)[-1] == "digest"
    assert sealed(data[:-46]) == data


def small() -> Manifest:
    leaf = StoredLeaf(
        LeafSpec("w", "F32", (2, 2)),
        Extent("rank-00000.safetensors", 32, 16),
        Digest.of(bytes(16), 4),
    )
    return Manifest(
        generation=1,
        step=2,
        time=3.5,
        job="job",
        size=4,
        metrics={"loss": math.nan},
        block_bytes=4,
        files=(
            StoredFile("rank-00000.safetensors", 48, 32, HEADER, 1),
            StoredFile("x.bin", 3, 0, digest_bytes(b""), 1),
        ),
        states=(
            StoredState("model", {"ties": {}}, StoredLeaves.of([leaf])),
            StoredState.of_stream("x", Extent("x.bin", 0, 3), Digest.of(b"abc", 4)),
        ),
    )


def small_document() -> dict:
    document = json.loads(encode(small()))
    del document["digest"]
    return document


def test_every_flipped_byte_is_seen():
    data = encode(small())
    for position in range(len(data)):
        for flip in (0x01, 0x20, 0x80, 0xFF):
            changed = bytearray(data)
            changed[position] ^= flip
            with pytest.raises(ValueError, match="own digest"):
                decode(bytes(changed))


def test_every_truncation_and_every_addition_is_seen():
    data = encode(small())
    for length in range(len(data)):
        with pytest.raises(ValueError, match="own digest"):
            decode(data[:length])
    for changed in (data + b"\n", b" " + data, data + data):
        with pytest.raises(ValueError, match="own digest"):
            decode(changed)


HUGE = 10**400
WRONG_INTEGERS = [
    True,
    False,
    1.0,
    1.5,
    "1",
    None,
    [],
    {},
    [1],
    HUGE,
    -HUGE,
    2**63,
    math.nan,
]
PATHS_OF_INTEGERS = [
    ("generation",),
    ("step",),
    ("size",),
    ("block_bytes",),
    ("files", 0, "bytes"),
    ("files", 0, "header_bytes"),
    ("files", 0, "generation"),
    ("states", 0, "leaves", 0, "offset"),
    ("states", 0, "leaves", 0, "bytes"),
    ("states", 0, "leaves", 0, "shape", 0),
    ("states", 1, "stream", "offset"),
    ("states", 1, "stream", "bytes"),
]
PATHS_OF_TEXT = [
    ("format",),
    ("digest_algorithm",),
    ("job",),
    ("files", 0, "name"),
    ("files", 0, "header_digest"),
    ("states", 0, "name"),
    ("states", 0, "leaves", 0, "name"),
    ("states", 0, "leaves", 0, "dtype"),
    ("states", 0, "leaves", 0, "file"),
    ("states", 0, "leaves", 0, "digest"),
    ("states", 0, "leaves", 0, "blocks"),
]
PATHS_OF_LISTS = [
    ("files",),
    ("states",),
    ("states", 0, "leaves"),
    ("states", 0, "leaves", 0, "shape"),
]
PATHS_OF_OBJECTS = [
    ("metrics",),
    ("files", 0),
    ("states", 0),
    ("states", 0, "leaves", 0),
    ("states", 1, "stream"),
]


def cut_document() -> dict:
    """Return a manifest of version 2: the small one with two cut leaves in two files."""
    document = json.loads(encode(cut_manifest()))
    del document["digest"]
    return document


def cut_manifest() -> Manifest:
    names = ("tiles-00000.safetensors", "tiles-00003.safetensors")
    files = tuple(StoredFile(name, 4100, 4096, HEADER, 1) for name in names)
    rho = CutLeaf(LeafSpec("rho", "F32", (3, 4)), 3)
    none = CutLeaf(LeafSpec("none", "U8", (0, 4)), 0)
    first, *others = small().states
    states = (replace(first, cut=(rho, none), files=names), *others)
    return replace(small(), files=small().files + files, states=states)


def replaced(path: tuple, value: object, whole: dict | None = None) -> dict:
    document = copy.deepcopy(whole or small_document())
    node = document
    for key in path[:-1]:
        node = node[key]
    node[path[-1]] = value
    return document


def refuse(data: bytes, match: str | None = None) -> None:
    """Require a ValueError for bytes whose digest is right."""
    with pytest.raises((ValueError, UnsupportedFormatError), match=match):
        decode(data)


def test_the_document_that_the_cases_below_break_is_whole():
    assert same(decode(sealed_document(small_document())), small())


@pytest.mark.parametrize("path", PATHS_OF_INTEGERS, ids=str)
def test_integers_of_another_kind_or_size_are_refused(path):
    for value in WRONG_INTEGERS:
        refuse(sealed_document(replaced(path, value)))
    if path != ("step",):
        refuse(sealed_document(replaced(path, -1)))


@pytest.mark.parametrize("path", PATHS_OF_TEXT, ids=str)
def test_text_of_another_kind_is_refused(path):
    for value in (1, True, None, 1.5, [], {}, ["a"], {"a": 1}):
        refuse(sealed_document(replaced(path, value)))


@pytest.mark.parametrize("path", PATHS_OF_LISTS, ids=str)
def test_what_should_be_a_list_and_is_not_is_refused(path):
    for value in ("", "ab", {}, {"a": 1}, 0, None, True, 1.5):
        refuse(sealed_document(replaced(path, value)))


@pytest.mark.parametrize("path", PATHS_OF_OBJECTS, ids=str)
def test_what_should_be_an_object_and_is_not_is_refused(path):
    for value in ("", "name", "stream", [], [["name", 1]], 0, None, True, 1.5):
        refuse(sealed_document(replaced(path, value)))


@pytest.mark.parametrize("value", [True, "soon", None, [], HUGE, -HUGE, math.nan, math.inf])
def test_times_that_are_no_number_are_refused(value):
    refuse(sealed_document(replaced(("time",), value)))


@pytest.mark.parametrize("value", [True, "low", "NaN", "infinity", None, [], {}, HUGE])
def test_metrics_that_are_no_number_are_refused(value):
    refuse(sealed_document(replaced(("metrics", "loss"), value)))


def test_number_too_large_for_a_float_is_refused():
    data = json.dumps(replaced(("time",), 7)).replace('"time": 7', '"time": 1e999')
    refuse(sealed(data.encode()[:-1]), "out of range")


@pytest.mark.parametrize(
    "path", [*PATHS_OF_INTEGERS, *PATHS_OF_TEXT, ("metrics",), ("time",)]
)
def test_missing_members_are_refused(path):
    document = small_document()
    node = document
    for key in path[:-1]:
        node = node[key]
    del node[path[-1]]
    refuse(sealed_document(document))


@pytest.mark.parametrize("document", [None, True, 1, "text", [], [{}], {}], ids=repr)
def test_documents_of_another_kind_are_refused(document):
    data = json.dumps(document).encode()
    refuse(sealed(data))
    refuse(sealed(data[:-1]))


@pytest.mark.parametrize("version", [4, 10**9, 0, -1, "1", True, 1.0, None, [1]], ids=repr)
def test_other_versions_are_named(version):
    with pytest.raises(UnsupportedFormatError, match="reads 'mpi_ckpt' versions 1 to 3"):
        decode(sealed_document(replaced(("version",), version)))


def test_only_cut_leaves_make_a_manifest_of_version_2():
    assert json.loads(encode(small()))["version"] == 1
    assert json.loads(encode(cut_manifest()))["version"] == 2
    golden = (GOLDEN / "manifest.json").read_bytes()
    assert encode(decode(golden)) == golden


def test_cut_leaves_are_encoded_as_the_document_says():
    assert same(decode(encode(cut_manifest())), cut_manifest())
    state = cut_document()["states"][0]
    assert list(state) == ["name", "structure", "leaves", "cut", "tile_files"]
    assert state["cut"][0] == {
        "name": "rho",
        "dtype": "F32",
        "shape": [3, 4],
        "tiles": 3,
    }
    assert state["tile_files"] == ["tiles-00000.safetensors", "tiles-00003.safetensors"]


@pytest.mark.parametrize(
    ("path", "value", "fault"),
    [
        (("cut",), {}, "no list"),
        (("cut",), None, "no list"),
        (("cut",), [], "files without tiles"),
        (("cut", 0), 5, "wrong kind"),
        (("cut", 0, "name"), "w", "lists a leaf twice"),
        (("cut", 0, "name"), "none", "lists a leaf twice"),
        (("cut", 0, "name"), 5, "no text"),
        (("cut", 0, "dtype"), "F31", "unknown dtype"),
        (("cut", 0, "shape"), [3.0], "no integer"),
        (("cut", 0, "tiles"), -1, "out of range"),
        (("cut", 0, "tiles"), True, "no integer"),
        (("cut", 0, "tiles"), 0, "has 0 tiles"),
        (("cut", 1, "tiles"), 1, "has 1 tiles"),
        (("tile_files",), [], "tiles without files"),
        (("tile_files",), "tiles-00000.safetensors", "no list"),
        (("tile_files", 1), "tiles-00000.safetensors", "file of tiles twice"),
        (("tile_files", 1), "tiles-00001.safetensors", "lacks"),
        (("tile_files", 1), ["tiles-00000.safetensors"], "no text"),
        (("tile_files", 1), "rank-00000.safetensors", "has leaves and tiles"),
    ],
)
def test_cut_leaves_that_break_a_rule_are_refused(path, value, fault):
    document = replaced(("states", 0, *path), value, cut_document())
    refuse(sealed_document(document), fault)


@pytest.mark.parametrize("key", ["name", "dtype", "shape", "tiles"])
def test_cut_leaves_that_lack_a_member_are_refused(key):
    document = cut_document()
    del document["states"][0]["cut"][0][key]
    refuse(sealed_document(document), f"lacks '{key}'")
    document = cut_document()
    del document["states"][0]["tile_files"]
    refuse(sealed_document(document), "lacks 'tile_files'")


def test_version_1_has_no_cut_leaves():
    document = replaced(("version",), 1, cut_document())
    assert decode(sealed_document(document)).states == small().states


def test_other_formats_are_named():
    with pytest.raises(UnsupportedFormatError, match="'orbax'"):
        decode(sealed_document(replaced(("format",), "orbax")))


def test_newer_version_is_told_before_its_contents_are_looked_at():
    with pytest.raises(UnsupportedFormatError, match="version 7"):
        decode(sealed_document({"format": "mpi_ckpt", "version": 7, "new": [1]}))


def test_bytes_that_are_no_json_are_refused():
    for head in (
        b"",
        b"{",
        b"[1",
        b'{"a":1}',
        b'{"a":{"b":1',
        b"\x00",
        b"\x80\x04K\x01.",
        b'\xef\xbb\xbf{"format":"mpi_ckpt"',
        b'{"a":"\xff"',
        b'{"a":"\xed\xa0\x80"',
        '{"a":1'.encode("utf-16"),
        b'{"a":NaN',
        b'{"a":-Infinity',
        b'{"a":' + b"9" * 5000,
        b'{"a":' + b"9" * 100_000,
        b'{"a":' + b"[" * 100_000,
        b'{"a":' + b'{"a":' * 100_000,
        b'{"a":' + b"[" * 500 + b"]" * 500,
    ):
        with pytest.raises((ValueError, UnsupportedFormatError)):
            decode(sealed(head))


@pytest.mark.parametrize(
    "path", [("job",), ("files", 0, "name"), ("states", 0, "name"), ("step",)]
)
def test_deep_nesting_in_place_of_a_value_is_refused(path):
    for depth in (900, 985, 2000):
        text = json.dumps(replaced(path, "HERE"))
        text = text.replace('"HERE"', "[" * depth + "]" * depth)
        refuse(sealed(text.encode()[:-1]))


def test_keys_that_come_twice_are_refused():
    text = json.dumps(small_document())
    for again in ('"step": 2, "step": 3', '"step": 2, "st\\u0065p": 2'):
        changed = text.replace('"step": 2', again)
        assert changed != text
        refuse(sealed(changed.encode()[:-1]), "twice")
    refuse(sealed(text[:-1].encode() + b',"digest":"x"'), "twice")


@pytest.mark.parametrize(
    "name",
    ["../x.bin", "/x.bin", "a/b", "..", "", "x\0.bin", "x\n", "x" * 256, "x y.bin", "..x"],
)
def test_file_names_that_lead_out_are_refused(name):
    refuse(sealed_document(replaced(("files", 1, "name"), name)), "not a file name")


@pytest.mark.parametrize("name", ["", "../x", "/x", "a/../b", "x" * 300, "nul\0", "\ud800"])
def test_state_names_that_no_state_can_have_are_refused(name):
    refuse(sealed_document(replaced(("states", 1, "name"), name)), "state name|surrogate")


def test_states_and_files_and_leaves_that_come_twice_are_refused():
    document = small_document()
    document["states"].append(copy.deepcopy(document["states"][1]))
    refuse(sealed_document(document), "twice")
    document["states"][-1]["name"] = "X"
    refuse(sealed_document(document), "case")
    document = small_document()
    document["files"].append(document["files"][0])
    refuse(sealed_document(document), "listed twice")
    document = small_document()
    document["states"][0]["leaves"] *= 2
    refuse(sealed_document(document), "lists a leaf twice")


@pytest.mark.parametrize("dtype", ["f32", "O", "", "numpy:|O8", "numpy:>f8", "numpy:|S0"])
def test_unknown_dtypes_are_refused(dtype):
    refuse(sealed_document(replaced(("states", 0, "leaves", 0, "dtype"), dtype)), "dtype")


@pytest.mark.parametrize(
    "shape", [[4, 2], [2], [], [0, 4], [2, 2, 2], [1] * 65, [2**60] * 4]
)
def test_shapes_that_do_not_give_the_length_are_refused(shape):
    refuse(sealed_document(replaced(("states", 0, "leaves", 0, "shape"), shape)))


def test_leaves_outside_their_file_are_refused():
    for offset in (31, 0, 33, 48, 2**60):
        path = ("states", 0, "leaves", 0, "offset")
        refuse(sealed_document(replaced(path, offset)), "outside")
    refuse(sealed_document(replaced(("files", 0, "bytes"), 47)), "outside")
    refuse(sealed_document(replaced(("files", 0, "header_bytes"), 49)), "beyond its end")
    refuse(sealed_document(replaced(("states", 1, "stream", "file"), "y.bin")), "lacks")


def test_headers_larger_than_any_writer_makes_are_refused():
    document = replaced(("files", 0, "header_bytes"), 2**40)
    document["files"][0]["bytes"] = 2**41
    refuse(sealed_document(document), "out of range")


def test_overlapping_leaves_are_refused():
    document = small_document()
    leaf = copy.deepcopy(document["states"][0]["leaves"][0])
    document["files"][0]["bytes"] = 100
    document["states"][0]["leaves"].append({**leaf, "name": "v", "offset": 32 + 15})
    refuse(sealed_document(document), "overlap")
    document["states"][0]["leaves"][1]["offset"] = 32 + 16
    assert len(decode(sealed_document(document)).states[0].leaves) == 2


def test_leaves_of_two_states_that_overlap_are_refused():
    document = small_document()
    document["states"][1]["stream"].update(file="rank-00000.safetensors", offset=40)
    refuse(sealed_document(document), "overlap")


def test_empty_leaf_inside_another_is_refused():
    document = small_document()
    nothing = {
        "name": "none",
        "dtype": "F32",
        "shape": [0],
        "file": "rank-00000.safetensors",
        "offset": 40,
        "bytes": 0,
        "digest": digest_bytes(b"").hex(),
    }
    document["states"][0]["leaves"].append(nothing)
    refuse(sealed_document(document), "overlap")
    for border in (32, 48):
        nothing["offset"] = border
        decode(sealed_document(document))


@pytest.mark.parametrize("count", [0, 1, 3, 5])
def test_wrong_number_of_block_digests_is_refused(count):
    path = ("states", 0, "leaves", 0, "blocks")
    refuse(sealed_document(replaced(path, "00" * 16 * count)), "number of blocks")
    refuse(sealed_document(replaced(("block_bytes",), 8)), "number of blocks")


def test_block_digests_that_do_not_give_the_digest_are_refused():
    path = ("states", 0, "leaves", 0, "blocks")
    refuse(sealed_document(replaced(path, "00" * 64)), "do not match")
    refuse(sealed_document(replaced(("states", 0, "leaves", 0, "digest"), "00" * 16)))


@pytest.mark.parametrize("digest", ["", "00", "00" * 15, "00" * 17, "zz" * 16, "0" * 31])
def test_digests_of_another_length_or_alphabet_are_refused(digest):
    refuse(sealed_document(replaced(("files", 0, "header_digest"), digest)))
    refuse(sealed_document(replaced(("states", 1, "stream", "digest"), digest)))


def test_unknown_digest_algorithm_is_refused():
    refuse(sealed_document(replaced(("digest_algorithm",), "crc32")), "algorithm")


@given(st.binary(max_size=300))
def test_rubbish_with_a_right_digest_is_refused(head):
    refuse(sealed(head))


PARTS = [
    (),
    ("files", 0),
    ("states", 0),
    ("states", 0, "leaves", 0),
    ("states", 1, "stream"),
]
CUT_PARTS = [("states", 0), ("states", 0, "cut", 0), ("states", 0, "cut", 1)]


@given(st.data())
def test_any_json_in_place_of_any_value_is_refused_or_read(data):
    parts, whole = data.draw(
        st.sampled_from([(PARTS, small_document()), (CUT_PARTS, cut_document())])
    )
    document = copy.deepcopy(whole)
    node = document
    for key in data.draw(st.sampled_from(parts)):
        node = node[key]
    node[data.draw(st.sampled_from(sorted(node)))] = data.draw(json_values)
    try:
        manifest = decode(sealed_document(document))
    except (ValueError, UnsupportedFormatError):
        return
    assert same(decode(encode(manifest)), manifest)


@pytest.mark.parametrize("step", [1.5, True, "7", None, 2**63])
def test_steps_that_could_not_be_read_are_not_written(step):
    broken = Manifest(generation=1, step=step, time=0.0, job="", size=1)
    with pytest.raises(ValueError, match=r"is no integer|out of range"):
        encode(broken)


@pytest.mark.parametrize("value", [math.nan, math.inf, [{"deep": -math.inf}]])
def test_structures_that_could_not_be_read_are_not_written(value):
    states = (StoredState("s", value),)
    with pytest.raises(ValueError, match="JSON"):
        encode(Manifest(generation=1, step=0, time=0.0, job="", size=1, states=states))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 0.1, -0.0, 3])
def test_metrics_of_any_value_are_read_as_written(value):
    manifest = Manifest(
        generation=1, step=0, time=0.0, job="", size=1, metrics={"m": value}
    )
    assert repr(decode(encode(manifest)).metrics["m"]) == repr(float(value))


def test_names_that_no_reader_would_take_are_not_written():
    place = Extent("a.bin", 0, 0), Digest.of(b"")
    noted = {"generation": 1, "step": 0, "time": 0.0, "job": "", "size": 1}
    for names in (["a", "a"], ["Model", "model"]):
        states = tuple(StoredState.of_stream(name, *place) for name in names)
        with pytest.raises(ValueError, match="collide"):
            encode(Manifest(states=states, **noted))
    leaf = StoredLeaf(LeafSpec(5, "U8", (0,)), *place)
    with pytest.raises(ValueError, match="is no text"):
        encode(Manifest(states=(StoredState("a", None, StoredLeaves.of([leaf])),), **noted))
    with pytest.raises(ValueError, match="is no text"):
        encode(Manifest(metrics={5: 0.5}, **noted))
