# SPDX-License-Identifier: Apache-2.0
"""A migration is one trace whatever restarts in between, and each log line says which."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator

import pytest
import structlog
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from services.common import telemetry


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No endpoint from outside; the root logger as it was."""
    for name in ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("GODWIT_LOG", "json")
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    structlog.reset_defaults()


def trace_id(traceparent: str) -> str:
    return traceparent.split("-")[1]


def test_without_an_endpoint_traceparents_are_still_handed_on() -> None:
    with telemetry.configured("test"):
        stored = telemetry.new_traceparent()
        assert telemetry.is_traceparent(stored)
        assert telemetry.new_traceparent() != stored
        with telemetry.span("phase", traceparent=stored):
            assert trace_id(telemetry.current_traceparent()) == trace_id(stored)
    assert telemetry.current_traceparent() == ""


def test_spans_are_children_of_the_stored_traceparent() -> None:
    exporter = InMemorySpanExporter()
    with telemetry.configured("test", exporter=exporter):
        stored = telemetry.new_traceparent(vm="web")
    # Another process, later.
    later = InMemorySpanExporter()
    with telemetry.configured("test", exporter=later):
        with telemetry.span("switchover", traceparent=stored, attempt=1):
            inner = telemetry.current_traceparent()
        with pytest.raises(KeyError), telemetry.span("postcopy", traceparent=stored):
            raise KeyError("x")
    (root,) = exporter.get_finished_spans()
    switchover, postcopy = later.get_finished_spans()
    assert root.context is not None
    assert root.parent is None
    assert root.attributes == {"vm": "web"}
    for span in (switchover, postcopy):
        assert span.parent is not None
        assert span.parent.span_id == root.context.span_id
    assert switchover.context is not None
    assert f"{switchover.context.span_id:016x}" == inner.split("-")[2]
    assert [event.name for event in postcopy.events] == ["exception"]
    assert switchover.resource.attributes["service.name"] == "godwit-test"


def test_a_malformed_traceparent_fails_nothing() -> None:
    exporter = InMemorySpanExporter()
    with (
        telemetry.configured("test", exporter=exporter),
        telemetry.span("phase", traceparent="00-junk"),
    ):
        pass
    (span,) = exporter.get_finished_spans()
    assert span.parent is None


@pytest.mark.parametrize(
    "text",
    ["", "00-" + "0" * 32 + "-" + "1" * 16 + "-01", "00-" + "1" * 32 + "-" + "0" * 16 + "-01",
     "00-" + "A" * 32 + "-" + "1" * 16 + "-01", "01-" + "1" * 32 + "-" + "1" * 16 + "-01"],
)  # fmt: skip
def test_what_is_no_traceparent(text: str) -> None:
    assert not telemetry.is_traceparent(text)
    assert telemetry.traceparent_of({"traceparent": text}) == ""


@pytest.mark.parametrize("through", ["logging", "structlog"])
def test_a_log_line_is_json_and_names_its_trace(
    capsys: pytest.CaptureFixture[str], through: str
) -> None:
    stored = telemetry.new_traceparent()
    with telemetry.configured("test"), telemetry.span("phase", traceparent=stored):
        if through == "logging":
            logging.getLogger("a.b").warning("vm %s paused", "web", extra={"epoch": 7})
        else:
            structlog.get_logger("a.b").warning("vm web paused", epoch=7)
    (line,) = capsys.readouterr().err.splitlines()
    event = json.loads(line)
    assert (event["event"], event["level"], event["logger"]) == ("vm web paused", "warning", "a.b")
    assert (event["epoch"], event["service"]) == (7, "test")
    assert event["trace_id"] == trace_id(stored)


def test_an_exception_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    telemetry.configure_logging("test")
    try:
        raise KeyError("x")
    except KeyError:
        logging.getLogger("a").exception("failed")
    (line,) = capsys.readouterr().err.splitlines()
    assert "KeyError" in json.loads(line)["exception"]


def test_an_endpoint_from_the_environment_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """The exporter is made and shut down; that nobody listens there fails nothing."""
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "0.1")
    with telemetry.configured("test"):
        assert telemetry.is_traceparent(telemetry.new_traceparent())
    monkeypatch.setenv("OTEL_SDK_DISABLED", "true")
    with telemetry.configured("test"):
        assert telemetry.is_traceparent(telemetry.new_traceparent())
