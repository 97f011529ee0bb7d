# SPDX-License-Identifier: Apache-2.0
"""docs/format.md, the library and a stranger's reader agree; old ones stay readable."""

from __future__ import annotations

import json
import math
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from mpi_ckpt import (
    ArrayState,
    Block,
    CheckpointManager,
    Local,
    ModuleState,
    ObjectState,
    Options,
    PerRankState,
    ShardedArrayState,
)
from mpi_ckpt.storage.reading.proving import verify
from mpi_ckpt.storage.reading.reader import GenerationReader
from tests.cutting import bytes_of, write_cut
from tests.restore import make_golden, stranger
from tests.restore.make_golden import GOLDEN, METRICS, STEP, TEXT, Words

VERSIONS = sorted(path.name for path in GOLDEN.glob("v*"))
NUMPY = {"F64": "<f8", "F32": "<f4", "I8": "i1", "I32": "<i4", "I64": "<i8", "U16": "<u2"}
NUMPY |= {"BOOL": "?", "C64": "<c8", "I16": "<i2", "U32": "<u4"}


def array_of(leaf: stranger.Leaf) -> np.ndarray:
    dtype = NUMPY.get(leaf.dtype) or leaf.dtype.removeprefix("numpy:")
    return np.frombuffer(leaf.data, dtype).reshape(leaf.shape)


@pytest.fixture
def golden(tmp_path):
    """Give a copy of the golden generation of version 1 that may be changed."""
    return copy_of("v1", tmp_path)


@pytest.fixture
def cut_golden(tmp_path):
    """Give a copy of the golden generation of version 2."""
    return copy_of("v2", tmp_path)


def copy_of(version: str, place: Path) -> Path:
    copied = shutil.copytree(GOLDEN / version, place / version)
    return copied / "checkpoint-00000001"


def test_there_is_a_golden_generation_of_every_version():
    assert VERSIONS == ["v1", "v2", "v3"]


def test_stranger_knows_nothing_of_this_package():
    source = Path(stranger.__file__).read_text()
    lines = [line.split() for line in source.splitlines()]
    imported = {
        words[1].split(".")[0] for words in lines if words[:1] in (["from"], ["import"])
    }
    assert {"json", "xxhash", "safetensors"} <= imported
    assert not {"mpi_ckpt", "torch", "mpi4py", "tests"} & imported


def test_stranger_reads_the_golden_arrays(golden):
    found = stranger.read(golden)
    assert found.manifest["step"] == STEP
    assert found.manifest["metrics"] == {"loss": 0.25, "worst": "nan", "best": "inf"}
    for name, array in make_golden.arrays().items():
        read = array_of(found.leaves["arrays"][name])
        assert read.dtype == array.dtype.newbyteorder("<")
        assert read.tobytes() == array.astype(read.dtype).tobytes()
        assert read.shape == array.shape


def test_stranger_reads_the_golden_module_object_and_streams(golden):
    found = stranger.read(golden)
    assert found.structures["model"]["ties"] == {"tied": "weight"}
    (weight,) = found.leaves["model"].values()
    assert (weight.dtype, weight.shape) == ("BF16", [2, 3])
    expected = make_golden.module()["weight"].detach().view(torch.int16).numpy()
    assert weight.data == expected.tobytes()
    structure = found.structures["object"]
    assert structure["epoch"] == 3
    assert structure["pair"] == {"~": "tuple", "items": [1, 2.5]}
    assert structure["inf"] == {"~": "float", "text": "-inf"}
    assert structure["bytes"] == {"~": "bytes", "text": "AP8="}
    assert structure["keys"]["items"] == [[1, "one"], [None, "none"]]
    assert array_of(found.leaves["object"][structure["seen"]["leaf"]]).tolist() == [0, 1, 2]
    assert found.streams == {"my/words": TEXT, ".hidden": TEXT}
    assert (golden / "my%2Fwords.bin").read_bytes() == TEXT
    assert (golden / "%2Ehidden.bin").read_bytes() == TEXT


def test_safetensors_reads_the_golden_shard(golden):
    found = stranger.tensors(golden)
    form = {name: (entry["dtype"], entry["shape"]) for name, entry in found.items()}
    assert form["arrays/float64"] == ("F64", [2, 2])
    # Types that safetensors lacks are bytes with one more dimension.
    assert form["arrays/complex"] == ("U8", [2, 8])
    assert form["arrays/words"] == ("U8", [2, 8])
    assert form["arrays/empty"] == ("F32", [0, 3])
    leaves = stranger.read(golden).leaves
    for state, members in leaves.items():
        for name, leaf in members.items():
            assert bytes(found[f"{state}/{name}"]["data"]) == leaf.data


def test_this_release_restores_the_golden_generation(golden, manage):
    live = {name: np.zeros_like(array) for name, array in make_golden.arrays().items()}
    module = make_golden.module()
    with torch.no_grad():
        module["weight"].zero_()
    states = [
        ArrayState("arrays", live),
        ModuleState("model", module),
        ObjectState("object"),
        *(words := [Words("my/words"), Words(".hidden")]),
    ]
    for word in words:
        word.data = b""
    report = manage(*states, root=golden.parent).restore()
    assert (report.generation, report.step) == (1, STEP)
    assert repr(report.metrics) == repr(METRICS)
    for name, array in make_golden.arrays().items():
        assert live[name].tobytes() == array.tobytes()
    assert torch.equal(module["weight"], make_golden.module()["weight"])
    assert module["tied"] is module["weight"]
    assert str(states[2].value) == str(make_golden.value())
    assert [word.data for word in words] == [TEXT, TEXT]


def test_stranger_puts_the_golden_cut_arrays_together(cut_golden):
    found = stranger.read(cut_golden)
    assert found.manifest["version"] == 2
    arrays = {name: one.array for name, one in make_golden.cut_arrays().items()}
    arrays |= make_golden.whole_arrays()
    assert set(found.leaves["fields"]) == set(arrays)
    for name, array in arrays.items():
        read = array_of(found.leaves["fields"][name])
        np.testing.assert_array_equal(read, array, strict=True)
        assert read.tobytes() == array.tobytes()


def test_safetensors_reads_the_golden_tiles(cut_golden):
    names = sorted(os.listdir(cut_golden))
    ranks = [f"tiles-0000{rank}.safetensors" for rank in (0, 2, 3)]
    assert names == ["manifest.json", "rank-00000.safetensors", *ranks]
    found = stranger.tensors(cut_golden)
    form = {name: (entry["dtype"], entry["shape"]) for name, entry in found.items()}
    assert form["fields/field@4,6"] == ("F64", [3, 4])
    assert form["fields/scalar@"] == ("F32", [])
    assert form["fields/complex@1"] == ("U8", [1, 8])
    arrays = make_golden.cut_arrays()
    count = 0
    for name, cut in arrays.items():
        for box in (box for rank in cut.boxes for box in rank):
            tile = found[f"fields/{name}@{','.join(map(str, box.offset))}"]
            assert bytes(tile["data"]) == bytes(bytes_of(cut.array, box))
            count += 1
    assert count + len(make_golden.whole_arrays()) == len(found)


def test_this_release_reads_the_golden_tiles(cut_golden):
    with GenerationReader(cut_golden) as reader:
        verify(reader)
        for name, cut in make_golden.cut_arrays().items():
            found = [tile.box for tile in reader.tiles()["fields", name]]
            assert found == [box for rank in cut.boxes for box in rank]


def test_this_release_still_writes_tiles_so(tmp_path):
    arrays, whole = make_golden.cut_arrays(), make_golden.whole_arrays()
    path = write_cut(tmp_path / "again", arrays, whole=whole, block_bytes=64)
    for file in (GOLDEN / "v2" / path.name).iterdir():
        assert (path / file.name).read_bytes() == file.read_bytes()


def test_this_release_still_writes_that_format(manage):
    manager = manage(*make_golden.states())
    path = manager.save(STEP, metrics=METRICS).path
    old, new = stranger.read(GOLDEN / "v1" / path.name), stranger.read(path)
    assert new.leaves == old.leaves
    assert new.structures == old.structures
    assert new.streams == old.streams
    for manifest in (old.manifest, new.manifest):
        for key in ("time", "job", "digest"):
            del manifest[key]
    assert new.manifest == old.manifest


def test_stranger_reads_the_golden_local_generation(tmp_path):
    old = stranger.read(GOLDEN / "v1" / "checkpoint-00000001")
    new = stranger.read(copy_of("v3", tmp_path))
    assert new.leaves == old.leaves
    assert new.structures == old.structures
    assert new.streams == old.streams
    local = new.manifest["local"]
    assert (local["hosts"], local["copies"]) == (["host1"], 1)
    assert local["holders"] == [[0]] * len(new.manifest["files"])


@pytest.fixture
def golden_hosts(tmp_path):
    """Give what two hosts hold of the golden generation on them, in one folder."""
    joined = tmp_path / "joined"
    for host in ("host1", "host2"):
        home = GOLDEN / "hosts" / host / "checkpoint-00000001"
        shutil.copytree(home, joined, dirs_exist_ok=True)
    return joined


def test_stranger_reads_what_several_hosts_hold_together(golden_hosts):
    found = stranger.read(golden_hosts)
    whole, field = make_golden.whole_arrays(), make_golden.field()
    for name, array in whole.items():
        assert array_of(found.leaves["whole"][name]).tobytes() == array.tobytes()
    assert array_of(found.leaves["field"]["rho"]).tobytes() == field.tobytes()
    assert found.streams == {"my/words": TEXT}
    assert found.structures["own"]["parts"] == 3
    for rank in range(3):
        cache = make_golden.value_of(rank)["cache"]
        leaf = found.leaves["own"][f"rank-{rank:05d}/cache"]
        assert array_of(leaf).tobytes() == cache.tobytes()
    local = found.manifest["local"]
    assert (local["hosts"], local["copies"]) == (["host1", "host2"], 1)
    assert {"tiles-00000.safetensors", "tiles-00002.safetensors"} <= {
        file["name"] for file in found.manifest["files"]
    }


def test_the_golden_generation_on_hosts_is_restored(golden_hosts, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    shutil.copy(GOLDEN / "hosts" / "lineage.json", run)
    folder = json.loads((run / "lineage.json").read_text())["lineage"]["home"]
    shutil.copytree(golden_hosts, tmp_path / "disk" / folder / "checkpoint-00000001")
    field, own = np.zeros((7, 6)), PerRankState("own", None)
    block = Block(field, shape=(7, 6), offset=(0, 0))
    whole = {name: np.zeros_like(a) for name, a in make_golden.whole_arrays().items()}
    words = Words("my/words")
    words.data = b""
    states = [ArrayState("whole", whole), ShardedArrayState("field", {"rho": block}), own]
    with CheckpointManager(
        run,
        [*states, words],
        options=Options(preemption_signals=()),
        local=Local(str(tmp_path / "disk")),
    ) as manager:
        report = manager.restore()
    assert (report.level, report.step, report.saved_size) == ("local", STEP, 3)
    np.testing.assert_array_equal(field, make_golden.field())
    assert (own.value["rank"], words.data) == (0, TEXT)
    assert whole["time"] == make_golden.whole_arrays()["time"]


@pytest.mark.parametrize("version", VERSIONS)
def test_stranger_sees_every_flipped_byte(tmp_path, version):
    golden = copy_of(version, tmp_path)
    for file in sorted(golden.iterdir()):
        data = file.read_bytes()
        for position in range(0, len(data), 29):
            changed = bytearray(data)
            changed[position] ^= 1
            file.write_bytes(changed)
            with pytest.raises(stranger.Damaged):
                stranger.read(golden)
        file.write_bytes(data)
    stranger.read(golden)


def test_stranger_reads_shared_files_and_long_leaves(manage):
    arrays = {
        "long": np.arange((16 << 20) + 5, dtype=np.uint32).view(np.uint8)[: (16 << 20) + 5],
        "short": np.zeros(3),
    }
    words = Words("words")
    manager = manage(ArrayState("arrays", arrays), words)
    manager.save(1)
    arrays["short"] += 1
    manager.save(2)
    words.data = b"other"
    path = manager.save(3, only=["words"]).path
    found = stranger.read(path)
    assert found.leaves["arrays"]["long"].data == arrays["long"].tobytes()
    assert array_of(found.leaves["arrays"]["short"]).tolist() == [1, 1, 1]
    assert found.streams == {"words": b"other"}
    assert any(".from-00000001." in name for name in os.listdir(path))
    assert math.isfinite(found.manifest["time"])
