# SPDX-License-Identifier: Apache-2.0
"""Logs and traces of a process.

Logs go to stderr through the standard `logging`: JSON, or coloured text on a terminal, each line
with the trace it belongs to. GODWIT_LOG=json|console and GODWIT_LOG_LEVEL choose.

Traces go where the OTEL_* environment says (OTLP over gRPC); without an endpoint nothing is
recorded, but traceparents are still handed on, so that a service that does record joins the trace.
A migration has one stored traceparent, and every span is a short child of it: a span that lasts as
long as the migration would be lost with the process that opened it.
Source: https://www.w3.org/TR/trace-context/; OpenTelemetry's environment variable specification.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import secrets
import sys
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from opentelemetry import trace
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from services.common.lean import without

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SpanExporter

with without("rich"):  # a quarter of a second at every start, for tracebacks in colour
    import structlog

TRACEPARENT = "traceparent"
"""Key of the trace context in gRPC metadata and HTTP headers."""

_TRACEPARENT = re.compile(r"00-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}")
_ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
_TIMEOUT = "OTEL_EXPORTER_OTLP_TIMEOUT"
_TIMEOUT_S = 2.0
_PROPAGATOR = TraceContextTextMapPropagator()

AttributeValue = str | bool | int | float


class _Process:
    """The provider in force. One a process, as `configured` is entered by main alone."""

    provider: TracerProvider | None = None


def _exporter_from_env() -> SpanExporter | None:
    if os.environ.get("OTEL_SDK_DISABLED", "").lower() == "true":
        return None
    if not any(os.environ.get(name) for name in _ENDPOINTS):
        return None
    # Imported late: it costs a tenth of a second that commands without tracing need not pay.
    from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter

    # A collector that is away must not hold up the end of a process that a supervisor restarts.
    return OTLPSpanExporter(timeout=float(os.environ.get(_TIMEOUT, _TIMEOUT_S)))


@contextlib.contextmanager
def configured(service: str, *, exporter: SpanExporter | None = None) -> Iterator[None]:
    """Log and trace as `service` for the length of the block; spans are flushed at its end.

    `exporter` stands in for what the environment says (tests).
    """
    configure_logging(service)
    exporter = exporter or _exporter_from_env()
    if exporter is None:
        yield
        return
    # Late, as above.
    from opentelemetry.sdk.resources import SERVICE_NAME, Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    name = os.environ.get("OTEL_SERVICE_NAME") or f"godwit-{service.replace('_', '-')}"
    provider = TracerProvider(resource=Resource.create({SERVICE_NAME: name}))
    provider.add_span_processor(BatchSpanProcessor(exporter))
    _Process.provider = provider
    try:
        yield
    finally:
        _Process.provider = None
        provider.shutdown()


def _add_trace(
    _logger: object, _method: str, event: structlog.typing.EventDict
) -> structlog.typing.EventDict:
    context = trace.get_current_span().get_span_context()
    if context.is_valid:
        event["trace_id"] = f"{context.trace_id:032x}"
        event["span_id"] = f"{context.span_id:016x}"
    return event


def configure_logging(service: str) -> None:
    """Point the root logger, and structlog, at stderr in the house format."""

    def add_service(
        _logger: object, _method: str, event: structlog.typing.EventDict
    ) -> structlog.typing.EventDict:
        event["service"] = service
        return event

    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.stdlib.ExtraAdder(),
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        add_service,
        _add_trace,
    ]
    style = os.environ.get("GODWIT_LOG") or ("console" if sys.stderr.isatty() else "json")
    render: list[structlog.typing.Processor]
    if style == "console":
        render = [structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty())]
    else:
        render = [structlog.processors.format_exc_info, structlog.processors.JSONRenderer()]
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *render],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(os.environ.get("GODWIT_LOG_LEVEL", "INFO").upper())
    structlog.configure(
        processors=[
            structlog.stdlib.filter_by_level,
            structlog.stdlib.PositionalArgumentsFormatter(),
            *shared,
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=False,
    )


def is_traceparent(text: str) -> bool:
    """True if `text` is a W3C traceparent of version 00 with ids that are not zero."""
    return _TRACEPARENT.fullmatch(text) is not None


def new_traceparent(name: str = "migration", **attributes: AttributeValue) -> str:
    """Begin a trace and return what is to be stored with the work it describes.

    Its root span ends at once, so that it is exported whatever becomes of this process.
    """
    if _Process.provider is None:
        # Sampled: whoever records downstream shall.
        return f"00-{secrets.token_hex(16)}-{secrets.token_hex(8)}-01"
    root = _tracer().start_span(name, context=trace.set_span_in_context(trace.INVALID_SPAN))
    root.set_attributes(attributes)
    root.end()
    carrier: dict[str, str] = {}
    _PROPAGATOR.inject(carrier, context=trace.set_span_in_context(root))
    return carrier[TRACEPARENT]


def _tracer() -> trace.Tracer:
    provider = _Process.provider or trace.NoOpTracerProvider()
    return provider.get_tracer("godwit")


@contextlib.contextmanager
def span(name: str, *, traceparent: str = "", **attributes: AttributeValue) -> Iterator[trace.Span]:
    """A span around the block: a child of the stored `traceparent`, else of the current span.

    A malformed traceparent starts a trace of its own: telemetry never fails the work it watches.
    An exception is recorded and raised on.
    """
    context = _PROPAGATOR.extract({TRACEPARENT: traceparent}) if traceparent else None
    with _tracer().start_as_current_span(name, context=context, attributes=attributes) as current:
        yield current


def current_traceparent() -> str:
    """The traceparent of the current span, for what is started or called on its behalf; or ""."""
    carrier: dict[str, str] = {}
    _PROPAGATOR.inject(carrier)
    return carrier.get(TRACEPARENT, "")


def traceparent_of(metadata: Mapping[str, str] | None) -> str:
    """The valid traceparent in the metadata of a request, or ""."""
    value = (metadata or {}).get(TRACEPARENT, "")
    return value if is_traceparent(value) else ""
