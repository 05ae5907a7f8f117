"""`ColocateGeneration` on real vLLM: completions, weight syncs, sleep mode, and refusals."""

from __future__ import annotations

import os
import random
import threading

import numpy as np
import pytest
import torch
import torch.distributed as dist
from helpers.changed_source import lost, one_wrong
from helpers.random_streams import draw, seed, states, streams_with

from vgen import ColocateGeneration, Completions, EngineError, EngineStateError, PromptError, Sampling, WeightSyncError
from vgen.demo import max_logprob_difference
from vgen.distributed.rank_consensus import pack_error
from vgen.engine_protocol import EngineState
from vgen.profiling import semconv
from vgen.testing import tiny_model

PROMPTS = ["the quick brown fox " * 3, [1, 2, 3, 4, 5], "ä"]
GREEDY = Sampling(temperature=0.0, max_tokens=24, ignore_eos=True)


def greedy_by_hand(model: torch.nn.Module, prompt: list[int], tokens: int) -> list[int]:
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(tokens):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]


def agrees(model: torch.nn.Module, rollouts: Completions) -> bool:
    return max_logprob_difference(model, rollouts) <= 1e-4


def test_fresh_random_weights_twice_give_the_trainers_own_tokens_and_logprobs(real):
    for version in ("first", "second"):
        warm = real.generation.generate(PROMPTS, GREEDY)  # fills the prefix cache from the old weights
        real.randomize()
        assert not agrees(real.model, warm)
        report = real.generation.sync_weights(version=version)
        assert report.bytes == sum(p.numel() * 4 for p in real.model.parameters())

        greedy = real.generation.generate(PROMPTS, GREEDY)
        for prompt, completion in zip(greedy.prompt_ids, greedy, strict=True):
            assert completion.token_ids == greedy_by_hand(real.model, prompt, 24)
            assert completion.weight_version == version
        assert agrees(real.model, real.generation.generate(PROMPTS, Sampling(max_tokens=24), 3))


def test_a_warm_prefix_cache_is_used_and_does_not_survive_a_sync(real):
    prompt = list(range(60)) * 4
    real.generation.generate([prompt], GREEDY)
    (again,) = real.generation.generate([prompt], GREEDY)
    assert again.timing.cached_tokens > 0
    real.randomize()
    real.generation.sync_weights()
    after = real.generation.generate([prompt], GREEDY)
    assert after[0].timing.cached_tokens == 0
    assert agrees(real.model, after)


@pytest.mark.parametrize("tied", [pytest.param(True, marks=pytest.mark.slow), False])
def test_weights_of_a_model_that_was_never_saved_are_synced_before_the_first_generation(tmp_path, tied):
    model, _ = tiny_model(tmp_path, seed=7, tie_word_embeddings=tied)
    model.config._name_or_path = ""
    model.name_or_path = ""
    settings = dict(max_model_length=128, engine_kwargs={"kv_cache_memory_bytes": 16 << 20})
    with ColocateGeneration(model, **settings) as generation:
        assert agrees(model, generation.generate([[1, 2, 3]], Sampling(max_tokens=16), 2))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(torch.randn_like(parameter) * 0.05)
        generation.sync_weights()
        assert agrees(model, generation.generate([[1, 2, 3]], Sampling(max_tokens=16), 2))


@pytest.mark.slow
def test_two_engines_in_one_process_do_not_share_weights(real, tmp_path):
    other, _ = tiny_model(tmp_path, seed=9)
    with ColocateGeneration(other, max_model_length=128) as second:
        real.randomize()
        real.generation.sync_weights()
        assert agrees(other, second.generate([[5, 6, 7]], Sampling(max_tokens=16)))
        assert agrees(real.model, real.generation.generate([[5, 6, 7]], Sampling(max_tokens=16)))
    assert agrees(real.model, real.generation.generate([[8, 9]], Sampling(max_tokens=16)))


@pytest.mark.slow
def test_an_engine_restores_the_process_state_and_refuses_every_call_after_close(real, tmp_path):
    model, _ = tiny_model(tmp_path, seed=3)
    random.seed(1), np.random.seed(2), torch.manual_seed(3)

    def fingerprint():
        return (
            states(),
            torch.get_num_threads(),
            torch.set_num_threads,
            torch.get_default_dtype(),
            os.sched_getaffinity(0),
            dict(os.environ),
            dist.is_initialized(),
        )

    before = fingerprint()
    with ColocateGeneration(model, max_model_length=128) as generation:
        assert fingerprint() == before
        generation.generate([[1, 2]], Sampling(max_tokens=4))
        generation.sync_weights()
        assert fingerprint() == before
        with pytest.raises(EngineStateError, match="enable_sleep_mode"):
            generation.sleep()
    assert fingerprint() == before
    generation.close()
    for refused in (lambda: generation.generate([[1]]), generation.sync_weights, generation.sleep, generation.wake_up):
        with pytest.raises(EngineStateError, match="closed"):
            refused()


def stream(generation, trainer):
    for _ in generation.stream([[1, 2], [3]], Sampling(max_tokens=4), 2):
        trainer()


CONVERSATION = [{"role": "user", "content": "the quick brown fox"}]
TEMPLATE = "{% for message in messages %}{{ message.content }}{% endfor %}"


@pytest.mark.parametrize(
    "call",
    [
        pytest.param(lambda g, _: g.generate([[1, 2], "ä"], Sampling(max_tokens=4), 2), id="generate"),
        pytest.param(lambda g, _: g.generate([[1, 2]], Sampling(max_tokens=4, seed=3), 2), id="generate with a seed"),
        pytest.param(stream, id="stream"),
        pytest.param(lambda g, _: g.chat([CONVERSATION], Sampling(max_tokens=4), chat_template=TEMPLATE), id="chat"),
        pytest.param(lambda g, _: g.score([[1, 2], [3]], [[4, 5], [6]]), id="score"),
        pytest.param(lambda g, _: g.sync_weights(verify="logprobs"), id="sync_weights, log-probabilities verified"),
        pytest.param(lambda g, _: g.sync_weights(verify="bits"), id="sync_weights, bits verified"),
        pytest.param(lambda g, _: g.verify(), id="verify"),
        pytest.param(lambda g, _: [g.sleep(), g.wake_up()], id="sleep and wake up"),
    ],
)
def test_the_trainer_draws_the_same_random_numbers_with_and_without_an_engine(real, call):
    without, beside = streams_with(lambda trainer: call(real.generation, trainer))
    assert beside == without


async def test_the_trainer_draws_the_same_random_numbers_beside_an_asynchronous_call(real):
    seed()
    await real.generation.agenerate([[1, 2], [3]], Sampling(max_tokens=4), 2)
    drawn = draw(), states()
    seed()
    assert drawn == (draw(), states())


def test_the_trainer_may_create_its_own_process_group_afterwards(real, tmp_path):
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    try:
        mine = dist.group.WORLD
        assert agrees(real.model, real.generation.generate([[1, 2, 3]], Sampling(max_tokens=8)))
        real.generation.sync_weights()
        assert dist.group.WORLD is mine
    finally:
        dist.destroy_process_group()


def test_completions_are_in_prompt_order_with_timing_and_different_seeds(real):
    prompts = [[i + 1] * (i + 1) for i in range(9)]
    rollouts = real.generation.generate(prompts, Sampling(max_tokens=6, seed=11, ignore_eos=True), 4)
    assert len(rollouts) == 36
    assert [(c.prompt_index, c.generation_index) for c in rollouts] == [(p, g) for p in range(9) for g in range(4)]
    assert rollouts.group(4) == list(rollouts)[16:20]
    assert len({tuple(c.token_ids) for c in rollouts.group(0)}) > 1
    for completion in rollouts:
        timing = completion.timing
        assert completion.finish_reason == "length"
        assert len(completion.logprobs) == len(completion.token_ids) == 6
        assert timing.e2e == pytest.approx((timing.finished_ns - timing.arrived_ns) / 1e9, abs=1e-6)
        assert timing.admission + timing.queue + timing.prefill + timing.decode == pytest.approx(timing.e2e)
        assert timing.time_per_output_token == pytest.approx(timing.decode / 5)
    again = real.generation.generate(prompts, Sampling(max_tokens=6, seed=11, ignore_eos=True), 4)
    assert [c.token_ids for c in again] == [c.token_ids for c in rollouts]


def test_top_logprobs_and_stop_and_regex_and_no_logprobs(real):
    (top,) = real.generation.generate([[1, 2, 3]], Sampling(max_tokens=4, logprobs=3))
    for token, position in zip(top.token_ids, top.top_logprobs, strict=True):
        assert 3 <= len(position) <= 4
        assert token in dict(position)
        assert [logprob for _, logprob in position] == sorted((p for _, p in position), reverse=True)
    (bare,) = real.generation.generate([[1, 2, 3]], Sampling(max_tokens=4, logprobs=None))
    assert bare.logprobs is None
    stopping = Sampling(max_tokens=200, stop_token_ids=list(range(128)))
    assert real.generation.generate([[1, 2, 3]], stopping)[0].finish_reason == "stop"
    matching = Sampling(max_tokens=20, structured_outputs={"regex": "(ab|cd){3}"})
    (structured,) = real.generation.generate(["write: "], matching)
    assert real.tokenizer.decode(structured.token_ids, skip_special_tokens=True) in {
        a + b + c for a in ("ab", "cd") for b in ("ab", "cd") for c in ("ab", "cd")
    }


def test_the_engine_does_not_share_the_trainers_random_state(real, tmp_path):
    """Ranks whose trainers have the same seed must sample differently, and generation must not change dropout."""
    torch.manual_seed(5)
    first = real.generation.generate([[1, 2, 3]], Sampling(max_tokens=16))
    after = torch.rand(1)
    torch.manual_seed(5)
    second = real.generation.generate([[1, 2, 3]], Sampling(max_tokens=16))
    assert torch.rand(1) == after
    assert first[0].token_ids != second[0].token_ids


def test_an_engine_that_cannot_start_says_why_and_does_not_affect_others(real, tmp_path):
    model, _ = tiny_model(tmp_path, seed=3)
    with pytest.raises(EngineError, match="vLLM could not start"):
        ColocateGeneration(model, max_model_length=1 << 20)
    assert agrees(real.model, real.generation.generate([[1]], Sampling(max_tokens=4)))


def test_bad_prompts_are_refused_with_index_and_limit_before_the_engine_is_called(real):
    limit, vocabulary = real.generation.max_model_length - 1, 272
    for bad, bound in (([], None), ([1] * (limit + 1), limit), ([vocabulary], vocabulary), ([-1], vocabulary)):
        with pytest.raises(PromptError, match="prompt 1 ") as caught:
            real.generation.generate([[1, 2], bad])
        assert (caught.value.index, caught.value.limit) == (1, bound)
    assert not real.sink.named(semconv.ENGINE_GENERATE)

    rollouts = real.generation.generate([[1, 2], [], [3]], Sampling(max_tokens=3), 2, refused="mark")
    assert [c.finish_reason == "error" for c in rollouts] == [False, False, True, True, False, False]
    assert isinstance(rollouts[2].error, PromptError)
    assert [c.prompt_index for c in rollouts] == [0, 0, 1, 1, 2, 2]
    assert rollouts[4].token_ids
    longest = real.generation.generate([[1] * limit], Sampling(max_tokens=8))
    assert len(longest[0].token_ids) == 1


def test_the_engine_still_works_after_vllm_refused_a_parameter(real):
    with pytest.raises((ValueError, TypeError)):
        real.generation.generate([[1]], Sampling(extra={"bad_words": 3}))
    assert real.generation.state is EngineState.AWAKE
    assert agrees(real.model, real.generation.generate([[1]], Sampling(max_tokens=4)))


def test_an_exception_in_the_callback_aborts_the_other_requests(real):
    def stop(_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        real.generation.generate([[1], [2]], Sampling(max_tokens=8), 4, on_completion=stop)
    assert not real.generation.engine.llm.llm_engine.has_unfinished_requests()
    assert agrees(real.model, real.generation.generate([[1]], Sampling(max_tokens=4)))


def test_weights_synced_during_sleep_are_verified_at_wake_up(real):
    def asleep(change=None):
        real.generation.sleep(2)
        real.generation.wake_up(["weights"])
        with real.source.changed_by(change):
            real.generation.sync_weights()
        real.randomize()  # the optimizer may step before the wake-up: the weights that were sent count
        real.generation.wake_up(["kv_cache"])
        return [
            real.sink.named(kind)[-1].attributes.get(semconv.VERIFY) for kind in (semconv.WEIGHT_SYNC, semconv.WAKE_UP)
        ]

    real.generation.engine._verified = False  # as before the engine's first weights
    assert asleep() == ["deferred", "logprobs"]
    assert real.sink.named(semconv.SYNC_VERIFY)[-1].parent is real.sink.named(semconv.WAKE_UP)[-1]
    assert asleep() == [None, None]
    real.generation.engine._verified = False
    with pytest.raises(WeightSyncError, match="log-probabilities") as caught:
        asleep(one_wrong)
    assert caught.value.phase == "verify"
    assert real.generation.state is EngineState.FAILED
    real.generation.sync_weights()  # awake by now
    assert real.sink.named(semconv.WEIGHT_SYNC)[-1].attributes[semconv.VERIFY] == "logprobs"
    assert real.generation.state is EngineState.AWAKE
    assert agrees(real.model, real.generation.generate([[1, 2]], Sampling(max_tokens=8)))


@pytest.mark.parametrize("collective", [True, False])
def test_ranks_of_a_sharded_model_agree_on_verification_and_fail_together(real, monkeypatch, collective):
    asked, answers = [], []

    def gather(everyone, own, group=None):
        value, error = own
        asked.append(value)
        answer = answers.pop(0)
        failed = isinstance(answer, WeightSyncError)
        everyone[:] = [(value, error), (None, pack_error(answer, 1)) if failed else (answer, None)]

    real.generation.sync_weights(verify="logprobs")
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda group=None: 2)
    monkeypatch.setattr(dist, "get_rank", lambda group=None: 0)
    monkeypatch.setattr(dist, "all_gather_object", gather)

    def sync():
        real.source.was_collective = collective  # as if the last pass had found it so
        real.generation.sync_weights()

    answers = [None, None, True, None]  # for the load, the caches, whether to verify, the verification
    sync()
    found = real.sink.named(semconv.WEIGHT_SYNC)[-1].attributes.get(semconv.VERIFY)
    assert (found, asked) == (("logprobs", [None, None, False, None]) if collective else (None, []))
    if collective:
        answers = [WeightSyncError("it does not fit", phase="load", parameter="lm_head.weight", receiver="colocate")]
        with pytest.raises(WeightSyncError, match="it does not fit") as caught:
            sync()
        assert (caught.value.phase, caught.value.parameter) == ("load", "lm_head.weight")
        assert (caught.value.receiver, caught.value.__notes__) == ("colocate", ["raised on rank 1"])
        assert real.generation.state is EngineState.FAILED
        answers = [None, None, False, None]
        sync()
        assert real.sink.named(semconv.WEIGHT_SYNC)[-1].attributes[semconv.VERIFY] == "logprobs"


def test_after_a_sync_that_failed_the_next_is_verified(real):
    real.generation.sync_weights()
    with real.source.changed_by(lost), pytest.raises(WeightSyncError, match="lost"):
        real.generation.sync_weights()
    for expected in ("logprobs", None):
        real.generation.sync_weights()
        assert real.sink.named(semconv.WEIGHT_SYNC)[-1].attributes.get(semconv.VERIFY) == expected


def test_sleep_on_a_cpu_pauses_the_engine_and_reports_no_freed_memory(real):
    for level in (1, 2):
        report = real.generation.sleep(level)
        assert report.memory_freed is False
        assert report.device_bytes is None
        assert real.generation.engine.llm.llm_engine.is_sleeping()
        with pytest.raises(EngineStateError, match=rf"asleep \(level {level}\)"):
            real.generation.generate([[1]])
        with pytest.raises(EngineStateError, match="asleep"):
            real.generation.sleep()
        with pytest.raises(EngineStateError, match="weights"):
            real.generation.sync_weights()
        real.generation.wake_up(["weights"])
        assert real.generation.state is EngineState.ASLEEP
        real.randomize()
        real.generation.sync_weights()
        assert real.generation.state is EngineState.ASLEEP
        real.generation.wake_up(["kv_cache"])
        assert agrees(real.model, real.generation.generate([[1, 2]], Sampling(max_tokens=8)))
    slept = real.sink.named(semconv.SLEEP)
    assert [span.attributes[semconv.MEMORY_FREED] for span in slept] == [False, False]
    assert all(semconv.DEVICE_BYTES not in span.attributes for span in slept)
    with pytest.raises(EngineStateError, match="awake"):
        real.generation.wake_up()
    with pytest.raises(ValueError, match="tags"):
        real.generation.wake_up(["everything"])


def wrong_shape(name, tensor):
    yield name, tensor[:-1] if name.endswith("0.self_attn.k_proj.weight") else tensor


def unknown_name(name, tensor):
    yield name.replace("layers.1.mlp.up_proj", "layers.1.mlp.other"), tensor


def missing(name, tensor):
    if not name.endswith("layers.1.input_layernorm.weight"):
        yield name, tensor


def raising(name, tensor):
    if name.endswith("layers.1.mlp.gate_proj.weight"):
        raise OSError("the disk went away")
    yield name, tensor


def interrupted(name, tensor):
    if name.endswith("layers.1.mlp.gate_proj.weight"):
        raise KeyboardInterrupt
    yield name, tensor


@pytest.mark.parametrize(
    ("breaks", "parameter"),
    [
        (wrong_shape, "model.layers.0.self_attn.k_proj.weight"),
        (unknown_name, "model.layers.1.mlp.other.weight"),
        (missing, "model.layers.1.input_layernorm.weight"),
        (raising, None),
        (interrupted, None),
    ],
)
@pytest.mark.fault(
    point="a weight sync of a generation",
    did="A tensor is cut on its way to a real engine",
    happens="`WeightSyncError` names it; the next sync repairs the engine",
    within=300,
)
def test_a_failed_sync_names_the_parameter_and_the_next_one_repairs_the_engine(real, breaks, parameter):
    with real.source.changed_by(breaks):
        kind = KeyboardInterrupt if breaks is interrupted else WeightSyncError
        with pytest.raises(kind) as caught:
            real.generation.sync_weights()
        if breaks is not interrupted:
            assert caught.value.phase == "load"
        if parameter is not None:
            assert caught.value.parameter == parameter
            assert parameter in str(caught.value)
        assert real.generation.state is EngineState.FAILED
        with pytest.raises(EngineStateError, match="failed"):
            real.generation.generate([[1]])
    real.randomize()
    real.generation.sync_weights()
    assert agrees(real.model, real.generation.generate(PROMPTS, Sampling(max_tokens=12)))


def test_one_call_at_a_time(real):
    started, go_on = threading.Event(), threading.Event()

    def hold(_):
        started.set()
        go_on.wait(20)

    call = dict(sampling=Sampling(max_tokens=4), on_completion=hold)
    worker = threading.Thread(target=real.generation.generate, args=([[1, 2]],), kwargs=call)
    worker.start()
    started.wait(20)
    for refused in (real.generation.sync_weights, real.generation.sleep, real.generation.wake_up):
        with pytest.raises(EngineStateError, match="another thread"):
            refused()
    go_on.set()
    worker.join(20)
    assert agrees(real.model, real.generation.generate([[1]], Sampling(max_tokens=4)))


def test_every_call_leaves_its_span_under_the_callers_step(real):
    with real.profiling.step(4) as row:
        rollouts = real.generation.generate([[1, 2, 3], [4]], Sampling(max_tokens=5, ignore_eos=True), 2)
        real.generation.sync_weights(version="v4")
    summary = row.summary()
    assert summary["vgen.generate.output_tokens"] == rollouts.output_tokens == 20
    assert summary["vgen.request.e2e.count"] == 4
    spans = {span.name: span for span in real.sink.spans}
    parents = {name: spans[name].parent.name for name in spans if spans[name].parent is not None}
    assert parents == {
        semconv.GENERATE: semconv.STEP,
        semconv.ENGINE_GENERATE: semconv.GENERATE,
        semconv.REQUEST: semconv.ENGINE_GENERATE,
        semconv.DECODE_OUTPUTS: semconv.GENERATE,
        semconv.WEIGHT_SYNC: semconv.STEP,
        semconv.SYNC_LOAD: semconv.WEIGHT_SYNC,
        semconv.SYNC_RESET: semconv.WEIGHT_SYNC,
    }
    assert len(real.sink.named(semconv.REQUEST)) == 4
    for span in real.sink.spans:
        assert span.attributes[semconv.STEP_NUMBER] == 4
        if span.parent is not None:
            assert span.parent.start_ns <= span.start_ns <= span.end_ns <= span.parent.end_ns


def test_score_gives_the_models_own_logprobs(real):
    real.randomize()
    real.generation.sync_weights()
    prompts, completions = [[1, 2, 3], "abc"], [[4, 5, 6, 7], [9]]
    scored = real.generation.score(prompts, completions)
    for prompt, completion, found in zip(
        [[1, 2, 3], real.tokenizer("abc")["input_ids"]], completions, scored, strict=True
    ):
        with torch.no_grad():
            logits = real.model(torch.tensor([prompt + completion])).logits[0].log_softmax(-1)
        own = [logits[len(prompt) - 1 + i, token].item() for i, token in enumerate(completion)]
        assert found == pytest.approx(own, abs=1e-4)


def test_a_stream_yields_short_completions_first(real):
    stopping = Sampling(max_tokens=64, seed=3, stop_token_ids=list(range(0, 256, 24)))
    arrived = list(real.generation.stream([[1, 2], [3], [4, 5]], stopping, 4))
    assert len(arrived) == 12
    lengths = [len(completion.token_ids) for completion in arrived]
    assert lengths == sorted(lengths)
    assert len(set(lengths)) > 1
    stream = real.generation.stream([[1]] * 8, Sampling(max_tokens=64, ignore_eos=True))
    next(stream)
    stream.close()
    assert not real.generation.engine.llm.llm_engine.has_unfinished_requests()
    assert agrees(real.model, real.generation.generate([[1]], Sampling(max_tokens=8)))


async def test_asynchronous_generation(real):
    assert agrees(real.model, await real.generation.agenerate([[1, 2, 3]], Sampling(max_tokens=8), 2))


def test_chat_goes_through_the_chat_template(real):
    template = (
        "{% for m in messages %}{{ m.role[0] }}:{{ m.content }};{% endfor %}"
        "{% if tools %}T{{ tools|length }}{% endif %}a:"
    )
    conversations = [[{"role": "user", "content": "hi"}], [{"role": "system", "content": "x"}]]
    rollouts = real.generation.chat(conversations, GREEDY, chat_template=template)
    assert [real.tokenizer.decode(ids) for ids in rollouts.prompt_ids] == ["u:hi;a:", "s:x;a:"]
    tool = {
        "type": "function",
        "function": {"name": "f", "description": "d", "parameters": {"type": "object", "properties": {}}},
    }
    rollouts = real.generation.chat(conversations[:1], GREEDY, chat_template=template, tools=[tool])
    assert real.tokenizer.decode(rollouts.prompt_ids[0]) == "u:hi;T1a:"
    assert agrees(real.model, real.generation.generate(rollouts.prompt_ids, Sampling(max_tokens=8)))


def spoil_engine(generation):
    """Half a norm is lost in the engine, as if waking had not brought it back."""

    def spoil(worker):
        with torch.no_grad():
            worker.model_runner.get_model().model.norm.weight[::2] = 0

    generation.engine.llm.collective_rpc(spoil)


def test_present_weights_are_verified_on_request(real):
    real.generation.sync_weights()
    report = real.generation.verify()
    assert (report.how, report.reason, report.decoded_tokens) == ("logprobs", "", 16)
    assert 0 < report.ratio < report.bound
    assert 0 < report.mean <= report.largest < 1e-4
    span = real.sink.named(semconv.VERIFICATION)[-1]
    assert span.attributes[semconv.VERIFY_RATIO] == report.ratio
    assert real.sink.named(semconv.SYNC_VERIFY)[-1].parent is span
    by_bits = real.generation.verify("bits")
    assert by_bits.how == "bits" or by_bits.reason
    real.randomize()
    with pytest.raises(WeightSyncError, match="times the rounding noise") as caught:
        real.generation.verify()
    assert caught.value.phase == "verify"
    assert real.generation.state is EngineState.AWAKE
    real.generation.sleep()
    with pytest.raises(EngineStateError, match="asleep"):
        real.generation.verify()
    real.generation.wake_up()
    real.generation.sync_weights()
    assert real.generation.verify().ratio < report.bound


@pytest.mark.parametrize("level", [1, 2])
@pytest.mark.parametrize("verify", ["logprobs", "none"])
def test_the_first_wake_up_from_each_level_is_verified(real, level, verify):
    def slept():
        real.generation.sync_weights(verify=verify)
        real.randomize()  # the trainer goes on: the weights of the last sync count
        real.generation.sleep(level)
        real.generation.wake_up(["weights"])
        real.generation.wake_up(["kv_cache"])
        return real.sink.named(semconv.WAKE_UP)[-1].attributes.get(semconv.VERIFY)

    real.generation.sync_weights(verify="logprobs")
    real.generation.engine._slept.clear()
    assert [slept(), slept()] == ["logprobs", None]


def test_a_wake_up_that_changes_weights_is_noticed(real, monkeypatch):
    real.generation.sync_weights(verify="logprobs")
    real.generation.engine._slept.clear()
    real.generation.sleep(1)
    spoil_engine(real.generation)
    with pytest.raises(WeightSyncError, match="after waking up from a sleep of level 1"):
        real.generation.wake_up()
    assert real.generation.state is EngineState.FAILED
    real.generation.sync_weights()
    assert real.sink.named(semconv.WEIGHT_SYNC)[-1].attributes[semconv.VERIFY] == "logprobs"


def test_a_sync_that_cannot_be_verified_is_labelled_and_the_next_tries_again(real, monkeypatch):
    real.generation.engine._verified = False
    with monkeypatch.context() as broken:
        broken.setattr(real.model, "forward", None)
        assert [real.generation.sync_weights().verified for _ in range(2)] == ["skipped", "skipped"]
    assert "forward pass fails" in real.sink.named(semconv.WEIGHT_SYNC)[-1].attributes[semconv.VERIFY_REASON]
    assert [real.generation.sync_weights().verified for _ in range(2)] == ["logprobs", None]


def test_a_new_forward_hook_is_verified_once_and_named_if_it_changes_results(real):
    real.generation.sync_weights(verify="logprobs")
    with real.model.model.norm.register_forward_hook(lambda module, args, output: None):
        assert [real.generation.sync_weights().verified for _ in range(2)] == ["logprobs", None]
    with (
        real.model.model.norm.register_forward_pre_hook(lambda module, args: (args[0] + 1,)),
        pytest.raises(WeightSyncError, match=r"forward hook .*model\.norm: .*lambda"),
    ):
        real.generation.sync_weights()
    real.generation.sync_weights()
