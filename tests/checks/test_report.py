"""What is printed: a line for each case, advice, counts, exit codes, JSON."""

from __future__ import annotations

import json
import math

from vgen.checks.oracle import Measurement
from vgen.checks.report import advice, as_json, exit_code, line, summary
from vgen.checks.session import Outcome

RIGHT = Outcome("fresh sync", "right", "", Measurement(0.5, 4, 1e-7, 2e-6, 3e-6, 128), 0.3)
WRONG = Outcome(
    "warm cache", "wrong", "far off\nby much", Measurement(math.nan, 4, 0.5, 1.5, 3e-6, 128), 0.3, "a cause", "a fix"
)
REFUSED = Outcome("tied", "refused", "no", None, 0.1, "another cause", "another fix")
ERROR, SKIPPED = Outcome("lora", "error", "PEFT broke"), Outcome("sleep", "skipped", "needs sleep mode")


def test_a_line_has_the_difference_beside_its_bound():
    assert line(RIGHT).split() == ["right", "fresh", "sync", "0.5", "of", "4", "2.0e-06", "nats", "0.3", "s"]
    assert line(WRONG).startswith("WRONG    warm cache")
    assert line(WRONG).endswith("far off")
    assert len(line(Outcome("x", "error", "e" * 500))) < 220


def test_advice_is_given_for_failures_alone():
    text = advice([RIGHT, WRONG, SKIPPED, ERROR])
    assert "usual cause: a cause\n  what to do:  a fix" in text
    assert "PEFT broke" in text
    assert "fresh sync" not in text
    assert "sleep mode" not in text
    assert advice([RIGHT]) == ""


def test_the_exit_code_is_1_for_a_wrong_engine_and_2_for_what_could_not_be_checked():
    assert exit_code([RIGHT, SKIPPED]) == 0
    assert exit_code([RIGHT, WRONG, ERROR]) == exit_code([RIGHT, REFUSED]) == 1
    assert exit_code([RIGHT, ERROR]) == exit_code([SKIPPED]) == exit_code([]) == 2


def test_counts():
    assert summary([RIGHT, RIGHT, WRONG, SKIPPED]) == "2 right, 1 wrong, 1 skipped"


def test_json_holds_everything_and_no_nan():
    found = json.loads(json.dumps(as_json({"model": "llama"}, [RIGHT, WRONG, REFUSED]), allow_nan=False))
    assert (found["model"], found["exit_code"], found["summary"]) == ("llama", 1, "1 right, 1 wrong, 1 refused")
    assert found["cases"][0]["measurement"]["ratio"] == 0.5
    assert found["cases"][1]["measurement"]["ratio"] is None
    assert found["cases"][2]["measurement"] is None
