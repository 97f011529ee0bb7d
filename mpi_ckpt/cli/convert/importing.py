# SPDX-License-Identifier: Apache-2.0
"""Implements ``mpi-ckpt import``, which makes another tool's file the newest generation."""

from __future__ import annotations

import re
from contextlib import ExitStack, closing
from shlex import quote
from typing import TYPE_CHECKING, Any

import click

from mpi_ckpt.cli.command import GOOD, CommandError, DirectoryPath, command, misused
from mpi_ckpt.cli.convert.foreign import Content, FileStream, FixedState, open_safetensors
from mpi_ckpt.cli.directory_kinds import kind_of, require_target
from mpi_ckpt.cli.plain_text import bytes_text, plural
from mpi_ckpt.engine.save.draft import Draft
from mpi_ckpt.engine.save.request import SaveRequest
from mpi_ckpt.engine.sync.captured import capture_states
from mpi_ckpt.errors import CheckpointError, CorruptGenerationError, ReadError
from mpi_ckpt.options import IO, Options
from mpi_ckpt.state import LeafState
from mpi_ckpt.storage import filesystem
from mpi_ckpt.storage.directory import CheckpointDirectory, recovery
from mpi_ckpt.storage.faults import os_errors_as
from mpi_ckpt.storage.format.layout import is_adaptdl_name
from mpi_ckpt.storage.owning.ownership import Ownership
from mpi_ckpt.storage.reading.reader import GenerationReader

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from mpi_ckpt.cli.screen import Screen
    from mpi_ckpt.engine.save.request import Published
    from mpi_ckpt.leaves.leaf import Leaf
    from mpi_ckpt.state import State

_OWN_OF_ADAPTDL = "adaptdl-"


@command("import", "Make a generation from a file.")
@click.argument("source", metavar="FILE", type=DirectoryPath())
@click.option(
    "--into",
    required=True,
    metavar="DIR",
    type=DirectoryPath(),
    help="Checkpoint directory; made if it is missing.",
)
@click.option("--state", "name", metavar="NAME", help="Name of the state; default: FILE's.")
@click.option(
    "--as",
    "form",
    type=click.Choice(["module", "values"]),
    help="For ModuleState or for ObjectState; default: by what is in FILE.",
)
@click.option("--split", is_flag=True, help="Make each entry of FILE's dict a state.")
@click.option("--step", type=int, help="Training step; default: FILE's, else 0.")
@click.option(
    "--trust-pickle",
    is_flag=True,
    help="Take a directory of adaptdl, whose pickles the next job will run.",
)
def import_file(
    screen: Screen,
    source: Path,
    into: Path,
    name: str | None,
    form: str | None,
    split: bool,
    step: int | None,
    trust_pickle: bool,
) -> int:
    """Make a new generation of a safetensors file or one of torch.save.

    A file that export made gives the same states again. Any other becomes one state: of
    named tensors as ModuleState wants them, of anything else as ObjectState does. Files
    of torch.save are loaded without running code; what needs that is refused.
    """
    require_target(into)
    _require_source(source)
    source = source.resolve()
    left_out: list[str] = []
    with ExitStack() as stack:
        if source.is_dir():
            content, left_out = _adaptdl(source, trusted=trust_pickle)
        elif _starts_like_safetensors(source):
            content = stack.enter_context(open_safetensors(source))
        else:
            content = _from_torch(source, name or source.stem, form, split=split)
        states = content.states
        if states is None:
            states = [_one_state(name or source.stem, form, list(content.leaves.values()))]
        elif name is not None and source.suffix == ".safetensors":
            raise misused(
                f"{source} names its states itself; --state is for files that do not"
            )
        published = _publish(into, states, content, step)
    screen.data(
        {
            "generation": published.generation,
            "path": str(published.path),
            "states": [state.name for state in states],
            "left_out": left_out,
            "bytes": published.bytes_written,
        }
    )
    names = ", ".join(state.name for state in states)
    screen.say(
        f"{source} -> {published.path}, {bytes_text(published.bytes_written)}, "
        f"{plural(len(states), 'state')}: {names}"
    )
    if left_out:
        screen.say(
            f"left out, since they have a format of adaptdl's own: {', '.join(left_out)}; "
            "the job starts these anew",
            aside=True,
        )
    return GOOD


def _require_source(source: Path) -> None:
    kind = kind_of(source)
    if kind == "missing":
        raise misused(f"{source} does not exist", "absent")
    if kind in ("checkpoints", "generation"):
        raise misused(
            f"{source} already belongs to mpi_ckpt: to copy one generation into another "
            f"directory, run mpi-ckpt export {quote(str(source))} --to FILE.safetensors, "
            "and import that file"
        )


def _publish(
    into: Path,
    states: Sequence[State],
    content: Content,
    step: int | None,
) -> Published:
    captured = iter(capture_states(s for s in states if isinstance(s, LeafState)))
    request = SaveRequest(
        states=[next(captured) if isinstance(s, LeafState) else s for s in states],
        step=content.step if step is None else step,
        size=content.size,
        metrics=content.metrics,
    )
    ownership = Ownership(locking="either", sync_names=False)
    directory = CheckpointDirectory(into, ownership=ownership)
    with closing(directory):
        directory.own()
        try:
            options = Options(io=IO(reuse=False))
            with Draft.begin(directory, request, options) as draft:
                draft.write(draft.fresh_states, request.plain)
                published = draft.publish()
        except (ValueError, TypeError, RecursionError) as error:
            if isinstance(error, CheckpointError):
                raise
            raise CommandError(f"it cannot be saved: {error}", kind="damaged") from error
        try:
            GenerationReader(published.path).close()
        except CorruptGenerationError as error:
            # A file may hold values that no manifest may: it must not become the newest.
            recovery.quarantine(into, published.generation, error)
            raise
    return published


def _one_state(name: str, form: str | None, leaves: list[Leaf]) -> FixedState:
    if form == "values":
        nodes = {leaf.spec.name: {"~": "tensor", "leaf": leaf.spec.name} for leaf in leaves}
        return FixedState(name, nodes, leaves)
    return FixedState(name, {"ties": {}, "extra": {}}, leaves)


def _from_torch(source: Path, name: str, form: str | None, *, split: bool) -> Content:
    from mpi_ckpt.cli.convert.torchfile import load_file

    value = load_file(source)
    if not split:
        return Content([_state_of(name, form, value)], {})
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise misused(
            f"{source} holds no dict with names as keys: there is nothing to --split"
        )
    return Content([_state_of(key, form, inner) for key, inner in value.items()], {})


def _state_of(name: str, form: str | None, value: Any) -> FixedState:  # noqa: ANN401
    from mpi_ckpt.cli.convert.torchfile import is_module, module_form
    from mpi_ckpt.states.tensors import tensor_leaf
    from mpi_ckpt.states.tree import flatten

    if form == "module" and not is_module(value):
        raise misused(
            f"{name!r} is not a dict that holds tensors only, as a module's does; leave "
            "out --as"
        )
    if form != "values" and is_module(value):
        structure, tensors = module_form(value)
        return FixedState(name, structure, [tensor_leaf(k, t) for k, t in tensors.items()])
    flat = flatten(value)
    return FixedState(name, flat.structure, list(flat.leaves.values()))


def _adaptdl(source: Path, *, trusted: bool) -> tuple[Content, list[str]]:
    path = _newest_of_adaptdl(source)
    if not trusted:
        raise misused(
            f"{path} is a checkpoint of adaptdl: its files are pickles. Nothing is run "
            "now, but the job that loads them will run whatever they hold; if you trust "
            "the people who made them, give --trust-pickle",
            "untrusted",
        )
    with os_errors_as(ReadError, "listing", path):
        names = filesystem.list_names(path)
    own = [name for name in names if name.startswith(_OWN_OF_ADAPTDL)]
    kept = [name for name in names if name not in own]
    if not kept:
        raise CommandError(f"{path} holds no state", kind="absent")
    return Content([FileStream(name, path / name) for name in kept], {}), own


def _newest_of_adaptdl(source: Path) -> Path:
    if is_adaptdl_name(source.name):
        return source
    with os_errors_as(ReadError, "listing", source):
        names = [n for n in filesystem.list_names(source) if is_adaptdl_name(n)]
    if not names:
        raise misused(
            f"{source} is a directory, but not one of adaptdl's: nothing in it has a name "
            "such as checkpoint-0"
        )
    return source / max(names, key=lambda n: int(re.sub(r"\D", "", n)))


def _starts_like_safetensors(source: Path) -> bool:
    try:
        with os_errors_as(ReadError, "reading", source):
            start = filesystem.read_start(source, 9)
    except ValueError as error:  # a FIFO or a device
        raise misused(str(error)) from error
    return source.suffix == ".safetensors" or start[8:] == b"{"
