"""How results are printed: in colour on a terminal only, and quietly if the reader has gone."""

from __future__ import annotations

import io
import os
import shutil
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, BinaryIO, NoReturn

from scope_ebpf.errors import ScopeError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

# What is no terminal has no width: wide enough that only absurd values are cut.
_FILE_WIDTH = 250


@contextmanager
def results() -> Iterator[None]:
    """For writing results to stdout: `| head` ends it quietly, a full disk with a `ScopeError`."""
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        # Python flushes stdout again at its end, and would complain then.
        with suppress(OSError):  # a stdout without a descriptor, as in tests, needs nothing
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, sys.stdout.fileno())
            os.close(nowhere)
    except OSError as error:
        raise ScopeError(f"cannot write to stdout: {error.strerror or error}") from error


class ResultStream(io.RawIOBase):
    """stdout for polars's sinks, which wait for ever when writing fails (polars 2.1).

    So an error is kept in `error` instead, and what is left of the results is dropped.
    """

    def __init__(self, stream: BinaryIO) -> None:
        super().__init__()
        self._stream = stream
        self.error: OSError | None = None

    def writable(self) -> bool:
        """Yes, always."""
        return True

    def write(self, data: Any) -> int:
        """Write all of it."""
        if self.error is None:
            try:
                return self._stream.write(data)
            except OSError as error:
                self.error = error
        return len(data)

    def flush(self) -> None:
        """Flush stdout."""
        if self.error is None:
            try:
                self._stream.flush()
            except OSError as error:
                self.error = error


@contextmanager
def ended_by_closed_pipe() -> Iterator[None]:
    """While this lasts, a reader that has gone ends this process at once, like any Unix filter.

    It is for long results: dropping what is left of them would take as long as printing it.
    """
    before = signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGPIPE, before)


def width() -> int:
    """How wide results may get: the terminal's width, or much if they do not go to one."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else _FILE_WIDTH


def console(*, to_stderr: bool = False) -> Console:
    """A console on stdout that prints text as it is: no markup, no guessed highlights."""
    from rich.console import Console

    class Stdout(Console):
        def on_broken_pipe(self) -> NoReturn:
            # rich would exit with status 1; results() ends quietly.
            raise BrokenPipeError

    # Not rich's own guess: it takes some variables of CI systems for a terminal.
    stream = sys.stderr if to_stderr else sys.stdout
    terminal = stream.isatty()
    return Stdout(
        file=stream,
        markup=False,
        highlight=False,
        emoji=False,
        force_terminal=terminal,
        no_color=None if terminal else True,
        width=None if terminal else _FILE_WIDTH,
    )


def table(*headings: str, left: int = 1) -> Table:
    """A table without lines, its first `left` columns aligned to the left, the others right."""
    from rich.table import Table

    grid = Table(box=None, pad_edge=False, header_style="bold")
    for index, heading in enumerate(headings):
        grid.add_column(heading, justify="left" if index < left else "right", no_wrap=True)
    return grid
