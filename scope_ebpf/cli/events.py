"""`scope-ebpf events`: the rows of one table."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import IO, TYPE_CHECKING, Any, cast

import click

from scope_ebpf.cli import output, units
from scope_ebpf.cli.where import close_names, filtered, refused
from scope_ebpf.errors import RecordingError, UsageError

if TYPE_CHECKING:
    import polars as pl

    from scope_ebpf.recording.meta import Meta
    from scope_ebpf.recording.reader import Recording

EXAMPLES = """\b
Examples:
  scope-ebpf events shop.scope syscalls --where "duration_ns > 1000000"
  scope-ebpf events shop.scope syscalls --where "error = 'ENOENT'" --limit 5
  scope-ebpf events shop.scope messages --where "payload LIKE 'GET /cart%'"
  scope-ebpf events shop.scope processes --columns time_ns,event,tgid,comm
  scope-ebpf events shop.scope offcpu --csv > offcpu.csv
  scope-ebpf events shop.scope messages --json | jq -r .payload
"""
DEFAULT_LIMIT = 50
# What a terminal shows of the wide tables without --columns.
SHOWN = {
    "processes": "time_ns event tgid tid parent_tgid comm exit_code signal_name command_line",
    "syscalls": "start_ns duration_ns tgid tid name result error status",
    "messages": "start_ns duration_ns tgid tid name direction length_bytes kind "
    "remote_address remote_port payload",
    "connections": "time_ns connection kind tgid local_address local_port remote_address "
    "remote_port local_path remote_path",
    "connects": "start_ns duration_ns tgid tid kind remote_address remote_port remote_path "
    "result error",
    "tls": "start_ns duration_ns tgid tid direction length_bytes payload",
    "offcpu": "start_ns waiting_ns runnable_ns tgid tid state name waker_tid waker_name",
    "interpreters": "time_ns tgid version stacks contexts greenlets gil path reason",
    "samples": "time_ns duration_ns tgid tid context reason stack native",
    "stacks": "time_ns tgid stack truncated codes",
    "codes": "time_ns tgid code version first_line name file",
    "contexts": "time_ns tgid tid context parent kind",
    "flows": "start_ns tgid tid context",
    "handoffs": "time_ns tgid tid context put item queue",
    "gil": "start_ns duration_ns tgid tid holder_tid status",
    "hits": "time_ns duration_ns tgid tid context probe arguments",
    "losses": "time_ns cpu table lost",
}
# Columns whose values have no natural width; the terminal's is shared among them.
FLEXIBLE = {"command_line", "cgroup", "local_path", "remote_path", "payload"}
FLEXIBLE |= {"path", "file", "codes", "arguments"}
MIN_FLEXIBLE = 24
GAP = "  "
MOMENTS = {"start_ns", "time_ns", "syscall_start_ns"}
REGISTERS = {"arg0", "arg1", "arg2", "state_bits", "code", "item", "queue", "stack"}


@click.command(epilog=EXAMPLES)
@click.argument("recording", metavar="REC")
@click.argument("table", metavar="TABLE")
@click.option("--where", metavar="EXPR", help="Only rows for which this SQL expression is true.")
@click.option("--columns", metavar="A,B,…", help="These columns, in this order.")
@click.option(
    "--limit",
    type=click.IntRange(min=1),
    metavar="N",
    help=f"At most N rows.  [default: {DEFAULT_LIMIT}; with --json or --csv: all]",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object per line.")
@click.option("--csv", "as_csv", is_flag=True, help="Print CSV with a line of column names.")
def events(
    recording: str,
    table: str,
    where: str | None,
    columns: str | None,
    limit: int | None,
    as_json: bool,
    as_csv: bool,
) -> None:
    r"""Print rows of a TABLE of the recording REC, in the order in which they were stored.

    TABLE is processes, syscalls, messages, connections, connects, tls, offcpu, interpreters,
    samples, stacks, codes, contexts, flows, handoffs, gil, hits, losses, or one that a program of
    --bcc-probe filled. EXPR may use all of its columns, those that are not shown as well: --json
    --limit 1 shows them. Times in EXPR, JSON and CSV are nanoseconds of CLOCK_MONOTONIC; the table
    for people shows points in time as seconds since the recording began, durations with a unit, and
    long values cut.

    A payload is text, also in EXPR: printable ASCII as it is, a backslash as \\, and other bytes as
    \n, \r, \t or \xNN, like within a bytes literal of Python.
    """
    if as_json and as_csv:
        raise UsageError("--json and --csv exclude each other; give one of them")
    from scope_ebpf.recording.reader import open_recording

    opened = open_recording(recording)
    if table not in opened.tables:
        raise UsageError(f"there is no table {close_names(table, opened.tables)}")
    # connections, too: the columns of messages that come from there must not be wrong either.
    opened.check(table, *(["connections"] if table == "messages" else []))
    frame = _readable(opened.table(table))
    if where is not None:
        frame = filtered(frame, where, "\"duration_ns > 1000000 AND name = 'read'\"")
    every = frame.collect_schema().names()
    chosen = _columns(columns, every)
    if as_json or as_csv:
        if limit is not None:
            frame = frame.head(limit)
        _sink(opened, frame.select(chosen or every), where, as_json=as_json)
        return
    shown = chosen or SHOWN.get(table, " ".join(every)).split()
    limit = limit or DEFAULT_LIMIT
    rows = _collect(opened, _with_lines(frame.select(shown).head(limit)), where)
    with output.results():
        click.echo("\n".join(render(rows, opened.meta, output.width())))
    if rows.height == limit:
        import polars as pl

        more = _collect(opened, frame.select(pl.len()), where).item() - limit
        if more:
            click.echo(f"and {more:,} more rows; --limit shows more of them", err=True)
    if not rows.height:
        click.echo(f"no such rows in {table}" if where else f"{table} has no rows", err=True)


def _readable(frame: pl.LazyFrame) -> pl.LazyFrame:
    """The table with all columns that are no numbers as text, which SQL can deal with."""
    import polars as pl

    bytewise = [units.escape_byte(byte) for byte in range(256)]
    escaped = (
        pl.col(pl.Binary)
        .bin.encode("hex")
        .str.extract_all("..")
        .list.eval(
            pl.element().replace_strict(
                [f"{byte:02x}" for byte in range(256)], bytewise, return_dtype=pl.String
            )
        )
        .list.join("")
    )
    schema = frame.collect_schema()
    texts = [name for name, dtype in schema.items() if isinstance(dtype, pl.Enum)]
    return frame.with_columns(escaped, pl.col(texts).cast(pl.String))


def _with_lines(frame: pl.LazyFrame) -> pl.LazyFrame:
    """Lists as one text each; what could not be read is a dash."""
    import polars as pl

    lists = [name for name, dtype in frame.collect_schema().items() if isinstance(dtype, pl.List)]
    return frame.with_columns(
        pl.col(lists).list.eval(pl.element().cast(pl.String).fill_null("-")).list.join(", ")
    )


def _columns(given: str | None, every: Sequence[str]) -> list[str]:
    if given is None:
        return []
    names = [name.strip() for name in given.split(",")]
    for index, name in enumerate(names):
        if name not in every:
            raise UsageError(f"--columns: there is no column {close_names(name, every)}")
        if name in names[:index]:
            raise UsageError(f"--columns names {name} twice; once is enough")
    return names


def _collect(recording: Recording, frame: pl.LazyFrame, where: str | None) -> pl.DataFrame:
    try:
        return recording.collect(frame)
    except RecordingError as error:
        # The files were checked before: what still fails is a conversion in the expression.
        if where is None or isinstance(error.__cause__, OSError):
            raise
        raise refused(error.__cause__ or error) from None


def _sink(recording: Recording, frame: pl.LazyFrame, where: str | None, *, as_json: bool) -> None:
    import polars as pl

    from scope_ebpf.recording.segments import reading

    stream = output.ResultStream(sys.stdout.buffer)
    with output.results():
        try:
            with reading(str(recording.path)), output.ended_by_closed_pipe():
                if as_json:
                    frame.sink_ndjson(cast("IO[bytes]", stream))
                else:
                    _with_lines(frame).sink_csv(cast("IO[bytes]", stream))
                stream.flush()
        except RecordingError as error:
            if where is not None and isinstance(error.__cause__, pl.exceptions.PolarsError):
                raise refused(error.__cause__) from None
            raise
        if stream.error is not None:
            raise stream.error


def render(rows: pl.DataFrame, meta: Meta, width: int) -> Iterator[str]:
    """The lines of a table for people; points in time count from the recording's start.

    Lines get wider than `width` if need be: a value that wraps can still be copied.
    """
    starts = dict.fromkeys(MOMENTS, meta.started_ns)
    starts["start_boottime_ns"] = meta.started_ns + meta.clock.boottime_offset_ns
    texts = {name: [_text(name, value, starts) for value in rows[name]] for name in rows.columns}
    widths = {name: max(map(len, [name, *cells])) for name, cells in texts.items()}
    flexible = [name for name in widths if name in FLEXIBLE]
    fixed = sum(size + len(GAP) for name, size in widths.items() if name not in FLEXIBLE)
    for name in flexible:
        room = max((width - fixed) // len(flexible) - len(GAP), MIN_FLEXIBLE)
        texts[name] = [units.cut(text, room) for text in texts[name]]
        widths[name] = min(widths[name], room)
    aligned = [
        [text.rjust(widths[name]) if rows[name].dtype.is_numeric() else text.ljust(widths[name])
         for text in [name, *cells]]
        for name, cells in texts.items()
    ]  # fmt: skip
    heading, *lines = (GAP.join(cells).rstrip() for cells in zip(*aligned, strict=True))
    yield click.style(heading, bold=True)
    yield from lines


def _text(name: str, value: Any, starts: dict[str, int]) -> str:
    if value is None:
        return "-"
    if name in starts:
        return f"{(value - starts[name]) / 1e9:.6f} s"
    if name.endswith("_ns"):
        return units.duration(value)
    if name in REGISTERS:
        return f"{value:#x}"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return units.printable(str(value))
