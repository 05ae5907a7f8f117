"""OpenTelemetry's current span, on all threads and tasks: while vgen's spans are open, and afterwards."""

from __future__ import annotations

import asyncio
import logging
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from helpers.files import python_output
from helpers.otel_tracing import Traced, current_name
from opentelemetry import baggage, context

from vgen.profiling import ProfilingContext
from vgen.profiling.sinks.otel import OTelSink

pytestmark = pytest.mark.usefixtures("nothing_is_left_current")


def test_other_values_of_the_context_stay_in_force(traced: Traced):
    token = context.attach(baggage.set_baggage("tenant", "a"))
    with traced.profiling.span("outer"), traced.profiling.span("inner"):
        assert baggage.get_baggage("tenant") == "a"
    assert baggage.get_baggage("tenant") == "a"
    context.detach(token)


async def test_tasks_nest_apart(traced: Traced):
    async def rollout(number: int) -> None:
        async with traced.profiling.span(f"rollout {number}"):
            await asyncio.sleep(0.01)
            with traced.profiling.span(f"request {number}"):
                await asyncio.sleep(0.01)
                assert current_name() == f"request {number}"

    with traced.profiling.span("generate"):
        await asyncio.gather(*(rollout(number) for number in range(5)))
    parents = traced.parents()
    assert all(parents[f"request {n}"] == f"rollout {n}" and parents[f"rollout {n}"] == "generate" for n in range(5))


def test_threads_that_are_carried_into_lie_beneath_the_open_span(traced: Traced):
    def reward(number: int) -> None:
        with traced.profiling.span(f"reward {number}"):
            assert current_name() == f"reward {number}"

    with ThreadPoolExecutor(4) as pool:
        with traced.profiling.span("rewards"):
            list(pool.map(traced.profiling.carry(reward), range(8)))
        pool.submit(reward, 99).result()
    parents = traced.parents()
    assert {parents[f"reward {number}"] for number in range(8)} == {"rewards"}
    assert parents["reward 99"] is None


def test_a_span_that_ends_on_another_thread_logs_nothing_and_leaves_nothing_current(traced: Traced, caplog: Any):
    held = traced.profiling.span("held")

    def begin() -> None:
        held.__enter__()
        worker_context.append(context.get_current())

    worker_context: list[Any] = []
    thread = threading.Thread(target=begin)
    thread.start()
    thread.join()
    with caplog.at_level(logging.DEBUG):
        with traced.profiling.span("mine"):
            held.__exit__(None, None, None)
            assert current_name() == "mine"
        assert current_name() is None
    assert "held" in traced.spans()
    assert not caplog.records


def test_what_another_thread_ended_is_not_the_parent_of_another_contexts_spans(traced: Traced):
    held = traced.profiling.span("held")
    held.__enter__()
    thread = threading.Thread(target=held.__exit__, args=(None, None, None))
    thread.start()
    thread.join()
    assert current_name() == "held", "no other thread can change what is current here"
    other = ProfilingContext([OTelSink(traced.provider)])
    with other.span("later") as later:
        assert later.parent_id is None
    assert current_name() is None


async def test_a_span_that_ends_in_another_task_logs_nothing(traced: Traced, caplog: Any):
    held = traced.profiling.span("held")

    async def begin() -> None:
        held.__enter__()

    async def finish() -> None:
        held.__exit__(None, None, None)

    with caplog.at_level(logging.DEBUG, "opentelemetry"), traced.profiling.span("outer"):
        await asyncio.create_task(begin())
        await asyncio.create_task(finish())
        assert current_name() == "outer"
    assert traced.parents()["held"] == "outer"
    assert not caplog.records


def test_spans_that_end_in_the_wrong_order_leave_nothing_behind(traced: Traced):
    first, second = traced.profiling.span("first"), traced.profiling.span("second")
    with traced.profiling.span("outer"):
        first.__enter__()
        second.__enter__()
        first.__exit__(None, None, None)
        second.__exit__(None, None, None)
        assert current_name() == "outer"
    with traced.profiling.span("later"):
        pass
    assert traced.parents() == {"outer": None, "first": "outer", "second": "first", "later": None}


def test_a_forked_child_goes_on_beneath_the_open_span():
    code = """
import os, sys
from opentelemetry import context
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from vgen.profiling import ProfilingContext
from vgen.profiling.sinks.otel import OTelSink
exporter, provider = InMemorySpanExporter(), TracerProvider(shutdown_on_exit=False)
provider.add_span_processor(SimpleSpanProcessor(exporter))
profiling = ProfilingContext([OTelSink(provider)])
with profiling.span("outer") as outer:
    child = os.fork()
    with profiling.span("inner") as inner:
        assert inner.parent_id == outer.span_id
    if child:
        assert os.waitpid(child, 0)[1] == 0
with profiling.span("later") as later:
    assert later.parent_id is None
if not child:
    assert [span.name for span in exporter.get_finished_spans()] == ["inner", "later"]
    assert not context.get_current()
    os._exit(0)
assert [span.name for span in exporter.get_finished_spans()] == ["inner", "outer", "later"]
assert not context.get_current()
print("well")
"""
    assert python_output(code) == "well\n"
