# SPDX-License-Identifier: Apache-2.0
"""`watch`, `du`, `history`, `report`, `pin` and `unpin`, and what `ls` marks."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from contextlib import closing
from html.parser import HTMLParser
from importlib.util import find_spec

import numpy as np
import pytest
from rich.cells import cell_len

from mpi_ckpt import ArrayState
from mpi_ckpt.cli import progress
from mpi_ckpt.cli.observe import plotting, reporting
from mpi_ckpt.cli.observe.record import RunRecord
from mpi_ckpt.storage.directory.checkpoint_directory import CheckpointDirectory
from mpi_ckpt.storage.journal import HistoryEvent, Journal
from tests.cli.terminals import plain, shown_in_terminal
from tests.commands import ask, fill, run
from tests.waiting import limit

WIDTHS = (60, 80, 200)


@pytest.fixture(autouse=True, scope="module")
def fonts():
    """Let matplotlib open its fonts now: it keeps them, and a test would seem to leak."""
    if find_spec("matplotlib") is not None:
        plotting.draw(RunRecord((HistoryEvent(event="saved", time=1.0),)), "svg")
        plotting.draw(RunRecord((HistoryEvent(event="saved", time=1.0),)), "pdf")
        plotting.draw(RunRecord((HistoryEvent(event="saved", time=1.0),)), "png")


@pytest.fixture
def trained(manage, tmp_path):
    """A directory in which two jobs have saved, the second after a restore."""
    root = tmp_path / "c"
    array = np.zeros(1000)
    for steps in ((5, 10), (15, 20, 25)):
        manager = manage(ArrayState("model", {"x": array}), root=root, interval=5)
        manager.restore()
        for step in steps:
            array += 1
            metrics = {"loss": 1 / step, "error of\x1b[31m": float(step)}
            manager.save(step, metrics=metrics)
        manager.close()
    return root


def test_the_best_and_the_pinned_are_marked(tmp_path):
    root = fill(tmp_path / "c", 4)
    assert run("pin", root, "2", "--note", "figure 3").exit_code == 0
    shown = run("ls", root, "--best", "loss", "--mode", "min").stdout
    lines = {line.split()[0]: line for line in shown.splitlines()[2:6]}
    assert "pinned: figure 3" in lines["2"]
    assert "best loss" in lines["4"]
    assert "best" not in lines["1"]
    rows = ask("ls", root, "--best", "loss", "--mode", "max")["generations"]
    marks = {row["generation"]: (row["best"], row["pinned"], row["note"]) for row in rows}
    assert marks[1] == (True, False, "")
    assert marks[2] == (False, True, "figure 3")


@pytest.mark.parametrize("words", [["--best", "loss", "--mode", "min"], ["--sort", "loss"]])
def test_a_metric_that_was_asked_for_is_shown_in_any_terminal(tmp_path, words):
    fill(tmp_path / "c", 4)
    for columns in WIDTHS:
        code, shown = shown_in_terminal(["ls", str(tmp_path / "c"), *words], columns)
        assert code == 0
        head, _, *rows = plain(shown).splitlines()
        assert "loss" in head.split()
        (fourth,) = (row for row in rows if re.match(r"4 +\d", row))
        assert "0.25" in fourth.split()
        assert max(map(cell_len, plain(shown).splitlines())) <= columns


@pytest.mark.parametrize(
    ("words", "order"),
    [
        ((), [1, 2, 3, 4]),
        (("--best", "loss", "--mode", "min", "--sort"), [4, 3, 2, 1]),
        (("--best", "loss", "--mode", "max", "--sort"), [1, 2, 3, 4]),
        (("--sort", "loss"), [4, 3, 2, 1]),
        (("--sort", "step"), [1, 2, 3, 4]),
        (("--sort", "saved"), [1, 2, 3, 4]),
    ],
)
def test_generations_are_sorted(tmp_path, words, order):
    rows = ask("ls", fill(tmp_path / "c", 4), *words)["generations"]
    assert [row["generation"] for row in rows] == order


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--best", "loss"), "--mode min or --mode max"),
        (("--mode", "min"), "--best METRIC"),
        (("--best", "los", "--mode", "min"), "no generation has that metric; there: loss"),
        (("--sort",), "--sort alone puts the best first"),
        (("--sort", "sizes"), "sort by generation, step, saved, size, ranks, loss"),
    ],
)
def test_what_cannot_be_sorted_is_refused(tmp_path, words, said):
    result = run("ls", fill(tmp_path / "c"), *words)
    assert result.exit_code == 2
    assert said in " ".join(result.stderr.split())


def test_a_pinned_one_is_kept_by_prune(tmp_path):
    root = fill(tmp_path / "c", 4)
    assert ask("pin", root, "checkpoint-00000001", "--note", "n") == {
        "generation": 1, "step": 100, "pinned": True, "note": "n",
    }  # fmt: skip
    dry = ask("prune", root, "--keep-last", "1", "--dry-run")
    assert (dry["kept"], dry["pinned"], dry["removed"]) == ([1, 4], [1], [2, 3])
    result = run("prune", root, "--keep-last", "1")
    assert "also kept, as pinned: 1" in result.stdout
    assert [row["generation"] for row in ask("ls", root)["generations"]] == [1, 4]
    assert ask("unpin", root, "1") == {"generation": 1, "pinned": False}
    assert ask("prune", root, "--keep-last", "1")["removed"] == [1]


def test_a_pin_is_made_beside_a_job(tmp_path):
    root = fill(tmp_path / "c")
    with closing(CheckpointDirectory(root)) as job:
        job.own()
        assert run("pin", root, "1").exit_code == 0
        assert run("pin", root, "newest").exit_code == 0
        assert run("unpin", root, "newest").exit_code == 0


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (("pin", "9"), 2, "no generation 9"),
        (("unpin", "1"), 2, "generation 1 is not pinned"),
        (("unpin", "one"), 2, "is no generation"),
    ],
)
def test_what_is_not_there_is_not_pinned(tmp_path, words, code, said):
    command, *rest = words
    result = run(command, fill(tmp_path / "c"), *rest)
    assert result.exit_code == code
    assert said in result.stderr


def test_a_pin_that_lost_its_generation_can_go(tmp_path):
    root = fill(tmp_path / "c")
    run("pin", root, "1")
    shutil.rmtree(root / "checkpoint-00000001")
    assert run("ls", root).exit_code == 0
    assert run("unpin", root, "1").exit_code == 0
    assert not (root / ".pin-00000001").exists()


def test_du_adds_up_states_and_generations(tmp_path):
    root = fill(tmp_path / "c", 3)
    answer = ask("du", root)
    states = {row["name"]: row for row in answer["states"]}
    assert states["frozen"]["bytes"] == 40_000
    assert states["arrays"]["bytes"] == 4000
    for row in answer["states"] + answer["generations"]:
        assert row["bytes"] == row["shared"] + row["own"]
    # `frozen` is in a file of its own that generations share, or in the first of them.
    owned = sum(row["own"] for row in answer["generations"])
    assert owned <= answer["bytes_on_disk"] == ask("ls", root)["bytes_on_disk"]
    shown = run("du", root, "2").stdout
    assert "state of generation 2" in shown
    assert "3 folders" in shown
    shutil.rmtree(root / "checkpoint-00000002")
    shutil.rmtree(root / "checkpoint-00000003")
    (only,) = ask("du", root)["generations"]
    assert only["shared"] == 0


def test_history_lists_what_happened(trained):
    answer = ask("history", trained)
    kinds = [event["event"] for event in answer["events"]]
    assert kinds == [
        *("fresh", "saved", "saved", "ended"),
        *("restored", "saved", "saved", "saved", "ended"),
    ]
    assert answer["events"][4]["saved_ranks"] == 1
    # Generations 1 and 2 were removed since, and are still told of.
    there = {row["generation"] for row in ask("ls", trained)["generations"]}
    saved = {event["generation"] for event in answer["events"] if event["event"] == "saved"}
    assert there < saved == {1, 2, 3, 4, 5}
    shown = run("history", trained, "--last", "3").stdout
    assert "and 6 earlier events" in shown
    assert "\x1b" not in shown


def test_generations_tell_what_a_lost_history_does_not(trained):
    (trained / ".history.jsonl").unlink()
    answer = ask("history", trained)
    assert [event["step"] for event in answer["events"]] == [15, 20, 25]


def test_a_record_is_joined_and_added_up():
    def event(kind, at, job, **facts):
        return HistoryEvent(event=kind, time=at, job=job, **facts)

    record = RunRecord.of(
        [
            event("restored", 20.0, "b", seconds={"total": 2.0}),
            event("saved", 1.0, "a", generation=1, seconds={"write": 1.0, "total": 1.5}),
            event("saved", 4.0, "a", generation=2, seconds={"write": 2.0, "total": 2.5}),
            event("kept", 21.0, "b", generation=1, seconds={"total": 0.5}),
            event("saved", 25.0, "b", generation=3, copied_from=1, seconds={"copy": 4.0}),
            event("ended", 26.0, "b"),
        ],
        [],
    )
    assert record.seconds_by_phase() == {
        "saved": {"write": 3.0, "total": 4.0}, "restored": {"total": 2.0},
        "kept": {"total": 0.5}, "copied": {"copy": 4.0},
    }  # fmt: skip
    assert record.span_seconds() == 9.0
    assert record.lost_seconds() == 16.0
    assert [job[0].job for job in record.jobs] == ["a", "b"]


@pytest.fixture
def copied(trained):
    """A directory whose last generation hosts have copied, after a save that failed."""
    with closing(CheckpointDirectory(trained)):
        journal = Journal(trained)
        facts = {"job": "z", "ranks": 2, "step": 30, "generation": 6}
        journal.add(HistoryEvent(event="kept", time=time.time(), **facts))
        journal.add(
            HistoryEvent(event="failed", time=time.time(), step=32, reason="WriteError")
        )
        copy = {"copied_from": 6, "lag": 7, "skipped": 2, "seconds": {"copy": 1.5}}
        journal.add(HistoryEvent(event="saved", time=time.time(), **facts, **copy))
    return trained


def test_history_shows_saves_on_hosts_and_how_late_copies_came(trained, copied):
    *_, kept, failed, saved = ask("history", copied)["events"]
    assert (kept["event"], failed["reason"]) == ("kept", "WriteError")
    assert (saved["copied_from"], saved["lag"], saved["skipped"]) == (6, 7, 2)
    assert "copied_from" not in kept
    head, _, *rows = run("history", copied, "--last", "3").stdout.splitlines()
    assert "lag   left out" in head
    assert "failed: WriteError" in rows[1]
    end = head.index("left out") + len("left out")
    assert rows[2][:end].split()[-2:] == ["7", "2"]
    assert rows[0][:end].split()[-2:] != ["0", "0"]
    assert "left out" not in run("history", copied, "--last", "1000").stderr


def test_history_without_copies_has_no_columns_for_them(trained):
    assert "lag" not in run("history", trained).stdout


def test_a_report_tells_of_saves_on_hosts(copied, tmp_path):
    target = tmp_path / "report.html"
    assert run("report", copied, "-o", target).exit_code == 0
    page = Page()
    page.feed(target.read_text())
    words = " ".join(" ".join(page.text).split())
    for row in (
        *("saves on the hosts 1", "failed saves on the hosts 1"),
        *("saves copied from the hosts 1", "most steps that a copy came later 7"),
        *("due saves left out 2", "copies from the hosts, copy 1.5 s"),
    ):
        assert row in words


@pytest.mark.parametrize("suffix", ["png", "svg", "pdf"])
def test_history_is_drawn(trained, tmp_path, suffix):
    pytest.importorskip("matplotlib")
    target = tmp_path / f"out.{suffix}"
    assert ask("history", trained, "--plot", target)["plot"] == str(target)
    start = {"png": b"\x89PNG", "svg": b"<?xml", "pdf": b"%PDF"}[suffix]
    assert target.read_bytes().startswith(start)
    again = run("history", trained, "--plot", target)
    assert again.exit_code == 2
    assert "exists" in again.stderr


def test_a_picture_of_no_known_kind_is_refused(trained, tmp_path):
    result = run("history", trained, "--plot", tmp_path / "out.jpeg")
    assert result.exit_code == 2
    assert ".png, .svg or .pdf" in result.stderr


def test_strange_numbers_are_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    numbers = (float("nan"), float("inf"), -1e300, 0.0)
    events = [
        HistoryEvent(
            event="saved", time=1e300 * n, step=n, generation=n, ranks=n,
            seconds={"total": value}, metrics={"$x_{": value},
        )
        for n, value in enumerate(numbers)
    ]  # fmt: skip
    assert plotting.draw(RunRecord(tuple(events)), "svg").startswith(b"<?xml")


class Page(HTMLParser):
    """Requires balanced elements, and keeps text and what is loaded from elsewhere."""

    def __init__(self):
        super().__init__()
        self.open, self.loads, self.text = [], [], []

    def handle_starttag(self, tag, attrs):
        if tag not in ("meta", "br", "use", "path", "image") or tag == "path":
            self.open.append(tag)
        self.loads += [v for k, v in attrs if k in ("src", "href") and v[:1] != "#"]

    def handle_startendtag(self, tag, attrs):
        self.loads += [v for k, v in attrs if k in ("src", "href") and v[:1] != "#"]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def test_a_report_is_one_page_that_loads_nothing(trained, tmp_path):
    run("pin", trained, "4", "--note", "<script>alert(1)</script>")
    target = tmp_path / "report.html"
    answer = ask("report", trained, "-o", target)
    text = target.read_text()
    assert answer["bytes"] == target.stat().st_size
    page = Page()
    page.feed(text)
    assert page.open == []
    assert page.loads == []
    assert "<script" not in text.lower()
    assert "\x1b" not in text
    words = " ".join(" ".join(page.text).split())
    assert f"Checkpoints in {trained}" in words
    assert "checkpoint-00000004 20" in words
    assert "pinned <script>" in words  # as text
    assert "saves, write" in words
    assert run("report", trained, "-o", target).exit_code == 2


def test_a_report_needs_no_matplotlib(trained, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    target = tmp_path / "report.html"
    assert run("report", trained, "-o", target).exit_code == 0
    assert "pip install" in target.read_text()
    result = run("history", trained, "--plot", tmp_path / "h.png")
    assert result.exit_code == 2
    assert "mpi_ckpt[plot]" in result.stderr


@pytest.mark.full
def test_a_browser_shows_a_report(trained, tmp_path):
    browser = next(filter(None, map(shutil.which, ("chromium", "google-chrome"))), None)
    if browser is None:
        pytest.skip("no chromium: apt-get install chromium")
    target, picture = tmp_path / "report.html", tmp_path / "page.png"
    assert run("report", trained, "-o", target).exit_code == 0
    command = [
        *(
            browser,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--virtual-time-budget=1",
        ),
        *(f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1000,1400"),
    ]
    dumped = subprocess.run(
        [*command, "--dump-dom", target.as_uri()],
        capture_output=True, text=True, timeout=limit(120),
    )  # fmt: skip
    assert "checkpoint-00000005" in dumped.stdout
    assert "Where the time went" in dumped.stdout
    subprocess.run(
        [*command, f"--screenshot={picture}", target.as_uri()],
        capture_output=True, timeout=limit(120),
    )  # fmt: skip
    image = pytest.importorskip("PIL.Image").open(picture).convert("L")
    shades = image.getcolors(1 << 16)
    dark = sum(count for count, shade in shades if shade < 128)
    assert 0.002 < dark / (image.width * image.height) < 0.5


def status(root, **facts):
    with closing(CheckpointDirectory(root)):
        Journal(root).show(
            {
                "job": "abc",
                "host": "node7",
                "ranks": 4,
                "step": 120,
                "reason": "",
                "started": time.time() - 3600,
                "updated": time.time(),
                "ended": None,
                "doing": "training",
                "phase": "",
                "since": time.time() - 10,
                "bytes_done": 0,
                "bytes_expected": 0,
                "due": {"step": 200},
                "last_save": {
                    "generation": 3,
                    "step": 100,
                    "time": time.time() - 60,
                    "seconds": 3.4,
                    "bytes": 1 << 30,
                },
                **facts,
            }
        )


def facts_of(root):
    return ask("watch", root)["facts"]


def test_watch_shows_a_training_job(tmp_path):
    root = fill(tmp_path / "c")
    status(root)
    facts = facts_of(root)
    assert facts["job"] == "abc on node7, 4 ranks, started 60 min ago"
    assert facts["now"].startswith("training, step 120; seen 0 s ago")
    assert facts["last save"] == (
        "generation 3, step 100, 60 s ago: 1.0 GiB written in 3.4 s"
    )
    assert facts["next save"] == "at step 200, in 80 steps"
    assert "more whole generations" in facts["free"]


def test_watch_shows_a_long_save(tmp_path):
    root = fill(tmp_path / "c")
    more = {"bytes_done": 1 << 30, "bytes_expected": 4 << 30, "due": {}}
    status(root, doing="saving", phase="write", **more)
    facts = facts_of(root)
    assert re.fullmatch(
        r"saving, write, for 10 s: 1.0 GiB of 4.0 GiB, 102.\d MiB/s, 30 s left; "
        r"seen 0 s ago",
        facts["now"],
    )
    assert facts["next save"] == "-"


KEPT = {"generation": 9, "step": 118, "seconds": 0.2, "bytes": 1 << 20}
COPY = {
    "step": 100, "bytes_done": 1 << 28, "bytes_expected": 1 << 30, "lag": 20, "skipped": 1,
    "failed": 2,
}  # fmt: skip


def test_watch_shows_what_hosts_keep_and_copy(tmp_path):
    root = fill(tmp_path / "c")
    now = time.time()
    kept, copy = {**KEPT, "time": now - 3}, {**COPY, "since": now - 16}
    status(root, kept=kept, copy=copy, local_failures=2, updated=now)
    facts = facts_of(root)
    assert facts["on hosts"] == (
        "generation 9, step 118, 3 s ago: 1.0 MiB written in 0.2 s; 2 later saves failed"
    )
    assert facts["copy"] == (
        "of step 100 to the directory, for 16 s: 256.0 MiB of 1.0 GiB of root's host, "
        "16.0 MiB/s, 48 s left; 20 steps behind, 1 due save left out, failed 2 times"
    )
    # Root may hold nothing of it, or wait for the next try.
    status(root, copy={**COPY, "since": now - 16, "bytes_done": 0, "bytes_expected": 0})
    assert facts_of(root)["copy"].startswith("of step 100 to the directory, for 16 s; 20")
    assert "on hosts" not in facts_of(root)
    status(root, copy=copy, kept=kept, ended=now)
    assert "copy" not in facts_of(root)


@pytest.mark.parametrize(
    ("facts", "said"),
    [
        ({"ended": 1.0, "reason": "SaveError"}, r"ended \d+ d ago \(SaveError\)"),
        ({"ended": 1.0}, r"ended \d+ d ago \(finished\)"),
        ({"updated": 1.0}, r"gone without a word, last seen \d+ d ago"),
    ],
)
def test_watch_shows_that_no_job_is_left(tmp_path, facts, said):
    root = fill(tmp_path / "c")
    status(root, **facts)
    answer = ask("watch", root)
    assert not answer["running"]
    assert re.search(said, answer["facts"]["job"])
    assert answer["facts"]["now"] == "-"
    assert answer["facts"]["last save"].startswith("generation 3, step 300")


@pytest.mark.parametrize(
    "text",
    [
        *("", "[]", "{", '{"updated": "x", "ranks": [], "due": 3}'),
        '{"copy": {"step": []}, "kept": [], "local_failures": "x"}',
        '{"copy": {}, "updated": 99999999999, "kept": {}}',
    ],
)
def test_watch_bears_any_status(tmp_path, text):
    root = fill(tmp_path / "c")
    (root / ".status.json").write_text(text)
    assert run("watch", root).exit_code == 0


def test_watch_works_before_the_first_save(manage, tmp_path):
    manager = manage(ArrayState("a", {"x": np.ones(3)}))
    manager.restore()
    answer = ask("watch", tmp_path)
    assert answer["generations"] == 0
    assert answer["facts"]["last save"] == "none"
    manager.close()


def test_watch_does_not_take_damaged_ones_for_older_ones(tmp_path):
    root = fill(tmp_path / "c", 10)
    (root / "checkpoint-00000009" / "manifest.json").write_text("{}")
    shown = run("watch", root).stdout
    assert "cannot be read: 9; mpi-ckpt ls says why\n" in shown
    assert "and 2 older generations\n" in shown
    assert ask("watch", root)["unreadable"] == [9]
    assert "cannot be read" not in run("watch", fill(tmp_path / "d", 2)).stdout


def test_watch_sees_a_job_of_this_host_without_a_status(tmp_path):
    root = fill(tmp_path / "c")
    with closing(CheckpointDirectory(root)) as job:
        job.own()
        assert "in use by job" in facts_of(root)["job"]


@pytest.mark.parametrize("command", ["watch", "du", "history"])
def test_they_change_nothing(trained, command):
    def snapshot():
        return {p: p.lstat().st_mtime_ns for p in sorted(trained.rglob("*"))}

    before = snapshot()
    assert run(command, trained).exit_code == 0
    assert snapshot() == before


@pytest.mark.full
@pytest.mark.parametrize("columns", WIDTHS)
@pytest.mark.parametrize(
    "words",
    [("du",), ("history",), ("watch", "--once"), ("ls", "--best", "loss", "--mode", "min")],
)
def test_they_fit_into_terminals(copied, words, columns):
    command, *rest = words
    more = {"copy": {**COPY, "since": 1.0}, "kept": {**KEPT, "time": 1.0}}
    status(copied, doing="saving", phase="write", bytes_done=5, bytes_expected=9, **more)
    code, written = shown_in_terminal([command, str(copied), *rest], columns)
    assert code == 0, written
    lines = [line for line in plain(written).splitlines() if line != str(copied)]
    assert max(map(cell_len, lines)) <= columns
    assert "\x1b" not in plain(written)


@pytest.mark.full
def test_a_live_page_ends_with_the_key_for_it(trained):
    import pty
    import signal

    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "mpi_ckpt", "watch", str(trained), "--every", "0.1"],
        env={**os.environ, "TERM": "xterm", "COLUMNS": "80"},
        stdin=subprocess.DEVNULL, stdout=theirs, stderr=theirs,
    )  # fmt: skip
    os.close(theirs)
    written = b""
    while written.count(b"next save") < 3:  # it is drawn again and again
        written += os.read(ours, 1 << 16)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=limit(30)) == 0
    os.close(ours)
    assert b"\x1b[?1049h" in written  # on a page of its own, which leaves no trace


def test_a_long_command_writes_lines_where_there_is_no_terminal(tmp_path, monkeypatch):
    monkeypatch.setattr(progress, "_LINE_SECONDS", 0.0)
    result = run("verify", fill(tmp_path / "c"))
    assert result.exit_code == 0
    assert re.search(r"checkpoint-00000003: \S+ \w+ of \S+ \w+, \S+ \w+/s", result.stderr)
    monkeypatch.setattr(progress, "_LINE_SECONDS", 30.0)
    assert run("verify", tmp_path / "c").stderr == ""
    assert json.loads(run("verify", tmp_path / "c", "--json").stdout)["good"]


def test_pages_are_made_without_any_event_of_a_kind(trained):
    record = RunRecord((HistoryEvent(event="fresh", time=1.0),))
    page = reporting.make_page(trained, record, [], {}, "")
    assert "<td>saves</td><td>0</td>" in page
