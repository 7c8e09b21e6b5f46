"""The synthetic target: getppid.c compiled, started, and told what to do."""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO

SOURCE = Path(__file__).with_name("getppid.c")
NUMBERS = {"x86_64": 110, "aarch64": 173}  # getppid's


@dataclass(frozen=True)
class Made:
    """Calls that were made, as the target itself saw it."""

    calls: int
    elapsed_ns: int
    begun_ns: int
    ns_per_call: float  # of the median batch: what interrupted it does not count

    @property
    def rate(self) -> float:
        """Calls per second."""
        return self.calls / self.elapsed_ns * 1e9


def compile_target(directory: Path) -> Path:
    """Compile getppid.c into a directory.

    Raises:
        RuntimeError: there is no compiler.
    """
    if shutil.which("gcc") is None:
        raise RuntimeError("cannot compile getppid.c: gcc is missing; apt install gcc libc6-dev")
    program = directory / "getppid"
    subprocess.run(["gcc", "-O2", "-Wall", "-Wextra", "-o", program, SOURCE], check=True)
    return program


class Getppid:
    """A running target; a context manager that ends it."""

    def __init__(self, program: Path, cpu: int) -> None:
        """Prepare; it runs on `cpu` only."""
        self._command = [str(program), str(cpu)]

    def __enter__(self) -> Getppid:
        """Start it, and wait until it is ready."""
        self._process = subprocess.Popen(
            self._command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self.pid = self._process.pid
        if self._pipe(self._process.stdout).readline() != "ready\n":
            raise RuntimeError("the synthetic target did not start")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """End it."""
        self._process.kill()
        self._process.communicate()

    def begin(self, calls: int, *, batch: int = 10_000, rate: float = 0) -> Callable[[], Made]:
        """Let it make calls; the function that is returned waits until they are made."""
        stdin = self._pipe(self._process.stdin)
        stdin.write(f"{calls} {batch} {rate}\n")
        stdin.flush()
        return lambda: self._answer(batch)

    def make(self, calls: int, *, batch: int = 10_000, rate: float = 0) -> Made:
        """Let it make calls and wait for the end."""
        return self.begin(calls, batch=batch, rate=rate)()

    def _answer(self, batch: int) -> Made:
        line = self._pipe(self._process.stdout).readline().split()
        if len(line) < 4:
            raise RuntimeError("the synthetic target ended early")
        durations = [int(word) / batch for word in line[3:]]
        return Made(int(line[0]), int(line[1]), int(line[2]), statistics.median(durations))

    @staticmethod
    def _pipe(pipe: IO[str] | None) -> IO[str]:
        assert pipe is not None
        return pipe


def getppid_number() -> int:
    """The number of the system call on this machine."""
    return NUMBERS[os.uname().machine]
