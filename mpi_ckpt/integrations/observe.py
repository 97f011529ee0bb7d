# SPDX-License-Identifier: Apache-2.0
"""Makes hooks that send saves and restores to the tools with which people watch trainings.

Each function takes an object of the tool that the program has made on root, and returns
`Hooks`. On ranks where that is None, the hooks are empty. Not collective. No MPI. A tool
that fails is logged as a warning, as any hook is.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from mpi_ckpt.hooks import Hooks

if TYPE_CHECKING:
    from collections.abc import Callable
    from os import PathLike

    from mpi_ckpt.reports import RestoreReport, SaveReport

__all__ = ["mlflow", "opentelemetry", "prometheus", "tensorboard", "wandb"]

_PREFIX = "checkpoint"


def tensorboard(writer: Any) -> Hooks:  # noqa: ANN401 (torch's, or tensorboardX's)
    """Return hooks that add a scalar for each fact of a save, at its step.

    Args:
        writer: A ``SummaryWriter`` of torch or tensorboardX; None on other ranks.
    """

    def on_save(report: SaveReport) -> None:
        for name, value in save_facts(report).items():
            writer.add_scalar(name, value, report.step)
        writer.flush()  # a job may be killed after its last save

    def on_restore(report: RestoreReport) -> None:
        for name, value in restore_facts(report).items():
            writer.add_scalar(name, value, report.step)
        writer.flush()

    return Hooks() if writer is None else Hooks(on_save=on_save, on_restore=on_restore)


def wandb(run: Any) -> Hooks:  # noqa: ANN401 (a Run of wandb)
    """Return hooks that add the facts of a save to the run's next row, and to its summary.

    They do not end a row, so they do not disturb the steps of the program's own calls.

    Args:
        run: The result of ``wandb.init``; an offline run too. None on other ranks.
    """

    def send(facts: dict[str, float]) -> None:
        run.log(facts, commit=False)
        run.summary.update(facts)

    return _sending(send) if run is not None else Hooks()


def mlflow(client: Any, run_id: str = "") -> Hooks:  # noqa: ANN401 (an MlflowClient)
    """Return hooks that log a metric for each fact of a save, at its step.

    Args:
        client: An ``MlflowClient``; None on other ranks.
        run_id: The id of the run.

    Raises:
        ImportError: On the calling rank, without mlflow.
    """
    if client is None:
        return Hooks()
    from mlflow.entities import Metric

    def send(facts: dict[str, float]) -> None:
        step, now = int(facts[f"{_PREFIX}/step"]), int(1000 * time.time())
        metrics = [Metric(name, value, now, step) for name, value in facts.items()]
        client.log_batch(run_id, metrics)

    return _sending(send)


def opentelemetry(
    tracer: Any = None,  # noqa: ANN401 (a Tracer)
    meter: Any = None,  # noqa: ANN401 (a Meter)
) -> Hooks:
    """Return hooks that make a span, and record histograms, for each save and restore.

    Args:
        tracer: A ``Tracer``; None for no spans.
        meter: A ``Meter``; None for no histograms.
    """
    record: list[Callable[[str, dict[str, float], dict[str, float]], None]] = []
    if meter is not None:
        durations = meter.create_histogram(f"{_PREFIX}.duration", unit="s")
        sizes = meter.create_histogram(f"{_PREFIX}.size", unit="By")

        def measure(what: str, seconds: dict[str, float], nbytes: dict[str, float]) -> None:
            for phase, spent in seconds.items():
                durations.record(spent, {"operation": what, "phase": phase})
            for kind, count in nbytes.items():
                sizes.record(count, {"operation": what, "kind": kind})

        record.append(measure)

    def note(what: str, report: SaveReport | RestoreReport, **nbytes: float) -> None:
        seconds = dict(report.seconds)
        for one in record:
            one(what, seconds, nbytes)
        if tracer is not None:
            end = time.time_ns()
            facts = save_facts(report) if what == "save" else restore_facts(report)  # type: ignore[arg-type]
            span = tracer.start_span(
                f"{_PREFIX}.{what}",
                start_time=end - round(1e9 * seconds["total"]),
                attributes={name.replace("/", "."): value for name, value in facts.items()},
            )
            span.end(end_time=end)

    def on_save(report: SaveReport) -> None:
        note("save", report, written=report.bytes_written, reused=report.bytes_reused)

    def on_restore(report: RestoreReport) -> None:
        note("restore", report, read=report.bytes_read)

    if tracer is None and meter is None:
        return Hooks()
    return Hooks(on_save=on_save, on_restore=on_restore)


def prometheus(path: str | PathLike[str] | None, **labels: str) -> Hooks:
    """Return hooks that rewrite a text file for Prometheus after each save and restore.

    Needs prometheus_client. The node exporter's text file collector reads the file, whose
    name ends in ``.prom``; it is replaced as a whole.

    Args:
        path: The file; None on other ranks.
        labels: Labels of all values, such as ``job="train"``.

    Raises:
        ImportError: On the calling rank, without prometheus_client.
    """
    if path is None:
        return Hooks()
    from prometheus_client import CollectorRegistry, Counter, Gauge, write_to_textfile

    registry = CollectorRegistry()

    def gauge(name: str, text: str) -> Any:  # noqa: ANN401 (a Gauge)
        return Gauge(f"mpi_ckpt_{name}", text, ["kind", *labels], registry=registry)

    ended = gauge("last_timestamp_seconds", "When the last one was acknowledged")
    seconds = gauge("last_seconds", "Seconds of the last one")
    numbers = gauge("last", "Facts of the last one")
    names = ["kind", *labels]
    total = Counter("mpi_ckpt_operations", "Since the job began", names, registry=registry)

    def send(what: str, facts: dict[str, float]) -> None:
        total.labels(what, *labels.values()).inc()
        ended.labels(what, *labels.values()).set(time.time())
        for name, value in facts.items():
            _, _, short = name.partition("/")
            if short.startswith("seconds/"):
                phase = short.removeprefix("seconds/")
                seconds.labels(f"{what} {phase}", *labels.values()).set(value)
            else:
                numbers.labels(f"{what} {short}", *labels.values()).set(value)
        write_to_textfile(str(path), registry)

    return Hooks(
        on_save=lambda report: send("save", save_facts(report)),
        on_restore=lambda report: send("restore", restore_facts(report)),
    )


def save_facts(report: SaveReport) -> dict[str, float]:
    """Return the numbers of a save by name. Pure."""
    return {
        **{f"{_PREFIX}/metrics/{name}": value for name, value in report.metrics.items()},
        **{f"{_PREFIX}/seconds/{name}": spent for name, spent in report.seconds.items()},
        f"{_PREFIX}/bytes_written": report.bytes_written,
        f"{_PREFIX}/bytes_reused": report.bytes_reused,
        f"{_PREFIX}/generation": report.generation,
        f"{_PREFIX}/step": int(report.step),
        f"{_PREFIX}/ranks": report.size,
        f"{_PREFIX}/leaves_differing": sum(map(len, report.sync.differing.values())),
    }


def restore_facts(report: RestoreReport) -> dict[str, float]:
    """Return the numbers of a restore by name. Pure."""
    return {
        **{
            f"{_PREFIX}/restore_seconds/{name}": spent
            for name, spent in report.seconds.items()
        },
        f"{_PREFIX}/bytes_read": report.bytes_read,
        f"{_PREFIX}/restored_generation": report.generation,
        f"{_PREFIX}/step": int(report.step),
        f"{_PREFIX}/ranks": report.size,
    }


def _sending(send: Callable[[dict[str, float]], None]) -> Hooks:
    return Hooks(
        on_save=lambda report: send(save_facts(report)),
        on_restore=lambda report: send(restore_facts(report)),
    )
