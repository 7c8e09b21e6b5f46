"""`scope-ebpf summary`: what a recording contains, in numbers."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

import click

from scope_ebpf.cli import output, units

if TYPE_CHECKING:
    from rich.console import Console

    from scope_ebpf.analysis.summary import Summary, SyscallSummary

EXAMPLES = """\b
Examples:
  scope-ebpf summary shop.scope
  scope-ebpf summary shop.scope --json | jq .lost_total
  scope-ebpf summary shop.scope --json | jq '.tables.syscalls'
"""
TRANSPORTS = {"rings": "mapped rings", "perf": "perf buffers"}
MOST_TARGETS = 8
MOST_NAMES = 8
MOST_SERVICES = 20
# System calls in the table: so many by total time, and so many more by each other measure.
BY_TIME = 10
BY_OTHERS = 3
# The table of system calls is as wide as fits into a terminal of the usual size.
MIN_WIDTH = 78


@click.command(epilog=EXAMPLES)
@click.argument("recording", metavar="REC")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object, with exact numbers.")
def summary(recording: str, as_json: bool) -> None:
    """Tell what the recording REC contains, and what was lost.

    Counts events and bytes per table; shows what each service did and where it runs, by systemd unit or
    container; the system calls that took longest, failed most and were made most often; and the off-CPU
    time per program. Waiting is time until something woke
    the thread; runnable is time that it then waited for a CPU. Quantiles (p50, p99) are right to
    2.2 %.
    """
    print_summary(Path(recording), as_json=as_json)


def print_summary(path: Path, *, as_json: bool = False, to_stderr: bool = False) -> None:
    """Print the summary of the recording at `path`.

    `to_stderr` is for commands whose stdout belongs to someone else. Raises `FormatError` or
    `RecordingError` if the recording is damaged.
    """
    from scope_ebpf.analysis.summary import summarize
    from scope_ebpf.recording.reader import open_recording

    found = summarize(open_recording(path))
    with output.results():
        if as_json:
            click.echo(json.dumps(found.to_dict(), indent=2), err=to_stderr)
        else:
            render(found, output.console(to_stderr=to_stderr))


def render(found: Summary, console: Console) -> None:
    """Print the summary for people."""
    _print_head(found, console)
    _print_tables(found, console)
    if len(found.services) > 1 or any(service.place for service in found.services):
        _print_services(found, console)
    if found.syscalls:
        _print_syscalls(found, console)
    if found.offcpu:
        _print_offcpu(found, console)


def _print_head(found: Summary, console: Console) -> None:
    host = found.host
    machine = f"Linux {host['kernel']}, {host['machine']}, {host['cpus']} CPUs"
    lines = [
        ("recorded", f"{units.duration(found.duration_ns)} from {_moment(found)}"),
        ("host", units.printable(f"{host['name']} ({machine})")),
    ]
    for target in found.targets[:MOST_TARGETS]:
        command = shlex.join(target["cmdline"]) or target["comm"]
        lines.append(("target", units.printable(f"{target['tgid']} {command}")))
    if len(found.targets) > MOST_TARGETS:
        lines.append(("", f"and {len(found.targets) - MOST_TARGETS} more"))
    quota = [units.size(found.keep_bytes)] if found.keep_bytes is not None else []
    quota += [units.duration(found.keep_ns)] if found.keep_ns is not None else []
    if quota:
        lines.append(("kept", f"at most {' and '.join(quota)}; {_dropped(found)}"))
    recorder = found.recorder
    if found.payload_bytes:
        kept = "redacted" if found.redacted else "as they were sent (--unredacted)"
        lines.append(("payloads", f"{found.payload_bytes} bytes at most, {kept}"))
    lines += [
        ("seen", f"{_count(found.processes, 'process', 'processes')}, "
                 f"{_count(found.threads, 'thread', 'threads')}"),
        ("recorder", f"{recorder['cpu_percent']:.1f} % of one CPU, "
                     f"{units.size(recorder['peak_rss_bytes'])} of memory at most, through"
                     f" {TRANSPORTS.get(found.transport, found.transport)}"),
    ]  # fmt: skip
    console.print(units.printable(Path(found.path).name), style="bold", soft_wrap=True)
    width = max(console.width, MIN_WIDTH)
    for label, text in lines:
        console.print(f"{label:9}  {units.cut(text, width - 11)}", soft_wrap=True)
    for note in found.notes:
        console.print(f"{'note':9}  {units.printable(note)}", style="yellow", soft_wrap=True)
    lost = (
        f"{_count(sum(table.lost for table in found.tables.values()), 'event', 'events')}, "
        f"{_count(found.lost_payloads, 'head of a payload', 'heads of payloads')}, "
        f"{_count(found.lost_tasks, 'whole thread', 'whole threads')}"
    )
    style = "bold red" if found.lost_total else None
    console.print(f"{'lost':9}  {lost}", style=style, soft_wrap=True)


def _print_tables(found: Summary, console: Console) -> None:
    grid = output.table("table", "rows", "lost", "size", "per row")
    for name, table in found.tables.items():
        per_row = "-" if table.bytes_per_row is None else f"{table.bytes_per_row:.1f} B"
        grid.add_row(
            name, f"{table.rows:,}", f"{table.lost:,}", units.size(table.bytes_on_disk), per_row
        )
    rows = sum(table.rows for table in found.tables.values())
    lost = sum(table.lost for table in found.tables.values())
    grid.add_row("all", f"{rows:,}", f"{lost:,}", units.size(found.bytes_on_disk), "")
    console.print()
    console.print(grid)


def _print_services(found: Summary, console: Console) -> None:
    headings = ("service", "in", "processes", "calls", "errors", "waiting", "runnable")
    grid = output.table(*headings, left=2)
    for service in found.services[:MOST_SERVICES]:
        name = "(name lost)" if service.service is None else units.printable(service.service)
        grid.add_row(
            units.cut(name, 24),
            units.cut(units.printable(service.place or "-"), 36),
            f"{service.processes:,}",
            f"{service.calls:,}",
            f"{service.errors:,}",
            units.duration(service.waiting_ns),
            units.duration(service.runnable_ns),
        )
    console.print()
    console.print(grid)
    if len(found.services) > MOST_SERVICES:
        console.print(f"and {len(found.services) - MOST_SERVICES} others: --json shows all")


def _print_syscalls(found: Summary, console: Console) -> None:
    shown = _notable(found.syscalls)
    grid = output.table("system call", "calls", "total", "p50", "p99", "errors", "most often")
    for call in shown:
        grid.add_row(
            units.cut(call.name, 20),
            f"{call.count:,}",
            units.duration(call.total_ns),
            units.duration(call.p50_ns),
            units.duration(call.p99_ns),
            f"{call.errors:,}",
            call.most_frequent_error or "-",
        )
    console.print()
    console.print(grid)
    if len(shown) < len(found.syscalls):
        console.print(f"and {len(found.syscalls) - len(shown)} others: --json shows all")


def _notable(calls: list[SyscallSummary]) -> list[SyscallSummary]:
    """Those that took longest, and what else was frequent or failed often; longest first."""
    often = sorted(calls, key=lambda call: call.count, reverse=True)[:BY_OTHERS]
    failing = sorted(calls, key=lambda call: call.errors, reverse=True)[:BY_OTHERS]
    names = {call.name for call in calls[:BY_TIME] + often}
    names |= {call.name for call in failing if call.errors}
    return [call for call in calls if call.name in names]


def _print_offcpu(found: Summary, console: Console) -> None:
    grid = output.table("off-CPU", "intervals", "waiting", "runnable")
    for program in found.offcpu[:MOST_NAMES]:
        grid.add_row(
            "(name lost)" if program.comm is None else units.printable(program.comm),
            f"{program.intervals:,}",
            units.duration(program.waiting_ns),
            units.duration(program.runnable_ns),
        )
    console.print()
    console.print(grid)
    if len(found.offcpu) > MOST_NAMES:
        console.print(f"and {len(found.offcpu) - MOST_NAMES} others: --json shows all")


def _dropped(found: Summary) -> str:
    if found.kept_since_ns is None:
        return "nothing was dropped"
    return (
        f"the first {units.duration(found.kept_since_ns)} were dropped,"
        f" {_count(found.dropped_rows, 'row', 'rows')}"
    )


def _moment(found: Summary) -> str:
    moment = units.moment(found.started_realtime_ns)
    if moment is None:
        return "an unknown time"
    return f"{moment:%Y-%m-%d %H:%M:%S} UTC"


def _count(number: int, one: str, many: str) -> str:
    return f"{number:,} {one if number == 1 else many}"
