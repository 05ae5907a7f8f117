"""What copies of a context share: trees of spans run by threads and tasks, steps and their rows, observed gauges."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import re
import threading
import tracemalloc
import weakref
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import pytest
from helpers.sources import SmallSource
from hypothesis import given, settings
from hypothesis import strategies as st

from vgen import Generation
from vgen.profiling import Instrument, ProfilingContext, Sink, Span, semconv
from vgen.profiling.sinks.memory import MemorySink
from vgen.testing import FakeEngine

COUNTER = Instrument("tokens", "counter")
GAUGE = Instrument("rate", "gauge")
HISTOGRAM = Instrument("e2e", "histogram", "s")
OBSERVED = Instrument("test.gauge", "gauge")


@dataclass
class Tree:
    """A span to open. How it runs beneath its parent: called there, in a thread, or in a task beside its siblings."""

    how: str
    pause: int
    children: list[Tree] = field(default_factory=list["Tree"])


trees = st.recursive(
    st.builds(Tree, st.sampled_from(["call", "thread", "task"]), st.integers(0, 3)),
    lambda inner: st.builds(
        Tree, st.sampled_from(["call", "thread", "task"]), st.integers(0, 3), st.lists(inner, max_size=4)
    ),
    max_leaves=12,
)


@given(roots=st.lists(trees, min_size=1, max_size=3))
@settings(max_examples=60, deadline=None)
def test_the_recorded_tree_is_the_one_that_was_run(roots: list[Tree]):
    memory = MemorySink()
    profiling = ProfilingContext([memory])
    intended: dict[str, str | None] = {}

    def run(tree: Tree, name: str, pool: ThreadPoolExecutor) -> None:
        with profiling.span(name, {name: 1}) as span:
            assert profiling.current_span() is span
            for _ in range(tree.pause):
                os.sched_yield()
            for number in range(len(tree.children)):
                intended[f"{name}.{number}"] = name
            waits: list[threading.Thread] = []
            for number, child in enumerate(tree.children):
                arguments = (child, f"{name}.{number}", pool)
                if child.how == "thread":
                    waits.append(threading.Thread(target=profiling.carry(run), args=arguments))
                    waits[-1].start()
                elif child.how == "call":
                    run(*arguments)
            tasks = [(c, f"{name}.{n}") for n, c in enumerate(tree.children) if c.how == "task"]
            if tasks:
                asyncio.run(beside(tasks, pool))
            for thread in waits:
                thread.join()
            assert profiling.current_span() is span

    async def run_async(tree: Tree, name: str, pool: ThreadPoolExecutor) -> None:
        async with profiling.span(name, {name: 1}) as span:
            for number in range(len(tree.children)):
                intended[f"{name}.{number}"] = name
            for _ in range(tree.pause):
                await asyncio.sleep(0)
                assert profiling.current_span() is span
            await asyncio.gather(
                *(
                    asyncio.to_thread(run, child, f"{name}.{number}", pool)
                    if child.how == "thread"
                    else run_async(child, f"{name}.{number}", pool)
                    for number, child in enumerate(tree.children)
                )
            )
            assert profiling.current_span() is span

    async def beside(tasks: list[tuple[Tree, str]], pool: ThreadPoolExecutor) -> None:
        await asyncio.gather(*(run_async(child, name, pool) for child, name in tasks))

    with ThreadPoolExecutor(2) as pool:
        for number, root in enumerate(roots):
            intended[str(number)] = None
            run(root, str(number), pool)
    assert profiling.current_span() is None
    spans = {span.name: span for span in memory.spans}
    assert {name: span.parent and span.parent.name for name, span in spans.items()} == intended
    assert len({span.span_id for span in memory.spans}) == len(memory.spans) == len(intended)
    for name, span in spans.items():
        above = [name[:end] for end in range(1, len(name) + 1) if name[end : end + 1] in ("", ".")]
        assert set(span.attributes) == set(above), "attributes are inherited along the tree, and nowhere else"
        if span.parent is not None:
            assert (span.trace_id, span.parent_id) == (span.parent.trace_id, span.parent.span_id)
            assert span.parent.start_ns <= span.start_ns <= span.end_ns <= span.parent.end_ns
    assert not memory.open


# Steps -------------------------------------------------------------------------------------------------------------


def test_a_steps_row_has_its_aggregates_under_flat_names(profiling: ProfilingContext):
    with profiling.step(7) as step:
        for _ in range(3):
            with profiling.span("reward"):
                pass
        profiling.record(COUNTER, 2)
        profiling.record(COUNTER, 3)
        profiling.record(GAUGE, 1.0)
        profiling.record(GAUGE, 0.5)
        profiling.record_many(HISTOGRAM, [1.0, 2.0, 3.0, 4.0])
    row = step.summary()
    assert (row["tokens"], row["rate"], row["e2e.count"], row["e2e.sum"]) == (5, 0.5, 4, 10.0)
    assert (row["e2e.min"], row["e2e.max"]) == (1.0, 4.0)
    assert row["reward.duration.count"] == 3
    leaves = ("count", "sum", "min", "max", "p50", "p90", "p99")
    assert set(row) == {"tokens", "rate"} | {
        f"{name}.{leaf}" for name in ("e2e", "reward.duration", "train.step.duration") for leaf in leaves
    }
    assert row["train.step.duration.sum"] == step.duration
    assert step.attributes[semconv.STEP_NUMBER] == step.number == 7


def test_a_row_is_fixed_at_the_steps_end_and_latecomers_go_to_the_run(profiling: ProfilingContext):
    def late() -> None:
        done.wait(5)
        with profiling.span("late"):
            profiling.record(COUNTER, 10)

    done = threading.Event()
    with profiling.step(1) as step:
        profiling.record(COUNTER, 1)
        assert step.summary()["tokens"] == 1, "before the end it tells what is known so far"
        thread = threading.Thread(target=profiling.carry(late))
        thread.start()
    fixed = step.summary()
    done.set()
    thread.join()
    assert step.summary() == fixed
    assert (fixed["tokens"], "late.duration.count" in fixed) == (1, False)
    assert profiling.summary()["tokens"] == 11
    assert profiling.summary()["late.duration.count"] == 1
    fixed["tokens"] = 0
    assert step.summary()["tokens"] == 1, "what was handed out is a copy"


def test_nothing_is_lost_or_doubled_while_steps_close_under_other_threads(profiling: ProfilingContext):
    """Each value is in its step's row or, when it came too late, in the run alone; and in the run once."""
    rounds, sent = 60, 0
    rows: list[float] = []
    with ThreadPoolExecutor(4) as pool:
        for number in range(rounds):
            with profiling.step(number) as step:
                send = profiling.carry(lambda: [profiling.record(COUNTER, 1) for _ in range(50)])
                waits = [pool.submit(send) for _ in range(4)]
            rows.append(step.summary().get("tokens", 0))
            for wait in waits:
                wait.result()
            sent += 200
    assert profiling.summary()["tokens"] == sent
    assert 0 <= sum(rows) <= sent
    assert profiling.summary()["train.step.duration.count"] == rounds


def test_a_value_belongs_to_the_innermost_step(profiling: ProfilingContext):
    with profiling.step(1) as outer:
        profiling.record(COUNTER, 1)
        with profiling.step(2) as inner:
            profiling.record(COUNTER, 10)
    profiling.record(COUNTER, 100)
    assert (outer.summary()["tokens"], inner.summary()["tokens"]) == (1, 10)
    assert (inner.parent, inner.trace_id) == (outer, outer.trace_id)
    assert profiling.summary()["tokens"] == 111


async def test_steps_in_tasks_keep_apart(profiling: ProfilingContext):
    async def train(number: int) -> Span:
        with profiling.step(number) as step:
            for _ in range(number):
                await asyncio.sleep(0)
                with profiling.span("work") as span:
                    await asyncio.sleep(0)
                profiling.record(COUNTER, number)
                assert (span.step, span.parent) == (step, step)
        assert step.summary()["tokens"] == number * number
        assert step.summary()["work.duration.count"] == number
        return step

    steps = await asyncio.gather(*(train(number) for number in range(1, 6)))
    assert len({step.trace_id for step in steps}) == 5
    assert profiling.summary()["tokens"] == sum(number * number for number in range(1, 6))


# Work that has lost its step ---------------------------------------------------------------------------------------


def span_in_a_thread(profiling: ProfilingContext) -> None:
    with profiling.span("reward"):
        pass


def generate_in_a_thread(profiling: ProfilingContext) -> None:
    with Generation(FakeEngine(), SmallSource(), profiling=profiling) as generation:
        generation.generate([[1]])


MEASURED = {
    "a span": (span_in_a_thread, "reward.duration.count"),
    "a value": (lambda profiling: profiling.record(COUNTER, 1), "tokens"),
    "values": (lambda profiling: profiling.record_many(HISTOGRAM, [1.0, 2.0]), "e2e.count"),
    "a detached span": (lambda profiling: profiling.finish(profiling.detached("reward")), "reward.duration.count"),
    "a generation": (generate_in_a_thread, "vgen.generate.duration.count"),
}
"""What a thread may measure, and where it shows in a summary."""


@pytest.mark.parametrize("how", MEASURED)
def test_a_thread_that_measures_without_the_open_step_is_reported_once(how: str, caplog, profiling: ProfilingContext):
    measure, shown = MEASURED[how]
    with ThreadPoolExecutor(4) as pool:
        for number in (7, 8):
            with profiling.step(number) as step:
                for _ in pool.map(measure, [profiling, profiling.bind(a=1)] * 4):
                    pass
            assert shown not in step.summary()
    [warning] = caplog.messages
    assert re.search(r"^vgen: \S+ was measured without a step, while step 7 is open on another thread", warning)
    assert "profiling.carry(function)" in warning
    assert profiling.summary()[shown] >= 16, "nothing is lost for the run"


@pytest.mark.parametrize("how", MEASURED)
def test_what_is_carried_belongs_to_the_step_and_is_no_reason_to_warn(how: str, caplog, profiling: ProfilingContext):
    measure, shown = MEASURED[how]
    with ThreadPoolExecutor(4) as pool, profiling.step(1) as step:
        for _ in pool.map(profiling.carry(measure), [profiling] * 4):
            pass
    assert step.summary()[shown] >= 4
    assert not caplog.messages


async def test_a_task_that_is_older_than_the_step_is_reported(caplog, profiling: ProfilingContext):
    opened = asyncio.Event()

    async def work() -> None:
        await opened.wait()
        profiling.record(COUNTER, 1)

    task = asyncio.create_task(work())
    with profiling.step(1):
        opened.set()
        await task
    assert len(caplog.messages) == 1


@pytest.mark.parametrize("how", MEASURED)
def test_no_step_is_missed_where_none_is_open(how: str, caplog, profiling: ProfilingContext):
    (measure, _), other = MEASURED[how], ProfilingContext()
    with ThreadPoolExecutor(1) as pool:
        for step in (contextlib.nullcontext(), other.step(1)):
            with step:
                pool.submit(measure, profiling).result()
        with profiling.step(1):
            pool.submit(measure, other).result()
        pool.submit(measure, profiling).result()
        with pytest.raises(KeyError), profiling.step(2):
            raise KeyError
        pool.submit(measure, profiling).result()
    assert not caplog.messages


def test_a_span_that_is_older_than_its_threads_step_is_no_reason_to_warn(caplog, profiling: ProfilingContext):
    stream = profiling.detached("stream")
    with profiling.step(1):
        profiling.finish(stream)
    assert not caplog.messages


def test_metrics_of_an_engine_and_of_the_process_need_no_step(caplog, profiling: ProfilingContext):
    own = [each for each in vars(semconv).values() if isinstance(each, Instrument) and each.name in semconv.STEPLESS]
    with ThreadPoolExecutor(1) as pool, profiling.step(1):
        for instrument in own:
            pool.submit(profiling.record, instrument, 1).result()
    assert len(own) == len(semconv.STEPLESS)
    assert not caplog.messages


@pytest.mark.parametrize("open_step", [True, False])
def test_a_forked_child_misses_no_step_of_its_parent(open_step: bool, caplog, profiling: ProfilingContext):
    def measure() -> tuple[int, float]:
        """Warnings, and what the run has then."""
        thread = threading.Thread(target=profiling.record, args=(COUNTER, 1))
        thread.start()
        thread.join()
        return len(caplog.messages), profiling.summary()["tokens"]

    profiling.record(COUNTER, 5)
    with profiling.step(1) if open_step else contextlib.nullcontext():
        pid = os.fork()
        if pid == 0:
            code = 9
            try:
                before = measure()
                with profiling.step(2):
                    pass
                code = int((before, measure()) != ((0, 1), (0, 2)))
            finally:
                os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        assert measure() == (int(open_step), 6), "the parent's own thread has missed the step"


def test_each_step_is_a_trace_linked_to_the_one_before(profiling: ProfilingContext):
    with profiling.step(1) as first:
        pass
    with profiling.step(2) as second:
        pass
    assert first.trace_id != second.trace_id
    assert not first.links
    assert [(link.trace_id, link.span_id) for link in second.links] == [(first.trace_id, first.span_id)]


def test_sinks_get_each_row_when_it_is_final(profiling: ProfilingContext, memory: MemorySink):
    with profiling.step(3) as step:
        profiling.record(COUNTER, 1)
    assert memory.rows == [(3, step.summary())]
    assert memory.measurements[0].attributes == {semconv.STEP_NUMBER: 3}


def test_memory_stays_flat_over_many_steps():
    """The run's aggregates grow with the number of names, not of steps or values."""
    profiling = ProfilingContext()

    def train(steps: int) -> None:
        for number in range(steps):
            with profiling.step(number), profiling.span("work"):
                profiling.record_many(HISTOGRAM, [1.0 + n / 100 for n in range(100)])
        gc.collect()

    tracemalloc.start()
    train(50)
    before = tracemalloc.get_traced_memory()[0]
    train(200)
    grown = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    assert grown < 100_000


def test_what_is_observed_is_read_at_the_end_of_a_step_into_its_row(profiling: ProfilingContext, memory: MemorySink):
    profiling.bind(engine="a").observe(OBSERVED, iter([1.0, 2.0, 3.0]).__next__)
    with profiling.step(1) as first, profiling.step(2) as second:
        pass
    assert (second.summary()["test.gauge"], first.summary()["test.gauge"]) == (1.0, 2.0)
    assert [m.attributes for m in memory.measurements] == [
        {semconv.STEP_NUMBER: 2, "engine": "a"}, {semconv.STEP_NUMBER: 1, "engine": "a"},
    ]  # fmt: skip
    assert [m.span_id for m in memory.measurements] == [second.span_id, first.span_id]


async def test_a_step_that_is_closed_from_another_task_gets_its_own_gauges(profiling: ProfilingContext):
    async def fixture():
        with profiling.step(1) as step:
            yield step

    profiling.observe(OBSERVED, lambda: 4.0)
    opened = fixture()
    step = await asyncio.create_task(anext(opened))  # type: ignore[arg-type]
    await opened.aclose()
    assert step.summary()["test.gauge"] == 4.0
    assert profiling.summary()["test.gauge"] == 4.0


def test_an_observed_object_is_not_kept_alive(profiling: ProfilingContext):
    class Engine:
        def age(self) -> float:
            return 1.0

    engine = Engine()
    gone = weakref.ref(engine)
    profiling.observe(OBSERVED, engine.age)
    del engine
    gc.collect()
    assert gone() is None
    with profiling.step(1) as step:
        pass
    assert "test.gauge" not in step.summary()


@pytest.mark.fault(
    point="values and callbacks in telemetry",
    did="A gauge's callback raises",
    happens="Its value is missing, with one warning",
    within=20,
)
def test_a_failing_callback_costs_its_value_and_one_warning(profiling: ProfilingContext, caplog):
    def broken() -> float:
        raise OSError("http://user:password@host")

    profiling.observe(OBSERVED, broken)
    profiling.observe(Instrument("test.other", "gauge"), lambda: 7.0)
    for number in range(3):
        with profiling.step(number) as step:
            pass
    assert step.summary()["test.other"] == 7.0
    assert "test.gauge" not in step.summary()
    assert len(caplog.records) == 1
    assert "test.gauge" in caplog.text
    assert "password" not in caplog.text


def test_who_keeps_a_span_does_not_keep_the_context_alive(memory: MemorySink):
    profiling = ProfilingContext([memory])
    with profiling.span("x"):
        pass
    run = weakref.ref(profiling.run)  # which nothing but the context holds
    del profiling
    gc.collect()
    assert run() is None


def test_two_identity_sinks_are_refused():
    class One(MemorySink):
        def identify(self, span: object) -> bool:
            return False

    class Two(One):
        pass

    with pytest.raises(ValueError, match="One and Two"):
        ProfilingContext([One(), Two()])


def test_many_threads_each_have_a_trace_of_their_own(profiling: ProfilingContext, memory: MemorySink):
    barrier = threading.Barrier(8)

    def work() -> None:
        barrier.wait()
        for _ in range(200):
            with profiling.span("outer") as outer, profiling.span("inner") as inner:
                assert inner.parent is outer

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(memory.spans) == 3200
    assert len({span.span_id for span in memory.spans}) == 3200
    assert len({span.trace_id for span in memory.spans}) == 1600
    assert profiling.summary()["outer.duration.count"] == 1600


def test_sinks_hear_of_a_start_in_their_order_and_of_an_end_in_reverse():
    heard = list[str]()

    class Named(Sink):
        inline = True

        def __init__(self, name: str) -> None:
            self.name = name

        def on_start(self, span: Span, attributes: object) -> None:
            heard.append(f"start {self.name}")

        def on_end(self, span: Span) -> None:
            heard.append(f"end {self.name}")

    with ProfilingContext([Named("a"), Named("b"), Named("c")]) as profiling, profiling.span("x"):
        pass
    assert heard == ["start a", "start b", "start c", "end c", "end b", "end a"]
