# SPDX-License-Identifier: Apache-2.0
"""Implements ``mpi-ckpt export``, which writes a generation to one file for other tools."""

from __future__ import annotations

import json
import math
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import click

from mpi_ckpt.cli.command import (
    GOOD,
    CommandError,
    command,
    directory_argument,
    generation_argument,
    misused,
)
from mpi_ckpt.cli.directory_kinds import directory_to_look_at
from mpi_ckpt.cli.generations import open_wanted
from mpi_ckpt.cli.inspect.showing import pick_states
from mpi_ckpt.cli.new_file import new_file
from mpi_ckpt.cli.plain_text import bytes_text, plural
from mpi_ckpt.leaves import dtypes
from mpi_ckpt.leaves.leaf import LeafSpec
from mpi_ckpt.storage import filesystem
from mpi_ckpt.storage.format.tensorfile import encode_header
from mpi_ckpt.storage.reading.assembly import read_box, slabs, state_arrays
from mpi_ckpt.storage.reading.proving import proven_blocks

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from mpi_ckpt.cli.screen import Screen
    from mpi_ckpt.storage.format.manifest import Manifest, StoredState
    from mpi_ckpt.storage.reading.assembly import StoredArray
    from mpi_ckpt.storage.reading.reader import GenerationReader

METADATA_KEY = "mpi_ckpt"
"""Where in a safetensors file the import finds states, structures and step."""

STREAM_NAME = "(stream)"
_PART_BYTES = 64 << 20
_FORMATS = {
    ".safetensors": "safetensors",
    ".pt": "torch",
    ".pth": "torch",
    ".ckpt": "torch",
    ".bin": "torch",
}


@command("export", "Write a generation to one file.")
@directory_argument()
@generation_argument()
@click.option(
    "--to",
    "target",
    required=True,
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="The file to make; it must not exist.",
)
@click.option(
    "--format",
    "form",
    type=click.Choice(["safetensors", "torch"]),
    help="Format of the file; default: by the ending of its name.",
)
@click.option(
    "--state",
    "names",
    multiple=True,
    metavar="NAME",
    help="Write this state only.",
)
def export(
    screen: Screen,
    directory: Path,
    generation: str | None,
    target: Path,
    form: str | None,
    names: tuple[str, ...],
) -> int:
    """Write a generation to one file, every byte proven on the way.

    With one --state the file holds that state by itself: the names of a module's
    parameters, as other tools expect them. A safetensors file also carries what is no
    tensor, so that import gives the same generation back, bit for bit.
    """
    directory = directory_to_look_at(directory, generation, "export")
    form = form or _FORMATS.get(target.suffix.lower())
    if form is None:
        raise misused(f"{target}: give --format safetensors or --format torch")
    with open_wanted(directory, generation) as reader:
        path = reader.path
        states = pick_states(reader.manifest, names)
        if not states:
            raise CommandError(f"{path} holds no state", kind="absent")
        total = sum(state.nbytes for state in states)
        alone = len(names) == 1
        with new_file(target) as descriptor, screen.progress("exporting", total) as done:
            if form == "torch":
                from mpi_ckpt.cli.convert.torchfile import write_file

                write_file(descriptor, reader, states, alone=alone, done=done)
            else:
                _write_safetensors(descriptor, reader, states, alone=alone, done=done)
    size = target.stat().st_size
    screen.data(
        {
            "generation": reader.manifest.generation,
            "file": str(target),
            "format": form,
            "states": [state.name for state in states],
            "bytes": size,
        }
    )
    screen.say(
        f"generation {reader.manifest.generation}, {plural(len(states), 'state')} -> "
        f"{target}, {bytes_text(size)}, {form}"
    )
    return GOOD


def _write_safetensors(
    descriptor: int,
    reader: GenerationReader,
    states: Sequence[StoredState],
    *,
    alone: bool,
    done: Callable[[int], None],
) -> None:
    entries = _entries(reader, states, alone=alone)
    # Larger elements first, so that all of them are aligned.
    order = sorted(entries, key=lambda item: -dtypes.element_bytes(item[1].dtype))
    metadata = {"format": "pt", METADATA_KEY: _metadata(reader.manifest, states, entries)}
    header = encode_header([(name, spec) for name, spec, _ in order], metadata)
    filesystem.write_all(descriptor, header, 0)
    starts = list(accumulate((spec.nbytes for _, spec, _ in order), initial=len(header)))
    whole = [(at, one[2].tiles[0].leaf) for at, one in enumerate(order) if one[2].is_whole]
    for block, data in proven_blocks(reader, [leaf for _, leaf in whole]):
        start = starts[whole[block.leaf][0]] + block.start
        filesystem.write_all(descriptor, data, start)
        done(len(data))
    for (_, _, array), start in zip(order, starts, strict=False):
        if not array.is_whole:
            _write_cut(descriptor, reader, array, start, done)


def _write_cut(
    descriptor: int,
    reader: GenerationReader,
    array: StoredArray,
    start: int,
    done: Callable[[int], None],
) -> None:
    """Write a cut leaf as one run of bytes, a part of it in memory at a time."""
    width = dtypes.element_bytes(array.spec.dtype)
    for box in slabs(array.spec.shape, max(1, _PART_BYTES // width)):
        data = memoryview(bytearray(box.size * width))
        read_box(reader, array, box, data)
        filesystem.write_all(descriptor, data, start)
        start += len(data)
        done(len(data))


def _entries(
    reader: GenerationReader, states: Sequence[StoredState], *, alone: bool
) -> list[tuple[str, LeafSpec, StoredArray]]:
    entries = []
    for state in states:
        # Encoded, so that "a/b" + "c" and "a" + "b/c" stay apart.
        prefix = "" if alone else quote(state.name, safe="") + "/"
        for array in state_arrays(reader, state):
            leaf = STREAM_NAME if state.is_stream else array.spec.name
            name = prefix + leaf
            # One name in the header is not a tensor's.
            name = f"{name}_" if name.startswith("__metadata__") else name
            spec = LeafSpec(leaf, array.spec.dtype, array.spec.shape)
            entries.append((name, spec, array))
    return entries


def _metadata(
    manifest: Manifest,
    states: Sequence[StoredState],
    entries: Sequence[tuple[str, LeafSpec, StoredArray]],
) -> str:
    names = iter(entries)
    described: list[dict[str, Any]] = []
    for state in states:
        if state.is_stream:
            described.append({"name": state.name, "stream": next(names)[0]})
            continue
        leaves = []
        for _ in (*state.leaves, *state.cut):
            name, spec, _ = next(names)
            leaves.append([name, spec.name, spec.dtype, list(spec.shape)])
        described.append(
            {"name": state.name, "structure": state.structure, "leaves": leaves}
        )
    document = {
        "step": manifest.step,
        "size": manifest.size,
        "metrics": {
            name: value if math.isfinite(value) else str(value)
            for name, value in manifest.metrics.items()
        },
        "states": described,
    }
    return json.dumps(document, separators=(",", ":"), allow_nan=False)
