# SPDX-License-Identifier: Apache-2.0
"""What all commands have in common: arguments, ``--json``, errors, exit codes."""

from __future__ import annotations

import errno
import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from mpi_ckpt.cli.screen import Screen
from mpi_ckpt.errors import CheckpointError
from mpi_ckpt.storage import filesystem
from mpi_ckpt.storage.faults import in_words
from mpi_ckpt.storage.layout import generation_number

if TYPE_CHECKING:
    from collections.abc import Callable

    from click.shell_completion import CompletionItem

__all__ = [
    "BAD",
    "GOOD",
    "MISUSED",
    "CommandError",
    "command",
    "directory_argument",
    "generation_argument",
]

Function = TypeVar("Function", bound="Callable[..., Any]")

GOOD, BAD, MISUSED = 0, 1, 2
"""Exit codes of all commands; click itself uses the last for wrong arguments."""


class CommandError(Exception):
    """A command cannot do what it was asked for.

    Args:
        message: What is wrong and what to do.
        code: The exit code.
        kind: A word for programs.
    """

    def __init__(self, message: str, *, code: int = BAD, kind: str = "refused") -> None:
        super().__init__(message)
        self.code = code
        self.kind = kind


def command(
    name: str, *, trouble: int = BAD
) -> Callable[[Callable[..., int]], click.Command]:
    """Make a command of a function that takes a screen and returns an exit code.

    Args:
        name: Name of the command.
        trouble: Exit code for files that are damaged or cannot be read.
    """

    def decorate(function: Callable[..., int]) -> click.Command:
        @functools.wraps(function)
        def run(*, as_json: bool, **given: Any) -> None:  # noqa: ANN401 (click's)
            screen = Screen(as_json=as_json)
            try:
                code = function(screen, **given)
            except CommandError as error:
                screen.fail(error.kind, str(error))
                code = error.code
            except CheckpointError as error:
                screen.fail(type(error).__name__, str(error))
                code = trouble
            except OSError as error:
                if error.errno == errno.EPIPE:  # somebody's `| head`
                    raise
                screen.fail("OSError", _text_of(error))
                code = trouble
            except MemoryError as error:
                screen.fail("memory", f"there is not enough memory: {error}")
                code = trouble
            except RecursionError:
                screen.fail("damaged", "the structure of a state is nested too deeply")
                code = trouble
            click.get_current_context().exit(code)

        option = click.option("--json", "as_json", is_flag=True, help="Answer with JSON.")
        return click.command(name)(option(run))

    return decorate


def directory_argument(
    name: str = "directory", *, required: bool = True
) -> Callable[[Function], Function]:
    """Return the argument for a checkpoint directory that must be there."""
    kind = click.Path(exists=True, file_okay=False, path_type=Path)
    return click.argument(name, metavar="DIR", type=kind, required=required)


def generation_argument(*, required: bool = False) -> Callable[[Function], Function]:
    """Return the argument for a generation, with completion by the shell."""
    metavar = "GENERATION" if required else "[GENERATION]"
    return click.argument(
        "generation", metavar=metavar, required=required, shell_complete=_complete
    )


def _complete(
    ctx: click.Context,
    param: click.Parameter,  # noqa: ARG001
    incomplete: str,
) -> list[str | CompletionItem]:
    directory = ctx.params.get("directory")
    if not isinstance(directory, Path):
        return []
    try:
        names = filesystem.list_names(directory)
    except OSError:
        return []
    numbers = sorted(n for name in names if (n := generation_number(name)) is not None)
    words = [*map(str, reversed(numbers)), "newest"]
    return [word for word in words if word.startswith(incomplete)]


def _text_of(error: OSError) -> str:
    where = f"{error.filename}: " if error.filename else ""
    return f"{where}{in_words(error)}"
