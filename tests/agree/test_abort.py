# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import os
import sys

import pytest

from mpi_ckpt.engine import abort
from mpi_ckpt.engine.abort import AbortOnError
from mpi_ckpt.errors import OptionsError, Printing, RegistrationError


class Comm:
    """As much of a communicator as is asked for here."""

    def __init__(self, size=3):
        self.rank, self.size, self.name = 1, size, f"rank 1 of {size} on h"
        self.root = 0
        self.is_root = False
        self.is_broken = False
        self.is_open = True


class Farewell:
    """Says farewell to ranks of whom some stay."""

    staying = ()
    said = 0
    root_says_the_same = False

    def __init__(self, comm, words):
        assert comm.is_open
        self.words = words
        Farewell.said += 1

    def words_of_root(self, seconds):
        return self.words if Farewell.root_says_the_same else b""

    def missing(self, seconds):
        return list(self.staying)


class Settling:
    count = 0

    def close(self):
        self.count += 1


@pytest.fixture(autouse=True)
def fresh_hook(monkeypatch):
    """Nothing armed, and Python's own hook below ours."""
    monkeypatch.setattr(sys, "excepthook", sys.__excepthook__)
    monkeypatch.setattr(abort, "_HOOK", abort._Hook())
    monkeypatch.setattr(abort, "Farewell", Farewell)
    monkeypatch.setattr(Farewell, "staying", ())
    monkeypatch.setattr(Farewell, "said", 0)
    yield
    # Not to be asked again when the tests' own process ends.
    abort._HOOK.armed.clear()
    abort._HOOK.uninstall()


@pytest.fixture
def aborted(monkeypatch):
    codes = []
    monkeypatch.setattr(abort, "abort_job", codes.append)
    return codes


@pytest.fixture
def uncaught(monkeypatch):
    """Calls the hook as Python does: with no frame of a program below."""
    monkeypatch.setattr(abort, "_is_printed_only", lambda: False)

    def call(error):
        sys.excepthook(type(error), error, None)

    return call


def guard(comm=None, settling=None, *, how=True):
    settling = settling or Settling()
    armed = AbortOnError(comm or Comm(), settling.close, how)
    armed.kept = settling  # held weakly otherwise
    return armed


def test_nothing_is_touched_before_it_is_armed():
    guard()
    assert sys.excepthook is sys.__excepthook__


def test_the_hook_is_one_for_all_and_goes_with_the_last():
    first, second = guard(), guard()
    first.arm()
    hook = sys.excepthook
    assert hook is not sys.__excepthook__
    second.arm()
    second.arm()
    assert sys.excepthook == hook
    first.disarm()
    assert sys.excepthook == hook
    second.disarm()
    second.disarm()
    assert sys.excepthook is sys.__excepthook__


def test_who_took_the_hook_after_us_keeps_it():
    def theirs(kind, error, trace):
        pass

    armed = guard()
    armed.arm()
    sys.excepthook = theirs
    armed.disarm()
    assert sys.excepthook is theirs


@pytest.mark.parametrize("reason", ["option", "one rank", "mpi4py"])
def test_there_is_no_hook_where_none_is_needed(monkeypatch, reason):
    if reason == "mpi4py":
        monkeypatch.setitem(sys.modules, "mpi4py.run", abort)
    comm = Comm(size=1 if reason == "one rank" else 3)
    guard(comm, how=reason != "option").arm()
    assert sys.excepthook is sys.__excepthook__


@pytest.mark.parametrize(
    ("error", "code"), [(ValueError("no luck"), 1), (KeyboardInterrupt(), 130)]
)
def test_an_error_of_this_rank_alone(monkeypatch, capsys, aborted, uncaught, error, code):
    monkeypatch.setattr(Farewell, "staying", (0, 2))
    armed = guard()
    armed.arm()
    uncaught(error)
    assert aborted == [code]
    assert armed.kept.count == 1, "a pending save was given its end"
    told = capsys.readouterr().err
    assert told.startswith(f"rank 1 of 3 on h:\n{type(error).__name__}")
    assert f"the job is aborted with code {code}" in told


def test_an_error_of_all_ranks(capsys, aborted, uncaught):
    guard().arm()
    uncaught(ValueError("no luck"))
    assert aborted == []
    assert capsys.readouterr().err == "rank 1 of 3 on h:\nValueError: no luck\n"
    abort._HOOK.at_exit()
    assert aborted == []


def test_a_hook_that_was_there_prints(monkeypatch, capsys, aborted, uncaught):
    monkeypatch.setattr(sys, "excepthook", lambda kind, error, trace: print("theirs"))
    armed = guard()
    armed.arm()
    uncaught(ValueError("no luck"))
    assert capsys.readouterr() == ("theirs\n", "rank 1 of 3 on h:\n")


@pytest.mark.parametrize("is_armed", [True, False])
def test_hooks_between_ours_are_called_once_each(capsys, aborted, uncaught, is_armed):
    # As torch's process group does: its hook calls the one that it found.
    first, second = guard(), guard()
    for number, armed in enumerate((first, second)):
        armed.arm()
        found = sys.excepthook

        def theirs(*uncaught, number=number, found=found):
            print("theirs", number)
            found(*uncaught)

        sys.excepthook = theirs
        armed.disarm()
    last = guard()
    last.arm()
    if not is_armed:
        abort._HOOK.armed.clear()
    for _ in range(2):
        uncaught(ValueError("no luck"))
        printed = capsys.readouterr()
        assert printed.out == "theirs 1\ntheirs 0\n"
        assert printed.err.count("ValueError: no luck") == 1
    assert aborted == []


@pytest.mark.parametrize("where", ["by hand", "forked", "closed"])
def test_the_hook_only_prints(monkeypatch, capsys, aborted, uncaught, where):
    monkeypatch.setattr(Farewell, "staying", (0,))
    armed = guard()
    armed.arm()
    if where == "by hand":  # a module is being run: that is what called this
        monkeypatch.setattr(abort, "_is_printed_only", lambda: True)
    elif where == "forked":
        process = os.getpid()
        monkeypatch.setattr(os, "getpid", lambda: process + 1)
    else:
        armed.comm.is_open = False
    uncaught(ValueError("no luck"))
    assert aborted == []
    assert capsys.readouterr().err == "ValueError: no luck\n"


def test_a_call_from_a_running_module_is_seen():
    found = {}
    exec("found['module'] = printed_only()", {"found": found, "printed_only": printed_only})
    assert found == {"module": True}


def printed_only():
    return abort._is_printed_only()


@pytest.mark.parametrize(
    ("code", "expected", "found"),
    [
        (7, 0, [7]),
        (7, 143, [7]),
        ("bad", 0, [1]),
        (None, 0, []),
        (0, 0, []),
        (143, 143, []),
    ],
)
def test_sys_exit_through_the_block(monkeypatch, aborted, code, expected, found):
    monkeypatch.setattr(Farewell, "staying", (0,))
    armed = guard()
    armed.arm()
    armed.note(SystemExit(code), expected=expected)
    assert aborted == []
    abort._HOOK.at_exit()
    assert aborted == found


def test_sys_exit_of_all_ranks_aborts_nothing(aborted):
    armed = guard()
    armed.arm()
    armed.note(SystemExit(7), expected=0)
    abort._HOOK.at_exit()
    assert aborted == []


def test_an_exception_through_the_block_may_still_be_caught(monkeypatch, aborted):
    monkeypatch.setattr(Farewell, "staying", (0,))
    armed = guard()
    armed.arm()
    armed.note(ValueError("no luck"), expected=0)
    abort._HOOK.at_exit()
    assert aborted == []


def test_farewell_is_said_before_a_save_is_waited_for(uncaught, aborted):
    armed = guard()
    armed.arm()
    armed.note(ValueError("no luck"), expected=0)
    assert Farewell.said == 1
    uncaught(ValueError("no luck"))
    assert Farewell.said == 1, "once is enough"


def test_who_is_not_armed_says_nothing():
    guard(how=False).note(SystemExit(7), expected=0)
    assert Farewell.said == 0


@pytest.mark.parametrize("what", ["__init__", "missing"])
def test_mpi_that_fails_ends_the_job_too(monkeypatch, aborted, uncaught, what):
    def fail(self, *arguments):
        raise RuntimeError("MPI_ERR_OTHER")

    monkeypatch.setattr(Farewell, what, fail)
    guard().arm()
    uncaught(ValueError("no luck"))
    assert aborted == [1]


def test_nobody_leaves_while_a_rank_is_missing(monkeypatch, aborted):
    monkeypatch.setattr(Farewell, "staying", (0,))
    armed = guard()
    armed.arm()
    armed.comm.is_broken = True
    armed.disarm()
    abort._HOOK.at_exit()
    assert aborted == [1]


def test_a_manager_that_is_gone_has_nothing_to_settle(aborted, uncaught):
    armed = guard()
    armed.arm()
    del armed.kept
    uncaught(ValueError("no luck"))
    assert aborted == []


@pytest.mark.parametrize("same", [True, False])
def test_an_error_that_root_leaves_by_as_well(monkeypatch, capsys, aborted, uncaught, same):
    monkeypatch.setattr(Farewell, "root_says_the_same", same)
    guard().arm()
    uncaught(RegistrationError("'a' is taken:\n  twice"))
    told = capsys.readouterr().err
    brief = (
        "rank 1 of 3 on h: RegistrationError: 'a' is taken: (rank 0 prints it in full)\n"
    )
    assert (told == brief) == same
    assert same or told.endswith("RegistrationError: 'a' is taken:\n  twice\n")


@pytest.mark.parametrize("brief", ["", "OptionsError, reported in full by rank 0"])
def test_a_manager_that_could_not_be_made_on_any_rank(capsys, aborted, uncaught, brief):
    error = OptionsError("they differ")
    error.printing = Printing("rank 1 of 3 on h", brief)
    abort.watch_errors()
    uncaught(error)
    told = capsys.readouterr().err
    assert told.startswith("rank 1 of 3 on h:")
    assert (told == f"rank 1 of 3 on h: {brief}\n") == bool(brief)
    assert aborted == []
