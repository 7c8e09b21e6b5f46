"""A tree of many processes: many.c compiled, started, and told what to do."""

from __future__ import annotations

import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO

SOURCE = Path(__file__).with_name("many.c")
PYTHON_SOURCE = Path(__file__).with_name("many_python.py")


@dataclass(frozen=True)
class Done:
    """What the tree did, as it saw that itself: calls that were made, or processes that ended."""

    count: int
    elapsed_ns: int


def compile_tree(directory: Path) -> Path:
    """Compile many.c into a directory.

    Raises:
        RuntimeError: there is no compiler.
    """
    if shutil.which("gcc") is None:
        raise RuntimeError("cannot compile many.c: gcc is missing; apt install gcc libc6-dev")
    program = directory / "many"
    subprocess.run(["gcc", "-O2", "-Wall", "-Wextra", "-o", program, SOURCE], check=True)
    return program


class Tree:
    """A parent and its children, native and Python; a context manager that ends them."""

    def __init__(self, program: Path, children: int, pythons: int) -> None:
        """Prepare."""
        self.children, self.pythons = children, pythons
        self._command = [str(program), str(children), str(pythons), sys.executable]
        self._command.append(str(PYTHON_SOURCE))

    def __enter__(self) -> Tree:
        """Start it, and wait until all native children run."""
        self._process = subprocess.Popen(
            self._command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self.pid = self._process.pid
        if self._pipe(self._process.stdout).readline() != "ready\n":
            raise RuntimeError(f"the tree of {self.children} processes did not start")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """End it; the children end with it."""
        self._process.kill()
        self._process.communicate()

    def processes(self) -> list[int]:
        """The children's process ids."""
        text = Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text()
        return [int(word) for word in text.split()]

    def work(self, seconds: float, calls_per_second: float) -> Done:
        """Let the native children make that many calls of getppid, all together."""
        return self._tell(f"work {seconds} {calls_per_second}")

    def storm(self, count: int, rate: float, program: Path) -> Done:
        """Let the parent start processes, each with its number as the argument; 0: as fast as possible."""
        return self._tell(f"storm {count} {rate} {program}")

    def _tell(self, line: str) -> Done:
        stdin = self._pipe(self._process.stdin)
        stdin.write(f"{line}\n")
        stdin.flush()
        words = self._pipe(self._process.stdout).readline().split()
        if len(words) != 2:
            raise RuntimeError(f"the tree of {self.children} processes ended early")
        return Done(int(words[0]), int(words[1]))

    @staticmethod
    def _pipe(pipe: IO[str] | None) -> IO[str]:
        assert pipe is not None
        return pipe
