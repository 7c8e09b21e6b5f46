"""Starts a web application and its backends, asks it for everything, and lets its backends die.

    fault_driver.py DIRECTORY            all that fails between two processes
    fault_driver.py DIRECTORY dropped    alone with one backend, in a network namespace of its own,
                                         whose loopback drops all packets after the first request

Everything is started behind the gate, so that it is recorded from its beginning.
"""

from __future__ import annotations

import json
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
LOCAL = "127.0.0.1"
PATIENCE_SECONDS = 0.3
Process = subprocess.Popen[str]


def start(stack: ExitStack, name: str, argument: str) -> tuple[Process, int]:
    command = [sys.executable, str(HERE / f"{name}.py"), argument]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    stack.enter_context(process)
    stack.callback(process.kill)
    assert process.stdout is not None
    word, _, port = process.stdout.readline().partition(" ")
    assert word == "listening"
    return process, int(port)


def kill(process: Process) -> None:
    process.send_signal(signal.SIGKILL)
    process.wait()


def gate() -> None:
    print("ready", flush=True)
    sys.stdin.read(1)


def full_port(stack: ExitStack) -> int:
    """A port whose listener accepts nothing, and has as many waiting as it may."""
    listener = stack.enter_context(socket.create_server((LOCAL, 0), backlog=0))
    port = int(listener.getsockname()[1])
    for _ in range(3):
        end = stack.enter_context(socket.socket())
        end.setblocking(False)
        end.connect_ex((LOCAL, port))
    return port


def everything(directory: Path, stack: ExitStack) -> dict[str, Any]:
    full = full_port(stack)
    gate()
    unix = str(directory / "backend.sock")
    first, first_port = start(stack, "fault_backend", "0")
    second, second_port = start(stack, "fault_backend", "0")
    third, third_port = start(stack, "fault_backend", "0")
    fourth, _ = start(stack, "fault_backend", unix)
    places = {
        "first": first_port, "second": second_port, "third": third_port, "unix": unix, "full": full,
    }  # fmt: skip
    web, port = start(stack, "fault_web", json.dumps(places))
    statuses = {}

    def ask(*names: str) -> None:
        for name in names:
            connection = HTTPConnection(LOCAL, port, timeout=20)
            connection.request("GET", f"/{name}")
            response = connection.getresponse()
            statuses[name] = [response.status, response.read().decode()]
            connection.close()

    ask("first", "unix_first")
    kill(first)
    kill(fourth)
    ask("refused", "refused_timeout", "refused_asyncio", "dies", "timeout", "receive_timeout")
    ask("poll", "reset", "pooled", "broken_pipe", "stalled", "unix_refused", "unix_missing")
    ask("backlog", "unused")
    processes = {"first": first, "second": second, "third": third, "fourth": fourth, "web": web}
    pids = {name: process.pid for name, process in processes.items()}
    return {"statuses": statuses, "pids": pids, "places": places}


def run(*command: str) -> None:
    subprocess.run(command, check=True)


def dropped(stack: ExitStack) -> dict[str, Any]:
    ip, tc = (shutil.which(name, path="/usr/sbin:/sbin:/usr/bin:/bin") for name in ("ip", "tc"))
    assert ip and tc
    run(ip, "link", "set", "lo", "up")
    gate()
    backend, port = start(stack, "fault_backend", "0")
    request = b"GET /ok HTTP/1.1\r\nHost: backend\r\n\r\n"
    kept = stack.enter_context(socket.create_connection((LOCAL, port)))
    kept.sendall(request)
    assert kept.recv(4096)
    # a bucket that is too small for any packet
    shape: Sequence[str] = ("rate", "8bit", "burst", "1", "latency", "1ms")
    run(tc, "qdisc", "add", "dev", "lo", "root", "tbf", *shape)
    kept.settimeout(PATIENCE_SECONDS)
    kept.sendall(request)
    errors = []
    try:
        kept.recv(4096)
    except TimeoutError as error:
        errors.append(repr(error))
    kept.close()
    try:
        socket.create_connection((LOCAL, port), timeout=PATIENCE_SECONDS)
    except TimeoutError as error:
        errors.append(repr(error))
    return {"errors": errors, "backend": backend.pid}


def main() -> None:
    directory = Path(sys.argv[1])
    with ExitStack() as stack:
        note = dropped(stack) if "dropped" in sys.argv else everything(directory, stack)
    print(json.dumps(note), flush=True)


if __name__ == "__main__":
    main()
