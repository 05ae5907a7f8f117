"""The parts of `vgen demo` that need no engine; the whole of it is run in `tests/real/test_demo.py`."""

from __future__ import annotations

import json
import math
import os
from types import SimpleNamespace

import pytest

from vgen import Completion, Completions, ProfilingContext, demo
from vgen.cli import main
from vgen.profiling.sinks.jsonl import JsonlSink


@pytest.fixture
def result(tmp_path) -> demo.DemoResult:
    """Two steps as a CPU would have them, with the record of the last one."""
    sink = JsonlSink(tmp_path)
    with ProfilingContext([sink]) as profiling, profiling.step(2), profiling.span("rollout"):
        pass
    seconds = dict(sync_seconds=0.5, update_seconds=0.25, sleep_seconds=0.1, wake_up_seconds=0.2)
    amounts = dict(output_tokens=100, sync_bytes=3_000_000, freed_bytes=None, mean_reward=0.5)
    steps = [demo.StepFigures(step=number, generate_seconds=2.0 * number, **seconds, **amounts) for number in (1, 2)]
    return demo.DemoResult("vLLM on cpu", steps, 1e-6, sink.path)


def test_rates_are_amounts_by_seconds(result):
    first, second = result.steps
    assert (first.tokens_per_second, second.tokens_per_second) == (50.0, 25.0)
    assert first.sync_gigabytes_per_second == pytest.approx(0.006)


def test_json_is_one_line_with_figures_rates_and_totals(result, capsys):
    demo.print_json(result)
    (line,) = capsys.readouterr().out.splitlines()
    printed = json.loads(line)
    assert (printed["engine"], printed["trace_file"]) == ("vLLM on cpu", str(result.trace_file))
    assert (printed["output_tokens"], printed["sync_bytes"]) == (200, 6_000_000)
    assert [step["tokens_per_second"] for step in printed["steps"]] == [50.0, 25.0]
    assert printed["steps"][1]["freed_bytes"] is None


def test_tables_show_each_step_the_last_trace_and_where_the_record_is(result, capsys):
    demo.print_tables(result)
    out = capsys.readouterr().out
    heading, *rows = out.splitlines()[1:4]
    assert heading.split()[-1] == "reward"
    assert [row.split()[:2] for row in rows] == [["1", "2.000"], ["2", "4.000"]]
    for expected in ("step 2", "rollout", "max |Δ| = 1.0e-06", f"recorded in {result.trace_file}"):
        assert expected in out
    assert f"vgen report {result.trace_file.parent}\n" in out


def test_on_a_gpu_the_table_has_the_memory_that_sleep_freed(result, capsys):
    from dataclasses import replace

    demo.print_tables(replace(result, steps=[replace(step, freed_bytes=5 << 30) for step in result.steps]))
    heading, *rows = capsys.readouterr().out.splitlines()[1:4]
    assert heading.rstrip().endswith("freed GiB")
    assert [row.split()[-1] for row in rows] == ["5.00", "5.00"]


@pytest.mark.parametrize("more", [[], ["--json"]])
def test_a_wrong_path_is_an_error_before_the_engine_starts(tmp_path, capsys, more):
    (tmp_path / "file").touch()
    for arguments, message in (
        (["--out", str(tmp_path / "file" / "run")], "cannot write"),
        (["--out", str(tmp_path / "run"), "--model", str(tmp_path)], "no config.json"),
    ):
        assert main(["demo", *arguments, *more]) == 2
        printed = capsys.readouterr()
        assert printed.out == ""
        assert printed.err.startswith("vgen demo: ")
        assert message in printed.err


def test_an_error_of_the_run_names_the_log_with_the_engines_output(tmp_path, capfd, monkeypatch):
    def train(steps, directory, path, terminal):
        os.write(1, b"the engine's last words\n")
        print("50 %", file=terminal)
        raise RuntimeError("out of memory")

    monkeypatch.setattr(demo, "_train", train)
    assert main(["demo", "--out", str(tmp_path)]) == 1
    printed = capfd.readouterr()
    assert printed.out == ""
    assert printed.err.splitlines() == [
        "50 %",
        "vgen demo: RuntimeError: out of memory",
        f"vgen demo: the engine's output is in {tmp_path / 'engine.log'}",
    ]
    assert (tmp_path / "engine.log").read_text() == "the engine's last words\n"


def test_the_difference_is_the_largest_between_engine_and_model_and_nan_is_not_hidden():
    torch = pytest.importorskip("torch", reason="torch is not installed: pip install 'vgen[cpu]'")

    class Uniform(torch.nn.Module):
        """Gives each of four tokens the same probability."""

        device = torch.device("cpu")

        def forward(self, ids):
            return SimpleNamespace(logits=torch.zeros(*ids.shape, 4))

    def completions(*logprobs):
        made = [Completion(prompt_index=0, generation_index=0, token_ids=[1, 2], logprobs=list(logprobs))]
        return Completions([[3]], made, 1, None)

    quarter = math.log(0.25)
    assert demo.max_logprob_difference(Uniform(), completions(quarter, quarter)) == pytest.approx(0.0, abs=1e-6)
    assert demo.max_logprob_difference(Uniform(), completions(quarter, quarter + 0.5)) == pytest.approx(0.5)
    assert math.isnan(demo.max_logprob_difference(Uniform(), completions(math.nan, quarter)))
