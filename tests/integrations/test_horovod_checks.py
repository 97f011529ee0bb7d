# SPDX-License-Identifier: Apache-2.0
"""Which Horovod can live in one process with this package, told with stand-ins for both."""

from __future__ import annotations

import threading
from types import SimpleNamespace

import pytest

from mpi_ckpt.comm import launch as module
from mpi_ckpt.comm.admission import (
    check_before,
    objection_of,
    refuse_if_any_objects,
)
from mpi_ckpt.comm.launch import check_finalized, check_horovod, find_horovod
from mpi_ckpt.comm.roster import RankTexts
from mpi_ckpt.errors import LaunchError

FRONT_ENDS = [f"horovod.{name}" for name in ("torch", "tensorflow", "keras", "mxnet")]


def horovod(size: int, *, initialized: bool = True, mpi: bool = True) -> SimpleNamespace:
    return SimpleNamespace(
        is_initialized=lambda: initialized, mpi_enabled=lambda: mpi, size=lambda: size
    )


def mpi(*, main: bool = True, level: int = 3, finalized: bool = False) -> SimpleNamespace:
    return SimpleNamespace(
        Is_thread_main=lambda: main,
        Query_thread=lambda: level,
        Is_finalized=lambda: finalized,
        THREAD_MULTIPLE=3,
    )


@pytest.mark.parametrize("name", FRONT_ENDS)
def test_horovod_of_other_ranks_or_without_mpi_is_refused(name):
    check_horovod(mpi(), 4, {name: horovod(4)})
    with pytest.raises(
        LaunchError, match=r"runs 2 ranks .over MPI., the communicator has 4"
    ):
        check_horovod(mpi(), 4, {name: horovod(2)})
    with pytest.raises(LaunchError, match=r"4 ranks .without MPI., .*HOROVOD_CONTROLLER"):
        check_horovod(mpi(), 4, {name: horovod(4, mpi=False)})


def test_ranks_of_a_process_set_may_be_fewer_but_not_without_mpi():
    check_horovod(mpi(), 2, {"horovod.torch": horovod(4)}, is_part=True)
    with pytest.raises(LaunchError, match="without MPI"):
        check_horovod(mpi(), 2, {"horovod.torch": horovod(4, mpi=False)}, is_part=True)


def test_horovod_that_is_not_in_use_is_left_alone():
    check_horovod(mpi(main=False, level=0), 4, {})
    idle = {"horovod.torch": horovod(1, initialized=False)}
    check_horovod(mpi(main=False, level=0), 4, idle)
    assert find_horovod(idle) is None
    used = {**idle, "horovod.tensorflow": horovod(1)}
    assert find_horovod(used) is used["horovod.tensorflow"]


def test_mpi_that_horovods_thread_has_started_is_refused():
    with pytest.raises(LaunchError, match=r"thread has started MPI.*import mpi4py.MPI bef"):
        check_horovod(mpi(main=False), 4, {"horovod.torch": horovod(4)})


def test_off_the_main_thread_nothing_is_concluded_from_mpis():
    outcome = []

    def check():
        try:
            outcome.append(check_horovod(mpi(main=False), 4, {"horovod.torch": horovod(4)}))
        except LaunchError as error:
            outcome.append(error)

    thread = threading.Thread(target=check)
    thread.start()
    thread.join()
    assert outcome == [None]


@pytest.mark.parametrize("level", [0, 1, 2])
def test_mpi_for_one_thread_at_a_time_is_refused_beside_horovod(level):
    with pytest.raises(LaunchError, match=r"one thread at a time.*rc.thread_level"):
        check_horovod(mpi(level=level), 4, {"horovod.torch": horovod(4)})


def test_finalized_mpi_is_told_before_it_ends_the_process():
    check_finalized(mpi())
    with pytest.raises(LaunchError, match=r"finalized.*hvd.shutdown.*before hvd.init"):
        check_finalized(mpi(finalized=True))
    with pytest.raises(LaunchError, match="finalized"):
        check_before(mpi(finalized=True), None)


def test_objection_is_what_the_check_would_raise(monkeypatch):
    comm = SimpleNamespace(size=4)
    assert objection_of(mpi(), comm) == ""
    monkeypatch.setitem(module.sys.modules, "horovod.torch", horovod(2))
    assert "runs 2 ranks" in objection_of(mpi(), comm)


def test_objections_are_raised_by_all_and_name_their_ranks():
    refuse_if_any_objects(RankTexts.of([("", 4)]))
    some = RankTexts.of([("", 1), ("too few", 1), ("", 1), ("too few", 1)])
    with pytest.raises(LaunchError, match=r"^rank 1, 3: too few$") as caught:
        refuse_if_any_objects(some)
    assert caught.value.problems == ("rank 1, 3: too few",)
    with pytest.raises(LaunchError, match=r"^all wrong$"):
        refuse_if_any_objects(RankTexts.of([("all wrong", 4)]))
