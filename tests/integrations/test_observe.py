# SPDX-License-Identifier: Apache-2.0
"""Saves and restores reach the tools of `mpi_ckpt.integrations.observe`: the real ones.

`scripts/observe_tests` installs all of them; a tool that is not there is skipped.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings

import numpy as np
import pytest

from mpi_ckpt import ArrayState, Hooks
from mpi_ckpt.integrations import observe
from tests.waiting import limit

# They come with warnings of their own, from Python or from what they import.
pytestmark = pytest.mark.filterwarnings("ignore")


def tool(name: str):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip(name, reason=f"{name}: scripts/observe_tests brings it")


def train(manage, hooks: Hooks, root):
    """Save twice and restore; a hook that fails would only be a warning."""
    failures = []
    manager = manage(ArrayState("a", {"x": np.ones(1000)}), root=root, hooks=hooks)
    observer = manager._session.observer
    real = observer._call

    def call(name, report):
        for function in hooks.functions(name):
            try:
                function(report)
            except Exception as error:
                failures.append(error)
        return real("none of them", report) if failures else None

    observer._call = call
    observer._hooks = hooks
    for step in (10, 20):
        manager.save(step, metrics={"loss": 1 / step})
    manager.restore()
    assert failures == []
    return manager


def test_tensorboard_gets_scalars_at_their_steps(manage, tmp_path):
    tool("tensorboard")
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(tmp_path / "tb") as writer:
        train(manage, observe.tensorboard(writer), tmp_path / "c")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tb"))
    events.Reload()
    losses = [
        (e.step, round(e.value, 3)) for e in events.Scalars("checkpoint/metrics/loss")
    ]
    assert losses == [(10, 0.1), (20, 0.05)]
    assert {"checkpoint/seconds/total", "checkpoint/bytes_written"} <= set(
        events.Tags()["scalars"]
    )
    (restored,) = events.Scalars("checkpoint/restored_generation")
    assert (restored.step, restored.value) == (20, 2)


def test_prometheus_reads_the_file(manage, tmp_path):
    tool("prometheus_client")
    from prometheus_client.parser import text_string_to_metric_families

    path = tmp_path / "mpi_ckpt.prom"
    train(manage, observe.prometheus(path, job="train"), tmp_path / "c")
    found = {
        (sample.name, sample.labels["kind"]): sample.value
        for family in text_string_to_metric_families(path.read_text())
        for sample in family.samples
        if sample.labels.get("job") == "train"
    }
    assert found["mpi_ckpt_operations_total", "save"] == 2
    assert found["mpi_ckpt_operations_total", "restore"] == 1
    assert found["mpi_ckpt_last", "save step"] == 20
    assert found["mpi_ckpt_last", "save metrics/loss"] == 0.05
    assert found["mpi_ckpt_last_seconds", "save total"] > 0
    assert found["mpi_ckpt_last_timestamp_seconds", "save"] > 1e9


def test_opentelemetry_gets_spans_and_histograms(manage, tmp_path):
    tool("opentelemetry.sdk")
    from opentelemetry.sdk.metrics import MeterProvider
    from opentelemetry.sdk.metrics.export import InMemoryMetricReader
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    spans, reader = InMemorySpanExporter(), InMemoryMetricReader()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(spans))
    meters = MeterProvider(metric_readers=[reader])
    hooks = observe.opentelemetry(provider.get_tracer("t"), meters.get_meter("m"))
    train(manage, hooks, tmp_path)
    ended = spans.get_finished_spans()
    assert [span.name for span in ended] == [
        "checkpoint.save", "checkpoint.save", "checkpoint.restore",
    ]  # fmt: skip
    assert ended[1].attributes["checkpoint.step"] == 20
    assert all(span.end_time > span.start_time for span in ended)
    (scope,) = reader.get_metrics_data().resource_metrics[0].scope_metrics
    points = {
        (metric.name, point.attributes["operation"]): point.count
        for metric in scope.metrics
        for point in metric.data.data_points
        if point.attributes.get("phase", "total") == "total"
    }
    assert points["checkpoint.duration", "save"] == 2
    assert points["checkpoint.duration", "restore"] == 1
    assert ("checkpoint.size", "save") in points
    provider.shutdown()
    meters.shutdown()


WANDB = """
import json, sys
import numpy as np
import wandb
from mpi4py import MPI
from mpi_ckpt import ArrayState, CheckpointManager, Options
from mpi_ckpt.integrations import observe

root = sys.argv[1]
run = wandb.init(mode="offline", dir=root, project="p")
for step in range(3):
    run.log({"mine": step}, step=step)
options = Options(hooks=observe.wandb(run))
states = [ArrayState("a", {"x": np.ones(1000)})]
with CheckpointManager(root + "/c", states, comm=MPI.COMM_SELF, options=options) as manager:
    for step in (10, 20):
        manager.save(step, metrics={"loss": 1 / step})
    manager.restore()
run.log({"mine": 3}, step=3)
print(json.dumps({name: run.summary[name] for name in run.summary.keys()}))
run.finish()
"""


def test_wandb_gets_rows_offline(tmp_path):
    """In a process of its own: it leaves threads and a service behind until its end."""
    tool("wandb")
    done = subprocess.run(
        [sys.executable, "-c", WANDB, str(tmp_path)],
        env={**os.environ, "WANDB_SILENT": "true"},
        capture_output=True,
        text=True,
        timeout=limit(120),
    )
    assert done.returncode == 0, done.stderr
    assert "has failed" not in done.stderr
    summary = json.loads(done.stdout.splitlines()[-1])
    assert summary["checkpoint/generation"] == 2
    assert summary["checkpoint/restored_generation"] == 2
    assert summary["checkpoint/metrics/loss"] == 0.05
    assert "mine" in summary
    (record,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    assert b"checkpoint/metrics/loss" in record.read_bytes()


def test_mlflow_gets_metrics_at_their_steps(manage, tmp_path, monkeypatch):
    mlflow = tool("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    client = mlflow.MlflowClient(tracking_uri=(tmp_path / "mlruns").as_uri())
    run_id = client.create_run(client.create_experiment("e")).info.run_id
    train(manage, observe.mlflow(client, run_id), tmp_path / "c")
    history = client.get_metric_history(run_id, "checkpoint/metrics/loss")
    assert [(one.step, one.value) for one in history] == [(10, 0.1), (20, 0.05)]
    assert client.get_run(run_id).data.metrics["checkpoint/restored_generation"] == 2


def test_other_ranks_need_no_tools():
    hooks = (observe.tensorboard(None) | observe.wandb(None) | observe.mlflow(None)) | (
        observe.opentelemetry() | observe.prometheus(None)
    )
    assert hooks.functions("on_save") == hooks.functions("on_restore") == []


def test_facts_are_numbers(manage):
    report = manage(ArrayState("a", {"x": np.ones(10)})).save(7, metrics={"loss": 0.5})
    facts = observe.save_facts(report)
    assert json.loads(json.dumps(facts)) == facts
    assert facts["checkpoint/step"] == 7
    assert facts["checkpoint/metrics/loss"] == 0.5
    assert all(isinstance(value, (int, float)) for value in facts.values())
