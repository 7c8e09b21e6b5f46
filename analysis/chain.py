"""One request as a tree of spans, and the choice of requests to look at."""

from __future__ import annotations

import re
from collections import defaultdict
from typing import Final

import polars as pl

from scope_ebpf.analysis.schema import EDGE, EVIDENCE, SPANS, span_text
from scope_ebpf.errors import UsageError

LINK: Final = pl.Struct(
    {
        "cause_id": pl.UInt64,
        "edge": EDGE,
        "evidence": EVIDENCE,
        "reason": pl.String,
        # Of the cause, which may belong to another request; null: it is not in spans.
        "service": pl.String,
        "operation": pl.String,
        "error": pl.String,
    }
)
TREE: Final = pl.Schema([*SPANS.items(), ("depth", pl.UInt32()), ("links", pl.List(LINK))])

_ID_DIGITS: Final = 16
_FEWEST_DIGITS: Final = 4
_MOST_SHOWN: Final = 5
_ID: Final = re.compile(rf"[0-9a-f]{{{_FEWEST_DIGITS},{_ID_DIGITS}}}")


def find_span(spans: pl.DataFrame, text: str) -> int:
    """The span_id of the span whose 16 hexadecimal digits are `text`, or begin with it.

    `spans` needs the columns span_id, kind, service and operation. Raises `UsageError` if there is
    no such span, or more than one.

    >>> spans = pl.DataFrame({"span_id": [0x3F2A << 48]}, schema_overrides={"span_id": pl.UInt64})
    >>> hex(find_span(spans.with_columns(kind=None, service=None, operation=None), "3f2a"))
    '0x3f2a000000000000'
    """
    digits = text.strip().lower().removeprefix("0x")
    if not _ID.fullmatch(digits):
        raise UsageError(
            f"{text!r} is not an id: an id is {_ID_DIGITS} hexadecimal digits, or the first of them "
            f"(at least {_FEWEST_DIGITS}); `scope-ebpf requests REC` lists those of the requests"
        )
    first = pl.lit(int(digits.ljust(_ID_DIGITS, "0"), 16), dtype=pl.UInt64)
    last = pl.lit(int(digits.ljust(_ID_DIGITS, "f"), 16), dtype=pl.UInt64)
    found = spans.filter(pl.col("span_id").is_between(first, last)).sort("span_id")
    if found.is_empty():
        raise UsageError(
            f"no span has the id {digits}; `scope-ebpf requests REC` lists the ids of the requests"
        )
    if found.height > 1:
        which = [
            f"{span_text(row['span_id'])} ({' '.join(filter(None, [row['service'], row['operation']]))})"
            for row in found.head(_MOST_SHOWN).iter_rows(named=True)
        ]
        more = found.height - len(which)
        raise UsageError(
            f"{found.height} spans have ids that begin with {digits}: {', '.join(which)}"
            f"{f' and {more} more' if more else ''}; give more digits"
        )
    return int(found["span_id"][0])


def request_tree(spans: pl.DataFrame, edges: pl.DataFrame, span_id: int) -> pl.DataFrame:
    """What a request, or a span in it, led to: the spans below it, each after its parent.

    `spans` and `edges` have the columns of schema.SPANS and schema.EDGES, in any order. Gives the columns
    of `spans` (TREE), and:

    - `depth`: 0 for the span itself, 1 for what it led to, …
    - `links`: its causes other than the parent, in the order of `edges`; see LINK

    Spans of one parent come by their start. A fault that made a span fail comes below it, as if the
    span were its parent, with the edge `caused_by`. What belongs to the request but hangs together with
    nothing (its parent was lost) follows at depth 0, if `span_id` is the root of the tree. A span
    comes once, even where parents go in a circle.

    Raises `UsageError` if there is no such span.
    """
    place = spans.filter(pl.col("span_id") == pl.lit(span_id, dtype=pl.UInt64))
    if place.is_empty():
        raise UsageError(f"no span has the id {span_text(span_id)}")
    request_id = place["request_id"][0]
    # A root belongs to itself, also where that was not written down.
    whole = request_id is None or request_id == span_id
    request = pl.lit(span_id if request_id is None else request_id, dtype=pl.UInt64)
    members = spans.filter(
        (pl.col("request_id") == request) | (pl.col("span_id") == span_id)
    ).unique("span_id", keep="first", maintain_order=True)
    members = pl.concat([members, _faults(spans, edges, members)]).sort("start_ns", "span_id")
    order = _depth_first(members, span_id, orphans=whole)
    ids = [row for row, _ in order]
    tree = members[ids].with_columns(
        pl.Series("depth", [depth for _, depth in order], dtype=pl.UInt32)
    )
    return (
        tree.join(
            _links(spans, edges, tree["span_id"]), on="span_id", how="left", maintain_order="left"
        )
        .with_columns(pl.col("links").fill_null([]))
        .select(TREE.names())
        .cast(TREE)
    )


def _depth_first(members: pl.DataFrame, root: int, *, orphans: bool) -> list[tuple[int, int]]:
    """Row and depth of each span: first the root's tree, then, if asked for, what is left."""
    rows = {span_id: row for row, span_id in enumerate(members["span_id"])}
    children: dict[int, list[int]] = defaultdict(list)
    tops = [rows[root]]
    for row, parent in enumerate(members["parent_id"]):
        if parent in rows:
            children[rows[parent]].append(row)
        else:
            tops.append(row)
    # Circles have no top: the earliest span of one is as good as any.
    if orphans:
        tops += range(members.height)
    else:
        tops = tops[:1]
    order: list[tuple[int, int]] = []
    seen: set[int] = set()
    for top in tops:
        stack = [(top, 0)]
        while stack:
            row, depth = stack.pop()
            if row in seen:
                continue
            seen.add(row)
            order.append((row, depth))
            stack.extend((child, depth + 1) for child in reversed(children[row]))
    return order


def _faults(spans: pl.DataFrame, edges: pl.DataFrame, members: pl.DataFrame) -> pl.DataFrame:
    """What broke outside of the request, each below the first of its spans that felt it."""
    felt = (
        edges.filter(
            ~pl.col("parent")
            & (pl.col("edge").cast(pl.String) == "caused_by")
            & pl.col("effect_id").is_in(members["span_id"].implode())
            & ~pl.col("cause_id").is_in(members["span_id"].implode())
        )
        .join(members.select(effect_id="span_id", felt_ns="start_ns"), on="effect_id")
        .sort("felt_ns")
        .unique("cause_id", keep="first", maintain_order=True)
        .select(span_id="cause_id", parent_id="effect_id", edge="edge", evidence="evidence")
    )
    faults = spans.filter(pl.col("kind").cast(pl.String) == "fault")
    return (
        faults.drop("parent_id", "edge", "evidence")
        .join(felt, on="span_id")
        .unique("span_id", keep="first", maintain_order=True)
        .select(members.columns)
    )


def _links(spans: pl.DataFrame, edges: pl.DataFrame, effects: pl.Series) -> pl.DataFrame:
    """Columns span_id and links: the causes of `effects` that are not their parents."""
    about = edges.filter(~pl.col("parent") & pl.col("effect_id").is_in(effects.implode()))
    causes = (
        spans.filter(pl.col("span_id").is_in(about["cause_id"].implode()))
        .select(pl.col("span_id").alias("cause_id"), "service", "operation", "error")
        .unique("cause_id")
    )
    return (
        about.join(causes, on="cause_id", how="left", maintain_order="left")
        .select(
            pl.col("effect_id").alias("span_id"),
            pl.struct([field.name for field in LINK.fields]).alias("links"),
        )
        .group_by("span_id", maintain_order=True)
        .agg("links")
    )


def select_requests(
    requests: pl.DataFrame,
    *,
    entry: bool = False,
    errors: bool = False,
    service: str | None = None,
    slow: int | None = None,
) -> pl.DataFrame:
    """Some of the requests (columns of schema.REQUESTS), by start; or the slowest, slowest first.

    - `entry`: only those that nothing traced is known to have caused
    - `errors`: only those that failed: with an error, or an HTTP status of 500 and above
    - `service`: only those that this service handled
    - `slow`: so many of them, those that took longest
    """
    if entry:
        requests = requests.filter("entry")
    if errors:
        requests = requests.filter(failed())
    if service is not None:
        requests = requests.filter(pl.col("service") == service)
    if slow is not None:
        longest = requests.sort(
            "duration_ns", "start_ns", descending=[True, False], nulls_last=True
        )
        return longest.head(slow)
    return requests.sort("start_ns", "span_id")


def failed() -> pl.Expr:
    """Whether a request or span failed: it has an error, or an HTTP status of 500 and above."""
    status = pl.col("status").str.contains(r"^5\d\d$") & (pl.col("protocol") == "http")
    return (pl.col("error").is_not_null() | status).fill_null(False)
