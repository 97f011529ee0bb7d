# SPDX-License-Identifier: Apache-2.0
"""Defines the request of a save, the space it takes, and its result. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from mpi_ckpt.engine.save.staging import StagedStream
from mpi_ckpt.engine.sync.captured import CapturedState
from mpi_ckpt.errors import SaveError
from mpi_ckpt.reports import SaveReport, SyncReport
from mpi_ckpt.storage.owning.ownership import survived_losses

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from mpi_ckpt.engine.sync.parts import OwnParts
    from mpi_ckpt.state import State

# An entry for a leaf in the manifest, or in a file's header, takes at least this much and
# its name. The estimate is low on purpose: a save that fits must not be refused.
_MANIFEST_ENTRY_BYTES = 100
_HEADER_ENTRY_BYTES = 50

_STEP_MAX = (1 << 63) - 1


@dataclass(frozen=True, slots=True)
class Begun:
    """The states that all ranks have agreed to save.

    Attributes:
        states: The same states in the same order on every rank.
        parts: This rank's parts; None if they are to be taken after the plain states have
            synced.
    """

    states: Sequence[State]
    parts: OwnParts | None


def require_notes(step: object, metrics: object) -> None:
    """Refuse a step or metrics that cannot be noted in a generation. Not collective.

    Raises:
        SaveError: On the calling rank, with what may be given.
    """
    if not isinstance(step, Integral):
        raise SaveError(
            f"step is {step!r}: the number of the training step, an int; the directory is "
            "given to the manager, and save() names the generation itself"
        )
    if abs(int(step)) > _STEP_MAX:
        raise SaveError(f"step is {step}: a number of at most 63 bits is needed")
    if metrics is not None and not isinstance(metrics, Mapping):
        raise SaveError(
            f"metrics is {metrics!r}: a dict of numbers by name, metrics={{'loss': 0.5}}"
        )
    for name, value in (metrics or {}).items():
        if not isinstance(name, str) or not _is_utf8(name):
            raise SaveError(
                f"the name of a metric is {name!r}: a text is needed, as in "
                "metrics={'loss': 0.5}"
            )
        try:
            float(value)
        except OverflowError:
            raise SaveError(f"metric {name!r} is too large for a float") from None
        except (TypeError, ValueError, RuntimeError):
            raise SaveError(
                f"metric {name!r} is of type {type(value).__name__}: one number is needed, "
                "such as loss.item()"
            ) from None


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:  # half a surrogate pair
        return False
    return True


@dataclass(frozen=True, slots=True, kw_only=True)
class SaveRequest:
    """The contents of a save.

    Attributes:
        states: Captured leaf states, and plain states to be streamed, in order.
        step: The training step.
        metrics: The user's metrics.
        size: Number of ranks.
        carry: Decides by name which other states of the newest generation to carry over;
            None for none.
    """

    states: Sequence[CapturedState | State]
    step: int
    size: int
    metrics: Mapping[str, float] = field(default_factory=dict)
    carry: Callable[[str], bool] | None = None

    @property
    def captured(self) -> list[CapturedState]:
        """The leaf states."""
        return [state for state in self.states if isinstance(state, CapturedState)]

    @property
    def plain(self) -> list[State]:
        """The states that write themselves."""
        return [state for state in self.states if not isinstance(state, CapturedState)]


@dataclass(frozen=True, slots=True)
class Published:
    """A generation that exists and is durable.

    Attributes:
        generation: Its number.
        path: Its directory.
        bytes_written: Bytes written for it, by all ranks.
        bytes_reused: Bytes of the leaves that it shares with older generations.
        retired: Older generations that retention no longer keeps.
        kept: Number of generations that it keeps.
        metrics: The metrics of root.
    """

    generation: int
    path: Path
    bytes_written: int
    bytes_reused: int
    retired: tuple[int, ...]
    kept: int = 1
    metrics: Mapping[str, float] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return the values that root sends to every rank. Not collective. Thread-safe."""
        return {
            "generation": self.generation,
            "path": str(self.path),
            "bytes_written": self.bytes_written,
            "bytes_reused": self.bytes_reused,
            "pruned": self.retired,
            "kept": self.kept,
            "metrics": dict(self.metrics),
            "survives": survived_losses(self.path),
        }


def make_report(
    facts: Mapping[str, Any],
    step: int,
    size: int,
    seconds: Mapping[str, float],
    sync: SyncReport,
) -> SaveReport:
    """Return the report of a save. Not collective. Thread-safe.

    Args:
        facts: What `Published.to_json` returned on root.
        step: The training step.
        size: Number of ranks.
        seconds: The times of its phases.
        sync: What has differed between replicas.
    """
    return SaveReport(
        generation=facts["generation"],
        path=Path(facts["path"]),
        step=step,
        size=size,
        bytes_written=facts["bytes_written"],
        bytes_reused=facts["bytes_reused"],
        seconds=seconds,
        pruned=tuple(facts["pruned"]),
        sync=sync,
        survives=frozenset(facts["survives"]),
        kept=facts["kept"],
        metrics=facts["metrics"],
    )


class SpaceNeeded(NamedTuple):
    """A lower bound of the bytes and files that all ranks will write."""

    nbytes: int
    files: int


def foresee_space(
    captured: Sequence[CapturedState],
    fresh: Sequence[Sequence[int]],
    plain: Sequence[State],
) -> SpaceNeeded:
    """Return the least space that a save takes.

    Not collective. Thread-safe. The size of a plain state is known only if it is staged.

    Args:
        captured: The contents of the leaf states.
        fresh: For each of them, the indices of the leaves that must be written.
        plain: The states that write themselves.
    """
    rests = [content.form.pick(n) for content, n in zip(captured, fresh, strict=True)]
    every = [name for content in captured for name in content.form.names]
    written = [name for form in rests for name in form.names]
    manifest = sum(map(len, every)) + _MANIFEST_ENTRY_BYTES * len(every)
    headers = sum(map(len, written)) + _HEADER_ENTRY_BYTES * len(written)
    leaves = sum(form.nbytes for form in rests)
    streams = sum(stream.nbytes for stream in plain if isinstance(stream, StagedStream))
    return SpaceNeeded(
        nbytes=manifest + headers + leaves + streams,
        files=1 + bool(written) + len(plain),  # the manifest first
    )
