# SPDX-License-Identifier: Apache-2.0
"""Makes what many tests need: manifests, small generations, a communicator of nobody."""

from __future__ import annotations

import io
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from mpi_ckpt.engine.save import shard
from mpi_ckpt.engine.save.draft import Draft
from mpi_ckpt.engine.save.request import Published, SaveRequest
from mpi_ckpt.engine.sync.captured import capture_states
from mpi_ckpt.leaves import digest
from mpi_ckpt.leaves.digest import digest_bytes
from mpi_ckpt.options import IO, Options
from mpi_ckpt.retention import KeepLast
from mpi_ckpt.state import Capture, LeafState, State
from mpi_ckpt.states.arrays import ArrayState
from mpi_ckpt.states.nested import ObjectState
from mpi_ckpt.states.packed import part_leaves
from mpi_ckpt.storage.directory.checkpoint_directory import CheckpointDirectory
from mpi_ckpt.storage.format import manifest
from mpi_ckpt.storage.format.manifest_codec import decode

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    import pytest

    from mpi_ckpt.states.unshared.ranked import RankedState


@dataclass
class Ranks:
    """What a state asks of a communicator when it is bound."""

    rank: int = 0
    size: int = 1

    @property
    def is_root(self) -> bool:
        return self.rank == 0


class Stream(State):
    """A plain state that holds bytes."""

    def __init__(self, name: str, data: bytes = b"") -> None:
        super().__init__(name)
        self.data = data

    def save(self, fileobj) -> None:
        fileobj.write(self.data)

    def load(self, fileobj) -> None:
        self.data = fileobj.read()


def joined(state: RankedState, parts: Sequence[object]) -> RankedState:
    """Let a state be captured as root writes it, with the parts of all ranks.

    Args:
        state: The state.
        parts: What `RankedState.own_value` returned on each rank.
    """
    leaves = [leaf for rank, part in enumerate(parts) for leaf in part_leaves(rank, part)]
    texts = [one.buffer.read() for one in leaves if one.spec.name.endswith(".json")]
    state.compare([json.loads(bytes(text)) for text in texts])
    form = state.form(len(parts))
    state.capture = lambda: Capture(form, leaves)
    return state


def carry(saved: LeafState, into: LeafState) -> None:
    """Restore a state from what another saved, through a file object."""
    stream = io.BytesIO()
    saved.save(stream)
    stream.seek(0)
    into.load(stream)
    assert stream.read() == b""


def some_states() -> list[State]:
    """Return states of every form: leaves of several widths, empty ones, a stream."""
    arrays = {
        "wide": np.arange(6, dtype=np.float64).reshape(2, 3),
        "narrow": np.arange(5, dtype=np.int8),
        "none": np.empty((0, 4), np.float32),
        "one": np.array(7, np.int16),
    }
    return [
        ArrayState("arrays", arrays),
        ObjectState("a/b", {"epoch": 3, "rate": 0.1, "seen": np.arange(3)}),
        Stream("stream", bytes(range(100))),
        Stream("nothing"),
    ]


def save(
    directory: CheckpointDirectory,
    states: list[State],
    *,
    carry: Callable[[str], bool] | None = None,
    options: Options | None = None,
    **noted,
) -> Published:
    """Write a generation of these states, as root of a job of one rank does."""
    captured = iter(capture_states(s for s in states if isinstance(s, LeafState)))
    mixed = [next(captured) if isinstance(s, LeafState) else s for s in states]
    noted = {"step": 1, "size": 1, "carry": carry, **noted}
    options = options or Options(retention=KeepLast(100), io=IO(reuse=False))
    request = SaveRequest(states=mixed, **noted)
    with Draft.begin(directory, request, options) as draft:
        draft.write(draft.fresh_states, request.plain)
        return draft.publish()


def publish(root: Path, states: list[State] | None = None, **noted) -> Path:
    """Write one generation below a root that nobody owns afterwards."""
    directory = CheckpointDirectory(root)
    directory.own()
    try:
        return save(directory, some_states() if states is None else states, **noted).path
    finally:
        directory.close()


def sealed(head: bytes) -> bytes:
    """Put a matching digest behind the start of a manifest."""
    return head + b',"digest":"' + digest_bytes(head).hex().encode() + b'"}\n'


def sealed_document(document: object) -> bytes:
    """Return a manifest with a matching digest, whatever it says."""
    return sealed(json.dumps(document, separators=(",", ":")).encode()[:-1])


def document_of(path: Path) -> dict:
    """Return what a generation's manifest says, without its digest."""
    document = json.loads((path / "manifest.json").read_bytes())
    del document["digest"]
    decode(sealed_document(document))  # a test that breaks one thing starts from whole
    return document


def use_blocks_of(nbytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let digests be of shorter blocks, so that a leaf of several need not be large."""
    methods = (digest.Digest.of.__func__, digest.BlockHasher.__init__, digest.digest_many)
    for function in methods:
        monkeypatch.setattr(function, "__defaults__", (nbytes,))
    monkeypatch.setattr(shard, "BLOCK_BYTES", nbytes)
    monkeypatch.setattr(shard, "_SMALL_BYTES", nbytes)
    defaults = manifest.Manifest.__init__.__kwdefaults__
    monkeypatch.setitem(defaults, "block_bytes", nbytes)
