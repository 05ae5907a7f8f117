"""The processes of a server end with the process that started them."""

from __future__ import annotations

import os
import subprocess
import sys
import threading

import psutil

from vgen.engines.server import parent_watchdog

PARENT = """
import subprocess, sys, time
from vgen.engines.server import parent_watchdog
child = '''
import os, subprocess, sys, time
from vgen.engines.server.parent_watchdog import follow_parent
follow_parent(); follow_parent()
code = "import os, time; from vgen.engines.server.parent_watchdog import follow_parent"
code += "; follow_parent(); print(os.getpid(), flush=True); time.sleep(600)"
print(os.getpid(), flush=True)
subprocess.run([sys.executable, "-c", code])
'''
subprocess.run([sys.executable, "-c", child], env=parent_watchdog.environment(), start_new_session=True)
"""


def test_all_of_a_servers_processes_end_with_a_parent_that_was_killed():
    parent = subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    pids = [int(parent.stdout.readline()) for _ in range(2)]  # each prints it once it watches its parent
    processes = [psutil.Process(pid) for pid in pids]
    parent.kill()
    parent.wait()
    _, alive = psutil.wait_procs(processes, timeout=8)
    assert [process for process in alive if process.status() != psutil.STATUS_ZOMBIE] == []


def test_without_a_launcher_no_thread_watches(monkeypatch):
    monkeypatch.delenv(parent_watchdog.LAUNCHER_VARIABLE, raising=False)
    parent_watchdog.follow_parent()
    assert parent_watchdog.THREAD_NAME not in {thread.name for thread in threading.enumerate()}


def test_a_servers_environment_names_this_process_and_no_other_server(monkeypatch):
    monkeypatch.setenv("VGEN_SERVER_PID", "1")
    variables = parent_watchdog.environment()
    assert variables[parent_watchdog.LAUNCHER_VARIABLE] == str(os.getpid())
    assert "VGEN_SERVER_PID" not in variables
