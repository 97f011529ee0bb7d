# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest

from mpi_ckpt.errors import RegistrationError, StageError
from mpi_ckpt.leaves.leaf import Leaf, LeafSpec, MemoryBuffer
from mpi_ckpt.state import SYNC_MODES, Capture, LeafState, PartsState, State


def test_plain_state_does_nothing_until_overridden(tmp_path):
    state = State("s")
    with (tmp_path / "f").open("w+b") as file:
        state.save(file)
        state.load(file)
        assert file.tell() == 0
    state.sync()
    assert state.name == "s"
    assert state.skip is False


@pytest.mark.parametrize("cls", [State, LeafState, PartsState])
def test_illegal_names_are_refused_by_all(cls):
    with pytest.raises(RegistrationError):
        cls("../escape")
    with pytest.raises(ValueError, match="path"):
        cls("/etc/passwd")


def test_name_cannot_change():
    with pytest.raises(AttributeError):
        State("s").name = "t"


def test_modes_are_the_four_documented():
    assert SYNC_MODES == ("root", "mean", "check", "none")
    for mode in SYNC_MODES:
        assert LeafState("s", sync=mode).sync_mode == mode
    with pytest.raises(RegistrationError, match="sync is 'Root'"):
        LeafState("s", sync="Root")


def test_unwritten_methods_say_so():
    state = PartsState("s")
    for call in (
        state.capture,
        lambda: state.prepare(None, [], strict=True),
        state.part,
        lambda: state.combine([]),
    ):
        with pytest.raises(NotImplementedError):
            call()


def test_capture_refuses_two_leaves_of_one_name():
    leaf = Leaf(LeafSpec("w", "U8", (2,)), MemoryBuffer(b"ab"))
    other = Leaf(LeafSpec("v", "U8", (2,)), MemoryBuffer(b"cd"))
    assert Capture(None, iter([leaf, other])).leaves == (leaf, other)
    with pytest.raises(StageError, match="one name"):
        Capture(None, [leaf, leaf])
