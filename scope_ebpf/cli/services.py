"""`scope-ebpf services`: who talks to whom, how often, how slow and with how many errors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import click

from scope_ebpf.cli import output, units

if TYPE_CHECKING:
    import polars as pl
    from rich.console import Console

EXAMPLES = """\b
Examples:
  scope-ebpf services shop.scope
  scope-ebpf services shop.scope --json | jq -c 'select(.errors > 0)'
"""
HEADINGS = (
    "client",
    "server",
    "protocol",
    "calls",
    "errors",
    "p50",
    "p95",
    "p99",
    "total",
    "bytes",
)
# Left out in this order, so that so much of the names can be shown.
DISPENSABLE = ("bytes", "p95", "total")
MIN_NAMES = 24
GAP = 2


@click.command(epilog=EXAMPLES)
@click.argument("recording", metavar="REC")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object per line.")
def services(recording: str, as_json: bool) -> None:
    """Show who talks to whom in the recording REC: clients, servers and protocols.

    Calls are counted as their clients saw them, and have the longest total time first. A client that
    was not recorded is `outside`, a server that was not recorded is its address. A line such as
    `redis queue` leads from who queued jobs to who did them, and its times are those of the work.
    Quantiles are exact, and of complete calls only; a call that waits on purpose, such as a worker's
    BLPOP, takes as long as it waited.
    """
    from scope_ebpf.analysis.services import service_map
    from scope_ebpf.recording.reader import open_recording

    opened = open_recording(recording)
    found = service_map(opened.collect(opened.spans()).lazy())
    with output.results():
        if as_json:
            click.echo(found.write_ndjson(), nl=False)
        elif not found.is_empty():
            render(found, output.console())
    if found.is_empty():
        from scope_ebpf.cli.empty import why_empty

        click.echo(f"no service talked to another one: {why_empty(opened)}", err=True)


def render(found: pl.DataFrame, console: Console) -> None:
    """Print the map as a table; where it would be too wide, with fewer numbers and cut names."""
    from rich.text import Text

    columns: dict[str, list[str]] = {name: [] for name in HEADINGS}
    for row in found.iter_rows(named=True):
        protocol = row["protocol"] or "-"
        columns["client"].append(units.printable(row["client"] or "-"))
        columns["server"].append(units.printable(row["server"] or "-"))
        columns["protocol"].append(
            units.printable(f"{protocol} queue" if row["kind"] == "queue" else protocol)
        )
        columns["calls"].append(f"{row['calls']:,}")
        columns["errors"].append(f"{row['errors']:,}")
        for name in ("p50", "p95", "p99", "total"):
            ns = row[f"{name}_ns"]
            columns[name].append("-" if ns is None else units.duration(ns))
        columns["bytes"].append(units.size(row["bytes"]))
    widths = {name: max(map(len, [name, *cells])) for name, cells in columns.items()}
    for name in DISPENSABLE:
        if _room(widths, console.width) < min(MIN_NAMES, widths["client"] + widths["server"]):
            del widths[name], columns[name]
    room = max(_room(widths, console.width), MIN_NAMES)
    client = min(widths["client"], max(room // 2, room - widths["server"]))
    longest = {"client": client, "server": room - client}
    grid = output.table(*columns, left=3)
    for cells in zip(*columns.values(), strict=True):
        grid.add_row(
            *(
                Text(
                    units.cut(cell, longest.get(name, len(cell))),
                    style="red" if name == "errors" and cell != "0" else "",
                )
                for name, cell in zip(columns, cells, strict=True)
            )
        )
    console.print(grid)


def _room(widths: Mapping[str, int], width: int) -> int:
    """What the other columns leave for the names of client and server."""
    others = sum(size for name, size in widths.items() if name not in ("client", "server"))
    return width - others - GAP * (len(widths) - 1)
