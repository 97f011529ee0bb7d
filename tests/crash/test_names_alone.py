# SPDX-License-Identifier: Apache-2.0
"""Power cuts while checkpoints come and go by name, as Lightning's do."""

from __future__ import annotations

import random

import numpy as np
import pytest

from mpi_ckpt.integrations.lightning.single_state import (
    load_alone,
    remove_alone,
    save_alone,
)
from mpi_ckpt.states.arrays import ArrayState
from mpi_ckpt.storage import filesystem
from tests.crash.crashes import ROOT, Run, Scenario, quiet_scratch, record, saved_image
from tests.crash.replay import crash_images, write_image
from tests.crash.world import empty
from tests.draws import SEED


def state_at(step: int) -> ArrayState:
    return ArrayState("lightning", {"w": np.full(3000, step)})


def recorded() -> Scenario:
    """A name made, replaced, another made, the first of them removed."""
    base, saves = saved_image([1])

    def program(run: Run) -> None:
        folder = run.root / "checkpoints"
        save_alone(folder / "last.ckpt", state_at(1), 1)
        save_alone(folder / "epoch=1.ckpt", state_at(1), 1)
        save_alone(folder / "last.ckpt", state_at(2), 2)
        remove_alone(folder / "epoch=1.ckpt")
        save_alone(folder / "epoch=2.ckpt", state_at(2), 2)

    return record(Scenario("names", base, saves=saves, acked=0), program)


def test_every_name_that_is_there_can_be_loaded_and_saved_again():
    scenario = recorded()
    looked_at = 0
    with quiet_scratch() as sandbox:
        for _, _, image in crash_images(
            scenario.base, scenario.ops, random.Random(SEED), samples=10
        ):
            empty(sandbox)
            write_image(image, sandbox)
            folder = sandbox / ROOT / "checkpoints"
            for path in folder.glob("*.ckpt"):
                looked_at += 1
                state = state_at(0)
                load_alone(path, state)
                assert state.arrays["w"][0] in (1, 2)
            if looked_at % 20 == 0:
                # The next save of a name takes away what the last one left of it.
                for name in ("last.ckpt", "epoch=1.ckpt"):
                    save_alone(folder / name, state_at(3), 3)
                left = [path.name for path in folder.iterdir() if path.name[0] == "."]
                assert all(name.startswith(".epoch=2") for name in left)
    assert looked_at > 100


def test_one_that_is_being_written_is_left_alone(tmp_path, monkeypatch):
    path = tmp_path / "last.ckpt"
    real, seen = filesystem.rename_new, []

    def another_comes_first(source, target):
        if target == path and not seen:
            seen.append(source)
            save_alone(path, state_at(2), 2)  # sweeps, and must not take our own
            assert source.exists()
        real(source, target)

    monkeypatch.setattr(filesystem, "rename_new", another_comes_first)
    with pytest.raises(Exception, match=r"last\.ckpt"):
        save_alone(path, state_at(1), 1)
    state = state_at(0)
    load_alone(path, state)
    assert state.arrays["w"][0] == 2
    assert [path.name for path in tmp_path.iterdir()] == ["last.ckpt"]
