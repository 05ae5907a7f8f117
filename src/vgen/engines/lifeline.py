"""A server's processes end when the process that started them has gone, however it went."""

from __future__ import annotations

import os
import signal
import threading
import time

LAUNCHER_VARIABLE = "VGEN_LAUNCHER_PID"
"""Set in the environment of a server that vgen started; elsewhere nothing here does anything."""
_FIRST_VARIABLE = "VGEN_SERVER_PID"
POLL_SECONDS = 0.5
GRACE_SECONDS = 10.0
"""Between being asked to end and being ended."""

_followed: int | None = None


def environment() -> dict[str, str]:
    """What a server is started with so that its processes follow this one."""
    inherited = {name: value for name, value in os.environ.items() if name != _FIRST_VARIABLE}
    return {**inherited, LAUNCHER_VARIABLE: str(os.getpid())}


def follow_parent() -> None:
    """End this process, and the group that it leads, once its parent has died. May be called any number of times.

    The parent is asked for rather than told of: the kernel's own signal (`PR_SET_PDEATHSIG`) comes when the
    *thread* that started a process ends, and a pipe is held open by whatever the parent has forked.
    """
    global _followed
    if LAUNCHER_VARIABLE not in os.environ or _followed == os.getpid():
        return
    _followed = os.getpid()
    # The server's first process leads a group, and has the launcher for a parent, or had.
    leads = os.getpgrp() == os.getpid() and _FIRST_VARIABLE not in os.environ
    os.environ.setdefault(_FIRST_VARIABLE, str(os.getpid()))
    parent = int(os.environ[LAUNCHER_VARIABLE]) if leads else os.getppid()
    threading.Thread(target=_follow, args=(parent, leads), name="vgen-lifeline", daemon=True).start()


def _follow(parent: int, leads: bool) -> None:
    while os.getppid() == parent:
        time.sleep(POLL_SECONDS)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(GRACE_SECONDS)
    if leads:
        os.killpg(os.getpid(), signal.SIGKILL)
    os.kill(os.getpid(), signal.SIGKILL)
