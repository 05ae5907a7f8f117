"""A run's figures, against what its records were made of."""

from __future__ import annotations

import json
import random

import pytest
from handmade import Writer, usual_run, usual_step, words

from vgen.analysis.summary import summarize
from vgen.analysis.why import explain, slowest_step
from vgen.cli import main
from vgen.profiling import names


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
            writer.measure(names.REQUEST_QUEUE, [queue], under=outer)
        at += each * calls
        writer.span("update", at, at + 1 + add.get("update", 0.0), under=step)
        at += 1 + add.get("update", 0.0)
        load = 0.5 + add.get("sync", 0.0)
        sync = writer.span(names.WEIGHT_SYNC, at, at + 0.5 + load, under=step, vgen__weight_sync__bytes=10)
        writer.span(names.SYNC_TRANSFER, at, at + 0.5, under=sync)
        writer.span(names.SYNC_LOAD, at + 0.5, at + 0.5 + load, under=sync)
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


def test_figures_of_the_run(tmp_path, capsys):
    assert main(["report", str(usual_run(tmp_path)), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    total = found["total"]
    assert (total["steps"], total["output_tokens"]) == (4, 3 * 1000 + 1700)
    assert total["phases"] == pytest.approx(
        {"generate": 11.0, "sleep": 0.4, "update": 4.0, "wake": 0.4, "sync": 1.2, "rest": 0.4}
    )
    assert sum(total["phases"].values()) == pytest.approx(sum(step["seconds"] for step in found["steps"]))
    assert total["after"] == pytest.approx({"idle": 3.0})
    assert total["tokens_per_second"] == pytest.approx(4700 / 11)
    second = found["steps"][1]
    assert second["tokens_per_second"] == pytest.approx(1700 / 8)
    assert second["requests"]["e2e"]["max"] == pytest.approx(8)
    assert second["concurrency"]["peak"] == 10
    assert sum(second["concurrency"]["running"]) / 60 * 8 == pytest.approx(17, rel=1e-2)
    assert found["slowest"][0]["seconds"] == pytest.approx(8)
    assert found["problems"] == []


def test_syncs_by_phase_with_the_rest_and_the_pause(tmp_path):
    usual_run(tmp_path / "in process", steps=1)
    (sync,) = summarize(tmp_path / "in process")["syncs"]
    assert sync["phases"] == pytest.approx({"transfer": 0.1, "load": 0.15, "rest": 0.05})
    assert sync["gigabytes_per_second"] == pytest.approx(1.0)
    assert sync["gather_seconds"] == pytest.approx(0.05)
    writer = Writer(tmp_path / "server")
    step = writer.step(1, 0, 10)
    sync = writer.span(names.WEIGHT_SYNC, 0, 6, under=step, vgen__engine="server")
    for name, start, end in (
        ("transfer", 0, 1),
        ("pause", 1, 2),
        ("load", 2, 4),
        ("reset_cache", 4, 5),
        ("resume", 5, 6),
    ):
        writer.span(f"{names.WEIGHT_SYNC}.{name}", start, end, under=sync)
    (sync,) = summarize(tmp_path / "server")["syncs"]
    assert sync["paused_seconds"] == pytest.approx(5.0)
    assert sync["phases"]["rest"] == pytest.approx(0.0)


def test_memory_cycle_by_cycle(tmp_path, capsys):
    usual_run(tmp_path)
    found = summarize(tmp_path)["memory"]
    assert [cycle["step"] for cycle in found] == [1, 2, 3, 4]
    assert {cycle["freed_bytes"] for cycle in found} == {cycle["taken_bytes"] for cycle in found} == {1000}
    assert found[0]["asleep_seconds"] == pytest.approx(1.0)
    assert main(["report", str(tmp_path)]) == 0
    assert "the host memory of rank 0 grew by 3 B over 4 cycles" in words(capsys.readouterr().out)


def test_percentiles_of_several_ranks_are_those_of_all_values(tmp_path):
    dice, everything = random.Random(1), []
    for rank in (0, 1):
        writer, at = Writer(tmp_path, pid=rank, rank=rank), 0.0
        for number in range(3):
            step = writer.step(number, at, at + 10)
            # ranks unlike each other: an average of their percentiles would be far off
            seconds = [dice.uniform(0.1, 1) if rank == 0 else dice.uniform(5, 9) for _ in range(50 if rank else 150)]
            everything += seconds
            writer.generate(step, at, at + 9.5, [(at, at + took) for took in seconds])
            at += 11
    everything.sort()
    found = summarize(tmp_path)["total"]["requests"]["e2e"]
    assert found["count"] == 600
    for quantile, percent in (("p50", 50), ("p90", 90), ("p99", 99)):
        assert found[quantile] == pytest.approx(everything[(600 - 1) * percent // 100], rel=0.011)
    assert found["max"] == pytest.approx(everything[-1])


def test_stragglers_among_ranks_and_servers(tmp_path, capsys):
    for rank in range(4):
        writer, at = Writer(tmp_path, pid=rank, rank=rank), 0.0
        for number in range(3):
            update = 3.0 if rank == 2 else 1.0
            at = max(usual_step(writer, number, at, update=update), at + 5)
    found = summarize(tmp_path)["stragglers"]["ranks"]
    assert found[0] == {
        "process": "rank 2",
        "steps": 3,
        "slowest_in": 3,
        "phase": "update",
        "seconds_over_median": pytest.approx(6.0),
    }
    other = tmp_path / "servers"
    writer = Writer(other)
    for number in range(3):
        step = writer.step(number, 10 * number, 10 * number + 9)
        for server, seconds in (("http://a", 1.0), ("http://b", 4.0)):
            at = 10 * number
            writer.generate(step, at, at + seconds, [(at, at + seconds)] * 5, server=server)
    servers = summarize(other)["stragglers"]["servers"]
    assert [(one["server"], one["count"], one["last_in"]) for one in servers] == [
        ("http://b", 15, 3),
        ("http://a", 15, 0),
    ]
    assert main(["report", str(other)]) == 0
    assert "http://b 15 4.000 4.000 4.000 3 times" in words(capsys.readouterr().out)


def test_errors_and_lost_records_are_told(tmp_path, capsys):
    writer = Writer(tmp_path)
    step = writer.step(1, 0, 5, error="EngineError")
    writer.span(names.GENERATE, 0, 2, under=step, error="EngineError")
    writer.measure(names.DROPPED, [7], under=step)
    assert main(["report", str(tmp_path), "--step", "1"]) == 0
    output = capsys.readouterr()
    assert "vgen.generate ended with EngineError, once" in output.out
    assert "7 telemetry records were lost" in output.err
    assert summarize(tmp_path)["steps"][0]["error"] == "EngineError"


def test_many_steps_are_not_all_shown(tmp_path, capsys):
    usual_run(tmp_path, steps=60, slow=5)
    assert main(["report", str(tmp_path)]) == 0
    table = capsys.readouterr().out.split("where the time went")[1].split("the tail")[0].split("\n")
    shown = [line.split()[0] for line in table if line.strip()[:1].isdigit() and "%" not in line]
    assert "5" in shown
    assert shown[-1] == "60"
    assert len(shown) == 24
    assert any("…" in line for line in table)
