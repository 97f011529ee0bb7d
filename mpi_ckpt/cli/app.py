# SPDX-License-Identifier: Apache-2.0
"""Groups all commands; imports the module of a command when it is used."""

from __future__ import annotations

import os
import sys
from difflib import get_close_matches
from importlib import import_module
from itertools import takewhile
from typing import TYPE_CHECKING, Any

import click
from click import Abort

from mpi_ckpt import __version__
from mpi_ckpt.cli.command import BAD, MISUSED
from mpi_ckpt.cli.screen import Screen
from mpi_ckpt.storage.faults import in_words

if TYPE_CHECKING:
    from collections.abc import Sequence

_COMMANDS = {
    "run": "restart.restarting:run",
    "watch": "observe.watching:watch",
    "ls": "inspect.listing:list_generations",
    "show": "inspect.showing:show",
    "verify": "inspect.verifying:verify",
    "diff": "inspect.diffing:diff",
    "du": "inspect.disk_use:disk_use",
    "history": "observe.history_plot:history",
    "report": "observe.reporting:report",
    "pin": "inspect.pinning:pin",
    "unpin": "inspect.pinning:unpin",
    "prune": "inspect.pruning:prune",
    "quarantine": "inspect.quarantining:quarantine",
    "rollback": "inspect.rolling_back:rollback",
    "rescue": "rescuing:rescue",
    "export": "convert.exporting:export",
    "import": "convert.importing:import_file",
    "doctor": "doctor.examining:doctor",
}
_COMPLETION = "_MPI_CKPT_COMPLETE"


class _Group(click.Group):
    """Loads its commands by name, so that ``ls`` does not import ``diff``."""

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        **extra: Any,  # noqa: ANN401 (click's)
    ) -> Any:  # noqa: ANN401 (click's)
        """Run a command; report every error, as JSON if requested."""
        words = _in_order(list(sys.argv[1:] if args is None else args))
        if not standalone_mode or _COMPLETION in os.environ:
            return super().main(words, prog_name, complete_var, standalone_mode, **extra)
        with Screen(as_json=_wants_json(words)) as screen:
            extra = {"obj": screen, "terminal_width": screen.help_width, **extra}
            code = self._answer(screen, words, prog_name, extra)
        if screen.is_cut_off:
            code = MISUSED if words[0] == "diff" else BAD
        raise SystemExit(code) from screen.fault

    def _answer(
        self, screen: Screen, words: list[str], prog_name: str | None, extra: dict[str, Any]
    ) -> int:
        named = words != ["--json"]
        try:
            code = super().main(
                (words or ["--help"]) if named else [],
                prog_name,
                standalone_mode=False,
                **extra,
            )
        except click.ClickException as error:
            text = error.format_message()
            context = getattr(error, "ctx", None)
            if context is not None:
                text += f"\nfor help: {context.command_path} --help"
            screen.fail(error, text, kind="usage", code=error.exit_code)
            return error.exit_code
        except (Abort, KeyboardInterrupt) as error:
            screen.fail(error, "interrupted", kind="interrupted", code=BAD)
            return BAD
        except OSError as error:  # of the output, such as that of --help
            screen.fail(error, in_words(error), kind="OSError", code=BAD)
            return BAD
        except Exception as error:  # a fault of this package
            screen.crash(error, BAD)
            return BAD
        return int(code or 0) if words else MISUSED

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        if cmd_name not in _COMMANDS:
            return None
        return _load(cmd_name)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] not in _COMMANDS and not args[0].startswith("-"):
            close = get_close_matches(args[0], _COMMANDS)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            ctx.fail(f"there is no command {args[0]!r}{hint}")
        return super().resolve_command(ctx, args)


def _wants_json(words: Sequence[str]) -> bool:
    """Whether the words request JSON, even if they are wrong otherwise."""
    ours = _own_words(words)
    asked = any(word == "--json" or word.startswith("--json=") for word in ours)
    return asked and not {"-h", "--help", "--version"} & set(ours)


def _in_order(words: list[str]) -> list[str]:
    """Move common options from before the command's name to after it."""
    flags = list(takewhile(("--json", "--iso").__contains__, words))
    rest = words[len(flags) :]
    return [rest[0], *flags, *rest[1:]] if rest else flags


def _load(command: str) -> click.Command:
    module, _, name = _COMMANDS[command].partition(":")
    found: click.Command = getattr(import_module(f"mpi_ckpt.cli.{module}"), name)
    return found


def _own_words(words: Sequence[str]) -> Sequence[str]:
    """Drop the words after ``--``, and the program of ``run`` with its options."""
    if "--" in words:
        words = words[: words.index("--")]
    if words[:1] != ["run"]:
        return words
    run = _load("run")
    valued = {
        name
        for option in run.params
        if isinstance(option, click.Option) and not option.is_flag
        for name in option.opts
    }
    place = 1
    while place < len(words) and words[place].startswith("-"):
        place += 2 if words[place] in valued else 1
    return words[:place]


@click.command(
    "mpi-ckpt",
    cls=_Group,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Exit codes: 0 good, 1 bad, 2 wrong usage. Every command takes --json.",
    no_args_is_help=False,
)
@click.version_option(__version__, message="mpi_ckpt %(version)s")
def cli() -> None:
    """Start jobs again, look at the checkpoints of mpi_ckpt, and look after them.

    DIR is the directory given to CheckpointManager. GENERATION is a number, a name such
    as checkpoint-00000042, or "newest".
    """
