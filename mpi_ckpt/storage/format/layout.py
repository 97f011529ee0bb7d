# SPDX-License-Identifier: Apache-2.0
"""Makes and parses every name inside a checkpoint directory, and of its leaves. Pure."""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass
from typing import TYPE_CHECKING
from urllib.parse import quote

from mpi_ckpt.errors import RegistrationError
from mpi_ckpt.storage.format.strict_json import shown

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence


MANIFEST = "manifest.json"
LOCK = ".lock"
QUARANTINE = ".quarantine"

HISTORY = ".history.jsonl"
"""A line for each save and restore, which nothing depends on."""

STATUS = ".status.json"
"""What the running job does now, which nothing depends on."""

GENERATION_MAX = 10**18 - 1
"""A generation with a larger number would have a name that nobody recognizes."""

STATE_NAME_BYTES_MAX = 200
"""Leaves room for the suffix within the 255 bytes of a file name."""

_FAULTS_SHOWN = 50
_GENERATION = re.compile(r"checkpoint-(\d{8,18})")
_ADAPTDL = re.compile(r"checkpoint-\d{1,7}")
_PARTIAL = re.compile(r"\.partial-(\d{8,18})-[0-9a-z]+")
_ROLLED_BACK = re.compile(r"\.rolled-back-(\d{8,18})-(\d{8,18})")
_LEASE = re.compile(r"\.lease-([0-9a-z]+)")
_PIN = re.compile(r"\.pin-(\d{8,18})")
_CONDEMNED = "x"  # job names are hexadecimal and cannot contain it
_FILE = re.compile(r"(?!\.)[A-Za-z0-9._%~+-]{1,255}|\.(?!\.)[A-Za-z0-9._%~+-]{1,254}")


def generation_name(number: int) -> str:
    """Return the directory name of a published generation."""
    return f"checkpoint-{number:08d}"


def generation_number(name: str) -> int | None:
    """Return the number in a generation's name, None for any other name."""
    match = _GENERATION.fullmatch(name)
    # `checkpoint-000000042` would be a second name of generation 42: it is foreign.
    if match is None or generation_name(int(match[1])) != name:
        return None
    return int(match[1])


def is_adaptdl_name(name: str) -> bool:
    """Return whether a name looks like adaptdl's checkpoint, which cannot be read here."""
    return _ADAPTDL.fullmatch(name) is not None


def partial_name(number: int, job: str) -> str:
    """Return the name of a generation that is being written, or being removed."""
    return f".partial-{number:08d}-{job}"


def is_partial_name(name: str) -> bool:
    """Return whether a name is one that `partial_name` makes."""
    return _PARTIAL.fullmatch(name) is not None


def condemned_name(name: str, job: str) -> str:
    """Return the name to which a sweeping job moves a leftover before deleting it."""
    return f"{name}{_CONDEMNED}{job}"


def is_condemned_name(name: str) -> bool:
    """Return whether a leftover is being deleted: no job writes under such a name."""
    return _CONDEMNED in name.rpartition("-")[2]


def is_partial_of(name: str, job: str) -> bool:
    """Return whether a job made a leftover, or is deleting it."""
    return name.rpartition("-")[2].rpartition(_CONDEMNED)[2] == job


def partial_number(name: str) -> int:
    """Return the number in a name that `partial_name` made."""
    return int(name.split("-")[1])


def lease_name(job: str) -> str:
    """Return the name of the file that shows that a job is alive."""
    return f".lease-{job}"


def leased_job(name: str) -> str | None:
    """Return the job in a name that `lease_name` made; None for any other."""
    match = _LEASE.fullmatch(name)
    return None if match is None else match[1]


def pin_name(number: int) -> str:
    """Return the name of the file that pins a generation."""
    return f".pin-{number:08d}"


def pinned_number(name: str) -> int | None:
    """Return the number in a name that `pin_name` made; None for any other."""
    match = _PIN.fullmatch(name)
    if match is None or pin_name(int(match[1])) != name:
        return None
    return int(match[1])


def rolled_back_name(number: int, highest: int) -> str:
    """Return the name of a generation set aside by a rollback.

    Args:
        number: Its number.
        highest: The highest number of any generation at the rollback: equal numbers mean
            rollbacks without a save in between.
    """
    return f".rolled-back-{highest:08d}-{number:08d}"


def rolled_back_numbers(name: str) -> tuple[int, int] | None:
    """Return the numbers in a name that `rolled_back_name` made; None for any other."""
    match = _ROLLED_BACK.fullmatch(name)
    if match is None or rolled_back_name(int(match[2]), int(match[1])) != name:
        return None
    return int(match[2]), int(match[1])


def shard_file_name(rank: int) -> str:
    """Return the name of the file with a rank's leaves."""
    return f"rank-{rank:05d}.safetensors"


def share_file_name(number: int) -> str:
    """Return the name of the file with a share of a local generation."""
    return f"share-{number:05d}.safetensors"


def tile_file_name(rank: int) -> str:
    """Return the name of the file with the tiles that a rank wrote."""
    return f"tiles-{rank:05d}.safetensors"


def stream_file_name(state: str) -> str:
    """Return the name of the file with the stream of a plain state."""
    encoded = quote(state, safe="~+")
    return f"%2E{encoded[1:]}.bin" if encoded.startswith(".") else f"{encoded}.bin"


def carried_file_name(name: str, generation: int) -> str:
    """Return the name that a later generation gives to a file of an older one."""
    stem, _, suffix = name.rpartition(".")
    stem = re.sub(r"\.from-\d+$", "", stem)
    return f"{stem}.from-{generation:08d}.{suffix}"


def check_file_name(name: object) -> str:
    """Return a file name from a manifest if it cannot lead out of its directory.

    Raises:
        ValueError: On the calling rank, if it could.
    """
    if not isinstance(name, str) or _FILE.fullmatch(name) is None:
        raise ValueError(f"{shown(name)} is not a file name of this format")
    return name


def check_state_name(name: object) -> None:
    """Refuse a state name that is empty, a path, or too long for a file name.

    Not collective. Thread-safe.

    Raises:
        RegistrationError: On the calling rank, with the fault.
    """
    if not isinstance(name, str):
        raise RegistrationError(
            f"state name {shown(name)} is not a string: a state's first argument "
            "is its name"
        )
    reason = _fault_of(name)
    if reason:
        raise RegistrationError(f"state name {shown(name)}: {reason}")


def _fault_of(name: str) -> str | None:
    if not name or name.isspace():
        return "must not be empty"
    if len(name) > STATE_NAME_BYTES_MAX:  # before each character is checked
        return f"has {len(name)} characters, {STATE_NAME_BYTES_MAX} at most"
    if name.startswith("/") or {".", ".."} & set(name.split("/")):
        return "must not be a path"
    if any(unicodedata.category(character) in ("Cc", "Cs") for character in name):
        return "must not hold NUL, other control characters or lone surrogates"
    length = len(stream_file_name(name).encode())
    if length > STATE_NAME_BYTES_MAX:
        return f"takes {length} bytes as a file name, {STATE_NAME_BYTES_MAX} at most"
    return None


def check_names_differ(names: Iterable[str]) -> None:
    """Refuse names that are equal, or equal on some file systems.

    Not collective. Thread-safe.

    Raises:
        RegistrationError: On the calling rank, with the pairs.
    """
    seen: dict[str, str] = {}
    faults: list[str] = []
    for name in names:
        folded = unicodedata.normalize("NFC", name).casefold()
        if folded not in seen:
            seen[folded] = name
        elif seen[folded] == name:
            faults.append(f"{name!r} is given twice")
        else:
            faults.append(f"{seen[folded]!r} and {name!r} differ only in case or form")
    if len(faults) > _FAULTS_SHOWN:
        more = f"and {len(faults) - _FAULTS_SHOWN} more"
        faults = [*faults[:_FAULTS_SHOWN], more]
    if faults:
        raise RegistrationError(
            "state names collide:\n  " + "\n  ".join(faults), problems=faults
        )


_PART = re.compile(r"rank-(\d{5,9})(?:\.json|/(.*))?", re.DOTALL)


@dataclass(frozen=True, slots=True)
class PartLeaves:
    """The leaves of one rank's part.

    Attributes:
        structure: Number of the leaf with the structure; None in the first form, whose
            single leaf has all bytes.
        numbers: Numbers of the other leaves, in saving order.
        names: Their names within the part.
    """

    structure: int | None
    numbers: tuple[int, ...]
    names: tuple[str, ...]


def structure_name(rank: int) -> str:
    """Return the name of the leaf with the structure of a part. Not collective."""
    return f"rank-{rank:05d}.json"


def part_leaf_name(rank: int, name: str) -> str:
    """Return the name of another leaf of a part. Not collective.

    Args:
        rank: The rank whose part it is.
        name: Name of the leaf within the part; empty if the part is a single array.
    """
    return f"rank-{rank:05d}/{name}" if name else f"rank-{rank:05d}"


def find_parts(names: Sequence[str]) -> list[PartLeaves]:
    """Find the parts of all ranks, in rank order, by the names of a state's leaves.

    Not collective. Thread-safe.

    Returns:
        The parts; an empty list if the leaves are not those of parts.
    """
    if list(names) == [part_leaf_name(rank, "") for rank in range(len(names))]:
        return [PartLeaves(None, (rank,), ("",)) for rank in range(len(names))]
    structures: dict[int, int] = {}
    leaves: dict[int, dict[int, str]] = {}
    for number, name in enumerate(names):
        match = _PART.fullmatch(name)
        if match is None:
            return []
        rank = int(match[1])
        if name == structure_name(rank):
            structures[rank] = number
        elif name == part_leaf_name(rank, match[2] or ""):
            leaves.setdefault(rank, {})[number] = match[2] or ""
        else:
            return []
    if sorted(structures) != list(range(len(structures))) or leaves.keys() - structures:
        return []
    of_ranks = [leaves.get(rank, {}) for rank in range(len(structures))]
    return [
        PartLeaves(structures[rank], tuple(mine), tuple(mine.values()))
        for rank, mine in enumerate(of_ranks)
    ]
