"""TRL's generation object in server mode, with a stand-in server. TRL's trainers are in tests/real."""

from __future__ import annotations

import gc
import sys
import threading
import time
import weakref
from types import SimpleNamespace

import pytest
from helpers.server_generation import Model

from vgen import ProfilingContext, ServerConnection, ServerError, ServerGeneration, VgenError
from vgen.profiling import semconv
from vgen.testing import FaultyServer, MemorySink

pytest.importorskip("trl", reason="TRL is not installed: pip install 'vgen[trl]'")
pytest.importorskip("aiohttp", reason="aiohttp is not installed: pip install 'vgen[server]'")


def build(**more):
    from vgen.integrations.trl import TRLGeneration

    accelerator = SimpleNamespace(wait_for_everyone=lambda: None, process_index=0, num_processes=1)
    return TRLGeneration(Model(), accelerator, None, mode="server", max_completion_length=2, **more)


def test_it_takes_what_trls_own_takes():
    import inspect

    from trl.generation.vllm_generation import VLLMGeneration

    from vgen.integrations.trl import TRLGeneration

    theirs = inspect.signature(VLLMGeneration.__init__).parameters
    ours = inspect.signature(TRLGeneration.__init__).parameters
    assert [*ours][: len(theirs)] == [*theirs]
    assert {name: ours[name].default for name in theirs if name != "group_port"} == {
        name: theirs[name].default for name in theirs if name != "group_port"
    }


def test_it_generates_with_the_server_and_says_what_trainers_ask_of_it():
    with FaultyServer() as server:
        made = build(
            server_base_url=server.url,
            temperature=0.7,
            structured_outputs_regex="a+",
            server_kwargs={"control_key": "a-key", "connection": ServerConnection(timeout=20.0)},
        )
        assert isinstance(made.generation, ServerGeneration)
        prompts, completions, logprobs, token_ids = made.generate([[1, 2, 3], [4, 5]], None, 1)
        assert (prompts, completions) == ([[1, 2, 3], [4, 5]], [[1, 2], [4, 5]])
        assert logprobs == [[[-0.5], [-0.5]]] * 2
        assert token_ids == [[[1], [2]], [[4], [5]]]
        body = next(body for path, _, body in server.seen if path == "/v1/completions")
        assert body["temperature"] == 0.7
        assert body["structured_outputs"] == {"regex": "a+"}
        info = made.vllm_client.get_server_info()
        assert info["model_config"]["logprobs_mode"] == "processed_logprobs"
        path, headers, _ = server.seen[-1]
        assert path == "/server_info?config_format=json"
        assert headers["X-Vgen-Control-Key"] == "a-key"
        made.generation.close()


@pytest.mark.slow
def test_it_waits_for_the_server_to_be_up_for_as_long_as_it_is_told():
    with FaultyServer() as gone:
        url = gone.url
    host, port = url.removeprefix("http://").split(":")
    start = time.monotonic()
    with pytest.raises(ServerError):
        build(server_host=host, server_port=int(port), server_timeout=1.5)
    assert time.monotonic() - start >= 1.5

    started: list[FaultyServer] = []
    timer = threading.Timer(1.0, lambda: started.append(FaultyServer(port=int(port))))
    timer.start()
    made = build(server_host=host, server_port=int(port), server_timeout=30.0)
    made.generation.close()
    started[0].close()


def test_a_mode_that_is_none_is_named():
    from vgen.integrations.trl import TRLGeneration

    with pytest.raises(ValueError, match="'elsewhere'"):
        TRLGeneration(Model(), None, None, mode="elsewhere")


def test_what_a_trainer_sets_between_two_calls_holds_for_the_next(tmp_path):
    with FaultyServer() as server:
        made = build(server_base_url=server.url, server_kwargs={"control_key": "a-key"}, generation_kwargs={"seed": 3})
        made.generate([[1, 2, 3]], None, 1)
        made.temperature, made.max_completion_length = 0.25, 1
        made.generate([[1, 2, 3]], None, 1)
        first, second = (body for path, _, body in server.seen if path == "/v1/completions")
        assert (first["temperature"], first["max_tokens"], first["seed"]) == (1.0, 2, 3)
        assert (second["temperature"], second["max_tokens"], second["seed"]) == (0.25, 1, 3)
        made.close()
        made.close()


def test_the_prefix_cache_is_emptied_and_the_workers_are_counted_with_the_keys():
    with FaultyServer() as server:
        made = build(server_base_url=server.url, server_kwargs={"control_key": "a-key"})
        asked = len(server.seen)
        made.reset_prefix_cache()
        server.answers["/get_world_size"] = {"world_size": 3}
        assert made.vllm_client.get_world_size() == 3
        paths = [path for path, _, _ in server.seen[asked:]]
        assert paths == ["/reset_prefix_cache", "/get_world_size"]
        made.close()


def test_a_refused_key_names_server_kwargs():
    with FaultyServer() as server:
        server.faults["/v1/models"] = [401, 401]
        with pytest.raises(ServerError, match="pass the server's keys in server_kwargs, as api_key and control_key"):
            build(server_base_url=server.url)


def test_enable_replaces_trls_class_before_and_after_the_trainers_are_imported_and_undoes_that():
    import trl.generation.vllm_generation as home
    import trl.trainer.grpo_trainer as loaded
    from transformers import Trainer

    from vgen.integrations.trl import TRLGeneration, enable

    stock, client, train, log = home.VLLMGeneration, home.VLLMClient, Trainer.train, Trainer.log
    later = "trl.trainer.rloo_trainer"
    before = sys.modules.pop(later, None)
    try:
        with enable():
            import trl.trainer.rloo_trainer as imported_meanwhile

            for module in (home, loaded, imported_meanwhile):
                assert issubclass(module.VLLMGeneration, TRLGeneration)
            assert Trainer.train is not train
        assert home.VLLMGeneration is loaded.VLLMGeneration is imported_meanwhile.VLLMGeneration is stock
        assert home.VLLMClient is client
        assert (Trainer.train, Trainer.log) == (train, log)
    finally:
        if before is not None:
            sys.modules[later] = before


def test_trls_own_client_sends_keys_to_the_servers_that_they_are_given_for_and_only_while_enabled(tmp_path):
    import trl.generation.vllm_client as home

    from vgen.integrations.trl import enable

    (tmp_path / "key").write_text("a-control-key\n")
    keys = {"api_key": "an-api-key", "control_key": tmp_path / "key"}
    with FaultyServer() as server, FaultyServer() as other:
        with enable(server_kwargs={"control_key": "another"}, client_keys={server.url: keys}):
            client = home.VLLMClient(base_url=server.url)
            assert client.get_server_info()["device_config"] == {"device": "cpu"}
            client.reset_prefix_cache()
            home.VLLMClient(base_url=other.url)
        for path, headers, _ in server.seen:
            if path != "/health":  # TRL asks for that without its session
                sent = headers["Authorization"], headers["X-Vgen-Control-Key"]
                assert sent == ("Bearer an-api-key", "a-control-key")
        home.VLLMClient(base_url=server.url)
        for _, headers, _ in [server.seen[-1], *other.seen]:
            assert not {"Authorization", "X-Vgen-Control-Key"} & headers.keys()


def test_a_wrapper_that_another_library_put_around_ours_stays_and_ours_does_nothing():
    from transformers import Trainer

    from vgen.integrations.trl import TRLGeneration, enable

    train, log, asked = Trainer.train, Trainer.log, []
    try:
        enabled = enable(profiling=ProfilingContext([]))
        inner = Trainer.train

        def theirs(self, *args, **kwargs):
            asked.append("theirs")
            return inner(self, *args, **kwargs)

        Trainer.train = theirs
        enabled.disable()
        assert (Trainer.train, Trainer.log) == (theirs, log)

        class Failing(Trainer):
            def __init__(self):
                self.vllm_generation = TRLGeneration.__new__(TRLGeneration)

            def add_callback(self, callback):
                asked.append("callback")

            @property
            def _memory_tracker(self):
                raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            Failing().train()
        assert asked == ["theirs"]
    finally:
        Trainer.train = train


def test_a_trainer_that_was_deleted_is_no_obstacle():
    import trl.generation.vllm_generation as home

    from vgen.integrations.trl import enable

    built = home.VLLMGeneration.__new__(home.VLLMGeneration)
    built.itself = built
    del built
    enable().disable()


def test_a_step_that_transformers_gave_up_ends_when_the_next_begins():
    from vgen.integrations.trl import _step_recorder_class

    sink = MemorySink()
    recorder = _step_recorder_class()(ProfilingContext([sink]))
    for step in (0, 0, 1):
        recorder.on_step_begin(None, SimpleNamespace(global_step=step), None)
    recorder.end_step(None, None, None)
    steps = sink.named(semconv.STEP)
    assert [step.number for step in steps] == [1, 1, 2]
    assert {step.parent_id for step in steps} == {None}


def test_the_regex_goes_before_other_structured_outputs_as_in_trl():
    with FaultyServer() as server:
        more = {"structured_outputs": {"choice": ["a", "b"]}}
        made = build(
            server_base_url=server.url,
            structured_outputs_regex="a+",
            generation_kwargs=more,
            server_kwargs={"control_key": "a-key"},
        )
        made.generate([[1, 2, 3]], None, 1)
        body = next(body for path, _, body in server.seen if path == "/v1/completions")
        assert body["structured_outputs"] == {"regex": "a+"}
        made.close()


def test_enable_twice_and_after_a_trainer_was_built_says_what_to_do():
    import trl.generation.vllm_generation as home

    from vgen.integrations.trl import enable

    enabled = enable()
    with pytest.raises(VgenError, match=r"enabled already: call disable\(\)"):
        enable()
    enabled.disable()
    enabled.disable()  # has no effect
    built = home.VLLMGeneration.__new__(home.VLLMGeneration)
    with pytest.raises(VgenError, match=r"built before enable\(\)"):
        enable()
    del built
    enable().disable()


def test_an_untested_trl_is_named_once_with_its_vllm(monkeypatch, caplog):
    from vgen.integrations import trl

    monkeypatch.setattr(trl, "version", lambda name: {"trl": "1.99.0", "vllm": "0.77"}[name])
    trl.enable().disable()
    (record,) = caplog.records
    assert "TRL 1.99.0 with vLLM 0.77" in record.getMessage()


class Counting:
    """What transformers asks of a trainer in `log`, and of its state."""

    def __init__(self, callbacks):
        self.callback_handler = SimpleNamespace(
            callbacks=callbacks, on_log=lambda _args, _state, control, logs: control
        )
        self.state = SimpleNamespace(epoch=None, global_step=0, log_history=[], num_input_tokens_seen=0)
        self.args = SimpleNamespace(include_num_input_tokens_seen="no")
        self.control = None


def test_a_log_has_the_figures_of_all_steps_since_the_last_one():
    from transformers import Trainer

    from vgen.integrations.trl import _step_recorder_class, enable

    profiling = ProfilingContext([])
    recorder = _step_recorder_class()(profiling)
    trainer = Counting([recorder])
    with enable(profiling=profiling):
        for step in range(3):
            recorder.on_step_begin(None, SimpleNamespace(global_step=step), None)
            with profiling.span("reward"):
                pass
            recorder.on_step_end(None, SimpleNamespace(global_step=step + 1), None)
            if step:
                Trainer.log(trainer, {"x": 1.0})  # the user's own
                Trainer.log(trainer, {"loss": 1.0, "eval_accuracy": 1.0})  # as a reward function may name its metric
        Trainer.log(trainer, {"eval_loss": 1.0})
        Trainer.log(trainer, {"train_loss": 1.0})
    own, first, _, second, evaluated, last = trainer.state.log_history
    assert not any(name.startswith("vgen/") for name in own)
    assert (first["vgen/steps"], second["vgen/steps"]) == (2, 1)
    assert first["loss"] == 1.0
    assert 0 < first["vgen/reward.duration.sum"] < first["vgen/train.step.duration.sum"]
    assert first["vgen/stall.duration.sum"] == 0
    assert not any(name.startswith("vgen/") for name in [*evaluated, *last])


def test_a_step_in_which_training_fails_ends_with_the_error():
    from transformers import Trainer

    from vgen.integrations.trl import TRLGeneration, _step_recorder_class, enable

    sink = MemorySink()
    callbacks = []

    class Failing(Trainer):
        def __init__(self):
            self.vllm_generation = TRLGeneration.__new__(TRLGeneration)

        def add_callback(self, callback):
            callbacks.append(callback)

        def pop_callback(self, callback):
            callbacks.remove(callback)

        @property
        def _memory_tracker(self):  # the first thing that `train` asks for
            (recorder,) = callbacks
            assert isinstance(recorder, _step_recorder_class())
            recorder.on_step_begin(None, SimpleNamespace(global_step=500), None)
            raise ZeroDivisionError

    with enable(profiling=ProfilingContext([sink])):
        trainer = Failing()
        with pytest.raises(ZeroDivisionError):
            trainer.train()
        alive = weakref.ref(trainer)
        del trainer
        gc.collect()
        assert alive() is None  # nothing keeps it
    (step,) = sink.named(semconv.STEP)
    assert (step.number, step.error) == (501, "ZeroDivisionError")
    assert not callbacks


@pytest.mark.parametrize("status", [401, 403, 404, 503])
def test_a_server_that_refuses_is_not_asked_until_the_timeout(status):
    """It is up, and waiting does not make a key right."""
    with FaultyServer() as server:
        server.faults["/v1/models"] = [status] * 99
        begun = time.monotonic()
        with pytest.raises(ServerError, match="the server says no") as caught:
            build(server_base_url=server.url, server_timeout=600.0)
        assert caught.value.status == status
        assert [path for path, _, _ in server.seen] == ["/v1/models"]
        assert time.monotonic() - begun < 60
