# SPDX-License-Identifier: Apache-2.0
"""The parts of the benchmarks that only compute."""

import math
import os
import time

import numpy as np
import pytest

from benchmarks import names, targets
from benchmarks.cases import plan
from benchmarks.cases.reuse import near_share
from benchmarks.cases.sync import sweep_sizes
from benchmarks.ceilings import fsync_tree, read_direct, write_buffered, write_direct
from benchmarks.cut import CutArrays, whole_side
from benchmarks.harness import (
    Contender,
    Figure,
    Group,
    file_system,
    measure,
    read_figures,
)
from benchmarks.peak import PeakMemory
from benchmarks.run import parse_arguments, parse_size
from benchmarks.setting import Arguments, Setting
from benchmarks.table import best_ceiling, describe_bytes, describe_values
from benchmarks.workload import MODELS, adam_state, model_shapes, scaled, tensor_sizes
from mpi_ckpt.decomposition import tiling

RAW_WRITE = names.raw_with(names.RAW_WRITE, *names.RAW_SHAPES[-1])


def figure(contender, seconds=1.0, **given):
    given = {"case": "save", "ranks": 2, "nbytes": 1000, **given}
    return Figure(contender=contender, seconds=(seconds,), **given)


def target(name):
    (found,) = (target for target in targets.TARGETS if target.name == name)
    return found


def evaluate_one(name, figures):
    (result,) = targets.evaluate(figures, [target(name)])
    return result


class OneRank:
    """What `measure` asks of a communicator, without MPI."""

    rank, size = 0, 1

    def Barrier(self):
        pass

    def allgather(self, value):
        return [value]


class TestMeasure:
    def measure(self, contenders, **given):
        group = Group("some", 10, contenders)
        return measure(OneRank(), "case", group, idle_seconds=0.001, **given)

    def test_takes_turns_and_leaves_out_the_warm_up(self):
        done = []
        contenders = [
            Contender(
                name,
                lambda name=name: done.append(name),
                before=lambda name=name: done.append(f"before {name}"),
                after=lambda _, name=name: done.append(f"after {name}"),
            )
            for name in "ab"
        ]
        figures = self.measure(contenders, repeats=2)
        a, b = ["before a", "a", "after a"], ["before b", "b", "after b"]
        assert done == [*a, *b, *b, *a, *a, *b]
        assert [len(measured.seconds) for measured in figures] == [2, 2]

    def test_notes_the_median_of_what_the_runs_say(self):
        returned = iter([100, 1, 9, 5])
        contender = Contender(
            "a", lambda: next(returned), values=lambda result: {"bytes": result}
        )
        (only,) = self.measure([contender], repeats=3)
        assert only.values == {"bytes": 5}

    def test_after_hears_what_the_run_returned(self):
        heard = []
        self.measure([Contender("a", lambda: 7, after=heard.append)], repeats=1)
        assert heard == [7, 7]


class TestFigure:
    def test_survives_a_json_line(self):
        original = figure(
            "a", group="g", values={"x": 1.0}, hosts=2, run="now", ceiling=True
        )
        (same,) = read_figures([original.to_json(), ""])
        assert same.to_json() == original.to_json()

    def test_older_and_newer_lines_are_read(self):
        line = '{"case": "save", "contender": "a", "ranks": 1, "nbytes": 1, "seconds": [1]}'
        assert Figure.from_json(line).hosts == 1
        assert Figure.from_json(line.replace("{", '{"unheard of": 1, ')).median == 1


class TestRawLimits:
    def test_the_fastest_shape_is_found_and_named(self, monkeypatch, tmp_path):
        clock = [0.0]
        monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
        setting = Setting(OneRank(), tmp_path, {}, Arguments())
        done = []

        def transfer(mebibytes, depth):
            def run():
                clock[0] += 1.0 if (mebibytes, depth) == (4, 4) else 1.1
                return mebibytes

            return Contender("raw", run, after=done.append)

        limit = setting.fastest("raw", transfer)
        assert limit.name == "raw, 4 x 4 MiB"
        assert limit.ceiling
        assert limit.run() == 4
        # Each shape as often, and each is cleared away.
        assert {done.count(size) for size in (4, 8)} == {3}


class TestFileSystem:
    @pytest.mark.parametrize(
        ("path", "kind"), [("/", "ext4"), ("/a", "ext4"), ("/a b/c", "nfs"), ("/x", "xfs")]
    )
    def test_is_that_of_the_nearest_mount(self, tmp_path, path, kind):
        mounts = tmp_path / "mounts"
        mounts.write_text(
            "/dev/a / ext4 rw 0 0\nh:/b /a\\040b nfs rw 0 0\n"
            "tmpfs /x tmpfs rw 0 0\n/dev/c /x xfs rw 0 0\n"
        )
        assert file_system(type(tmp_path)(path), mounts) == kind

    def test_is_told_of_a_real_directory(self, tmp_path):
        assert file_system(tmp_path)
        assert file_system(tmp_path, tmp_path / "absent") == ""


class TestTargets:
    def test_a_lower_bound(self):
        name = "save: best raw direct write / ours"
        for ours, verdict in ((1.0, "met"), (1.2, "missed")):
            result = evaluate_one(name, [figure(RAW_WRITE), figure(names.SAVE, ours)])
            assert (result.verdict, result.ranks) == (verdict, 2)
            assert result.measured == pytest.approx(1 / ours)

    def test_an_upper_bound(self):
        figures = [
            figure(names.MEMCPY, case="stall"),
            figure(names.STALL, 1.1, case="stall"),
            figure(names.STALL_SYNC, 2.0, case="stall"),
        ]
        assert evaluate_one("stall: ours / memcpy", figures).verdict == "met"
        name = "stall with agreement over all ranks: ours / memcpy"
        assert evaluate_one(name, figures).verdict == "missed"

    def test_nothing_measured(self):
        for result in targets.evaluate([]):
            assert result.verdict == "not measured"
            assert result.cells()[1:3] == ("", "")

    def test_a_row_for_each_number_of_ranks(self):
        figures = [
            figure(name, ranks=ranks)
            for ranks in (4, 2)
            for name in (RAW_WRITE, names.SAVE)
        ]
        results = targets.evaluate(figures, [target("save: best raw direct write / ours")])
        assert [result.ranks for result in results] == [2, 4]

    def test_only_figures_of_one_run_are_compared(self):
        figures = [
            figure(RAW_WRITE, 5.0, run="1"),
            figure(names.SAVE, 1.0, run="1"),
            figure(RAW_WRITE, 1.0, run="2"),
            figure(names.SAVE, 2.0, run="2"),
        ]
        assert evaluate_one("save: best raw direct write / ours", figures).measured == 0.5
        # The last run lacks one of the two: it does not borrow from the one before.
        result = evaluate_one("save: best raw direct write / ours", figures[:3])
        assert result.verdict == "not measured"

    def test_hosts_are_told_from_ranks_on_one_host(self):
        group = {"case": "sync", "group": "all differ"}
        figures = [
            figure(names.BCAST, 3.0, **group),
            figure(names.IBCAST, 2.0, **group),
            figure(names.SYNC, 1.6, **group),
        ]
        many = [
            figure(names.BCAST, 3.0, hosts=4, ranks=4, **group),
            figure(names.ONE_HOP, 1.0, hosts=4, ranks=4, **group),
            figure(names.SYNC, 1.25, hosts=4, ranks=4, **group),
        ]
        better = "sync, all differ: better of Bcast and Ibcast / ours"
        assert evaluate_one(better, figures + many).measured == pytest.approx(2.0 / 1.6)
        hop = evaluate_one("sync, all differ, hosts: one hop / ours", figures + many)
        assert (hop.measured, hop.verdict) == (0.8, "missed")
        assert hop.cells()[1] == "4 on 4 hosts"
        bcast = evaluate_one("sync, all differ, hosts: Bcast / ours", figures + many)
        assert bcast.measured == pytest.approx(2.4)
        assert (
            evaluate_one("sync, all differ, hosts: Bcast / ours", figures).measured is None
        )

    def test_groups_of_a_case_are_not_mixed(self):
        figures = [
            figure(names.SYNC, 9.0, case="sync", group="bcast 1024 bytes"),
            figure(names.HOROVOD_SYNC, 4.0, case="sync", group="equal"),
            figure(names.SYNC, 1.0, case="sync", group="equal", values={"bytes_sent": 0}),
            figure(names.SYNC, 9.0, case="sync", group="all differ"),
        ]
        assert evaluate_one("sync, equal: Horovod / ours", figures).measured == 4.0
        assert evaluate_one("sync, equal: tensor bytes sent", figures).verdict == "met"

    def test_bytes(self):
        values = {"bytes_written": 14}
        part = [figure(names.REUSE_PART, case="reuse", values=values)]
        name = "second save, 1% changed: bytes written / all bytes"
        assert evaluate_one(name, part).measured == 0.014
        read = figure(names.RESTORE, case="restore", values={"bytes_read": 4000}, ranks=4)
        name = "restore: bytes read / bytes of the state"
        assert evaluate_one(name, [read]).verdict == "missed"

    def test_memory(self):
        state = 1 << 30
        peaks = {"peak_bytes_root": state + (100 << 20), "peak_bytes_others": 1 << 20}
        given = {"case": "memory", "nbytes": state, "values": peaks}
        beyond = "peak memory: asynchronous save beyond the state, root"
        assert evaluate_one(beyond, [figure(names.SAVE_ASYNC, **given)]).measured == 100
        root = "peak memory: blocking save, root"
        result = evaluate_one(root, [figure(names.SAVE, **given)])
        assert result.verdict == "missed"
        assert result.cells()[2].endswith("MiB")
        alone = [figure(names.SAVE, **{**given, "ranks": 1})]
        assert evaluate_one("peak memory: blocking save, other ranks", alone).ranks == 0

    def test_cut_arrays(self):
        group = {"case": "distributed", "group": "restore, same boxes"}
        raw = [names.raw_with(names.RAW_OWN_READ, *shape) for shape in names.RAW_SHAPES]
        values = {"bytes_read": 1000, "bytes_sent": 8}
        figures = [
            *(figure(name, 6.0 - n, **group) for n, name in enumerate(raw)),
            figure(names.RESTORE_SAME, 2.5, values=values, **group),
            figure(names.load(names.DCP), 3.0, **group),
        ]
        title = "cut arrays, restore, same boxes"
        # The fastest of the raw reads counts.
        best = evaluate_one(f"{title}: best raw direct read / ours", figures)
        assert (best.measured, best.verdict) == (0.8, "missed")
        assert evaluate_one(f"{title}: torch DCP / ours", figures).measured == 1.2
        assert evaluate_one(f"{title}: bytes read / saved", figures).verdict == "met"
        assert evaluate_one(f"{title}: bytes of tiles sent", figures).verdict == "missed"
        peaks = {"peak_bytes_root": 1 << 20, "peak_bytes_others": 129 << 20}
        watched = {"case": "distributed", "group": "peak", "values": peaks}
        name = "cut arrays, peak memory of any rank: save"
        result = evaluate_one(name, [figure(names.SAVE_CUT, **watched)])
        assert (result.measured, result.verdict) == (129, "missed")

    def test_nothing_is_cut_over_one_rank(self):
        group = {"case": "distributed", "group": "save", "ranks": 1}
        pair = [figure(names.SAVE_CUT, **group), figure("torch DCP + fsync", **group)]
        name = "cut arrays, save: torch DCP + fsync / ours"
        assert evaluate_one(name, pair).verdict == "not measured"

    def test_many_small_leaves(self):
        group = {"case": "small", "group": "save"}
        figures = [figure(names.ONE_LEAF, **group), figure(names.MANY_LEAVES, 3.0, **group)]
        result = evaluate_one("small leaves, save: many / one", figures)
        assert (result.measured, result.verdict) == (3.0, "missed")

    def test_tables(self):
        results = targets.evaluate([figure(RAW_WRITE), figure(names.SAVE, 2.0)])
        lines = targets.to_markdown(results).splitlines()
        assert (
            "| save: best raw direct write / ours | 2 | 0.5 | >= 0.95 | missed |" in lines
        )
        assert targets.to_table(results).row_count == len(targets.TARGETS)

    def test_names_are_unique(self):
        assert len({target.name for target in targets.TARGETS}) == len(targets.TARGETS)


class TestWorkload:
    @pytest.mark.parametrize(
        ("model", "tensors", "millions"),
        [
            ("adam100m", 50, 100),
            ("resnet50", 161, 25.557),
            ("bert-base", 199, 109.5),
            ("gpt2", 148, 124.4),
            ("llama-7b", 291, 6738),
        ],
    )
    def test_models_have_their_sizes(self, model, tensors, millions):
        shapes = model_shapes(model)
        assert len(shapes) == tensors
        assert sum(map(math.prod, shapes)) == pytest.approx(millions * 1e6, rel=1e-3)

    @pytest.mark.parametrize("model", MODELS)
    def test_shapes_scale(self, model):
        nbytes = 12 * sum(map(math.prod, model_shapes(model, 6.0)))
        assert nbytes == pytest.approx(6e6, rel=0.05)

    def test_kernels_keep_their_size(self):
        assert scaled((64, 16, 3, 3), 0.25) == (32, 8, 3, 3)
        assert scaled((10,), 1e-9) == (1,)

    def test_the_state_is_equal_on_all_ranks(self):
        first, other = (adam_state([(3, 2), (5,)]) for _ in range(2))
        assert len(first) == 6
        assert all(np.array_equal(first[name], other[name]) for name in first)

    def test_sizes_are_all_there(self):
        assert sum(tensor_sizes(100_003)) == 100_003


class TestCutArrays:
    @pytest.mark.parametrize("dims", [(1, 1), (4, 1), (1, 4), (2, 2)])
    def test_the_boxes_make_the_same_whole_for_any_grid(self, dims):
        whole = CutArrays.make(0, (1, 1), 12)
        for rank in range(math.prod(dims)):
            cut = CutArrays.make(rank, dims, 12)
            for name, array in cut.arrays.items():
                assert np.array_equal(array, whole.arrays[name][cut.box])
        assert len({array.tobytes() for array in whole.arrays.values()}) == 4

    def test_boxes_that_do_not_fit_the_ranks_are_uneven(self):
        cuts = [CutArrays.make(rank, (1, 3), 8) for rank in range(3)]
        assert [cut.columns for cut in cuts] == [(0, 2), (2, 5), (5, 8)]

    def test_every_rank_divides_the_side(self):
        side = whole_side(1_200_000_000, 4)
        assert side % 4 == 0
        assert CutArrays(side, (1, 1), (0, 0), (0, 0), {}).nbytes == pytest.approx(
            1.2e9, rel=1e-3
        )
        assert whole_side(1, 4) == 4

    def test_other_contents_are_found(self):
        cut = CutArrays.make(0, (1, 1), 8)
        cut.check(OneRank(), "somebody")
        cut.clear()
        with pytest.raises(RuntimeError, match=r"somebody brought other bytes .* \[0\]"):
            cut.check(OneRank(), "somebody")
        cut.fill()
        cut.check(OneRank(), "somebody")


class TestPlanCase:
    def test_every_leaf_is_tiled_there_and_here(self):
        for cuts in (plan.large_leaves(3), plan.small_leaves(40)):
            for boxes, ranks in ((cuts.saved, cuts.writers), (cuts.wanted, cuts.ranks)):
                assert {rank for _, rank, _ in boxes} <= set(range(ranks))
                for leaf, shape in enumerate(cuts.shapes):
                    of_leaf = [box for number, _, box in boxes if number == leaf]
                    assert tiling.fault(shape, of_leaf) is None

    def test_a_box_of_one_rank_reaches_others(self):
        large, small = plan.large_leaves(2), plan.small_leaves(10)
        assert (len(large.saved), len(large.wanted)) == (128, 96)
        assert (len(small.saved), len(small.wanted)) == (50, 40)


class TestPieces:
    def test_sweep_sizes(self):
        assert sweep_sizes(64 << 10) == [1 << 10, 16 << 10, 64 << 10]
        assert sweep_sizes(1 << 10) == [1 << 10]
        assert sweep_sizes(4 << 30)[-2:] == [1 << 30, 4 << 30]

    def test_near_share_takes_whole_leaves(self):
        state = {
            name: np.zeros(n, np.uint8) for name, n in (("a", 985), ("b", 9), ("c", 6))
        }
        assert near_share(state, 0.01) == ["b"]
        assert near_share(state, 1.0) == ["a", "b", "c"]

    def test_sizes_and_options_are_read(self):
        assert [parse_size(text) for text in ("7", "1KiB", "2MiB", "4GiB")] == [
            7,
            1 << 10,
            2 << 20,
            4 << 30,
        ]
        given = parse_arguments(["sync", "save", "--sweep", "--largest", "4GiB"])
        assert (given.cases, given.sweep, given.largest) == (
            ["sync", "save"],
            True,
            4 << 30,
        )
        assert parse_arguments(["--smoke"]).megabytes == 1
        with pytest.raises(SystemExit):
            parse_arguments(["nonsense"])

    def test_best_ceiling(self):
        raw = [figure("a", 2.0, ceiling=True), figure("b", 1.5, ceiling=True)]
        assert best_ceiling([*raw, figure("c", 1.0)]) == 1.5
        assert best_ceiling([figure("c")]) is None

    def test_values_in_words(self):
        values = {"bytes_written": 1.5e6, "sync_seconds": 1.0, "peak_bytes_root": 12.0}
        assert describe_values(values) == "written 1.5 MB, peak bytes root 12 B"
        assert describe_values({"cpu_seconds": 0.25}) == "processor 0.25 s"
        assert describe_bytes(2e9) == "2 GB"

    @pytest.mark.parametrize("nbytes", [0, 1, 8192, 100_001])
    @pytest.mark.parametrize("depth", [1, 2, 3])
    def test_raw_transfers_reach_every_byte(self, tmp_path, monkeypatch, nbytes, depth):
        file, shape = tmp_path / "raw", {"block_bytes": 8192, "depth": depth}
        monkeypatch.setattr(os, "O_DIRECT", 0)  # lengths of any alignment
        read, sizes = os.preadv, []
        monkeypatch.setattr(
            os, "preadv", lambda *given: sizes.append(read(*given)) or sizes[-1]
        )
        write_direct(file, nbytes or 1, **shape)
        os.truncate(file, nbytes)
        read_direct(file, **shape)
        assert sum(sizes) == nbytes

    def test_what_was_written_can_be_made_durable(self, tmp_path):
        inner = tmp_path / "saved" / "inner"
        inner.mkdir(parents=True)
        write_buffered(inner / "file", [np.arange(5), np.ones((2, 3))])
        assert (inner / "file").stat().st_size == 5 * 8 + 6 * 8
        fsync_tree(tmp_path / "saved")
        fsync_tree(inner / "file")

    @pytest.mark.long
    @pytest.mark.parametrize("resettable", [True, False])
    def test_peak_memory(self, monkeypatch, resettable):
        if not resettable:
            monkeypatch.setattr("benchmarks.peak._reset", lambda: False)
        peak = PeakMemory()
        peak.start()
        held = np.ones(64 << 20, np.uint8)
        held += 1
        # Where the kernel keeps no peak a thread looks now and then.
        while peak._watcher is not None and peak._highest - peak._before < 48 << 20:
            time.sleep(0.001)
        del held
        assert peak.stop() > 48 << 20
        peak.start()
        assert peak.stop() < 48 << 20
