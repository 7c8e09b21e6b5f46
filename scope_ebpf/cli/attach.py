"""scope-ebpf attach: record running processes."""

import click

from scope_ebpf.cli.options import Choices, recording_options
from scope_ebpf.errors import UsageError


@click.command(
    epilog="""\b
Examples:
  sudo scope-ebpf attach --pid 4242
  sudo scope-ebpf attach --pid $(pgrep -o gunicorn) --pid $(pgrep -o postgres) -o shop --duration 30s
  sudo scope-ebpf attach --pid 4242 --families messages --payload-bytes 0
  sudo scope-ebpf attach --pid 4242 --calls shop.views:checkout
"""
)
@click.option(
    "--pid",
    "pids",
    type=click.IntRange(1),
    multiple=True,
    required=True,
    metavar="PID",
    help="A process to record; may be given more than once.",
)
@click.option(
    "--follow/--no-follow",
    default=True,
    show_default=True,
    help="Record the children, too: those that exist and those to come.",
)
@click.option(
    "--calls",
    multiple=True,
    metavar="MODULE:FUNCTION",
    help="Record each call of a Python function, with its duration and arguments, in the table hits; also"
    " MODULE:CLASS.METHOD. May be given more than once, as far as the CPU's debug registers reach. What it"
    " costs is said before anything is attached.",
)
@recording_options
def attach(
    pids: tuple[int, ...],
    follow: bool,
    calls: tuple[str, ...],
    choices: Choices,
) -> None:
    """Record running processes, their threads and children.

    Nothing in the processes is changed or stopped. Recording ends on Ctrl-C, SIGTERM, the end of the
    duration, or the last target's exit; then a summary is printed.
    """
    from scope_ebpf.cli import session
    from scope_ebpf.loaders.capture import CaptureOptions
    from scope_ebpf.loaders.targets import check_pid_namespace, find_target

    check_pid_namespace()
    if 1 in pids and follow:
        raise UsageError(
            "process 1 started everything on this host: record all of it with"
            " `scope-ebpf record --all`, or process 1 alone with --no-follow"
        )
    targets = tuple(find_target(pid) for pid in dict.fromkeys(pids))
    specs = session.announce_calls(calls, [target.tgid for target in targets], follow=follow)
    session.record(
        CaptureOptions(
            tgids=tuple(target.tgid for target in targets),
            follow=follow,
            calls=specs,
            **choices.capture(),
        ),
        choices=choices,
        subject=" ".join(f"{target.comm}-{target.tgid}" for target in targets[:3]),
        targets=targets,
    )
