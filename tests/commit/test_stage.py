# SPDX-License-Identifier: Apache-2.0
"""The private copy of an asynchronous save."""

import io

import numpy as np
import pytest
import torch

from mpi_ckpt import ArrayState, ModuleState, State
from mpi_ckpt import memory as memory_module
from mpi_ckpt.engine.save.staging import stage
from mpi_ckpt.engine.sync.captured import CapturedState, capture_states
from mpi_ckpt.errors import StageError
from mpi_ckpt.memory import Arena


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
