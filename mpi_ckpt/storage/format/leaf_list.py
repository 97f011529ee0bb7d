# SPDX-License-Identifier: Apache-2.0
"""Writes and reads the lists of leaves in a manifest: pure, and without trust in any byte.

A list has a JSON object for each leaf, and there may be hundreds of thousands: they are
written from columns, and read into columns without a Python object for each. A list that is
written otherwise than by `encode_leaves`, or that breaks a rule, is read leaf by leaf.
"""

from __future__ import annotations

import os
import re
from functools import lru_cache
from json.encoder import encode_basestring
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from mpi_ckpt.leaves.digest import DIGEST_BYTES, Digest, Digests
from mpi_ckpt.leaves.leaf import known_form
from mpi_ckpt.storage.format.manifest import (
    Extent,
    Extents,
    StoredLeaf,
    StoredLeaves,
)
from mpi_ckpt.storage.format.strict_json import (
    SIZE_MAX,
    as_digest,
    as_integer,
    as_spec,
    as_text,
    read_json,
    shown,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from mpi_ckpt.leaves.leaf import Form
    from mpi_ckpt.storage.format.manifest import StoredFile


# Built as text: a dict for each of thousands of leaves takes three times as long.
def encode_leaves(leaves: StoredLeaves) -> str:
    """Return the entries of leaves in a manifest. Not collective. Thread-safe.

    Raises:
        ValueError: On the calling rank, if a name is no text.
    """
    extents = leaves.extents
    rows = zip(
        _encode_specs(leaves.form),
        map(extents.files.__getitem__, extents.file.tolist()),
        extents.offsets.tolist(),
        extents.sizes.tolist(),
        _encode_digests(leaves.digests),
        strict=True,
    )
    return ",".join(
        [
            f'{{{spec},"file":"{file}","offset":{offset},"bytes":{nbytes},{digest}}}'
            for spec, file, offset, nbytes, digest in rows
        ]
    )


@lru_cache(maxsize=8)
def _encode_specs(form: Form) -> list[str]:
    # A form usually stays the same from save to save.
    return [
        f'"name":{encode_basestring(as_text(spec.name))},'
        f'"dtype":{encode_basestring(spec.dtype)},'
        f'"shape":[{",".join(map(str, spec.shape))}]'
        for spec in form.specs
    ]


def _encode_digests(digests: Digests) -> list[str]:
    text, step = digests.wholes.hex(), 2 * DIGEST_BYTES
    encoded = [f'"digest":"{text[at : at + step]}"' for at in range(0, len(text), step)]
    for number, digest in digests.several.items():
        encoded[number] += f',"blocks":"{b"".join(digest.blocks).hex()}"'
    return encoded


def encode_stream(stream: StoredLeaf) -> str:
    """Return the members of a stream's extent. Not collective. Thread-safe."""
    (digest,) = _encode_digests(Digests.of([stream.digest]))
    file, offset, nbytes = stream.extent
    return f'"file":"{file}","offset":{offset},"bytes":{nbytes},{digest}'


# What `encode_leaves` writes, in a text without control characters and escapes. Numbers of
# 18 digits are in range; `LeafRows` looks at the rest.
_INTEGER = rb"([1-9][0-9]{0,17}|0)"
_ENTRY = re.compile(
    rb'\{"name":"([^"]*)",("dtype":"[^"]*","shape":\[[^]]*\],"file":"[^"]*"),'
    rb'"offset":%b,"bytes":%b,"digest":"([^"]{32})"(?:,"blocks":"([^"]*)")?\}'
    % (_INTEGER, _INTEGER)
)
_LIST_START, _LIST_END = b',"leaves":[', b'"}]'


class LeafRows(NamedTuple):
    """The text of each member of the leaves of a list, one leaf after the other.

    Attributes:
        names: Their names.
        kinds: The members of their dtype, shape and file, of which few are different.
        offsets: Decimal numbers.
        sizes: Decimal numbers.
        digests: Perhaps digests.
        blocks: Perhaps digests of blocks; None for a leaf that has none.
    """

    names: Sequence[bytes]
    kinds: Sequence[bytes]
    offsets: Sequence[bytes]
    sizes: Sequence[bytes]
    digests: Sequence[bytes]
    blocks: Sequence[bytes | None]

    def read(self, files: Mapping[str, StoredFile], block_bytes: int) -> StoredLeaves:
        """Return the leaves, proven to keep all rules. Not collective. Thread-safe.

        Args:
            files: The files of the manifest, by name.
            block_bytes: Block length of the digests.

        Raises:
            ValueError: On the calling rank, if a rule is broken.
        """
        form, extents = self._read_places()
        _require_inside(extents, files)
        return StoredLeaves(form, extents, self._read_digests(form, block_bytes))

    def _read_places(self) -> tuple[Form, Extents]:
        texts, numbers = _numbered(self.kinds)
        listed = read_json(b"[{%b}]" % b"},{".join(texts))
        specs = [as_spec("", one["dtype"], one["shape"]) for one in listed]
        lengths, of_leaf = _numbered(self.sizes)
        expected = [int(lengths[number]) for number in of_leaf]
        if [specs[number].nbytes for number in numbers] != expected:
            raise ValueError("a leaf takes another number of bytes than are listed")
        form = known_form(
            tuple(b"\n".join(self.names).decode().split("\n")),
            tuple([(spec.dtype, spec.shape) for spec in specs]),
            tuple(numbers),
        )
        places = Extents.of([Extent(as_text(one["file"]), 0, 0) for one in listed])
        offsets = np.array(list(map(int, self.offsets)), np.int64)
        return form, Extents(places.files, places.file[numbers], offsets, form.sizes)

    def _read_digests(self, form: Form, block_bytes: int) -> Digests:
        text = b"".join(self.digests).decode()
        wholes = bytes.fromhex(text)
        if wholes.hex() != text:
            raise ValueError("a digest has other characters than lower hexadecimal digits")
        is_several = form.sizes > block_bytes
        if self.blocks.count(None) < len(self.blocks):
            is_several |= [blocks is not None for blocks in self.blocks]
        several = {}
        for number in np.flatnonzero(is_several).tolist():
            whole, nbytes = self.digests[number].decode(), int(form.sizes[number])
            blocks = (self.blocks[number] or self.digests[number]).decode()
            digest = as_digest(whole, blocks, nbytes, block_bytes)
            if len(digest.blocks) > 1:
                several[number] = digest
        return Digests(wholes, several)


def _numbered(values: Sequence[bytes]) -> tuple[list[bytes], list[int]]:
    """Return the different values, and for each value the index of its like."""
    # Most often all are alike: to find that takes an eighth of the time of hashing them.
    if values.count(values[0]) == len(values):
        return [values[0]], [0] * len(values)
    numbers = {value: number for number, value in enumerate(dict.fromkeys(values))}
    return list(numbers), list(map(numbers.__getitem__, values))


def _require_inside(extents: Extents, files: Mapping[str, StoredFile]) -> None:
    """Raise if a leaf lies in no known file, or not within the data of its file."""
    if not (files.keys() >= set(extents.files)):
        raise ValueError("a file is not listed")
    used = [files[name] for name in extents.files]
    least = np.array([file.header_bytes for file in used], np.int64)[extents.file]
    most = np.array([file.nbytes for file in used], np.int64)[extents.file]
    ends = extents.offsets + extents.sizes
    if not ((extents.offsets >= least) & (ends <= most)).all():
        raise ValueError("a leaf lies outside the data of its file")


def lift_leaves(data: bytes | bytearray) -> tuple[bytes, dict[str, LeafRows]]:
    """Take the lists of leaves out of a manifest, as far as `encode_leaves` wrote them.

    Not collective. Thread-safe. What is taken out is JSON without a key twice. Python's
    reader takes several times as long for it, since it makes objects of each leaf.

    Args:
        data: The text of the manifest; if it is no JSON, what is returned is none either.

    Returns:
        The text with a mark in place of the leaves of such a list, and the lists by mark.
    """
    # Drawn anew each time, so that no text that was written before can hold it.
    mark = os.urandom(16).hex()
    parts: list[bytes | bytearray] = []
    lists: dict[str, LeafRows] = {}
    step, at, position = _ENTRY.groups + 1, 0, 0
    while (start := data.find(_LIST_START, position)) >= 0:
        start += len(_LIST_START)
        if data[start : start + 1] == b"]":  # a state without leaves
            position = start
            continue
        end = data.find(_LIST_END, start) + len(_LIST_END) - 1
        if end < start:
            break
        text, position = bytes(data[start:end]), end  # no byte is looked at twice
        # What is between the entries, then the fields of an entry, and so on.
        fields = _ENTRY.split(text) if _is_plain(text) else [text]
        if fields[0] or fields[-1] or not set(fields[step:-1:step]) <= {b","}:
            continue
        name = f"{mark}{len(lists)}"
        lists[name] = LeafRows(*[fields[1 + one :: step] for one in range(step - 1)])
        parts += [data[at:start], f'"{name}"'.encode()]
        at = end
    return b"".join([*parts, data[at:]]), lists


def _is_plain(text: bytes) -> bool:
    """Return whether a text has no control character and no escape."""
    is_odd = np.frombuffer(text, np.uint8) < ord(" ")
    return b"\\" not in text and not is_odd.any()


def decode_leaves(
    listed: Sequence[Any],
    lifted: dict[str, LeafRows],
    files: Mapping[str, StoredFile],
    block_bytes: int,
) -> StoredLeaves:
    """Return the leaves of a state from the JSON values of a manifest.

    Not collective. Thread-safe.

    Args:
        listed: The entries of the leaves, or the mark of a list that was lifted.
        lifted: The lists by mark; the one that is used is removed.
        files: The files of the manifest, by name.
        block_bytes: Block length of the digests.

    Raises:
        ValueError: On the calling rank, for the first entry that breaks a rule.
        KeyError: On the calling rank, if one lacks a member.
    """
    if len(listed) == 1 and isinstance(listed[0], str) and listed[0] in lifted:
        return lifted.pop(listed[0]).read(files, block_bytes)
    return StoredLeaves.of([_decode_leaf(one, files, block_bytes) for one in listed])


def _decode_leaf(
    entry: dict[str, Any], files: Mapping[str, StoredFile], block_bytes: int
) -> StoredLeaf:
    spec = as_spec(entry["name"], entry["dtype"], entry["shape"])
    extent, digest = decode_place(entry, files, block_bytes)
    if spec.nbytes != extent.nbytes:
        raise ValueError(
            f"leaf {shown(spec.name)} {spec.dtype}{shown(spec.shape)} takes "
            f"{shown(spec.nbytes)} bytes, {extent.nbytes} listed"
        )
    return StoredLeaf(spec, extent, digest)


def decode_place(
    entry: dict[str, Any], files: Mapping[str, StoredFile], block_bytes: int
) -> tuple[Extent, Digest]:
    """Return the position of a run of bytes, and its digest, from JSON values.

    Not collective. Thread-safe.

    Args:
        entry: The values.
        files: The files of the manifest, by name.
        block_bytes: Block length of the digest.

    Raises:
        ValueError: On the calling rank, if it breaks a rule.
        KeyError: On the calling rank, if a member is missing.
    """
    file = files[entry["file"]]
    offset = as_integer(entry["offset"], SIZE_MAX)
    nbytes = as_integer(entry["bytes"], SIZE_MAX)
    if offset < file.header_bytes or offset + nbytes > file.nbytes:
        end = offset + nbytes
        raise ValueError(f"{file.name}: bytes {offset} to {end} lie outside its data")
    whole = entry["digest"]
    try:
        digest = as_digest(whole, entry.get("blocks", whole), nbytes, block_bytes)
    except ValueError as error:
        raise ValueError(f"{file.name}: {error}") from None
    return Extent(file.name, offset, nbytes), digest


def check_overlaps(files: Iterable[str], leaves: Sequence[StoredLeaves]) -> None:
    """Refuse leaves that lie over one another. Not collective. Thread-safe.

    Args:
        files: The names of all files.
        leaves: The leaves of each state.

    Raises:
        ValueError: On the calling rank, if two leaves overlap.
    """
    names = list(files)
    extents = Extents.chained([one.extents for one in leaves])
    file, offsets, sizes = extents.numbered(names), extents.offsets, extents.sizes
    order = np.lexsort((sizes, offsets, file))
    file, offsets, ends = file[order], offsets[order], (offsets + sizes)[order]
    overlaps = np.flatnonzero((file[1:] == file[:-1]) & (offsets[1:] < ends[:-1])) + 1
    if len(overlaps):
        first = overlaps[0]
        raise ValueError(f"{names[file[first]]}: leaves overlap at {offsets[first]}")
