"""A request's tree of spans as lines for the terminal."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from scope_ebpf.cli import units

if TYPE_CHECKING:
    from rich.text import Text

Span = Mapping[str, Any]

LEGEND = "edges are exact, but ~ is derived from order or an id, ? is a guess from time"
MARKS = {"derived": "~", "guess": "?"}
# What is shown for a span without a status.
STATES = {
    "open": "open",
    "no_response": "no answer",
    "one_way": "one way",
    "began_before": "no head",
}
COLOURS = {"server": "green", "client": "cyan", "consumer": "magenta", "fault": "red"}
EIGHTHS = " ▏▎▍▌▋▊▉█"
GAP = "  "
WIDE = 100
BAR = 20
NARROW_BAR = 10
MIN_LABEL = 24
MAX_LABEL = 90
MOST_STATUS = 10
ID_DIGITS = 8


def tree_lines(spans: Sequence[Span], width: int) -> Iterator[Text]:
    """One line for each span of `request_tree`, and more for errors and for causes elsewhere.

    Times are offsets from the beginning of the first span, and bars show them on the time from
    the tree's earliest start to its last end, without faults. Lines are about as wide as `width` at
    most, but no narrower than they need to be to be read.
    """
    from rich.text import Text

    wide = width >= WIDE
    shown = {span["span_id"]: span for span in spans}
    branches, below = branches_of([span["depth"] for span in spans])
    # what broke may have done so long before
    working = [span for span in spans if span["kind"] != "fault"] or spans
    begin_ns = min(span["start_ns"] for span in working)
    end_ns = max(_end_ns(span) for span in working)
    cells = {
        "time": [_bar(s, begin_ns, end_ns, BAR if wide else NARROW_BAR) for s in spans],
        "start": [units.duration(s["start_ns"] - spans[0]["start_ns"]) for s in spans],
        "duration": [
            "-" if s["duration_ns"] is None else units.duration(s["duration_ns"]) for s in spans
        ],
        "status": [units.cut(_status(s), MOST_STATUS) for s in spans],
        "edge": [_edge(s) for s in spans],
    }
    if not wide:
        del cells["start"]  # the bar shows it
    widths = {name: max(map(len, [name, *column])) for name, column in cells.items()}
    room = width - sum(size + len(GAP) for size in widths.values())
    room = max(min(room, MAX_LABEL), MIN_LABEL)
    labels = [
        _label(span, shortened(branch, room), above)
        for span, branch, above in zip(spans, branches, [None, *spans], strict=False)
    ]
    room = min(max(map(len, labels)), room)
    heading = "span".ljust(room) + "".join(
        GAP + (name.rjust(size) if name in ("start", "duration") else name.ljust(size))
        for name, size in widths.items()
    )
    yield Text(heading.rstrip(), style="bold")
    for index, span in enumerate(spans):
        label = labels[index]
        label.truncate(room, overflow="ellipsis", pad=True)
        line = label
        for name, column in cells.items():
            cell, size = column[index], widths[name]
            line.append(GAP)
            right = name in ("start", "duration")
            line.append(cell.rjust(size) if right else cell.ljust(size), _style(name, span))
        line.rstrip()
        yield line
        under = shortened(below[index], room)
        for note, style in _notes(span, shown):
            for part in textwrap.wrap(note, max(width - len(under), MIN_LABEL)):
                yield Text.assemble((under, "dim"), (part, style))


def _end_ns(span: Span) -> int:
    return int(span["start_ns"]) + (span["duration_ns"] or 0)


def branches_of(depths: Sequence[int]) -> tuple[list[str], list[str]]:
    """The lines that connect each span with its parent, and what goes on below it.

    >>> branches_of([0, 1, 2, 1])
    (['', '├ ', '│ └ ', '└ '], ['│ ', '│ │ ', '│     ', '    '])
    """
    branches: list[str] = []
    below: list[str] = []
    more: set[int] = set()  # depths at which a span follows, before one that is less deep
    child = False
    for depth in reversed(depths):
        upper = "".join("│ " if level in more else "  " for level in range(1, depth))
        branches.append(upper + ("├ " if depth in more else "└ ") if depth else "")
        own = ("│ " if depth in more else "  ") if depth else ""
        below.append(upper + own + ("│ " if child and depth + 1 in more else "  "))
        more = {level for level in more if level < depth} | {depth}
        child = True
    return branches[::-1], below[::-1]


def shortened(branch: str, room: int) -> str:
    """The lines of a very deep tree, cut at their begin so that something else fits."""
    most = room // 2
    return branch if len(branch) <= most else "…" + branch[len(branch) - most + 1 :]


def _label(span: Span, branch: str, above: Span | None) -> Text:
    """Who did what. A server's line does not repeat the operation of its client, right above it."""
    from rich.text import Text

    service = units.printable(span["service"] or "-")
    operation = span["operation"] or span["protocol"] or "(protocol not recognised)"
    fault = span["kind"] == "fault"
    if (
        span["kind"] == "server"
        and above is not None
        and above["kind"] == "client"
        and above["span_id"] == span["parent_id"]
        and (above["protocol"], above["operation"]) == (span["protocol"], span["operation"])
    ):
        operation = ""
    label = Text(no_wrap=True)
    label.append(branch, "dim")
    label.append(service, "bold red" if fault else "bold")
    if span["kind"] == "client" and span["peer"]:
        label.append(f" → {units.printable(span['peer'])}")
    if operation:
        label.append(f"  {units.printable(operation)}", "red" if fault else "")
    return label


def _status(span: Span) -> str:
    if span["status"]:
        return units.printable(str(span["status"]))
    if span["error"] or span["kind"] == "fault":
        return "failed"
    return STATES.get(span["state"], "-")


def _edge(span: Span) -> str:
    if span["edge"] is None:
        return "-"
    return f"{MARKS.get(span['evidence'], '')}{span['edge']}"


def _style(column: str, span: Span) -> str:
    bad = span["failed"] or span["kind"] == "fault"
    if column == "time":
        return "red" if bad else COLOURS.get(span["kind"], "")
    if column == "status":
        return "red" if bad else "yellow" if span["miss"] else ""
    if column == "edge":
        return "dim"
    return ""


def _notes(span: Span, shown: Mapping[int, Span]) -> Iterator[tuple[str, str]]:
    """Why it failed, and what else led to it: texts and their styles.

    Failed calls that are in the tree themselves are seen there, and so is what broke, right below.
    """
    from scope_ebpf.analysis.schema import span_text

    if span["error"] and span["error"] != span["operation"]:
        yield f"error: {units.printable(span['error'])}", "red"
    for link in span["links"]:
        above = shown.get(link["cause_id"])
        if (
            link["edge"] == "caused_by"
            and above is not None
            and (above["kind"] != "fault" or above["parent_id"] == span["span_id"])
        ):
            continue
        # The error of a process that died is also what it did.
        words = dict.fromkeys([link["service"], link["operation"], link["error"]])
        cause = " ".join(word for word in words if word)
        mark = MARKS.get(link["evidence"], "")
        reason = f" ({link['reason']})" if link["reason"] else ""
        text = f"{mark}{link['edge']} {span_text(link['cause_id'])[:ID_DIGITS]} {cause}{reason}"
        yield units.printable(text), "red" if link["edge"] == "caused_by" else "dim"


def _bar(span: Span, begin_ns: int, end_ns: int, cells: int) -> str:
    """When it ran, on the axis from `begin_ns` to `end_ns`; at least the thinnest of blocks.

    >>> span = {"start_ns": 50, "duration_ns": 25}
    >>> _bar(span, 0, 100, 8)
    '    ██  '
    """
    scale = cells * 8 / max(end_ns - begin_ns, 1)
    first = max(min(int((span["start_ns"] - begin_ns) * scale) // 8, cells - 1), 0)
    last = max(min(round((_end_ns(span) - begin_ns) * scale), cells * 8), 0)
    eighths = max(last - first * 8, 1)
    full, rest = divmod(eighths, 8)
    return (" " * first + EIGHTHS[8] * full + (EIGHTHS[rest] if rest else "")).ljust(cells)
