# SPDX-License-Identifier: Apache-2.0
"""The command line on arrays that were cut over ranks: ls, verify, diff, export, show."""

from __future__ import annotations

import io
import sys

import numpy as np
import pytest
from safetensors.numpy import load_file

import mpi_ckpt
from mpi_ckpt.cli.convert import exporting
from mpi_ckpt.cli.inspect import changes
from mpi_ckpt.decomposition.boxes import Box
from mpi_ckpt.errors import CorruptGenerationError
from tests.commands import ask, flip, run
from tests.cutting import CutArray, write_cut

HALVES = [[Box((0, 0), (6, 5))], [Box((0, 5), (6, 5))]]
TOP_AND_BOTTOM = [[Box((0, 0), (4, 10))], [Box((4, 0), (2, 10))]]


def arrays_of(step: float, boxes=HALVES) -> dict[str, CutArray]:
    rho = np.arange(60.0).reshape(6, 10)
    rho[2, 7] += step
    return {
        "rho": CutArray(rho, boxes),
        "ids": CutArray.by_rows(np.arange(7), [3, 4]),
        "words": CutArray.by_rows(np.array(["a", "b"]), [1, 1]),
        "one": CutArray(np.array(7, np.int16), [[], [Box((), ())]]),
        "none": CutArray.by_rows(np.empty((0, 3), np.float32), [0, 0]),
    }


def fields(root, number: int = 1, step: float = 0, boxes=HALVES, **others):
    """Write a generation with five cut leaves and one that is whole."""
    whole = {"time": np.array([0.5, 1.5])}
    arrays = arrays_of(step, boxes)
    return write_cut(root, arrays, generation=number, whole=whole, block_bytes=64, **others)


def test_ls_counts_the_bytes_of_files_of_tiles(tmp_path):
    path = fields(tmp_path / "c")
    (row,) = ask("ls", tmp_path / "c")["generations"]
    assert row["state"] == "newest"
    assert row["bytes"] == sum(file.stat().st_size for file in path.iterdir())
    assert row["ranks"] == 2


def test_verify_proves_tiles_and_names_those_that_are_wrong(tmp_path):
    path = fields(tmp_path / "c")
    (good,) = ask("verify", tmp_path / "c")["generations"]
    assert good["state"] == "good"
    arrays = [one.array for one in arrays_of(0).values()]
    assert good["bytes"] == 16 + sum(array.nbytes for array in arrays)
    flip(path / "tiles-00001.safetensors", 4096 + 70)
    (bad,) = ask("verify", tmp_path / "c", code=1)["generations"]
    assert bad["state"] == "damaged"
    (problem,) = bad["problems"]
    assert problem["leaf"] == "fields/rho [0:6, 5:10]"
    assert "tiles-00001.safetensors: bytes 4160 to 4224" in problem["message"]
    with (
        mpi_ckpt.load(tmp_path / "c") as saved,
        pytest.raises(CorruptGenerationError, match="tiles-00001"),
    ):
        saved.verify()


def test_verify_reports_tiles_that_do_not_make_up_their_leaf(tmp_path):
    boxes = [[Box((0, 0), (2, 3))], [Box((3, 0), (1, 3))]]
    write_cut(tmp_path / "c", {"x": CutArray(np.ones((4, 3)), boxes)})
    (verdict,) = ask("verify", tmp_path / "c", code=1)["generations"]
    (problem,) = verdict["problems"]
    assert problem["leaf"] is None
    assert "state 'fields', leaf 'x': no rank holds [2:3, 0:3]" in problem["message"]


def test_diff_of_leaves_cut_alike_compares_digests(tmp_path, monkeypatch):
    root = tmp_path / "c"
    fields(root, 1)
    fields(root, 2)
    monkeypatch.setattr(changes, "read_box", None)  # nothing needs the content
    answer = ask("diff", root, "1", "2")
    assert answer["same"]
    assert answer["equal"] == 6
    fields(root, 3, step=2.5)
    (change,) = ask("diff", root, "1", "3", code=1)["leaves"]
    assert (change["leaf"], change["change"]) == ("rho", "changed")
    assert (change["elements_differing"], change["max_abs"]) == (1, 2.5)


def test_diff_of_leaves_cut_otherwise_compares_their_content(tmp_path, monkeypatch):
    monkeypatch.setattr(changes, "_PART_BYTES", 100)
    root = tmp_path / "c"
    fields(root, 1)
    fields(root, 2, boxes=TOP_AND_BOTTOM)
    answer = ask("diff", root, "1", "2", "--all")
    assert answer["same"]
    assert answer["equal"] == 6
    fields(root, 3, step=2.5, boxes=TOP_AND_BOTTOM)
    (change,) = ask("diff", root, "1", "3", code=1)["leaves"]
    assert change["leaf"] == "rho"
    assert (change["elements_differing"], change["max_abs"]) == (1, 2.5)
    assert "rho    changed   F64     6 x 10      1.67 %       2.5" in (
        run("diff", root, "1", "3").stdout
    )


def test_diff_compares_a_whole_leaf_with_a_cut_one(tmp_path):
    root = tmp_path / "c"
    field = np.arange(60.0).reshape(6, 10)
    one = {"x": CutArray.by_rows(np.arange(4), [2, 2])}
    write_cut(root, one, whole={"rho": field}, generation=1)
    write_cut(root, {**one, "rho": CutArray(field, HALVES)}, generation=2)
    assert ask("diff", root, "1", "2")["same"]
    write_cut(root, {**one, "rho": CutArray(field + 1, HALVES)}, generation=3)
    (change,) = ask("diff", root, "1", "3", code=1)["leaves"]
    assert change["max_abs"] == 1


def test_diff_of_text_cut_otherwise_says_only_that_it_changed(tmp_path):
    root = tmp_path / "c"
    words = np.array(["a", "b", "c"])
    write_cut(root, {"w": CutArray.by_rows(words, [1, 2])}, generation=1)
    write_cut(root, {"w": CutArray.by_rows(words, [2, 1])}, generation=2)
    assert ask("diff", root, "1", "2")["same"]
    words[2] = "d"
    write_cut(root, {"w": CutArray.by_rows(words, [2, 1])}, generation=3)
    (change,) = ask("diff", root, "1", "3", code=1)["leaves"]
    assert change["change"] == "changed"
    assert "max_abs" not in change


@pytest.mark.parametrize("part_bytes", [16, 100, 1 << 20])
def test_export_to_safetensors_writes_one_array_a_leaf(tmp_path, monkeypatch, part_bytes):
    monkeypatch.setattr(exporting, "_PART_BYTES", part_bytes)
    fields(tmp_path / "c")
    file = tmp_path / "out.safetensors"
    run("export", tmp_path / "c", "--state", "fields", "--to", file)
    found = load_file(file)
    for name, cut in arrays_of(0).items():
        array = cut.array
        if name == "words":  # a type that safetensors lacks
            array = array.view(np.uint8).reshape(2, 4)
        np.testing.assert_array_equal(found[name], array, strict=True)
    assert found["time"].tolist() == [0.5, 1.5]


def test_import_gives_back_what_was_cut_as_whole_leaves(tmp_path):
    fields(tmp_path / "c")
    file = tmp_path / "out.safetensors"
    assert run("export", tmp_path / "c", "--to", file).exit_code == 0
    assert run("import", file, "--into", tmp_path / "again").exit_code == 0
    with mpi_ckpt.load(tmp_path / "again") as saved:
        for name, cut in arrays_of(0).items():
            np.testing.assert_array_equal(saved["fields"][name], cut.array, strict=True)


def test_export_to_torch_writes_whole_tensors(tmp_path):
    torch = pytest.importorskip("torch")
    arrays = {name: one for name, one in arrays_of(0).items() if name != "words"}
    write_cut(tmp_path / "c", arrays, whole={"time": np.array([0.5])}, block_bytes=64)
    file = tmp_path / "out.pt"
    run("export", tmp_path / "c", "--state", "fields", "--to", file)
    found = torch.load(file, weights_only=True)
    assert list(found) == ["time", *arrays]
    for name, cut in arrays.items():
        np.testing.assert_array_equal(found[name].numpy(), cut.array, strict=True)


def test_export_stops_at_a_wrong_byte_of_a_tile(tmp_path):
    path = fields(tmp_path / "c")
    flip(path / "tiles-00000.safetensors", 4096)
    file = tmp_path / "out.safetensors"
    answer = ask("export", tmp_path / "c", "1", "--to", file, code=1)
    assert answer["error"]["kind"] == "CorruptGenerationError"
    assert "tiles-00000" in answer["error"]["message"]
    assert not file.exists()


def test_prune_quarantine_and_rollback_move_generations_with_tiles(tmp_path):
    root = tmp_path / "c"
    for number in (1, 2, 3, 4):
        fields(root, number)
    assert ask("prune", root, "--keep-last", "3")["removed"] == [1]
    assert run("quarantine", root, "4", "--reason", "bad").exit_code == 0
    assert run("rollback", root, "2").exit_code == 0
    rows = {row["name"]: row["state"] for row in ask("ls", root)["generations"]}
    assert rows["checkpoint-00000002"] == "newest"
    assert run("rollback", root, "--undo").exit_code == 0
    (verdict,) = ask("verify", root, "3")["generations"]
    assert verdict["state"] == "good"


def test_show_counts_tiles_and_files(tmp_path):
    root = tmp_path / "c"
    fields(root)
    text = run("show", root).stdout
    assert "fields: 6 leaves, 5 of them cut over ranks, 562 B" in text
    lines = {line.split()[0]: line.split() for line in text.splitlines() if line.split()}
    assert lines["leaf"][-2:] == ["tiles", "files"]
    assert lines["rho"][-2:] == ["2", "2"]
    assert lines["one"][-2:] == ["1", "1"]
    assert lines["none"][-2:] == ["0", "0"]
    (state,) = ask("show", root)["states"]
    leaves = {leaf["name"]: leaf for leaf in state["leaves"]}
    assert list(leaves) == ["time", *arrays_of(0)]
    assert leaves["rho"] == {
        "name": "rho",
        "dtype": "F64",
        "shape": [6, 10],
        "bytes": 480,
        "digest": None,
        "file": None,
        "tiles": 2,
        "files": ["tiles-00000.safetensors", "tiles-00001.safetensors"],
    }
    assert leaves["time"]["file"] == "rank-00000.safetensors"
    assert "tiles" not in leaves["time"]


def test_show_draws_how_a_leaf_is_cut(tmp_path):
    fields(tmp_path / "c")
    for name in ("rho", "fields/rho"):
        text = run("show", tmp_path / "c", "--leaf", name).stdout
        assert "fields/rho: F64 6 x 10, 480 B, 2 tiles in 2 files" in text
        assert text.count("│00000000001111111111│") == 6
        assert "1   [0:6, 5:10]   240 B   tiles-00001.safetensors" in text
    assert "ids" not in text
    (state,) = ask("show", tmp_path / "c", "--leaf", "rho")["states"]
    (leaf,) = state["leaves"]
    assert [box["offset"] for box in leaf["boxes"]] == [[0, 0], [0, 5]]
    assert [box["shape"] for box in leaf["boxes"]] == [[6, 5], [6, 5]]
    assert leaf["boxes"][1]["file"] == "tiles-00001.safetensors"
    assert leaf["boxes"][1]["bytes"] == 240
    assert len(leaf["boxes"][1]["digest"]) == 32
    text = run("show", tmp_path / "c", "--leaf", "time").stdout
    assert "fields/time: F64 2, 16 B, 1 tile in 1 file" in text
    assert "│0000000000000000│" in text


def test_show_lists_few_of_many_tiles(tmp_path):
    many = CutArray.by_rows(np.arange(50), [1] * 50)
    write_cut(tmp_path / "c", {"many": many})
    text = run("show", tmp_path / "c", "--leaf", "many").stdout
    assert "... and 10 more: --all shows them" in text
    assert "[49:50]" not in text
    assert "[49:50]" in run("show", tmp_path / "c", "--leaf", "many", "--all").stdout


def test_show_names_a_leaf_close_to_one_that_is_missing(tmp_path):
    fields(tmp_path / "c")
    error = ask("show", tmp_path / "c", "--leaf", "rhoo", code=2)["error"]
    assert "no leaf 'rhoo'; did you mean 'rho'?" in error["message"]
    error = ask("show", tmp_path / "c", "--leaf", "xyz", code=2)["error"]
    assert "show --all lists the leaves" in error["message"]


@pytest.fixture(scope="module")
def painter():
    """Draw once with matplotlib, which keeps the files of its fonts open."""
    figure = pytest.importorskip("matplotlib.figure").Figure()
    figure.suptitle("title")
    figure.savefig(io.BytesIO(), format="png")


@pytest.mark.usefixtures("painter")
def test_show_writes_a_picture_once(tmp_path):
    fields(tmp_path / "c")
    file = tmp_path / "rho.png"
    assert run("show", tmp_path / "c", "--leaf", "rho", "--png", file).exit_code == 0
    assert file.read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c", "rho.png"]
    error = ask("show", tmp_path / "c", "--leaf", "rho", "--png", file, code=2)["error"]
    assert error["kind"] == "exists"


@pytest.mark.usefixtures("painter")
def test_picture_shows_many_files_and_names_with_dollars(tmp_path):
    many = CutArray.by_rows(np.arange(30), [1] * 30)
    write_cut(tmp_path / "c", {"a$b$c\\frac{1}$": many})
    file = tmp_path / "many.png"
    words = ("show", tmp_path / "c", "--leaf", "a$b$c\\frac{1}$", "--png", file)
    assert run(*words).exit_code == 0
    assert file.read_bytes().startswith(b"\x89PNG")


def test_picture_without_matplotlib_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    fields(tmp_path / "c")
    file = tmp_path / "rho.png"
    error = ask("show", tmp_path / "c", "--leaf", "rho", "--png", file, code=1)["error"]
    assert "pip install matplotlib" in error["message"]
    assert not file.exists()


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        ((), 2, "--png shows one leaf: give --leaf NAME"),
        (("--leaf", "one"), 1, "has the shape []: a picture shows an array of one to"),
        (("--leaf", "none"), 1, "has the shape [0, 3]: a picture"),
    ],
)
def test_pictures_that_cannot_be_are_refused(tmp_path, words, code, message):
    fields(tmp_path / "c")
    file = tmp_path / "x.png"
    error = ask("show", tmp_path / "c", *words, "--png", file, code=code)["error"]
    assert message in error["message"]
    assert not file.exists()


def test_names_of_cut_leaves_cannot_drive_the_terminal(tmp_path):
    name = "[red]\x1b[2J\u202eleaf"
    write_cut(tmp_path / "c", {name: CutArray.by_rows(np.arange(4), [2, 2])})
    for words in ((), ("--leaf", name)):
        shown = run("show", tmp_path / "c", *words).stdout
        assert "\x1b" not in shown
        assert "\u202e" not in shown
        assert "[red]\\x1b[2J\\u202eleaf" in shown
