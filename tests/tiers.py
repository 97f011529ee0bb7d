# SPDX-License-Identifier: Apache-2.0
"""Which tests belong to which run, and how several workers share them.

A test is in the quick tier unless it starts jobs (then ``full``) or is marked ``full`` or
``long``; ``scripts/test`` says what each is for.
"""

from __future__ import annotations

import gc

import pytest

from tests.cores import keep_to_core
from tests.draws import COUNTS, JUDGED, SEED
from tests.jobs import PATIENCE_SECONDS
from tests.waiting import limit

APART = {
    "tests/agree/jobs/test_ensemble.py",
    "tests/agree/jobs/test_failures.py",
    "tests/agree/jobs/test_few_lines.py",
    "tests/agree/jobs/test_hangs.py",
    "tests/agree/jobs/test_leaving.py",
    "tests/crash/test_faults.py",
    "tests/crash/test_kills.py",
    "tests/crash/test_stops.py",
    "tests/elastic/jobs/test_preemption.py",
}
"""Files whose tests share nothing and take long: workers take them one by one."""

ON_HOSTS = {
    "tests/agree/jobs/test_virtual_hosts.py",
    "tests/cli/jobs/test_slurm.py",
    "tests/elastic/jobs/test_lost_host.py",
    "tests/local/jobs/test_lost_disks.py",
    "tests/local/jobs/test_rescuing_loop.py",
}
"""Files that need virtual hosts, of which a machine has one set: one worker takes all."""


def kind_of(item: pytest.Item) -> str:
    """Return how a test runs: on every rank, starting jobs, as a crash test, or alone."""
    folder = item.path.parent.name
    return folder if folder in ("parallel", "jobs", "crash", "horovod") else "alone"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        kind = kind_of(item)
        if kind in ("jobs", "crash"):
            item.add_marker("full")
        if kind in ("jobs", "parallel"):
            item.add_marker("mpi")
        if "on_hosts" in getattr(item, "fixturenames", ()):
            item.add_marker("four_ranks")  # two hosts of two: fewer have not all of it
        if kind != "parallel":
            _give_time(item)
    # What takes long comes first, or one worker would be at it when all others are done.
    items.sort(key=lambda item: "full" not in item.keywords)


def _give_time(item: pytest.Item) -> None:
    """Set a test's limit, which is higher on a slow machine."""
    mark = item.get_closest_marker("timeout")
    # Each job of a test hangs by itself, and is named, before pytest gives up.
    usual = (
        6 * PATIENCE_SECONDS
        if kind_of(item) == "jobs"
        else float(item.config.getini("timeout"))
    )
    seconds = mark.args[0] if mark else usual
    item.add_marker(pytest.mark.timeout(limit(seconds)), append=False)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log):
    from xdist.scheduler import LoadScopeScheduling

    class Spread(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            return nodeid if file in APART else "hosts" if file in ON_HOSTS else file

    return Spread(config, log)


def pytest_collection_finish() -> None:
    """Let no collection of garbage look through what was imported: a third of a second."""
    gc.collect()
    gc.freeze()


def pytest_sessionstart(session: pytest.Session) -> None:
    if hasattr(session.config, "workerinput"):
        keep_to_core(int(session.config.workerinput["workerid"].removeprefix("gw")))


# What was tried, by all workers together.


def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["counts"] = dict(COUNTS)
        session.config.workeroutput["judged"] = [digest.hex() for digest in JUDGED]


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node) -> None:
    told = getattr(node, "workeroutput", {})
    COUNTS.update(told.get("counts", {}))
    JUDGED.update(bytes.fromhex(digest) for digest in told.get("judged", ()))


def pytest_terminal_summary(terminalreporter) -> None:
    counts = {"distinct crash states": len(JUDGED), **COUNTS}
    if any(counts.values()):
        tried = ", ".join(f"{number} {what}" for what, number in counts.items())
        terminalreporter.write_line(f"drawn with MPI_CKPT_TEST_SEED={SEED}: {tried}")
