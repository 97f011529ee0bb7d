# SPDX-License-Identifier: Apache-2.0
"""The checks for a machine with a device run on the host, so that none rots."""

import json
from unittest.mock import Mock

import pytest

from tests.device_checks import contents, costs  # noqa: F401 (they add their checks)
from tests.device_checks.bench import CHECKS
from tests.launch import run_job

NEED_A_DEVICE = {
    *("replay_is_refused_with_overlap", "device_memory_of_saves"),
    "no_memory_left_on_the_device",
}


@pytest.mark.full
def test_all_that_means_something_on_the_host_holds(tmp_path):
    file = tmp_path / "all.json"
    program = ["-m", "tests.device_checks", str(file)]
    job = run_job(2, program, env={"DEVICE": "cpu", "MIB": "8"})
    assert job.code == 0, job.text
    lines = [json.loads(line) for line in job.out.splitlines() if line.startswith("{")]
    assert [line["check"] for line in lines] == [check.name for check in CHECKS]
    verdicts = {line["check"]: line["verdict"] for line in lines}
    assert {name for name, one in verdicts.items() if one != "ok"} == NEED_A_DEVICE
    assert {verdicts[name] for name in NEED_A_DEVICE} == {"needs a device"}
    assert all(line["figure"] for line in lines if line["verdict"] == "ok")
    answer = json.loads(file.read_text())
    assert answer["checks"] == lines
    assert answer["not run"] == []
    rates = [line["figures"] for line in lines if line["check"].startswith("rate_of_")]
    assert len(rates) == 5
    assert all(one["share"] > 0 and one["page_locked_copy GB/s"] > 0 for one in rates)


def test_what_has_no_time_left_is_named(monkeypatch, tmp_path, capsys):
    from tests.device_checks import __main__ as program
    from tests.device_checks.bench import Check

    file = tmp_path / "all.json"
    short = [Check(name, lambda _: "fine") for name in ("first", "second", "third")]
    seconds = iter([0.0, 1.0, 0.5, 0.5, 999.0])
    monkeypatch.setattr(program, "CHECKS", short)
    monkeypatch.setattr(program, "time", Mock(perf_counter=lambda: next(seconds)))
    monkeypatch.setattr(program, "MPI", Mock(COMM_WORLD=Alone()))
    monkeypatch.setattr(program.MPI, "Get_library_version", lambda: "none")
    monkeypatch.setattr(program.sys, "argv", ["", str(file)])
    assert program.main() == 0
    answer = json.loads(file.read_text())
    assert [line["check"] for line in answer["checks"]] == ["first"]
    assert answer["not run"] == ["second", "third"]
    assert json.loads(capsys.readouterr().out) == answer["checks"][0]


class Alone:
    rank, size = 0, 1

    def Barrier(self):
        pass

    def bcast(self, mine):
        return mine

    def allgather(self, mine):
        return [mine]


def test_a_check_that_fails_is_told(monkeypatch, tmp_path):
    """One rank's failure is the verdict."""
    from tests.device_checks import __main__ as program
    from tests.device_checks.bench import Bench, Check

    class TwoRanks:
        rank, size = 0, 2

        def Barrier(self):
            pass

        def allgather(self, mine):
            return [mine, ("failed", "AssertionError: torn")]

    bench = Bench(TwoRanks(), tmp_path, "cpu", 1)
    line = program.run(bench, Check("fine", lambda _: "4 saves"))
    assert line["verdict"] == "failed"
    assert line["figure"] == "AssertionError: torn"
