"""Ends a server's processes, and deletes its key, once the process that started them has ended, whatever the cause."""

from __future__ import annotations

import os
import shutil
import signal
import threading
import time
from pathlib import Path

LAUNCHER_VARIABLE = "VGEN_LAUNCHER_PID"
"""Set in the environment of a server that vgen started. Without it this module does nothing."""
FOLDER_VARIABLE = "VGEN_SERVER_FOLDER"
"""Names the server's temporary folder, which holds its control key. The launcher deletes it, if it is not killed."""
_FIRST_VARIABLE = "VGEN_SERVER_PID"
_OF_ONE_SERVER = (FOLDER_VARIABLE, _FIRST_VARIABLE)
THREAD_NAME = "vgen-parent-watchdog"
POLL_SECONDS = 0.5
GRACE_SECONDS = 10.0
"""Between SIGTERM and SIGKILL."""

_watching: int | None = None
"""PID of the process that this module watches for: a forked child inherits the variable, but not the thread."""


def environment() -> dict[str, str]:
    """The environment for a server whose processes shall end with this process."""
    inherited = {name: value for name, value in os.environ.items() if name not in _OF_ONE_SERVER}
    return {**inherited, LAUNCHER_VARIABLE: str(os.getpid())}


def follow_parent() -> None:
    """End this process, and its process group if it leads one, once its parent has ended. May be called repeatedly.

    A thread polls the parent's PID. The kernel's signal for this (`PR_SET_PDEATHSIG`) comes when the *thread* that
    started the process ends, and a pipe stays open in every process that the parent has forked.
    """
    global _watching
    if LAUNCHER_VARIABLE not in os.environ or _watching == os.getpid():
        return
    _watching = os.getpid()
    # The server's first process leads a group. Its parent is the launcher, which may have ended already.
    leads_group = os.getpgrp() == os.getpid() and _FIRST_VARIABLE not in os.environ
    os.environ.setdefault(_FIRST_VARIABLE, str(os.getpid()))
    parent = int(os.environ[LAUNCHER_VARIABLE]) if leads_group else os.getppid()
    threading.Thread(target=_watch, args=(parent, leads_group), name=THREAD_NAME, daemon=True).start()


def _watch(parent: int, leads_group: bool) -> None:
    while os.getppid() == parent:
        time.sleep(POLL_SECONDS)
    # The parent was killed. Perhaps it is the launcher, or both are gone: nobody else deletes the folder then.
    if (folder := os.environ.get(FOLDER_VARIABLE)) and (leads_group or _has_ended(os.environ[LAUNCHER_VARIABLE])):
        shutil.rmtree(folder, ignore_errors=True)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(GRACE_SECONDS)
    if leads_group:
        os.killpg(os.getpid(), signal.SIGKILL)
    os.kill(os.getpid(), signal.SIGKILL)


def _has_ended(pid: str) -> bool:
    """Whether there is no such process, or only the remains that its parent has not collected yet."""
    try:
        os.kill(int(pid), 0)
        return Path("/proc", pid, "stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except PermissionError:
        return False
    except OSError:
        return True
