"""The synthetic target: getppid.c compiled, started, and told what to do."""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from programs import ToldProgram

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


class Getppid(ToldProgram):
    """A running target; a context manager that ends it."""

    def __init__(self, program: Path, cpu: int) -> None:
        """Prepare; it runs on `cpu` only."""
        super().__init__("the synthetic target", [str(program), str(cpu)])

    def begin(self, calls: int, *, batch: int = 10_000, rate: float = 0) -> Callable[[], Made]:
        """Let it make calls; the function that is returned waits until they are made."""
        self.tell(f"{calls} {batch} {rate}")
        return lambda: self._answer(batch)

    def make(self, calls: int, *, batch: int = 10_000, rate: float = 0) -> Made:
        """Let it make calls and wait for the end."""
        return self.begin(calls, batch=batch, rate=rate)()

    def _answer(self, batch: int) -> Made:
        line = self.answer(4)
        durations = [int(word) / batch for word in line[3:]]
        return Made(int(line[0]), int(line[1]), int(line[2]), statistics.median(durations))


def getppid_number() -> int:
    """The number of the system call on this machine."""
    return NUMBERS[os.uname().machine]
