# SPDX-License-Identifier: Apache-2.0
"""The benchmarks run, so that none rots."""

import json

import pytest

from benchmarks import start, targets
from benchmarks.cases import CASES
from benchmarks.harness import read_figures
from tests.launch import run_job

pytestmark = pytest.mark.long

# Without these, which bring torch's modules in, three ranks are quick.
LIGHT = ["sync", "reuse", "writers", "small", "plan", "observing"]


def run_smoke(ranks, cases, directory):
    lines = directory / "figures.jsonl"
    command = ["-m", "benchmarks", *cases, "--smoke", "--directory", str(directory)]
    job = run_job(ranks, [*command, "--json", str(lines)], timeout=280)
    assert job.code == 0, job.text
    return job, read_figures(lines.read_text().splitlines())


@pytest.fixture(scope="module")
def everything(tmp_path_factory):
    return run_smoke(2, [], tmp_path_factory.mktemp("figures"))


def test_every_case_runs(everything):
    _, figures = everything
    assert {figure.case for figure in figures} == set(CASES)
    groups = {(figure.case, figure.group) for figure in figures}
    for key in groups:
        assert any(
            figure.ceiling for figure in figures if (figure.case, figure.group) == key
        ), key
    assert all(figure.ranks == 2 and figure.hosts == 1 for figure in figures)
    assert all(figure.median > 0 for figure in figures)
    assert len({figure.run for figure in figures}) == 1
    assert all(figure.machine["file_system"] for figure in figures)


def test_every_target_finds_its_figures(everything):
    _, figures = everything
    peers = ("torchsnapshot", "adaptdl", "Horovod", "safetensors")
    for result in targets.evaluate(figures):
        target = result.target
        elsewhere = target.several_hosts or target.ranks not in (None, 2)
        may_lack = elsewhere or any(peer in target.name for peer in peers)
        if not may_lack and "overlapped" not in target.name:
            assert result.measured is not None, target.name


def test_absent_peers_are_named_once(everything):
    job, figures = everything
    for peer in ("torchsnapshot", "adaptdl", "Horovod", "TensorStore"):
        measured = any(figure.contender.startswith(peer) for figure in figures)
        assert job.out.count(f"{peer} is skipped") == (0 if measured else 1)


def test_nothing_is_left_behind(everything, tmp_path):
    run_smoke(3, LIGHT, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["figures.jsonl"]


def test_the_start_of_a_job_is_measured(tmp_path, capsys):
    start.main(["--smoke", "--directory", str(tmp_path), "--json", str(tmp_path / "lines")])
    (line,) = map(json.loads, (tmp_path / "lines").read_text().splitlines())
    (taken,) = line["taken"]
    assert all(taken[phase] > 0 for phase in start.PHASES)
    assert taken["all"] == pytest.approx(sum(taken[phase] for phase in start.PHASES))
    assert "restore" in capsys.readouterr().out


def test_targets_are_printed(tmp_path, capsys, everything):
    _, figures = everything
    lines = tmp_path / "figures.jsonl"
    lines.write_text("".join(f"{figure.to_json()}\n" for figure in figures))
    targets.main(["--markdown", str(lines)])
    table = capsys.readouterr().out.splitlines()
    assert len(table) == 2 + len(targets.TARGETS)
