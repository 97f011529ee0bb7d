# SPDX-License-Identifier: Apache-2.0
"""Defines the level between memory and the checkpoint directory: disks of the hosts."""

from __future__ import annotations

import getpass
import os
import re
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from mpi_ckpt.errors import OptionsError
from mpi_ckpt.pacing import parse_interval

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

__all__ = ["LOCAL_ENVIRONMENT", "Local"]


@dataclass(frozen=True, slots=True)
class Local:
    """Frequent saves on the hosts' own disks, beside a manager's directory.

    ``step()`` makes them as often as ``every`` says, and ``save(level="local")`` makes one.
    A restore takes the newest generation that the hosts, or the directory, can complete.
    Every rank must give the same. docs/local.md says which losses each level survives.

    Args:
        path: Where each host keeps its generations: an absolute path, on a disk or tmpfs of
            the host's own. ``{user}`` and ``{host}`` stand for these names.
        every: Steps (an int) or time (a timedelta) between two saves in ``step()``; None:
            only ``save(level="local")`` makes them.
        copies: How many hosts hold each byte, all in different failure domains; fewer if
            there are fewer domains. ``"all"``: one in each domain.
        domain: Function that returns the failure domain of a host from its name, such as
            its rack; the same on every rank. None: each host is one.
        keep: How many generations stay on the hosts.
        reserve: Bytes that must stay free on the file system, and of memory if that is a
            tmpfs; a save that would leave less fails.
        drain: Bytes per second at which all hosts together copy a due save of the directory
            from their generations, behind the training. None: the ranks write it
            themselves.
        lost: What a restore does if the hosts of a newer generation are gone: ``"warn"``
            and go on from an older one, or ``"raise"``.

    Raises:
        OptionsError: On every rank that makes it, with all faults at once.
    """

    path: str
    every: int | timedelta | None = field(default=None, kw_only=True)
    copies: int | Literal["all"] = field(default=2, kw_only=True)
    # Ranks compare this as text, and the text of a function differs between ranks.
    domain: Callable[[str], str] | None = field(default=None, kw_only=True, repr=False)
    keep: int = field(default=2, kw_only=True)
    reserve: int = field(default=1 << 30, kw_only=True)
    drain: float | None = field(default=None, kw_only=True)
    lost: Literal["warn", "raise"] = field(default="warn", kw_only=True)

    def __post_init__(self) -> None:
        object.__setattr__(self, "path", os.fspath(self.path))
        every = self.every
        is_time = isinstance(every, timedelta) and every > timedelta(0)
        is_count = isinstance(every, int) and not isinstance(every, bool) and every >= 1
        faults = [
            text
            for holds, text in (
                (
                    Path(self.path).is_absolute(),
                    f"path is {self.path!r}: an absolute path",
                ),
                (
                    every is None or is_time or is_count,
                    f"every is {every!r}: at least 1 step, a time, or None",
                ),
                (
                    self.copies == "all" or (_is_integer(self.copies) and self.copies >= 1),
                    f"copies is {self.copies!r}: at least 1, or 'all'",
                ),
                (
                    _is_integer(self.keep) and self.keep >= 1,
                    f"keep is {self.keep!r}: at least 1",
                ),
                (
                    _is_integer(self.reserve) and self.reserve >= 0,
                    f"reserve is {self.reserve!r}: at least 0 bytes",
                ),
                (
                    self.drain is None or _is_above_0(self.drain),
                    f"drain is {self.drain!r}: above 0 bytes per second, or None",
                ),
                (
                    self.lost in ("warn", "raise"),
                    f"lost is {self.lost!r}: warn or raise",
                ),
            )
            if not holds
        ]
        if faults:
            raise OptionsError(
                "these values of Local cannot be used:\n  " + "\n  ".join(faults),
                problems=faults,
            )

    @classmethod
    def from_env(cls, environ: Mapping[str, str] = os.environ) -> Local | None:
        """Make it from ``MPI_CKPT_LOCAL*`` variables; None if they name no path.

        Not collective. Thread-safe. docs/local.md lists the variables.

        Raises:
            OptionsError: On every rank that calls, if a value cannot be read or used, or
                there are others without ``MPI_CKPT_LOCAL``.
        """
        given: dict[str, Any] = {}
        faults: list[str] = []
        for variable, (name, parse) in LOCAL_ENVIRONMENT.items():
            if environ.get(variable):
                try:
                    given[name] = parse(environ[variable])
                except (ValueError, OverflowError) as error:
                    faults.append(f"{variable}={environ[variable]!r}: {error}")
        if (given or faults) and not environ.get("MPI_CKPT_LOCAL"):
            faults.append("MPI_CKPT_LOCAL, the path on each host, is not set")
        if faults:
            raise OptionsError("\n  ".join(faults), problems=faults)
        return cls(given.pop("path"), **given) if given else None

    @property
    def wanted_copies(self) -> int | None:
        """How many copies are wanted; None for one in each domain."""
        return None if self.copies == "all" else self.copies

    def place(self, host: str) -> Path:
        """Return where a host keeps its generations. Not collective.

        Args:
            host: Name of this host.
        """
        names = {"{host}": host}
        if "{user}" in self.path:
            names["{user}"] = getpass.getuser()  # fails for a user without a name
        return Path(
            re.sub(r"{\w+}", lambda found: names.get(found[0], found[0]), self.path)
        )

    def domains(self, hosts: Sequence[str]) -> tuple[str, ...]:
        """Return the failure domains of hosts, given their names. Not collective."""
        return tuple(hosts) if self.domain is None else tuple(map(self.domain, hosts))

    def describe(self) -> str:
        """Return the settings, which must be the same on every rank. Not collective."""
        return repr(self)


def _parse_every(text: str) -> int | timedelta:
    every = parse_interval(text)
    if every == "auto":
        raise ValueError("steps (50) or seconds (60s)")
    return every


def _parse_copies(text: str) -> int | Literal["all"]:
    return "all" if text == "all" else int(text)


LOCAL_ENVIRONMENT: dict[str, tuple[str, Callable[[str], Any]]] = {
    "MPI_CKPT_LOCAL": ("path", str),
    "MPI_CKPT_LOCAL_EVERY": ("every", _parse_every),
    "MPI_CKPT_LOCAL_COPIES": ("copies", _parse_copies),
    "MPI_CKPT_LOCAL_KEEP": ("keep", int),
    "MPI_CKPT_LOCAL_DRAIN": ("drain", float),
    "MPI_CKPT_LOCAL_RESERVE": ("reserve", int),
    "MPI_CKPT_LOCAL_LOST": ("lost", str),
}
"""Variable -> (argument of `Local`, parser): drives `Local.from_env` and the docs."""


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_above_0(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value > 0
