"""The NVTX sink: against a domain that keeps the rules of push and pop, and against the real library."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import sys
import threading
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vgen.errors import MissingExtraError
from vgen.profiling import ProfilingContext
from vgen.profiling.sinks.nvtx import NvtxSink


class Domain:
    """NVTX's rules: a pop takes the top of its own thread's stack; a range of the process ends by its id."""

    def __init__(self) -> None:
        self.events: list[str] = []
        self.stacks: dict[int, list[str]] = {}
        self.ranges: dict[int, str] = {}

    def push_range(self, *, message: str) -> None:
        self.stacks.setdefault(threading.get_ident(), []).append(message)
        self.events.append(f"push {message}")

    def pop_range(self) -> None:
        self.events.append(f"pop {self.stacks[threading.get_ident()].pop()}")

    def start_range(self, *, message: str) -> int:
        handle = len(self.events)
        self.ranges[handle] = message
        self.events.append(f"start {message}")
        return handle

    def end_range(self, handle: int) -> None:
        self.events.append(f"end {self.ranges.pop(handle)}")

    @property
    def open(self) -> int:
        return sum(map(len, self.stacks.values())) + len(self.ranges)


@pytest.fixture
def domain() -> Domain:
    return Domain()


@pytest.fixture
def profiling(domain: Domain) -> ProfilingContext:
    return ProfilingContext([NvtxSink(domain)])


def test_nested_spans_are_nested_ranges(profiling: ProfilingContext, domain: Domain) -> None:
    with profiling.step(0), profiling.span("a"), profiling.span("b"):
        pass
    assert domain.events == ["push train.step", "push a", "push b", "pop b", "pop a", "pop train.step"]


def test_an_exception_ends_the_ranges_too(profiling: ProfilingContext, domain: Domain) -> None:
    with pytest.raises(ValueError, match="x"), profiling.span("a"), profiling.span("b"):
        raise ValueError("x")
    assert domain.open == 0


def test_a_thread_has_a_stack_of_its_own(profiling: ProfilingContext, domain: Domain) -> None:
    with profiling.span("a"):
        inner = profiling.carry(profiling.span("b")(lambda: None))
        thread = threading.Thread(target=inner)
        thread.start()
        thread.join()
    assert domain.events == ["push a", "push b", "pop b", "pop a"]
    assert len(domain.stacks) == 2


def test_tasks_that_take_turns_do_not_cross_each_others_ranges(profiling: ProfilingContext, domain: Domain) -> None:
    async def task(name: str) -> None:
        with profiling.span(name):
            await asyncio.sleep(0)

    async def both() -> None:
        with profiling.span("outer"):
            await asyncio.gather(task("a"), task("b"))

    asyncio.run(both())
    assert domain.events == ["push outer", "push a", "start b", "pop a", "end b", "pop outer"]


def test_a_span_that_ends_on_another_thread_leaves_the_stack_of_its_own(
    profiling: ProfilingContext, domain: Domain
) -> None:
    opened = profiling.span("a")
    opened.__enter__()
    thread = threading.Thread(target=opened.__exit__, args=(None, None, None))
    thread.start()
    thread.join()
    assert domain.events == ["push a"]
    with profiling.span("b"):
        pass
    assert domain.events == ["push a", "pop a", "push b", "pop b"]


def test_rebuilt_spans_are_left_out(profiling: ProfilingContext, domain: Domain) -> None:
    now = time.monotonic_ns()
    profiling.rebuilt("vgen.request", now - 1000, now)
    assert domain.events == []


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(-6, 3), max_size=30))
def test_ends_in_any_order_never_end_another_spans_range(actions: list[int]) -> None:
    domain = Domain()
    profiling = ProfilingContext([NvtxSink(domain)])
    opened: list[tuple[str, Any]] = []
    ended: set[str] = set()
    for i, action in enumerate(actions):
        if action >= 0 or not opened:
            maker = profiling.span(f"s{i}")
            maker.__enter__()
            opened.append((f"s{i}", maker))
        else:
            name, maker = opened.pop(action % len(opened))
            ended.add(name)
            maker.__exit__(None, None, None)
        gone = {event.split()[1] for event in domain.events if event.startswith(("pop", "end"))}
        assert gone <= ended
    while opened:
        opened.pop()[1].__exit__(None, None, None)
    assert domain.open == 0
    names = [event.split()[1] for event in domain.events]
    assert all(names.count(name) == 2 for name in names)


def test_several_threads_at_once(domain: Domain, profiling: ProfilingContext) -> None:
    def work(n: int) -> None:
        for _ in range(200):
            with ExitStack() as stack:
                for depth in range(4):
                    stack.enter_context(profiling.span(f"{n}.{depth}"))

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert domain.open == 0
    assert len(domain.events) == 4 * 200 * 4 * 2


def test_without_nvtx_the_message_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nvtx", None)
    with pytest.raises(MissingExtraError, match=r"NvtxSink needs nvtx: pip install 'vgen\[nvtx\]'"):
        NvtxSink()


def test_without_a_profiler_it_does_nothing() -> None:
    with ProfilingContext([NvtxSink()]) as profiling, profiling.step(0), profiling.span("a"):
        pass
    assert profiling.dropped() == {}


# What a profiler loads into the process (NVTX_INJECTION64_PATH): it puts its functions into NVTX's table.
TOOL = r"""
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
struct attributes { uint16_t version, size; uint32_t category; int32_t color_type; uint32_t color;
                    int32_t payload_type, reserved; uint64_t payload; int32_t message_type; const char *message; };
struct callbacks { size_t size; int (*table)(int, void (****)(void), unsigned *); };
static FILE *out;
static void *create(const char *name) { return strdup(name); }
static void *string(void *domain, const char *text) { return strdup(text); }
static int push(char *domain, struct attributes *a) { fprintf(out, "%s push %s\n", domain, a->message); return 0; }
static int pop(char *domain) { fprintf(out, "%s pop\n", domain); return 0; }
static uint64_t start(char *domain, struct attributes *a) {
    fprintf(out, "%s start %s\n", domain, a->message); return 7; }
static void end(char *domain, uint64_t id) { fprintf(out, "%s end %d\n", domain, (int)id); }
int InitializeInjectionNvtx2(const void *(*export)(uint32_t)) {
    void (***core)(void); unsigned size;
    out = fopen(getenv("NVTX_LOG"), "w"); setvbuf(out, NULL, _IOLBF, 0);
    if (!((const struct callbacks *)export(1))->table(5, &core, &size)) return 0;
    *core[2] = (void (*)(void))start; *core[3] = (void (*)(void))end; *core[4] = (void (*)(void))push;
    *core[5] = (void (*)(void))pop; *core[10] = (void (*)(void))string; *core[12] = (void (*)(void))create;
    return 1;
}
"""

CHILD = """
import asyncio
from vgen.profiling import ProfilingContext
from vgen.profiling.sinks.nvtx import NvtxSink

profiling = ProfilingContext([NvtxSink()])

async def task(name):
    with profiling.span(name):
        await asyncio.sleep(0)

async def both():
    with profiling.span("outer"):
        await asyncio.gather(task("a"), task("b"))

asyncio.run(both())
"""


@pytest.mark.skipif(shutil.which("gcc") is None, reason="no gcc here to build the tool that listens to NVTX")
def test_a_real_tool_sees_the_ranges(tmp_path: Path) -> None:
    (tmp_path / "tool.c").write_text(TOOL)
    build = ["gcc", "-shared", "-fPIC", "-w", "-o", "tool.so", "tool.c"]
    subprocess.run(build, cwd=tmp_path, check=True, timeout=60)
    log = tmp_path / "log"
    env = {**os.environ, "NVTX_INJECTION64_PATH": str(tmp_path / "tool.so"), "NVTX_LOG": str(log)}
    subprocess.run([sys.executable, "-c", CHILD], env=env, check=True, timeout=60)
    lines = [line.removeprefix("vgen ") for line in log.read_text().splitlines() if line.startswith("vgen ")]
    assert lines == ["push outer", "push a", "start b", "pop", "end 7", "pop"]
