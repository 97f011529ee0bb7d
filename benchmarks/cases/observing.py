# SPDX-License-Identifier: Apache-2.0
"""What it costs that a save is seen: log, journal, hooks of real tools, a timeline.

A disk varies by more between two saves than all of this takes, so what a save does for
people is timed alone, too, beside the save that it belongs to.
"""

from __future__ import annotations

import json
import logging
import os
from contextlib import contextmanager
from importlib.util import find_spec
from typing import TYPE_CHECKING

from benchmarks import names
from benchmarks.cases.save import our_save
from benchmarks.harness import Contender, Group
from mpi_ckpt import Hooks
from mpi_ckpt.engine.observer import VARIABLE
from mpi_ckpt.integrations import observe

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from benchmarks.setting import Setting
    from mpi_ckpt import CheckpointManager, SaveReport

__all__ = ["groups"]


def groups(setting: Setting) -> Iterator[Group]:
    """See the module."""
    unseen, plain = setting.manager("unseen"), setting.manager("plain")
    _blind(unseen)
    setting.on_root(lambda: (setting.directory / "tools").mkdir(exist_ok=True))()
    hooks, count = _all_hooks(setting.directory / "tools", is_root=setting.is_root)
    with _timeline(setting.directory / "timeline.json"):
        seen = setting.manager("seen", hooks=hooks)
    logging.getLogger("mpi_ckpt.engine.observer").setLevel(logging.INFO)
    managers = {names.SAVE_UNSEEN: unseen, names.SAVE: plain, names.SAVE_SEEN: seen}
    contenders = [our_save(name, setting, one) for name, one in managers.items()]
    first, *others = contenders
    yield Group("save", setting.nbytes, [_as_ceiling(first), *others])
    setting.touch()
    report = seen.save().wait()
    yield Group(
        "reporting alone",
        setting.nbytes,
        [
            Contender(names.SAVE_UNSEEN, unseen.save, setting.touch, ceiling=True),
            Contender(
                names.REPORTING,
                lambda: _report(seen, report),
                values=lambda _: {"tools": count},
            ),
        ],
    )


def _report(manager: CheckpointManager, report: SaveReport) -> None:
    """Do again what a save does for people: phases, the report itself, the timeline."""
    session = manager._session  # noqa: SLF001 (what a save calls in between)
    clock = session.observer.begin("saving")
    for phase in ("sync", "write", "publish"):
        with clock.phase(phase):
            pass
    session.observer.pause(clock)
    session.observer.note_save(report)
    session.timeline.flush()


def _blind(manager: CheckpointManager) -> None:
    observer = manager._session.observer  # noqa: SLF001 (there is no option for it)
    observer.note_save = lambda report: None  # type: ignore[method-assign]  # noqa: ARG005
    observer._show = lambda: None  # type: ignore[method-assign]  # noqa: SLF001


def _all_hooks(folder: Path, *, is_root: bool) -> tuple[Hooks, int]:
    """Return hooks for every tool that is installed, and how many there are."""
    if not is_root:
        return Hooks(), 0
    lines = folder / "saves.jsonl"

    def append(report: SaveReport) -> None:
        with lines.open("a") as file:
            file.write(json.dumps(observe.save_facts(report)) + "\n")

    hooks, count = Hooks(on_save=append), 1
    if find_spec("prometheus_client"):
        hooks, count = hooks | observe.prometheus(folder / "saves.prom"), count + 1
    if find_spec("tensorboard"):
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(str(folder / "tensorboard"))
        hooks, count = hooks | observe.tensorboard(writer), count + 1
    if find_spec("opentelemetry"):
        from opentelemetry.sdk.metrics import MeterProvider
        from opentelemetry.sdk.trace import TracerProvider

        tracer, meter = TracerProvider().get_tracer("b"), MeterProvider().get_meter("b")
        hooks, count = hooks | observe.opentelemetry(tracer, meter), count + 1
    if find_spec("wandb"):
        import wandb

        run = wandb.init(mode="offline", dir=str(folder), project="benchmarks")
        hooks, count = hooks | observe.wandb(run), count + 1
    if find_spec("mlflow"):
        os.environ["MLFLOW_ALLOW_FILE_STORE"] = "true"
        import mlflow

        client = mlflow.MlflowClient(tracking_uri=(folder / "mlruns").as_uri())
        run_id = client.create_run(client.create_experiment("b")).info.run_id
        hooks, count = hooks | observe.mlflow(client, run_id), count + 1
    return hooks, count


@contextmanager
def _timeline(path: Path) -> Iterator[None]:
    os.environ[VARIABLE] = str(path)
    try:
        yield
    finally:
        del os.environ[VARIABLE]


def _as_ceiling(one: Contender) -> Contender:
    return Contender(one.name, one.run, one.before, one.after, one.values, ceiling=True)
