# SPDX-License-Identifier: Apache-2.0
"""Implements ``mpi-ckpt run``, which starts a job again until it has finished."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from textwrap import shorten
from typing import TYPE_CHECKING

import click

from mpi_ckpt.cli.command import BAD, GOOD, MISUSED, CommandError, command
from mpi_ckpt.cli.doctor.machine import which
from mpi_ckpt.cli.restart.hosting import HostBook, ask_hosts_script, parse_hosts
from mpi_ckpt.cli.restart.launching import Salvage, find_launcher
from mpi_ckpt.cli.restart.looping import LOG, Loop, Plan, Requests
from mpi_ckpt.cli.tables import Column

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from mpi_ckpt.cli.restart.launching import Host
    from mpi_ckpt.cli.screen import Screen

_COLUMNS = (
    Column("attempt", right=True),
    Column("np", right=True, spare=4),
    Column("hosts", names=True, spare=6),
    Column("seconds", right=True, spare=5),
    Column("code", right=True, spare=1),
    Column("outcome", states=True),
    Column("from", right=True, spare=3),
    Column("to", right=True, spare=2),
    Column("error", names=True, spare=7),
)

_ERROR_MAX = 100
"""The lines above the table have the whole error."""

_FILE = click.Path(exists=True, dir_okay=False, path_type=Path, resolve_path=True)
_SECONDS = click.FloatRange(min=0)


@command("run", "Start a job, and restart it until it has finished.")
@click.option(
    "--np",
    "size",
    metavar="N",
    type=click.IntRange(min=1),
    required=True,
    help="How many ranks to start.",
)
@click.option(
    "--min-np",
    "least",
    metavar="N",
    type=click.IntRange(min=1),
    help="If hosts are missing, start fewer ranks, but at least N.",
)
@click.option(
    "--max-restarts",
    metavar="N",
    type=click.IntRange(min=0),
    default=20,
    show_default=True,
    help="How many restarts there may be.",
)
@click.option("--hostfile", type=_FILE, help="A file of lines such as host:slots.")
@click.option(
    "--hosts-script",
    type=_FILE,
    help="A script that prints such lines.",
)
@click.option(
    "--script-timeout",
    metavar="SECONDS",
    type=_SECONDS,
    default=60,
    show_default=True,
    help="How long the hosts script may take.",
)
@click.option(
    "--launcher",
    metavar="COMMAND",
    help="Command that starts ranks; default: mpirun, else srun.",
)
@click.option(
    "--backoff",
    metavar="SECONDS",
    type=_SECONDS,
    default=1,
    show_default=True,
    help="How long to wait after a failure; doubled while nothing new is saved.",
)
@click.option(
    "--timeout",
    metavar="SECONDS",
    type=_SECONDS,
    default=0,
    help="End an attempt that has recorded nothing for this long; 0: never.",
)
@click.option(
    "--patience",
    metavar="SECONDS",
    type=_SECONDS,
    default=600,
    show_default=True,
    help="How long to wait for hosts.",
)
@click.option(
    "--folder",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("mpi-ckpt-run"),
    show_default=True,
    help="Where notes and log go; every host must see it.",
)
@click.option(
    "--trust-exit-code",
    is_flag=True,
    help="Take exit code 0 for success if nothing is recorded.",
)
@click.option(
    "--stop-when-preempted",
    is_flag=True,
    help="End when the job is preempted: a scheduler starts this command again.",
)
@click.option(
    "--rescue",
    "salvage",
    metavar="LOCAL DIR",
    type=(str, click.Path(file_okay=False, path_type=Path)),
    help="Copy what hosts keep in LOCAL to DIR when hosts change, or the job ends early.",
)
@click.argument("program", nargs=-1, required=True, type=click.UNPROCESSED)
def run(
    screen: Screen,
    size: int,
    least: int | None,
    max_restarts: int,
    hostfile: Path | None,
    hosts_script: Path | None,
    script_timeout: float,
    launcher: str | None,
    backoff: float,
    timeout: float,
    patience: float,
    folder: Path,
    trust_exit_code: bool,
    stop_when_preempted: bool,
    salvage: tuple[str, Path] | None,
    program: tuple[str, ...],
) -> int:
    """Start PROGRAM on NP ranks; when it ends too early, start it again.

    It has finished when its CheckpointManager was closed without an error: an exit code of
    0 is not enough, as mpirun gives it for a lost host as well. Each attempt goes on from
    the last save. A failure that repeats three times at the same step ends the loop.
    SIGTERM, SIGINT and SIGUSR1 are passed on as a request to save and stop; a second one
    ends the job. The exit code is then the job's.
    """
    if least is not None and least > size:
        raise CommandError("--min-np exceeds --np", code=MISUSED, kind="usage")
    if hostfile is not None and hosts_script is not None:
        text = "give --hostfile or --hosts-script, not both"
        raise CommandError(text, code=MISUSED, kind="usage")
    if which(program[0], os.environ) is None and not Path(program[0]).is_file():
        raise CommandError(f"{program[0]} is not in PATH", code=MISUSED, kind="absent")
    plan = Plan(
        program=program,
        launcher=find_launcher(launcher, os.environ),
        size=size,
        least=least or size,
        max_restarts=max_restarts,
        backoff=backoff,
        timeout=timeout,
        patience=patience,
        trust_code=trust_exit_code,
        stop_when_preempted=stop_when_preempted,
        folder=folder.absolute(),
        salvage=None if salvage is None else Salvage(salvage[0], salvage[1].absolute()),
    )
    warn = partial(screen.say, aside=True)
    book = HostBook(_source(hostfile, hosts_script, script_timeout), warn)
    with Requests() as requests:
        loop = Loop(plan, book, requests, os.environ, warn, quiet=screen.as_json)
        finished = loop.run()
    _report(screen, loop, plan.folder / LOG)
    if finished:
        return GOOD
    return (loop.attempts[-1].code if loop.attempts else BAD) or BAD


# Words after the program's name are its own options.
run.allow_interspersed_args = False


def _source(
    hostfile: Path | None, script: Path | None, seconds: float
) -> Callable[[], Sequence[Host]] | None:
    if script is not None:
        return partial(ask_hosts_script, script, os.environ, seconds)
    if hostfile is not None:
        return partial(_read_hosts, hostfile)
    return None


def _read_hosts(path: Path) -> Sequence[Host]:
    try:
        hosts = parse_hosts(path.read_text())
    except (OSError, ValueError) as error:
        raise CommandError(f"{path}: {error}", code=MISUSED, kind="hosts") from None
    if not hosts:
        raise CommandError(f"{path} names no host", code=MISUSED, kind="hosts")
    return hosts


def _report(screen: Screen, loop: Loop, log: Path) -> None:
    screen.data(
        {
            "finished": loop.reason == "finished",
            "reason": loop.reason,
            "log": str(log),
            "attempts": [attempt.to_json() for attempt in loop.attempts],
        }
    )
    screen.table(
        _COLUMNS,
        [
            (
                attempt.attempt,
                attempt.np,
                " ".join(attempt.hosts),
                f"{attempt.seconds:.1f}",
                attempt.code,
                attempt.outcome,
                attempt.step_from,
                attempt.step_to,
                shorten(attempt.error.partition("\n")[0], _ERROR_MAX, placeholder=" ..."),
            )
            for attempt in loop.attempts
        ],
    )
    screen.say(f"{loop.reason}; log: {log}")
