"""A recording made from the command line: signals, the status line, and the summary at the end."""

import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path

import click

from scope_ebpf.cli.notify import Notifier
from scope_ebpf.cli.options import Choices
from scope_ebpf.cli.units import printable
from scope_ebpf.errors import ScopeError
from scope_ebpf.loaders import privileges
from scope_ebpf.loaders.capture import CaptureOptions
from scope_ebpf.loaders.python import calls
from scope_ebpf.loaders.python.functions import Spec, parse_spec
from scope_ebpf.loaders.targets import Target, with_descendants
from scope_ebpf.recorder import Plan, Recorder, Status
from scope_ebpf.recording.directory import create_directory, recording_path, remove_unused

ENDING_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
UNREDACTED = (
    "warning: --unredacted stores what messages say as it is, with passwords, tokens and personal data;"
    " keep the recording where they may be kept"
)
KEPT_ADMIN = (
    "note: CAP_SYS_ADMIN is kept, which this kernel wants for probes in programs that begin later;"
    " `sysctl kernel.perf_event_paranoid=2` makes it needless"
)
SHOWN_TABLES = ("syscalls", "messages", "offcpu")


def default_name(subject: str) -> str:
    """The name of a recording that was given none."""
    plain = "".join(letter if letter.isalnum() or letter in "-_." else "-" for letter in subject)
    return f"{plain.strip('-.') or 'host'}-{time.strftime('%Y%m%d-%H%M%S')}"


class StatusLine:
    """One line on the terminal that is written over and over."""

    def __init__(self) -> None:
        """Nothing was written yet."""
        self._before = Status(0.0, {}, 0, 0, 0.0)
        self._shown = False

    def show(self, status: Status) -> None:
        """Write where the recording stands."""
        seconds = max(status.seconds - self._before.seconds, 1e-9)
        rates = [
            f"{table} {(status.rows.get(table, 0) - self._before.rows.get(table, 0)) / seconds:,.0f}/s"
            for table in SHOWN_TABLES
        ]
        line = (
            f"{status.seconds:6.0f} s  {'  '.join(rates)}  lost {status.lost:,}"
            f"  {status.bytes_on_disk / 1e6:,.1f} MB  CPU {status.cpu_percent:.1f} %"
        )
        width = max(shutil.get_terminal_size().columns - 3, 0)  # room for the ^C of Ctrl-C
        say(f"\r{line[:width].ljust(width)}", end="")
        self._before, self._shown = status, True

    def clear(self) -> None:
        """Leave an empty line behind."""
        if self._shown:
            say(f"\r{' ' * (shutil.get_terminal_size().columns - 1)}\r", end="")


def say(text: str, *, end: str = "\n") -> None:
    """Write to stderr, if anybody is there: a terminal that was closed must not end a recording."""
    with suppress(OSError):
        click.echo(f"{text}{end}", nl=False, err=True)


def announce_calls(specs: Sequence[str], tgids: Iterable[int], *, follow: bool) -> tuple[Spec, ...]:
    """Check that the calls of these functions can be recorded, and say what that costs.

    Raises:
        ScopeError: they cannot be, with the reason.
    """
    if not specs:
        return ()
    parsed = tuple(dict.fromkeys(map(parse_spec, specs)))
    trap_ns = calls.try_breakpoint()
    found = calls.find_calls(parsed, with_descendants(tgids) if follow else tgids)
    for line in calls.describe_cost(found, trap_ns):
        say(line)
    return parsed


def record(
    options: CaptureOptions,
    *,
    choices: Choices,
    subject: str,
    targets: tuple[Target, ...] = (),
    signals: tuple[signal.Signals, ...] = ENDING_SIGNALS,
    on_attached: Callable[[], None] = lambda: None,
    summary_to_stderr: bool = False,
    ending: str = "Ctrl-C ends it",
    into: Path | None = None,
) -> Path:
    """Record, and show the summary; returns the recording's directory.

    Args:
        options: what to capture.
        choices: the recording's name (None for one after `subject` and the time), its duration, and
            whether payloads are stored as they are.
        subject: what is recorded, in a word.
        targets: the processes that were named.
        signals: what ends the recording.
        on_attached: called when the probes are at work.
        summary_to_stderr: keep stdout for the recorded command.
        ending: what ends the recording, in words.
        into: the folder of the recording, with others that share its quota.

    Raises:
        ScopeError: recording failed; what there is was summarised.
    """
    path = recording_path(default_name(subject) if choices.output is None else choices.output)
    if into is not None:
        path = into.absolute() / path.name
    owner = privileges.invoking_user(os.environ)
    notifier = Notifier(os.environ)
    if notifier.wanted:
        ending = "stopping the service ends it"
    # of a cgroup or the host, programs with libraries of their own may come at any time
    attaches_later = options.everything or options.cgroup is not None
    keep = privileges.NEEDED if attaches_later else privileges.NEEDED_TO_LOOK
    if attaches_later:
        what = (
            "record the host" if options.everything else f"record the cgroup {printable(subject)}"
        )
        privileges.require(privileges.current().effective, what)

    def loaded() -> None:
        dropped = privileges.drop_after_attaching(os.environ, keep)
        text = f"recording {printable(subject)} to {printable(str(path))}"
        say(f"{text}; {ending}")
        if attaches_later and "CAP_SYS_ADMIN" in dropped.kept:
            say(KEPT_ADMIN)
        notifier.ready(text)

    if choices.unredacted and (options.payload_bytes or options.probes or options.calls):
        say(UNREDACTED)
    recorder = Recorder(
        Plan(
            path,
            options,
            targets,
            tuple(sys.argv),
            choices.duration,
            choices.unredacted,
            choices.keep,
            choices.keep_for,
            shares_quota=into is not None,
        ),
        on_attached=on_attached,
        on_loaded=loaded,
    )
    line = StatusLine()
    show = notifier.show if notifier.wanted else line.show if sys.stderr.isatty() else None

    def stop(*_: object) -> None:
        recorder.stop()
        notifier.stopping()

    before = {number: signal.signal(number, stop) for number in signals}
    try:
        create_directory(path, owner)
        try:
            recorder.run(show)
        except BaseException as error:
            line.clear()
            remove_unused(path)
            if not isinstance(error, ScopeError) or not path.exists():
                raise
            say(f"error: {printable(str(error))}")
            with suppress(ScopeError):
                show_summary(path, to_stderr=True)
            raise click.exceptions.Exit(error.exit_code) from error
        line.clear()
        # the handlers stay: a Ctrl-C that comes when recording has ended by itself must not spoil the end
        show_summary(path, to_stderr=summary_to_stderr)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return path


def show_summary(path: Path, *, to_stderr: bool) -> None:
    """Print a recording's summary."""
    # polars is imported by now, in the writer's thread; importing it here first would delay the start
    from scope_ebpf.cli.summary import print_summary

    print_summary(path, to_stderr=to_stderr)
