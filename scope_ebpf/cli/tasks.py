"""`scope-ebpf tasks`: the tree of logical contexts, such as asyncio tasks and greenlets."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import click

from scope_ebpf.cli import output, units

if TYPE_CHECKING:
    import polars as pl
    from rich.text import Text

    from scope_ebpf.recording.reader import Recording

EXAMPLES = """\b
Examples:
  scope-ebpf tasks shop.scope
  scope-ebpf tasks shop.scope --all
  scope-ebpf tasks shop.scope --json | jq -c 'select(.state == "waiting") | [.name, .last_wait]'
"""
# Of tasks that run the same function and were made by the same one so many are shown, unless --all.
MOST_ALIKE = 3
MOST_LINES = 200
MIN_LABEL = 24
MAX_LABEL = 80
MOST_WAITS = 2
GAP = "  "
LEFT = ("in", "waited for", "state")

Task = Mapping[str, Any]


@click.command(epilog=EXAMPLES)
@click.argument("recording", metavar="REC")
@click.option(
    "--all", "everything", is_flag=True, help="Also what did nothing, and all that is alike."
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object per line.")
def tasks(recording: str, everything: bool, as_json: bool) -> None:
    """Show the logical contexts in the recording REC as a tree: asyncio and trio tasks, greenlets.

    Each is under the one that made it, with the function that it runs, as far as a stack of it was
    taken, or how it came about; its process and thread; when it was made (`<` before its process was
    met), how long it was seen, its system calls and how long it waited for whom. A task that waited
    for a peer when the recording ended is `waiting`; that a task ended is not seen, so the others are
    only `last seen`, or their process exited. An event loop makes a context for each callback:
    those that did nothing are left out, and of many that run the same function a few are shown.
    """
    from scope_ebpf.analysis.tasks import find_tasks
    from scope_ebpf.recording.reader import open_recording

    opened = open_recording(recording)
    found = find_tasks(opened, everything=everything)
    with output.results():
        if as_json:
            for task in found.iter_rows(named=True):
                click.echo(json.dumps(task))
        elif not found.is_empty():
            console = output.console()
            for line in task_lines(
                found, opened.meta.started_ns, console.width, everything=everything
            ):
                console.print(line, soft_wrap=True)
    if found.is_empty():
        click.echo(f"there are no tasks: {why_none(opened)}", err=True)
    elif not everything and (left := opened.rows("contexts") - len(found)) > 0:
        click.echo(f"{left:,} contexts that did nothing are left out; --all shows them", err=True)


def why_none(recording: Recording) -> str:
    """Why no logical context is known, and what to do."""
    import polars as pl

    if "contexts" not in recording.meta.families:
        return (
            f"the recording holds no contexts (only {', '.join(recording.meta.families)}); "
            "record with contexts in --families"
        )
    interpreters = recording.collect(recording.interpreters)
    if interpreters.is_empty():
        return (
            "no Python process was looked into; `scope-ebpf summary REC` shows what was traced, "
            "and `scope-ebpf doctor` what works here"
        )
    reasons = interpreters.filter(~pl.col("contexts"))["reason"].drop_nulls().unique().sort()
    if len(reasons):
        return units.printable("; ".join(reasons))
    if recording.rows("contexts"):
        return "no task did anything while it was recorded; --all shows those that were made"
    return "the traced Python processes made no task, callback or greenlet while they were recorded"


def task_lines(
    found: pl.DataFrame, started_ns: int, width: int, *, everything: bool
) -> Iterator[Text]:
    """One line for each task, and one for those that are not shown; about as wide as `width`."""
    from rich.text import Text

    from scope_ebpf.cli.tree import branches_of, shortened

    rows = _in_tree_order(found, everything=everything)
    shown = rows if everything else rows[:MOST_LINES]
    cells = {
        "in": [units.printable(_place(row)) for row in shown],
        "made": [_made(row, started_ns) for row in shown],
        "seen": [_seen(row) for row in shown],
        "calls": [f"{row['calls']:,}" for row in shown],
        "waited": [units.duration(row["wait_ns"]) if row["wait_ns"] else "-" for row in shown],
        "waited for": [units.printable(_waits(row)) for row in shown],
        "state": [units.printable(_state(row)) for row in shown],
    }
    widths = {name: max(map(len, [name, *column])) for name, column in cells.items()}
    for name in ("seen", "waited for", "in"):
        if width - sum(size + len(GAP) for size in widths.values()) < MIN_LABEL:
            del cells[name], widths[name]
    room = width - sum(size + len(GAP) for size in widths.values())
    room = max(min(room, MAX_LABEL), MIN_LABEL)
    branches, _ = branches_of([row["depth"] for row in shown])
    labels = [
        Text.assemble((shortened(branch, room), "dim"), units.printable(_name(row)))
        for branch, row in zip(branches, shown, strict=True)
    ]
    room = min(max(map(len, labels)), room)

    def line(label: Text, index: int | None) -> Text:
        label.truncate(room, overflow="ellipsis", pad=True)
        for name, size in widths.items():
            cell = name if index is None else cells[name][index]
            label.append(GAP)
            label.append(cell.ljust(size) if name in LEFT else cell.rjust(size))
        label.rstrip()
        return label

    heading = line(Text("task"), None)
    heading.stylize("bold")
    yield heading
    for index, label in enumerate(labels):
        yield line(label, index)
    if len(rows) > len(shown):
        yield Text(f"… and {len(rows) - len(shown):,} lines more; --all shows them", style="dim")


def _in_tree_order(found: pl.DataFrame, *, everything: bool) -> list[dict[str, Any]]:
    """The tasks with their `depth`, each before those that it made; many that are alike as one."""
    from scope_ebpf.analysis.tasks import rows_of_parents

    tasks = found.to_dicts()
    below: dict[int, list[int]] = {}
    for row, above in enumerate(rows_of_parents(found).tolist()):
        below.setdefault(above, []).append(row)
    rows: list[dict[str, Any]] = []
    # a chain of callbacks may be longer than Python's stack
    waiting = [(one, 0) for one in reversed(_folded(tasks, below.get(-1, []), everything))]
    while waiting:
        (row, alike), depth = waiting.pop()
        rows.append({**(_together(tasks, alike) if alike else tasks[row]), "depth": depth})
        if not alike:
            children = _folded(tasks, below.get(row, []), everything)
            waiting += [(one, depth + 1) for one in reversed(children)]
    return rows


def _folded(
    tasks: Sequence[Task], rows: Sequence[int], everything: bool
) -> list[tuple[int, list[int]]]:
    """Rows with nothing beside them, and one with the others of the kind where there are many."""
    groups: dict[tuple[Any, ...], list[int]] = {}
    for row in rows:
        task = tasks[row]
        groups.setdefault((task["tgid"], task["name"], task["kind"]), []).append(row)
    result = []
    for group in groups.values():
        # one more line for a single one would save nothing
        most = len(group) if everything or len(group) == MOST_ALIKE + 1 else MOST_ALIKE
        result += [(row, list[int]()) for row in group[:most]]
        if group[most:]:
            result.append((group[most], group[most:]))
    return sorted(result, key=lambda one: one[0])


def _together(tasks: Sequence[Task], rows: Sequence[int]) -> dict[str, Any]:
    """Tasks that are alike as one line."""
    first = tasks[rows[0]]
    waits: dict[str, int] = {}
    for row in rows:
        for wait in tasks[row]["waits"]:
            peer = wait["peer"] or wait["protocol"] or "?"
            waits[peer] = waits.get(peer, 0) + wait["wait_ns"]
    longest = sorted(waits.items(), key=lambda wait: -wait[1])
    return {
        **first,
        "alike": len(rows),
        "calls": sum(tasks[row]["calls"] for row in rows),
        "wait_ns": sum(tasks[row]["wait_ns"] for row in rows),
        "waits": [{"peer": peer, "protocol": None, "wait_ns": ns} for peer, ns in longest],
        "state": None,
        "first_ns": None,
        "last_ns": None,
    }


def _name(task: Task) -> str:
    own = task["name"] or (f"({task['kind']})" if task["kind"] else "(not recorded)")
    if "alike" in task:
        return f"… {task['alike']:,} more {own}"
    operation = f"  {task['operation']}" if task["operation"] else ""
    if task["requests"] > 1:
        operation += f" and {task['requests'] - 1:,} more"
    return f"{own}{operation}"


def _place(task: Task) -> str:
    thread = "" if task["tid"] == task["tgid"] else f"/{task['tid']}"
    return f"{task['service']} {task['tgid']}{thread}"


def _made(task: Task, started_ns: int) -> str:
    if task["made_ns"] is not None:
        return units.duration(task["made_ns"] - started_ns)
    if task["first_ns"] is not None:
        return f"<{units.duration(task['first_ns'] - started_ns)}"
    return "-"


def _seen(task: Task) -> str:
    begin = task["first_ns"] if task["made_ns"] is None else task["made_ns"]
    if begin is None or task["last_ns"] is None:
        return "-"
    return units.duration(max(task["last_ns"] - begin, 0))


def _waits(task: Task) -> str:
    shown = [
        f"{wait['peer'] or wait['protocol'] or '?'} {units.duration(wait['wait_ns'])}"
        for wait in task["waits"][:MOST_WAITS]
    ]
    if len(task["waits"]) > MOST_WAITS:
        shown.append("…")
    return ", ".join(shown) or "-"


def _state(task: Task) -> str:
    if task["state"] is None:
        return "-"
    if task["state"] == "waiting":
        return f"waiting for {task['last_wait']}"
    if task["last_wait"]:
        return f"{task['state']} in {task['last_wait']}"
    return str(task["state"])
