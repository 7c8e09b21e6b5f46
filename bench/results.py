"""What was measured: numbers with their spread, targets met or missed; as JSON and as Markdown."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Row:
    """One measured thing. The spread is between the quartiles unless `spread` says otherwise."""

    what: str
    unit: str
    median: float
    low: float
    high: float
    samples: tuple[float, ...] = ()
    spread: str = "quartiles"
    note: str = ""


@dataclass(frozen=True)
class Target:
    """What was asked for, beside what was measured; `measured` is None where it could not be."""

    asked: str
    limit: float
    unit: str
    measured: float | None
    note: str = ""

    @property
    def verdict(self) -> str:
        """In a word."""
        if self.measured is None:
            return "not measured"
        return "met" if self.measured <= self.limit else "missed"


@dataclass
class Section:
    """One measurement."""

    name: str
    title: str
    targets: list[Target] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def add(self, what: str, unit: str, samples: Sequence[float], note: str = "") -> float | None:
        """A row of the median and quartiles of the samples; returns the median.

        Without samples there is a note instead, so that nothing is left out silently.
        """
        if not samples:
            self.notes.append(f"{what}: not measured{': ' + note if note else ''}")
            return None
        low, high = quartiles(samples)
        middle = statistics.median(samples)
        self.rows.append(Row(what, unit, middle, low, high, tuple(samples), note=note))
        return middle

    def ask(
        self, asked: str, limit: float, unit: str, measured: float | None, note: str = ""
    ) -> None:
        """Compare with what was asked for: at most `limit`."""
        self.targets.append(Target(asked, limit, unit, measured, note))


@dataclass
class Report:
    """All measurements of one run."""

    machine: dict[str, Any]
    quick: bool
    started: str
    seconds: float = 0.0
    sections: list[Section] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts and lists, ready for JSON."""
        content = asdict(self)
        for section, stored in zip(self.sections, content["sections"], strict=True):
            for target, stored_target in zip(section.targets, stored["targets"], strict=True):
                stored_target["verdict"] = target.verdict
        return content

    def to_markdown(self) -> str:
        """Tables for people: asked beside measured, then everything else."""
        tools = self.machine["tools"]
        lines = [
            "# Measured beside asked",
            "",
            f"{self.machine['processor']}, {self.machine['cpus']} CPUs, "
            f"Linux {self.machine['kernel']}, {self.started}, {self.seconds:.0f} s in all. "
            "Written by `make bench`.",
            "",
            "Alternatives: "
            + "; ".join(f"{name} {version or 'is missing'}" for name, version in tools.items())
            + ".",
        ]
        if self.quick:
            lines += ["", "**A quick run: it shows that everything works, not how fast it is.**"]
        lines += [""]
        lines += _table(
            ("", "asked", "measured", ""),
            [
                (
                    section.name,
                    target.asked,
                    "-" if target.measured is None else amount(target.measured, target.unit),
                    f"**{target.verdict}**" + (f" ({target.note})" if target.note else ""),
                )
                for section in self.sections
                for target in section.targets
            ],
        )
        for section in self.sections:
            lines += [f"## {section.title}", ""]
            lines += _table(
                ("", "median", "from … to", "of", ""),
                [
                    (
                        row.what,
                        amount(row.median, row.unit),
                        f"{amount(row.low, row.unit)} … {amount(row.high, row.unit)}"
                        + ("" if row.spread == "quartiles" else f" ({row.spread})"),
                        str(len(row.samples)) if row.samples else "",
                        row.note,
                    )
                    for row in section.rows
                ],
            )
            lines += [f"- {note}" for note in section.notes]
            lines += [""] if section.notes else []
        return "\n".join(lines)


def quartiles(samples: Sequence[float]) -> tuple[float, float]:
    """The lower and the upper quartile; of fewer than three samples the least and the greatest."""
    if len(samples) < 3:
        return min(samples), max(samples)
    low, _, high = statistics.quantiles(samples, n=4, method="inclusive")
    return low, high


def amount(value: float, unit: str) -> str:
    """A number with three digits that count, and its unit.

    >>> amount(1234.5, "ns"), amount(0.01234, "s"), amount(5.0, "×")
    ('1,234 ns', '0.0123 s', '5.00 ×')
    """
    size = abs(value)
    decimals = 0 if size >= 100 or value == 0 else 1 if size >= 10 else 2 if size >= 1 else 4
    if 0.1 <= size < 1:
        decimals = 3
    return f"{value:,.{decimals}f} {unit}".rstrip()


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    if not rows:
        return []
    lines = [head, ["---"] * len(head), *rows]
    cells = ([cell.replace("|", "\\|") for cell in line] for line in lines)
    return [*(f"| {' | '.join(line)} |" for line in cells), ""]
