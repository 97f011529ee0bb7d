# SPDX-License-Identifier: Apache-2.0
"""Finds the kind of a given directory, by one rule for all commands.

======================  ==================  ===================  =====================
given                   looks at one        works on all         is written into
                        generation          generations
======================  ==================  ===================  =====================
a checkpoint directory  yes                 yes                  yes
one generation's own    yes                 refused              refused
empty, or of others     refused             refused              yes
not there               refused             refused              made
a file, of adaptdl,     refused             refused              refused
a quarantine, leftover
======================  ==================  ===================  =====================

A refusal is wrong usage, with one exit code and advice on what to give instead.
"""

from __future__ import annotations

import re
import stat
from shlex import quote
from typing import TYPE_CHECKING

from mpi_ckpt.cli.command import CommandError, misused
from mpi_ckpt.errors import ReadError
from mpi_ckpt.storage import filesystem
from mpi_ckpt.storage.directory import recovery
from mpi_ckpt.storage.faults import in_words, os_errors_as
from mpi_ckpt.storage.format.layout import (
    HISTORY,
    LOCK,
    MANIFEST,
    QUARANTINE,
    STATUS,
    generation_number,
    is_adaptdl_name,
    is_partial_name,
    leased_job,
    rolled_back_numbers,
)
from mpi_ckpt.storage.local.lineage import LINEAGE, NEW_LINEAGE

if TYPE_CHECKING:
    from pathlib import Path
    from typing import Literal

    Kind = Literal[
        "checkpoints", "generation", "leftover", "quarantine", "adaptdl", "empty",
        "foreign", "missing", "file",
    ]  # fmt: skip


_OURS = (LOCK, HISTORY, STATUS, LINEAGE, "halt")
"""Files that a job, or who asks it to stop, makes before its first generation."""


def kind_of(path: Path) -> Kind:
    """Return the kind of directory that a path leads to.

    Raises:
        CommandError: If the operating system cannot tell what is there.
        ReadError: If the directory cannot be listed.
    """
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        return "missing"
    except NotADirectoryError:  # nor could it be made: a parent is a file
        return "file"
    except (OSError, ValueError) as error:
        why = in_words(error) if isinstance(error, OSError) else str(error)
        raise misused(f"{path} cannot be examined: {why}") from error
    return _kind_of_directory(path) if stat.S_ISDIR(mode) else "file"


def directory_of_all(path: Path, command: str) -> Path:
    """Return a directory if a command can work on all its generations.

    Args:
        path: The given path.
        command: Name of the command.

    Raises:
        CommandError: If it is not one; the message says what is meant or missing.
    """
    kind = kind_of(path)
    if kind == "generation":
        raise misused(
            f"{path} is the directory of one generation; {command} needs the directory "
            f"that contains it: {_around(path)}"
        )
    if kind != "checkpoints":
        raise _refusal(path, kind)
    return path


def directory_to_look_at(path: Path, wanted: str | None, command: str) -> Path:
    """Return a checkpoint directory, or a generation's own if that is enough.

    Args:
        path: The given path.
        wanted: Another argument that selects a generation; None for none.
        command: Name of the command.

    Raises:
        CommandError: If it is neither, or the generation is given twice.
    """
    kind = kind_of(path)
    if kind == "generation" and wanted is not None:
        raise misused(
            f"{path} is the directory of one generation, so {wanted} is one argument too "
            f"many: mpi-ckpt {command} {quote(str(path))}, or mpi-ckpt {command} "
            f"{quote(str(_around(path)))} {quote(wanted)}"
        )
    if kind not in ("checkpoints", "generation"):
        raise _refusal(path, kind)
    # Below a checkpoint directory no link is followed, but the user has named this one.
    return path.resolve() if kind == "generation" and path.is_symlink() else path


def require_target(path: Path) -> None:
    """Refuse a directory that no job should save in; it need not exist.

    Raises:
        CommandError: With the reason.
    """
    kind = kind_of(path)
    if kind == "generation":
        raise misused(
            f"{path} is the directory of one generation, and nothing is saved inside it: "
            f"give the directory that contains it: {_around(path)}"
        )
    if kind in ("leftover", "quarantine", "adaptdl", "file"):
        raise _refusal(path, kind)


def _kind_of_directory(path: Path) -> Kind:
    name = path.resolve().name
    found = recovery.survey(path)
    with os_errors_as(ReadError, "listing", path):
        names = filesystem.list_names(path)
    set_aside = found.quarantined or found.rolled_back or found.partials
    kinds: list[tuple[Kind, object]] = [
        ("quarantine", name == QUARANTINE),
        ("leftover", is_partial_name(name.partition("~")[0])),
        ("generation", _names_generation(name) and not found.generations),
        ("checkpoints", found.generations),
        ("generation", MANIFEST in names),
        ("checkpoints", set_aside),
        ("adaptdl", found.adaptdl or is_adaptdl_name(name)),
        ("empty", all(_is_ours(name) for name in names)),
    ]
    return next((kind for kind, holds in kinds if holds), "foreign")


def _is_ours(name: str) -> bool:
    return name in _OURS or name.startswith(NEW_LINEAGE) or leased_job(name) is not None


def _names_generation(name: str) -> bool:
    # The name of a generation quarantined twice ends with "~2".
    plain = re.sub(r"~\d+$", "", name)
    return generation_number(plain) is not None or rolled_back_numbers(name) is not None


def _around(path: Path) -> Path:
    """Return the directory that contains a generation's own."""
    parent = path.parent if path.name not in ("", "..") else path.resolve().parent
    return parent.parent if parent.resolve().name == QUARANTINE else parent


def _refusal(path: Path, kind: Kind) -> CommandError:
    texts = {
        "missing": f"{path} does not exist",
        "file": f"{path} is no directory",
        "leftover": f"{path} is a leftover: being written or removed, or cut off; never a "
        "whole generation. Give the directory that contains it: "
        f"{path.resolve().parent}",
        "quarantine": f"{path} holds what was set aside; give the directory that contains "
        f"it, {path.resolve().parent}, or the directory of one generation in "
        "it",
        "adaptdl": f"{path} holds checkpoints as adaptdl names them, and no generation of "
        f"mpi_ckpt; to take over the newest: mpi-ckpt import {quote(str(path))} --into NEW",
        "empty": f"{path} holds no generation: nothing was saved there",
        "foreign": f"{path} holds no generation of mpi_ckpt, only files of others",
    }
    absent = kind in ("missing", "empty", "foreign")
    return misused(texts[kind], "absent" if absent else "usage")
