# SPDX-License-Identifier: Apache-2.0
"""The group of all commands; the module of a command is imported when it is used."""

from __future__ import annotations

from difflib import get_close_matches
from importlib import import_module

import click

from mpi_ckpt import __version__

__all__ = ["cli"]

_COMMANDS = {
    "run": "restarting:run",
    "ls": "listing:list_generations",
    "show": "showing:show",
    "verify": "verifying:verify",
    "diff": "diffing:diff",
    "prune": "pruning:prune",
    "quarantine": "quarantining:quarantine",
    "rollback": "going_back:rollback",
    "export": "exporting:export",
    "import": "importing:import_file",
    "doctor": "doctor:doctor",
}


class _Group(click.Group):
    """Knows its commands by name, so that ``ls`` does not pay for ``diff``."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        if cmd_name not in _COMMANDS:
            return None
        module, _, name = _COMMANDS[cmd_name].partition(":")
        command: click.Command = getattr(import_module(f"mpi_ckpt.cli.{module}"), name)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] not in _COMMANDS and not args[0].startswith("-"):
            close = get_close_matches(args[0], _COMMANDS)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            ctx.fail(f"there is no command {args[0]!r}{hint}")
        return super().resolve_command(ctx, args)


@click.command(
    "mpi-ckpt",
    cls=_Group,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Exit codes: 0 good, 1 bad, 2 wrongly used. Every command takes --json.",
)
@click.version_option(__version__, message="mpi_ckpt %(version)s")
def cli() -> None:
    """Start jobs again, look at the checkpoints of mpi_ckpt, and look after them.

    DIR is the directory given to CheckpointManager. GENERATION is a number, a name such
    as checkpoint-00000042, or "newest".
    """
