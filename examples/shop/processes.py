"""One started program each: as whom it runs, where its log is, whether it lives, how it ends."""

import os
import pwd
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

# A worker that fails at its imports has its reason above the tracebacks of its master.
_LOG_TAIL_LINES = 40
_POLL_SECONDS = 0.02


@dataclass(frozen=True)
class Account:
    """A system user to run a program as."""

    name: str
    uid: int
    gid: int


def service_account(*names: str) -> Account | None:
    """Return the first of these users that exists, or None when we are not root anyway."""
    if os.geteuid() != 0:
        return None
    for name in names:
        try:
            entry = pwd.getpwnam(name)
        except KeyError:
            continue
        return Account(name, entry.pw_uid, entry.pw_gid)
    return None


class Process:
    """A program in a session of its own: Ctrl-C in the terminal reaches us and not it.

    It is never reaped before its whole process group is gone: while the dead leader waits to be
    reaped, the kernel gives its pid to nobody else, so a signal can only reach what we started.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str | Path],
        *,
        log: Path,
        directory: Path,
        environment: Mapping[str, str],
        account: Account | None = None,
        pass_fds: Sequence[int] = (),
        end_signals: Sequence[signal.Signals] = (signal.SIGTERM,),
        end_seconds: float = 5.0,
    ) -> None:
        self.name = name
        self.log = log
        self._end_signals = end_signals
        self._end_seconds = end_seconds
        log.touch(mode=0o600)
        with log.open("ab") as output:
            self._popen = subprocess.Popen(
                [*_end_with_us(end_signals[0]), *command],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=directory,
                env=environment,
                start_new_session=True,
                pass_fds=pass_fds,
                user=account.uid if account else None,
                group=account.gid if account else None,
                extra_groups=[] if account else None,
            )
        self.pid = self._popen.pid

    def exit_code(self) -> int | None:
        """Return the exit code (minus the signal's number if one killed it), None while it runs."""
        if self._popen.returncode is not None:
            return self._popen.returncode
        try:
            state = os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        except ChildProcessError:  # somebody's waitpid(-1) was faster; the code is lost
            return self._popen.poll()
        if state is None:
            return None
        return state.si_status if state.si_code == os.CLD_EXITED else -state.si_status

    def wait(self, seconds: float) -> int | None:
        """Wait at most so long for the exit code."""
        deadline = time.monotonic() + seconds
        while (code := self.exit_code()) is None and time.monotonic() < deadline:
            time.sleep(_POLL_SECONDS)
        return code

    def stop(self) -> None:
        """End it: ask the program in its own way, then kill its group. Bounded in time."""
        for end_signal in self._end_signals:
            if self.exit_code() is None:
                os.kill(self.pid, end_signal)
                self.wait(self._end_seconds)
        if self._popen.returncode is not None:
            return
        # The leader is at least a zombie that we hold, so the group's number is still ours.
        os.killpg(self.pid, signal.SIGKILL)
        self._popen.wait()

    def log_tail(self) -> str:
        """Return the last lines of its log, indented, for an error message."""
        text = self.log.read_text(errors="replace") if self.log.exists() else ""
        lines = text.splitlines()[-_LOG_TAIL_LINES:] or ["(nothing)"]
        return "\n".join(f"    {line}" for line in lines)


def _end_with_us(end_signal: signal.Signals) -> list[str]:
    """Return the prefix that makes the kernel end the program when we are killed by kill -9.

    The kernel watches the thread that forked, not the process, so only the main thread may ask.
    """
    setpriv = shutil.which("setpriv")
    if setpriv is None or threading.current_thread() is not threading.main_thread():
        return []
    return [setpriv, "--pdeathsig", end_signal.name.removeprefix("SIG"), "--"]
