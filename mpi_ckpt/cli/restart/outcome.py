# SPDX-License-Identifier: Apache-2.0
"""Judges how an attempt ended, by notes and exit code, and decides what to do next."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import takewhile
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from mpi_ckpt.storage.notes import Note

PREEMPTED_CODE = 143
SAME_FAILURES = 3
"""A failure that comes back so often at the same step is not the machine's."""

BACKOFF_MAX_SECONDS = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Ending:
    """The result of one attempt.

    Attributes:
        outcome: ``finished``, ``preempted``, ``failed``, ``lost`` (exit code 0, but no
            normal end), ``unrecorded`` (exit code 0, without notes) or ``hung``.
        began: The step that it started from.
        reached: The last step that was saved.
        error: The noted error, or what else is known.
        sign: Equal for equal failures; None if a repetition does not point to a fault in
            the program.
    """

    outcome: str
    began: int
    reached: int
    error: str = ""
    sign: tuple[object, ...] | None = None


@dataclass(frozen=True, slots=True)
class Move:
    """The next action: another attempt after some seconds, or none, with the reason."""

    seconds: float = 0.0
    stop: str = ""


def judge(
    code: int, notes: Sequence[Note], *, hung: bool = False, trust_code: bool = False
) -> Ending:
    """Return how an attempt ended. Pure.

    Args:
        code: Exit code of the launcher.
        notes: The job's notes.
        hung: Whether the loop ended it because it sent no note.
        trust_code: Whether exit code 0 is enough if there are no notes.
    """
    began = next((note.step for note in notes if note.event == "restored"), 0)
    kept = [n.step for n in notes if n.event in ("restored", "saved", "finished")]
    reached = max(kept, default=0)
    events = {note.event for note in notes}

    def ending(outcome: str, error: str = "", *sign: object) -> Ending:
        mark = (outcome, *sign) if sign else None
        return Ending(outcome=outcome, began=began, reached=reached, error=error, sign=mark)

    if hung:
        return ending("hung", "no sign of life for too long", reached)
    if "preempted" in events:
        return ending("preempted")
    if "survived" in events:  # ranks were lost, but the others reached the end
        return ending("finished")
    failed = [note for note in notes if note.event == "failed"]
    if failed:
        first = failed[0]
        kind = first.error.partition(":")[0]
        if kind == "LockedError":  # held by the last attempt, which may die slowly
            return ending("failed", first.error)
        return ending("failed", first.error, kind, first.step)
    if code == PREEMPTED_CODE:
        return ending("preempted", "", reached)
    if code != 0:
        return ending("failed", f"exit code {code}", code, reached)
    if not notes:
        if trust_code:
            return ending("finished")
        return ending("unrecorded", _UNRECORDED, reached)
    if _is_complete(notes):
        return ending("finished")
    return ending("lost", _LOST, reached)


_STOPPED_AT_ONCE = (
    "asked to stop three times in a row within a step: is the time of the job over, or is "
    "there a halt file?"
)
_UNRECORDED = (
    "exit code 0, but the job has recorded nothing: it was lost before its "
    "CheckpointManager was made, or has none (then give --trust-exit-code)"
)
_LOST = (
    "exit code 0, but no CheckpointManager was closed at the end: a host was lost, or the "
    "program does not close it (use `with`)"
)


def _is_complete(notes: Sequence[Note]) -> bool:
    last: dict[tuple[str, str], str] = {}
    for note in notes:
        if note.event in ("started", "finished"):
            last[note.writer, note.directory] = note.event
    return all(event == "finished" for event in last.values())


def _run_length(endings: Sequence[Ending], holds: Callable[[Ending], bool]) -> int:
    """Count the last attempts for which a condition holds."""
    return sum(1 for _ in takewhile(holds, reversed(endings)))


def _is_stopped_at_once(ending: Ending) -> bool:
    return ending.outcome == "preempted" and ending.reached <= ending.began + 1


def next_move(endings: Sequence[Ending], max_restarts: int, backoff: float) -> Move:
    """Return what to do after the attempts so far. Pure.

    Args:
        endings: The results of all attempts, at least one.
        max_restarts: How many attempts there may be after the first.
        backoff: Seconds to wait after the first of consecutive failures; doubled with each.
    """
    last = endings[-1]
    if last.outcome == "finished":
        return Move(stop="finished")
    same = _run_length(endings, lambda ending: ending.sign == last.sign is not None)
    if same >= SAME_FAILURES:
        return Move(stop=f"the same failure {same} times at step {last.reached}")
    if _run_length(endings, _is_stopped_at_once) >= SAME_FAILURES:
        return Move(stop=_STOPPED_AT_ONCE)
    if len(endings) > max_restarts:
        return Move(stop=f"the limit of {max_restarts} restarts is reached")
    if last.outcome == "preempted":
        return Move()
    barren = _run_length(
        endings,
        lambda ending: ending.outcome != "preempted" and ending.reached <= ending.began,
    )
    return Move(seconds=min(backoff * 2.0 ** max(0, barren - 1), BACKOFF_MAX_SECONDS))
