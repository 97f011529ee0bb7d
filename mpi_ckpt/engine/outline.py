# SPDX-License-Identifier: Apache-2.0
"""Describes a generation, or a copy in memory, as far as every rank needs it.

Root makes it from a manifest or from the copies and sends it to all ranks. Its size depends
neither on the digests nor on the number of ranks.
"""

from __future__ import annotations

from base64 import b64decode, b64encode
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from mpi_ckpt.decomposition.columns import narrowed
from mpi_ckpt.leaves.leaf import Form, LeafSpec, known_form
from mpi_ckpt.storage.format.layout import find_parts
from mpi_ckpt.storage.format.manifest import STREAM, Extents

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    from numpy.typing import NDArray

    from mpi_ckpt.state import Structure
    from mpi_ckpt.storage.format.manifest import Manifest, StoredState


@dataclass(frozen=True, slots=True)
class StateOutline:
    """The saved contents of one state.

    Attributes:
        name: The state's name.
        structure: Its JSON values; None for a stream.
        form: Its whole leaves; a stream has one leaf of bytes.
        extents: Where they are, in the same order; None for a copy in memory, and for
            parts.
        parts: Number of its parts, if each rank gets its own, in place of its leaves; None
            for other states.
        are_parts_cut: Whether they lie in files of tiles, which all ranks can read.
        is_stream: Whether it is the stream of a plain state.
        cut: Its leaves that are cut over the ranks; only root knows their tiles.
    """

    name: str
    structure: Structure
    form: Form
    extents: Extents | None = None
    parts: int | None = None
    is_stream: bool = False
    cut: tuple[LeafSpec, ...] = ()
    are_parts_cut: bool = False

    @property
    def specs(self) -> tuple[LeafSpec, ...]:
        """Its whole leaves."""
        return self.form.specs

    @property
    def leaves(self) -> tuple[LeafSpec, ...]:
        """Its leaves, first the whole ones."""
        return (*self.specs, *self.cut) if self.cut else self.specs

    @classmethod
    def of_stream(cls, name: str, nbytes: int) -> StateOutline:
        """Make the outline of a stream in memory. Not collective."""
        return cls(name, None, Form([LeafSpec(STREAM, "U8", (nbytes,))]), is_stream=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class Outline:
    """What a restore needs to know of a generation.

    Attributes:
        generation: Its number; 0 for a copy in memory.
        path: Its directory, as root sees it; empty for a copy in memory.
        step: The training step it was saved at.
        size: Number of ranks that saved it.
        metrics: The metrics given at the save.
        block_bytes: Block length of its digests.
        files: Names of its files with whole leaves, in the order in which they are read.
        states: Its requested states, in saving order.
        others: Names of states that were not requested.
        quarantined: Path -> reason, of newer generations that failed to verify.
        copy: Name of a copy in memory that has tiles; empty for all else.
    """

    generation: int = 0
    path: str = ""
    step: int
    size: int
    metrics: Mapping[str, float] = field(default_factory=dict)
    block_bytes: int = 0
    files: tuple[str, ...] = ()
    states: tuple[StateOutline, ...]
    others: tuple[str, ...] = ()
    quarantined: Mapping[str, str] = field(default_factory=dict)
    copy: str = ""

    @classmethod
    def of_generation(
        cls,
        manifest: Manifest,
        path: str,
        wanted: Mapping[str, bool],
        quarantined: Mapping[str, str],
    ) -> Outline:
        """Make the outline of a generation. Not collective. Thread-safe.

        Args:
            manifest: Manifest of the generation.
            path: Its directory.
            wanted: Name of each requested state -> whether it deals out parts.
            quarantined: Path -> reason, of newer generations that failed to verify.
        """
        stored = [state for state in manifest.states if state.name in wanted]
        of_tiles = {name for state in manifest.states for name in state.files}
        return cls(
            generation=manifest.generation,
            path=path,
            step=manifest.step,
            size=manifest.size,
            metrics=dict(manifest.metrics),
            block_bytes=manifest.block_bytes,
            files=tuple(f.name for f in manifest.files if f.name not in of_tiles),
            states=tuple(_outline_of(one, deals=wanted[one.name]) for one in stored),
            others=tuple(one.name for one in manifest.states if one.name not in wanted),
            quarantined=quarantined,
        )

    def only(self, wanted: Collection[str]) -> Outline:
        """Return the outline, with its states split into requested and other ones.

        Not collective. Thread-safe.
        """
        states = tuple(state for state in self.states if state.name in wanted)
        more = tuple(state.name for state in self.states if state.name not in wanted)
        return replace(self, states=states, others=(*self.others, *more))

    @property
    def title(self) -> str:
        """The name used in messages."""
        return f"generation {self.generation}" if self.generation else "the copy in memory"

    def to_json(self) -> dict[str, Any]:
        """Return the outline as JSON values. Not collective. Thread-safe."""
        return {
            "generation": self.generation,
            "path": self.path,
            "step": self.step,
            "size": self.size,
            "metrics": dict(self.metrics),
            "block_bytes": self.block_bytes,
            "files": self.files,
            "states": [
                [
                    state.name,
                    state.structure,
                    # In columns: with thousands of leaves that halves the work.
                    state.form.names,
                    *_encode_kinds(state.form),
                    *_encode_places(state.extents, self.files),
                    state.parts,
                    state.is_stream,
                    [spec.to_json() for spec in state.cut],
                    state.are_parts_cut,
                ]
                for state in self.states
            ],
            "others": self.others,
            "quarantined": dict(self.quarantined),
            "copy": self.copy,
        }

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Outline:
        """Return the outline that `to_json` encoded. Not collective. Thread-safe."""
        files = tuple(values["files"])
        states = [_decode_state(files, *state) for state in values["states"]]
        return cls(
            generation=values["generation"],
            path=values["path"],
            step=values["step"],
            size=values["size"],
            metrics={name: float(value) for name, value in values["metrics"].items()},
            block_bytes=values["block_bytes"],
            files=files,
            states=tuple(states),
            others=tuple(values["others"]),
            quarantined=values["quarantined"],
            copy=values["copy"],
        )


def _outline_of(stored: StoredState, *, deals: bool) -> StateOutline:
    if deals and not stored.is_stream:
        names = [*stored.leaves.form.names]
        names += [leaf.spec.name for leaf in stored.cut]
        count, are_cut = len(find_parts(names)), bool(stored.cut)
        named = stored.name, stored.structure, Form(())
        return StateOutline(*named, parts=count, are_parts_cut=are_cut)
    return StateOutline(
        stored.name,
        stored.structure,
        stored.leaves.form,
        stored.leaves.extents,
        is_stream=stored.is_stream,
        cut=tuple([replace(leaf.spec, is_cut=True) for leaf in stored.cut]),
    )


def _encode_kinds(form: Form) -> list[Any]:
    kinds, numbers = form.kinds
    return [kinds, _encode_column(np.array(numbers, np.int64))]


def _encode_places(extents: Extents | None, files: Sequence[str]) -> list[Any]:
    """Return for each position the index of its file, and its offset."""
    if extents is None:
        return [None, None]
    return [_encode_column(extents.numbered(files)), _encode_column(extents.offsets)]


def _encode_column(column: NDArray[np.int64]) -> list[str]:
    """Return numbers, none of them negative, as JSON values.

    As text of the bytes: to write and read 20,000 numbers as JSON takes 4 ms (measured).
    """
    narrow = narrowed(column)
    return [narrow.dtype.str, b64encode(narrow.tobytes()).decode()]


def _decode_column(values: Sequence[str]) -> NDArray[np.int64]:
    dtype, text = values
    return np.frombuffer(b64decode(text), dtype).astype(np.int64)


def _decode_state(
    files: tuple[str, ...],
    name: str,
    structure: Structure,
    names: Sequence[str],
    kinds: Sequence[tuple[str, Sequence[int]]],
    numbers: Sequence[str],
    places: Sequence[str] | None,
    offsets: Sequence[str] | None,
    parts: int | None,
    is_stream: bool,
    cut: Sequence[Any],
    are_parts_cut: bool,
) -> StateOutline:
    pairs = tuple([(dtype, tuple(shape)) for dtype, shape in kinds])
    form = known_form(tuple(names), pairs, tuple(_decode_column(numbers).tolist()))
    extents = None
    if places is not None and offsets is not None:
        columns = _decode_column(places), _decode_column(offsets)
        extents = Extents(files, *columns, form.sizes)
    return StateOutline(
        name,
        structure,
        form,
        extents,
        parts,
        is_stream,
        tuple([LeafSpec.from_json(spec, is_cut=True) for spec in cut]),
        are_parts_cut,
    )
