"""Whether recorders left a target as it was: its code, its answers, and nothing in the kernel."""

from __future__ import annotations

import hashlib
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.live.contexts import Server
from tests.live.failures import Recorder, attach, is_loaded, wait_until
from tests.live.pythons import Python
from tests.live.recording import PROGRAMS
from tests.live.roots import OWN, ROOT

# Until a recorder is at work; what it does before is as likely to be interrupted.
START_SECONDS = 2.0
REQUESTS = 10**6  # more than are answered
CONCURRENCY = 8


def private_python(directory: Path) -> tuple[Python, dict[str, str]]:
    """A copy of the project's interpreter, and the environment that it needs.

    Uprobes are of a file: other recorders on this machine put theirs into all processes that run it. A
    copy is a file that only we know of.
    """
    own = Path(sys.executable).resolve()
    files = {own}
    for line in Path("/proc/self/maps").read_text().splitlines():
        path = Path(line.partition("/")[1] + line.partition("/")[2])
        if path.name.startswith("libpython3"):
            files.add(path)
    for file in files:
        shutil.copy(file, directory / file.name)
    packages = [path for path in sys.path if path.endswith("-packages")]
    environment = {
        "LD_LIBRARY_PATH": str(directory),
        "PYTHONHOME": sys.base_prefix,
        "PYTHONPATH": ":".join([str(ROOT), *packages]),
    }
    return Python(directory / own.name, OWN.version), environment


def code_of(pid: int, directory: Path = Path("/")) -> dict[str, str]:
    """A digest of each executable mapping of a file in the directory, as it is in a process's memory.

    A uprobe that is in place is seen in it: the kernel writes a breakpoint there.
    """
    found = {}
    with open(f"/proc/{pid}/mem", "rb", buffering=0) as memory:
        for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
            match = re.match(r"([0-9a-f]+)-([0-9a-f]+) r-xp \S+ \S+ \S+\s+(/.*)", line)
            if match is None or not Path(match[3]).is_relative_to(directory):
                continue
            begin, end = int(match[1], 16), int(match[2], 16)
            memory.seek(begin)
            data = b""
            while len(data) < end - begin and (more := memory.read(end - begin - len(data))):
                data += more
            assert len(data) == end - begin
            found[f"{match[1]} {match[3]}"] = hashlib.sha256(data).hexdigest()
    return found


@contextmanager
def load(server: Server) -> Iterator[None]:
    """Have a server answer all the time; each answer must be right, and it must still be at it."""
    arguments = map(str, (server.port, REQUESTS, CONCURRENCY, 0))
    client = subprocess.Popen(
        [sys.executable, PROGRAMS / "contexts_client.py", *arguments],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield
        code = client.poll()
        assert code is None, client.communicate()[1]
    finally:
        client.kill()
        client.communicate()


def interrupt(folder: Path, pids: list[int], count: int, number: signal.Signals) -> set[str]:
    """Attach so often, and end each recorder by a signal at any moment; returns what it was doing.

    SIGKILL at any moment, also while it loads and attaches. Other signals when it is at work: each
    then ends with 0.
    """
    moments = random.Random(count)
    states = set()
    ids = set()
    for turn in range(count):
        place = folder / str(turn)
        place.mkdir()
        with attach(place, *pids) as recorder:
            if number == signal.SIGKILL:
                _watch(recorder, moments.random() * START_SECONDS)
                recorder.process.kill()
                recorder.process.wait()
                states.add("attached" if "; Ctrl-C ends it\n" in recorder.err else "starting")
            else:
                recorder.attached()
                time.sleep(moments.random() * 0.05)
                assert recorder.stop(number) == 0, recorder.err
                states.add("attached")
        ids |= recorder.ids
    wait_until(lambda: not any(map(is_loaded, ids)))
    assert ids
    return states


def attach_often(pids: list[int], count: int) -> None:
    """Attach so often to processes, and detach a moment later, without recording; by one process."""
    command = [sys.executable, PROGRAMS / "harmless_attach.py", count, *pids]
    done = subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{count} times, nothing left\n"


def _watch(recorder: Recorder, seconds: float) -> None:
    """Take up what it has in the kernel, for so long."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        recorder.look_for_ids()
        time.sleep(0.01)
