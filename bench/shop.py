"""The shop of examples/shop in a cgroup of its own, which tells its CPU time exactly.

Processes come and go (PostgreSQL makes one per connection); the cgroup's count has them all.
"""

from __future__ import annotations

import json
import os
import select
import shutil
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

EXAMPLE = Path(__file__).resolve().parent.parent / "examples" / "shop"
START_SECONDS = 120
END_SECONDS = 40
LOAD_SECONDS = 300


@dataclass(frozen=True)
class Loaded:
    """One run of the load."""

    requests: int
    seconds: float
    cpu_ns: int  # of all processes of the shop
    p50_ms: float

    @property
    def cpu_ns_per_request(self) -> float:
        """CPU time of the whole shop per request."""
        return self.cpu_ns / self.requests

    @property
    def rate(self) -> float:
        """Requests per second."""
        return self.requests / self.seconds


class AccountingGroup:
    """A cgroup that counts CPU time: of version 1 (cpuacct) or 2, whichever is mounted."""

    def __init__(self) -> None:
        """Make it.

        Raises:
            RuntimeError: there is no hierarchy that counts CPU time.
        """
        for line in Path("/proc/self/mounts").read_text().splitlines():
            _, place, kind, options = line.split()[:4]
            if kind == "cgroup" and "cpuacct" in options.split(","):
                self._count = "cpuacct.usage"
                break
            if kind == "cgroup2" and (Path(place) / "cpu.stat").exists():
                self._count = "cpu.stat"
                break
        else:
            raise RuntimeError("cannot count the shop's CPU time: no cgroup counts it here")
        self._root = Path(place)
        self.directory = self._root / f"scope-bench-{os.getpid()}"
        self.directory.mkdir()

    def cpu_ns(self) -> int:
        """CPU time so far of all processes that are or were in it."""
        text = (self.directory / self._count).read_text()
        if self._count == "cpuacct.usage":
            return int(text)
        return 1000 * int(dict(line.split() for line in text.splitlines())["usage_usec"])

    def release(self, pid: int) -> None:
        """Take a process out of it."""
        (self._root / "cgroup.procs").write_text(str(pid))

    def remove(self) -> None:
        """Remove it, once its last process is gone."""
        for _ in range(100):
            with suppress(OSError):
                self.directory.rmdir()
            if not self.directory.exists():
                return
            time.sleep(0.05)


class MeasuredShop:
    """The running shop; a context manager that ends it."""

    url: str
    pids: tuple[int, ...]

    def __enter__(self) -> MeasuredShop:
        """Start it, and wait until it answers."""
        self._group = AccountingGroup()
        try:
            self._start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def _start(self) -> None:
        # when this process is killed, the shop ends itself
        guard = ["setpriv", "--pdeathsig", "TERM", "--"] if shutil.which("setpriv") else []
        join = 'echo $$ > "$0/cgroup.procs" && exec "$@"'
        shop = [sys.executable, str(EXAMPLE / "service.py")]
        self._process = subprocess.Popen(
            [*guard, "sh", "-c", join, str(self._group.directory), *shop],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        assert self._process.stdout is not None
        if not select.select([self._process.stdout], [], [], START_SECONDS)[0]:
            raise RuntimeError(f"the shop has not started within {START_SECONDS} s")
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError("the shop did not start; see above")
        place: dict[str, Any] = json.loads(line)
        self.url = place["url"]
        self.pids = tuple(place["pids"].values())
        # who started it and looks after it is not traced, so it must not be counted
        self._group.release(self._process.pid)

    def __exit__(self, *_: object) -> None:
        """End it and remove its cgroup."""
        if hasattr(self, "_process"):
            self._process.terminate()
            try:
                self._process.wait(END_SECONDS)
            except subprocess.TimeoutExpired:
                self._process.kill()
            self._process.communicate()
        self._group.remove()

    def load(
        self, requests: int, *, clients: int = 4, think_seconds: float = 0.0, seed: int = 1
    ) -> Loaded:
        """Make exactly so many requests, and count the CPU time that the shop takes meanwhile.

        Raises:
            RuntimeError: the load did not end well.
        """
        command = [sys.executable, str(EXAMPLE / "load.py"), self.url, "--requests", str(requests)]
        command += ["--clients", str(clients), "--seed", str(seed)]
        command += ["--think-seconds", str(think_seconds)]
        before = self._group.cpu_ns()
        ran = subprocess.run(
            command, capture_output=True, text=True, timeout=LOAD_SECONDS, check=False
        )
        cpu_ns = self._group.cpu_ns() - before
        if not ran.stdout.startswith("{"):
            raise RuntimeError(f"the load on the shop failed: {ran.stderr.strip()[-500:]}")
        told = json.loads(ran.stdout)
        if told["requests"] != requests or set(told["errors"]) - {"409"}:
            raise RuntimeError(f"the shop did not answer as it should: {ran.stdout.strip()}")
        return Loaded(requests, told["seconds"], cpu_ns, told["p50_ms"])

    def processes(self) -> list[int]:
        """All its processes that run now: what a tool without --follow has to be told."""
        listed = (self._group.directory / "cgroup.procs").read_text().split()
        return sorted(int(pid) for pid in listed)
