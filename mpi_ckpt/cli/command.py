# SPDX-License-Identifier: Apache-2.0
"""Defines the common parts of commands: arguments, ``--json``, errors, exit codes."""

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
from mpi_ckpt.storage.format.layout import generation_number
from mpi_ckpt.storage.owning.lock import DirectoryLock

if TYPE_CHECKING:
    from collections.abc import Callable

    from click.shell_completion import CompletionItem

Function = TypeVar("Function", bound="Callable[..., Any]")

GOOD, BAD, MISUSED = 0, 1, 2
"""Exit codes of all commands; click itself uses the last for wrong arguments."""


LOCK_PATIENCE_SECONDS = 0.5
"""A user waits at the keyboard, and a running job will not end in five seconds."""


class CommandError(Exception):
    """A command cannot do what the user requests.

    Args:
        message: The fault, and what to do.
        code: The exit code.
        kind: A word for programs.
    """

    def __init__(self, message: str, *, code: int = BAD, kind: str = "refused") -> None:
        super().__init__(message)
        self.code = code
        self.kind = kind


def misused(message: str, kind: str = "usage") -> CommandError:
    """Return the error of a command that was given the wrong thing."""
    return CommandError(message, code=MISUSED, kind=kind)


def command(
    name: str, short: str, *, trouble: int = BAD, dates: bool = False
) -> Callable[[Callable[..., int]], click.Command]:
    """Make a command from a function that takes a screen and returns an exit code.

    Args:
        name: Name of the command.
        short: Short description, for the list of all commands.
        trouble: Exit code for files that are damaged or cannot be read, and for faults.
        dates: Whether it shows dates, and takes ``--iso``.
    """

    def decorate(function: Callable[..., int]) -> click.Command:
        @functools.wraps(function)
        def run(*, as_json: bool, iso: bool = False, **given: Any) -> None:  # noqa: ANN401 (click's)
            screen = _screen()
            screen.as_json, screen.iso = screen.as_json or as_json, iso
            try:
                code = function(screen, **given)
            except CommandError as error:
                code = error.code
                screen.fail(error, str(error), kind=error.kind, code=code)
            except Exception as error:
                if isinstance(error, OSError) and error.errno == errno.EPIPE:
                    raise  # such as `| head`
                code = trouble
                _report_failure(screen, error, code)
            except KeyboardInterrupt as error:
                code = trouble
                screen.fail(error, "interrupted", kind="interrupted", code=code)
            click.get_current_context().exit(code)

        json_option = click.option(
            "--json", "as_json", is_flag=True, help="Answer with one JSON object."
        )
        iso_option = click.option(
            "--iso",
            is_flag=True,
            help="Show dates as in ISO 8601, in UTC, instead of ages.",
        )
        options = iso_option(run) if dates else run
        return click.command(name, short_help=short)(json_option(options))

    return decorate


class DirectoryPath(click.Path):
    """A path given by the user; commands check later what is there."""

    def __init__(self) -> None:
        super().__init__(file_okay=False, path_type=Path)

    def convert(self, value: Any, param: Any, ctx: Any) -> Path:  # noqa: ANN401 (click's)
        """Refuse an empty word: as a path it would be the working directory."""
        if not value:
            self.fail("it is empty: was a variable not set?", param, ctx)
        return Path(value)


def directory_argument(
    name: str = "directory", *, required: bool = True
) -> Callable[[Function], Function]:
    """Return the argument for a checkpoint directory."""
    metavar = "DIR" if required else "[DIR]"
    return click.argument(name, metavar=metavar, type=DirectoryPath(), required=required)


def generation_argument(*, required: bool = False) -> Callable[[Function], Function]:
    """Return the argument for a generation, with completion by the shell."""
    metavar = "GENERATION" if required else "[GENERATION]"
    return click.argument(
        "generation", metavar=metavar, required=required, shell_complete=_complete
    )


def mode_option() -> Callable[[Function], Function]:
    """Return the option for the direction in which a metric is good."""
    return click.option(
        "--mode",
        type=click.Choice(["min", "max"]),
        help="Whether its lowest or its highest value is the best.",
    )


def lock_directory(directory: Path, job: str) -> DirectoryLock:
    """Lock a directory for a command that changes it.

    Args:
        directory: The checkpoint directory.
        job: Name of the command's run.

    Raises:
        LockedError: If a job uses it.
        SaveError: If it cannot be locked.
    """
    return DirectoryLock(directory, job, LOCK_PATIENCE_SECONDS, locking="either")


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


def _screen() -> Screen:
    found = click.get_current_context().find_object(Screen)
    assert found is not None
    return found


def _report_failure(screen: Screen, error: Exception, code: int) -> None:
    """Report the meaning of a command's exception."""
    if isinstance(error, CheckpointError):
        screen.fail(error, str(error), kind=type(error).__name__, code=code)
    elif isinstance(error, OSError):
        screen.fail(error, f"{_place(error)}{in_words(error)}", kind="OSError", code=code)
    elif isinstance(error, MemoryError):
        text = f"there is not enough memory: {error}"
        screen.fail(error, text, kind="memory", code=code)
    elif isinstance(error, RecursionError):
        text = "the structure of a state is nested too deeply"
        screen.fail(error, text, kind="damaged", code=code)
    else:
        screen.crash(error, code)


def _place(error: OSError) -> str:
    if error.filename:
        return f"{error.filename}: "
    try:
        Path.cwd()
    except FileNotFoundError:  # a relative path cannot be found
        return "the working directory has been removed: "
    return ""
