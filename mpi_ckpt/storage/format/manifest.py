# SPDX-License-Identifier: Apache-2.0
"""Defines the contents of a manifest as frozen values; `manifest_codec` encodes them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import TYPE_CHECKING, Any, NamedTuple, overload

import numpy as np

from mpi_ckpt.leaves.digest import BLOCK_BYTES, Digest, Digests
from mpi_ckpt.leaves.leaf import Form, LeafSpec
from mpi_ckpt.storage.format.strict_json import as_integer, as_list, as_text

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator, Mapping

    from numpy.typing import NDArray

    from mpi_ckpt.decomposition.boxes import Box


STREAM = "stream"
"""Name of the one leaf of what a state wrote itself."""


@dataclass(frozen=True, slots=True)
class StoredFile:
    """One file of a generation.

    Attributes:
        name: Name in the generation's directory.
        nbytes: Size in bytes.
        header_bytes: Bytes before the first leaf; 0 if there is no header.
        header_digest: xxh3-128 of those bytes, 16 bytes.
        generation: The generation that wrote it; older than the manifest's if the file is
            shared by hard link.
    """

    name: str
    nbytes: int
    header_bytes: int
    header_digest: bytes
    generation: int

    def to_json(self) -> list[Any]:
        """Return the file as JSON values. Not collective. Thread-safe."""
        digest = self.header_digest.hex()
        return [self.name, self.nbytes, self.header_bytes, digest, self.generation]

    @classmethod
    def from_json(cls, values: Sequence[Any]) -> StoredFile:
        """Return the file that `to_json` encoded. Not collective. Thread-safe."""
        name, nbytes, header_bytes, digest, generation = values
        return cls(name, nbytes, header_bytes, bytes.fromhex(digest), generation)


# Named tuples, not dataclasses: thousands are made at a time, five times as fast.
class Extent(NamedTuple):
    """A run of bytes in a file: name of the file, offset and length in bytes."""

    file: str
    offset: int
    nbytes: int


class Extents(Sequence[Extent]):
    """Positions of leaves, in columns. Not collective. Thread-safe.

    Args:
        files: Names of files.
        file: For each position the index of its file.
        offsets: For each its first byte in that file.
        sizes: For each its length in bytes.
    """

    __slots__ = ("file", "files", "offsets", "sizes")

    def __init__(
        self,
        files: tuple[str, ...],
        file: NDArray[np.int64],
        offsets: NDArray[np.int64],
        sizes: NDArray[np.int64],
    ) -> None:
        assert len(file) == len(offsets) == len(sizes)
        self.files = files
        self.file = file
        self.offsets = offsets
        self.sizes = sizes

    @classmethod
    def of(cls, extents: Iterable[Extent]) -> Extents:
        """Return positions as columns. Not collective. Thread-safe."""
        extents = list(extents)
        numbers: dict[str, int] = {}
        file = [numbers.setdefault(extent.file, len(numbers)) for extent in extents]
        return cls(
            tuple(numbers),
            np.array(file, np.int64),
            np.array([extent.offset for extent in extents], np.int64),
            np.array([extent.nbytes for extent in extents], np.int64),
        )

    @classmethod
    def chained(cls, parts: Sequence[Extents]) -> Extents:
        """Return the positions of several parts, one part after the other.

        Not collective. Thread-safe.
        """
        if len(parts) == 1:
            return parts[0]
        files = tuple(dict.fromkeys(file for part in parts for file in part.files))
        none = np.empty(0, np.int64)
        return cls(
            files,
            np.concatenate([none, *(part.numbered(files) for part in parts)]),
            np.concatenate([none, *(part.offsets for part in parts)]),
            np.concatenate([none, *(part.sizes for part in parts)]),
        )

    def numbered(self, files: Sequence[str]) -> NDArray[np.int64]:
        """Return for each position the index of its file in another list of files.

        Not collective. Thread-safe.
        """
        numbers = {name: number for number, name in enumerate(files)}
        return np.array([numbers[name] for name in self.files], np.int64)[self.file]

    def pick(self, numbers: Sequence[int] | NDArray[np.int64]) -> Extents:
        """Return some of them, and their files. Not collective. Thread-safe."""
        numbers = np.asarray(numbers, np.int64)
        used, file = np.unique(self.file[numbers], return_inverse=True)
        files = tuple([self.files[number] for number in used.tolist()])
        return Extents(files, file, self.offsets[numbers], self.sizes[numbers])

    def renamed(self, names: Mapping[str, str]) -> Extents:
        """Return them with other names of the files. Not collective. Thread-safe."""
        files = tuple([names[file] for file in self.files])
        return Extents(files, self.file, self.offsets, self.sizes)

    def are_in(self, files: Collection[str]) -> NDArray[np.bool_]:
        """Return whether each is in one of some files. Not collective. Thread-safe."""
        return np.array([file in files for file in self.files], np.bool_)[self.file]

    def __len__(self) -> int:
        return len(self.offsets)

    @overload
    def __getitem__(self, index: int) -> Extent: ...

    @overload
    def __getitem__(self, index: slice) -> list[Extent]: ...

    def __getitem__(self, index: int | slice) -> Extent | list[Extent]:
        if isinstance(index, slice):
            return list(self)[index]
        file = self.files[self.file[index]]
        return Extent(file, int(self.offsets[index]), int(self.sizes[index]))

    def __iter__(self) -> Iterator[Extent]:
        files = map(self.files.__getitem__, self.file.tolist())
        return map(Extent, files, self.offsets.tolist(), self.sizes.tolist())


class StoredLeaf(NamedTuple):
    """One leaf of a state: the position of its bytes, and their digest."""

    spec: LeafSpec
    extent: Extent
    digest: Digest


class StoredLeaves(Sequence[StoredLeaf]):
    """The whole leaves of a state, in columns: thousands of them are a few objects.

    Not collective. Thread-safe.

    Args:
        form: Their specs.
        extents: Where their bytes are.
        digests: Their digests.
    """

    __slots__ = ("digests", "extents", "form")

    def __init__(self, form: Form, extents: Extents, digests: Digests) -> None:
        assert len(form.specs) == len(extents) == len(digests)
        self.form = form
        self.extents = extents
        self.digests = digests

    @property
    def files(self) -> tuple[str, ...]:
        """The names of the files that hold them."""
        return self.extents.files

    @classmethod
    def of(cls, leaves: Iterable[StoredLeaf]) -> StoredLeaves:
        """Return leaves as columns. Not collective. Thread-safe."""
        leaves = list(leaves)
        return cls(
            Form([leaf.spec for leaf in leaves]),
            Extents.of([leaf.extent for leaf in leaves]),
            Digests.of([leaf.digest for leaf in leaves]),
        )

    @classmethod
    def joined(cls, form: Form, parts: Sequence[StoredLeaves]) -> StoredLeaves:
        """Return the leaves of a form, each of which is in one of several parts.

        Not collective. Thread-safe.

        Args:
            form: The specs of all leaves.
            parts: The leaves, some of them in each part.
        """
        if len(parts) == 1 and parts[0].form is form:
            return parts[0]
        numbers = {name: number for number, name in enumerate(form.names)}
        found = [numbers[name] for part in parts for name in part.form.names]
        assert sorted(found) == list(range(len(form.specs)))
        order = np.argsort(np.array(found, np.int64))
        every = cls.chained(parts)
        return cls(form, every.extents.pick(order), every.digests.pick(order))

    @classmethod
    def chained(cls, parts: Sequence[StoredLeaves]) -> StoredLeaves:
        """Return the leaves of several parts, one part after the other.

        Not collective. Thread-safe. Parts of several states may have equal names.
        """
        if len(parts) == 1:
            return parts[0]
        return cls(
            Form(chain.from_iterable(part.form.specs for part in parts)),
            Extents.chained([part.extents for part in parts]),
            Digests.joined(part.digests for part in parts),
        )

    def pick(self, numbers: NDArray[np.int64]) -> StoredLeaves:
        """Return some of them. Not collective. Thread-safe."""
        if len(numbers) == len(self):
            return self
        return StoredLeaves(
            self.form.pick(numbers.tolist()),
            self.extents.pick(numbers),
            self.digests.pick(numbers),
        )

    def renamed(self, names: Mapping[str, str]) -> StoredLeaves:
        """Return them with other names of the files. Not collective. Thread-safe."""
        return StoredLeaves(self.form, self.extents.renamed(names), self.digests)

    def bytes_of(self, files: Collection[str]) -> int:
        """Return how many of their bytes lie in some files. Not collective. Thread-safe."""
        return int(self.form.sizes[self.extents.are_in(files)].sum())

    def __len__(self) -> int:
        return len(self.extents)

    @overload
    def __getitem__(self, index: int) -> StoredLeaf: ...

    @overload
    def __getitem__(self, index: slice) -> list[StoredLeaf]: ...

    def __getitem__(self, index: int | slice) -> StoredLeaf | list[StoredLeaf]:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        number = range(len(self))[index]
        return StoredLeaf(
            self.form.specs[number], self.extents[number], self.digests[number]
        )

    def __iter__(self) -> Iterator[StoredLeaf]:
        return map(StoredLeaf, self.form.specs, self.extents, self.digests)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and tuple(self) == tuple(other)

    def __hash__(self) -> int:
        return hash(self.form.specs)

    def __repr__(self) -> str:
        return repr(tuple(self))


class CutLeaf(NamedTuple):
    """One leaf that is cut over the ranks: its tiles are listed in their files' headers.

    Attributes:
        spec: Name, type and shape of the whole leaf.
        tiles: Number of its tiles in all files of the state.
    """

    spec: LeafSpec
    tiles: int


class StoredTile(NamedTuple):
    """One tile of a cut leaf: its box, and its bytes as those of a leaf.

    Attributes:
        box: The box, in the indices of the whole leaf.
        leaf: Its name in the file, dtype and shape; the position of its bytes, in C order
            of the box; their digest.
    """

    box: Box
    leaf: StoredLeaf


@dataclass(frozen=True, slots=True)
class StoredState:
    """One state: leaves and a structure, or one stream.

    Attributes:
        name: The state's name.
        structure: JSON values; None for a stream.
        leaves: The whole leaves, in the state's order; a stream has one leaf of bytes.
        is_stream: Whether it is the stream of a plain state.
        cut: The leaves that are cut over the ranks.
        files: Names of the files that have tiles of these; such a file may have tiles of
            other states beside them, which count only for the states that name the file.
    """

    name: str
    structure: Any = None
    leaves: StoredLeaves = field(default_factory=lambda: StoredLeaves.of(()))
    is_stream: bool = False
    cut: tuple[CutLeaf, ...] = ()
    files: tuple[str, ...] = ()

    @classmethod
    def of_stream(cls, name: str, extent: Extent, digest: Digest) -> StoredState:
        """Make the state of a stream. Not collective."""
        spec = LeafSpec(STREAM, "U8", (extent.nbytes,))
        leaves = StoredLeaves.of([StoredLeaf(spec, extent, digest)])
        return cls(name, leaves=leaves, is_stream=True)

    @property
    def nbytes(self) -> int:
        """Bytes of all its leaves."""
        return self.leaves.form.nbytes + sum(leaf.spec.nbytes for leaf in self.cut)


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """Everything a reader needs to know about a generation.

    Attributes:
        generation: Its number.
        step: Training step, given by the user.
        time: Seconds since the epoch, by root's clock.
        job: Name of the job that wrote it.
        size: Number of ranks of that job.
        metrics: Metrics given by the user, for retention.
        block_bytes: Block length of all digests.
        files: The files beside the manifest.
        states: The states, in saving order.
        local: Where its files are, if it lies on several hosts; None for others.
    """

    generation: int
    step: int
    time: float
    job: str
    size: int
    metrics: Mapping[str, float] = field(default_factory=dict)
    block_bytes: int = BLOCK_BYTES
    files: tuple[StoredFile, ...] = ()
    states: tuple[StoredState, ...] = ()
    local: LocalSet | None = None

    @property
    def leaves(self) -> list[StoredLeaf]:
        """The leaves of all states, in order."""
        return [leaf for state in self.states for leaf in state.leaves]

    @property
    def nbytes(self) -> int:
        """Bytes of all leaves."""
        return sum(state.nbytes for state in self.states)

    @property
    def bytes_reused(self) -> int:
        """Bytes of leaves in files of older generations."""
        older = {file.name for file in self.files if file.generation != self.generation}
        return sum(state.leaves.bytes_of(older) for state in self.states)

    def state(self, name: str) -> StoredState | None:
        """Return the state of that name, None if there is none. Not collective."""
        return next((state for state in self.states if state.name == name), None)


_NUMBER_MAX = (1 << 63) - 1


@dataclass(frozen=True, slots=True)
class LocalSet:
    """Where the files of a local generation are, and where it stands in the history.

    Attributes:
        run: The run that saved it.
        base: The highest number of a generation in the directory at that time.
        directory: The checkpoint directory, as root saw it.
        hosts: Names of the hosts; the first is that of root.
        domains: The failure domain of each host.
        copies: Number of hosts that hold each file.
        holders: For each file of the manifest the indices of its hosts.
    """

    run: str
    base: int
    directory: str
    hosts: tuple[str, ...]
    domains: tuple[str, ...]
    copies: int
    holders: tuple[tuple[int, ...], ...]

    def to_json(self) -> dict[str, Any]:
        """Return the section of a manifest. Not collective. Thread-safe."""
        return {
            "run": self.run,
            "base": self.base,
            "directory": self.directory,
            "hosts": self.hosts,
            "domains": self.domains,
            "copies": self.copies,
            "holders": self.holders,
        }

    @classmethod
    def from_json(cls, values: Any, files: int) -> LocalSet:  # noqa: ANN401 (JSON)
        """Return the section of a manifest. Not collective. Thread-safe.

        Args:
            values: The section, from a file that is not trusted.
            files: Number of files in the manifest.

        Raises:
            ValueError: On the calling rank, if it breaks a rule.
        """
        hosts = tuple([as_text(host) for host in as_list(values["hosts"])])
        domains = tuple([as_text(domain) for domain in as_list(values["domains"])])
        holders = tuple(
            [
                tuple([as_integer(host, len(hosts) - 1) for host in as_list(one)])
                for one in as_list(values["holders"])
            ]
        )
        if len(domains) != len(hosts) or len(holders) != files:
            raise ValueError("the lists of hosts do not have the right lengths")
        return cls(
            as_text(values["run"]),
            as_integer(values["base"], _NUMBER_MAX),
            as_text(values["directory"]),
            hosts,
            domains,
            as_integer(values["copies"], len(hosts)),
            holders,
        )
