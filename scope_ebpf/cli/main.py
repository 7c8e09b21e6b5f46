"""The command `scope-ebpf`: its subcommands, and how errors end it."""

import importlib
import os
import signal
import sys
from contextlib import suppress

import click

from scope_ebpf.cli.units import printable
from scope_ebpf.errors import ScopeError
from scope_ebpf.version import __version__

# Name of each command and what the list of commands says of it; the module has the same name. A command is
# imported only when it is called, so that none waits for what another one needs.
COMMANDS = {
    "attach": "Record running processes and everything that they start.",
    "run": "Start a command and record it from its first instruction.",
    "record": "Record a cgroup or the whole host.",
    "summary": "Show what a recording holds, and what was lost.",
    "requests": "List the requests that were handled, and where their time went.",
    "chain": "Show what one request caused, across processes.",
    "services": "Show who talks to whom, how often and how slowly.",
    "flame": "Draw where time went, by Python stack, as a flame graph.",
    "threads": "Show where the time of each thread went.",
    "tasks": "Show the tree of asyncio tasks, trio tasks and greenlets.",
    "events": "Show the rows of a recording's table.",
    "export": "Write spans for OpenTelemetry or Perfetto.",
    "stack": "Show where the threads and tasks of a live Python process stand right now.",
    "probes": "List the USDT probes of a program or library.",
    "doctor": "Tell which probes work on this host, and how to fix the others.",
}


class Commands(click.Group):
    """A group whose commands are imported when they are called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The names, in the order in which a user meets them."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command of that name."""
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(f"scope_ebpf.cli.{cmd_name}")
        command = getattr(module, cmd_name)
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The list of commands, without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.group(
    cls=Commands,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="""\b
Examples:
  sudo scope-ebpf attach --pid 4242            record a process until Ctrl-C
  scope-ebpf summary 4242.scope                what was recorded
  scope-ebpf events 4242.scope messages        who said what to whom
  scope-ebpf doctor                            what works on this host
""",
)
@click.version_option(__version__, prog_name="scope-ebpf")
def cli() -> None:
    """Record what live processes do, from outside of them, and look into it."""


def main() -> None:
    """Run the command line and exit: 0 done, 1 failed, 2 misused, 130 interrupted."""
    # numpy's linear algebra would start threads that nobody here needs
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    open_standard_streams()
    try:
        result = cli.main(standalone_mode=False)
        code = result if isinstance(result, int) else 0
    except click.exceptions.Abort:
        code = 128 + signal.SIGINT
    except KeyboardInterrupt:
        code = 128 + signal.SIGINT
    except click.ClickException as error:
        error.show()
        code = error.exit_code
    except ScopeError as error:
        complain(f"error: {error}")
        for line in error.said:
            complain(f"  {line}")
        code = error.exit_code
    except BrokenPipeError:
        # the reader of our output has seen enough, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    except Exception as error:
        if os.environ.get("SCOPE_EBPF_TRACEBACK"):
            raise
        complain(
            f"error: scope-ebpf itself failed ({type(error).__name__}: {error});"
            " please report it, with the output under SCOPE_EBPF_TRACEBACK=1"
        )
        code = 1
    sys.exit(code)


def complain(text: str) -> None:
    """Write one line to stderr, if anybody is there; names in it may be those of traced programs."""
    with suppress(OSError):
        click.echo(printable(text), err=True)


def open_standard_streams() -> None:
    """Open /dev/null for what was closed, as by `2>&-`: a file or probe would else get its number."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest free number
            stream = open(number, "r" if number == 0 else "w", closefd=False)  # noqa: SIM115 - stays open
            setattr(sys, name, stream)
