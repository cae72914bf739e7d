"""Prometheus metrics. Every process keeps its own registry; with several, each sends its text to a board (an
actor), and /metrics joins what all have sent, told apart by the label `process`.

Labels are routes, statuses, models and heads as registered: never anything that a user typed.
"""

from __future__ import annotations

import re
from typing import Any

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
    generate_latest,
)

disable_created_metrics()
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_LATENCY = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60, 120, 300, 600)
_FILL = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 1.0)


class IngressMetrics:
    """What the HTTP side counts."""

    def __init__(self) -> None:
        self.registry = r = CollectorRegistry()
        self.requests = Counter("bioseq_requests", "Answered requests.", ["route", "status"], registry=r)
        self.latency = Histogram(
            "bioseq_request_seconds",
            "From the first byte to the last.",
            ["route"],
            buckets=_LATENCY,
            registry=r,
        )
        self.in_flight = Gauge("bioseq_requests_in_flight", "Requests being answered.", registry=r)
        self.items = Counter(
            "bioseq_items", "Sequences or variants asked for.", ["route", "model"], registry=r
        )
        self.tokens = Counter("bioseq_request_tokens", "Tokens asked for.", ["route", "model"], registry=r)
        self.head_items = Counter("bioseq_head_items", "Predictions asked for.", ["head"], registry=r)
        self.refused = Counter("bioseq_refused", "Requests answered with an error.", ["code"], registry=r)

    def text(self) -> str:
        return generate_latest(self.registry).decode()


class EngineMetrics:
    """What an engine counts: an `engine.Observer`."""

    def __init__(self) -> None:
        self.registry = r = CollectorRegistry()
        self.batches = Counter("bioseq_engine_batches", "Batches run.", ["model"], registry=r)
        self.sequences = Counter("bioseq_engine_sequences", "Sequences run.", ["model"], registry=r)
        self.tokens = Counter("bioseq_engine_tokens", "Tokens run.", ["model"], registry=r)
        self.busy = Counter(
            "bioseq_engine_busy_seconds", "Seconds in batches: its rate is utilisation.", registry=r
        )
        self.fill = Histogram(
            "bioseq_engine_batch_fill", "Tokens of a batch over the budget.", buckets=_FILL, registry=r
        )
        self.queue = Histogram(
            "bioseq_engine_queue_seconds",
            "A request's wait before its first batch.",
            buckets=_LATENCY,
            registry=r,
        )
        self.overloads = Counter("bioseq_engine_refused", "Requests refused for overload.", registry=r)
        self.cancelled = Counter("bioseq_engine_dropped", "Sequences dropped by cancellation.", registry=r)
        self.queued = Gauge("bioseq_engine_queued_tokens", "Tokens waiting.", registry=r)
        self.memory = Gauge("bioseq_engine_memory_bytes", "Resident memory of the engine.", registry=r)
        self.cpu = Counter("bioseq_engine_cpu_seconds", "CPU time of the engine's process.", registry=r)
        self._cpu_before = 0.0

    def batch(self, runner: Any, items: int, tokens: int, budget: int, seconds: float) -> None:
        model = str(getattr(runner, "name", "?"))
        self.batches.labels(model).inc()
        self.sequences.labels(model).inc(items)
        self.tokens.labels(model).inc(tokens)
        self.busy.inc(seconds)
        self.fill.observe(tokens / max(budget, 1))

    def waited(self, seconds: float) -> None:
        self.queue.observe(seconds)

    def refused(self) -> None:
        self.overloads.inc()

    def dropped(self, items: int) -> None:
        self.cancelled.inc(items)

    def text(self, queued_tokens: int = 0) -> str:
        import psutil

        process = psutil.Process()
        times = process.cpu_times()
        used = times.user + times.system
        self.cpu.inc(max(0.0, used - self._cpu_before))
        self._cpu_before = used
        self.queued.set(queued_tokens)
        self.memory.set(process.memory_info().rss)
        return generate_latest(self.registry).decode()


_SAMPLE = re.compile(r"^([a-zA-Z_:][a-zA-Z0-9_:]*)(\{(.*)\})? (.+)$")


def join(texts: dict[str, str]) -> str:
    """One exposition of several processes' texts: families together, each sample with its `process`."""
    heads: dict[str, list[str]] = {}
    samples: dict[str, list[str]] = {}
    for process, text in texts.items():
        family = ""
        for row in text.splitlines():
            if row.startswith("# "):
                _, kind, name = row.split(" ", 3)[:3]
                family = name
                if (
                    kind in ("HELP", "TYPE")
                    and sum(h.startswith(f"# {kind} ") for h in heads.get(name, [])) == 0
                ):
                    heads.setdefault(name, []).append(row)
                continue
            found = _SAMPLE.match(row)
            if found:
                name, _, labels, value = found.groups()
                inner = f'process="{process}"' + (f",{labels}" if labels else "")
                samples.setdefault(family, []).append(f"{name}{{{inner}}} {value}")
    out: list[str] = []
    for family, rows in samples.items():
        out += heads.get(family, []) + rows
    return "\n".join(out) + "\n"
