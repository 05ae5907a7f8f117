"""`ServerGeneration` with the real `vgen serve`: weights, traces, requests in flight, takeovers."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from helpers.changed_source import ChangedSource, one_wrong
from helpers.transfers import K_PROJ, wrong_shape
from helpers.waiting import wait_until

from vgen import (
    EngineError,
    ProfilingContext,
    PromptError,
    Sampling,
    ServerConnection,
    ServerGeneration,
    WeightSyncError,
    WeightSyncOptions,
)
from vgen.demo import max_logprob_difference
from vgen.engine_protocol import EngineState
from vgen.engines.server.launcher import start_server
from vgen.engines.server.server_process import ServerProcess
from vgen.profiling import semconv
from vgen.testing import MemorySink
from vgen.weights.load.random_weights import RandomWeights

WARM = [list(range(100)), "a prompt"]
LONG = Sampling(max_tokens=400, ignore_eos=True)


def randomize(model: torch.nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.05)


def connect(
    server: Any, source: ChangedSource | None = None, timeout: float = 120.0, takeover: bool = False, **more: Any
) -> ServerGeneration:
    connection = ServerConnection(timeout=timeout, takeover=takeover)
    keys = {"api_key": server.api_key, "control_key": server.control_key, "processing_class": server.tokenizer}
    return ServerGeneration(
        source or server.model, base_urls=[server.base_url], connection=connection, **{**keys, **more}
    )


@pytest.fixture(scope="module")
def sink() -> MemorySink:
    return MemorySink()


@pytest.fixture(scope="module")
def profiling(sink) -> ProfilingContext:
    return ProfilingContext([sink])


@pytest.fixture(scope="module")
def source(server) -> ChangedSource:
    return ChangedSource(server.model)


@pytest.fixture(scope="module")
def generation(server, source, profiling) -> Iterator[ServerGeneration]:
    with connect(server, source, profiling=profiling) as made:
        made.sync_weights()  # tests of other files have changed the model
        yield made


def test_the_first_sync_is_verified_after_random_weights(generation, sink, monkeypatch):
    assert sink.named(semconv.WEIGHT_SYNC)[0].attributes[semconv.VERIFY] == "logprobs"
    passes = []
    own = RandomWeights.__iter__
    monkeypatch.setattr(RandomWeights, "__iter__", lambda weights: passes.append(1) or own(weights))
    generation.sync_weights()
    assert (passes, sink.named(semconv.WEIGHT_SYNC)[-1].attributes.get(semconv.VERIFY)) == ([], None)
    generation.engine.endpoints[0].verified = False  # as after it was started anew
    generation.sync_weights()
    assert (passes, sink.named(semconv.WEIGHT_SYNC)[-1].attributes[semconv.VERIFY]) == ([1], "logprobs")


def test_a_paused_server_is_verified_when_it_resumes(server, generation, source, sink, monkeypatch):
    generation.engine.endpoints[0].verified = False
    generation.pause()
    passes = []
    own = RandomWeights.__iter__
    with monkeypatch.context() as patched:
        patched.setattr(RandomWeights, "__iter__", lambda weights: passes.append(1) or own(weights))
        for number in (1, 2):  # the second sync is as unverified as the first
            generation.sync_weights()
            assert sink.named(semconv.WEIGHT_SYNC)[-1].attributes[semconv.VERIFY] == "deferred"
            assert (
                len(passes) == number
            )  # random weights first: stale weights cannot pass because the checkpoint was the same
    randomize(server.model)  # the optimizer may step before the resume: the weights that were sent count
    generation.resume()
    assert sink.named(semconv.RESUME)[-1].attributes[semconv.VERIFY] == "logprobs"
    assert sink.named(semconv.SYNC_VERIFY)[-1].parent is sink.named(semconv.RESUME)[-1]
    generation.pause()
    with source.changed_by(one_wrong):
        generation.sync_weights(verify="logprobs")
    with pytest.raises(WeightSyncError, match="log-probabilities"):
        generation.resume()
    assert generation.state == EngineState.FAILED
    generation.sync_weights()
    assert (
        sink.named(semconv.WEIGHT_SYNC)[-1].attributes[semconv.VERIFY] == "logprobs"
    )  # without being asked, because the last verification failed
    assert max_logprob_difference(server.model, generation.generate(WARM, Sampling(max_tokens=8))) <= 1e-4


def test_a_servers_present_weights_are_verified_on_request_and_after_its_first_sleep(server, generation, sink):
    generation.sync_weights()
    report, endpoint = generation.verify("bits"), generation.engine.endpoints[0]
    assert (report.how, "only while a sync sends them" in report.reason) == ("logprobs", True)
    assert [each.engine for each in report.engines] == [endpoint.name]
    assert 0 < report.ratio < report.bound
    randomize(server.model)  # training goes on
    with pytest.raises(WeightSyncError, match="times the rounding noise") as caught:
        generation.verify()
    assert (caught.value.phase, caught.value.receiver) == ("verify", endpoint.name)
    endpoint.slept.clear()
    for expected in ("logprobs", None):
        generation.sleep(1)
        generation.wake_up()
        assert sink.named(semconv.WAKE_UP)[-1].attributes.get(semconv.VERIFY) == expected
    generation.sync_weights()
    assert generation.verify().ratio < report.bound


@pytest.mark.fault(
    point="a weight sync of a generation",
    did="Wrong weights reach a real server",
    happens="The sync fails until they are right",
    within=300,
)
def test_weights_that_differ_from_the_trainers_fail_the_sync_until_they_are_right(server, generation, source, sink):
    with (
        source.changed_by(one_wrong),
        pytest.raises(WeightSyncError, match="log-probabilities") as caught,
    ):
        generation.sync_weights(verify="logprobs")
    assert (caught.value.phase, caught.value.receiver) == ("verify", generation.engine.endpoints[0].name)
    assert generation.state == EngineState.FAILED
    generation.sync_weights()
    assert max_logprob_difference(server.model, generation.generate(WARM, Sampling(max_tokens=8))) <= 1e-4


def test_log_probabilities_are_compared_if_the_server_repacked_its_weights(server, generation, source, sink):
    randomize(server.model)
    generation.sync_weights(verify="bits")
    attributes = sink.named(semconv.WEIGHT_SYNC)[-1].attributes
    assert (attributes[semconv.VERIFY], attributes[semconv.PLAN_WAY]) == ("logprobs", "reload")
    assert "repacked" in attributes[semconv.PLAN_REASON]
    with source.changed_by(one_wrong), pytest.raises(WeightSyncError, match="log-probabilities"):
        generation.sync_weights(verify="bits")
    generation.sync_weights()
    assert max_logprob_difference(server.model, generation.generate(WARM, Sampling(max_tokens=8))) <= 1e-4


@pytest.mark.parametrize("pause_mode", ["keep", "wait", "abort"])
def test_a_sync_of_fresh_random_weights_also_changes_cached_prompts(server, generation, sink, pause_mode):
    generation.engine.pause_mode = pause_mode
    generation.generate(WARM, Sampling(max_tokens=4))  # fills the prefix cache from the old weights
    randomize(server.model)
    assert max_logprob_difference(server.model, generation.generate(WARM, Sampling(max_tokens=8))) > 1e-2
    sink.spans.clear()
    report = generation.sync_weights(version=pause_mode)
    rollouts = generation.generate(WARM, Sampling(max_tokens=24), 3)
    assert max_logprob_difference(server.model, rollouts) <= 1e-4
    assert {(version, start) for c in rollouts for version, start, _ in c.weight_versions} == {(pause_mode, 0)}
    assert report.tensors == 27
    (sync,) = sink.named(semconv.WEIGHT_SYNC)
    assert sync.attributes[semconv.TRANSPORT] == "shared_memory"
    assert 0 < sync.attributes[semconv.PAUSED_SECONDS] <= sync.duration
    phases = [span for span in sink.spans if span.parent is sync]
    assert [span.name.rpartition(".")[2] for span in phases] == ["pause", "transfer", "load", "reset_cache", "resume"]
    assert phases[1].attributes[semconv.RECEIVER_MIN] == phases[1].attributes[semconv.RECEIVER_MAX] > 0


def test_requests_in_flight_continue_and_report_the_weights_of_each_token(server, generation):
    generation.engine.pause_mode = "keep"
    for _ in range(20):  # on a fast machine the requests may end before the sync begins
        generation.sync_weights(version="before")
        randomize(server.model)  # before the requests: beside a busy server it may take longer than they do
        with ThreadPoolExecutor() as pool:
            flight = pool.submit(generation.generate, [[7]] * 20, LONG)
            wait_until(lambda: running(server) == 20 or flight.done())  # noqa: B023
            generation.sync_weights(version="after")
            rollouts = flight.result(120)
        crossing = 0
        for completion in rollouts:
            versions = completion.weight_versions
            assert completion.weight_version == versions[-1][0]
            if len(versions) == 1:  # it had ended, or had not begun
                assert versions[0] in (("before", 0, 400), ("after", 0, 400))
                continue
            (first, start, middle), (second, again, end) = versions
            assert (first, start, second, end) == ("before", 0, "after", 400)
            assert 0 < middle == again < 400
            crossing += 1
        if crossing == 20:
            break
    assert crossing == 20
    assert max_logprob_difference(server.model, generation.generate(WARM, Sampling(max_tokens=8))) <= 1e-4


def running(server: Any) -> float:
    """The number of requests that the server is running."""
    lines = str(server.call("/metrics")[1]).splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith("vllm:num_requests_running"))


def test_the_servers_spans_are_children_of_the_requests_that_were_sent(server, generation, profiling, sink):
    sink.spans.clear()
    with profiling.step(1):
        generation.generate([[1, 2, 3]] * 6, Sampling(max_tokens=4), 2)
    (engine_span,) = sink.named(semconv.ENGINE_GENERATE)
    live = {span.span_id: span for span in sink.named(semconv.REQUEST) if semconv.REBUILT not in span.attributes}
    rebuilt = [span for span in sink.named(semconv.REQUEST) if semconv.REBUILT in span.attributes]
    assert len(live) == 2
    assert len(rebuilt) >= 6

    def theirs():
        return [span for span in server.collector.spans if span.trace_id.hex() == engine_span.trace_id]

    # The server exports its spans in order: when that of a later request has arrived, all earlier ones have.
    trace, parent = "0af7651916cd43dd8448eb211c80319d", "b7ad6b7169203331"
    body = {"model": server.folder, "prompt": [1], "max_tokens": 1}
    server.done("/v1/completions", body, headers={"traceparent": f"00-{trace}-{parent}-01"})
    wait_until(lambda: [span for span in server.collector.spans if span.trace_id.hex() == trace], 15)
    assert sorted(span.parent_span_id.hex() for span in theirs()) == sorted(live)
    for span in theirs():
        own = live[span.parent_span_id.hex()]
        (request_id,) = (pair.value.string_value for pair in span.attributes if pair.key == "gen_ai.request.id")
        assert request_id.startswith(own.attributes[semconv.REQUEST_ID])
        assert own.start_unix_ns <= span.start_time_unix_nano <= span.end_time_unix_nano <= own.end_unix_ns


def test_the_timing_of_every_completion_adds_up_and_is_within_the_call(generation, sink):
    sink.spans.clear()
    rollouts = generation.generate([[1, 2, 3], [4]], Sampling(max_tokens=6, ignore_eos=True), 4)
    (span,) = sink.named(semconv.ENGINE_GENERATE)
    for completion in rollouts:
        timing = completion.timing
        assert 0 <= timing.queue < timing.time_to_first_token < timing.e2e
        assert timing.admission + timing.queue + timing.prefill + timing.decode == pytest.approx(timing.e2e)
        assert timing.time_per_output_token == pytest.approx(timing.decode / 5)
        assert span.start_ns <= timing.arrived_ns <= timing.queued_ns < timing.finished_ns <= span.end_ns
    generation.generate([list(range(200))], Sampling(max_tokens=2))
    assert generation.generate([list(range(200))], Sampling(max_tokens=2))[0].timing.cached_tokens > 0


def test_a_prompt_that_only_the_server_can_refuse_does_not_lose_the_others(generation):
    generation.engine.max_model_length, true = 10_000, generation.engine.max_model_length
    try:
        with pytest.raises(PromptError, match="prompt 1 was refused"):
            generation.generate([[1], [2] * 600, [3]], Sampling(max_tokens=2))
        rollouts = generation.generate([[1], [2] * 600, [3]], Sampling(max_tokens=2), refused="mark")
    finally:
        generation.engine.max_model_length = true
    assert [completion.error is not None for completion in rollouts] == [False, True, False]


def test_a_closed_stream_and_an_interrupt_abort_the_requests_on_the_server(server, generation):
    stream = generation.stream([[1]] * 8, Sampling(max_tokens=400))
    next(stream)
    stream.close()

    def interrupt(_: Any) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generation.generate([[5]] * 8, Sampling(max_tokens=30), on_completion=interrupt)
    wait_until(lambda: not running(server), 20)


@pytest.mark.slow
def test_hundreds_of_tasks_of_which_some_are_cancelled(server, generation):
    short, long = Sampling(max_tokens=8, ignore_eos=True), Sampling(max_tokens=400, ignore_eos=True)

    async def main() -> list[Any]:
        generation.engine.pause("keep")  # so that no task ends before it is cancelled
        tasks = [
            asyncio.create_task(generation.agenerate([[1 + i % 250, i // 250]], long if i % 3 == 0 else short, 2))
            for i in range(300)
        ]
        try:
            await asyncio.sleep(1)
            for task in tasks[::6]:
                task.cancel()
        finally:
            generation.engine.resume()
        await asyncio.wait(tasks[1::3], return_when=asyncio.FIRST_COMPLETED)
        for task in tasks[3::6]:  # while others run, unless they have ended
            task.cancel()
        return await asyncio.gather(*tasks, return_exceptions=True)

    found = asyncio.run(main())
    assert all(isinstance(each, asyncio.CancelledError) for each in found[::6])
    for i in range(300):
        if i % 6 == 0 or (i % 3 == 0 and isinstance(found[i], asyncio.CancelledError)):
            continue
        assert found[i].prompt_ids == [[1 + i % 250, i // 250]]
        assert [len(completion.token_ids) for completion in found[i]] == ([400] * 2 if i % 3 == 0 else [8] * 2)
        assert max_logprob_difference(server.model, found[i]) <= 1e-4
    wait_until(lambda: not running(server), 20)


def test_sleep_reaches_the_server_and_weights_are_synced_between_the_two_wake_ups(server, generation):
    generation.sleep(2)
    assert generation.state is EngineState.ASLEEP
    assert server.done("/is_sleeping") == {"is_sleeping": True}
    generation.wake_up(["weights"])
    randomize(server.model)
    generation.sync_weights(version="woken")
    assert generation.state is EngineState.ASLEEP
    generation.wake_up(["kv_cache"])
    assert server.done("/is_sleeping") == {"is_sleeping": False}
    assert max_logprob_difference(server.model, generation.generate(WARM, Sampling(max_tokens=8))) <= 1e-4


def test_a_pause_outlasts_a_sync(server, generation):
    generation.pause("wait")
    assert server.done("/is_paused") == {"is_paused": True}
    generation.sync_weights()
    assert server.done("/is_paused") == {"is_paused": True}
    generation.resume()
    assert len(generation.generate([[1]], Sampling(max_tokens=2))) == 1


@pytest.mark.fault(
    point="a weight sync of a generation",
    did="A tensor is cut on its way to a real server",
    happens="`WeightSyncError` names both; the next sync repairs it",
    within=300,
)
def test_a_failed_sync_names_the_parameter_and_the_server_and_the_next_one_repairs_it(server, generation, source):
    with source.changed_by(wrong_shape(K_PROJ)), pytest.raises(WeightSyncError, match="k_proj") as caught:
        generation.sync_weights()
    assert caught.value.receiver == server.base_url
    assert generation.state is EngineState.FAILED
    generation.sync_weights()
    assert max_logprob_difference(server.model, generation.generate(WARM, Sampling(max_tokens=8))) <= 1e-4


def test_one_trainer_at_a_time_and_another_may_take_over(server, generation):
    with pytest.raises(EngineError, match="another trainer"):
        connect(server, timeout=1.0)
    with connect(server, takeover=True) as other:
        with pytest.raises(WeightSyncError, match="lease"):
            generation.sync_weights()
        other.sync_weights(version="theirs")
        assert other.generate([[1]], Sampling(max_tokens=2)).weight_version == "theirs"
    with connect(server) as again:  # the lease was released
        again.sync_weights()


def test_the_callers_choice_of_transport_and_bucket_size(server, profiling, sink):
    for transport, buckets in (("checkpoint", None), (None, 5)):
        settings = dict(
            weight_transport=transport,
            weight_sync=WeightSyncOptions(bucket_bytes=300_000),
            profiling=profiling,
            takeover=True,
        )
        randomize(server.model)
        with connect(server, **settings) as generation:
            generation.sync_weights()
            assert max_logprob_difference(server.model, generation.generate(WARM, Sampling(max_tokens=8))) <= 1e-4
        attributes = sink.named(semconv.WEIGHT_SYNC)[-1].attributes
        assert attributes[semconv.TRANSPORT] == (transport or "shared_memory")
        assert attributes[semconv.TRANSPORT_REASON] == (
            "asked for" if transport else "servers with vgen's plugin on this host"
        )
        sent = [span.attributes.get(semconv.BUCKETS) for span in sink.named("vgen.weight_sync.transfer")][-1]
        assert sent is None if buckets is None else sent >= buckets


def test_without_the_control_key_it_generates_and_names_what_is_missing(server, caplog):
    with ServerGeneration(None, base_urls=[server.base_url], api_key=server.api_key) as reader:
        assert len(reader.generate([[1]] * 3, Sampling(max_tokens=2))) == 3
        assert all(completion.timing is not None for completion in reader.generate([[1]], Sampling(max_tokens=2)))
    with connect(server, control_key=None) as trainer:
        for call in (lambda: trainer.generate([[1]], Sampling(max_tokens=2)), trainer.sync_weights):
            with pytest.raises(WeightSyncError, match="control_key"):
                call()
    assert "pass control_key" in caplog.text


@pytest.fixture(scope="module")
def second(server) -> Iterator[ServerProcess]:
    """A second server of the same model, with the same keys."""
    arguments = ["--max-model-len", "512", "--dtype", "float32", "--kv-cache-memory-bytes", str(64 << 20)]
    arguments += ["--max-logprobs", "20"]
    settings = dict(api_key=server.api_key, control_key=server.control_key, arguments=arguments, timeout=280)
    with start_server(server.folder, **settings) as started:
        yield started


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.fault(
    point="a real engine's processes",
    did="SIGKILL for one of two real servers in a call, which then restarts",
    happens="Each completion comes once; the new server is left out until a sync",
    within=300,
)
def test_a_killed_server_loses_no_completion_and_is_used_again_only_with_the_right_weights(server, caplog):
    sampling, prompts = Sampling(max_tokens=60, ignore_eos=True), [[i, i + 1] for i in range(1, 33)]
    arguments = ["--max-model-len", "512", "--dtype", "float32", "--kv-cache-memory-bytes", str(64 << 20)]
    settings = dict(api_key=server.api_key, control_key=server.control_key, arguments=arguments, timeout=280)
    with start_server(server.folder, **settings) as second:
        keys: dict[str, Any] = {"api_key": server.api_key, "control_key": server.control_key}
        keys["connection"] = ServerConnection(timeout=120.0, takeover=True)
        with ServerGeneration(server.model, base_urls=[server.base_url, second.url], **keys) as generation:
            randomize(server.model)
            generation.sync_weights(version="1")
            seen: list[tuple[int, int]] = []

            def kill(completion: Any) -> None:
                if not seen:
                    os.killpg(second.process.pid, signal.SIGKILL)
                seen.append((completion.prompt_index, completion.generation_index))

            rollouts = generation.generate(prompts, sampling, 2, on_completion=kill)
            assert len(rollouts) == len(seen) == len(set(seen)) == 64
            assert [completion.prompt_index for completion in rollouts] == [i for i in range(32) for _ in range(2)]
            assert max_logprob_difference(server.model, rollouts) <= 1e-4
            second.stop()
            with start_server(server.folder, port=int(second.url.rpartition(":")[2]), **settings):
                assert max_logprob_difference(server.model, generation.generate(prompts, sampling)) <= 1e-4
                assert "is back with weights 'default', not '1'" in caplog.text
                generation.sync_weights(version="2")
                rollouts = generation.generate(prompts, sampling, 2)
                assert max_logprob_difference(server.model, rollouts) <= 1e-4
                assert {completion.server for completion in rollouts} == {server.base_url, second.url}


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("policy", ["round_robin", "consistent_hash"])
def test_vllms_own_router_in_front_of_two_servers(server, second, policy, caplog):
    pytest.importorskip("vllm_router", reason="vllm-router is not installed: pip install 'vgen[router]'")
    from helpers.routers import vllm_router

    prompts, sampling = [[i, i + 1] for i in range(1, 33)], Sampling(max_tokens=8, ignore_eos=True)
    keys: dict[str, Any] = {"api_key": server.api_key, "control_key": server.control_key}
    keys["connection"] = ServerConnection(timeout=120.0)
    urls = [server.base_url, second.url]
    with ServerGeneration(server.model, base_urls=urls, **keys) as direct:
        randomize(server.model)
        direct.sync_weights(version="both")
        with vllm_router(urls, policy) as url, ServerGeneration(None, base_urls=url, **keys) as generation:
            assert f"{url} is a router" in caplog.text
            rollouts = generation.generate(prompts, sampling, 2)
            assert [completion.prompt_index for completion in rollouts] == [i for i in range(32) for _ in range(2)]
            assert max_logprob_difference(server.model, rollouts) <= 1e-4
            assert all(completion.timing is not None for completion in rollouts)
            with (
                ServerGeneration(server.model, base_urls=url, **keys) as trainer,
                pytest.raises(WeightSyncError, match="name the servers behind it"),
            ):
                trainer.generate(prompts, sampling)
        assert max_logprob_difference(server.model, direct.generate(prompts, sampling)) <= 1e-4
