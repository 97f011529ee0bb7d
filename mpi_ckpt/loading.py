# SPDX-License-Identifier: Apache-2.0
"""Reads a generation from anywhere: a notebook, an inference server. No MPI, no lock.

Nothing is written. A leaf is read when it is accessed, and proven before it is returned.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from difflib import get_close_matches
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from mpi_ckpt.choice import Choice
from mpi_ckpt.decomposition.boxes import Box
from mpi_ckpt.errors import NotSavedError
from mpi_ckpt.leaves.leaf import LeafSpec
from mpi_ckpt.leaves.target import Target
from mpi_ckpt.states.leaf_values import KIND, make_value
from mpi_ckpt.states.rebuilding import nodes_of, parts_in, rebuild
from mpi_ckpt.storage.directory.catalog import Catalog
from mpi_ckpt.storage.directory.finding import (
    OpenedGeneration,
    open_chosen,
    open_newest_there,
)
from mpi_ckpt.storage.format.layout import MANIFEST
from mpi_ckpt.storage.format.manifest import STREAM
from mpi_ckpt.storage.reading.assembly import (
    StoredArray,
    box_of_index,
    read_box,
    stored_array,
)
from mpi_ckpt.storage.reading.proving import verify
from mpi_ckpt.storage.reading.reader import GenerationReader

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator
    from os import PathLike

    from mpi_ckpt.retention import Mode
    from mpi_ckpt.storage.format.manifest import CutLeaf, StoredLeaf, StoredState

__all__ = ["LazyLeaf", "LoadedGeneration", "LoadedState", "load"]

_NAMES_SHOWN = 20


def load(
    directory: str | PathLike[str],
    generation: int | Literal["newest"] = "newest",
    *,
    step: int | None = None,
    best: str | None = None,
    mode: Mode | None = None,
) -> LoadedGeneration:
    """Open a generation to read it, without MPI, even while a job saves.

    Not collective. No lock is taken and nothing is written. If the newest generation's
    manifest or files are damaged, this warns and opens the next older one. A generation
    that was asked for is never replaced by another one::

        saved = mpi_ckpt.load("checkpoints")
        weight = saved["train"]["module/head.weight"]
        model.load_state_dict(saved["train"].value()["module"])

    Args:
        directory: The directory of the manager, or that of one generation.
        generation: Its number, or ``"newest"``.
        step: Or the step it was saved at; the newest if several match.
        best: Or the metric by which it is the best.
        mode: Which value of that metric is the best: ``"min"`` or ``"max"``.

    Returns:
        The open generation: its states by name. Usable as a context manager.

    Raises:
        OptionsError: On the calling rank, if the request is invalid.
        NoCheckpointError: On the calling rank, if there is no such generation; the message
            lists those there are.
        CorruptGenerationError: On the calling rank, if the generation is damaged, or all
            are.
        UnsupportedFormatError: On the calling rank, if its format is another one.
        ReadError: On the calling rank, if the operating system cannot read it.
    """
    number = None if generation == "newest" else generation
    choice = Choice(number, step, best, mode).checked()
    # The program may change its working directory while the job runs.
    catalog = Catalog(Path(directory).absolute())
    if not choice.is_newest:
        return LoadedGeneration(open_chosen(catalog, choice), catalog)
    if os.path.isfile(catalog.root / MANIFEST):  # noqa: PTH113 (False on any error)
        beside = Catalog(catalog.root.parent)
        return LoadedGeneration(GenerationReader(catalog.root), beside)
    return LoadedGeneration(open_newest_there(catalog), catalog)


class LoadedGeneration(Mapping[str, "LoadedState"]):
    """The states of a generation by name. Made by `load`. Not collective. Thread-safe.

    Its files stay open: it remains readable after a job prunes it, and takes space on disk
    until it is closed. A context manager; otherwise it is closed when it is collected.

    Args:
        reader: The open generation.
        catalog: Catalog of its directory.

    Attributes:
        generation: Its number.
        path: Its directory.
        step: The training step it was saved at.
        time: Seconds since the epoch, by the clock of the root that saved it.
        size: Number of ranks that saved it.
        metrics: The metrics given at the save.
    """

    def __init__(self, reader: GenerationReader, catalog: Catalog) -> None:
        manifest = reader.manifest
        self.generation = manifest.generation
        self.path = reader.path
        self.step = manifest.step
        self.time = manifest.time
        self.size = manifest.size
        self.metrics: Mapping[str, float] = dict(manifest.metrics)
        self._source = OpenedGeneration(reader, catalog)
        self._states = {
            state.name: LoadedState(self._source, state) for state in manifest.states
        }

    def __getitem__(self, name: str) -> LoadedState:
        if name not in self._states:
            raise _no_such(f"generation {self.generation}", "state", name, self._states)
        return self._states[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._states)

    def __len__(self) -> int:
        return len(self._states)

    def __repr__(self) -> str:
        return (
            f"<generation {self.generation} in {self.path.parent}, step {self.step}: "
            f"{', '.join(self._states) or 'no states'}>"
        )

    def verify(self) -> None:
        """Prove every byte, as `mpi-ckpt verify` does.

        Raises:
            CorruptGenerationError: On the calling rank, for the first wrong byte.
            ReadError: On the calling rank, if the operating system cannot read it.
        """
        self._source.attempt("", lambda reader: verify(reader))

    def close(self) -> None:
        """Close the files; values already read stay valid. Callable twice."""
        self._source.close()

    def __enter__(self) -> LoadedGeneration:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class LoadedState(Mapping[str, Any]):
    """The leaves of a state by name, each read and proven when it is accessed.

    Not collective. Thread-safe. A leaf that was a torch tensor is returned as a tensor on
    the host, if torch can be imported; all other leaves as NumPy arrays. Each access reads
    again and returns new memory. The stream of a plain state is the one leaf ``"stream"``.

    Args:
        source: The open generation.
        stored: Its entry in the manifest.

    Attributes:
        name: Its name.
        structure: Its contents that are not tensors, as JSON values; None if there are
            none.
    """

    def __init__(self, source: OpenedGeneration, stored: StoredState) -> None:
        self.name = stored.name
        self.structure: Any = stored.structure
        self._source = source
        self._stored = stored
        leaves: list[StoredLeaf | CutLeaf] = [*stored.leaves, *stored.cut]
        self._leaves = {leaf.spec.name: leaf for leaf in leaves}
        parts = parts_in(stored.structure, self._leaves)
        self._part_of = {name: part for part in parts for name in part.leaves}
        self._nodes = nodes_of(stored.structure, self._leaves)

    def __getitem__(self, name: str) -> Any:  # noqa: ANN401 (an array or a tensor)
        leaf = self.lazy(name)
        return leaf.read(Box.whole(leaf.shape), self._node_of(name))

    def lazy(self, name: str) -> LazyLeaf:
        """Return a leaf to read in parts: ``state.lazy("rho")[2:5, ...]``.

        Not collective. Nothing is read yet. It works for every leaf; for a leaf that was
        cut over the ranks, each part may come from several files.

        Args:
            name: Name of the leaf.

        Raises:
            NotSavedError: On the calling rank, if there is no such leaf; the message lists
                those there are.
        """
        if name not in self._leaves:
            raise _no_such(f"state {self.name!r}", "leaf", name, self._leaves)
        node = {KIND: self._node_of(name).get(KIND)}
        return LazyLeaf(self._source, self.name, self._leaves[name], node)

    def __contains__(self, name: object) -> bool:
        return name in self._leaves  # Mapping's own method would read the leaf

    def __iter__(self) -> Iterator[str]:
        return iter(self._leaves)

    def __len__(self) -> int:
        return len(self._leaves)

    def __eq__(self, other: object) -> bool:
        return self is other  # Mapping's own method would read all leaves

    def __hash__(self) -> int:
        return id(self)

    def __repr__(self) -> str:
        shown = [str(leaf.spec) for leaf in list(self._leaves.values())[:_NAMES_SHOWN]]
        more = ["..."] if len(self._leaves) > _NAMES_SHOWN else []
        return f"<state {self.name!r}: {', '.join([*shown, *more]) or 'no leaves'}>"

    def value(self) -> Any:  # noqa: ANN401 (any nested value)
        """Return the state as it was saved: what ``load_state_dict`` takes, or the value.

        Not collective. Reads all leaves. For a module this is its state dict, with tied
        tensors under each of their names; for a `TrainState` a dict of its parts' values;
        for a plain state its bytes; for a `PerRankState` the list of the ranks' values.
        Nothing is unpickled. A state of unknown form gives its structure and leaves side by
        side.

        Raises:
            CorruptGenerationError: On the calling rank, if the bytes are not those saved.
            ReadError: On the calling rank, if the operating system cannot read it.
        """
        values = {name: self[name] for name in self}
        if self._stored.is_stream:
            return values[STREAM].tobytes()
        return rebuild(self.structure, values)

    def _node_of(self, name: str) -> dict[str, Any]:
        """Return what describes a leaf; of a rank's part, that is in a leaf of its own."""
        part = self._part_of.get(name)
        if part is not None:
            self._nodes |= part.nodes(self[part.structure])
            for described in part.leaves:
                self._part_of.pop(described, None)
        return self._nodes[name]


class LazyLeaf:
    """A leaf that is read in parts. Made by `LoadedState.lazy`.

    Not collective. Thread-safe. Indexed like an array, by integers, slices of positive step
    and ``...``; each access reads and proves the blocks that hold the part, and returns new
    memory.

    Args:
        source: The open generation.
        state: Name of its state.
        stored: Its entry in the manifest.
        node: What the saved structure says of the kind of its value.

    Attributes:
        name: Its name.
        dtype: Its element type, as ``mpi-ckpt show`` names it.
        shape: Its whole shape, in elements.
    """

    def __init__(
        self,
        source: OpenedGeneration,
        state: str,
        stored: StoredLeaf | CutLeaf,
        node: dict[str, Any],
    ) -> None:
        self.name, self.dtype, self.shape = stored.spec.to_json()
        self._source, self._state = source, state
        self._stored, self._node = stored, node

    def __getitem__(self, index: Any) -> Any:  # noqa: ANN401 (an array or a tensor)
        box, within = box_of_index(self.shape, index)
        return self.read(box, self._node)[within]

    def __repr__(self) -> str:
        return f"<leaf {self._stored.spec} of state {self._state!r}>"

    def read(self, box: Box, node: dict[str, Any]) -> Any:  # noqa: ANN401 (an array or a tensor)
        """Return one box of it.

        Not collective.

        Args:
            box: The box.
            node: What the value is to be, as the saved structure describes values.

        Raises:
            CorruptGenerationError: On the calling rank, if the bytes are not those saved.
            ReadError: On the calling rank, if the operating system cannot read it.
        """
        return self._source.attempt(
            f"state {self._state!r}, leaf {self.name!r}: ",
            lambda reader: _read(
                reader, stored_array(reader, self._state, self._stored), box, node
            ),
        )


def _read(
    reader: GenerationReader, array: StoredArray, box: Box, node: dict[str, Any]
) -> Any:  # noqa: ANN401 (an array or a tensor)
    spec = LeafSpec(array.spec.name, array.spec.dtype, box.shape)
    if node.get(KIND) == "tensor" and not _has_torch():
        node = {**node, KIND: "array"}
    value, place = make_value(spec, node, "cpu")
    target = Target(spec, place)
    read_box(reader, array, box, target.memory())
    target.finish()
    return value


def _has_torch() -> bool:
    try:
        import_module("mpi_ckpt.states.tensors")
    except ImportError:
        return False
    return True


def _no_such(where: str, kind: str, name: object, there: Collection[str]) -> NotSavedError:
    close = get_close_matches(str(name), there, 1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    shown = ", ".join(map(repr, list(there)[:_NAMES_SHOWN])) or "none"
    more = f" and {len(there) - _NAMES_SHOWN} more" if len(there) > _NAMES_SHOWN else ""
    return NotSavedError(f"{where} has no {kind} {name!r}{hint}; there: {shown}{more}")
