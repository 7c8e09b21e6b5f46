"""scope-ebpf record: record a cgroup or the whole host."""

import click

from scope_ebpf.cli.options import recording_options
from scope_ebpf.probe_specs import ProbeSpec


@click.command(
    epilog="""\b
Examples:
  sudo scope-ebpf record --cgroup /system.slice/gunicorn.service --duration 1m
  sudo scope-ebpf record --all --families processes,messages -o host
"""
)
@click.option(
    "--cgroup",
    metavar="PATH",
    help="A cgroup, as its directory or its path in the unified hierarchy; those below it belong to it.",
)
@click.option("--all", "everything", is_flag=True, help="The whole host, but not this recorder.")
@recording_options
def record(
    cgroup: str | None,
    everything: bool,
    output: str | None,
    duration: float | None,
    families: tuple[str, ...],
    probes: tuple[ProbeSpec, ...],
    payload_bytes: int,
    unredacted: bool,
) -> None:
    """Record a cgroup's members, or the whole host.

    Processes that join the cgroup while it is recorded are taken up. Recording ends on Ctrl-C, SIGTERM or
    the end of the duration; then a summary is printed.
    """
    if (cgroup is None) != everything:
        raise click.UsageError("give either --cgroup PATH or --all")

    from scope_ebpf.cli import session
    from scope_ebpf.loaders.capture import CaptureOptions
    from scope_ebpf.loaders.cgroups import resolve

    directory = None if cgroup is None else resolve(cgroup)
    session.record(
        CaptureOptions(
            cgroup=directory,
            everything=everything,
            families=families,
            probes=probes,
            payload_bytes=payload_bytes,
        ),
        output=output,
        subject="host" if directory is None else directory.name,
        duration=duration,
        unredacted=unredacted,
    )
