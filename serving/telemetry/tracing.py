"""OpenTelemetry traces, where its packages are installed (the extra `traces`) and traces are asked for.

A request has the span of OpenTelemetry's FastAPI instrumentation, and below it one for each ask of an engine:
kind, model, heads, items, and the seconds in the engine. They leave in batches for the OTLP collector that
`OTEL_EXPORTER_OTLP_ENDPOINT` names (default http://localhost:4318); the other `OTEL_*` variables hold too. No span
holds a body, a query or a path as the client sent it, because it may contain a sequence.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from serving.telemetry import logs

if TYPE_CHECKING:
    from fastapi import FastAPI

_TYPED = ("http.url", "http.target", "url.full", "url.path", "url.query")


class Tracing:
    """Spans of the asks; nothing where traces are off."""

    def __init__(self) -> None:
        self._provider: Any = None
        self._tracer: Any = None

    def start(self, app: FastAPI) -> None:
        try:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.instrumentation.fastapi import FastAPIInstrumentor
            from opentelemetry.sdk.resources import SERVICE_NAME, OTELResourceDetector, Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
        except ImportError:
            logs.line("traces", state="not installed (pip install 'bioseq[traces]'): no traces")
            return
        # The environment's own name of the service wins over ours.
        resource = Resource.create({SERVICE_NAME: "bioseq"}).merge(OTELResourceDetector().detect())
        self._provider = TracerProvider(resource=resource)
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
        self._tracer = self._provider.get_tracer("bioseq")
        FastAPIInstrumentor.instrument_app(
            app, tracer_provider=self._provider, server_request_hook=_blank, exclude_spans=["receive", "send"]
        )

    def stop(self) -> None:
        """Send what waits; blocks for some seconds at most."""
        if self._provider is not None:
            self._provider.force_flush(5000)
            self._provider.shutdown()

    @contextlib.contextmanager
    def ask(self, kind: str, model: str, heads: tuple[str, ...], items: int) -> Iterator[Any]:
        """The span of one ask of an engine, or None."""
        if self._tracer is None:
            yield None
            return
        with self._tracer.start_as_current_span(f"engine {kind}", record_exception=False) as span:
            span.set_attribute("bioseq.model", model)
            span.set_attribute("bioseq.heads", list(heads))
            span.set_attribute("bioseq.items", items)
            yield span


def _blank(span: Any, scope: dict[str, Any]) -> None:
    if span is not None and span.is_recording():
        for name in _TYPED:
            if name in (span.attributes or {}):
                span.set_attribute(name, "")
