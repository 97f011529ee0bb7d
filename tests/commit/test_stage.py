# SPDX-License-Identifier: Apache-2.0
"""The private copy of an asynchronous save."""

import io

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mpi_ckpt import ArrayState, ModuleState, State
from mpi_ckpt import memory as memory_module
from mpi_ckpt.engine.save.shard import plan_of, write_shard
from mpi_ckpt.engine.save.staging import stage
from mpi_ckpt.engine.sync.captured import (
    CapturedState,
    capture_states,
    digest_states,
    pick_leaves,
)
from mpi_ckpt.errors import StageError
from mpi_ckpt.memory import Arena
from mpi_ckpt.storage.format.layout import shard_file_name
from mpi_ckpt.storage.writing.partial import Partial


class Words(State):
    text = b"before"

    def save(self, fileobj):
        fileobj.write(self.text)


def bytes_of(staged):
    return [bytes(leaf.buffer.read()) for leaf in staged.leaves]


def test_what_changes_afterwards_is_not_seen():
    arrays = {"a": np.arange(10.0), "t": np.ones((3, 4), np.int16).T, "e": np.empty(0)}
    module = torch.nn.Linear(3, 2).to(torch.bfloat16)
    plain = Words("words")
    contents = capture_states([ArrayState("arrays", arrays), ModuleState("module", module)])
    before = [bytes_of(content) for content in contents]
    staged = stage(Arena(), [*contents, plain]).states
    arrays["a"][:] = -1
    arrays["t"][:] = 7
    with torch.no_grad():
        module.weight.zero_()
    plain.text = b"after"
    assert [bytes_of(content) for content in staged[:2]] == before
    stream = io.BytesIO()
    staged[2].save(stream)
    assert stream.getvalue() == b"before"


def test_the_order_is_kept():
    contents = capture_states([ArrayState("one", {"a": np.ones(2)})])
    staged = stage(Arena(), [Words("first"), *contents, Words("last")]).states
    names = [
        content.state.name if isinstance(content, CapturedState) else content.name
        for content in staged
    ]
    assert names == ["first", "one", "last"]


def test_the_arena_is_reused_and_grows():
    arena = Arena()
    small = arena.take(100)
    small[:3] = b"abc"
    assert bytes(arena.take(50)[:3]) == b"abc"
    assert len(arena.take(1 << 20)) >= 1 << 20


@given(
    sizes=st.lists(
        st.tuples(st.sampled_from(["u1", "<f4", "<f8"]), st.integers(0, 5000)),
        min_size=1,
        max_size=8,
    )
)
@settings(max_examples=20, deadline=None)
def test_the_arena_holds_the_file(tmp_path_factory, sizes):
    """Written from the arena as it is, or leaf by leaf: the same file, the same digests."""
    path = tmp_path_factory.mktemp("files")
    arrays = {f"x{n}": np.full(size, n + 1, dtype) for n, (dtype, size) in enumerate(sizes)}
    contents = capture_states([ArrayState("one", arrays), ArrayState("two", arrays)])
    staged = stage(Arena(), contents, threads=2, digested=["one"])
    assert [one.digests is None for one in staged.states] == [False, True]
    assert staged.states[0].digests == digest_states(contents, 1)[0].digests
    plan = plan_of(contents)
    partials = [Partial(path, number, "job", mode="direct") for number in (1, 2)]
    shards = [
        write_shard(partials[0], contents, shard_file_name(0)),
        write_shard(partials[1], staged.states, shard_file_name(0), staged.image),
    ]
    files = [(one.path / "rank-00000.safetensors").read_bytes() for one in partials]
    assert files[0] == files[1] == bytes(staged.image.memory[: plan.nbytes])
    assert shards[0].states == shards[1].states


def test_leaves_of_several_states_that_are_picked_are_written_one_by_one(tmp_path):
    contents = capture_states([ArrayState("one", {"a": np.ones(900), "b": np.ones(9)})])
    staged = stage(Arena(), contents)
    picked = [pick_leaves(staged.states[0], [1])]
    partial = Partial(tmp_path, 1, "job", mode="direct")
    shard = write_shard(partial, picked, shard_file_name(0), staged.image)
    assert shard.states["one"].form.names == ("b",)
    data = (partial.path / "rank-00000.safetensors").read_bytes()
    assert data.endswith(np.ones(9).tobytes())
    assert len(data) == shard.file.nbytes == shard.file.header_bytes + 72


def test_memory_that_is_not_to_be_had_is_an_error_of_the_family(monkeypatch):
    def none_left(*_, **__):
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(memory_module.mmap, "mmap", none_left)
    (captured,) = capture_states([ArrayState("a", {"x": np.ones(512)})])
    with pytest.raises(StageError, match="no memory to stage a save: 4096 bytes"):
        stage(Arena(), [captured])


def test_a_state_that_cannot_write_itself_is_named():
    class Broken(State):
        def save(self, fileobj):
            raise KeyError("gone")

    with pytest.raises(StageError, match=r"save\(\) of state 'broken'.*gone"):
        stage(Arena(), [Broken("broken")])
