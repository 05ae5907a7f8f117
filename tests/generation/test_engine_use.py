"""Who may use an engine: generations share it or wait, and a call that would cut them off waits or is refused."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
from helpers.waiting import wait_until

from vgen import EngineStateError
from vgen.engine_protocol import EngineState, StateMachine
from vgen.generation.engine_use import EngineUse


@pytest.fixture
def states() -> StateMachine:
    made = StateMachine()
    made.move("construction", EngineState.AWAKE)
    return made


@pytest.fixture
def servers(states: StateMachine) -> EngineUse:
    return EngineUse(states, concurrent=True)


@pytest.fixture
def in_process(states: StateMachine) -> EngineUse:
    return EngineUse(states, concurrent=False)


@pytest.fixture(params=["servers", "in_process"])
def use(request: pytest.FixtureRequest) -> EngineUse:
    return request.getfixturevalue(request.param)


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(8) as made:
        yield made


@contextmanager
def another(pool: ThreadPoolExecutor, reservation) -> Iterator[threading.Event]:
    """Another thread holds the reservation until the block ends, or until the event that this yields."""
    inside, end = threading.Event(), threading.Event()

    def hold() -> None:
        with reservation:
            inside.set()
            assert end.wait(30)

    held = pool.submit(hold)
    try:
        assert inside.wait(30)
        yield end
    finally:
        end.set()
        held.result(30)


def generate(use: EngineUse) -> None:
    with use.generating("generate"):
        pass


def fall_asleep(use: EngineUse, states: StateMachine, wait_seconds: float) -> None:
    with use.alone("sleep", wait_seconds):
        states.move("sleep", EngineState.ASLEEP)


def test_what_would_cut_a_generation_off_is_refused_until_it_has_ended(use, states, pool):
    with another(pool, use.generating("generate")), pytest.raises(EngineStateError) as caught:
        fall_asleep(use, states, 0.0)
    assert caught.value.state == "generating for a call of another thread"
    assert "sleep(wait_seconds=...)" in caught.value.hint
    generate(use)  # a refusal holds nothing back
    fall_asleep(use, states, 0.0)


def test_the_refusal_counts_the_calls(servers, states, pool):
    with (
        another(pool, servers.generating("generate")),
        another(pool, servers.generating("stream")),
        pytest.raises(EngineStateError, match="generating for 2 calls of other threads after"),
    ):
        fall_asleep(servers, states, 0.01)


def test_it_waits_for_generations_and_lets_none_begin(use, states, pool):
    with another(pool, use.generating("generate")) as end:
        sleeping = pool.submit(fall_asleep, use, states, 30.0)
        wait_until(lambda: use.held_back)
        late = [pool.submit(generate, use) for _ in range(3)]
        end.set()
        sleeping.result(30)
    for each in late:
        with pytest.raises(EngineStateError, match="asleep: call wake_up"):
            each.result(30)


def test_generations_that_were_held_back_go_on_after_a_refusal(use, states, pool):
    with another(pool, use.generating("generate")) as end:
        sleeping = pool.submit(fall_asleep, use, states, 0.2)
        wait_until(lambda: use.held_back)
        late = pool.submit(generate, use)
        with pytest.raises(EngineStateError):
            sleeping.result(30)
        end.set()
        late.result(30)


def test_it_does_not_wait_for_its_own_thread(use, states):
    with use.generating("stream"), pytest.raises(EngineStateError, match="a stream that this thread has open"):
        fall_asleep(use, states, 1000.0)


def test_it_waits_for_other_calls_too(use, states, pool):
    with another(pool, use.exclusive("sync_weights")) as end:
        with pytest.raises(EngineStateError, match="at work in another thread"):
            fall_asleep(use, states, 0.0)
        sleeping = pool.submit(fall_asleep, use, states, 30.0)
        wait_until(lambda: use.held_back)
        end.set()
        sleeping.result(30)


def test_a_generation_within_another_of_its_thread_is_not_held_back(servers, states, pool):
    """Else it would wait for a call that waits for its own thread."""
    with servers.generating("stream"):
        sleeping = pool.submit(fall_asleep, servers, states, 30.0)
        wait_until(lambda: servers.held_back)
        generate(servers)
    sleeping.result(30)


def test_generations_share_servers_and_take_turns_in_process(servers, in_process, pool):
    with another(pool, servers.generating("generate")):
        generate(servers)
    with another(pool, in_process.generating("generate")) as end:
        second = pool.submit(generate, in_process)
        assert not second.done()
        end.set()
        second.result(30)
