"""Gloo ranks in front of a server: each gets its own completions, and whatever fails ends on all of them in time."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import helpers
import pytest
from helpers.waiting import wait_until

from vgen.generation.call_plan import request_seed
from vgen.profiling import semconv

pytestmark = pytest.mark.slow

pytest.importorskip("torch", reason="torch is not installed")
pytest.importorskip("aiohttp", reason="aiohttp is not installed: pip install 'vgen[server]'")

WORKER = str(Path(helpers.__file__).with_name("ranks_gloo.py"))
TIMEOUT, GRACE, GROUP_TIMEOUT = 2.0, 1.0, 3.0
SLACK = 8.0
"""Of a busy machine."""
TOGETHER = (
    *("ragged", "refused", "engine_refuses", "leader_interrupted", "construction_fails", "never_comes"),
    *("sync_together", "receiver_fails", "source_fails_everywhere", "plain_sync", "leader_fails", "source_fails"),
    *("several_hosts", "port_taken", "streams"),
)


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    """What three ranks under torchrun found in each case, by case and rank."""
    folder = tmp_path_factory.mktemp("three")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "3", WORKER]
    done = subprocess.run([*command, ",".join(TOGETHER), str(folder)], capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr[-3000:]
    found = [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(3)]
    return {case: [of_rank[case] for of_rank in found] for case in TOGETHER}


def apart(case: str, size: int, folder: Path) -> dict[int, dict]:
    """What the ranks that lived found, without a launcher that would end them when one dies."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    world = {**os.environ, "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    command = [sys.executable, WORKER, case, str(folder)]
    processes = [subprocess.Popen(command, env={**world, "RANK": str(rank)}) for rank in range(size)]
    paths = {rank: folder / f"rank-{rank}.json" for rank in range(size)}
    try:
        wait_until(
            lambda: all(process.poll() is not None or paths[rank].exists() for rank, process in enumerate(processes)),
            200,
            every=0.05,
        )
        return {rank: json.loads(path.read_text())[case] for rank, path in paths.items() if path.exists()}
    finally:
        for process in processes:
            process.kill()
            process.wait()


def same(values: list):
    assert all(value == values[0] for value in values), values
    return values[0]


def test_each_rank_is_given_its_own_completions_of_its_own_prompts(three):
    zero, one, two = (of["found"] for of in three["ragged"])
    assert [c[:3] for c in zero["first"]] == [
        [0, 0, [1, 2, 3]],
        [0, 1, [1, 2, 3]],
        [1, 0, []],
        [1, 1, []],
        [2, 0, [4, 5]],
        [2, 1, [4, 5]],
    ]
    assert [c[4] for c in zero["first"]] == ["length"] * 2 + ["error"] * 2 + ["length"] * 2
    assert one["first"] == []
    assert two["first"] == [
        [p, g, ids, [-0.5] * 3, "length"] for p, ids in ((0, [9, 8, 7]), (1, [70] * 3)) for g in (0, 1)
    ]
    assert [of["second"][0][2] for of in (zero, one, two)] == [[1], [2], [3]]
    assert [of["done"] for of in (zero, one, two)] == [[0, 0, 2, 2], [], [0, 0, 1, 1]]


def test_seeds_are_numbered_over_all_ranks_prompts(three):
    expected = sorted(request_seed(40, place, generation) for place in range(4) for generation in range(2))
    assert [sorted(of["found"]["seeds"]) for of in three["ragged"]] == [expected, [], []]


def test_facts_and_reports_are_the_leaders(three):
    found = [of["found"] for of in three["ragged"]]
    assert same([of["length"] for of in found]) == 64
    assert same([of["model"] for of in found]) == "tiny"
    assert same([of["freed"] for of in found]) is False
    assert all(of["recent"] for of in found)


def test_every_ranks_spans_lie_beneath_its_own_calls_and_are_linked_to_the_leaders(three):
    zero, one, two = (of["found"] for of in three["ragged"])
    for rank, of in enumerate((zero, one, two)):
        calls = {semconv.ENGINE_INIT, semconv.GENERATE, semconv.PAUSE, semconv.RESUME, semconv.SLEEP, semconv.WAKE_UP}
        assert set(of["parents"]) == calls | {semconv.WEIGHT_SYNC}  # the first generation syncs
        assert of["ranks"] == [rank]
    assert zero["links"] == [zero["sync"]]
    for of in (one, two):
        assert sorted(of["links"]) == sorted([zero["ids"], of["sync"]])


def test_a_rank_is_sent_no_more_than_its_own(three):
    zero, one, two = (of["found"] for of in three["ragged"])
    assert zero["bytes"] == one["bytes"] + two["bytes"]
    assert one["bytes"] < 600  # it has no completions


def test_what_one_rank_is_refused_is_raised_on_all_at_once(three):
    found = [of["found"] for of in three["refused"]]
    assert same([of["raised"] for of in found]) == [
        ["PromptError", "prompt 1 holds a token id outside the vocabulary of 100"],
        ["ValueError", "rank 1 called generate with another temperature than rank 0"],
        [
            "ArgumentError",
            "prompts must be token ids: prompt 0 is text, which needs processing_class in the constructor",
        ],
    ]
    assert max(of["seconds"] for of in three["refused"]) < SLACK
    assert [of["after"][0][2] for of in found] == [[0], [1], [2]]


def test_a_prompt_that_only_the_engine_refuses_is_raised_on_all_or_marked(three):
    found = [of["found"] for of in three["engine_refuses"]]
    assert [of["marked"] for of in found] == [["None"] * 2, ["prompt 0 is not to its taste", "None"], ["None"] * 2]
    assert same([of["raised"] for of in found]) == ["PromptError", "prompt 0 is not to its taste"]


def test_what_the_leaders_server_does_is_raised_on_every_rank(three):
    assert same([of["error"] for of in three["leader_fails"]]) == "ServerError"
    assert "completions" in same([of["words"] for of in three["leader_fails"]])
    assert same([of["url"] for of in three["leader_fails"]]).startswith("http://127.0.0.1")
    assert max(of["seconds"] for of in three["leader_fails"]) < TIMEOUT + GRACE + SLACK


@pytest.mark.fault(
    point="ranks as processes",
    did="The leader's engine cannot start",
    happens="Every rank raises its error",
    within=300,
)
def test_a_leader_that_cannot_start_is_raised_on_every_rank(three):
    assert same([of["error"] for of in three["construction_fails"]]) == "ServerError"
    assert "/v1/models" in same([of["words"] for of in three["construction_fails"]])


def test_ranks_of_several_hosts_meet_at_the_masters_address_and_the_given_port(three):
    assert [of["found"]["second"][0][2] for of in three["several_hosts"]] == [[0], [1], [2]]


def test_a_port_that_is_taken_is_said_on_every_rank(three):
    assert same([of["error"] for of in three["port_taken"]]) == "RankError"
    assert "choose another group_port" in same([of["words"] for of in three["port_taken"]])


def test_a_stream_is_refused_on_every_rank(three):
    assert same([of["error"] for of in three["streams"]]) == "ValueError"
    assert "generate()" in same([of["words"] for of in three["streams"]])


@pytest.mark.fault(
    point="ranks as processes",
    did="Ctrl-C on the leader",
    happens="The others raise at once",
    within=300,
)
def test_an_interrupted_leader_is_told_to_the_others(three):
    assert [of["error"] for of in three["leader_interrupted"]] == ["KeyboardInterrupt", "RankError", "RankError"]
    assert three["leader_interrupted"][1]["words"] == "rank 0 raised KeyboardInterrupt"


def test_a_rank_that_does_not_come_is_named_on_all_and_told_when_it_does(three):
    found = [of["found"] for of in three["never_comes"]]
    assert same([of["raised"] for of in found]) == ["RankError", "rank 1 did not come to generate within 2 s"]
    assert [of["after"][0][2] for of in found] == [[0], [1], [2]]


def test_all_ranks_iterate_a_collective_source_and_the_leader_alone_sends(three):
    zero, one, two = (of["found"] for of in three["sync_together"])
    assert zero["taken"] == [3.0] * 8  # 0 + 1 + 2, of every rank
    assert one["taken"] == two["taken"] == []
    assert [of["raised"] for of in (zero, one, two)] == [["a", 8], ["a", 0], ["a", 0]]
    assert [of["seen"] for of in (zero, one, two)] == [8, 8, 8]


@pytest.mark.fault(
    point="ranks as processes",
    did="The receiver of a sync fails",
    happens="All ranks finish the collective and raise",
    within=300,
)
def test_a_receiver_that_fails_leaves_nobody_in_a_collective(three):
    found = [of["found"] for of in three["receiver_fails"]]
    assert same([of["raised"] for of in found])[0] == "WeightSyncError"
    assert "the server is full" in found[1]["raised"][1]
    assert same([of["seen"] for of in found]) == 8
    assert same([of["state"] for of in found]) == "failed"
    assert len(found[0]["taken"]) == 2


def test_a_source_that_fails_everywhere_fails_at_once(three):
    found = [of["found"] for of in three["source_fails_everywhere"]]
    assert same([of["raised"] for of in found])[0] == "WeightSyncError"
    assert max(of["seconds"] for of in found) < SLACK


def test_a_plain_modules_weights_are_the_leaders_alone(three):
    assert [of["found"]["taken"] for of in three["plain_sync"]] == [[1.0], [], []]
    assert [of["found"]["seen"] for of in three["plain_sync"]] == [1, 0, 0]


@pytest.mark.fault(
    point="ranks as processes",
    did="The source fails on one rank",
    happens="All ranks raise its error",
    within=300,
)
def test_a_source_that_fails_on_one_rank_is_told_to_all(three):
    found = [of["found"] for of in three["source_fails"]]
    for of in found:
        kind, words = of["raised"]
        assert kind == "WeightSyncError"
        assert "rank 1" in words
        assert "lost its shard" in words
        assert "process group has its own timeout" in words
        assert of["seconds"] < GROUP_TIMEOUT + SLACK  # the others were in a collective


@pytest.mark.slow
@pytest.mark.fault(
    point="ranks as processes",
    did="A rank is stopped or killed, leader or not",
    happens="The others raise `RankError` that names it",
    within=300,
)
def test_ranks_that_stop_or_die_are_named_on_the_others(tmp_path):
    found = apart("deaths", 3, tmp_path)
    assert sorted(found) == [1]
    first, still, back, killed, leader_killed = found[1]["found"]
    assert first[:3] == back[:3] == ["done", None, [1]]
    assert still[:3] == ["RankError", 0, "rank 0 did not come to generate for 3 s"]
    assert killed[:3] == ["RankError", 2, "rank 2 is gone: its connection ended in generate"]
    assert leader_killed[:3] == ["RankError", 0, "rank 0 is gone: its connection ended in generate"]
    assert still[3] < TIMEOUT + GRACE + SLACK
