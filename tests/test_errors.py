"""An error reaches another process as its code and its fields, and has the same class and message there."""

from __future__ import annotations

import inspect
import json

import pytest

from vgen import errors
from vgen.errors import (
    ArgumentError,
    CheckError,
    EngineError,
    EngineStateError,
    MissingExtraError,
    PromptError,
    RankError,
    ServerError,
    VgenError,
    WeightSyncError,
    error_from_dict,
    error_to_dict,
)

ERRORS = [
    VgenError("something"),
    MissingExtraError("OTelSink", "OpenTelemetry", "otel"),
    CheckError("the engine could not be started"),
    ArgumentError("Sampling.max_tokens", "must be an integer"),
    PromptError(3, "is empty", 5),
    EngineStateError("sleep", "paused", "call resume() first"),
    EngineError("broke"),
    WeightSyncError("x", phase="load", parameter="w", receiver="r", reason="unknown_handles"),
    RankError("rank 2 is gone", rank=2),
    ServerError("said no", url="http://a", status=503, server_message="busy", retryable=True),
]


def there_and_back(error):
    return error_from_dict(json.loads(json.dumps(error_to_dict(error))))


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: error.code)
def test_an_error_arrives_with_its_class_its_message_and_its_fields(error):
    copy = there_and_back(error)
    assert type(copy) is type(error)
    assert str(copy) == str(error)
    assert vars(copy) == vars(error)


def test_every_class_has_a_code_of_its_own():
    classes = [kind for _, kind in inspect.getmembers(errors, inspect.isclass) if issubclass(kind, VgenError)]
    assert {type(error) for error in ERRORS} == set(classes)
    assert len({kind.code for kind in classes}) == len(classes)


@pytest.mark.parametrize("error", [ValueError("top_p"), TypeError("prompt 0 is text"), KeyError("name")])
def test_a_built_in_error_keeps_its_class(error):
    copy = there_and_back(error)
    assert type(copy) is type(error)
    assert str(copy) == str(error)


def test_a_class_that_the_receiver_does_not_know_becomes_a_vgen_error_with_its_name():
    class Odd(Exception): ...

    assert type(there_and_back(Odd("hm"))) is VgenError
    assert str(there_and_back(Odd("hm"))) == "Odd: hm"
    assert str(there_and_back(KeyboardInterrupt())) == "KeyboardInterrupt"


def test_a_subclass_arrives_as_the_class_that_its_code_names():
    class Stricter(WeightSyncError):
        def __init__(self, problem, extra):
            super().__init__(problem, phase="load")
            self.extra = extra

    copy = there_and_back(Stricter("x", object()))
    assert type(copy) is WeightSyncError
    assert (copy.problem, copy.phase) == ("x", "load")


def test_an_unknown_code_is_named():
    copy = error_from_dict({"code": "from_the_future", "fields": {"problem": "new"}})
    assert type(copy) is VgenError
    assert str(copy) == "from_the_future: new"
