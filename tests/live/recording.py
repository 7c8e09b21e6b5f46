"""How the live tests record: targets that wait at a gate, and the command line at work beside them.

A target is a program that says `ready` on stdout when it is prepared, waits for a byte on stdin, does
its work, and tells what it did in one line of JSON. So a test attaches while the target stands still,
and knows exactly what must be in the recording. What a target itself reads and writes at the gate is
in the recording, too: tests look at their own descriptors, calls and threads only.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import polars as pl
import pytest

import scope_ebpf
from scope_ebpf.recording.reader import Recording

COMMAND = Path(sys.executable).with_name("scope-ebpf")
PROGRAMS = Path(__file__).with_name("programs")
# What every recording command is told by the fixture each_transport.
TRANSPORT: tuple[str, ...] = ()
ATTACH_SECONDS = 30
END_SECONDS = 150  # on an emulated CPU that others use, too


class Target:
    """A program at its gate; a context manager that ends it, whatever happens."""

    def __init__(self, *command: object, **options: Any) -> None:
        """Start it, and wait until it is ready."""
        self.process: subprocess.Popen[str] = subprocess.Popen(
            [str(part) for part in command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
            **options,
        )
        self.pid = self.process.pid
        self.wait_at_gate()

    def __enter__(self) -> Target:
        """The target itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """End it."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout):
            if stream is not None:
                stream.close()

    def wait_at_gate(self) -> None:
        """Wait until it stands at its gate."""
        line = self.next_line()
        assert line.startswith("ready"), f"process {self.pid} did not get ready: {line!r}"

    def wait_until_blocked(self, number: int = 0) -> None:
        """Wait until its first thread sleeps in a system call: read, if not told else."""
        while True:
            syscall = Path(f"/proc/{self.pid}/syscall").read_text().split()
            state = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0]
            if state == "S" and syscall[0] == str(number):
                return
            time.sleep(0.001)

    def open_gate(self) -> None:
        """Let it go on."""
        assert self.process.stdin is not None
        self.process.stdin.write("x")
        self.process.stdin.flush()

    def note(self) -> Any:
        """The next thing that it tells."""
        line = self.next_line()
        assert line, f"process {self.pid} ended without a note, with {self.process.poll()}"
        return json.loads(line)

    def work(self) -> Any:
        """Let it go on to its end; returns what it tells of it."""
        self.open_gate()
        note = self.note()
        assert self.process.wait(END_SECONDS) == 0
        return note

    def next_line(self) -> str:
        """The next line that it says."""
        assert self.process.stdout is not None
        return self.process.stdout.readline()


def python_target(name: str, *arguments: object, **options: Any) -> Target:
    """A target from tests/live/programs/NAME.py."""
    return Target(sys.executable, PROGRAMS / f"{name}.py", *arguments, **options)


def compiled(name: str, directory: Path, *flags: str) -> Path:
    """The program tests/live/programs/NAME.c, compiled into a directory."""
    if shutil.which("gcc") is None:
        pytest.skip("needs gcc")
    program = directory / (name + "".join(flags))
    if not program.exists():
        source = PROGRAMS / f"{name}.c"
        always = ["-O1", "-g", "-Wall", "-Wextra", "-Werror", "-pthread"]
        subprocess.run(["gcc", *always, *flags, "-o", str(program), str(source)], check=True)
    return program


@dataclass
class Session:
    """One run of the command line that records; `target` and `note`: of what it records, if one."""

    process: subprocess.Popen[str]
    path: Path
    talk: list[str] = field(default_factory=list)
    out: str = ""
    code: int | None = None
    target: int = 0
    note: Any = None
    _opened: Recording | None = None

    def stop(self, number: signal.Signals = signal.SIGINT) -> None:
        """End it by a signal."""
        self.process.send_signal(number)

    def wait(self) -> int:
        """Wait for its end; returns its exit code."""
        if self.code is None:
            self.out, rest = self.process.communicate(timeout=END_SECONDS)
            self.talk += rest.splitlines()
            self.code = self.process.returncode
        return self.code

    @property
    def recording(self) -> Recording:
        """What was recorded, after the end; it must be complete."""
        assert self.wait() == 0, f"the recorder failed: {self.talk}"
        if self._opened is None:
            self._opened = scope_ebpf.open_recording(self.path)
            self._opened.check()
            assert self._opened.meta.complete
        return self._opened

    def table(self, name: str) -> pl.DataFrame:
        """One table of what was recorded, in the order of its first column."""
        frame = self.recording.table(name)
        return self.recording.collect(frame.sort(frame.collect_schema().names()[0]))


@contextmanager
def scope_ebpf_command(
    path: Path, *arguments: object, environment: Mapping[str, str] | None = None, **options: Any
) -> Iterator[Session]:
    """Run `scope-ebpf ARGUMENTS`, which record to `path`; go on when the probes are at work."""
    command, *rest = arguments
    arguments = (command, *TRANSPORT, *rest)
    with recorder(path, COMMAND, *arguments, environment=environment, **options) as session:
        yield session


@contextmanager
def recorder(
    path: Path,
    *arguments: object,
    environment: Mapping[str, str] | None = None,
    attach_seconds: float = ATTACH_SECONDS,
    **options: Any,
) -> Iterator[Session]:
    """Run a program that records to `path`; go on when it says that the probes are at work.

    It has to end by itself, or by session.stop(): its end is waited for.
    """
    command = [str(argument) for argument in arguments]
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **(environment or {})},
        **options,
    )
    session = Session(process, path)
    stuck = threading.Timer(attach_seconds, process.kill)
    stuck.start()
    try:
        assert process.stderr is not None
        for line in process.stderr:
            session.talk.append(line.rstrip())
            if line.startswith("recording ") and " to " in line:
                break
        else:
            session.wait()
            raise AssertionError(f"{command} ended with {session.code}: {session.talk}")
        stuck.cancel()
        yield session
        session.wait()
    finally:
        stuck.cancel()
        if process.poll() is None:
            process.kill()
        for stream in (process.stdout, process.stderr):
            if stream is not None:
                stream.close()
        process.wait()


@contextmanager
def attached(
    directory: Path, targets: Target | Sequence[Target], *options: object, **more: Any
) -> Iterator[Session]:
    """Run `scope-ebpf attach` on targets; it ends with the last of them."""
    if isinstance(targets, Target):
        targets = [targets]
    pids = [target.pid for target in targets]
    path = directory / "test.scope"
    chosen = [part for pid in pids for part in ("--pid", pid)]
    with scope_ebpf_command(path, "attach", *chosen, "-o", path, *options, **more) as session:
        session.target = pids[0]
        yield session


def no_losses(session: Session) -> None:
    """Nothing was lost, so that exact numbers may be expected."""
    losses = session.table("losses")
    assert losses.is_empty(), losses
