"""SIGINT, SIGTERM and SIGHUP as exceptions that never cut a start or a clean-up in half.

Python's own Ctrl-C can land between the fork of a server and the line that notes its pid, or in
the middle of ending the servers; SIGTERM and SIGHUP end Python with no clean-up at all.
"""

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

# One wish to end can arrive twice at once: timeout(1) signals its child and then its whole group.
_SAME_WISH_SECONDS = 1.0

_Handler = Callable[[int, FrameType | None], object] | int | None


class Terminated(SystemExit):
    """SIGTERM or SIGHUP arrived; uncaught, the program ends with 128 + the signal's number."""

    def __init__(self, signum: int) -> None:
        super().__init__(128 + signum)
        self.signum = signum


class Interrupts:
    """While entered, signals raise; while held, they wait. Does nothing off the main thread.

    It may be entered several times: a program enters it around everything, and each Shop again.
    """

    def __init__(self) -> None:
        self._users = 0
        self._held = 0
        self._pending: int | None = None
        self._raised_at = float("-inf")
        self._previous: dict[int, _Handler] = {}

    def __enter__(self) -> "Interrupts":
        if not _on_main_thread():
            return self
        self._users += 1
        if self._users == 1:
            for signum in _SIGNALS:
                # Ignored means that someone up there wants it so: nohup, or a shell's `&`.
                if signal.getsignal(signum) not in (signal.SIG_IGN, None):
                    self._previous[signum] = signal.signal(signum, self._on_signal)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if not _on_main_thread():
            return
        self._users -= 1
        if self._users == 0:
            for signum, handler in self._previous.items():
                signal.signal(signum, handler)
            self._previous.clear()

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keep signals waiting for a short, bounded piece of work; then raise the first of them."""
        if not _on_main_thread():
            yield
            return
        self._held += 1
        try:
            yield
        finally:
            self._held -= 1
            if self._held == 0 and self._pending is not None:
                signum, self._pending = self._pending, None
                self._raise(signum, None)

    def _on_signal(self, signum: int, frame: FrameType | None) -> None:
        if not self._held:
            self._raise(signum, frame)
        elif self._pending is None:
            self._pending = signum

    def _raise(self, signum: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if now - self._raised_at < _SAME_WISH_SECONDS:
            return
        self._raised_at = now
        previous = self._previous.get(signum)
        if callable(previous):
            previous(signum, frame)  # Python's own for SIGINT: raises KeyboardInterrupt
        else:
            raise Terminated(signum)


def _on_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


# Signal handlers belong to the process, so there is one of these and not one per Shop.
interrupts = Interrupts()
