# SPDX-License-Identifier: Apache-2.0
"""Looks into a generation from anywhere: a notebook, an inference server. No MPI, no lock.

Nothing is written. Leaves are read when they are asked for, and proven before they are
handed out.
"""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from mpi_ckpt.choice import Choice
from mpi_ckpt.errors import CorruptGenerationError, NotSavedError, ReadError, RestoreError
from mpi_ckpt.leaf import Target
from mpi_ckpt.states.leaf_values import KIND, make_value
from mpi_ckpt.states.rebuilding import nodes_of, rebuild
from mpi_ckpt.storage.directory.catalog import Catalog
from mpi_ckpt.storage.directory.finding import (
    describe_others,
    open_chosen,
    open_newest_there,
)
from mpi_ckpt.storage.directory.recovery import is_gone
from mpi_ckpt.storage.format.layout import MANIFEST
from mpi_ckpt.storage.format.manifest import STREAM
from mpi_ckpt.storage.reading.proving import verify
from mpi_ckpt.storage.reading.reader import GenerationReader

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator
    from os import PathLike

    from mpi_ckpt.retention import Mode
    from mpi_ckpt.storage.format.manifest import StoredLeaf, StoredState

__all__ = ["LoadedGeneration", "LoadedState", "load"]

_NAMES_SHOWN = 20


def load(
    directory: str | PathLike[str],
    generation: int | Literal["newest"] = "newest",
    *,
    step: int | None = None,
    best: str | None = None,
    mode: Mode | None = None,
) -> LoadedGeneration:
    """Open a generation to look into it, without MPI and beside a running job.

    Not collective. No lock is taken and nothing is written. A newest one whose manifest or
    files are damaged is told in a warning, and the one before it is opened; in place of one
    that was asked for none is::

        saved = mpi_ckpt.load("checkpoints")
        weight = saved["train"]["module/head.weight"]
        model.load_state_dict(saved["train"].value()["module"])

    Args:
        directory: The one given to the manager; or a generation's own.
        generation: Its number, or ``"newest"``.
        step: Or the step it was saved at; of several the newest.
        best: Or the metric by which it is the best.
        mode: Which value of that metric is: ``"min"`` or ``"max"``.

    Returns:
        The open generation: its states by name. Usable as a context manager.

    Raises:
        OptionsError: On the calling rank, if what was asked for makes no sense.
        NoCheckpointError: On the calling rank, if there is none such; it says what is.
        CorruptGenerationError: On the calling rank, if it is damaged, or all are.
        UnsupportedFormatError: On the calling rank, if it is of another format.
        ReadError: On the calling rank, if the operating system cannot read it.
    """
    number = None if generation == "newest" else generation
    choice = Choice(number, step, best, mode).checked()
    # A job may run for long; the program that looks on may change its working directory.
    catalog = Catalog(Path(directory).absolute())
    if not choice.is_newest:
        return LoadedGeneration(open_chosen(catalog, choice), catalog)
    if (catalog.root / MANIFEST).is_file():
        beside = Catalog(catalog.root.parent)
        return LoadedGeneration(GenerationReader(catalog.root), beside)
    return LoadedGeneration(open_newest_there(catalog), catalog)


class LoadedGeneration(Mapping[str, "LoadedState"]):
    """The states of a generation by name. Made by `load`. Not collective. Thread-safe.

    Its files stay open, so that it can be read on while a job prunes it, and takes room on
    disk until it is closed. A context manager; without, it is closed when it is collected.

    Args:
        reader: The open generation.
        catalog: Of the directory it is in.

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
        self._source = _LeafSource(reader, catalog)
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
            CorruptGenerationError: On the calling rank, for the first that is wrong.
            ReadError: On the calling rank, if the operating system cannot read it.
        """
        self._source.attempt("", lambda reader: verify(reader))

    def close(self) -> None:
        """Close the files; what was read stays good. Callable twice."""
        self._source.close()

    def __enter__(self) -> LoadedGeneration:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class LoadedState(Mapping[str, Any]):
    """The leaves of a state by name, each read and proven when it is asked for.

    Not collective. Thread-safe. A leaf that was a tensor of torch comes as one, on the
    host, if torch can be imported; all others as arrays of NumPy. Each access reads anew
    and gives memory of its own. What a plain state wrote is the one leaf ``"stream"``.

    Args:
        source: Where its leaves are read.
        stored: What the manifest says of it.

    Attributes:
        name: Its name.
        structure: What of it is no tensor, as JSON values; None where there is nothing.
    """

    def __init__(self, source: _LeafSource, stored: StoredState) -> None:
        self.name = stored.name
        self.structure: Any = stored.structure
        self._source = source
        self._stored = stored
        self._leaves = {leaf.spec.name: leaf for leaf in stored.leaves}
        self._nodes = nodes_of(stored.structure, self._leaves)

    def __getitem__(self, name: str) -> Any:  # noqa: ANN401 (an array or a tensor)
        if name not in self._leaves:
            raise _no_such(f"state {self.name!r}", "leaf", name, self._leaves)
        leaf, node = self._leaves[name], self._nodes[name]
        return self._source.attempt(
            f"state {self.name!r}, leaf {name!r}: ",
            lambda reader: _read(reader, leaf, node),
        )

    def __contains__(self, name: object) -> bool:
        return name in self._leaves  # a Mapping's own would read it

    def __iter__(self) -> Iterator[str]:
        return iter(self._leaves)

    def __len__(self) -> int:
        return len(self._leaves)

    def __eq__(self, other: object) -> bool:
        return self is other  # a Mapping's own would read all

    def __hash__(self) -> int:
        return id(self)

    def __repr__(self) -> str:
        shown = [str(leaf.spec) for leaf in self._stored.leaves[:_NAMES_SHOWN]]
        more = ["..."] if len(self._leaves) > _NAMES_SHOWN else []
        return f"<state {self.name!r}: {', '.join([*shown, *more]) or 'no leaves'}>"

    def value(self) -> Any:  # noqa: ANN401 (any nested value)
        """Return all of it as what it was: what ``load_state_dict`` takes, or the value.

        Not collective. Reads all leaves. Of a module its state dict, tied tensors under
        each of their names; of a `TrainState` such by part; of a plain state its bytes.
        Nothing is unpickled. Of no known form: structure and leaves side by side.

        Raises:
            CorruptGenerationError: On the calling rank, if it is not what was saved.
            ReadError: On the calling rank, if the operating system cannot read it.
        """
        values = {name: self[name] for name in self}
        if self._stored.is_stream:
            return values[STREAM].tobytes()
        return rebuild(self.structure, values)


class _LeafSource:
    """The open generation that leaves are read from; says what is wrong with it."""

    def __init__(self, reader: GenerationReader, catalog: Catalog) -> None:
        self._reader = reader
        self._catalog = catalog
        self._closed = False

    def close(self) -> None:
        self._closed = True
        self._reader.close()

    def attempt(self, what: str, work: Any) -> Any:  # noqa: ANN401 (any work)
        path, number = self._reader.path, self._reader.manifest.generation
        if self._closed:
            raise RestoreError(
                f"{what}{path} is closed; read what you need before close(), or load it "
                "again",
                path=path,
                generation=number,
            )
        try:
            return work(self._reader)
        except (CorruptGenerationError, ReadError) as problem:
            if is_gone(path):
                raise ReadError(
                    f"{what}{path} was pruned, or set aside, since it was loaded, and this "
                    f"was not open yet: load {path.parent} again ({problem})",
                    path=path,
                    generation=number,
                ) from problem
            if isinstance(problem, ReadError):
                raise
            raise CorruptGenerationError(
                f"{what}{problem}. What was read before is good; "
                f"{describe_others(self._catalog, number)}",
                path=problem.path,
                generation=number,
            ) from problem


def _read(reader: GenerationReader, leaf: StoredLeaf, node: dict[str, Any]) -> Any:  # noqa: ANN401
    spec = leaf.spec
    if node.get(KIND) == "tensor" and not _has_torch():
        node = {**node, KIND: "array"}
    value, place = make_value(spec, node, "cpu")
    target = Target(spec, place)
    memory, start = target.memory(), 0
    for number in range(len(leaf.digest.blocks)):
        block = reader.read_block(leaf, number)
        memory[start : start + len(block)] = block
        start += len(block)
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
