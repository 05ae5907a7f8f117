"""The processes of a server end with the process that started them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import psutil
import pytest
from helpers.waiting import wait_until

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


@pytest.mark.fault(
    point="the server's launcher",
    did="The launcher is killed with SIGKILL",
    happens="All of the server's processes end",
    within=60,
)
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
    monkeypatch.setenv(parent_watchdog.FOLDER_VARIABLE, "/another/servers")
    variables = parent_watchdog.environment()
    assert variables[parent_watchdog.LAUNCHER_VARIABLE] == str(os.getpid())
    assert not {"VGEN_SERVER_PID", parent_watchdog.FOLDER_VARIABLE} & set(variables)


LAUNCHER = """
import os, signal, sys
from vgen.engines.server import launcher
core = "import os, time; from vgen.engines.server.parent_watchdog import follow_parent"
core += "; follow_parent(); print('core', os.getpid(), flush=True); time.sleep(600)"
code = "import os, subprocess, sys; from vgen.engines.server.parent_watchdog import follow_parent"
code += f"; follow_parent(); print('server', os.getpid(), flush=True); subprocess.run([sys.executable, '-c', {core!r}])"
launcher.server_command = lambda *_, **__: [sys.executable, "-c", code]
server = launcher.start_server(sys.argv[1], wait=False, log_file=sys.argv[2])
print(server.control_key_file, flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("killed", [["launcher"], ["launcher", "server"], ["server", "launcher"]])
@pytest.mark.parametrize("collected", [True, False])
def test_the_key_of_a_launcher_that_was_killed_is_deleted(tmp_path, killed, collected):
    pytest.importorskip("vllm", reason="vLLM is not installed, and start_server looks for it")
    (tmp_path / "config.json").write_text("{}")
    log = tmp_path / "log"
    command = [sys.executable, "-c", LAUNCHER, str(tmp_path), str(log)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as launcher:
        assert launcher.stdout is not None
        key = Path(launcher.stdout.readline().strip())
        wait_until(lambda: "core" in log.read_text() and log.read_text().endswith("\n"))
        pids = dict(line.split() for line in log.read_text().splitlines()) | {"launcher": str(launcher.pid)}
        assert key.exists()
        launcher.send_signal(signal.SIGSTOP)  # so that it does not notice what happens to its server
        for process in killed:
            os.kill(int(pids[process]), signal.SIGKILL)
        if collected:
            launcher.wait()
        wait_until(lambda: not key.parent.exists())  # else it is a zombie
    core = psutil.Process(int(pids["core"])) if psutil.pid_exists(int(pids["core"])) else None
    wait_until(lambda: core is None or not core.is_running() or core.status() == psutil.STATUS_ZOMBIE)
