# SPDX-License-Identifier: Apache-2.0
"""Bad generations: a name, how it is made of a good one, and what is to come of it.

Every one that changes the manifest gives it a right digest again: whoever can write there
can do that too, so the digest is no defence and what stands behind it is.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import tarfile
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from mpi_ckpt.leaves.digest import Digest, digest_bytes
from tests.hostile.world import (
    MANIFEST,
    MARKER,
    SHARD,
    STREAM,
    Payload,
    change_document,
    change_text,
    file_of,
    leaf_of,
    make_socket,
    replace_file,
    stream_of,
)
from tests.making import document_of, sealed

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

FALLBACK = "fallback"
"""The generation is set aside, with the reason; the one before it is restored."""
REFUSED = "refused"
"""Of a newer format, or more than there is memory: an error, and nothing is given up, as
going back would lose work in silence."""
MISMATCH = "mismatch"
"""A generation of another program: an error that lists it, nothing is changed."""
TAKEN = "taken"
"""It is none of our business, or harmless: the generation is restored."""


@dataclass(frozen=True)
class Case:
    """One bad input.

    Attributes:
        name: What is wrong.
        make: Makes it of a good generation, given its directory.
        outcome: What a restore does.
        verifies: Whether `mpi-ckpt verify` finds the generation good.
        large: Whether a file is so long that reading all of it takes its time.
    """

    name: str
    make: Callable[[Path], object]
    outcome: str = FALLBACK
    verifies: bool = False
    large: bool = False


def _file(name: str, data: Callable[[Path], bytes], *, listed: bool = False):
    def make(path: Path) -> None:
        replace_file(path / name, data(path), listed=listed)

    return make


def _sealed(head: bytes):
    return lambda path: (path / MANIFEST).write_bytes(sealed(head))


def _said(change: Callable[[dict], object]):
    return partial(change_document, change=change)


def _leaf(**members: Any):
    return _said(lambda document: leaf_of(document).update(members))


def _text(old: str, new: str):
    return partial(change_text, old=old, new=new)


def _top(**members: Any):
    return _said(lambda document: document.update(members))


def _without(*keys: str):
    def change(document: dict) -> None:
        for key in keys:
            del document[key]

    return _said(change)


def _pickle(path: Path) -> bytes:
    return pickle.dumps(Payload(str(path.parent.parent / MARKER)))


def _same_size(data: bytes, path: Path, name: str = SHARD) -> bytes:
    size = (path / name).stat().st_size
    return data.ljust(size, b"\0")[:size]


def _npy(path: Path) -> bytes:
    file = io.BytesIO()
    content = np.array([Payload(str(path.parent.parent / MARKER))], object)
    np.save(file, content, allow_pickle=True)
    return _same_size(file.getvalue(), path)


def _zip(path: Path) -> bytes:
    file = io.BytesIO()
    np.savez(file, w=np.ones(4))
    return _same_size(file.getvalue(), path)


def _tar(path: Path) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        member = tarfile.TarInfo("../../" + MARKER)
        archive.addfile(member, io.BytesIO())
    return _same_size(file.getvalue(), path)


CODE = [
    Case("pickle for a manifest", _file(MANIFEST, _pickle)),
    Case("pickle for a manifest, digest right", lambda path: _sealed(_pickle(path))(path)),
    Case("pickle for a shard", _file(SHARD, lambda path: _same_size(_pickle(path), path))),
    Case("pickle for a stream", _file(STREAM, _pickle)),
    Case("npy of objects for a shard", _file(SHARD, _npy)),
    Case("zip for a shard", _file(SHARD, _zip)),
    Case("tar for a shard", _file(SHARD, _tar)),
    Case("tar for a shard, header's digest right", _file(SHARD, _tar, listed=True)),
    Case(
        "class path as a state's kind",
        _said(lambda d: d["states"][0].update(type="os.system", cls="posix.system")),
        TAKEN,
        verifies=True,
    ),
    Case(
        "unknown kind of value in a structure",
        _said(lambda d: d["states"][1]["structure"].update(x={"~": "os.system"})),
        MISMATCH,
        verifies=True,
    ),
    Case(
        "__class__ in a structure",
        _said(lambda d: d["states"][1]["structure"].update(__class__="os.system")),
        TAKEN,
        verifies=True,
    ),
    Case(
        "pickled object for a state that takes none",
        _said(
            lambda d: d["states"][1].update(
                structure={"pickled": {"~": "bytes", "text": "gAROLg=="}}, leaves=[]
            )
        ),
        MISMATCH,
        verifies=True,
    ),
    Case("YAML tag", _sealed(b"!!python/object/apply:os.system ['true']")),
    *(
        Case(f"dtype {dtype}", _leaf(dtype=dtype))
        for dtype in (
            *("O", "V8", "U", "S", "object", "numpy:|O8", "numpy:|V0", "numpy:<U0"),
            *("[('a', 'O')]", "{'names':['a'],'formats':['O']}", "numpy:<U9999999"),
            *("F4", "I4", "U1", "numpy:>f8", ">f8", "f32", "", "F32 "),
        )
    ),
]

HUGE_LENGTH = 1 << 40


def _whole_text(path: Path) -> bytes:
    return json.dumps(document_of(path)).encode()


def _million_leaves(path: Path) -> None:
    document = document_of(path)
    text = json.dumps(document, separators=(",", ":"))
    leaf_text = json.dumps(leaf_of(document), separators=(",", ":"))
    start, end = text.split(leaf_text, 1)
    leaves = b",".join([leaf_text.encode()] * 1_000_000)
    (path / MANIFEST).write_bytes(sealed(start.encode() + leaves + end.encode()[:-1]))


def _sparse_stream(path: Path) -> None:
    change_document(path, _claim_stream)
    os.truncate(path / STREAM, HUGE_LENGTH)


def _claim_stream(document: dict) -> None:
    blocks = [digest_bytes(b"")] * (HUGE_LENGTH // document["block_bytes"])
    file_of(document, STREAM)["bytes"] = HUGE_LENGTH
    stream_of(document).update(
        bytes=HUGE_LENGTH,
        digest=Digest(tuple(blocks)).whole.hex(),
        blocks=b"".join(blocks).hex(),
    )


SIZE = [
    *(
        Case(f"{count} bytes of {name}", _file(name, lambda _, n=count: b"7" * n))
        for name in (MANIFEST, SHARD, STREAM)
        for count in (0, 7)
    ),
    Case("first words of a manifest alone", _sealed(b'{"format":"mpi_ckpt","version":1')),
    Case("another format", _top(format="orbax"), REFUSED),
    Case("a future version", _top(version=4), REFUSED),
    Case("a version that is true", _top(version=True), REFUSED),
    *(
        Case(
            f"header length {length:#x}",
            _file(SHARD, lambda p, n=length: n.to_bytes(8, "little") + b"{}".ljust(4088)),
        )
        for length in (0, 4096, 100_000_001, 1 << 63, (1 << 64) - 1)
    ),
    Case(
        "header longer than any",
        _said(lambda d: file_of(d, SHARD).update(bytes=1 << 41, header_bytes=1 << 40)),
    ),
    Case(
        "header no UTF-8",
        _file(SHARD, lambda p: _same_size(b"\xf8" + b"\0" * 7 + b"\xff{", p)),
    ),
    Case("manifest no UTF-8", _sealed(b'{"format":"\xff\xfe"')),
    Case(
        "manifest in UTF-16", lambda p: _sealed(_whole_text(p).decode().encode("utf-16"))(p)
    ),
    Case("not JSON", _sealed(b"{'format': 'mpi_ckpt'")),
    *(
        Case(f"{text.decode()} at the top", _sealed(text[:-1]))
        for text in (b"[]", b'"mpi_ckpt"', b"null", b"[{}]", b"17")
    ),
    Case("100,000 brackets", _sealed(b'{"a":' + b"[" * 100_000)),
    Case("100,000 brackets, closed", _sealed(b'{"a":' + b"[" * 100_000 + b"]" * 100_000)),
    Case("100,000 braces", _sealed(b'{"a":' * 100_000)),
    Case("integer of 100,000 digits", _text('"step":2', '"step":' + "9" * 100_000)),
    Case("number of 100,000 digits", _text('"step":2', '"step":0.' + "9" * 100_000)),
    Case(
        "exponent of 100,000 digits",
        _text('"time":', '"time":1e' + "9" * 100_000 + ',"x":'),
    ),
    Case(
        "space before the JSON",
        lambda p: _sealed(b" " + _whole_text(p)[:-1])(p),
        TAKEN,
        True,
    ),
    Case("words before the JSON", lambda p: _sealed(b"x" + _whole_text(p)[:-1])(p)),
    Case(
        "words behind the JSON",
        lambda p: (p / MANIFEST).write_bytes((p / MANIFEST).read_bytes() + b"x"),
    ),
    Case("a second JSON behind the first", lambda p: _sealed(_whole_text(p) + b"{")(p)),
    Case("NUL before the JSON", lambda p: _sealed(b"\0" + _whole_text(p)[:-1])(p)),
    Case("NUL in text", _text('"job":"', '"job":"\0')),
    Case("byte order mark", lambda p: _sealed(b"\xef\xbb\xbf" + _whole_text(p)[:-1])(p)),
    Case("half a surrogate pair", _text('"job":"', '"job":"\\ud800')),
    Case("half a surrogate pair in a leaf's name", _text('"wide"', '"\\udfff"')),
    Case("key of the manifest twice", _text('"step":2', '"step":2,"step":1')),
    Case("key of a leaf twice", _text('"name":"wide"', '"name":"wide","name":"narrow"')),
    Case("key of a structure twice", _text('"epoch":2', '"epoch":2,"epoch":1')),
    *(
        Case(f"no {key}", _without(key))
        for key in ("step", "files", "states", "block_bytes")
    ),
    Case("a key that nobody knows", _top(more=[1, {"a": 2}]), TAKEN, True),
    Case("a million tiny leaves", _million_leaves),
]

SHAPES = [
    *(
        Case(f"shape {shape}", _leaf(shape=shape))
        for shape in (
            *(
                [-2, -3],
                [2, -3],
                [True, 6],
                [2.0, 3],
                ["2", 3],
                [2, None],
                [[2], 3],
                {"0": 2},
            ),
            *([1 << 62, 4], [1 << 63], [1 << 64, 0], [1 << 60] * 9, [2, 2], [6, 2], []),
        )
    ),
    Case("shape with Infinity", _text('"shape":[2,3]', '"shape":[Infinity,3]')),
    Case("shape with NaN", _text('"shape":[2,3]', '"shape":[NaN,3]')),
    Case(
        "a million dimensions",
        _text('"shape":[2,3]', '"shape":[2,3' + ",1" * 999_998 + "]"),
    ),
    Case("65 dimensions", _leaf(shape=[2, 3, *[1] * 63])),
    Case(
        "nothing times very much, of an array",
        _leaf(shape=[0, 1 << 60, 1 << 60], bytes=0, digest=digest_bytes(b"").hex()),
        MISMATCH,
        True,
    ),
    Case(
        "nothing times very much, of an object",
        _said(
            lambda d: leaf_of(d, "object").update(
                shape=[0, 1 << 60, 1 << 60], bytes=0, digest=digest_bytes(b"").hex()
            )
        ),
        MISMATCH,
        True,
    ),
    *(
        Case(f"offset {offset}", _leaf(offset=offset))
        for offset in (0, -1, 4095, 1.5, 4096.0, "4096", True, None, 1 << 63, 1 << 60)
    ),
    *(
        Case(f"offset {name}", _text('"offset":4096', f'"offset":{name}'))
        for name in ("NaN", "Infinity", "1e400", "4096e0")
    ),
    *(Case(f"{count} bytes", _leaf(bytes=count)) for count in (-48, 0, 47, 49, 1 << 62)),
    Case(
        "end before the start", _said(lambda d: stream_of(d).update(offset=40, bytes=-40))
    ),
    Case("beyond the end of the file", _said(lambda d: stream_of(d).update(offset=1))),
    Case(
        "two leaves in one place",
        _said(lambda d: leaf_of(d).update(offset=leaf_of(d, "object")["offset"])),
    ),
    Case("file larger than listed", lambda p: os.truncate(p / SHARD, 1 << 20)),
    Case("file behind the file", lambda p: _append(p / SHARD, b"PK\x05\x06" + bytes(18))),
    Case("hole between leaves", _said(lambda d: d["states"].pop(1)), MISMATCH, True),
    Case(
        "4 TiB declared", _said(lambda d: leaf_of(d).update(shape=[1 << 39], bytes=1 << 42))
    ),
    Case(
        "4 TiB declared, of file too",
        _said(
            lambda d: (
                leaf_of(d).update(shape=[1 << 39], bytes=1 << 42),
                file_of(d, SHARD).update(bytes=1 << 43),
            )
        ),
    ),
    Case("sparse file of 1 TiB", _sparse_stream, REFUSED, large=True),
    Case("sparse file of 1 TiB, unlisted", lambda p: os.truncate(p / STREAM, HUGE_LENGTH)),
    Case("no block length", _top(block_bytes=0)),
    Case("block length of 1 EiB", _top(block_bytes=1 << 60)),
    Case("blocks of one byte", _top(block_bytes=1)),
]


def _append(path: Path, data: bytes) -> None:
    path.write_bytes(path.read_bytes() + data)


def _named_state(name: object):
    return _said(lambda d: d["states"][2].update(name=name))


def _named_leaf(name: str):
    return _said(lambda d: leaf_of(d).update(name=name))


def _named_file(name: object):
    def change(document: dict) -> None:
        file_of(document, STREAM)["name"] = name
        stream_of(document)["file"] = name

    return _said(change)


def _add_state(name: str):
    def change(document: dict) -> None:
        empty = {
            "file": STREAM,
            "offset": 40,
            "bytes": 0,
            "digest": digest_bytes(b"").hex(),
        }
        document["states"] += [{"name": part, "stream": empty} for part in name.split("|")]

    return _said(change)


NAMES = [
    *(
        Case(f"state called {name!r:.30}", _named_state(name))
        for name in (
            *("../../x", "/etc/passwd", "a/../b", "nul\0", "", ".", "..", "x" * 300, " "),
            *(
                "line\nbreak",
                "escape\x1b[2J",
                "\ud800",
                "x" * 10_000_000,
                7,
                None,
                ["plain"],
            ),
        )
    ),
    Case("state called *", _named_state("*"), MISMATCH, True),
    *(
        Case(f"leaf called {name!r:.30}", _named_leaf(name), MISMATCH, True)
        for name in (
            *("../../x", "/etc/passwd", "nul\0", "", ".", "..", "x" * 300, "[a-z]*"),
            *(
                "line\nbreak\n",
                "\x1b[2J\x1b]0;title\x07",
                "[red]markup[/red]",
                "\u202ereverse",
            ),
        )
    ),
    Case("two states but for case", _add_state("Plain")),
    Case("two states but for form", _add_state("\u00e9|e\u0301")),
    Case("one state twice", _add_state("plain")),
    *(
        Case(f"file called {name!r:.30}", _named_file(name))
        for name in (
            *(
                "../plain.bin",
                "/etc/passwd",
                "a/b.bin",
                "..",
                ".",
                "",
                "nul\0.bin",
                "a\n.bin",
            ),
            *("../checkpoint-00000001/plain.bin", "x" * 300, "*", "pl?in.bin", 7, None),
        )
    ),
    Case("manifest as a file of itself", _named_file(MANIFEST)),
    Case("leaf in a file that is not listed", _leaf(file="rank-00001.safetensors")),
]


def _replaced(name: str, put: Callable[[Path, Path], object]):
    """Move a file out of the checkpoint directory, and put something in its place."""

    def make(path: Path) -> None:
        kept = path.parent.parent / f"kept-{name}"
        (path / name).rename(kept)
        put(path / name, kept)

    return make


def _linked_generation(path: Path) -> None:
    kept = path.parent.parent / "kept"
    path.rename(kept)
    path.symlink_to(kept)


def _instead(put: Callable[[Path], object]):
    def make(path: Path) -> None:
        shutil.rmtree(path)
        put(path)

    return make


KINDS = [
    *(
        Case(f"{name} is {kind}", _replaced(name, put))
        for name in (MANIFEST, SHARD, STREAM)
        for kind, put in {
            "a link out of the directory": lambda file, kept: file.symlink_to(kept),
            "a dangling link": lambda file, _: file.symlink_to("nowhere"),
            "a link to itself": lambda file, _: file.symlink_to(file.name),
            "a link to a device": lambda file, _: file.symlink_to("/dev/zero"),
            "a FIFO": lambda file, _: os.mkfifo(file),
            "a directory": lambda file, _: file.mkdir(),
            "a socket": lambda file, _: make_socket(file),
        }.items()
    ),
    Case("generation is a link", _linked_generation),
    Case(
        "generation is a dangling link", _instead(lambda path: path.symlink_to("nowhere"))
    ),
    Case(
        "generation is a link to itself", _instead(lambda path: path.symlink_to(path.name))
    ),
    Case(
        "generation is a link to its neighbour",
        _instead(lambda path: path.symlink_to("checkpoint-00000001")),
    ),
    Case("generation is a file", _instead(lambda path: path.write_bytes(b"x"))),
    Case("generation is a FIFO", _instead(os.mkfifo)),
    Case("generation is a socket", _instead(make_socket)),
    Case("generation is empty", _instead(lambda path: path.mkdir())),
    Case(
        "file has a second name elsewhere",
        lambda path: os.link(path / SHARD, path.parent.parent / "theirs"),
        TAKEN,
        True,
    ),
]


def _from_first(name: str):
    return lambda path: shutil.copy(path.parent / "checkpoint-00000001" / name, path / name)


def _swap_places(document: dict) -> None:
    wide, seen = leaf_of(document), leaf_of(document, "object")
    wide["offset"], seen["offset"] = seen["offset"], wide["offset"]


def _changed_byte(path: Path) -> None:
    data = bytearray((path / STREAM).read_bytes())
    data[20] ^= 1
    (path / STREAM).write_bytes(data)


CONSISTENCY = [
    Case("shard of another step", _from_first(SHARD)),
    Case("stream of another step", _from_first(STREAM)),
    Case("manifest of another step", _from_first(MANIFEST)),
    Case(
        "shard and stream swapped",
        lambda p: (
            (p / SHARD).rename(p / "x"),
            (p / STREAM).rename(p / SHARD),
            (p / "x").rename(p / STREAM),
        ),
    ),
    Case("leaves swapped", _said(_swap_places)),
    *(
        Case(f"no {name}", lambda p, n=name: (p / n).unlink())
        for name in (MANIFEST, SHARD, STREAM)
    ),
    Case(
        "a file too many",
        lambda p: (p / "rank-00001.safetensors").write_bytes(b"x"),
        TAKEN,
        True,
    ),
    Case(
        "a directory too many",
        lambda p: (p / "more" / "..." / "x").mkdir(parents=True),
        TAKEN,
        True,
    ),
    Case("saved by 4 ranks", _top(size=4), TAKEN, True),
    *(
        Case(f"saved by {size} ranks", _top(size=size))
        for size in (0, -1, 1 << 31, True, "four", 1.0)
    ),
    Case("step -1", _top(step=-1), TAKEN, True),
    *(
        Case(f"step {step!r}", _top(step=step))
        for step in (1 << 64, "1e3", True, 1.0, None)
    ),
    Case("step 1e3", _text('"step":2', '"step":1e3')),
    *(
        Case(f"generation {number!r}", _top(generation=number))
        for number in (1, 3, -2, True, "2")
    ),
    Case("shape turned round, digest right", _leaf(shape=[3, 2]), MISMATCH, True),
    Case("dtype of the same width, digest right", _leaf(dtype="I64"), MISMATCH, True),
    *(
        Case(f"digest {digest!r}", _leaf(digest=digest))
        for digest in ("", None, "00", "0" * 32, "0" * 34, "g" * 32, "é" * 32, [], 0)
    ),
    Case("no digest", _said(lambda d: leaf_of(d).pop("digest"))),
    Case(
        "no digest of the manifest",
        lambda p: (p / MANIFEST).write_bytes(json.dumps(document_of(p)).encode()),
    ),
    *(
        Case(f"digests by {name!r}", _top(digest_algorithm=name))
        for name in ("crc32", "none", "", None, "XXH3-128", ["xxh3-128"])
    ),
    Case("no name of the digests' algorithm", _without("digest_algorithm")),
    *(
        Case(
            f"file written by generation {number}",
            _said(lambda d, n=number: file_of(d, SHARD).update(generation=n)),
            TAKEN,
            True,
        )
        for number in (0, 2, 3, 1 << 62)
    ),
    Case(
        "file written by generation -1",
        _said(lambda d: file_of(d, SHARD).update(generation=-1)),
    ),
    Case("still being written", lambda p: os.truncate(p / STREAM, 20)),
    Case("still being written, of full length", _changed_byte),
    Case("same step as the one before", _top(step=1), TAKEN, True),
]

CASES = [*CODE, *SIZE, *SHAPES, *NAMES, *KINDS, *CONSISTENCY]
