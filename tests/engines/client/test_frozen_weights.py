"""Servers without a trainer's model: a teacher, judge or reference that nobody may change."""

from __future__ import annotations

import pytest
from helpers.server_generation import BATCH, PROMPTS, Model, calls, generation

from vgen import EngineError, EngineStateError, PromptError, Sampling, ServerError, ServerGeneration
from vgen.profiling import ProfilingContext, semconv
from vgen.testing import FaultyServer, MemorySink

CHANGES = ("/pause", "/sleep", "/vgen/lease", "/collective_rpc", "/update_weight_version", "/vgen/weights")


@pytest.mark.parametrize("kind", ["server", "ours"])
def test_it_generates_and_scores_and_changes_nothing(request, kind):
    server, sink = request.getfixturevalue(kind), MemorySink()
    with generation(server, frozen=True, profiling=ProfilingContext([sink])) as judge:
        assert len(judge.generate(PROMPTS)) == 20
        judge.score([[1, 2]], [[3]])
        refused = (judge.sync_weights, judge.pause, judge.sleep, lambda: judge.sleep(level=2))
        for call in refused:
            with pytest.raises(EngineStateError, match="frozen"):
                call()
        assert len(judge.generate(PROMPTS)) == 20
    assert [path for path, _, _ in server.seen if path.startswith(CHANGES)] == []
    assert sink.named(semconv.WEIGHT_SYNC) == []


def test_the_servers_tell_the_vocabulary(ours):
    with (
        FaultyServer(vocabulary_size=40) as server,
        generation(server, frozen=True) as judge,
        pytest.raises(PromptError, match="vocabulary of 40"),
    ):
        judge.generate([[50]])
    with generation(ours, frozen=True) as judge:  # this one does not tell
        assert len(judge.generate([[50]])) == 1


def test_it_needs_no_lease_that_a_trainer_holds(ours):
    ours.faults["/vgen/lease"] = [409] * 100
    with generation(ours, frozen=True) as judge:
        assert len(judge.generate([[1]])) == 1


def test_without_the_control_key_the_first_completion_tells_the_version():
    with FaultyServer(features=["batch"]) as server, generation(server, frozen=True) as judge:
        server.answers["/weight_info"] = {"weight_version": "step-3"}
        judge.generate([[1]])
        judge.generate([[1]])
        server.answers["/weight_info"] = {"weight_version": "step-4"}
        with pytest.raises(EngineError, match=r"'step-4', not 'step-3'"):
            judge.generate([[1]])


@pytest.mark.parametrize("kind", ["server", "ours"])
@pytest.mark.parametrize("held", ["default", "step-3"])
def test_another_trainers_sync_is_noticed_by_the_first_completion_after_it(request, kind, held):
    server = request.getfixturevalue(kind)
    server.answers["/weight_info"] = {"weight_version": held}
    with generation(server, frozen=True) as judge:
        assert len(judge.generate(PROMPTS)) == 20
        server.answers["/weight_info"] = {"weight_version": "theirs"}
        for _ in range(2):
            with pytest.raises(EngineError, match=r"other weights from another trainer \('theirs', not"):
                judge.generate(PROMPTS)


def test_tokens_that_other_weights_sampled_before_the_last_one_are_noticed(ours):
    def mixed(frame):
        if hasattr(frame, "completion"):
            frame.completion.weight_versions = [("theirs", 0, 1), ("default", 1, 2)]
        return frame

    with generation(ours, frozen=True) as judge:
        judge.generate([[1, 2]], Sampling(max_tokens=2))
        ours.faults[BATCH] = [mixed]
        with pytest.raises(EngineError, match="'theirs', not 'default'"):
            judge.generate([[1, 2]], Sampling(max_tokens=2))


@pytest.mark.fault(
    point="a server that restarts or fails an update",
    did="A frozen engine's server restarts with other weights",
    happens="It is left out",
    within=60,
)
def test_a_server_that_restarts_has_the_same_weights_again_or_is_left_out(ours):
    with generation(ours, frozen=True) as judge:
        judge.generate([[1]])
        judge.generate([[1]])  # a restarted server holds its initial weights, as this one did from the start
    ours.answers["/weight_info"] = {"weight_version": "step-3"}
    with generation(ours, frozen=True) as judge:
        ours.answers["/weight_info"] = {"weight_version": "default"}
        with pytest.raises(ServerError, match="other weights"):
            judge.generate([[1]])


@pytest.mark.parametrize("kind", ["server", "ours"])
def test_a_server_that_moves_experts_gets_no_weights(request, kind):
    server = request.getfixturevalue(kind)
    server.answers["/server_info"]["vllm_config"]["parallel_config"] = {"enable_eplb": True}
    server.answers.get("/vgen/info", {})["enable_eplb"] = True
    with pytest.raises(EngineError, match="enable_eplb"):
        generation(server)
    with generation(server, frozen=True) as judge:
        assert len(judge.generate([[1]])) == 1


@pytest.mark.parametrize("kind", ["server", "ours"])
def test_a_server_that_keeps_keys_of_old_weights_gets_no_new_ones(request, kind):
    server = request.getfixturevalue(kind)
    offloading = {"kv_connector": "OffloadingConnector", "kv_role": "kv_both", "kv_connector_extra_config": {}}
    server.answers["/server_info"]["vllm_config"]["kv_transfer_config"] = offloading
    generation(server).close()
    server.answers["/server_info"]["vllm_config"]["kv_transfer_config"] = offloading | {"kv_connector": "MyConnector"}
    server.answers.get("/vgen/info", {})["kv_store_refusal"] = "MyConnector of kv_transfer_config does not confirm"
    with pytest.raises(EngineError, match=f"{server.url}: MyConnector of kv_transfer_config does not confirm"):
        generation(server)
    assert calls(server, "/pause") == calls(server, "/vgen/lease")[1:] == []
    with generation(server, frozen=True) as judge:
        assert len(judge.generate([[1]])) == 1


def test_a_trainers_server_stays_the_trainers(ours):
    with generation(ours), ServerGeneration(None, base_urls=ours.url) as judge:
        judge.generate([[1]])
    assert len(calls(ours, "/vgen/lease")) == 1
    assert Model().weight is not None
