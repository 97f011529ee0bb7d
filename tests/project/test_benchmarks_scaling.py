# SPDX-License-Identifier: Apache-2.0
"""What grows with the ranks: the arithmetic, and that counting finds what there is."""

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("rich")

from benchmarks import scaling
from benchmarks.growth import (
    KNOWN,
    MEASURED,
    Cluster,
    Growth,
    Key,
    explain,
    fit,
    fit_all,
    fit_tree,
    grown,
    human_bytes,
    human_seconds,
    rounds,
    seconds,
    walls,
)
from tests.launch import run_job

SIZES = (1, 2, 4, 8, 16)
# What a rank that is not root sends and receives, in messages: a tree.
CUT_PHASES = {
    "save, cut": Growth(0, 0, 3),
    "save, cut as before": Growth(0, 0, 1),
    "restore, same boxes": Growth(0, 0, 3),
    "restore, moved boxes": Growth(2, 0, 3),
}


def line(ranks, rank, phase="save", **counts):
    return {"ranks": ranks, "rank": rank, "phase": phase, **counts}


@given(base=st.integers(0, 10**6), slope=st.one_of(st.just(0), st.integers(1, 10**5)))
def test_a_straight_line_is_found(base, slope):
    found = fit({ranks: base + slope * ranks for ranks in SIZES})
    assert found.per_rank == pytest.approx(slope)
    assert found.at(1000) == pytest.approx(base + 1000 * slope)


def test_one_rank_alone_tells_nothing_of_growth():
    assert fit({1: 2, 2: 10, 4: 10, 8: 10, 16: 10}) == Growth(10, 0)
    assert fit({1: 7}) == Growth(7, 0)
    assert fit({1: 0, 4: 7}) == Growth(7, 0)


def test_a_tree_beside_a_line_is_found():
    counts = {ranks: 2 * (ranks - 1) + math.log2(ranks) for ranks in (2, 4, 8, 16)}
    assert fit(counts) == Growth(-2, 2, 1)


def test_a_tree_adds_as_much_at_each_doubling():
    tree = {1: 0, 2: 11, 4: 25, 8: 37}
    assert fit_tree(tree) == fit(tree)
    assert (fit_tree(tree).per_rank, fit_tree(tree).per_doubling) == (0, 12)
    assert fit_tree(tree).at(16) == 49


@given(base=st.integers(0, 50), each=st.integers(1, 9), doubling=st.integers(0, 20))
def test_all_pairs_within_a_tree_are_found(base, each, doubling):
    counts = {n: base + each * n + doubling * math.log2(n) for n in (2, 4, 8)}
    found = fit_tree(counts)
    assert (found.per_rank, found.per_doubling) == (each, doubling)


def test_texts_may_differ_by_some_bytes():
    assert fit({2: 630, 4: 625, 8: 629, 16: 641}, slack=128).per_rank == 0
    assert fit({2: 630, 4: 694, 8: 822, 16: 1078}, slack=128).per_rank == pytest.approx(32)


def test_counts_are_the_most_of_root_and_of_any_other():
    lines = [line(4, rank, messages=rank, mpi_bytes=100) for rank in range(4)]
    counted = grown([*lines, line(4, 0, messages=9)])
    assert counted[Key("save", "messages", "root")] == {4: 9}
    assert counted[Key("save", "messages", "others")] == {4: 3}
    assert counted[Key("save", "mpi_bytes", "others")] == {4: 100}


def test_a_tree_is_as_deep_as_its_logarithm():
    assert [rounds(n) for n in (1, 2, 3, 4, 5, 16, 17, 100_000)] == [
        0,
        1,
        2,
        2,
        3,
        4,
        5,
        17,
    ]


def test_what_does_not_grow_costs_only_the_depth_of_the_trees():
    cluster = Cluster(latency=1e-6)
    growths = {Key("step", "collectives", "others"): Growth(3, 0)}
    for ranks in (2, 16, 100_000):
        expected = 3 * math.ceil(math.log2(ranks)) * 1e-6
        assert seconds("step", growths, ranks, cluster) == pytest.approx(expected)


def test_the_state_is_moved_once_for_any_number_of_ranks():
    cluster = Cluster(state=3e9, bandwidth=1e9, disk=0.5e9)
    for ranks in (2, 100_000):
        assert seconds("save", MEASURED, ranks, cluster) == pytest.approx(6, rel=0.02)


@given(st.integers(2, 10**6), st.sampled_from([1e6, 1e8, 1e9, 1e11]))
def test_a_broadcast_takes_one_hop_and_at_most_twice_as_long(ranks, state):
    cluster = Cluster(state=state, bandwidth=1e9, message=0, latency=0, disk=1e12)
    spent = seconds("sync, all differ", {}, ranks, cluster)
    assert state / 1e9 <= spent * 1.0001
    assert spent <= 2 * state / 1e9 * 1.0001


def test_walls_stand_where_growth_exceeds_what_is_tolerable():
    cluster = Cluster(message=1e-3, tolerable=1, imports=0.001)
    growths = {
        Key("save", "messages", "root"): Growth(-1, 1),
        Key("save", "mpi_bytes", "others"): Growth(0, 2**20),
        Key("save", "collectives", "root"): Growth(8, 0),
    }
    found = {(wall.where, wall.ranks) for wall in walls(growths, cluster, 10_000)}
    assert ("save: messages of root", 1000) in found
    assert ("save: MPI bytes of others", 64) in found  # 64 MiB held at once
    assert not any("collectives" in where for where, _ in found)


def test_walls_are_in_order_and_none_is_beyond_what_was_asked_for():
    found = walls(MEASURED, Cluster(), 100_000)
    assert [wall.ranks for wall in found] == sorted(wall.ranks for wall in found)
    assert found
    assert walls(MEASURED, Cluster(), 10) == []


def test_all_growth_built_in_is_explained():
    growing = [key for key, growth in MEASURED.items() if growth.per_rank > 0]
    assert [key for key in growing if explain(key) is None] == []
    assert {explain(key) for key in growing} == set(KNOWN)


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0 us"), (2e-5, "20 us"), (0.0153, "15.3 ms"), (6000, "6,000 s")],
)
def test_seconds_are_readable(value, text):
    assert human_seconds(value) == text


def test_bytes_are_readable():
    assert [human_bytes(x) for x in (5, 2048, 64 << 20)] == ["5 B", "2 KiB", "64 MiB"]


def test_check_tells_of_growth_that_nobody_knew(tmp_path, capsys):
    file = tmp_path / "counts.jsonl"
    lines = [line(ranks, 0, messages=ranks) for ranks in SIZES]
    file.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    with pytest.raises(SystemExit) as left:
        scaling.main(["check", str(file), "--width", "120"])
    assert left.value.code == 1
    assert "news: save: messages of root" in capsys.readouterr().out
    file.write_text('{"case": "save"}\n')
    with pytest.raises(SystemExit) as left:
        scaling.main(["check", str(file)])
    assert left.value.code == 2


def test_model_prints_the_first_wall(capsys):
    scaling.main(["model", "--ranks", "100", "100000", "--width", "180"])
    out = capsys.readouterr().out
    assert "The library's first wall: save, cut as before: removals of root" in out
    assert "restore, same boxes: file operations of root" not in out
    assert "save, random streams: MPI bytes of root" in out
    # Each rank is sent its own alone, through a window on root.
    assert "restore, random streams: MPI bytes" not in out
    # Messages go up and down a tree.
    assert "save, cut: messages of root" not in out
    assert "one rank fails" not in out[out.index("walls up to") :]
    scaling.main(["model", "--ranks", "100", "--width", "140"])
    assert "No wall of the library up to 100 ranks" in capsys.readouterr().out


@pytest.mark.long
def test_counting_runs_with_one_size_only(tmp_path):
    file = tmp_path / "counts.jsonl"
    words = ["-m", "benchmarks", "scaling", "measure", "--smoke", "--json", str(file)]
    job = run_job(2, words)
    assert job.code == 0, job.text
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert {(line["ranks"], line["rank"]) for line in lines} == {(2, 0), (2, 1)}


@pytest.mark.long
def test_counting_finds_what_is_built_in(tmp_path, capsys):
    file = tmp_path / "counts.jsonl"
    job = run_job(8, ["-m", "benchmarks.scaling", "measure", "--json", str(file)])
    assert job.code == 0, job.text
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert {line["ranks"] for line in lines} == {1, 2, 4, 8}
    counted = fit_all(lines)
    growing = {key for key, growth in counted.items() if growth.per_rank > 0}
    assert growing == {key for key, growth in MEASURED.items() if growth.per_rank > 0}
    # Nobody but root touches the file system in a save by root.
    assert counted[Key("save", "file_operations", "others")] == Growth(0, 0)
    assert counted[Key("save", "file_operations", "root")].base > 0
    # Of cut state a rank that is not root writes and reads as much with any number of
    # ranks, and sends and receives a few messages for each doubling: with moved boxes one
    # more each way than with the same. Only what it passes on for its neighbours grows.
    for phase in CUT_PHASES:
        of_others = {key: counted[key] for key in counted if key[::2] == (phase, "others")}
        growing = {key for key, growth in of_others.items() if growth.per_rank}
        assert growing == {Key(phase, "mpi_bytes", "others")}
        assert counted[Key(phase, "messages", "others")] == CUT_PHASES[phase]
    with pytest.raises(SystemExit) as left:
        scaling.main(["check", str(file), "--width", "120"])
    assert left.value.code == 0, capsys.readouterr().out
