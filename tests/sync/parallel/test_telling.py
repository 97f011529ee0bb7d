# SPDX-License-Identifier: Apache-2.0
"""No replica is overwritten without a line that names it."""

from __future__ import annotations

import logging

import numpy as np
import pytest

from mpi_ckpt import Accumulator, ArrayState, ObjectState
from mpi_ckpt.errors import DivergedError
from tests.ranks import manager


@pytest.fixture(autouse=True)
def listen(caplog):
    caplog.set_level(logging.INFO, "mpi_ckpt")


def told(caplog, level: int) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno == level]


def test_a_save_names_what_it_makes_equal_once_then_counts(comm, shared_path, caplog):
    arrays = {"a": np.zeros(3), "b": np.zeros(2)}
    state = ArrayState("statistics", arrays, sync="root")
    with manager(shared_path, state) as m:
        m.save()
        assert told(caplog, logging.WARNING) == []
        for _ in range(3):
            arrays["a"][:] = comm.rank + 1
            m.save()
            assert arrays["a"].tolist() == [1] * 3
    differ = comm.size > 1
    warned = told(caplog, logging.WARNING)
    counted = [
        record for record in told(caplog, logging.INFO) if "were made equal" in record
    ]
    if comm.rank or not differ:
        assert warned == counted == []
        return
    (line,) = warned
    assert "'statistics'" in line
    assert "all ranks now have root's values of a" in line
    assert [record.split(": ")[1] for record in counted] == [
        "1 leaves of 1 states differed between ranks, and were made equal"
    ] * 3


def test_the_average_is_called_so(comm, shared_path, caplog):
    with manager(
        shared_path, ArrayState("u", {"x": np.full(2, float(comm.rank))}, sync="mean")
    ) as m:
        m.save()
    warned = told(caplog, logging.WARNING)
    assert len(warned) == (comm.rank == 0 and comm.size > 1)
    assert all("the average" in record for record in warned)


def test_a_long_list_of_leaves_is_cut(comm, shared_path, caplog):
    arrays = {f"x{n:02}": np.full(2, comm.rank) for n in range(40)}
    with manager(shared_path, ArrayState("u", arrays, sync="root")) as m:
        m.save()
    for line in told(caplog, logging.WARNING):
        assert "x11 and 28 more" in line


def test_a_sync_that_was_asked_for_says_what_differed(comm, shared_path, caplog):
    compared = ArrayState("compared", {"x": np.full(2, comm.rank)})
    rooted = ObjectState("rooted", comm.rank, sync="root")
    alone = ObjectState("alone", comm.rank, sync="none")
    with manager(shared_path, compared, rooted, alone) as m:
        report = m.sync()
        assert alone.value == comm.rank
        assert rooted.value == 0
        assert set(report.differing) == ({"compared", "rooted"} if comm.size > 1 else set())
    if comm.rank == 0 and comm.size > 1:
        (line,) = told(caplog, logging.WARNING)
        assert "sync(): state 'compared' differed" in line
        assert any(
            "sync(): state 'rooted'" in record for record in told(caplog, logging.INFO)
        )
    else:
        assert told(caplog, logging.WARNING) == []


@pytest.mark.parametrize("mode", ["check", "none"])
@pytest.mark.parametrize("kind", [ObjectState, ArrayState])
def test_by_default_values_of_each_rank_are_refused_with_the_ways_out(
    comm, shared_path, kind, mode
):
    value = np.full(2, comm.rank)
    own = (
        kind("slab", {"u": value})
        if mode == "check"
        else kind("slab", {"u": value}, sync="none")
    )
    with manager(shared_path, own) as m:
        if comm.size == 1:
            m.save()
            return
        with pytest.raises(DivergedError) as caught:
            m.save()
        assert m.generations() == []
    text = str(caught.value)
    assert "state 'slab': u differ" in text
    assert all(way in text for way in ("PerRankState", 'sync="root"', "sync()"))
    assert value.tolist() == [comm.rank] * 2


def test_parts_of_ranks_differ_by_nature_and_are_no_news(comm, shared_path, caplog):
    sums = Accumulator(name="sums")
    with manager(shared_path, sums) as m:
        for _ in range(2):
            sums["n"] += 1
            m.save()
    assert told(caplog, logging.WARNING) == []
    assert [text for text in caplog.messages if "made equal" in text] == []
