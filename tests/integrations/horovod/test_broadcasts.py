# SPDX-License-Identifier: Apache-2.0
"""Each known failure of Horovod's broadcasts: shown on Horovod, and absent here."""

from __future__ import annotations

import pytest

from tests.integrations.horovod.playing import play

SCENES = "tests.integrations.horovod.scenes.broadcasting"
DTYPES = (
    *("bfloat16", "bool", "complex64", "complex128", "float8_e4m3fn", "float8_e5m2"),
    *("uint16", "uint32", "uint64"),
)


def scene(name, ranks=2, *arguments, **options):
    return play(f"{SCENES}:play", ranks, name, *arguments, **options)


@pytest.mark.parametrize("ranks", [2, 4])
def test_optimizer_state_is_broadcast_without_a_step(ranks):
    found = scene("optimizers", ranks).common
    parameters = 4
    for name in ("AdamW", "SGD with decay"):
        theirs, ours = found[f"{name}, horovod"], found[f"{name}, ours"]
        # Each rank has taken a step with a rate of its own.
        assert theirs == {"equal": False, "unchanged": False, "gradients": parameters}
        assert ours == {"equal": True, "unchanged": True, "gradients": 0}


def test_rate_of_an_optimizer_without_state_is_broadcast():
    first, second = scene("rates_without_state").all
    assert first == {"horovod": 0.1, "ours": 0.1}
    assert second == {"horovod": 0.2, "ours": 0.1}


def test_lbfgs():
    found = scene("lbfgs").common
    assert found["horovod"] == "ValueError: cannot broadcast torch.optim.LBFGS state"
    assert found["state"]
    assert found["equal"]


def test_horovods_distributed_optimizer():
    assert scene("distributed_optimizer").common == {"equal": True, "still": True}


def test_dtypes_that_horovod_does_not_know():
    found = scene("dtypes").common
    assert set(found) == set(DTYPES)
    for name, (theirs, equal, byte) in found.items():
        assert theirs is not None, name
        assert theirs.startswith("ValueError: Tensor type "), name
        assert equal, name
        assert byte == 1, name


def test_generators_layouts_and_plain_values():
    found = scene("forms").common
    failures = {
        "generator": "ValueError: invalid params of type",
        "not contiguous": "ValueError: Tensor is required to be contiguous",
        "no tensor": "AttributeError: ",
    }
    for name, failure in failures.items():
        theirs, ours, right = found[name]
        assert theirs.startswith(failure), name
        assert ours is None, name
        assert right, name
    assert found["strides"] == [1, 3]


def test_models_that_differ_are_told_apart_from_ranks_that_died():
    for found in scene("disagreeing").all:
        # Elastic training takes this for a lost rank, and tries again for ever.
        assert found["horovod"].startswith("HorovodInternalError: ")
        assert found["ours"].startswith("StateMismatchError: ")
        assert "rank 1 of 2" in found["ours"]
        assert "root has t F32[2], this rank t F32[3]" in found["ours"]
        assert found["untouched"]


def test_more_elements_than_an_int_counts():
    for found in scene("more_than_two_gib", 2, 16, timeout=200).all:
        assert found["ours"] is None
        assert found["arrived"]
        assert found["horovod"].startswith("HorovodInternalError: ")


# Horovod would make a list of the bytes first, of eight times their size.
@pytest.mark.parametrize("kind", ["array", "pickled"])
def test_objects_of_more_bytes_than_an_int_counts(kind):
    found = scene("object_of_more_than_two_gib", 2, 16, kind, timeout=200).common
    assert found == [0, *[0] * 15, 7]


def test_objects_of_other_types_on_other_ranks():
    stall = {
        "HOROVOD_STALL_CHECK_TIME_SECONDS": "1",
        "HOROVOD_STALL_SHUTDOWN_TIME_SECONDS": "2",
    }
    for found in scene("types_that_differ", **stall).all:
        assert found["ours"] == [7, [0, 1, 2, 3, 4]]
        # Its ranks wait for each other under two names.
        assert found["horovod"].startswith("HorovodInternalError: ")


def test_two_of_one_name():
    for rank, (theirs, ours, both) in enumerate(scene("one_name_twice").all):
        assert theirs.startswith("ValueError: "), rank
        assert "a tensor with the same name as another" in theirs, rank
        assert ours == [0, 1]
        assert both.startswith("StageError: ")
        assert "several parameters have one name: same" in both


def test_ours_while_horovods_are_under_way():
    assert scene("beside_horovods_operations").common is True
    assert scene("beside_horovods_operations", 4).common is True
