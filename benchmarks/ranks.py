"""The time to send completions from the leader to the other ranks: vgen's connections, `TCPStore`, gloo and pickles.

    python benchmarks/ranks.py [--ranks 2] [--completions 256] [--tokens 2048] [--json]

Every rank gets an equal share of `completions`, with log-probabilities. The time is from the start of packing on rank
0 until the last rank has its `Completion`s, as the median of `--repeat` runs. The bytes are those sent to one rank.
The baselines send the same bytes through a `TCPStore` (in pieces, because it takes at most 8 MB) or a gloo group, or
pickled objects: each rank its own by `scatter_object_list`, or all to all ranks by `broadcast_object_list`, as TRL
1.16 does.
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from vgen import Completion
from vgen.completion_codec import pack, unpack
from vgen.distributed.leader_ranks import LeaderRanks
from vgen.distributed.rank_messages import Message, decode, encode
from vgen.distributed.ranks import RankPrompt

PIECE = 4 << 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("ranks", 2), ("completions", 256), ("tokens", 2048), ("repeat", 7)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args()
    if "RANK" in os.environ:
        return run(arguments)
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(arguments.ranks)]
    subprocess.run([sys.executable, *launch, *sys.argv], check=True)


def run(arguments: argparse.Namespace) -> None:
    dist.init_process_group("gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    ranks = LeaderRanks(rank, size, timeout=60.0)
    host = [None if rank else dist.TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)]
    ports = [host[0].port if host[0] is not None else None]
    dist.broadcast_object_list(ports, 0)
    store = host[0] or dist.TCPStore("127.0.0.1", ports[0], None, False, wait_for_workers=False)
    share = arguments.completions // size
    sampled = [
        Completion(
            rank=index // share,
            prompt_index=index % share,
            generation_index=0,
            token_ids=[(index + place) % 50000 for place in range(arguments.tokens)],
            logprobs=[float(x) for x in torch.rand(arguments.tokens)],
            finish_reason="length",
            request_id=f"cmpl-{index:032x}-0",
        )
        for index in range(share * size if rank == 0 else 0)
    ]
    parts = [sampled[share * to : share * (to + 1)] for to in range(size)]
    numbers = iter(range(1 << 30))

    def connections() -> int:
        with ranks.call("generate") as call:
            call.gather([RankPrompt(index, [1], rank=rank) for index in range(share)], {})
            call.lead(lambda: sampled)
            received = call.scatter(sampled)
        assert len(received) == share
        return len(packed(parts[-1])) if rank == 0 else 0

    def through_store() -> int:
        key = str(next(numbers))
        if rank:
            count = int(store.get(f"{key}/{rank}"))
            raw = b"".join(store.get(f"{key}/{rank}/{piece}") for piece in range(count))
            unpacked(raw)
            return 0
        raws = [packed(part) for part in parts]
        for to, raw in enumerate(raws[1:], 1):
            pieces = [raw[start : start + PIECE] for start in range(0, len(raw), PIECE)]
            for piece, content in enumerate(pieces):
                store.set(f"{key}/{to}/{piece}", content)  # pyright: ignore[reportArgumentType]
            store.set(f"{key}/{to}", str(len(pieces)))
        return len(raws[-1])

    def through_gloo() -> int:
        if rank:
            length = torch.zeros(1, dtype=torch.int64)
            dist.recv(length, 0)
            raw = torch.empty(int(length), dtype=torch.uint8)
            dist.recv(raw, 0)
            unpacked(raw.numpy().tobytes())
            return 0
        for to in range(1, size):
            raw = packed(parts[to])
            dist.send(torch.tensor([len(raw)]), to)
            dist.send(torch.frombuffer(bytearray(raw), dtype=torch.uint8), to)
        return len(raw)

    def scattered() -> int:
        box: list[Any] = [None]
        dist.scatter_object_list(box, parts if rank == 0 else [None] * size, 0)
        return 0 if rank else len(pickle.dumps(parts[-1]))

    def broadcast() -> int:
        box = [(([c.token_ids for c in sampled], [c.logprobs for c in sampled])) if rank == 0 else None]
        dist.broadcast_object_list(box, 0)
        return 0 if rank else len(pickle.dumps(box[0]))

    rows = {
        name: measure(way, arguments.repeat)
        for name, way in {
            "vgen's connections": connections,
            "the same bytes, TCPStore": through_store,
            "the same bytes, gloo": through_gloo,
            "pickles, each its own": scattered,
            "pickles, all to all": broadcast,
        }.items()
    }
    if rank == 0:
        own = share * arguments.tokens * 8
        result = {"ranks": size, "own_share_bytes": own, "rows": rows}
        print(json.dumps(result) if arguments.json else "\n".join(table(rows, own)))
    dist.barrier()
    ranks.close()
    dist.destroy_process_group()


def packed(completions: list[Completion]) -> bytes:
    """The message with which a rank gets these completions."""
    return encode(Message("data", 0, 0, completions=[pack(completion) for completion in completions]))


def unpacked(raw: bytes) -> list[Completion]:
    return [unpack(completion) for completion in decode(raw).completions]


def measure(way: Callable[[], int], repeat: int) -> dict[str, float]:
    seconds = []
    size = 0
    for _ in range(repeat + 1):
        dist.barrier()
        start = time.perf_counter()
        size = max(size, way())
        dist.barrier()
        seconds.append(time.perf_counter() - start)
    return {"seconds": statistics.median(seconds[1:]), "fastest": min(seconds[1:]), "bytes": size}


def table(rows: dict[str, dict[str, float]], own: int) -> list[str]:
    lines = [f"{'':28}{'median ms':>10}{'fastest':>10}{'bytes to a rank':>18}{'of its share':>14}"]
    for name, row in rows.items():
        median, fastest = row["seconds"] * 1e3, row["fastest"] * 1e3
        lines.append(f"{name:28}{median:10.1f}{fastest:10.1f}{row['bytes']:18,.0f}{row['bytes'] / own:14.3f}")
    return lines


if __name__ == "__main__":
    main()
