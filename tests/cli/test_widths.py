# SPDX-License-Identifier: Apache-2.0
"""Tables and lines in terminals of any width: no number cut, nothing lost unsaid."""

from __future__ import annotations

import re

import numpy as np
import pytest
from rich.cells import cell_len

from mpi_ckpt.cli.tables import Column, cut_middle, lay_out, wrap_words
from mpi_ckpt.states.arrays import ArrayState
from tests.cli.terminals import plain, shown_in_terminal
from tests.commands import run
from tests.making import publish

LEAF = "encoder.layers.{}.self_attention.output_projection.weight"
COLUMNS = [
    Column("name", names=True),
    Column("step", right=True, spare=1),
    Column("size", right=True, spare=3),
    Column("a metric of some length", right=True, foreign=True, spare=2),
    Column("state", states=True),
]
ROWS = [
    [LEAF.format(n), str(10**9 * (n + 1)), "123.4 MiB", "-1.2346e-07", "newest"]
    for n in range(4)
]


def drawn(width: int | None) -> tuple[list[str], tuple[str, ...]]:
    layout = lay_out(COLUMNS, ROWS, width)
    gap = " " * layout.gap
    return [gap.join(layout.cells(COLUMNS, row)) for row in ROWS], layout.left_out


@pytest.mark.parametrize("width", [*range(30, 140, 3), 200, 400])
def test_tables_fit_and_cut_no_number(width):
    lines, left_out = drawn(width)
    assert max(map(cell_len, lines)) <= width
    for line, row in zip(lines, ROWS, strict=True):
        for column, cell in zip(COLUMNS[1:], row[1:], strict=True):
            assert (cell in line) == (column.heading not in left_out)
    assert "state" not in left_out
    assert len({line.split(" ")[0] for line in lines}) == len(ROWS)  # still told apart


def test_the_least_needed_column_goes_first():
    gone = [drawn(width)[1] for width in range(140, 20, -1)]
    assert gone[0] == ()
    sets = list(dict.fromkeys(gone))
    assert sets == [
        (), ("size",), ("size", "a metric of some length"),
        ("step", "size", "a metric of some length"),
    ]  # fmt: skip


def test_nothing_is_cut_where_there_is_no_terminal():
    lines, left_out = drawn(None)
    assert left_out == ()
    assert lines == [line.rstrip() for line in lines]
    assert all(cell in line for line, row in zip(lines, ROWS, strict=True) for cell in row)


@pytest.mark.parametrize("text", ["a" * 50, "重" * 30, "ab重" * 12])
@pytest.mark.parametrize("width", range(1, 40))
def test_names_are_cut_in_their_middle_by_cells(text, width):
    for head in (0.15, 0.5, 0.85):
        shown = cut_middle(text, width, head)
        assert cell_len(shown) <= width
        if width >= 7:
            start, mark, end = shown.partition("…")
            assert mark
            assert text.startswith(start)
            assert text.endswith(end)


def test_lines_break_at_spaces_alone():
    text = (
        "  3 generations, 38.2 MiB on disk: /a/path/that/is/longer/than/the/line 12 of 34"
    )
    lines = wrap_words(text, 20)
    assert " ".join(line.strip() for line in lines) == text.strip()
    assert all(cell_len(line) <= 20 or " /a/path" in line for line in lines)
    assert wrap_words(text, None) == [text]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("wide") / "c"
    for number in (1, 2):
        leaves = {
            LEAF.format(n): np.full((512, n + 1), number, np.float32) for n in range(3)
        }
        metrics = {"loss": 0.123456 / number, "accuracy": 0.987654}
        publish(root, [ArrayState("net", leaves)], step=123456789 * number, metrics=metrics)
    return root


@pytest.mark.parametrize(
    ("command", "columns"),
    [("ls", 40), ("ls", 60), ("ls", 200), ("show", 40), ("show", 80), ("diff", 60)],
)
def test_commands_fit_into_terminals(root, command, columns):
    words = ["1", "2"] if command == "diff" else []
    code, written = shown_in_terminal([command, ".", *words], columns, root)
    text = re.sub(r"\x1b\[\?25[lh]|\x1b\[\d*[AK]|\r", "", plain(written))
    assert code == (1 if command == "diff" else 0)
    shown = [line for line in text.splitlines() if "comparing" not in line]
    assert max(map(cell_len, shown)) <= columns
    joined = " ".join(text.split())
    left_out = re.findall(r"columns? left out: (.*?); a wider terminal or --json", joined)
    whole = {"ls": 200, "show": 80, "diff": 80}[command]
    assert bool(left_out) == (columns < whole)
    if command == "ls" and "step" not in "".join(left_out):
        assert "123456789" in text
        assert "246913578" in text


def test_a_pipe_gets_everything(root, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    text = run("ls", root).stdout
    assert text.splitlines()[0].split() == [
        "generation", "step", "saved", "size", "shared", "ranks", "accuracy", "loss",
        "state",
    ]  # fmt: skip
    assert LEAF.format(2) in run("show", root).stdout


def test_dates_are_those_of_iso_8601_if_that_is_asked(root):
    date = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ")
    for command in ("ls", "show"):
        assert date.search(run(command, root, "--iso").stdout)
        assert date.search(run("--iso", command, root).stdout)
        assert not date.search(run(command, root).stdout)
        assert date.search(run(command, root, "--json").stdout)
