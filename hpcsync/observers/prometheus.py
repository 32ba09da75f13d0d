"""Metrics for Prometheus: a file for the node exporter's textfile collector, and HTTP.

Names and units are Prometheus's (base units, ``_total``, ``_seconds``, ``_bytes``). Every sample
has the labels ``job`` (name of the run's folder), ``run_id``, ``node`` and ``rank``; scrape with
``honor_labels: true``, or Prometheus calls the first one ``exported_job``. Losses, times and bytes
between nodes are those of the whole job; what a level did is the rank's own.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, cast

from .. import __version__
from ..errors import UserError
from .base import (
    CheckpointRecord,
    LevelDetail,
    Observer,
    RunInfo,
    StepDetail,
    StepRecord,
)
from .series import Family, Series

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry
    from prometheus_client.registry import Collector

# A file a step would be written far more often than it is read.
_EVERY_S = 1.0

_STEPS = (
    *(0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5),
    *(1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0),
)
_TRANSFERS = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, *_STEPS[:-3])
_LEVEL = ("level", "codec")

FAMILIES = (
    Family(
        "run_info",
        "gauge",
        "Always 1; the labels tell what the run is.",
        ("host", "ranks", "nodes", "algorithm", "codec", "version"),
    ),
    Family("running", "gauge", "1 while the run goes on, 0 when it has ended."),
    Family("planned_steps", "gauge", "Steps of the whole run."),
    Family("step", "gauge", "Number of the last step, from 1."),
    Family("steps_total", "counter", "Steps since the start of this process."),
    Family("skipped_steps_total", "counter", "Steps left out: gradients were not finite."),
    Family("last_step_timestamp_seconds", "gauge", "Unix time of the end of the last step."),
    Family("tokens_total", "counter", "Tokens that all ranks trained on.", ("unit",)),
    Family("loss", "gauge", "Training loss of the last step, nats a target."),
    Family("val_loss", "gauge", "Last held-out loss.", ("unit",)),
    Family("learning_rate", "gauge", "Learning rate of the last step."),
    Family("gradient_norm", "gauge", "Norm of all gradients before clipping."),
    Family("loss_scale", "gauge", "Factor on the loss in the last step."),
    Family("step_seconds", "histogram", "Time of a step.", (), _STEPS),
    Family("compute_seconds", "histogram", "Computation in a step.", (), _STEPS),
    Family(
        "aggregation_seconds",
        "histogram",
        "From the first byte of a step's gradients to the last.",
        ("codec",),
        _STEPS,
    ),
    Family(
        "exposed_seconds",
        "histogram",
        "Time in a step for which computation stood still for communication.",
        ("codec",),
        _STEPS,
    ),
    Family("wait_seconds", "histogram", "End of a step until all ranks were there.", (), _STEPS),
    Family("exposed_ratio", "gauge", "Exposed communication over the time of the last step."),
    Family("internode_bytes_total", "counter", "Sent between nodes by all ranks.", ("codec",)),
    Family("data_seconds", "histogram", "Until a step's batches were there.", (), _STEPS),
    Family("update_seconds", "histogram", "Clipping and optimizer in a step.", (), _STEPS),
    Family("sent_bytes_total", "counter", "Sent to other nodes, after coding.", _LEVEL),
    Family("uncoded_bytes_total", "counter", "The same before coding.", _LEVEL),
    Family("transfer_seconds", "histogram", "Time of one transfer.", _LEVEL, _TRANSFERS),
    Family("busy_seconds_total", "counter", "Time with a transfer under way.", _LEVEL),
    Family(
        "throughput_bytes_per_second",
        "gauge",
        "Bytes sent in the last step over its time with a transfer under way.",
        _LEVEL,
    ),
    Family("queue_length", "gauge", "Most buckets that waited at once in the last step."),
    Family("stalls_total", "counter", "Times that no transfer under way moved for a second."),
    Family(
        "checkpoint_seconds",
        "histogram",
        "From the snapshot of a checkpoint until it was whole on disk.",
        (),
        _STEPS,
    ),
    Family(
        "checkpoint_stall_seconds",
        "histogram",
        "Time for which training stood still for a checkpoint.",
        (),
        _STEPS,
    ),
    Family("checkpoint_bytes_total", "counter", "Written into checkpoints by this rank."),
    Family("checkpoint_step", "gauge", "Step of the last checkpoint that is whole."),
    Family("checkpoint_timestamp_seconds", "gauge", "Unix time of the last whole checkpoint."),
    Family("checkpoint_failures_total", "counter", "Checkpoints that were not saved."),
    Family("checkpoint_failed", "gauge", "1 if the last checkpoint was not saved, else 0."),
)


class Prometheus(Observer):
    """Exports from this rank.

    Args:
        textfile: path of a file that is replaced every second; none if empty.
        port: ranks of a node listen on this port and those after it, in their order there;
            none if 0.

    Raises:
        UserError: prometheus_client is not installed.
    """

    def __init__(self, textfile: str = "", port: int = 0) -> None:
        try:
            from prometheus_client import CollectorRegistry
        except ImportError:
            key = "metrics.textfile" if textfile else "metrics.http_port"
            raise UserError(
                f"{key}: needs the package prometheus_client, which is not installed; "
                "pip install 'hpcsync[metrics]', or leave the key out"
            ) from None
        self.registry: CollectorRegistry = CollectorRegistry()
        self._textfile, self._port = textfile, port
        self._series = Series((), {})
        self._close: Callable[[], None] | None = None
        self._info: RunInfo | None = None
        self._written_s = 0.0
        self._warned = False

    def started(self, info: RunInfo) -> None:
        """Begin to export.

        Raises:
            UserError: the file cannot be written, or the port is taken.
        """
        self._info = info
        constant = {
            "job": info.folder.name,
            "run_id": info.run_id,
            "node": str(info.node),
            "rank": str(info.rank),
        }
        self._series = Series(FAMILIES, constant)
        self.registry.register(cast("Collector", self._series))
        self._series.set("run_info", 1.0, *_about(info))
        self._series.set("running", 1.0)
        self._series.set("planned_steps", float(info.steps))
        # Zeros, so that the first one is seen as an increase.
        self._series.add("steps_total", 0.0)
        self._series.add("skipped_steps_total", 0.0)
        self._series.add("checkpoint_failures_total", 0.0)
        if self._textfile:
            try:
                self._write()
            except OSError as error:
                raise UserError(
                    f"metrics.textfile: {self._textfile} cannot be written ({error.strerror}); "
                    "name a file in a folder that is there and that you may write to"
                ) from None
        if self._port:
            self._listen(self._port + info.local_rank)

    def wants_detail(self) -> bool:
        return True

    def measured(self, detail: StepDetail) -> None:
        series = self._series
        if detail.data_s is not None:
            series.observe("data_seconds", detail.data_s)
        if detail.update_s is not None:
            series.observe("update_seconds", detail.update_s)
        if detail.queued is not None:
            series.set("queue_length", detail.queued)
        if detail.stalls is not None:
            series.add("stalls_total", detail.stalls)
        if detail.checkpoint_s is not None:
            series.observe("checkpoint_stall_seconds", detail.checkpoint_s)
        for level in detail.levels:
            self._level(level)

    def _level(self, level: LevelDetail) -> None:
        series, labels = self._series, (level.level, level.codec)
        series.add("sent_bytes_total", level.sent_bytes, *labels)
        if level.plain_bytes is not None:
            series.add("uncoded_bytes_total", level.plain_bytes, *labels)
        series.observe("transfer_seconds", level.transfers_s, *labels)
        series.add("busy_seconds_total", level.busy_s, *labels)
        if level.sent_bytes and level.busy_s:
            rate = level.sent_bytes / level.busy_s
            series.set("throughput_bytes_per_second", rate, *labels)

    def stepped(self, record: StepRecord) -> None:
        series, info = self._series, self._info
        assert info is not None
        series.set("step", record.step)
        series.add("steps_total", 1.0)
        series.add("skipped_steps_total", float(record.skipped))
        series.set("last_step_timestamp_seconds", time.time())
        series.add("tokens_total", info.tokens_per_step, info.unit)
        series.set("loss", record.loss)
        series.set("learning_rate", record.lr)
        series.set("gradient_norm", record.grad_norm)
        series.set("loss_scale", record.loss_scale)
        series.observe("step_seconds", record.step_ms / 1e3)
        series.observe("compute_seconds", record.compute_ms / 1e3)
        series.observe("aggregation_seconds", record.comm_ms / 1e3, record.codec)
        series.observe("exposed_seconds", record.exposed_comm_ms / 1e3, record.codec)
        series.observe("wait_seconds", record.wait_ms / 1e3)
        if record.step_ms:
            series.set("exposed_ratio", record.exposed_comm_ms / record.step_ms)
        series.add("internode_bytes_total", record.internode_bytes, record.codec)
        if time.monotonic() - self._written_s >= _EVERY_S:
            self._refresh()

    def checkpointed(self, record: CheckpointRecord) -> None:
        series = self._series
        series.set("checkpoint_failed", float(record.problem != ""))
        if record.problem:
            series.add("checkpoint_failures_total", 1.0)
            return
        series.observe("checkpoint_seconds", record.durable_s)
        series.add("checkpoint_bytes_total", record.nbytes)
        series.set("checkpoint_step", record.step)
        series.set("checkpoint_timestamp_seconds", time.time())

    def evaluated(self, step: int, loss: float) -> None:
        assert self._info is not None
        self._series.set("val_loss", loss, self._info.val_unit)

    def ended(self, status: str, detail: str) -> None:
        if self._info is None:
            return
        self._series.set("running", 0.0)
        self._refresh()
        if self._close is not None:
            self._close()
            self._close = None

    def _refresh(self) -> None:
        """Write the file; a run of days does not end because a disk is full."""
        if not self._textfile:
            return
        try:
            self._write()
        except OSError as error:
            if not self._warned:
                self._warned = True
                print(
                    f"hpcsync: warning: metrics.textfile: {self._textfile} cannot be written "
                    f"({error.strerror}); the run goes on",
                    file=sys.stderr,
                    flush=True,
                )

    def _write(self) -> None:
        from prometheus_client import write_to_textfile

        self._written_s = time.monotonic()
        write_to_textfile(self._textfile, self.registry)  # aside, and renamed into place

    def _listen(self, port: int) -> None:
        from prometheus_client import start_http_server

        try:
            server, thread = start_http_server(port, registry=self.registry)
        except (OSError, OverflowError) as error:
            raise UserError(
                f"metrics.http_port: cannot listen on port {port} ({error}); set a free one"
            ) from None

        def close() -> None:
            server.shutdown()
            server.server_close()
            thread.join(timeout=5.0)

        self._close = close


def _about(info: RunInfo) -> tuple[str, ...]:
    """Values of the labels of ``run_info``."""
    ranks, nodes = str(info.ranks), str(info.nodes)
    return info.host, ranks, nodes, info.algorithm, info.codec, __version__
