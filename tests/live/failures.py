"""How the tests of failures run the command line: they see it fail, and what it leaves behind.

Nothing of a recorder may stay in the kernel when it is gone. Which programs and maps are its own
stands in /proc/PID/fdinfo while it runs; afterwards the kernel is asked for those ids. So recorders
of others on the same host do no harm.
"""

from __future__ import annotations

import ctypes
import errno
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import polars as pl

from scope_ebpf import open_recording
from scope_ebpf.recording.reader import Recording

CHECKOUT = Path(__file__).resolve().parents[2]
COMMAND = (sys.executable, "-m", "scope_ebpf")
NOBODY = 65534
# Long enough for a host that is busy with other tests.
PATIENCE_SECONDS = 30.0
# It counts with the argument of a call without effect: close() of descriptors that are not open.
FIRST_FD = 1_000_000_000
COUNTER = """
import ctypes, gc, mmap, os, sys, time
count, file = int(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else None
gc.disable()
close = ctypes.CDLL(None).close
progress = mmap.mmap(os.open(file, os.O_RDWR), 4096).__setitem__ if file else None
os.write(1, b"ready\\n")
os.read(0, 1)
for number in range(count):
    close(1_000_000_000 + number)
    if progress and not number & 0xFF:
        progress(slice(0, 8), number.to_bytes(8, "little"))
os.write(1, b"done\\n")
os.read(0, 1)
"""
# What COUNTER does besides: the read at its gate, the write when it is done, and the last read.
BESIDES = 3

_bpf = ctypes.CDLL("libbpf.so.1", use_errno=True)


def wait_until(condition: Callable[[], object], seconds: float = PATIENCE_SECONDS) -> None:
    """Wait for something that will become true."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.01)


class Counter:
    """A target that makes an exact number of calls once it is let go; a context manager."""

    def __init__(self, count: int, progress: Path | None = None) -> None:
        """Start it; it waits."""
        if progress is not None:
            progress.write_bytes(bytes(4096))
        self._progress = progress
        self.count = count
        arguments = [str(count)] if progress is None else [str(count), str(progress)]
        self.process = subprocess.Popen(
            [sys.executable, "-c", COUNTER, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        self.pid = self.process.pid
        self._expect(b"ready\n")
        wait_until(lambda: self.state() == "S")  # within the read

    def __enter__(self) -> Counter:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()

    def state(self) -> str:
        """Its state as in /proc/PID/stat."""
        return Path(f"/proc/{self.pid}/stat").read_text().rsplit(")", 1)[1].split()[0]

    def go(self) -> None:
        """Open the gate."""
        assert self.process.stdin is not None
        self.process.stdin.write(b"x")
        self.process.stdin.flush()

    def finish(self) -> None:
        """Wait until all calls were made; it waits in its last read then."""
        self._expect(b"done\n")
        wait_until(lambda: self.state() == "S")

    def count_through(self) -> None:
        """All of it."""
        self.go()
        self.finish()

    def progress(self) -> int:
        """How many calls it has made, to 256."""
        assert self._progress is not None
        return int.from_bytes(self._progress.read_bytes()[:8], "little")

    def _expect(self, line: bytes) -> None:
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == line


class Recorder:
    """One run of the command line; a context manager that ends it, whatever happens."""

    def __init__(
        self,
        folder: Path,
        *arguments: object,
        prefix: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
        command: Sequence[str] = COMMAND,
        **options: object,
    ) -> None:
        """Start it, in `folder`; what it says goes to files there."""
        clean = {key: value for key, value in os.environ.items() if not key.startswith("SUDO_")}
        clean |= {"PYTHONPATH": str(CHECKOUT), "PYTHONDONTWRITEBYTECODE": "1"}
        self.folder = folder
        self.ids: set[tuple[str, int]] = set()
        talk = folder.parent / f"{folder.name}-{time.monotonic_ns()}"
        self._files = (Path(f"{talk}.out"), Path(f"{talk}.err"))
        with open(self._files[0], "wb") as out, open(self._files[1], "wb") as err:
            kept: dict[str, object] = {"stdin": subprocess.DEVNULL, "stdout": out, "stderr": err}
            self.process = subprocess.Popen(  # type: ignore[call-overload]  # options of any kind
                [*prefix, *command, *(str(argument) for argument in arguments)],
                cwd=folder,
                env=clean | dict(environment or {}),
                **(kept | options),
            )

    def __enter__(self) -> Recorder:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()

    @property
    def out(self) -> str:
        """What it wrote to stdout so far."""
        return self._files[0].read_text(errors="backslashreplace")

    @property
    def err(self) -> str:
        """What it wrote to stderr so far."""
        return self._files[1].read_text(errors="backslashreplace")

    @property
    def code(self) -> int:
        """Its exit code, when it has ended; and it took everything out of the kernel."""
        code = int(self.process.wait(PATIENCE_SECONDS))
        wait_until(lambda: not any(map(is_loaded, self.ids)))
        assert "Traceback" not in self.err
        return code

    def attached(self, *, says_so: bool = True) -> Recorder:
        """Wait until the probes are at work; remember what it has in the kernel."""

        def attached() -> bool:
            assert self.process.poll() is None, f"it ended with {self.process.poll()}: {self.err}"
            self.look_for_ids()
            said = "; Ctrl-C ends it\n" in self.err or "; it ends with the command\n" in self.err
            return said if says_so else len(self.links()) > 0

        wait_until(attached)
        self.look_for_ids()
        assert any(kind == "prog" for kind, _ in self.ids)
        return self

    def links(self) -> list[str]:
        """Its attached programs: descriptors of links."""
        found = []
        with suppress(OSError):
            for entry in os.scandir(f"/proc/{self.process.pid}/fd"):
                with suppress(OSError):
                    found.append(os.readlink(entry.path))
        return [link for link in found if "bpf_link" in link or "bpf-link" in link]

    def look_for_ids(self) -> None:
        """Take up the programs and maps that it has open at this moment."""
        with suppress(OSError):
            for entry in os.scandir(f"/proc/{self.process.pid}/fdinfo"):
                with suppress(OSError):
                    text = Path(entry.path).read_text()
                    for kind, number in re.findall(r"^(prog|map)_id:\s*(\d+)$", text, re.MULTILINE):
                        self.ids.add((kind, int(number)))

    def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        """End it by a signal; returns its exit code."""
        self.process.send_signal(number)
        return self.code

    def refusal(self, code: int = 1) -> str:
        """It has failed, and says why in one sentence on stderr: that one, without `error: `."""
        assert self.code == code, (self.out, self.err)
        lines = [line for line in self.err.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1, self.err
        sentence = lines[0].removeprefix("error: ")
        # fact: cause; next step
        assert re.fullmatch(r"[^:;]+: .+; .+|will not .+: .+; .+", sentence), sentence
        return sentence

    def refused(self, code: int = 1) -> str:
        """It has failed before anything was recorded, and says nothing but the one sentence."""
        sentence = self.refusal(code)
        assert self.err == f"error: {sentence}\n"
        assert self.out == ""
        return sentence


def attach(folder: Path, *pids: int, options: Sequence[object] = (), **more: object) -> Recorder:
    """Attach to processes; the recording is test.scope in `folder`."""
    chosen = [part for pid in pids for part in ("--pid", pid)]
    return Recorder(folder, "attach", *chosen, "-o", "test", *options, **more)  # type: ignore[arg-type]


def is_loaded(identity: tuple[str, int]) -> bool:
    """Whether the kernel still has the program or map of that id."""
    kind, number = identity
    function = _bpf.bpf_prog_get_fd_by_id if kind == "prog" else _bpf.bpf_map_get_fd_by_id
    descriptor = function(number)
    if descriptor >= 0:
        os.close(descriptor)
        return True
    assert descriptor == -errno.ENOENT, os.strerror(-descriptor)
    return False


def opened(folder: Path, name: str = "test.scope") -> Recording:
    """What was recorded; every segment of it is whole."""
    recording = open_recording(folder / name)
    recording.check()
    return recording


def table(recording: Recording, name: str) -> pl.DataFrame:
    """A whole table."""
    return recording.collect(recording.table(name))


def lost(recording: Recording, name: str) -> int:
    """How many rows of a table were lost: meta.json and the table of losses agree on it."""
    count = recording.meta.tables[name].lost
    rows = table(recording, "losses").filter(pl.col("table") == name)
    assert rows["lost"].sum() == count
    return count


def counted(recording: Recording) -> list[int]:
    """Which of COUNTER's calls are there, in the order of time: each at most once."""
    calls = table(recording, "syscalls").filter(
        pl.col("name") == "close", pl.col("arg0") >= FIRST_FD
    )
    numbers: list[int] = (calls.sort("start_ns")["arg0"].cast(pl.Int64) - FIRST_FD).to_list()
    assert numbers == sorted(set(numbers))
    return numbers
