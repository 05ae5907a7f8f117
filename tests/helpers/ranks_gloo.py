"""What each rank of `test_ranks_gloo.py` runs: `ranks_gloo.py CASE,CASE FOLDER`.

A case returns what the test compares. Each rank writes those, or what was raised, with the seconds that each took.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import sys
import time
from dataclasses import replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from helpers.server_generation import Model
from helpers.waiting import wait_until
from vgen import (
    Completion,
    ProfilingContext,
    PromptError,
    Sampling,
    ServerConnection,
    ServerGeneration,
    WeightSyncError,
)
from vgen.distributed import collective_call, rank_sockets
from vgen.engine_protocol import Source
from vgen.profiling import semconv
from vgen.testing import FaultyServer, MemorySink

RANK, SIZE = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
TIMEOUT, GRACE, GROUP_TIMEOUT = 2.0, 1.0, 3.0
COMPLETIONS = "/v1/completions"


class Sharded(Source):
    """A source in which every tensor takes a collective, so that a rank that is alone waits."""

    collective = True
    bytes, tensors, seconds = 32, 8, 0.0

    def __init__(self, fails_at: int | None = None, error: Exception | None = None, group=None) -> None:
        self.seen, self._fails_at, self._error, self._group = 0, fails_at, error, group

    def __iter__(self):
        for number in range(8):
            if number == self._fails_at and self._error is not None:
                raise self._error
            tensor = torch.full((4,), float(RANK))
            dist.all_reduce(tensor, group=self._group)
            self.seen += 1
            yield f"layer.{number}", tensor


def generation(
    server: FaultyServer | None, group_port: int = 0, model: Model | None = None, **more: Any
) -> ServerGeneration:
    # Followers are given an address that nobody answers at: they open no connections.
    url = server.url if server is not None else "http://127.0.0.1:9"
    connection = ServerConnection(timeout=TIMEOUT, group_port=group_port)
    return ServerGeneration(model, base_urls=[url], connection=connection, **more)


def seeds(server: FaultyServer | None) -> list[int]:
    bodies = [body for path, _, body in server.seen if path == COMPLETIONS] if server else []
    return sorted(body["seed"] for body in bodies if body.get("seed") is not None)


def shown(completions) -> list:
    return [(c.prompt_index, c.generation_index, c.token_ids, c.logprobs, c.finish_reason) for c in completions]


class Taking:
    """Stands in for the server engine's sync: takes all, or fails at a tensor."""

    def __init__(self, fails_at: int | None = None) -> None:
        self.fails_at, self.taken = fails_at, list[float]()

    def __call__(self, source, version, trace, verify=None):
        with trace.phase("transfer"):
            for number, (_, tensor) in enumerate(source):
                if number == self.fails_at:
                    raise WeightSyncError("the server is full", phase="transfer", receiver="a server")
                self.taken.append(float(tensor[0]))


def trained(server: FaultyServer | None, **more: Any) -> ServerGeneration:
    """With a trainer's model, which the server takes before the first completion."""
    made = generation(server, model=Model(), **more)
    if server is not None:
        made.engine.inner.sync = Taking()
    return made


def ragged(server):
    """Different numbers of prompts, refused ones, none; then one more call."""
    sink = MemorySink()
    done: list[int] = []
    with trained(server, profiling=ProfilingContext([sink])) as made:
        prompts = [[[1, 2, 3], [], [4, 5]], [], [[9, 8, 7, 6], [70] * 20]][RANK]
        options = Sampling(max_tokens=3, seed=40)
        first = made.generate(prompts, options, 2, refused="mark", on_completion=lambda c: done.append(c.prompt_index))
        second = asyncio.run(made.agenerate([[RANK + 1]], Sampling(max_tokens=3)))
        made.pause()
        made.resume()
        report = made.sleep()
        made.wake_up()
        length = made.max_model_length
    (generate, *_), (engine_init,) = sink.named(semconv.GENERATE), sink.named(semconv.ENGINE_INIT)
    scatter, (sync,) = sink.named(semconv.RANKS_SCATTER), sink.named(semconv.WEIGHT_SYNC)
    timing = second[0].timing
    return {
        "first": shown(first),
        "second": shown(second),
        "seeds": seeds(server),
        "done": sorted(done),
        "length": length,
        "freed": report.memory_freed,
        "parents": sorted({span.parent.name for span in scatter + sink.named(semconv.RANKS_GATHER) if span.parent}),
        "ids": [generate.trace_id, generate.span_id],
        "sync": [sync.trace_id, sync.span_id],
        "links": [[link.trace_id, link.span_id] for link in generate.links],
        "bytes": scatter[0].attributes[semconv.RANKS_BYTES],
        "ranks": sorted({span.attributes[semconv.RANK] for span in sink.spans}),
        "model": engine_init.attributes[semconv.MODEL],
        "recent": timing is not None and 0 <= time.monotonic_ns() - timing.finished_ns < 60e9,
    }


def refused(server):
    """One rank's prompt is bad, and then one rank's call makes no sense: nobody waits."""
    with trained(server) as made:
        raised = []
        for prompts, sampling, count in (
            ([[1], [555]] if RANK == 1 else [[2]], Sampling(), 1),
            ([[1]], Sampling(temperature=0.5 if RANK == 1 else 1.0), 1),
            (["text"] if RANK == 1 else [[1]], Sampling(), 1),
        ):
            try:
                made.generate(prompts, sampling, count)
            except Exception as error:
                raised.append([type(error).__name__, str(error)])
        return {"raised": raised, "after": shown(made.generate([[RANK]], Sampling(max_tokens=1)))}


def engine_refuses(server):
    """What only the engine could tell of one rank's prompt."""
    made = generation(server)
    if server is not None:
        stream = made.engine.inner.stream

        def refuse(batch):
            for completion in stream(batch):
                bad = completion.key == (1, 0, 0)
                yield replace(completion, error=PromptError(0, "is not to its taste")) if bad else completion

        made.engine.inner.stream = refuse
    prompts = [[1], [2]] if RANK == 0 else [[3], [4]]
    marked = made.generate(prompts, Sampling(max_tokens=1), refused="mark")
    try:
        made.generate(prompts, Sampling(max_tokens=1))
    except Exception as error:
        return {"marked": [str(c.error) for c in marked], "raised": [type(error).__name__, str(error)]}


def several_hosts(server):
    """As if each rank were on a machine of its own: they meet at MASTER_ADDR, at a port that was chosen for them."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = [free.getsockname()[1]]
    dist.broadcast_object_list(port, 0)
    machine, rank_sockets._machine = rank_sockets._machine, lambda: (str(RANK), "")
    try:
        with generation(server, group_port=port[0]) as made:
            return {"second": shown(made.generate([[RANK]], Sampling(max_tokens=1)))}
    finally:
        rank_sockets._machine = machine


def port_taken(server):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = [other.getsockname()[1]]
        dist.broadcast_object_list(port, 0)
        generation(server, group_port=port[0])


def streams(server):
    with generation(server) as made:
        list(made.stream([[1]]))


def leader_fails(server):
    """The server answers some, then no more."""
    with generation(server) as made:
        made.generate([[1]])
        if server is not None:
            server.faults[COMPLETIONS] = [fault for _ in range(50) for fault in (500, "silent")]
        made.generate([[RANK, 2], [3]])


def leader_interrupted(server):
    def interrupt(completion: Completion) -> None:
        raise KeyboardInterrupt

    with generation(server) as made:
        made.generate([[1]], on_completion=interrupt if RANK == 0 else None)


def construction_fails(server):
    generation(None)  # nobody is there


def never_comes(server):
    """Rank 1 does something else; it is told when it comes."""
    with generation(server) as made:
        made.generate([[1]])
        if RANK == 1:
            time.sleep(TIMEOUT + 1.5)
        try:
            made.generate([[2]])
        except Exception as error:
            raised = [type(error).__name__, str(error)]
        else:
            raised = []
        return {"raised": raised, "after": shown(made.generate([[RANK]], Sampling(max_tokens=1)))}


def deaths(server):
    """The leader stands still until rank 1 has given up on it, rank 2 is killed, the leader is killed."""
    made, leader = generation(server), [os.getpid()]
    dist.broadcast_object_list(leader, 0)

    def signalled(rank: int, number: int) -> None:
        if rank == RANK:
            os.kill(os.getpid(), number)

    found = []
    for rank, number in ((0, 0), (0, signal.SIGSTOP), (0, 0), (2, signal.SIGKILL), (0, signal.SIGKILL)):
        signalled(rank, number)
        start = time.monotonic()
        try:
            said = ["done", None, shown(made.generate([[RANK]], Sampling(max_tokens=1)))[0][2]]
        except Exception as error:
            said = [type(error).__name__, getattr(error, "rank", None), str(error)]
        found.append([*said, time.monotonic() - start])
        if RANK == 1 and number == signal.SIGSTOP:
            os.kill(leader[0], signal.SIGCONT)
    return found


def sync(server, taking: Taking, source) -> dict:
    made = generation(server, model=Model())
    made.source = source
    if server is not None:
        made.engine.inner.sync = taking
    before = time.monotonic()
    try:
        report = made.sync_weights(version="a")
        raised = [report.version, report.tensors]
    except Exception as error:
        raised = [type(error).__name__, str(error)]
    seconds = time.monotonic() - before
    found = {"raised": raised, "seen": source.seen, "taken": taking.taken, "state": made.state, "seconds": seconds}
    made.close()
    return found


def sync_together(server):
    found = sync(server, Taking(), Sharded())
    dist.barrier()
    return found


def receiver_fails(server):
    found = sync(server, Taking(fails_at=2), Sharded())
    dist.barrier()  # the trainer's own group is still in step
    return found


def source_fails(server):
    """On rank 1, between two collectives: the others are in one until the process group's timeout."""
    failing = {"fails_at": 3, "error": OSError("lost its shard")} if RANK == 1 else {}
    group = dist.new_group(timeout=timedelta(seconds=GROUP_TIMEOUT))
    return sync(server, Taking(), Sharded(**failing, group=group))


def source_fails_everywhere(server):
    found = sync(server, Taking(), Sharded(3, WeightSyncError("sharded", phase="gather", receiver="trainer")))
    dist.barrier()
    return found


class Plain(Sharded):
    """Only one rank may iterate it: another would wait for ever."""

    collective = False

    def __iter__(self):
        self.seen += 1
        yield "a", torch.ones(1)


def plain_sync(server):
    return sync(server, Taking(), Plain())


def main(cases: list[str], folder: str) -> None:
    collective_call._GRACE = GRACE
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    results = {}
    for case in cases:
        server, start = FaultyServer() if RANK == 0 else None, time.monotonic()
        try:
            found = {"found": globals()[case](server)}
        except BaseException as error:
            known = {name: getattr(error, name, None) for name in ("rank", "status", "url")}
            found = {"error": type(error).__name__, "words": str(error), **known}
        results[case] = {**found, "seconds": time.monotonic() - start}
    path = os.path.join(folder, f"rank-{RANK}.json")
    with open(path + ".part", "w") as file:
        json.dump(results, file)
    os.rename(path + ".part", path)
    # Not to be the first who leaves: torchrun would end the others.
    others = [os.path.join(folder, f"rank-{rank}.json") for rank in range(SIZE)]
    with contextlib.suppress(AssertionError):
        wait_until(lambda: all(map(os.path.exists, others)), 20, every=0.05)
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1].split(","), sys.argv[2])
