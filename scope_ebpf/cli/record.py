"""scope-ebpf record: record a cgroup or the whole host."""

from pathlib import Path

import click

from scope_ebpf.cli.options import Choices, recording_options


@click.command(
    epilog="""\b
Examples:
  sudo scope-ebpf record --cgroup /system.slice/gunicorn.service --duration 1m
  sudo scope-ebpf record --all --families processes,messages -o host
  sudo scope-ebpf record --all --keep 2G --keep-for 7d --into /var/lib/scope-ebpf
"""
)
@click.option(
    "--cgroup",
    metavar="PATH",
    help="A cgroup, as its directory or its path in the unified hierarchy; those below it belong to it.",
)
@click.option("--all", "everything", is_flag=True, help="The whole host, but not this recorder.")
@click.option(
    "--into",
    metavar="FOLDER",
    help="Make a recording of its own at each start in this folder, and keep the quota (--keep, --keep-for)"
    " for all of them together: earlier ones go first. For a service.",
)
@recording_options
def record(
    cgroup: str | None,
    everything: bool,
    into: str | None,
    choices: Choices,
) -> None:
    """Record a cgroup's members, or the whole host.

    Processes that join the cgroup while it is recorded are taken up. Recording ends on Ctrl-C, SIGTERM or
    the end of the duration; then a summary is printed.
    """
    if (cgroup is None) != everything:
        raise click.UsageError("give either --cgroup PATH or --all")
    if into is not None:
        if choices.output is not None:
            raise click.UsageError("give either --into FOLDER or -o NAME.scope")
        if choices.keep is None and choices.keep_for is None:
            raise click.UsageError("--into needs a quota: give --keep SIZE or --keep-for TIME, too")

    from scope_ebpf.cli import session
    from scope_ebpf.loaders.capture import CaptureOptions
    from scope_ebpf.loaders.cgroups import resolve

    directory = None if cgroup is None else resolve(cgroup)
    session.record(
        CaptureOptions(cgroup=directory, everything=everything, **choices.capture()),
        choices=choices,
        subject="host" if directory is None else directory.name,
        into=None if into is None else Path(into),
    )
