# SPDX-License-Identifier: Apache-2.0
"""The report is made from JSON lines, stands alone, and has every figure in it."""

import base64
import json
import re
from html.parser import HTMLParser

import pytest

pytest.importorskip("matplotlib")

from benchmarks import plot

pytestmark = pytest.mark.long

PNG = b"\x89PNG\r\n\x1a\n"
VOID = {"meta", "img", "source", "br"}


def line(case="save", contender="mpi_ckpt save", seconds=(1.0, 1.1, 1.4), **more):
    figure = {
        "case": case,
        "contender": contender,
        "ranks": 2,
        "nbytes": 1_200_000_000,
        "seconds": list(seconds),
        "ceiling": contender.startswith("raw"),
        "durable": True,
        "machine": {"cores": 2, "mpi": "Open MPI 5.0.11", "commit": "5705273"},
        "something": "newer",
        **more,
    }
    return json.dumps(figure)


def saves(ranks):
    slower = 1 + 0.05 * ranks
    return [
        line(contender="raw direct write", seconds=(0.57, 0.58, 0.66), ranks=ranks),
        line(contender="raw buffered write + fsync", seconds=(0.9, 0.95, 1), ranks=ranks),
        line(seconds=(0.6 * slower, 0.62 * slower, 0.8 * slower), ranks=ranks),
        line(contender="torch.save + fsync", seconds=(1.3, 1.4, 1.9), ranks=ranks),
        line(contender="torch DCP", seconds=(3.1, 3.4, 3.5), ranks=ranks, durable=False),
    ]


def sweep(contender, speed):
    return [
        line(
            "sync",
            contender,
            [size / speed + 4e-5, size / speed * 1.3 + 5e-5],
            group=f"bcast {size} bytes",
            nbytes=size,
            ranks=4,
            hosts=4,
        )
        for size in (1024 << shift for shift in range(0, 21, 2))
    ]


LINES = [
    *(figure for ranks in (1, 2, 4) for figure in saves(ranks)),
    *sweep("mpi_ckpt sync", 9e9),
    *sweep("raw Bcast", 6e9),
    *sweep("Horovod <broadcast>", 3e9),
    line("restore", "mpi_ckpt restore", [0.8]),
    line("memory", values={"peak_bytes_root": 64 << 20, "peak_bytes_others": 0}),
    "",
    json.dumps({"phase": "save", "rank": 0, "ranks": 2, "messages": 1}),
]


class Page(HTMLParser):
    """Notes what a page shows and asks for, and that its tags are closed."""

    def __init__(self, text):
        super().__init__()
        self.sources, self.cells, self.open = [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.sources += [v for k, v in attrs if k in ("src", "srcset", "href")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] in ("td", "th"):
            self.cells.append(data)


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    file = folder / "figures.jsonl"
    file.write_text("\n".join(LINES))
    plot.main([str(file), "--out", str(folder / "out")])
    return folder / "out"


def test_each_group_has_a_figure(report):
    names = {path.name for path in report.iterdir()}
    assert names == {
        "save.png", "save-over-ranks.png", "sync-bcast-over-sizes.png", "restore.png",
        "memory.png", "report.html",
    }  # fmt: skip
    for path in report.glob("*.png"):
        assert path.read_bytes().startswith(PNG)


def test_the_report_stands_alone(report):
    text = (report / "report.html").read_text()
    page = Page(text)
    assert page.open == []
    outside = [s for s in page.sources if not s.startswith(("data:image/png;base64,", "#"))]
    assert outside == []
    assert not re.search(r"url\(|@import|<script|<link", text)
    images = [s.partition(",")[2] for s in page.sources if s.startswith("data:")]
    assert len(images) == 2 * 5  # for a light page and for a dark one
    assert all(base64.b64decode(image).startswith(PNG) for image in images)
    assert "prefers-color-scheme: dark" in text


def test_the_report_has_the_numbers_and_the_machine(report):
    text = (report / "report.html").read_text()
    cells = Page(text).cells
    assert {"raw direct write", "torch DCP", "Horovod <broadcast>"} <= set(cells)
    assert "0.58" in cells  # its median
    assert "<broadcast>" not in text
    assert "5705273" in text
    assert "Open MPI 5.0.11" in text


def test_the_later_of_two_lines_counts():
    figures = plot.read_newest([line(seconds=[1]), line(seconds=[2]), line(seconds=[])])
    assert [figure.median for figure in figures] == [2]


def test_a_file_without_figures_is_refused(tmp_path, capsys):
    (tmp_path / "none.jsonl").write_text('{"phase": "save"}\n')
    with pytest.raises(SystemExit):
        plot.main([str(tmp_path / "none.jsonl"), "--out", str(tmp_path / "out")])
    assert "no figure" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
