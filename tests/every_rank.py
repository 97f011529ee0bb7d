# SPDX-License-Identifier: Apache-2.0
"""Runs a whole pytest session on every rank of a job: one verdict a test, one report.

``mpirun -n 3 python -m pytest tests/*/parallel``. After each phase of each test the ranks
exchange how it went, so a failure on one fails the test on all and the next test starts
with all of them. Without mpirun it is a job of one rank.
"""

import faulthandler
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path

import pytest

from mpi_ckpt.comm import Communicator
from mpi_ckpt.elastic import preemption
from mpi_ckpt.elastic.preemption import DEFAULT_SIGNALS
from tests.cores import keep_to_core
from tests.waiting import limit

if any(name in os.environ for name in ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE")):
    from mpi4py import MPI
else:
    MPI = None  # started without mpirun: what needs no MPI does not load it

TIMEOUT_SECONDS = limit(40)
"""Root's limit for one test; it says which, and its end is the end of the job."""

_WORRY_SECONDS = limit(15)
_SPOOL = Path("/dev/shm")


class Verdicts:
    """Lets all ranks tell one another something, and names those that do not."""

    def __init__(self):
        self.comm = MPI.COMM_WORLD.Dup()
        self.rank, self.size = self.comm.rank, self.comm.size
        self.stderr = sys.__stderr__

    def exchange(self, value, doing):
        """Return what every rank gave, in rank order."""
        sends = [
            self.comm.isend(value, dest=rank)
            for rank in range(self.size)
            if rank != self.rank
        ]
        given = {self.rank: value}
        start, told = time.monotonic(), False
        while len(given) < self.size or not MPI.Request.Testall(sends):
            for rank in set(range(self.size)) - set(given):
                if self.comm.iprobe(source=rank):
                    given[rank] = self.comm.recv(source=rank)
            waited = time.monotonic() - start
            if waited > _WORRY_SECONDS and not told:
                told = True
                absent = sorted(set(range(self.size)) - set(given))
                mine = "\n".join(map(str, value)) if isinstance(value, tuple) else value
                self.say(f"{doing}: no word of ranks {absent}; from here: {mine}")
            if waited > 2 * TIMEOUT_SECONDS:
                self.comm.Abort(1)
            time.sleep(5e-4)
        return [given[rank] for rank in range(self.size)]

    def say(self, text):
        print(f"\nrank {self.rank} of {self.size}: {text}", file=self.stderr, flush=True)


if MPI is not None:
    VERDICTS = Verdicts()


def exchange(value, doing):
    """Return what every rank gave, in rank order; one alone gives it to itself."""
    return [value] if MPI is None else VERDICTS.exchange(value, doing)


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config):
    # A directory for each rank: at their end, sessions that share one clear it away under
    # one another, and fail. First of all, as pytest's own plugin reads the option once.
    if MPI is not None and config.option.basetemp is None:
        config.option.basetemp = tempfile.mkdtemp(prefix="mpi_ckpt-tests-")
        config.add_cleanup(
            lambda: shutil.rmtree(config.option.basetemp, ignore_errors=True)
        )
    if MPI is not None:
        # Pytest captures what descriptor 2 gets during a test; this one it does not.
        VERDICTS.stderr = os.fdopen(os.dup(2), "w")
        config.add_cleanup(VERDICTS.stderr.close)


@pytest.hookimpl(tryfirst=True)
def pytest_sessionstart(session):
    if "MPI_CKPT_TEST_CORE" in os.environ:
        keep_to_core(int(os.environ["MPI_CKPT_TEST_CORE"]))
    if MPI is None or VERDICTS.rank == 0:
        return
    silence = open(os.devnull, "w")  # noqa: SIM115 (closed with the configuration)
    session.config.add_cleanup(silence.close)
    # Unregistering the reporter would cost pytest-timeout its way to end a hang.
    session.config.pluginmanager.getplugin("terminalreporter")._tw._file = silence


def pytest_report_header():
    if MPI is None:
        return None
    return f"mpi: {VERDICTS.size} ranks, {MPI.Get_library_version().splitlines()[0][:60]}"


def pytest_collection_modifyitems(items):
    # The others a little later: it is root's report that is read.
    limit = TIMEOUT_SECONDS + (5 if MPI is not None and VERDICTS.rank else 0)
    for item in items:
        if item.path.parent.name == "parallel":
            item.add_marker(pytest.mark.timeout(limit, method="thread"))


def pytest_collection_finish(session):
    if MPI is None:
        return
    collected = ([item.nodeid for item in session.items], session.testsfailed)
    everyone = VERDICTS.exchange(collected, "collection")
    for rank, theirs in enumerate(everyone):
        if theirs != everyone[0]:
            pytest.exit(f"rank {rank} has collected other tests than root", returncode=3)


def pytest_unconfigure():
    if MPI is not None:
        # A rank that ends with an error ends the job: not before root has reported.
        sys.stdout.flush()
        VERDICTS.exchange(None, "the session")


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item):
    if MPI is None or VERDICTS.rank == 0:
        return (yield)
    # Where this rank hangs, shortly before root ends the job.
    faulthandler.dump_traceback_later(TIMEOUT_SECONDS - 2, file=VERDICTS.stderr)
    try:
        return (yield)
    finally:
        faulthandler.cancel_dump_traceback_later()


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_setup(item):
    return (yield from _agreed(item, "setup"))


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_call(item):
    return (yield from _agreed(item, "call"))


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_teardown(item):
    return (yield from _agreed(item, "teardown"))


def _agreed(item, phase):
    failure = None
    try:
        result = yield
    except BaseException as caught:
        failure = caught
    if MPI is not None:
        mine = (item.nodeid, phase, _kind(failure), *_describe(item, failure))
        everyone = VERDICTS.exchange(mine, f"{phase} of {item.nodeid}")
        _raise_for(everyone, failure, item, phase)
    if failure is not None:
        raise failure
    return result


def _kind(failure):
    if failure is None:
        return "passed"
    if isinstance(failure, pytest.skip.Exception):
        return "skipped"
    if isinstance(failure, (Exception, pytest.fail.Exception)):
        return "failed"
    return "stopped"


def _describe(item, failure):
    """Return an exception in one line, and with its traceback."""
    if failure is None:
        return "", ""
    caught = pytest.ExceptionInfo.from_exception(failure)
    try:
        return caught.exconly(tryshort=True), str(item.repr_failure(caught))
    except Exception:
        return repr(failure), "".join(traceback.format_exception(failure))


def _raise_for(everyone, failure, item, phase):
    """Raise what all ranks together make of a phase, unless it is just ``failure``."""
    rank, size = VERDICTS.rank, VERDICTS.size
    places = {(nodeid, phase) for nodeid, phase, *_ in everyone}
    if len(places) > 1:
        pytest.exit(f"the ranks run different tests: {sorted(places)}", returncode=3)
    kinds = [kind for _, _, kind, _, _ in everyone]
    if len(set(kinds)) == 1 and failure is None:
        return
    lines = [
        f"rank {other} of {size} {kind}: {line}"
        for other, (_, _, kind, line, _) in enumerate(everyone)
        if other != rank and (kind != "passed" or "failed" not in kinds)
    ]
    if kinds[rank] in ("failed", "stopped"):
        item.add_report_section(phase, "from other ranks", "\n".join(lines))
    elif "stopped" in kinds:
        pytest.exit("\n".join(lines), returncode=2)
    elif len(set(kinds)) > 1:
        texts = [text for _, _, kind, _, text in everyone if kind == "failed"]
        pytest.fail("\n".join([*lines, "", *texts[:1]]), pytrace=False)


@pytest.fixture
def comm():
    """All ranks of the job, as a user has them."""
    from mpi4py import MPI

    return MPI.COMM_WORLD


@pytest.fixture(autouse=True)
def same_handlers(request):
    """Require that a test gives back every signal: a later one would hear two handlers."""
    if request.path.parent.name != "parallel":
        yield
        return
    watched = {number: signal.getsignal(number) for number in DEFAULT_SIGNALS}
    yield
    kept = [n.name for n, known in watched.items() if not _is_given_back(n, known)]
    for number, known in watched.items():
        signal.signal(number, known)
    assert kept == []


def _is_given_back(number, known) -> bool:
    now = signal.getsignal(number)
    # What only asks for a save is let pass by a manager that is closed.
    return now == known or (known == signal.SIG_DFL and now is preemption._let_pass)


@pytest.fixture
def peers(comm):
    """The same, for what makes sense only where somebody else is there."""
    if comm.size == 1:
        pytest.skip("needs a second rank")
    return comm


@pytest.fixture
def shared_path(comm):
    """An empty directory, the same on all ranks; in memory, where fsync costs nothing."""
    made = None
    if comm.rank == 0:
        try:
            made = Path(
                tempfile.mkdtemp("-mpi_ckpt", dir=_SPOOL if _SPOOL.is_dir() else None)
            )
        except OSError as error:
            made = error
    path = exchange(made, "making a directory")[0]
    if isinstance(path, OSError):
        raise path
    yield path
    exchange(None, "done with a directory")
    if comm.rank == 0:
        shutil.rmtree(path)


@pytest.fixture
def make_communicator(comm):
    """Makes communicators of the library, freed after the test."""
    made = []

    def make(parent=None, *, deadline_seconds=35.0, **arguments):
        communicator = Communicator(parent, deadline_seconds=deadline_seconds, **arguments)
        made.append(communicator)
        return communicator

    yield make
    for communicator in made:
        communicator.close()


@pytest.fixture
def on_hosts(comm, monkeypatch):
    """Lets communicators that are made from then on see the ranks on hosts of any name."""

    def lay(hosts):
        monkeypatch.setattr("socket.gethostname", lambda: hosts[comm.rank])

    return lay
