"""Starting programs in one temporary directory, waiting for them, and ending them however one ends."""

import atexit
import os
import shutil
import signal
import socket
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TypeVar

from installed import ShopError
from interrupts import interrupts
from processes import Account, Process

HOST = "127.0.0.1"
_POLL_SECONDS = 0.05
_PORT_ATTEMPTS = 5
_TOO_SLOW = "try again on a less busy machine, or allow more with start_seconds=..."

_Self = TypeVar("_Self", bound="Supervisor")


class Supervisor:
    """Programs that run together, as a context manager; a subclass's `start` starts them.

    `pids` maps each program's name to the pid of its main process, `directory` holds data and logs
    until the end. However the block is left (exception, Ctrl-C, SIGTERM), the programs are ended
    and the directory is removed.
    """

    directory: Path

    def __init__(self, start_seconds: float) -> None:
        self.pids: dict[str, int] = {}
        self._start_seconds = start_seconds
        self._deadline = 0.0
        self._processes: list[Process] = []
        self._running = False

    def start(self) -> None:
        """Start the programs and return when they are ready; `directory` is there and empty."""
        raise NotImplementedError

    def __enter__(self: _Self) -> _Self:
        if self._running:
            raise RuntimeError(f"this {type(self).__name__} is already running; make a second one")
        self._running = True
        interrupts.__enter__()
        # For the few instructions around a `with` in which an exception would skip __exit__.
        atexit.register(self.stop)
        try:
            self._deadline = time.monotonic() + self._start_seconds
            self.pids = {}
            with interrupts.held():
                self.directory = Path(tempfile.mkdtemp(prefix="scope-shop-"))
            # Programs that run as other users than root must get to their own folders.
            self.directory.chmod(0o711)
            self.start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """End what was started, newest first, and remove the directory. May be called again."""
        try:
            with interrupts.held():
                while self._processes:
                    self._processes[-1].stop()
                    self._processes.pop()
                if self._running and hasattr(self, "directory"):
                    shutil.rmtree(self.directory, ignore_errors=True)
        finally:
            if self._running:
                self._running = False
                atexit.unregister(self.stop)
                interrupts.__exit__(None, None, None)

    def check(self) -> None:
        """Raise ShopError if one of the programs has ended by itself."""
        for process in self._processes:
            code = process.exit_code()
            if code is not None:
                raise _failure(process, f"has ended by itself (code {code})", "start it again")

    def spawn(
        self,
        name: str,
        command: Sequence[str | Path],
        directory: Path,
        account: Account | None = None,
        environment: Mapping[str, str] | None = None,
        *,
        pass_fds: Sequence[int] = (),
        ends: Sequence[signal.Signals] = (signal.SIGTERM,),
        is_server: bool = True,
    ) -> Process:
        """Start a program; a server's pid gets into `pids`."""
        # A user's PGOPTIONS, PGSSLMODE or GUNICORN_CMD_ARGS are meant for other servers.
        inherited = {
            key: value
            for key, value in os.environ.items()
            if not key.startswith(("PG", "RQ_", "OTEL_", "SHOP_")) and key != "GUNICORN_CMD_ARGS"
        }
        with interrupts.held():
            process = Process(
                name,
                command,
                log=self.directory / f"{name}.log",
                directory=directory,
                environment={**inherited, **(environment or {})},
                account=account,
                pass_fds=pass_fds,
                end_signals=ends,
            )
            self._processes.append(process)
            if is_server:
                self.pids[name] = process.pid
        return process

    def run(
        self,
        name: str,
        command: Sequence[str | Path],
        directory: Path,
        account: Account | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """Run a program that ends by itself; it is on our list meanwhile, like the servers."""
        process = self.spawn(name, command, directory, account, environment, is_server=False)
        code = process.wait(self._deadline - time.monotonic())
        if code is None:
            reason = f"has not ended within {self._start_seconds:g} s"
            raise _failure(process, reason, _TOO_SLOW)
        if code != 0:
            raise _failure(
                process, f"failed with code {code}", "mend what its log says and try again"
            )
        self._forget(process)

    def start_on_free_port(
        self,
        name: str,
        start: Callable[[int], Process],
        ready: Callable[[Process, int], bool],
    ) -> int:
        """Start a server that binds its port itself; again if someone took the port meanwhile."""
        for attempt in range(_PORT_ATTEMPTS):
            port = _free_port()
            process = start(port)
            try:
                self.wait_ready(process, partial(ready, process, port))
            except ShopError:
                taken = "address already in use" in process.log_tail().lower()
                if not taken or attempt == _PORT_ATTEMPTS - 1:
                    raise
                self._forget(process)
                process.log.unlink()
            else:
                return port
        raise AssertionError(f"{name}: the last attempt returns or raises")

    def wait_ready(self, process: Process, ready: Callable[[], bool]) -> None:
        """Wait until a server is ready; ShopError with its log when it ends or takes too long."""
        while process.exit_code() is None:
            if ready():
                return
            if time.monotonic() > self._deadline:
                raise _failure(
                    process,
                    f"is not ready after {self._start_seconds:g} s",
                    _TOO_SLOW,
                )
            time.sleep(_POLL_SECONDS)
        raise _failure(
            process,
            f"did not start: it ended with code {process.exit_code()}",
            "mend what its log says and try again",
        )

    def make_home(self, name: str, account: Account | None) -> Path:
        """Make a folder of its own for a server that may run as another user."""
        home = self.directory / name
        home.mkdir(mode=0o700)
        if account is not None:
            for parent in home.parents:
                if not parent.stat().st_mode & 0o001:
                    raise ShopError(
                        f"cannot start {name}: user {account.name} may not enter {parent};"
                        " set TMPDIR to a directory that everyone may enter, such as /tmp"
                    )
            os.chown(home, account.uid, account.gid)
        return home

    def _forget(self, process: Process) -> None:
        with interrupts.held():
            process.stop()
            self._processes.remove(process)


def write_private(path: Path, text: str, account: Account | None) -> None:
    """Write a file that only the user of its server may read."""
    path.touch(mode=0o600)
    path.write_text(text)
    if account is not None:
        os.chown(path, account.uid, account.gid)


def _free_port() -> int:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.bind((HOST, 0))
        port: int = probe.getsockname()[1]
        return port


def _failure(process: Process, fact: str, next_step: str) -> ShopError:
    return ShopError(
        f"{process.name} {fact}; {next_step}. Its log ends with:\n{process.log_tail()}"
    )
