"""A run's figures, against what its records were made of."""

from __future__ import annotations

import json
import random

import pytest
from helpers.handmade import Writer, usual_run, usual_step, words

from vgen.cli import main
from vgen.profiling import semconv
from vgen.recordings.report.figure_types import RankStraggler
from vgen.recordings.report.figures import summarize


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
    found = summarize(tmp_path).total.requests["e2e"]
    assert found.count == 600
    for quantile, percent in (("p50", 50), ("p90", 90), ("p99", 99)):
        assert getattr(found, quantile) == pytest.approx(everything[(600 - 1) * percent // 100], rel=0.011)
    assert found.max == pytest.approx(everything[-1])


def test_stragglers_among_ranks_and_servers(tmp_path, capsys):
    for rank in range(4):
        writer, at = Writer(tmp_path, pid=rank, rank=rank), 0.0
        for number in range(3):
            update = 3.0 if rank == 2 else 1.0
            at = max(usual_step(writer, number, at, update=update), at + 5)
    found = summarize(tmp_path).stragglers.ranks
    assert found[0] == RankStraggler("rank 2", 3, 3, "update", pytest.approx(6.0))
    other = tmp_path / "servers"
    writer = Writer(other)
    for number in range(3):
        step = writer.step(number, 10 * number, 10 * number + 9)
        for server, seconds in (("http://a", 1.0), ("http://b", 4.0)):
            at = 10 * number
            writer.generate(step, at, at + seconds, [(at, at + seconds)] * 5, server=server)
    servers = summarize(other).stragglers.servers
    assert [(one.server, one.count, one.last_in) for one in servers] == [
        ("http://b", 15, 3),
        ("http://a", 15, 0),
    ]
    assert main(["report", str(other)]) == 0
    assert "http://b 15 4.000 4.000 4.000 3 times" in words(capsys.readouterr().out)


def test_errors_and_lost_records_are_told(tmp_path, capsys):
    writer = Writer(tmp_path)
    step = writer.step(1, 0, 5, error="EngineError")
    writer.span(semconv.GENERATE, 0, 2, under=step, error="EngineError")
    writer.measure(semconv.DROPPED, [7], under=step)
    assert main(["report", str(tmp_path), "--step", "1"]) == 0
    output = capsys.readouterr()
    assert "vgen.generate ended with EngineError, once" in output.out
    assert "7 telemetry records were lost" in output.err
    assert summarize(tmp_path).steps[0].error == "EngineError"


def test_a_steps_percentiles_are_exact_and_those_that_their_names_say(tmp_path):
    writer = Writer(tmp_path)
    step = writer.step(1, 0, 200)
    seconds = [float(number) for number in range(1, 102)]
    writer.generate(step, 0, 190, [(0, took) for took in reversed(seconds)])
    found = summarize(tmp_path).steps[0].requests["e2e"]
    assert (found.count, found.mean) == (101, pytest.approx(51.0))
    assert [found.p50, found.p90, found.p99, found.max] == pytest.approx([51.0, 91.0, 100.0, 101.0])
