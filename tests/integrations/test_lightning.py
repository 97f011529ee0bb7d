# SPDX-License-Identifier: Apache-2.0
"""What of the integration with Lightning needs neither MPI nor a training."""

from __future__ import annotations

import sys
import warnings
from types import SimpleNamespace

import pytest

from mpi_ckpt.errors import (
    LaunchError,
    NoCheckpointError,
    OptionsError,
    StageError,
    StateMismatchError,
)
from mpi_ckpt.integrations import lightning
from mpi_ckpt.integrations.lightning import package
from mpi_ckpt.integrations.lightning.trainer_state import TrainerState

torch = pytest.importorskip("torch")

CHECKPOINT = {
    "global_step": 7,
    "state_dict": {"weight": torch.arange(6.0).reshape(2, 3), "flag": torch.tensor(True)},
    "callbacks": {"saver": {"best": torch.tensor(0.5), "paths": {"a": torch.tensor(1)}}},
    "hyper_parameters": {"rate": 1e-3, "sizes": (1, 2)},
    "loops": {"fit_loop": {"state": {}}},
}


@pytest.fixture(autouse=True, scope="module")
def pl():
    """Lightning, which takes seconds to import: sessions that only collect do without."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what Lightning and its dependencies warn of
        return pytest.importorskip("lightning.pytorch")


def test_public_names_are_importable():
    for name in lightning.__all__:
        assert getattr(lightning, name).__name__ == name
    assert dir(lightning) == lightning.__all__
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = lightning.nonsense


def test_lightning_takes_them_for_its_own(pl):
    from lightning.fabric.plugins.environments import LightningEnvironment

    checkpoints = lightning.MPICheckpoint("somewhere")
    assert isinstance(checkpoints, pl.callbacks.Checkpoint)
    assert isinstance(lightning.MPICheckpointIO(), pl.plugins.CheckpointIO)
    trainer = pl.Trainer(
        accelerator="cpu", devices=1, logger=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[checkpoints, pl.callbacks.Timer()],
        plugins=[LightningEnvironment()],  # looks for no other
    )  # fmt: skip
    # Last, so that it saves what others have done; and none of Lightning's is added.
    assert trainer.callbacks[-1] is checkpoints
    assert trainer.checkpoint_callbacks == [checkpoints]


def test_plugin_gives_back_what_it_was_given(tmp_path):
    plugin = lightning.MPICheckpointIO()
    plugin.save_checkpoint(CHECKPOINT, str(tmp_path / "a.ckpt"))
    found = plugin.load_checkpoint(tmp_path / "a.ckpt")
    torch.testing.assert_close(found["state_dict"], CHECKPOINT["state_dict"])
    torch.testing.assert_close(found["callbacks"], CHECKPOINT["callbacks"])
    for key in ("global_step", "hyper_parameters", "loops"):
        assert found[key] == CHECKPOINT[key]
    plugin.remove_checkpoint(tmp_path / "a.ckpt")
    assert list(tmp_path.iterdir()) == []


def test_objects_are_refused_unless_pickle_is_asked_for(tmp_path):
    checkpoint = {**CHECKPOINT, "hyper_parameters": {"kind": SimpleNamespace(a=1)}}
    careful, trusting = lightning.MPICheckpointIO(), lightning.MPICheckpointIO(pickle=True)
    with pytest.raises(StageError, match=r"hyper_parameters/kind is of .*\(ignore="):
        careful.save_checkpoint(checkpoint, tmp_path)
    trusting.save_checkpoint(checkpoint, tmp_path)
    assert trusting.load_checkpoint(tmp_path)["hyper_parameters"]["kind"].a == 1
    with pytest.raises(StateMismatchError, match="saved with pickle=True"):
        careful.load_checkpoint(tmp_path)


def test_file_of_lightning_is_read_without_running_code(tmp_path):
    path = tmp_path / "old.ckpt"
    plugin = lightning.MPICheckpointIO()
    torch.save(CHECKPOINT, path)
    assert plugin.load_checkpoint(path)["global_step"] == 7
    torch.save({"object": SimpleNamespace(a=1)}, path)
    with pytest.raises(Exception, match="weights_only"):
        plugin.load_checkpoint(path)
    plugin.remove_checkpoint(path)
    assert not path.exists()


def test_plugin_tells_of_what_it_cannot_do(tmp_path):
    plugin = lightning.MPICheckpointIO()
    with pytest.raises(NoCheckpointError, match="no checkpoint"):
        plugin.load_checkpoint(tmp_path / "missing.ckpt")
    with pytest.raises(OptionsError, match="local paths only"):
        plugin.save_checkpoint(CHECKPOINT, "s3://bucket/a.ckpt")
    with pytest.raises(OptionsError, match="no storage_options"):
        plugin.save_checkpoint(CHECKPOINT, tmp_path, storage_options={})


def test_lightning_of_another_form_is_refused():
    trainer = SimpleNamespace(_checkpoint_connector=SimpleNamespace(dump_checkpoint=None))
    with pytest.raises(
        LaunchError, match=r"makes its checkpoints in another way.*restore_model"
    ):
        TrainerState(trainer)


def test_strategy_without_replicas_is_refused(pl):
    class Sharded(pl.strategies.FSDPStrategy):
        """Made without its __init__: FSDP wants a GPU."""

    trainer = SimpleNamespace(strategy=pl.strategies.FSDPStrategy.__new__(Sharded))
    with pytest.raises(LaunchError, match="Sharded does not keep a replica on each rank"):
        lightning.MPICheckpoint("somewhere").setup(trainer, None, "fit")


def test_without_lightning_it_is_told_how_to_get_it(monkeypatch):
    for name in list(sys.modules):
        if name.partition(".")[0] in ("lightning", "pytorch_lightning"):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "lightning", None)
    monkeypatch.setitem(sys.modules, "pytorch_lightning", None)
    with pytest.raises(LaunchError, match=r"pip install 'mpi_ckpt\[lightning\]'"):
        package.classes("callbacks")


@pytest.mark.parametrize("kept", [1, 3])
def test_plugin_saves_behind_the_training_in_lightnings_thread(pl, tmp_path, kept):
    from lightning.fabric.plugins.environments import LightningEnvironment
    from lightning.pytorch.plugins.io import AsyncCheckpointIO

    class Model(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(2, 1)
            self.steps = []

        def training_step(self, batch, number):
            self.steps.append(number)
            loss = self.layer(batch).square().mean()
            self.log("loss", loss)
            return loss

        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters(), lr=0.1)

    def train(epochs, **how):
        model, plugin = Model(), lightning.MPICheckpointIO()
        saver = pl.callbacks.ModelCheckpoint(
            tmp_path, monitor="loss", save_top_k=kept, save_last=True, every_n_train_steps=1
        )
        trainer = pl.Trainer(
            max_epochs=epochs, accelerator="cpu", devices=1, logger=False,
            enable_progress_bar=False, enable_model_summary=False, callbacks=[saver],
            plugins=[LightningEnvironment(), AsyncCheckpointIO(plugin)],
        )  # fmt: skip
        loader = torch.utils.data.DataLoader(torch.randn(8, 2), batch_size=2)
        trainer.fit(model, loader, **how)
        return model

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Lightning's, of loaders without workers
        first = train(3)
        names = {path.name for path in tmp_path.iterdir()}
        for name in names:
            assert lightning.MPICheckpointIO().load_checkpoint(tmp_path / name)
        saved = lightning.MPICheckpointIO().load_checkpoint(tmp_path / "last.ckpt")
        second = train(4, ckpt_path=tmp_path / "last.ckpt")
    assert len(first.steps) == 12
    # Lightning removes at once what its thread may still have to write.
    assert len(names) >= kept + 1
    assert saved["global_step"] == 12
    torch.testing.assert_close(saved["state_dict"], dict(first.state_dict()))
    assert len(second.steps) == 4
