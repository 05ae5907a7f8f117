"""Why a step was slow: every cause that was made is named, and no other."""

from __future__ import annotations

import pytest
from helpers.handmade import Writer, usual_run, words

from vgen.cli import main
from vgen.profiling import semconv
from vgen.recordings.report.figures import summarize
from vgen.recordings.report.verdict import explain, slowest_step


def test_why_step_2_was_slow_in_one_command(tmp_path, capsys):
    usual_run(tmp_path)
    assert main(["report", str(tmp_path), "--step", "2"]) == 0
    said = words(capsys.readouterr().out)
    assert "step 2 took 9.60 s, 3.7 times the median of the other steps (2.60 s)" in said
    assert "generate took 7.00 s more (8.00 s against 1.00 s), 100 % of the difference" in said
    assert "the last 1 of 10 sequences took 88 % of generation (7.00 of 8.00 s), 1.0 running on average" in said
    assert "the longest, prompt 9, completion 0, ran 8.00 s for 800 tokens; the median request took 1.00 s" in said
    assert "its longest completion has 800 tokens, the others' 100" in said
    # and of the whole run it is told without being asked
    assert main(["report", str(tmp_path)]) == 0
    assert "why step 2 took so long" in words(capsys.readouterr().out)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"update": 5.0}, "the span `update` took 5.00 s more (6.00 s against 1.00 s), 100 % of the difference"),
        ({"rest": 5.0}, "what lies in no span (the rest of the step) took 5.00 s more"),
        ({"sync": 5.0}, "of the sync, the phase load took 5.00 s more than usual"),
        ({"queue": 5.0}, "requests waited 5.00 s in the queue (median), the others' 0.00 s"),
        ({"per_token": 5.0}, "a token took 6.0 times as long"),
        ({"tokens": 5.0}, "generated 6.0 times the tokens (600 against 100)"),
        ({"calls": 5.0}, "it called generate 6 times, the others 1 times"),
    ],
)
def test_every_reason_is_found(tmp_path, change, said):
    writer = Writer(tmp_path)
    for number in range(4):
        add = change if number == 2 else {}
        at, longer = 20.0 * number, sum(add.values())
        step = writer.step(number, at, at + 4 + longer)
        queue, tokens = add.get("queue", 0.0), 100 if "tokens" not in add else 600
        calls = 1 + int(add.get("calls", 0))
        each = 1.0 + queue + add.get("per_token", 0.0) + add.get("tokens", 0.0)
        for call in range(calls):
            outer = writer.generate(step, at + call, at + call + each, [(at + call, at + call + each)], tokens=[tokens])
            writer.measure(semconv.REQUEST_QUEUE, [queue], under=outer)
        at += each * calls
        writer.span("update", at, at + 1 + add.get("update", 0.0), under=step)
        at += 1 + add.get("update", 0.0)
        load = 0.5 + add.get("sync", 0.0)
        sync = writer.span(semconv.WEIGHT_SYNC, at, at + 0.5 + load, under=step, vgen__weight_sync__bytes=10)
        writer.span(semconv.SYNC_TRANSFER, at, at + 0.5, under=sync)
        writer.span(semconv.SYNC_LOAD, at + 0.5, at + 0.5 + load, under=sync)
    summary = summarize(tmp_path)
    assert slowest_step(summary) == 2
    found = explain(summary, 2)
    assert any(said in sentence for sentence in found), found


def test_a_step_like_the_others_and_one_alone(tmp_path):
    assert explain(summarize(usual_run(tmp_path / "a", slow=None)), 2)[0] == (
        "step 2 took 2.60 s, about as the others did (median 2.60 s)"
    )
    assert slowest_step(summarize(tmp_path / "a")) is None
    alone = explain(summarize(usual_run(tmp_path / "b", steps=1)), 1)
    assert "no other step to compare it with" in alone[0]


def test_a_step_that_failed_and_never_ended(tmp_path):
    writer = Writer(tmp_path)
    for number in (1, 2, 3):
        writer.step(number, 10 * number, 10 * number + 1)
    step = writer.step(4, 40, None, error=None)
    writer.span("update", 40, 49, under=step)
    sentences = explain(summarize(tmp_path), 4)
    assert sentences[0] == "step 4 took 9.00 s, 9.0 times the median of the other steps (1.00 s)"
    assert sentences[-1] == "it never ended: the record stops in the middle of it"
    failed = Writer(tmp_path / "failed")
    for number in (1, 2):
        failed.step(number, 10 * number, 10 * number + 1)
    failed.step(3, 30, 35, error="EngineError")
    assert explain(summarize(tmp_path / "failed"), 3)[-1] == "it ended with EngineError"


def test_a_step_that_is_not_there_has_no_explanation(tmp_path):
    assert explain(summarize(usual_run(tmp_path)), 99) == []
