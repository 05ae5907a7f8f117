"""Leader ranks in one process: each is a thread, and their connections are socket pairs."""

from __future__ import annotations

import socket
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from vgen.distributed import leader_ranks
from vgen.distributed.leader_ranks import LeaderRanks
from vgen.distributed.rank_sockets import RankConnection


def on_leader_ranks(monkeypatch: Any, size: int, function: Callable[[LeaderRanks], Any], timeout: float = 5.0) -> list:
    """What `function(ranks)` returns or raises on each of `size` ranks."""
    meetings: list[list[dict[int, RankConnection]]] = [[{} for _ in range(3)] for _ in range(size)]
    for channel in range(3):
        for rank in range(1, size):
            leaders, others = socket.socketpair()
            # The options that a connection sets are TCP's.
            monkeypatch.setattr(socket.socket, "setsockopt", lambda *_: None)
            meetings[0][channel][rank], meetings[rank][channel][0] = RankConnection(leaders), RankConnection(others)
    monkeypatch.setattr(leader_ranks, "meet", lambda index, *_: meetings[index])

    def run(rank: int) -> Any:
        ranks = LeaderRanks(rank, size, timeout=timeout)
        try:
            return function(ranks)
        except BaseException as error:
            return error
        finally:
            ranks.close()

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(run, range(size)))
