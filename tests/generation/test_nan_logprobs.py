"""NaN among log-probabilities: one warning for each weight version, a counter, and an attribute of the call's span."""

from __future__ import annotations

import logging
from dataclasses import replace

import pytest

from vgen import Generation, Sampling
from vgen.profiling import semconv
from vgen.profiling.semconv_docs import unknown
from vgen.testing import FakeEngine
from vgen.types import none_for_nan


class Overflowing(FakeEngine):
    """Its weights give NaN for every prompt that holds the token 7."""

    def _completion(self, request, sampling):
        completion = super()._completion(request, sampling)
        if 7 not in request.token_ids:
            return replace(completion, prompt_logprobs=[None, -1.0])
        logprobs = none_for_nan([-0.5, float("nan")])
        if sampling.prompt_logprobs is None:
            return replace(completion, logprobs=logprobs, server=self.server)
        return replace(completion, logprobs=None, prompt_logprobs=[None, *logprobs])

    server = None


@pytest.fixture
def engine():
    return Overflowing()


def warnings(caplog):
    return [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING and "NaN" in r.getMessage()]


def counted(sink):
    return sum(sum(m.values) for m in sink.measurements if m.instrument is semconv.NAN_LOGPROBS)


def test_each_version_is_reported_once_and_every_completion_counted(generation, sink, caplog):
    generation.generate([[1], [2]])
    assert not warnings(caplog)
    generation.generate([[1], [7], [7]], num_generations=2)
    list(generation.stream([[7], [2]]))
    (warning,) = warnings(caplog)
    assert "weights '0'" in warning
    assert "sync_weights(verify='bits')" in warning
    generation.sync_weights("next")
    list(generation.stream([[2], [7]]))
    assert [("'0'" in each, "'next'" in each) for each in warnings(caplog)] == [(True, False), (False, True)]
    assert counted(sink) == 4 + 1 + 1
    counts = [span.attributes.get(semconv.NAN_COMPLETIONS) for span in sink.named(semconv.GENERATE)]
    assert counts == [None, 4, 1, 1]
    assert not unknown(sink.spans, sink.measurements)


def test_a_stream_warns_before_it_ends(generation, caplog):
    with_nan = generation.stream([[7], [2]])
    next(with_nan)
    assert len(warnings(caplog)) == 1
    with_nan.close()


def test_scored_prompts_count_too(generation, sink, caplog):
    generation.generate([[7]], Sampling(prompt_logprobs=0))
    assert (len(warnings(caplog)), counted(sink)) == (1, 1)


def test_the_warning_needs_no_profiling_and_names_the_server(engine, caplog):
    engine.server = "http://host:8000"
    generation = Generation(engine, [])
    generation.generate([[7]])
    (warning,) = warnings(caplog)
    assert "weights '0' of http://host:8000" in warning
