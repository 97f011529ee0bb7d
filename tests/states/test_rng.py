# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import io
import random

import numpy as np
import pytest
import torch

from mpi_ckpt.errors import CorruptGenerationError, RegistrationError, StateMismatchError
from mpi_ckpt.leaves.leaf import LeafSpec
from mpi_ckpt.states.unshared.rng import RNGState, built_in_streams
from tests.making import Ranks, joined

BIT_GENERATORS = ["PCG64", "PCG64DXSM", "MT19937", "Philox", "SFC64"]


def own_generators(seed: int) -> dict:
    bits = {
        name: np.random.Generator(getattr(np.random, name)(seed)) for name in BIT_GENERATORS
    }
    return {
        **bits,
        "torch": torch.Generator().manual_seed(seed),
        "python": random.Random(seed),
    }


def draw(generators: dict) -> list:
    """Draw from every stream, in ways that keep something back for the next draw."""
    drawn = [random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn()]
    drawn += [torch.rand(1).item(), torch.randn(3).tolist()]
    for generator in generators.values():
        if isinstance(generator, np.random.Generator):
            drawn += [
                generator.random(),
                int(generator.integers(0, 2**16, dtype=np.uint16)),
            ]
        elif isinstance(generator, torch.Generator):
            drawn.append(torch.randn(3, generator=generator).tolist())
        else:
            drawn += [generator.random(), generator.gauss(0, 1)]
    return drawn


def seed_all(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def rank_state(rank: int, size: int, generators: dict) -> RNGState:
    state = RNGState(generators=generators)
    state.bind(Ranks(rank, size))
    return state


def saved_by(size: int) -> tuple:
    """Return what root saves of ranks that drew differently, and what each draws next."""
    parts, following = [], []
    for rank in range(size):
        seed_all(rank)
        generators = own_generators(rank)
        for _ in range(rank + 1):
            draw(generators)
        parts.append(rank_state(rank, size, generators).own_value())
        following.append(draw(generators))
    root = rank_state(0, size, own_generators(0))
    return joined(root, parts).capture(), following


def restored(captured, rank: int, size: int) -> list:
    """Return what a rank draws after a restore."""
    seed_all(99)
    generators = own_generators(99)
    state = rank_state(rank, size, generators)
    specs = [leaf.spec for leaf in captured.leaves]
    arrival = state.prepare(captured.structure, specs, strict=True)
    for leaf, target in zip(captured.leaves, arrival.leaves, strict=True):
        target.buffer.write(leaf.buffer.read())
    arrival.adopt()
    return draw(generators)


def test_streams_go_on_bit_for_bit_on_every_rank():
    captured, following = saved_by(3)
    assert [restored(captured, rank, 3) for rank in range(3)] == following


def test_fewer_ranks_get_the_streams_of_the_first():
    captured, following = saved_by(3)
    assert [restored(captured, rank, 2) for rank in range(2)] == following[:2]


def test_ranks_beyond_the_saved_get_streams_of_their_own_the_same_each_time():
    captured, following = saved_by(2)
    seen = [restored(captured, rank, 6) for rank in range(6)]
    assert seen[:2] == following
    assert [restored(captured, rank, 6) for rank in range(6)] == seen
    columns = zip(*seen, strict=True)
    assert all(len({str(value) for value in column}) >= 5 for column in columns)


def test_streams_of_one_new_rank_differ_from_one_another():
    captured, _ = saved_by(1)
    seen = restored(captured, 1, 2)
    floats = [value for value in seen if isinstance(value, float)]
    assert len(set(floats)) == len(floats)


def test_a_save_takes_the_streams_of_its_own_moment():
    generators = own_generators(1)
    state = rank_state(0, 1, generators)
    for _ in range(2):
        captured = state.capture()
        expected = draw(generators)
        assert restored(captured, 0, 1) == expected


def test_taking_the_streams_draws_nothing():
    generators = own_generators(1)
    state = rank_state(0, 1, generators)
    seed_all(1)
    expected = draw(generators)
    seed_all(1)
    generators = own_generators(1)
    state = rank_state(0, 1, generators)
    state.capture()
    assert draw(generators) == expected


def test_state_alone_goes_through_a_file():
    state = RNGState()
    seed_all(5)
    draw({})
    saved = RNGState()
    file = io.BytesIO()
    saved.save(file)
    expected = draw({})
    file.seek(0)
    state.load(file)
    assert draw({}) == expected


def test_only_random_generators_are_taken():
    for wrong in (5, np.random, random, lambda: 0, np.random.PCG64()):
        with pytest.raises(RegistrationError, match="generator 'mine'"):
            RNGState(generators={"mine": wrong})


@pytest.mark.parametrize("structure", [None, {}, {"size": 2}, {"size": 0}, [], "x"])
def test_contents_of_another_state_are_a_mismatch(structure):
    specs = [LeafSpec("rank-00000", "U8", (5,))]
    with pytest.raises(StateMismatchError, match="no random streams"):
        RNGState().prepare(structure, specs, strict=True)


def test_part_that_is_no_json_is_told_as_damage():
    state = RNGState()
    captured = state.capture()
    specs = [leaf.spec for leaf in captured.leaves]
    arrival = state.prepare(captured.structure, specs, strict=True)
    with pytest.raises(CorruptGenerationError, match="'rng'"):
        arrival.adopt()


def test_the_streams_of_all_devices_of_a_rank_come_back(monkeypatch):
    """Against generators of the host in place of those of devices."""
    generators = (torch.Generator(), torch.Generator())
    for number, generator in enumerate(generators):
        generator.manual_seed(number)
    for name, value in {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "init": lambda: None,
        "default_generators": generators,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    assert {"cuda:0", "cuda:1"} <= built_in_streams().keys()
    file = io.BytesIO()
    RNGState().save(file)
    expected = [torch.rand(3, generator=one) for one in generators]
    file.seek(0)
    RNGState().load(file)
    again = [torch.rand(3, generator=one) for one in generators]
    assert all(map(torch.equal, expected, again))
    assert not torch.equal(*expected)
