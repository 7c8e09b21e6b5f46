"""`scope-ebpf requests`: the requests that traced servers handled, and where their time went."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import click

from scope_ebpf.cli import output, units
from scope_ebpf.cli.where import filtered, refused
from scope_ebpf.errors import UsageError

if TYPE_CHECKING:
    import polars as pl
    from rich.text import Text

    from scope_ebpf.recording.reader import Recording

EXAMPLES = """\b
Examples:
  scope-ebpf requests shop.scope
  scope-ebpf requests shop.scope --slow 10
  scope-ebpf requests shop.scope --errors --service inventory
  scope-ebpf requests shop.scope --where "operation = 'GET /cart' AND runqueue_ns > 1000000"
  scope-ebpf requests shop.scope --json | jq -c '[.request_id, .duration_ns, .status]'
"""
WHERE_EXAMPLE = "\"duration_ns > 1000000 AND service = 'web'\""
DEFAULT_LIMIT = 20
ID_DIGITS = 8
# Time that is not understood is shown from this share of the duration on, other parts likewise.
NOTABLE_OTHER = 0.05
NOTABLE_PART = 0.02
# From this share on, another command is named that may tell more.
MOSTLY = 0.5
MOST_PARTS = 4
# From this width on, where the time went stands on the request's own line.
WIDE = 130
GAP = "  "
MOST_SERVICE = 20
MIN_OPERATION = 16
MAX_OPERATION = 60
OWN_PARTS = {"cpu_ns": "cpu", "runqueue_ns": "runqueue", "disk_ns": "disk", "lock_ns": "lock"}


@click.command(epilog=EXAMPLES)
@click.argument("recording", metavar="REC")
@click.option("--slow", type=click.IntRange(min=1), metavar="N", help="The N that took longest.")
@click.option("--errors", is_flag=True, help="Only those that failed: an error, or HTTP 5xx.")
@click.option("--where", metavar="EXPR", help="Only those for which this SQL expression is true.")
@click.option("--service", metavar="NAME", help="Only those that this service handled.")
@click.option(
    "--limit",
    type=click.IntRange(min=1),
    metavar="N",
    help=f"At most N of them.  [default: {DEFAULT_LIMIT}; with --json: all]",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object per line.")
def requests(
    recording: str,
    slow: int | None,
    errors: bool,
    where: str | None,
    service: str | None,
    limit: int | None,
    as_json: bool,
) -> None:
    """List the requests that traced servers handled in the recording REC, in order of time.

    Without --errors, --where or --service these are the entries: requests that nothing traced is
    known to have caused. With one of them, they are all: requests from one traced service to
    another, and jobs, as well. EXPR may use all columns; --json --limit 1 shows them.

    The last column says where the time of the request's thread went: the largest parts, on the
    CPU, ready to run (runqueue), in disk I/O, in locks, or waiting for a peer, named by service
    and protocol; and what is not understood, from 5 % on. --json has all parts: they add up
    to the duration. Give an id to `scope-ebpf chain REC ID` to see what a request did.
    """
    if slow is not None and limit is not None:
        raise UsageError("--slow N and --limit N exclude each other; give one of them")
    from scope_ebpf.analysis.chain import select_requests
    from scope_ebpf.cli.empty import what_is_less
    from scope_ebpf.recording.reader import open_recording

    opened = open_recording(recording)
    every = _readable(opened.collect(opened.requests()))
    chosen = select_requests(
        _where(every, where),
        entry=not (errors or where or service),
        errors=errors,
        service=service,
        slow=slow,
    )
    id_digits = _id_digits(every["span_id"])
    shown = chosen
    if limit is not None or (not as_json and slow is None):
        shown = chosen.head(limit or DEFAULT_LIMIT)
    with output.results():
        if as_json:
            click.echo(shown.write_ndjson(), nl=False)
        elif not shown.is_empty():
            console = output.console()
            for line in render(shown, opened, console.width, id_digits):
                console.print(line, soft_wrap=True)
    if chosen.is_empty():
        click.echo(units.printable(_nothing(every, opened, service)), err=True)
    elif shown.height < chosen.height and not as_json:
        click.echo(
            f"the first {shown.height:,} of {chosen.height:,}; --limit N shows more of them, "
            "--slow N the slowest, --errors those that failed",
            err=True,
        )
    if chosen.is_empty() or as_json:
        return
    if less := what_is_less(opened):
        click.echo(less, err=True)
    elif more := _what_tells_more(shown, opened, id_digits):
        click.echo(more, err=True)


def _readable(requests: pl.DataFrame) -> pl.DataFrame:
    """Ids and labels as text, as users see them and as SQL can compare them."""
    import polars as pl

    from scope_ebpf.analysis.schema import span_text

    texts = [name for name, dtype in requests.schema.items() if isinstance(dtype, pl.Enum)]
    ids = [
        pl.Series(name, [None if n is None else span_text(n) for n in requests[name]], pl.String)
        for name in ("span_id", "request_id")
    ]
    return requests.with_columns(pl.col(texts).cast(pl.String), *ids)


def _where(requests: pl.DataFrame, where: str | None) -> pl.DataFrame:
    if where is None:
        return requests
    import polars as pl

    frame = filtered(requests.lazy(), where, WHERE_EXAMPLE)
    try:
        return frame.collect()
    except (pl.exceptions.PolarsError, pl.exceptions.PanicException) as error:
        raise refused(error) from None


def _id_digits(ids: pl.Series) -> int:
    """How many digits tell all requests of the recording apart."""
    for digits in range(ID_DIGITS, 16):
        if ids.str.head(digits).n_unique() == ids.n_unique():
            return digits
    return 16


def _nothing(every: pl.DataFrame, opened: Recording, service: str | None) -> str:
    """Why there is nothing to show."""
    if every.is_empty():
        from scope_ebpf.cli.empty import why_empty

        return f"there are no requests: {why_empty(opened)}"
    services = every["service"].drop_nulls().unique().sort().to_list()
    if service is not None and service not in services:
        return f"no service {service!r} handled a request; there are {', '.join(services)}"
    return f"none of the {every.height:,} requests is like that"


def _what_tells_more(requests: pl.DataFrame, opened: Recording, id_digits: int) -> str | None:
    """How to divide the time of a request that shared its thread with others, as in event loops."""
    import polars as pl

    other, duration = pl.col("other_ns"), pl.col("duration_ns")
    puzzling = requests.filter(other > MOSTLY * duration)
    if puzzling.is_empty() or "samples" not in opened.meta.families:
        return None
    worst = puzzling.sort("other_ns", descending=True)["span_id"][0][:id_digits]
    return (
        "the time of a request whose thread served others, too, as in event loops, is mostly not understood"
        f" here; `scope-ebpf flame REC --request {worst} -o FILE.svg` divides it by stacks and tasks"
    )


def render(requests: pl.DataFrame, opened: Recording, width: int, id_digits: int) -> Iterator[Text]:
    """The lines of the table; where the time went has lines of its own where `width` is small."""
    from rich.text import Text

    rows = requests.to_dicts()
    offset_ns = opened.meta.clock.realtime_offset_ns
    moments = [_moment(row["start_ns"] + offset_ns) for row in rows]
    dated = any(moment[:10] != moments[0][:10] for moment in moments)
    columns = {
        "id": [row["span_id"][:id_digits] for row in rows],
        "start (UTC)": [moment if dated else moment[11:] for moment in moments],
        "duration": [_duration(row["duration_ns"]) for row in rows],
        "service": [units.cut(_text(row["service"]), MOST_SERVICE) for row in rows],
        "operation": [_text(row["operation"] or row["protocol"]) for row in rows],
        "status": [_text(row["status"]) for row in rows],
        "spans": [str(row["spans"] or 0) for row in rows],
    }
    widths = {name: max(map(len, [name, *cells])) for name, cells in columns.items()}
    others = sum(size + len(GAP) for name, size in widths.items() if name != "operation")
    wide = width >= WIDE
    room = width - others - (width // 3 if wide else 0)
    widths["operation"] = min(widths["operation"], max(min(room, MAX_OPERATION), MIN_OPERATION))
    heading = [*_aligned({name: name for name in columns}, widths)]
    if wide:
        heading.append("where the time went")
    yield Text(GAP.join(heading), style="bold")
    failed = _failed(requests)
    for index, row in enumerate(rows):
        cells = {name: column[index] for name, column in columns.items()}
        line = Text(GAP).join(
            Text(cell, style="red" if failed[index] and name == "status" else "")
            for name, cell in zip(columns, _aligned(cells, widths), strict=True)
        )
        error = units.printable(row["error"]) if row["error"] else ""
        spent = ", ".join(f"{what} {units.duration(ns)}" for what, ns in parts(row))
        if wide:
            yield Text.assemble(line, GAP, (error, "red"), "; " if error and spent else "", spent)
            continue
        yield line
        indent = " " * (id_digits + len(GAP))
        for text, style in ((error, "red"), (spent, "")):
            for part in textwrap.wrap(text, max(width - len(indent), MIN_OPERATION)):
                yield Text.assemble(indent, (part, style))


def _aligned(cells: Mapping[str, str], widths: Mapping[str, int]) -> Iterator[str]:
    for name, cell in cells.items():
        text = units.cut(cell, widths[name])
        right = name in ("duration", "spans")
        yield text.rjust(widths[name]) if right else text.ljust(widths[name])


def _failed(requests: pl.DataFrame) -> Sequence[bool]:
    from scope_ebpf.analysis.chain import failed

    return requests.select(failed()).to_series().to_list()


def parts(row: Mapping[str, Any]) -> list[tuple[str, int]]:
    """Where a request's time went: the largest parts, longest first, then what is not understood.

    >>> parts({"duration_ns": 100, "cpu_ns": 30, "runqueue_ns": 1, "other_ns": 9,
    ...        "waits": [{"peer": "stock", "protocol": "http", "wait_ns": 60}]})
    [('stock http', 60), ('cpu', 30), ('not understood', 9)]
    """
    found = [(name, row.get(column) or 0) for column, name in OWN_PARTS.items()]
    for wait in row["waits"] or ():
        words = dict.fromkeys(word for word in (wait["peer"], wait["protocol"]) if word)
        found.append((units.printable(" ".join(words) or "an unknown peer"), wait["wait_ns"] or 0))
    duration = row["duration_ns"] or 0
    found.sort(key=lambda part: part[1], reverse=True)
    notable = [part for part in found[:MOST_PARTS] if part[1] > NOTABLE_PART * duration]
    other = row["other_ns"] or 0
    if other > 0 and other >= NOTABLE_OTHER * duration:
        notable.append(("not understood", other))
    return notable


def _moment(realtime_ns: int) -> str:
    moment = units.moment(realtime_ns)
    if moment is None:
        return "---------- unknown"
    return moment.isoformat(sep=" ", timespec="milliseconds")[:23]


def _duration(ns: int | None) -> str:
    return "-" if ns is None else units.duration(ns)


def _text(value: str | None) -> str:
    return units.printable(value) if value else "-"
