# SPDX-License-Identifier: Apache-2.0
"""Bad files for `mpi-ckpt import`: a name, the file's, and what is in it."""

from __future__ import annotations

import io
import json
import os
import pickle
import tarfile
import zipfile
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from tests.hostile.world import MARKER, Payload

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


@dataclass(frozen=True)
class Case:
    """One bad file.

    Attributes:
        name: What is wrong.
        make: Makes it, given where.
        file: Its name; the command goes by what is in a file more than by that.
        taken: Whether it is harmless, and imported.
    """

    name: str
    make: Callable[[Path], object]
    file: str = "x.safetensors"
    taken: bool = False


ONE = {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]}
DATA = b"abcd"


def _raw(data: bytes):
    return lambda path: path.write_bytes(data)


def _header(text: bytes, data: bytes = DATA, length: int | None = None):
    count = len(text) if length is None else length
    return _raw(count.to_bytes(8, "little") + text + data)


def _entries(entries: dict[str, Any], data: bytes = DATA):
    return _header(json.dumps(entries).encode(), data)


def _tensor(**members: Any):
    return _entries({"a": {**ONE, **members}})


def _exported(states: list[Any], **said: Any):
    document = {"step": 1, "size": 1, "metrics": {}, "states": states, **said}
    return _entries({"__metadata__": {"mpi_ckpt": json.dumps(document)}, "a": ONE})


def _stream(name: object):
    return _exported([{"name": name, "stream": "a"}])


_TEXT = json.dumps({"a": ONE}).encode()
_TINY = b'"%d":{"dtype":"U8","shape":[],"data_offsets":[%d,%d]}'


def _million_tensors(path: Path) -> None:
    text = b"{" + b",".join([_TINY % (n, n, n + 1) for n in range(1_000_000)]) + b"}"
    _header(text, bytes(1_000_000))(path)


def _sparse(path: Path) -> None:
    size = 1 << 40
    _entries({"a": {"dtype": "U8", "shape": [size], "data_offsets": [0, size - 1]}})(path)
    os.truncate(path, size + 1000)


SAFETENSORS = [
    Case("nothing", _raw(b"")),
    Case("7 bytes", _raw(b"\x02\0\0\0\0\0\0")),
    Case("a length alone", _raw(b"\x02\0\0\0\0\0\0\0")),
    *(
        Case(f"header length {length:#x}", _header(_TEXT, length=length))
        for length in (0, 1, 1000, 100_000_001, 1 << 63, (1 << 64) - 1)
    ),
    Case("header not UTF-8", _header(b'{"\xff":{}}')),
    Case("header in UTF-16", _header(_TEXT.decode().encode("utf-16-le"))),
    Case("header not JSON", _header(b"{'a': 1}")),
    *(Case(f"header {text.decode()}", _header(text)) for text in (b"[]", b'"a"', b"null")),
    Case("100,000 brackets", _header(b'{"a":' + b"[" * 100_000)),
    Case("integer of 100,000 digits", _header(b'{"a":' + b"9" * 100_000 + b"}")),
    Case("space before the JSON", _header(b" " + _TEXT)),
    Case("spaces behind the JSON", _header(_TEXT + b"   "), taken=True),
    Case("words behind the JSON", _header(_TEXT + b"x")),
    Case("NUL behind the JSON", _header(_TEXT + b"\0")),
    Case("byte order mark", _header(b"\xef\xbb\xbf" + _TEXT)),
    Case("half a surrogate pair", _header(_TEXT.replace(b'"a"', b'"\\ud800"'))),
    Case("tensor twice", _header(_TEXT[:-1] + b"," + _TEXT[1:])),
    Case(
        "key of a tensor twice", _header(_TEXT.replace(b'"dtype"', b'"dtype":"I8","dtype"'))
    ),
    Case("no dtype", _entries({"a": {"shape": [4], "data_offsets": [0, 4]}})),
    Case("no shape", _entries({"a": {"dtype": "U8", "data_offsets": [0, 4]}})),
    Case("no offsets", _entries({"a": {"dtype": "U8", "shape": [4]}})),
    Case("a key that nobody knows", _tensor(more=1), taken=True),
    Case("a million tiny tensors", _million_tensors),
    *(
        Case(f"dtype {dtype}", _tensor(dtype=dtype))
        for dtype in ("O", "V8", "U", "F4", "numpy:>f8", "numpy:|O8", "", 7, None, ["U8"])
    ),
    *(
        Case(f"shape {shape}", _tensor(shape=shape))
        for shape in (
            [-4],
            [True, 4],
            [4.0],
            ["4"],
            [4, None],
            [[4]],
            {"4": 1},
            "4",
            [1 << 63, 4],
            [1 << 62, 1 << 62],
            [3],
            [],
        )
    ),
    Case("shape with NaN", _header(_TEXT.replace(b"[4]", b"[NaN]"))),
    Case(
        "a million dimensions",
        _header(_TEXT.replace(b"[4]", b"[4" + b",1" * 999_999 + b"]")),
    ),
    Case(
        "nothing times very much",
        _entries(
            {"a": {"dtype": "U8", "shape": [0, 1 << 60, 1 << 60], "data_offsets": [0, 0]}},
            b"",
        ),
        taken=True,
    ),
    *(
        Case(f"offsets {offsets}", _tensor(data_offsets=offsets))
        for offsets in (
            [-4, 0],
            [4, 0],
            [0, 5],
            [0, 3],
            [0.0, 4],
            [False, 4],
            ["0", "4"],
            [0],
            [0, 2, 4],
            [0, None],
            [1 << 62, (1 << 62) + 4],
            {"0": 4},
            4,
        )
    ),
    Case("offsets with Infinity", _header(_TEXT.replace(b"[0, 4]", b"[0, Infinity]"))),
    Case("past the end of the file", _entries({"a": ONE}, b"abc")),
    Case("two tensors in one place", _entries({"a": ONE, "b": ONE})),
    Case(
        "hole before the first", _entries({"a": {**ONE, "data_offsets": [4, 8]}}, bytes(8))
    ),
    Case(
        "hole between two",
        _entries({"a": ONE, "b": {**ONE, "data_offsets": [8, 12]}}, bytes(12)),
    ),
    Case("file behind the file", _entries({"a": ONE}, DATA + b"PK\x05\x06" + bytes(18))),
    Case("4 TiB declared", _tensor(shape=[1 << 42], data_offsets=[0, 1 << 42])),
    Case("sparse file of 1 TiB", _sparse),
    *(
        Case(f"state called {name!r:.20}", _stream(name))
        for name in (
            "../../x",
            "/etc/passwd",
            "..",
            "",
            "nul\0",
            "x" * 300,
            "\ud800",
            7,
            None,
        )
    ),
    *(
        Case(f"tensor called {name!r:.20}", _entries({name: ONE}), taken=True)
        for name in (
            "../../x",
            "/etc/passwd",
            "",
            "nul\0",
            "..",
            "x" * 300,
            "*\n[a]\x1b[2J",
        )
    ),
    Case(
        "states but for case",
        _exported([{"name": "S", "stream": "a"}, {"name": "s", "stream": "a"}]),
    ),
    Case(
        "class path as a state's kind",
        _exported([{"name": "s", "type": "os.system", "structure": None, "leaves": []}]),
        taken=True,
    ),
    *(
        Case(f"step {step!r}", _exported([], step=step))
        for step in (1 << 64, "1e3", True, 1.0, None)
    ),
    *(
        Case(f"{size!r} ranks", _exported([], size=size))
        for size in (0, -1, 1 << 31, True, "4")
    ),
    Case("metadata not JSON", _entries({"__metadata__": {"mpi_ckpt": "{"}, "a": ONE})),
    Case(
        "metadata with a key twice",
        _entries({"__metadata__": {"mpi_ckpt": '{"states":[],"states":[]}'}, "a": ONE}),
    ),
    Case(
        "metadata nested 100,000 deep",
        _entries({"__metadata__": {"mpi_ckpt": "[" * 100_000}, "a": ONE}),
    ),
    Case("metadata no object", _entries({"__metadata__": [1], "a": ONE})),
    Case("a directory", lambda path: path.mkdir()),
    Case("a FIFO", os.mkfifo),
    Case("a device", lambda path: path.symlink_to("/dev/zero")),
]


def _torch_file(value: object):
    return lambda path: torch.save(value(path) if callable(value) else value, path)


def _marker(path: Path) -> str:
    return str(path.parent / MARKER)


def _pickled(path: Path) -> None:
    path.write_bytes(pickle.dumps(Payload(_marker(path))))


def _renamed_global(path: Path) -> None:
    # Names what a list of allowed names lets pass, then calls it as something else.
    code = b"ctorch._utils\n_rebuild_tensor_v2\ncposix\nmkdir\n(V" + _marker(path).encode()
    path.write_bytes(b"\x80\x02" + code + b"\ntR.")


def _objects(path: Path) -> None:
    np.save(path, np.array([Payload(_marker(path))], object), allow_pickle=True)


def _object_archive(path: Path) -> None:
    with path.open("wb") as file:
        np.savez(file, w=np.array([Payload(_marker(path))], object))


def _tar(path: Path) -> None:
    with tarfile.open(path, "w") as archive:
        for name in ("storages", "tensors", "pickle", "../../" + MARKER):
            data = pickle.dumps(Payload(_marker(path)))
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))


def _zip_of(path: Path, change: Callable[[str, bytes], bytes], compression: int) -> None:
    made = io.BytesIO()
    torch.save({"w": torch.zeros(1000)}, made)
    with (
        zipfile.ZipFile(made) as source,
        zipfile.ZipFile(path, "w", compression) as target,
    ):
        for name in source.namelist():
            target.writestr(name, change(name, source.read(name)))


def _bomb(path: Path) -> None:
    def grow(name: str, data: bytes) -> bytes:
        return bytes(256 << 20) if name.endswith("data/0") else data

    _zip_of(path, grow, zipfile.ZIP_DEFLATED)


def _long_storage(path: Path) -> None:
    def claim(name: str, data: bytes) -> bytes:
        # 1000 elements, as a two-byte number, become 2**31 - 1, as a four-byte one.
        return (
            data.replace(b"M\xe8\x03", b"J\xff\xff\xff\x7f") if "data.pkl" in name else data
        )

    _zip_of(path, claim, zipfile.ZIP_STORED)


def _cut(path: Path) -> None:
    torch.save({"w": torch.zeros(1000)}, path)
    os.truncate(path, path.stat().st_size // 2)


TORCH = [
    Case("pickle", _pickled, "x.pt"),
    Case("pickle called safetensors", _pickled, "x.safetensors"),
    Case(
        "class in a file of torch",
        _torch_file(lambda p: {"a": Payload(_marker(p))}),
        "x.pt",
    ),
    Case("allowed name, then another", _renamed_global, "x.pt"),
    Case("npy of objects", _objects, "x.npy"),
    Case("npz of objects", _object_archive, "x.npz"),
    Case("tar of old torch", _tar, "x.pt"),
    Case("zip bomb", _bomb, "x.pt"),
    Case("tensor longer than its bytes", _long_storage, "x.pt"),
    Case("cut in the middle", _cut, "x.pt"),
    Case("YAML tag", _raw(b"!!python/object/apply:os.system ['true']"), "x.pt"),
    Case("nothing, of torch", _raw(b""), "x.pt"),
    Case(
        "sparse file of 1 TiB, of torch",
        lambda path: (path.touch(), os.truncate(path, 1 << 40)),
        "x.pt",
    ),
]


def _adaptdl(name: str, put: Callable[[Path], object]):
    def make(path: Path) -> None:
        (path / "checkpoint-0").mkdir(parents=True)
        put(path / "checkpoint-0" / name)

    return make


def _outside(path: Path) -> None:
    secret = path.parent.parent.parent / "secret"
    secret.write_bytes(b"secret")
    path.symlink_to(secret)


ADAPTDL = [
    Case("a link out of the directory", _adaptdl("model", _outside), "old"),
    Case("a FIFO for a state", _adaptdl("model", os.mkfifo), "old"),
    Case(
        "a device for a state",
        _adaptdl("model", lambda p: p.symlink_to("/dev/zero")),
        "old",
    ),
    Case("a directory for a state", _adaptdl("model", lambda p: p.mkdir()), "old"),
    Case("a name that no state can have", _adaptdl("x\ny", _raw(b"x")), "old"),
    Case("a name of no text", _adaptdl("\udcff", _raw(b"x")), "old"),
    Case(
        "names but for case",
        lambda p: (
            _adaptdl("model", _raw(b"x"))(p),
            (p / "checkpoint-0" / "Model").write_bytes(b"y"),
        ),
        "old",
    ),
    Case("a pickle", _adaptdl("model", _pickled), "old", taken=True),
    Case("no state", lambda path: (path / "checkpoint-0").mkdir(parents=True), "old"),
    Case(
        "no checkpoint", lambda path: (path / "checkpoint-foo").mkdir(parents=True), "old"
    ),
]

CASES = [*SAFETENSORS, *TORCH, *ADAPTDL]
