# SPDX-License-Identifier: Apache-2.0
"""Values of the program that lie in one memory: together if it holds both, else apart."""

import numpy as np
import pytest

from mpi_ckpt import ArrayState, ModuleState, ObjectState
from mpi_ckpt.errors import StateMismatchError
from tests.ranks import manager, same_error

torch = pytest.importorskip("torch")


def saved_with(root, *states):
    with manager(root, *states) as checkpoints:
        checkpoints.save()


def restored_with(root, *states):
    with manager(root, *states) as checkpoints:
        checkpoints.restore()


def of_either_order(first, second, *, as_view, last="f8"):
    """Return two arrays, of which the second has its bytes in the opposite order."""
    given = np.array([first, first], last)
    other = given.astype(given.dtype.newbyteorder(">"))
    other[...] = second
    return {"first": given, "second": given.view(other.dtype) if as_view else other}


@pytest.mark.parametrize("kind", ["f8", "c8", "U3", "M8[s]"])
def test_numbers_of_two_byte_orders_are_not_put_into_one_memory(comm, shared_path, kind):
    """The same value, saved from both: in one memory each would spoil the other."""
    value = np.array(1).astype(kind)
    state = ArrayState("a", of_either_order(value, value, as_view=False, last=kind))
    saved_with(shared_path, state)
    live = of_either_order(0, 0, as_view=True, last=kind)
    with same_error(comm, StateMismatchError, "first", "second", "share memory"):
        restored_with(shared_path, ArrayState("a", live))
    assert (live["first"] == of_either_order(0, 0, as_view=True, last=kind)["first"]).all()
    values = ObjectState("a", of_either_order(0, 0, as_view=True, last=kind))
    saved_with(shared_path / "o", ObjectState("a", dict(state.arrays)))
    restored_with(shared_path / "o", values)
    for name in ("first", "second"):
        assert (values.value[name] == value).all(), name


def test_a_view_of_the_other_byte_order_stays_a_view(comm, shared_path):
    saved_with(shared_path, ArrayState("a", of_either_order(1.5, 0, as_view=True)))
    live = of_either_order(7, 0, as_view=True)
    restored_with(shared_path, ArrayState("a", live))
    assert (live["first"] == 1.5).all()
    assert np.shares_memory(live["first"], live["second"])


class Conjugates(torch.nn.Module):
    """A buffer, and views of it that conjugate and negate when they are read."""

    def __init__(self, value):
        super().__init__()
        self.register_buffer("plain", torch.full((2,), value))
        self.register_buffer("conj", self.plain.conj())
        self.register_buffer("neg", self.plain.conj().imag)


def test_conjugated_and_negated_views_stay_views(comm, shared_path):
    saved_with(shared_path, ModuleState("m", Conjugates(1 + 2j)))
    live = Conjugates(3 - 1j)
    restored_with(shared_path, ModuleState("m", live))
    assert live.plain.tolist() == [1 + 2j] * 2
    assert live.conj.resolve_conj().tolist() == [1 - 2j] * 2
    assert live.neg.resolve_neg().tolist() == [-2] * 2


def test_a_conjugated_view_of_other_values_is_refused(comm, shared_path):
    apart = Conjugates(1 + 2j)
    apart.conj = apart.plain.clone()
    saved_with(shared_path, ModuleState("m", apart))
    live = Conjugates(3 - 1j)
    with same_error(comm, StateMismatchError, "plain", "conj", "share memory"):
        restored_with(shared_path, ModuleState("m", live))
    assert live.plain.tolist() == [3 - 1j] * 2
