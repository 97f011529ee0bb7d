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
from pathlib import Path

import pytest

from mpi_ckpt import errors
from mpi_ckpt.errors import (
    CheckpointError,
    CollectiveError,
    RankFailure,
    SaveError,
    StateMismatchError,
    WriteError,
)
from mpi_ckpt.failures import capture_failure, concerning, merge_failures

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

    assert "cannot be made" in failure(Mute()).message


def test_merged_error_is_of_the_class_of_the_lowest_failing_rank():
    failures = [
        failure(StateMismatchError("shape", path="/s"), rank=1),
        failure(ValueError("other"), rank=2),
    ]
    error = merge_failures(failures, SaveError, "all is safe")
    assert type(error) is StateMismatchError
    assert error.failures == tuple(failures)
    assert error.path == "/s"
    assert str(error).startswith("writing failed; all is safe\n  rank 1 of 4")
    assert "rank 2 of 4" in str(error)


def test_errors_from_elsewhere_become_the_default():
    error = merge_failures([failure(OSError(errno.EIO, "I/O"))], WriteError, "safe")
    assert type(error) is WriteError
    assert error.errno == errno.EIO
    assert isinstance(error, OSError)


def test_name_of_a_builtin_cannot_pose_as_family():
    class CheckpointErrors(Exception):
        pass

    error = merge_failures([failure(CheckpointErrors("x"))], CollectiveError, "safe")
    assert type(error) is CollectiveError


def test_tracebacks_of_all_ranks_are_the_cause():
    failures = [failure(ValueError("a"), 0), failure(KeyError("b"), 2)]
    cause = str(merge_failures(failures, SaveError, "safe").__cause__)
    assert "rank 0 of 4" in cause
    assert "rank 2 of 4" in cause
    assert cause.count("Traceback") == 2


def test_problems_of_all_ranks_are_listed_once_each():
    failures = [
        failure(StateMismatchError("no fit", generation=7, problems=["w: shape", "b"])),
        failure(StateMismatchError("no fit", problems=["w: shape", "c"]), rank=1),
        failure(ValueError("out of luck"), rank=2),
    ]
    error = merge_failures(failures, SaveError, "safe")
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
    assert "odd" in str(merge_failures([record], SaveError, "safe"))
