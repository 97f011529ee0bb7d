# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import io
import pickle
from fractions import Fraction

import numpy as np
import pytest
import torch

from mpi_ckpt.errors import StageError, StateMismatchError
from mpi_ckpt.states.nested import ObjectState
from mpi_ckpt.states.packed import pack
from tests.making import carry


class Bomb:
    """Goes off when it is unpickled."""

    went_off = False

    def __reduce__(self):
        return _go_off, ()


def _go_off() -> None:
    Bomb.went_off = True


@pytest.fixture(autouse=True)
def _unarmed():
    Bomb.went_off = False


def stream_of(state: ObjectState) -> io.BytesIO:
    stream = io.BytesIO()
    state.save(stream)
    stream.seek(0)
    return stream


def test_value_returns_with_its_arrays():
    live = ObjectState("o")
    carry(
        ObjectState("o", {"epoch": 3, "best": (0.5, np.arange(3)), "t": torch.ones(2)}),
        live,
    )
    assert live.value["epoch"] == 3
    assert live.value["best"][1].tolist() == [0, 1, 2]
    assert live.value["t"].tolist() == [1, 1]


@pytest.mark.parametrize(
    "value", [None, 0, "", [], {}, np.arange(2), torch.ones(()), np.float16(1)]
)
def test_value_may_be_of_any_form_itself(value):
    live = ObjectState("o", "before")
    carry(ObjectState("o", value), live)
    assert type(live.value) is type(value)
    assert str(live.value) == str(value)


def test_arrays_of_the_same_form_are_restored_in_place():
    array, tensor = np.zeros(3), torch.zeros(3)
    live = ObjectState("o", {"a": array, "t": [tensor], "n": np.zeros(2)})
    carry(ObjectState("o", {"a": np.ones(3), "t": [torch.ones(3)], "n": np.ones(5)}), live)
    assert live.value["a"] is array
    assert live.value["t"][0] is tensor
    assert array.tolist() == tensor.tolist() == [1, 1, 1]
    assert live.value["n"].shape == (5,)


def test_read_only_arrays_and_scalars_are_replaced():
    frozen = np.zeros(2)
    frozen.setflags(write=False)
    live = ObjectState("o", {"a": frozen, "s": np.float32(0)})
    carry(ObjectState("o", {"a": np.ones(2), "s": np.float32(1)}), live)
    assert live.value["a"].tolist() == [1, 1]
    assert live.value["s"] == 1
    assert not frozen.any()


def test_array_where_a_tensor_was_is_made_anew():
    live = ObjectState("o", {"x": torch.zeros(2)})
    carry(ObjectState("o", {"x": np.ones(2, np.float32)}), live)
    assert isinstance(live.value["x"], np.ndarray)


def test_live_value_is_not_touched_before_everything_has_arrived():
    live = ObjectState("o", {"a": np.zeros(2)})
    captured = ObjectState("o", {"a": np.ones(3), "b": 1}).capture()
    specs = [leaf.spec for leaf in captured.leaves]
    live.prepare(captured.structure, specs, strict=True)
    assert live.value["a"].tolist() == [0, 0]
    assert "b" not in live.value


def tagged(tensor):
    tensor.tag = "weights of rank 0"
    return tensor


@pytest.mark.parametrize("value", [torch.ones(2), torch.nn.Parameter(torch.ones(2))])
def test_a_tensor_that_was_given_attributes_is_refused_unless_pickled(value):
    value = {"model": [tagged(value)]}
    with pytest.raises(StageError, match=r"^model/0 .* was given 'tag', .* separately"):
        ObjectState("o", value).capture()
    with pytest.raises(StageError, match="'tag'"):
        pack(value)  # of a PerRankState
    live = ObjectState("o", pickle=True)
    carry(ObjectState("o", value, pickle=True), live)
    assert live.value["model"][0].tag == "weights of rank 0"


def test_a_tensor_that_the_compiler_has_marked_is_saved():
    tensor = torch.ones(2, 2)
    torch._dynamo.mark_dynamic(tensor, 0)
    assert vars(tensor)
    live = ObjectState("o")
    carry(ObjectState("o", tensor), live)
    assert live.value.tolist() == tensor.tolist()


def test_unknown_types_are_refused_naming_the_place():
    with pytest.raises(
        StageError, match=r"^config/ratio is of type fractions\.Fraction.*pickle=True"
    ):
        ObjectState("o", {"config": {"ratio": Fraction(1, 3)}}).capture()


def test_pickle_is_used_only_when_asked_for(monkeypatch):
    monkeypatch.setattr(pickle, "dumps", lambda *_, **__: pytest.fail("pickled"))
    monkeypatch.setattr(pickle, "loads", lambda *_, **__: pytest.fail("unpickled"))
    carry(ObjectState("o", {"a": [1]}), ObjectState("o"))


def test_pickle_takes_any_value():
    live = ObjectState("o", pickle=True)
    carry(ObjectState("o", {"ratio": Fraction(1, 3), "of": {1, 2}}, pickle=True), live)
    assert live.value == {"ratio": Fraction(1, 3), "of": {1, 2}}


def test_what_cannot_be_pickled_is_told():
    with pytest.raises(StageError, match="'o' cannot be pickled"):
        ObjectState("o", lambda: 0, pickle=True).capture()


def test_pickled_contents_are_refused_by_a_state_that_did_not_ask():
    saved = ObjectState("o", Bomb(), pickle=True)
    live = ObjectState("o", "untouched")
    with pytest.raises(StateMismatchError, match="saved with pickle=True"):
        live.load(stream_of(saved))
    assert live.value == "untouched"
    assert not Bomb.went_off


def test_plain_contents_are_refused_by_a_state_that_asked_for_pickle():
    live = ObjectState("o", "untouched", pickle=True)
    for value in ({"a": 1}, b"cos\nsystem\n", {"pickled": 5}, {"pickled": "text"}, []):
        with pytest.raises(StateMismatchError, match="saved without pickle=True"):
            live.load(stream_of(ObjectState("o", value)))
    assert live.value == "untouched"


def test_value_that_looks_pickled_is_refused_when_saved():
    with pytest.raises(StageError, match="rename the key"):
        ObjectState("o", {"pickled": b"bytes"}).capture()
    live = ObjectState("o")
    carry(ObjectState("o", {"pickled": b"bytes", "more": 1}), live)
    assert live.value == {"pickled": b"bytes", "more": 1}


def test_unpickling_happens_only_when_all_is_there():
    live = ObjectState("o", pickle=True)
    captured = ObjectState("o", Bomb(), pickle=True).capture()
    specs = [leaf.spec for leaf in captured.leaves]
    arrival = live.prepare(captured.structure, specs, strict=True)
    assert not Bomb.went_off
    arrival.adopt()
    assert Bomb.went_off
