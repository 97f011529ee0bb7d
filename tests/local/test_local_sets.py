# SPDX-License-Identifier: Apache-2.0
"""The manifest of a local generation, and what tools make of a host's part of it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpi_ckpt import CheckpointManager, Local, Options, load
from mpi_ckpt.errors import CheckpointError, ReadError, UnsupportedFormatError
from mpi_ckpt.states.arrays import ArrayState
from mpi_ckpt.storage.format.manifest import LocalSet, Manifest, StoredFile
from mpi_ckpt.storage.format.manifest_codec import decode, encode
from mpi_ckpt.storage.local.host_directory import HostDirectory
from mpi_ckpt.storage.reading.proving import verify
from mpi_ckpt.storage.reading.reader import GenerationReader
from tests.commands import ask, flip, run
from tests.making import sealed_document

np = pytest.importorskip("numpy")


def manifest(hosts, holders):
    files = tuple(
        StoredFile(f"share-{n:05d}.safetensors", 10, 0, bytes(16), 1)
        for n in range(len(holders))
    )
    local = LocalSet("run", 3, "/scratch/run", hosts, hosts, 1, holders)
    return Manifest(
        generation=1, step=5, time=1.0, job="job", size=2, files=files, local=local
    )


@given(st.data())
def test_what_is_written_is_read(data):
    hosts = tuple(data.draw(st.lists(st.text(max_size=5), min_size=1, max_size=4)))
    index = st.integers(0, len(hosts) - 1)
    holders = data.draw(st.lists(st.lists(index, max_size=3).map(tuple), max_size=4))
    written = manifest(hosts, tuple(holders))
    assert decode(encode(written)) == written
    assert json.loads(encode(written))["version"] == 3


@pytest.mark.parametrize(
    "wrong",
    [
        {"holders": [[2], [0]]},
        {"holders": [[0]]},
        {"holders": [[-1], [0]]},
        {"domains": ["a"]},
        {"copies": 9},
        {"base": -1},
        {"run": 1},
        {"hosts": "ab"},
    ],
    ids=repr,
)
def test_sections_that_break_a_rule_are_refused(wrong):
    document = json.loads(encode(manifest(("a", "b"), ((0,), (1,)))))
    document["local"].update(wrong)
    del document["digest"]
    with pytest.raises(ValueError):  # noqa: PT011 (each has a text of its own)
        decode(sealed_document(document))
    del document["local"]
    with pytest.raises(ValueError, match="lacks 'local'"):
        decode(sealed_document(document))


@pytest.fixture
def home(tmp_path):
    """A host's folder, with two generations of one host, one share of the second gone."""
    arrays = {f"x{n}": np.full(5000, float(n)) for n in range(6)}
    local = Local(str(tmp_path / "disk"), reserve=0)
    options = Options(preemption_signals=())
    states = [ArrayState("a", arrays)]
    with CheckpointManager(tmp_path / "run", states, options=options, local=local) as it:
        it.save(1, level="local")
        it.save(2, level="local")
    (home,) = (tmp_path / "disk").iterdir()
    (home / "checkpoint-00000002" / "share-00001.safetensors").unlink()
    return home


def test_tools_work_on_the_part_of_a_host(home):
    rows = ask("ls", home)["generations"]
    assert [(row["generation"], row["state"]) for row in rows] == [(1, "ok"), (2, "newest")]
    answer = ask("verify", home, "--all")
    assert answer["good"] is True
    whole, part = (one["bytes"] for one in reversed(answer["generations"]))
    assert 0 < part < whole
    assert run("show", home, "2").exit_code == 0
    flip(home / "checkpoint-00000002" / "share-00000.safetensors", -1)
    assert run("verify", home, "2").exit_code == 1


def test_a_reader_proves_what_is_there(home):
    with GenerationReader(home / "checkpoint-00000002") as reader:
        assert reader.absent == {"share-00001.safetensors"}
        names = {leaf.extent.file for leaf in reader.leaves()}
        assert names == {"share-00000.safetensors"}
        verify(reader)
    state = load(home)["a"]
    read = 0
    for name in [f"x{n}" for n in range(6)]:
        try:
            read += float(np.asarray(state.lazy(name)[...]).mean()) == int(name[1:])
        except CheckpointError:
            continue
    assert 0 < read < 6


def test_a_manager_does_not_take_it_for_a_directory(home):
    with (
        CheckpointManager(
            home,
            [ArrayState("a", {"x0": np.zeros(5000)})],
            options=Options(preemption_signals=()),
        ) as manager,
        pytest.raises(UnsupportedFormatError, match="one host's part"),
    ):
        manager.restore()


def test_a_host_does_not_take_another_generation_for_its_part(home, tmp_path):
    states = [ArrayState("a", {"x": np.zeros(3)})]
    options = Options(preemption_signals=())
    with CheckpointManager(tmp_path / "other", states, options=options) as manager:
        path = manager.save(1).path
    path.rename(home / "checkpoint-00000007")
    directory = HostDirectory(home, "auto")
    directory.own()
    numbers = [reader.manifest.generation for reader, _ in directory.generations()]
    directory.close()
    assert numbers == [2, 1]


def test_a_part_keeps_its_place_in_the_history(home):
    with GenerationReader(home / "checkpoint-00000001") as reader:
        local = reader.manifest.local
    assert local.base == 0
    lineage = json.loads((home.parent.parent / "run" / "lineage.json").read_text())
    assert [run["run"] for run in lineage["lineage"]["runs"]] == [local.run]


@pytest.fixture
def part_of_tiles(tmp_path):
    """One host's folder of a generation whose tiles lie on two."""
    home = tmp_path / "home"
    golden = Path(__file__).parents[1] / "restore" / "golden" / "hosts" / "host1"
    shutil.copytree(golden, home)
    return home


def test_tools_work_on_the_tiles_of_a_host(part_of_tiles):
    rows = ask("ls", part_of_tiles)["generations"]
    assert [(row["generation"], row["state"]) for row in rows] == [(1, "newest")]
    assert run("show", part_of_tiles, "1").exit_code == 0
    drawn = run("show", part_of_tiles, "1", "--leaf", "rho").stdout
    assert [line.strip() for line in drawn.splitlines() if "│" in line] == [
        *["│000000000000│"] * 4,
        *["│............│"] * 3,
    ]
    assert ask("verify", part_of_tiles)["good"] is True
    flip(part_of_tiles / "checkpoint-00000001" / "tiles-00000.safetensors", -1)
    assert run("verify", part_of_tiles).exit_code == 1


def test_tiles_on_other_hosts_are_never_taken_for_zeros(part_of_tiles):
    state = load(part_of_tiles)["field"]
    with pytest.raises(ReadError, match=r"2 of its 3 tiles .* on other hosts"):
        state.lazy("rho")[...]
    with GenerationReader(part_of_tiles / "checkpoint-00000001") as reader:
        assert reader.absent == {"share-00000.safetensors", "tiles-00002.safetensors"}
        tiles = reader.tiles()["field", "rho"]
        assert [tile.box.offset for tile in tiles] == [(0, 0), (2, 0)]
        verify(reader)
