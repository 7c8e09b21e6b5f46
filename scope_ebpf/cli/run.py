"""scope-ebpf run: start a command under trace."""

import contextlib
import os
import shutil
import signal
from collections.abc import Mapping, Sequence
from pathlib import Path

import click

from scope_ebpf.cli.options import recording_options
from scope_ebpf.errors import ScopeError
from scope_ebpf.probe_specs import ProbeSpec

NOT_FOUND, NOT_EXECUTABLE = 127, 126  # as the shell does


@click.command(
    context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False},
    epilog="""\b
Examples:
  sudo scope-ebpf run -- python3 app.py --port 8000
  sudo scope-ebpf run -o tests --payload-bytes 0 -- pytest -q
""",
)
@click.option(
    "--follow/--no-follow",
    default=True,
    show_default=True,
    help="Record the command's children, too.",
)
@recording_options
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
def run(
    command: tuple[str, ...],
    follow: bool,
    output: str | None,
    duration: float | None,
    families: tuple[str, ...],
    probes: tuple[ProbeSpec, ...],
    payload_bytes: int,
    unredacted: bool,
) -> None:
    """Start COMMAND, record it from its first instruction on, and pass its exit code on.

    Under sudo the command runs as the invoking user, not as root. Ctrl-C goes to the command; recording ends
    when it does. The summary goes to stderr.
    """
    from scope_ebpf.cli import session
    from scope_ebpf.loaders.capture import CaptureOptions
    from scope_ebpf.loaders.targets import Target, check_pid_namespace

    check_pid_namespace()
    with HeldCommand(command, os.environ) as held:
        forward = signal.signal(signal.SIGTERM, lambda *_: held.terminate())
        ignored = signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            session.record(
                CaptureOptions(
                    tgids=(held.tgid,),
                    after_exec=True,
                    follow=follow,
                    families=families,
                    probes=probes,
                    payload_bytes=payload_bytes,
                    commands=(Path(shutil.which(command[0]) or command[0]).absolute(),),
                ),
                output=output,
                subject=os.path.basename(command[0]),
                targets=(Target(held.tgid, os.path.basename(command[0])[:15], command),),
                duration=duration,
                unredacted=unredacted,
                signals=(signal.SIGHUP,),
                on_attached=held.release,
                summary_to_stderr=True,
                ending="it ends with the command",
            )
            code = held.wait()
        finally:
            signal.signal(signal.SIGTERM, forward)
            signal.signal(signal.SIGINT, ignored)
    raise click.exceptions.Exit(code)


class HeldCommand:
    """A command that is forked now and executed when it is released; a context manager.

    Leaving the context without a release ends the child before it executed anything.
    """

    def __init__(self, command: Sequence[str], environment: Mapping[str, str]) -> None:
        """Fork. Must happen before this process starts threads or gives up privileges."""
        from scope_ebpf.loaders import privileges

        account = privileges.invoking_account(environment)
        gate, self._gate = os.pipe()
        self._failure, failure = os.pipe()
        self._code: int | None = None
        self.tgid = os.fork()
        if self.tgid == 0:
            try:
                os.close(self._gate)
                os.close(self._failure)
                if os.read(gate, 1):
                    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGPIPE):
                        signal.signal(number, signal.SIG_DFL)
                    theirs = privileges.become_invoking_user(environment, account)
                    os.execvpe(command[0], list(command), theirs)  # noqa: S606 - what run is for
            except (OSError, ScopeError) as error:
                cause = error.strerror if isinstance(error, OSError) else str(error)
                os.write(failure, f"{getattr(error, 'errno', 0)} {cause}".encode())
            finally:
                os._exit(NOT_FOUND)
        os.close(gate)
        os.close(failure)
        self._name = command[0]

    def __enter__(self) -> "HeldCommand":
        """The command itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """End the child if it was not released, and close the pipes."""
        for descriptor in (self._gate, self._failure):
            with contextlib.suppress(OSError):
                os.close(descriptor)
        if self._code is None:
            self.wait()

    def release(self) -> None:
        """Let the command be executed.

        Raises:
            click.exceptions.Exit: it cannot be; that is said on stderr.
        """
        os.write(self._gate, b"x")
        os.close(self._gate)
        # the pipe closes at the exec, so this returns when the command runs or cannot
        message = os.read(self._failure, 4096).decode(errors="replace")
        if message:
            number, _, cause = message.partition(" ")
            click.echo(
                f"error: cannot run {self._name}: {cause}; check the command's name and path",
                err=True,
            )
            raise click.exceptions.Exit(NOT_FOUND if number == "2" else NOT_EXECUTABLE)

    def terminate(self) -> None:
        """Pass a SIGTERM on."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.tgid, signal.SIGTERM)

    def wait(self) -> int:
        """Wait for the command's end; its exit code as the shell has it."""
        if self._code is None:
            _, status = os.waitpid(self.tgid, 0)
            code = os.waitstatus_to_exitcode(status)
            self._code = code if code >= 0 else 128 - code
        return self._code
