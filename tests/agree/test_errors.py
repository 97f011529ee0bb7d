# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import contextlib
import copy
import errno
import inspect
import json
import pickle
import re
import sys
import tracemalloc
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpi_ckpt import errors
from mpi_ckpt.errors import (
    CheckpointError,
    CollectiveError,
    RankFailure,
    SaveError,
    StateMismatchError,
    WriteError,
    cut_lines,
)
from mpi_ckpt.failures import (
    AlikeFailures,
    capture_failure,
    concerning,
    group_failures,
    merge_failures,
    without_rank,
)

CLASSES = [
    cls
    for cls in vars(errors).values()
    if inspect.isclass(cls) and issubclass(cls, CheckpointError)
]


def failure(error: BaseException, rank: int = 0) -> RankFailure:
    try:
        raise error
    except BaseException as caught:
        return capture_failure(caught, rank=rank, size=4, operation="writing")


def merged(failures, default, safe) -> CheckpointError:
    hosts = [f"host{rank // 25}" for rank in range(failures[0].size)]
    return merge_failures(groups_of(failures), default, safe, hosts)


def groups_of(failures):
    kinds: dict[RankFailure, tuple[RankFailure, list[int]]] = {}
    for one in failures:
        kinds.setdefault(without_rank(one), (one, []))[1].append(one.rank)
    # Of the kinds after the first ones root gets no text.
    return group_failures(
        [(first if n < 17 else None, r) for n, (first, r) in enumerate(kinds.values())]
    )


def test_family_is_the_tree_that_the_module_draws():
    drawn = set(re.findall(r"\b[A-Z]\w+Error\b(?!\))", errors.__doc__))
    assert drawn == {cls.__name__ for cls in CLASSES}
    assert set(errors.__all__) == drawn


def raised_within(error, *places):
    """Return a failure as another rank tells it, raised within blocks of these places."""
    try:
        with contextlib.ExitStack() as stack:
            for place in places:
                stack.enter_context(concerning(place))
            raise error
    except Exception as caught:
        return failure(caught)


def test_what_an_error_concerns_is_told_outermost_first():
    told = raised_within(ZeroDivisionError("of the user"), "state 'model'", "leaf 'w'")
    assert "writing: state 'model', leaf 'w': of the user (ZeroDivisionError)" in str(told)
    assert "leaf 'w'\nstate 'model'" in told.traceback or sys.version_info < (3, 11)


def test_what_an_error_says_itself_is_not_told_twice():
    told = raised_within(StateMismatchError("state 'a' has no leaf"), "state 'a'")
    assert told.message == "state 'a' has no leaf"


def test_notes_of_others_are_left_alone():
    error = ValueError("bad")
    error.__notes__ = ["seen on a Monday"]
    assert raised_within(error, "state 'a'").message == "state 'a': bad"
    assert error.__notes__ == ["seen on a Monday", "state 'a'"]


class Sealed(Exception):
    @property
    def __notes__(self):
        raise AttributeError("none are kept")


def test_an_error_that_takes_no_note_stays_what_it_is():
    assert raised_within(Sealed("as it is"), "state 'a'").message == "as it is"


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("RegistrationError", ValueError),
        ("OptionsError", ValueError),
        ("LaunchError", RuntimeError),
        ("WriteError", OSError),
        ("PublishError", OSError),
        ("NoCheckpointError", FileNotFoundError),
        ("ReadError", OSError),
    ],
)
def test_errors_are_also_of_the_builtin_kind_they_honestly_are(name, kind):
    assert issubclass(getattr(errors, name), kind)


@pytest.mark.parametrize("cls", CLASSES)
def test_every_error_says_its_message_and_keeps_what_it_knows(cls):
    error = cls("it failed", path=Path("/a/b"), generation=7, errno=5, problems=["p"])
    assert str(error) == "it failed"
    assert (error.path, error.generation, error.errno) == ("/a/b", 7, 5)
    assert error.problems == ("p",)
    assert error.failures == ()
    assert cls("bare").path is None
    assert cls("bare").errno is None


@pytest.mark.parametrize("cls", CLASSES)
def test_every_error_can_be_copied_and_pickled(cls):
    error = cls("it failed", path="/a", generation=7, errno=5, problems=["p"])
    for other in (copy.copy(error), pickle.loads(pickle.dumps(error))):
        assert type(other) is cls
        assert str(other) == "it failed"
        assert (other.path, other.generation, other.errno) == ("/a", 7, 5)
        assert other.problems == ("p",)


def test_failure_of_a_rank_survives_json():
    record = failure(OSError(errno.ENOSPC, "full", "/x/y"), rank=3)
    again = RankFailure(**json.loads(json.dumps(record.to_json())))
    assert again == record
    assert again.errno == errno.ENOSPC
    assert again.path == "/x/y"
    assert "in failure" in again.traceback


def test_failure_says_rank_host_and_what_was_done():
    text = str(failure(ValueError("bad"), rank=2))
    assert text.startswith("rank 2 of 4 on ")
    assert text.endswith("writing: bad (ValueError)")
    assert str(failure(WriteError("no space"))).endswith("writing: no space")
    assert "KeyboardInterrupt" in str(failure(KeyboardInterrupt()))


def test_path_is_told_once():
    assert str(failure(WriteError("writing /x failed", path="/x"))).count("/x") == 1
    assert str(failure(WriteError("failed", path="/x"))).count("/x") == 1


def test_exception_that_cannot_tell_its_text_is_told_all_the_same():
    class Mute(Exception):
        def __str__(self) -> str:
            raise RuntimeError("no")

    assert "has no text" in failure(Mute()).message


def test_merged_error_is_of_the_class_of_the_lowest_failing_rank():
    failures = [
        failure(StateMismatchError("shape", path="/s"), rank=1),
        failure(ValueError("other"), rank=2),
    ]
    error = merged(failures, SaveError, "all is safe")
    assert type(error) is StateMismatchError
    assert [failure.rank for failure in error.failures] == [1, 2]
    assert [failure.message for failure in error.failures] == ["shape", "other"]
    assert error.path == "/s"
    assert str(error).startswith("writing failed; all is safe\n  rank 1 of 4")
    assert "rank 2 of 4" in str(error)


def test_errors_from_elsewhere_become_the_default():
    error = merged([failure(OSError(errno.EIO, "I/O"))], WriteError, "safe")
    assert type(error) is WriteError
    assert error.errno == errno.EIO
    assert isinstance(error, OSError)


def test_name_of_a_builtin_cannot_pose_as_family():
    class CheckpointErrors(Exception):
        pass

    error = merged([failure(CheckpointErrors("x"))], CollectiveError, "safe")
    assert type(error) is CollectiveError


def test_tracebacks_of_all_ranks_are_the_cause():
    failures = [failure(ValueError("a"), 0), failure(KeyError("b"), 2)]
    cause = str(merged(failures, SaveError, "safe").__cause__)
    assert "rank 0 of 4" in cause
    assert "rank 2 of 4" in cause
    assert cause.count("Traceback") == 2


def test_ranks_that_fail_alike_are_told_once():
    failures = [failure(OSError(errno.EIO, "bad disk", "/x"), rank) for rank in (0, 1, 3)]
    error = merged(failures, SaveError, "safe")
    assert str(error).splitlines()[1:] == [
        "  ranks 0 to 1, 3 (3 of 4) on host0, writing: [Errno 5] bad disk: '/x' (OSError)"
    ]
    assert [(failure.rank, failure.host) for failure in error.failures] == [
        (0, "host0"), (1, "host0"), (3, "host0"),
    ]  # fmt: skip
    assert str(error.__cause__).count("Traceback") == 1
    assert [failure.rank for failure in error.failures[1:]] == [1, 3]
    assert pickle.loads(pickle.dumps(error)).failures == tuple(error.failures)


def test_what_a_thousand_ranks_have_to_say_is_bounded():
    problems = [f"leaf {n} does not fit: {'x' * 600}" for n in range(3000)]
    mismatch = StateMismatchError("no fit:\n" + "\n".join(problems), problems=problems)
    first = replace(failure(mismatch), size=1000)
    alike = [replace(first, rank=rank) for rank in range(1000)]
    groups = groups_of(alike)
    assert len(json.dumps([[g.first.to_json(), g.ranks] for g in groups])) < 1 << 20
    error = merged(alike, SaveError, "safe")
    assert len(str(error).splitlines()) < 40
    assert len(str(error)) + len(str(error.__cause__)) < 40 << 10
    assert "ranks 0 to 999 (1,000 of 1,000) on 40 hosts, writing: no fit:" in str(error)
    assert "2,977 more: `problems` of the error has them" in str(error)
    assert error.problems[-1] == "and 2,000 more"
    assert len(error.failures) == 1000


@pytest.mark.parametrize("size", [2, 1000, 10_000, 100_000])
def test_what_a_rank_holds_is_bounded_however_many_ranks_fail(size):
    problems = [f"leaf {n} does not fit: {'x' * 600}" for n in range(3000)]
    mismatch = StateMismatchError("no fit:\n" + "\n".join(problems), problems=problems)
    first = capture_failure(mismatch, rank=0, size=size, operation="restoring")
    sent = len(json.dumps(first.to_json()))
    # A rank holds those of 17 kinds, and as many that a neighbour sends.
    assert 2 * 17 * sent < 20 << 20
    assert "no fit:" in first.message
    kept = len(first.problems) - 1
    assert kept >= 1
    assert first.problems[-1] == f"and {3000 - kept:,} more"


def test_a_hundred_thousand_ranks_take_no_more_room():
    size = 100_000
    problems = [f"leaf {n} does not fit" for n in range(3000)]
    first = failure(
        StateMismatchError("no fit:\n" + "\n".join(problems), problems=problems)
    )
    hosts = [f"host{rank // 100}" for rank in range(size)]
    alike = AlikeFailures(replace(first, size=size), tuple(range(size)))
    told = json.dumps([[alike.first.to_json(), alike.ranks]])
    assert len(told) < 1 << 20
    tracemalloc.start()
    try:
        error = merge_failures([alike], SaveError, "safe", hosts)
        kept, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert kept < 32 * size  # two numbers a rank, not a record
    assert len(str(error).splitlines()) <= 25
    assert len(str(error)) < 2 << 10
    assert "ranks 0 to 99999 (100,000 of 100,000) on 1,000 hosts" in str(error)
    assert len(error.failures) == size
    odd = AlikeFailures(alike.first, tuple(range(0, size, 2)))
    assert "49,984 more ranges" in odd.text(hosts)


def test_a_text_that_is_cut_again_counts_all():
    text = "\n".join(["no fit:", *(f"leaf {n}" for n in range(1000))])
    once = cut_lines(text)
    assert len(once.splitlines()) == 25
    assert once.splitlines()[-1].strip().startswith("and 977 more")
    assert cut_lines(once, 10).splitlines()[-1].strip().startswith("and 991 more")
    assert cut_lines(once, 24) == once
    assert cut_lines("a\nb", 1) == "a\nb"


def test_of_several_kinds_each_has_its_share_of_the_lines():
    problems = [f"leaf {n}" for n in range(1000)]
    failures = [
        replace(failure(StateMismatchError(f"kind {rank}:\n" + "\n".join(problems)), rank))
        for rank in range(4)
    ]
    text = str(merged(failures, SaveError, "safe"))
    assert len(text.splitlines()) <= 25
    assert text.count("more: `problems` of the error has them") == 4
    assert all(f"kind {rank}:" in text for rank in range(4))


def test_of_very_many_kinds_some_are_told_and_all_are_counted():
    failures = [
        replace(failure(ValueError(f"way {rank}"), rank), size=1000) for rank in range(1000)
    ]
    error = merged(failures, SaveError, "safe")
    lines = str(error).splitlines()
    assert len(lines) == 17
    assert lines[-1].startswith("  ranks 15 to 999 (985 of 1,000) on 40 hosts")
    assert "failed in a different way" in lines[-1]
    assert [failure.rank for failure in error.failures] == list(range(1000))


@given(st.lists(st.integers(0, 5), min_size=1, max_size=40))
def test_no_rank_is_lost_and_none_is_told_twice(ways):
    failures = [
        replace(failure(ValueError(f"way {way}"), rank), size=40)
        for rank, way in enumerate(ways)
    ]
    error = merged(failures, SaveError, "safe")
    assert [(failure.rank, failure.message) for failure in error.failures] == [
        (rank, f"way {way}") for rank, way in enumerate(ways)
    ]
    assert len(str(error).splitlines()) == 1 + len(set(ways))


def test_problems_of_all_ranks_are_listed_once_each():
    failures = [
        failure(StateMismatchError("no fit", generation=7, problems=["w: shape", "b"])),
        failure(StateMismatchError("no fit", problems=["w: shape", "c"]), rank=1),
        failure(ValueError("out of luck"), rank=2),
    ]
    error = merged(failures, SaveError, "safe")
    assert error.problems[:3] == ("w: shape", "b", "c")
    assert "rank 2" in error.problems[3]
    assert "out of luck" in error.problems[3]
    assert error.generation == 7


def test_anything_an_exception_calls_problems_or_errno_is_no_trouble():
    class Odd(Exception):
        problems = 5
        generation = errno = path = object()

    record = failure(Odd("odd"))
    assert json.dumps(record.to_json())
    assert "odd" in str(merged([record], SaveError, "safe"))
