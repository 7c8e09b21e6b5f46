"""Programs that are measured: C that is compiled, and processes that are told what to do line by line."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import IO, Self


def compile_c(source: Path, directory: Path) -> Path:
    """Compile one file into a directory; returns the program.

    Raises:
        RuntimeError: there is no compiler.
    """
    if shutil.which("gcc") is None:
        raise RuntimeError(
            f"cannot compile {source.name}: gcc is missing; apt install gcc libc6-dev"
        )
    program = directory / source.stem
    subprocess.run(["gcc", "-O2", "-Wall", "-Wextra", "-o", program, source], check=True)
    return program


class ToldProgram:
    """A process that says `ready`, and then answers each line with one; a context manager that kills it."""

    def __init__(self, name: str, command: list[str]) -> None:
        """Prepare; `name` is what a failure calls it."""
        self._name = name
        self._command = command

    def __enter__(self) -> Self:
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
            raise RuntimeError(f"{self._name} did not start")
        return self

    def __exit__(self, *_: object) -> None:
        """End it."""
        self._process.kill()
        self._process.communicate()

    def tell(self, line: str) -> None:
        """Have it begin what the line says."""
        stdin = self._pipe(self._process.stdin)
        stdin.write(f"{line}\n")
        stdin.flush()

    def answer(self, words: int) -> list[str]:
        """Wait for its answer, of so many words or more."""
        answer = self._pipe(self._process.stdout).readline().split()
        if len(answer) < words:
            raise RuntimeError(f"{self._name} ended early")
        return answer

    @staticmethod
    def _pipe(pipe: IO[str] | None) -> IO[str]:
        assert pipe is not None
        return pipe
