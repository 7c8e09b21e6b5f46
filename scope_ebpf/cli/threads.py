"""`scope-ebpf threads`: where the time of each thread went."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from scope_ebpf.cli import output, units

if TYPE_CHECKING:
    import polars as pl
    from rich.console import Console

    from scope_ebpf.recording.reader import Recording

EXAMPLES = """\b
Examples:
  scope-ebpf threads shop.scope
  scope-ebpf threads shop.scope --service web
  scope-ebpf threads shop.scope --json | jq -c 'select(.gil_ns > 1e8) | [.thread, .gil_holders]'
"""
DEFAULT_LIMIT = 40
# Columns of times by the part that each shows; left out where no thread has any of it.
TIMES = {
    "python_ns": "Python",
    "native_ns": "native",
    "running_ns": "running",
    "gil_ns": "GIL wait",
    "runqueue_ns": "run queue",
    "lock_ns": "lock",
    "disk_ns": "disk",
    "network_ns": "network",
    "sleep_ns": "sleep",
    "stopped_ns": "stopped",
    "unknown_ns": "unknown",
    "gc_ns": "(GC)",
}
MOST_NAME = 24
MOST_HOLDERS = 2
GAP = 2


@click.command(epilog=EXAMPLES)
@click.argument("recording", metavar="REC")
@click.option("--service", metavar="NAME", help="Only threads of this service.")
@click.option("--tgid", type=click.IntRange(min=1), metavar="PID", help="Only of this process.")
@click.option(
    "--limit",
    type=click.IntRange(min=1),
    metavar="N",
    help=f"At most N threads.  [default: {DEFAULT_LIMIT}; with --json: all]",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object per line.")
def threads(
    recording: str, service: str | None, tgid: int | None, limit: int | None, as_json: bool
) -> None:
    """Show where the time of each thread in the recording REC went; who ran most comes first.

    The parts of a thread add up to the time that it was seen for (`seen`; + it began meanwhile, - it
    ended). Python and native divide its time on the CPU as the samples of it are divided: native is
    code outside of the interpreter. `running` was never sampled. `GIL wait` is from the
    begin of a call that waited for the GIL to its end, and comes with who held it then; `network` is
    sockets and pipes, and polls in which something came; `sleep` is also timeouts and waiting for
    children. (GC) is a part of the others, and needs a probe named gc.
    """
    from scope_ebpf.analysis.names import processes_of
    from scope_ebpf.analysis.threads import thread_times
    from scope_ebpf.recording.reader import open_recording

    opened = open_recording(recording)
    found = thread_times(opened, processes_of(opened, service, tgid))
    shown = found
    if limit is not None or not as_json:
        shown = found.head(limit or DEFAULT_LIMIT)
    with output.results():
        if as_json:
            click.echo(shown.write_ndjson(), nl=False)
        elif not shown.is_empty():
            render(shown, output.console())
    if found.is_empty():
        click.echo("no thread was recorded; `scope-ebpf summary REC` shows what was lost", err=True)
        return
    if shown.height < found.height and not as_json:
        click.echo(
            f"the first {shown.height:,} of {found.height:,}; --limit N shows more of them",
            err=True,
        )
    if not as_json and (less := what_is_less(opened, found)):
        click.echo(units.printable(less), err=True)


def what_is_less(opened: Recording, found: pl.DataFrame) -> str | None:
    """What the parts do not tell because it was not recorded; None: nothing."""
    if "offcpu" not in opened.meta.families:
        return (
            "off-CPU time was not recorded, so all but the GIL is unknown; "
            "record with offcpu in --families"
        )
    if not found["samples"].sum():
        from scope_ebpf.analysis.stacks.missing import why_no_samples

        return f"Python and native cannot be told apart: {why_no_samples(opened)}"
    return None


def render(found: pl.DataFrame, console: Console) -> None:
    """Print the table; where it would be too wide, each thread has several lines."""
    from rich.text import Text

    rows = found.to_dicts()
    times = {name: head for name, head in TIMES.items() if any(row[name] for row in rows)}
    columns = {
        "thread": [units.cut(units.printable(row["thread"]), MOST_NAME) for row in rows],
        "tid": [str(row["tid"]) for row in rows],
        "service": [units.cut(units.printable(row["service"]), MOST_NAME) for row in rows],
        "seen": [_seen(row) for row in rows],
        **{
            head: [units.duration(row[name]) if row[name] else "-" for row in rows]
            for name, head in times.items()
        },
    }
    holders = [_holders(row) for row in rows]
    widths = {name: max(map(len, [name, *cells])) for name, cells in columns.items()}
    held = max(map(len, holders))
    if sum(widths.values()) + held + GAP * len(widths) > console.width:
        for row, holder in zip(rows, holders, strict=True):
            for line in _block(row, times, holder, console.width):
                console.print(line, soft_wrap=True)
        return
    headings = [*columns, *(["GIL held by"] if held else [])]
    grid = output.table(*headings, left=1)
    for name in ("service", "GIL held by"):
        if name in headings:
            grid.columns[headings.index(name)].justify = "left"
    for cells in zip(*columns.values(), *([holders] if held else []), strict=True):
        grid.add_row(*map(Text, cells))
    console.print(grid)


def _block(row: dict[str, Any], times: dict[str, str], holder: str, width: int) -> list[Any]:
    """A thread in several lines: its name, then its parts, the longest first, in per cent, too."""
    from rich.text import Text

    name = f"{units.printable(row['thread'])} {row['tid']}, {units.printable(row['service'])}"
    lines = [Text(units.cut(f"{name}: {_seen(row)}", width), style="bold")]
    parts = sorted((-row[part], head) for part, head in times.items() if row[part])
    cells = [
        f"{head} {units.duration(-ns)} ({-100 * ns / max(row['wall_ns'], 1):.0f} %)"
        for ns, head in parts
    ]
    if holder:
        cells.append(f"GIL held by {holder}")
    line = ""
    for cell in cells:
        if line and len(line) + len(cell) + 2 > width - GAP:
            lines.append(Text(f"{' ' * GAP}{line},"))
            line = ""
        line = f"{line}, {cell}" if line else cell
    return [*lines, Text(" " * GAP + line)] if line else lines


def _seen(row: dict[str, Any]) -> str:
    """How long, and whether it began or ended meanwhile."""
    marks = ("+" if row["began"] else "") + ("-" if row["ended"] else "")
    return f"{units.duration(row['wall_ns'])}{' ' if marks else ''}{marks}"


def _holders(row: dict[str, Any]) -> str:
    most = row["gil_holders"][:MOST_HOLDERS]
    return ", ".join(
        f"{units.printable(holder['thread'])} ({holder['tid']}) {units.duration(holder['wait_ns'])}"
        for holder in most
    )
