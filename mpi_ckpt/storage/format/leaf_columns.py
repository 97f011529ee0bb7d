# SPDX-License-Identifier: Apache-2.0
"""Encodes and decodes the leaves in a manifest: thousands at a time, in columns. Pure.

The fast way to read takes only what is right in all respects. Anything else is read leaf by
leaf, which finds the fault and words it.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import chain
from json.encoder import encode_basestring
from operator import itemgetter
from typing import TYPE_CHECKING, Any

import numpy as np

from mpi_ckpt.leaves.digest import DIGEST_BYTES, Digest, Digests
from mpi_ckpt.storage.format.json_values import (
    SIZE_MAX,
    as_digest,
    as_integer,
    as_spec,
    as_text,
)
from mpi_ckpt.storage.format.manifest import (
    Extent,
    StoredFile,
    StoredLeaf,
    StoredLeaves,
    known_form,
)
from mpi_ckpt.storage.format.strict_json import shown

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from numpy.typing import NDArray

    from mpi_ckpt.leaves.leaf import Form


# Built as text: a dict for each of thousands of leaves takes three times as long.
def encode_leaves(leaves: StoredLeaves) -> str:
    """Return the entries of leaves in a manifest. Not collective. Thread-safe.

    Raises:
        ValueError: On the calling rank, if a name is no text.
    """
    files = [leaves.files[number] for number in leaves.file.tolist()]
    rows = zip(
        _encode_specs(leaves.form),
        files,
        leaves.offsets.tolist(),
        leaves.form.sizes.tolist(),
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


_ROW = itemgetter("name", "dtype", "shape", "file", "offset", "bytes", "digest")
_TYPES = str, str, list, str, int, int, str


def decode_leaves(
    listed: Sequence[Any], files: Mapping[str, StoredFile], block_bytes: int
) -> StoredLeaves:
    """Return the leaves of a state from the JSON values of a manifest.

    Not collective. Thread-safe.

    Args:
        listed: The entries of the leaves.
        files: The files of the manifest, by name.
        block_bytes: Block length of the digests.

    Raises:
        ValueError: On the calling rank, for the first entry that breaks a rule.
        KeyError: On the calling rank, if one lacks a member.
    """
    found = _decode_columns(listed, files, block_bytes)
    if found is None:
        found = StoredLeaves.of([_decode_leaf(one, files, block_bytes) for one in listed])
    return found


def _decode_columns(
    listed: Sequence[Any], files: Mapping[str, StoredFile], block_bytes: int
) -> StoredLeaves | None:
    """Return the leaves if all is right but, maybe, digests of several blocks."""
    try:
        columns = list(zip(*map(_ROW, listed), strict=True))
    except (KeyError, TypeError):
        return None
    if not columns or any(
        set(map(type, column)) != {kind}
        for column, kind in zip(columns, _TYPES, strict=True)
    ):
        return None
    names, kinds, shapes, places, firsts, lengths, wholes = columns
    form = _form_of(names, kinds, shapes, lengths)
    extents = _extents_of(places, firsts, lengths, files)
    if form is None or extents is None or set(map(len, wholes)) != {2 * DIGEST_BYTES}:
        return None
    try:
        joined = bytes.fromhex("".join(wholes))
    except ValueError:
        return None
    if len(joined) != len(listed) * DIGEST_BYTES:  # there were spaces
        return None
    several: dict[int, Digest] = {}
    for number, entry in enumerate(listed):
        if "blocks" in entry or lengths[number] > block_bytes:
            several[number] = decode_place(entry, files, block_bytes)[1]
    several = {n: digest for n, digest in several.items() if len(digest.blocks) > 1}
    return StoredLeaves(form, *extents, Digests(joined, several))


def _form_of(
    names: tuple[str, ...],
    kinds: tuple[str, ...],
    shapes: tuple[list[Any], ...],
    lengths: tuple[int, ...],
) -> Form | None:
    """Return the form of leaves, if all have a known type and the listed length."""
    if not set(map(type, chain.from_iterable(shapes))) <= {int}:
        return None
    of_shapes = tuple(map(tuple, shapes))
    pairs = list(zip(kinds, of_shapes, strict=True))
    try:
        sizes = {pair: as_spec("", pair[0], list(pair[1])).nbytes for pair in set(pairs)}
    except ValueError:
        return None
    if tuple(map(sizes.__getitem__, pairs)) != lengths:
        return None
    return known_form(names, kinds, of_shapes)


def _extents_of(
    places: tuple[str, ...],
    firsts: tuple[int, ...],
    lengths: tuple[int, ...],
    files: Mapping[str, StoredFile],
) -> tuple[tuple[str, ...], NDArray[np.int64], NDArray[np.int64]] | None:
    """Return files, file and offset of each leaf, if all lie within the data of a file."""
    used = tuple(dict.fromkeys(places))
    if not (files.keys() >= set(used)):
        return None
    if min(*firsts, *lengths) < 0 or max(*firsts, *lengths) > SIZE_MAX:
        return None
    numbers = {name: number for number, name in enumerate(used)}
    file = np.array(list(map(numbers.__getitem__, places)), np.int64)
    offsets, sizes = np.array(firsts, np.int64), np.array(lengths, np.int64)
    least = np.array([files[name].header_bytes for name in used], np.int64)[file]
    most = np.array([files[name].nbytes for name in used], np.int64)[file]
    is_inside = (offsets >= least) & (offsets + sizes <= most)
    return (used, file, offsets) if is_inside.all() else None


def check_overlaps(files: Iterable[str], leaves: Sequence[StoredLeaves]) -> None:
    """Refuse leaves that lie over one another. Not collective. Thread-safe.

    Args:
        files: The names of all files.
        leaves: The leaves of each state.

    Raises:
        ValueError: On the calling rank, if two leaves overlap.
    """
    names = list(files)
    numbers = {name: number for number, name in enumerate(names)}
    empty = np.empty(0, np.int64)
    known = [np.array([numbers[name] for name in one.files], np.int64) for one in leaves]
    inside = [of[one.file] for of, one in zip(known, leaves, strict=True)]
    file = np.concatenate([empty, *inside])
    offsets = np.concatenate([empty, *(one.offsets for one in leaves)])
    sizes = np.concatenate([empty, *(one.form.sizes for one in leaves)])
    order = np.lexsort((sizes, offsets, file))
    file, offsets, ends = file[order], offsets[order], (offsets + sizes)[order]
    overlaps = np.flatnonzero((file[1:] == file[:-1]) & (offsets[1:] < ends[:-1])) + 1
    if len(overlaps):
        first = overlaps[0]
        raise ValueError(f"{names[file[first]]}: leaves overlap at {offsets[first]}")


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
