# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest

from mpi_ckpt.cli.restart.outcome import Ending, judge, next_move
from mpi_ckpt.storage.notes import Note


def note(event: str, step: int = 0, *, writer: str = "w", directory: str = "d", error=""):
    return Note(event=event, step=step, writer=writer, directory=directory, error=error)


STARTED = note("started")
FINISHED = [STARTED, note("restored", 10), note("saved", 20), note("finished", 25)]


def test_success_is_what_the_job_has_recorded():
    ending = judge(0, FINISHED)
    assert (ending.outcome, ending.began, ending.reached) == ("finished", 10, 25)


@pytest.mark.parametrize(
    ("code", "notes", "outcome"),
    [
        # mpirun's 0 for a lost host.
        (0, FINISHED[:-1], "lost"),
        (0, [STARTED], "lost"),
        (0, [], "unrecorded"),
        # Another manager is still open: of another directory, of another process, or made
        # after the first was closed.
        (0, [*FINISHED, note("started", directory="e")], "lost"),
        (0, [*FINISHED, note("started", writer="v")], "lost"),
        (0, [*FINISHED, STARTED], "lost"),
        (0, [*FINISHED, STARTED, note("finished", 30)], "finished"),
        # Ranks were lost, and what they had open; the others came to its end. One that was
        # killed in place of another has its code in mpirun's.
        (137, [STARTED, note("survived"), *FINISHED], "finished"),
        (0, [STARTED, note("preempted", 5), note("survived")], "preempted"),
        # It finished, and then the program failed after all.
        (1, FINISHED, "failed"),
        (137, FINISHED[:-1], "failed"),
        (1, [], "failed"),
        # The note counts, whatever the code is configured to be.
        (0, [STARTED, note("preempted", 5)], "preempted"),
        (85, [STARTED, note("preempted", 5), note("finished", 5)], "preempted"),
        (143, [], "preempted"),
        (143, [STARTED, note("failed", 3, error="ValueError: x")], "failed"),
        (0, [STARTED, note("failed", 3, error="ValueError: x")], "failed"),
    ],
)
def test_outcomes(code, notes, outcome):
    assert judge(code, notes).outcome == outcome


def test_exit_code_is_trusted_on_demand_only_where_nothing_is_recorded():
    assert judge(0, [], trust_code=True).outcome == "finished"
    assert judge(0, [STARTED], trust_code=True).outcome == "lost"
    assert judge(3, [], trust_code=True).outcome == "failed"


def test_hang_is_told_from_what_its_end_looks_like():
    assert judge(143, [STARTED], hung=True).outcome == "hung"


def test_failures_are_the_same_by_class_and_step_not_by_text():
    def failed(error: str, step: int) -> Ending:
        return judge(1, [STARTED, note("failed", step, error=error)])

    ending = failed("ValueError: at 0x1234", 7)
    assert ending.error == "ValueError: at 0x1234"
    assert ending.sign == failed("ValueError: at 0x5678", 7).sign
    assert ending.sign != failed("ValueError: at 0x1234", 8).sign
    assert ending.sign != failed("TypeError: at 0x1234", 7).sign
    killed = judge(137, [STARTED, note("saved", 20)])
    assert killed.sign == judge(137, [STARTED, note("restored", 20)]).sign
    assert killed.sign != judge(137, [STARTED, note("saved", 25)]).sign


def failure(step: int, *, began: int = 0, sign: object = "x") -> Ending:
    return Ending(outcome="failed", began=began, reached=step, sign=(sign, step))


PREEMPTED = Ending(outcome="preempted", began=0, reached=9)


def test_loop_ends_with_success():
    endings = [failure(1), Ending(outcome="finished", began=0, reached=9)]
    assert next_move(endings, 0, 1.0).stop == "finished"


def test_same_failure_at_the_same_step_ends_the_loop_the_third_time():
    assert next_move([failure(5)] * 2, 20, 1.0).stop == ""
    assert "3 times at step 5" in next_move([failure(5)] * 3, 20, 1.0).stop
    assert next_move([failure(5), failure(5), failure(6)], 20, 1.0).stop == ""
    assert next_move([failure(5), PREEMPTED, failure(5), failure(5)], 20, 1.0).stop == ""
    assert next_move([failure(5), failure(5, sign="y"), failure(5)], 20, 1.0).stop == ""


def test_preemptions_may_repeat_unless_nothing_is_done_in_between():
    assert next_move([PREEMPTED] * 15, 20, 1.0).stop == ""
    # As with a halt file: each attempt does one step, is asked to stop and saves.
    steps = [Ending(outcome="preempted", began=n, reached=n + 1) for n in range(3)]
    assert next_move([PREEMPTED, *steps[:2]], 20, 1.0).stop == ""
    assert "halt file" in next_move([PREEMPTED, *steps], 20, 1.0).stop
    # A code of 143 without a note may be anybody's SIGTERM.
    assert "3 times" in next_move([judge(143, [])] * 3, 20, 1.0).stop


def test_predecessor_that_dies_slowly_is_no_fault_of_the_program():
    locked = judge(1, [note("failed", error="LockedError: belongs to another")])
    move = next_move([locked] * 6, 20, 1.0)
    assert (move.stop, move.seconds) == ("", 32.0)


def test_limit_ends_the_loop():
    attempts = [failure(step, began=step - 1) for step in range(1, 4)]
    assert next_move(attempts[:2], 2, 1.0).stop == ""
    assert "limit of 2 restarts" in next_move(attempts, 2, 1.0).stop
    assert "limit of 0 restarts" in next_move([PREEMPTED], 0, 1.0).stop


def test_waits_grow_while_nothing_is_reached():
    barren = [failure(5, began=5, sign=n) for n in range(9)]
    waits = [next_move(barren[:n], 99, 1.0).seconds for n in range(1, 10)]
    assert waits == [1, 2, 4, 8, 16, 32, 60, 60, 60]
    assert next_move([*barren, failure(8, began=5)], 99, 1.0).seconds == 1
    assert next_move([*barren, PREEMPTED], 99, 1.0).seconds == 0
