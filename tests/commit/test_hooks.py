# SPDX-License-Identifier: Apache-2.0
"""What the program and the log hear of saves, restores and stops, with one rank."""

from __future__ import annotations

import logging
import re

import numpy as np
import pytest

from mpi_ckpt import ArrayState, Hooks, KeepBest, KeepLast, StopWhen
from mpi_ckpt.engine import watchdog
from mpi_ckpt.engine.observer import describe_restore, describe_save
from mpi_ckpt.errors import OptionsError, SaveError
from mpi_ckpt.options import Options
from mpi_ckpt.reports import PhaseClock, Progress


def arrays(value=1.0):
    return ArrayState("a", {"x": np.full(100, value)})


class Heard:
    """Keeps what hooks were given, in order."""

    def __init__(self):
        self.calls = []
        self.hooks = Hooks(
            on_save=lambda report: self.calls.append(("save", report)),
            on_restore=lambda report: self.calls.append(("restore", report)),
            on_stop=lambda report: self.calls.append(("stop", report)),
        )

    @property
    def kinds(self):
        return [kind for kind, _ in self.calls]


@pytest.mark.parametrize("asynchronous", [False, True])
def test_no_report_is_lost_by_steps(manage, asynchronous):
    heard = Heard()
    manager = manage(arrays(), hooks=heard.hooks, interval=2, asynchronous=asynchronous)
    assert manager.last_save is None
    for step in range(1, 8):
        manager.step(metrics={"loss": 1 / step})
    manager.wait()
    assert heard.kinds == ["save"] * 3
    reports = [report for _, report in heard.calls]
    assert [(r.generation, r.step) for r in reports] == [(1, 2), (2, 4), (3, 6)]
    assert [r.metrics for r in reports] == [{"loss": 1 / n} for n in (2, 4, 6)]
    assert manager.last_save is reports[-1]


def test_a_restore_is_heard_of_and_a_fresh_start_is_none(manage, caplog):
    caplog.set_level(logging.INFO, "mpi_ckpt")
    heard = Heard()
    manager = manage(arrays(), hooks=heard.hooks)
    assert manager.restore() is None
    assert heard.calls == []
    manager.save()
    report = manager.restore()
    assert heard.calls[1:] == [("restore", report)]


def test_a_stop_is_heard_of_after_its_save(manage, tmp_path):
    heard = Heard()
    manager = manage(arrays(), hooks=heard.hooks, stop=StopWhen(asked=lambda: True))
    while not manager.step():
        pass
    assert heard.kinds == ["save", "stop"]
    stop = heard.calls[1][1]
    assert stop.save is manager.last_save
    assert (stop.step, stop.reason) == (manager.steps, "StopWhen.asked said so")


def test_hooks_are_joined_in_order(manage):
    heard = []
    one, two, three = (
        Hooks(on_save=lambda _, name=name: heard.append(name)) for name in "abc"
    )
    manage(arrays(), hooks=one | two | three).save()
    assert heard == ["a", "b", "c"]


def test_a_hook_that_fails_is_named_and_stops_nobody(manage, caplog):
    heard = Heard()

    def unlucky(report):
        raise ValueError("no luck")

    manager = manage(arrays(), hooks=Hooks(on_save=unlucky) | heard.hooks)
    assert manager.save().generation == 1
    assert manager.save().generation == 2
    assert heard.kinds == ["save", "save"]
    first, *_ = [r for r in caplog.records if r.levelno == logging.WARNING]
    assert "Hooks.on_save has failed" in first.getMessage()
    assert "unlucky" in first.getMessage()
    assert "no luck" in caplog.text


def test_a_hook_that_saves_is_refused_at_once(manage, caplog):
    managers = []
    hooks = Hooks(on_save=lambda _: managers[0].save())
    managers.append(manage(arrays(), hooks=hooks))
    assert managers[0].save().generation == 1
    assert "save(): called in Hooks.on_save, which root alone runs" in caplog.text
    assert [info.generation for info in managers[0].generations()] == [1]
    assert managers[0].save().generation == 2


def test_what_is_no_function_is_refused():
    with pytest.raises(OptionsError, match="on_save is 3, not a function"):
        Hooks(on_save=3)
    with pytest.raises(OptionsError, match="hooks is None, not Hooks"):
        Options(hooks=None)


def test_ranks_may_give_other_functions():
    first, other = (Options(hooks=Hooks(on_save=lambda _: None)) for _ in range(2))
    assert first.describe() == other.describe() == Options().describe()


def lines(caplog, logger="mpi_ckpt.engine.observer"):
    return [r.getMessage() for r in caplog.records if r.name == logger]


def test_the_log_has_one_line_for_each(manage, caplog, tmp_path):
    caplog.set_level(logging.INFO, "mpi_ckpt")
    manager = manage(arrays(), retention=KeepLast(1))
    manager.restore()
    manager.save(3)
    manager.save(600)
    manager.restore()
    fresh, first, second, restored = lines(caplog)
    assert fresh == f"nothing in {tmp_path}: starting fresh"
    seconds = r"\S+ s"
    assert re.fullmatch(
        rf"saved generation 1, step 3, by 1 rank: \S+ KiB written, 0 B reused, "
        rf"in {seconds} \(sync {seconds}, write {seconds}, publish {seconds}\); 1 kept",
        first,
    )
    assert re.search(r"800 B reused, .*; 1 kept, 1 removed$", second)
    assert re.fullmatch(
        rf"restored generation 2, step 600, saved by 1 rank: 4.8 KiB read, in {seconds} "
        rf"\(match {seconds}, transfer {seconds}, adopt {seconds}\)",
        restored,
    )


def test_a_restore_by_other_ranks_says_so(manage):
    manager = manage(arrays())
    manager.save(600)
    report = manager.restore()
    from dataclasses import replace

    other = replace(report, saved_size=2, size=3)
    assert describe_restore(other).startswith(
        "restored generation 1, step 600, saved by 2 ranks, now 3: "
    )
    assert describe_restore(replace(report, from_memory=True)).startswith(
        "restored the copy in memory, step 600"
    )
    assert "2 removed" in describe_save(replace(manager.last_save, pruned=(1, 2)))


def test_a_failed_save_is_no_save(manage, caplog):
    caplog.set_level(logging.INFO, "mpi_ckpt")
    heard = Heard()
    manager = manage(arrays(), hooks=heard.hooks)
    with pytest.raises(SaveError):
        manager.save("seven")
    assert heard.calls == []
    assert manager.last_save is None
    assert lines(caplog) == []


def test_a_metric_that_never_comes_is_a_warning(manage, caplog):
    manager = manage(arrays(), retention=KeepLast(1) | KeepBest("los", mode="min"))
    for _ in range(3):
        manager.save(metrics={"loss": 1.0})
    (warning,) = [r for r in caplog.records if r.levelno >= logging.WARNING]
    assert "no generation" in warning.getMessage()
    assert "'los'" in warning.getMessage()
    assert "'loss'" in warning.getMessage()


def test_a_long_save_is_reported_while_it_goes_on(manage, caplog, monkeypatch):
    caplog.set_level(logging.INFO, "mpi_ckpt")
    monkeypatch.setattr(watchdog, "_REPORTED_SECONDS", 0.02)
    state = ArrayState("a", {"x": np.ones(1 << 20)})
    heard = Heard()
    manager = manage(state, hooks=heard.hooks)
    from mpi_ckpt.storage import filesystem
    from tests.waiting import wait_for

    real = filesystem.sync_file
    told = re.compile(r"saving, write: \S+ \w+ of 8.0 MiB, \S+ \w+/s, \d+ s left")

    def is_told():
        # On a busy machine, steps before the writing are told of too.
        return any(map(told.fullmatch, lines(caplog, "mpi_ckpt.engine.session")))

    def slow(descriptor):
        assert wait_for(is_told)
        real(descriptor)

    monkeypatch.setattr(filesystem, "sync_file", slow)
    manager.save()
    assert is_told()


def test_progress_shows_what_has_moved_and_what_is_left(manage):
    observer = manage(arrays())._session.observer
    clock = PhaseClock()
    with clock.phase("write"):
        assert observer.describe_progress("saving", clock, 7.4) == (
            "saving, write: for 7 s so far"
        )
        clock.progress.expect(8 << 20)
        clock.progress.count(2 << 20)
        assert observer.describe_progress("saving", clock, 2.0) == (
            "saving, write: 2.0 MiB of 8.0 MiB, 1.0 MiB/s, 6 s left"
        )


def test_bytes_are_announced_now_and_then(monkeypatch):
    now, heard = 0.0, []
    monkeypatch.setattr("mpi_ckpt.reports.time.monotonic", lambda: now)
    progress = Progress(lambda: heard.append(now))
    for _ in range(100):
        now += 0.1
        progress.count(1)
    assert progress.moved == 100
    assert 4 <= len(heard) <= 5
