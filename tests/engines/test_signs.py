"""What counts as progress while a server works on a batch."""

from __future__ import annotations

from vgen.engines import batches
from vgen.engines.base import Batch, Request
from vgen.engines.frames import Alive, End
from vgen.types import Sampling


class Says:
    """A server that says what it is told to."""

    name = "http://says"

    def __init__(self, *frames):
        self.said = frames

    async def frames(self, *_):
        for frame in self.said:
            yield frame


async def test_new_tokens_are_progress_and_a_heartbeat_is_none():
    signs = []
    requests = [Request(0, 0, [1], None)]
    batch = Batch(requests, Sampling(), moved=lambda: signs.append(1))
    counted = []
    for frames in ((Alive(1, 0),), (Alive(1, 0), Alive(1, 3)), (Alive(1, 3), Alive(1, 3), Alive(1, 4)), (Alive(1),)):
        signs.clear()
        async for _ in batches.complete(Says(*frames, End()), batch, requests, 1.0):
            pass
        counted.append(len(signs))
    assert counted == [0, 1, 2, 1]  # an engine that does not count is taken at its word
