"""`scope-ebpf chain`: everything that one request led to, across processes."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import click

from scope_ebpf.cli import output, units
from scope_ebpf.errors import ScopeError

if TYPE_CHECKING:
    import polars as pl

    from scope_ebpf.recording.reader import Recording

EXAMPLES = """\b
Examples:
  scope-ebpf requests shop.scope --slow 3
  scope-ebpf chain shop.scope 3f2a91c0
  scope-ebpf chain shop.scope 3f2a91c0 --json | jq '.spans[] | select(.error != null)'
"""
# Of a span in JSON, in this order; then links.
FIELDS = [
    "span_id", "parent_id", "edge", "evidence", "service", "tgid", "tid", "protocol", "operation",
    "detail", "start_ns", "duration_ns", "status", "kind", "error", "miss", "peer", "state",
    "depth",
]  # fmt: skip
LINK_FIELDS = ["edge", "evidence", "reason", "service", "operation", "error"]


@click.command(epilog=EXAMPLES)
@click.argument("recording", metavar="REC")
@click.argument("span_id", metavar="ID")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def chain(recording: str, span_id: str, as_json: bool) -> None:
    """Show the tree of what the request ID led to: calls, queries, cache misses, jobs.

    ID is what `scope-ebpf requests REC` shows, or the id of any span; the first digits of
    its 16 are enough if no other id begins with them. One line a span: who did what (client →
    server), when, on the time from the first to the last of them, how long, with what status, and
    the edge that leads to it from the span that it is indented under. An edge without a mark
    is exact: the same bytes, or a fork; ~ is derived from an order or an id, ? is a guess.
    """
    from scope_ebpf.analysis.chain import find_span, request_tree
    from scope_ebpf.recording.reader import open_recording

    opened = open_recording(recording)
    spans = opened.collect(opened.spans())
    if spans.is_empty():
        from scope_ebpf.cli.empty import why_empty

        raise ScopeError(f"there are no requests: {why_empty(opened)}")
    root = find_span(spans, span_id)
    tree = request_tree(spans, opened.collect(opened.edges()), root)
    with output.results():
        if as_json:
            click.echo(json.dumps(to_dict(tree), indent=2))
        else:
            print_tree(tree, opened)


def to_dict(tree: pl.DataFrame) -> dict[str, Any]:
    """The tree as plain dicts and lists, ready for JSON; ids are 16 hexadecimal digits."""
    return {
        "request_id": _id(_request_id(tree)),
        "spans": [
            {
                **{name: row[name] for name in FIELDS},
                "span_id": _id(row["span_id"]),
                "parent_id": _id(row["parent_id"]),
                "links": [
                    {"span_id": _id(link["cause_id"]), **{name: link[name] for name in LINK_FIELDS}}
                    for link in row["links"]
                ],
            }
            for row in tree.iter_rows(named=True)
        ],
    }


def print_tree(tree: pl.DataFrame, opened: Recording) -> None:
    """Print the tree for people."""
    from scope_ebpf.analysis.chain import failed
    from scope_ebpf.cli.tree import LEGEND, tree_lines

    spans = tree.with_columns(failed().alias("failed")).to_dicts()
    first = spans[0]
    request = _request_id(tree)
    whole = request == first["span_id"]
    services = {span["service"] for span in spans}
    moment = _moment(first["start_ns"] + opened.meta.clock.realtime_offset_ns)
    console = output.console()
    console.print(
        f"{'request' if whole else 'span'} {_id(first['span_id'])}, {moment}: "
        f"{_count(len(spans), 'span')} in {_count(len(services), 'service')}",
        soft_wrap=True,
    )
    for line in tree_lines(spans, console.width):
        console.print(line, soft_wrap=True)
    click.echo(LEGEND, err=True)
    if not whole:
        rest = f"`scope-ebpf chain {opened.path.name} {_id(request)}` shows all of it"
        click.echo(units.printable(f"part of the request {_id(request)}; {rest}"), err=True)


def _request_id(tree: pl.DataFrame) -> int:
    """The root of the whole tree; a root belongs to itself."""
    first = tree.row(0, named=True)
    return int(first["span_id"] if first["request_id"] is None else first["request_id"])


def _id(span_id: int | None) -> str | None:
    from scope_ebpf.analysis.schema import span_text

    return None if span_id is None else span_text(span_id)


def _moment(realtime_ns: int) -> str:
    moment = units.moment(realtime_ns)
    if moment is None:
        return "at an unknown time"
    return f"{moment.isoformat(sep=' ', timespec='milliseconds')[:23]} UTC"


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"
