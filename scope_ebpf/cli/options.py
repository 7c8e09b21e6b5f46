"""Options that the recording commands share."""

import re
from collections.abc import Callable
from typing import Any, TypeVar

import click

from scope_ebpf.families import EXTRA_FAMILIES, FAMILIES
from scope_ebpf.probe_specs import ProbeSpec, parse_probe

Function = TypeVar("Function", bound=Callable[..., Any])

MAX_PAYLOAD_BYTES = 32768
UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
PART = re.compile(r"(\d+(?:\.\d+)?)(ms|s|m|h|d)")


class Duration(click.ParamType[float]):
    """A time such as 500ms, 30s, 5m, 1h30m; a bare number means seconds."""

    name = "duration"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        """Seconds."""
        text = str(value).strip()
        parts = PART.findall(text)
        if parts and "".join(number + unit for number, unit in parts) == text:
            seconds = sum(float(number) * UNITS[unit] for number, unit in parts)
        elif re.fullmatch(r"\d+(\.\d+)?", text):
            seconds = float(text)
        else:
            self.fail(f"{value!r} is no time; write it like 30s, 5m or 1h30m", param, ctx)
        if not 0 < seconds < 1e9:
            self.fail(f"{value!r} is no time to record for", param, ctx)
        return seconds


class Families(click.ParamType[tuple[str, ...]]):
    """A comma-separated choice of families; with a plus they are added to the default ones."""

    name = "families"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, ...]:
        """The families, in the usual order; processes are always recorded."""
        if isinstance(value, tuple):
            return value
        every = (*FAMILIES, *EXTRA_FAMILIES)
        parts = {part.strip() for part in str(value).split(",") if part.strip()}
        added = {part[1:] for part in parts if part.startswith("+")}
        chosen = {part for part in parts if not part.startswith("+")} | added
        unknown = chosen - set(every)
        if unknown or not chosen:
            self.fail(
                f"there is no family {', '.join(sorted(unknown)) or 'in an empty list'};"
                f" choose from {', '.join(every)}",
                param,
                ctx,
            )
        if added and len(added) < len(parts):
            self.fail(
                f"{value!r} both chooses and adds; write a + before each, as in"
                f" {','.join(f'+{family}' for family in every if family in chosen)}, or before none",
                param,
                ctx,
            )
        wanted = chosen | {"processes"} | (set(FAMILIES) if added else set())
        return tuple(family for family in every if family in wanted)


class Probe(click.ParamType[ProbeSpec]):
    """A probe of the user's own."""

    name = "probe"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> ProbeSpec:
        """What it asks for; whether there is such a place is found out later."""
        return value if isinstance(value, ProbeSpec) else parse_probe(str(value))


def recording_options(function: Function) -> Function:
    """The options of every command that records."""
    for option in (
        click.option(
            "--payload-bytes",
            type=click.IntRange(0, MAX_PAYLOAD_BYTES),
            default=512,
            show_default=True,
            metavar="N",
            help="Keep so much of the head of a message at each turn of a connection; 0: nothing.",
        ),
        click.option(
            "--unredacted",
            is_flag=True,
            help="Store what messages say as it is: passwords, tokens, personal data. By default literals,"
            " values, query strings, headers and bodies are masked before anything is written.",
        ),
        click.option(
            "--families",
            type=Families(),
            default=",".join(FAMILIES),
            metavar="LIST",
            help=f"What to record, of {','.join(FAMILIES)} (all by default) and"
            f" {','.join(EXTRA_FAMILIES)}; +{EXTRA_FAMILIES[0]} adds to the default ones.",
        ),
        click.option(
            "--probe",
            "probes",
            type=Probe(),
            multiple=True,
            metavar="SPEC",
            help="Record each hit of usdt:FILE:PROVIDER:NAME, uprobe:FILE:FUNCTION(int,str) or"
            " uretprobe:FILE:FUNCTION(int); may be given more than once. `scope-ebpf probes FILE` lists"
            " USDT probes.",
        ),
        click.option(
            "--duration", type=Duration(), metavar="TIME", help="Stop after 30s, 5m, 1h30m, …"
        ),
        click.option(
            "-o",
            "--output",
            metavar="NAME.scope",
            help="The recording's directory; named after the target and the time by default.",
        ),
    ):
        function = option(function)
    return function
