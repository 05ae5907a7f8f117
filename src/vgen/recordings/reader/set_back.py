"""A clock that was set back while a process ran, by a person or by a time service.

A process reads its clock once for each trace, so within a trace all times fit together. But the step that follows may
seem to have happened before. A process records its steps in the order in which they ended, and that order tells.
"""

from __future__ import annotations

from collections.abc import Iterable

NOTICEABLE_NS = 1_000_000_000
"""Steps of several threads may be recorded in another order than they ended, but not by as much as this."""


def corrections(steps: Iterable[tuple[int, int, int]]) -> dict[int, int]:
    """By trace, the nanoseconds to add to its times. Traces that need none are left out.

    `steps` are trace, start and end of the steps of one process, in the order in which they were recorded. How long
    the process did nothing while its clock was set back is unknown, so the first step after that is taken to follow the
    one before at once.
    """
    found: dict[int, int] = {}
    shift, latest = 0, -(1 << 63)
    for trace, start, end in steps:
        if trace not in found:
            late = latest - end
            # A step that began before the clock was set back, and ended after that, has the right times.
            moved = late > NOTICEABLE_NS and abs(late - shift) <= late
            if moved and late - shift > NOTICEABLE_NS:
                shift = latest - start
            found[trace] = shift if moved else 0
        latest = max(latest, end + found[trace])
    return {trace: by for trace, by in found.items() if by}
