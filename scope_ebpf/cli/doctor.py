"""`scope-ebpf doctor`: what works on this machine, and what to do about what does not."""

import json
import shutil
import sys
import textwrap
from dataclasses import asdict

import click

from scope_ebpf.loaders.doctor import Check, InterpreterCheck, examine, families

EXAMPLES = """\b
Examples:
  sudo scope-ebpf doctor
  scope-ebpf doctor                    # without root: tells which capabilities are missing
  sudo scope-ebpf doctor --pid 4711    # also what can be recorded of its Python
  sudo scope-ebpf doctor --json | jq .families.syscalls
"""
# Names of checks that tell of what is not needed begin so.
OPTIONAL = ("loader ", "extra ")
MARKS = {True: ("works", "green"), False: ("FAILS", "red"), None: ("-", None)}


@click.command(epilog=EXAMPLES)
@click.option(
    "--pid",
    "tgids",
    type=click.IntRange(min=1),
    multiple=True,
    metavar="PID",
    help="Look at the Python of this process, too; may be repeated.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of a table.")
def doctor(tgids: tuple[int, ...], as_json: bool) -> None:
    """Try what recording needs on this machine.

    Each family of probes is loaded, attached and tried on a small process of the doctor's own;
    nothing else is recorded, and nothing stays loaded. What fails is told with why and what to do.
    Of the Pythons in PATH, and of those of chosen processes, it tells what can be recorded.

    The exit code is 0 if all families work, else 1.
    """
    checks = examine(*tgids)
    working = families(checks)
    if as_json:
        document = {
            "families": working,
            "checks": [asdict(check) for check in checks if not is_interpreter(check)],
            "interpreters": [asdict(check) for check in checks if is_interpreter(check)],
        }
        click.echo(json.dumps(document, indent=2))
    else:
        width = shutil.get_terminal_size().columns if sys.stdout.isatty() else 100
        click.echo(render(checks, width))
    sys.exit(0 if all(working.values()) else 1)


def render(checks: list[Check], width: int) -> str:
    """The table: a line per check with its fact, and below it the cause and the fix."""
    others = [check for check in checks if not is_interpreter(check)]
    sections = {
        "Needed": [
            check
            for check in others
            if not (check.family or check.works is None or is_optional(check))
        ],
        "Probes, tried just now": [check for check in others if check.family],
        "Beside them": [check for check in others if is_extra(check) and check.works is not None],
        "Other ways": [
            check
            for check in others
            if is_optional(check) and not is_extra(check) and check.works is not None
        ],
        "Python": [check for check in checks if is_interpreter(check)],
        "For information": [check for check in others if check.works is None and not check.family],
    }
    column = max((len(check.name) for check in checks), default=0)
    lines: list[str] = []
    for title, members in sections.items():
        if members:
            lines.append(click.style(title, bold=True))
            for check in members:
                lines += _rows(check, column, width)
            lines.append("")
    return "\n".join([*lines, verdict(checks)])


def is_interpreter(check: Check) -> bool:
    """Whether it tells of a Python, and not of what every recording needs."""
    return isinstance(check, InterpreterCheck)


def is_optional(check: Check) -> bool:
    """Whether it tells of what is not needed."""
    return check.name.startswith(OPTIONAL)


def is_extra(check: Check) -> bool:
    """Whether it tells of what is recorded where the kernel lets it be."""
    return check.name.startswith("extra ")


def verdict(checks: list[Check]) -> str:
    """One sentence that sums it up."""
    working = families(checks)
    broken = [name for name, works in working.items() if not works]
    limits = [
        check.name
        for check in checks
        if check.works is False and not check.family and not is_interpreter(check)
    ]
    if not broken and not limits:
        return "Everything works: record with `sudo scope-ebpf attach --pid PID`."
    if not broken:
        return f"All probes work, within the limits named above ({', '.join(limits)})."
    if len(broken) == len(working):
        return "Nothing can be recorded here before that is mended."
    return f"{', '.join(broken)} cannot be recorded here; the other families can."


def _rows(check: Check, column: int, width: int) -> list[str]:
    word, colour = MARKS[check.works]
    first = f"  {word:5}  {check.name:{column}}  "
    indent = " " * len(first)
    texts = [check.detail]
    if check.cause:
        texts.append(f"why: {check.cause}" if check.works is False else check.cause)
    if check.fix:
        texts.append(f"fix: {check.fix}" if check.works is False else check.fix)
    room = max(width, len(indent) + 30)
    rows = [
        row
        for text in texts
        for row in textwrap.wrap(
            text,
            room,
            initial_indent=indent,
            subsequent_indent=indent,
            break_long_words=False,
            break_on_hyphens=False,
        )
    ]
    mark = click.style(f"{word:5}", fg=colour)
    rows[0] = f"  {mark}  {check.name:{column}}  " + rows[0][len(indent) :]
    return rows
