"""A tree of many processes: many.c compiled, started, and told what to do."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from programs import ToldProgram

SOURCE = Path(__file__).with_name("many.c")
PYTHON_SOURCE = Path(__file__).with_name("many_python.py")


@dataclass(frozen=True)
class Done:
    """What the tree did, as it saw that itself: calls that were made, or processes that ended."""

    count: int
    elapsed_ns: int


class Tree(ToldProgram):
    """A parent and its children, native and Python; a context manager that ends them."""

    def __init__(self, program: Path, children: int, pythons: int) -> None:
        """Prepare."""
        self.children, self.pythons = children, pythons
        command = [str(program), str(children), str(pythons), sys.executable, str(PYTHON_SOURCE)]
        super().__init__(f"the tree of {children} processes", command)

    def processes(self) -> list[int]:
        """The children's process ids."""
        text = Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text()
        return [int(word) for word in text.split()]

    def work(self, seconds: float, calls_per_second: float) -> Done:
        """Let the native children make that many calls of getppid, all together."""
        return self._do(f"work {seconds} {calls_per_second}")

    def storm(self, count: int, rate: float, program: Path) -> Done:
        """Let the parent start processes, each with its number as the argument; 0: as fast as possible."""
        return self._do(f"storm {count} {rate} {program}")

    def _do(self, line: str) -> Done:
        self.tell(line)
        count, elapsed_ns = map(int, self.answer(2))
        return Done(count, elapsed_ns)
