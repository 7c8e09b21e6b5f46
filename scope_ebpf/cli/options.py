"""Options that the recording commands share."""

import re
from collections.abc import Callable
from typing import Any, TypeVar

import click

from scope_ebpf.families import FAMILIES

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
    """A comma-separated choice of families."""

    name = "families"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, ...]:
        """The families, in the usual order; processes are always recorded."""
        if isinstance(value, tuple):
            return value
        chosen = {part.strip() for part in str(value).split(",") if part.strip()}
        unknown = chosen - set(FAMILIES)
        if unknown or not chosen:
            self.fail(
                f"there is no family {', '.join(sorted(unknown)) or 'in an empty list'};"
                f" choose from {', '.join(FAMILIES)}",
                param,
                ctx,
            )
        return tuple(family for family in FAMILIES if family in chosen | {"processes"})


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
            help=f"What to record, of {','.join(FAMILIES)}; all by default.",
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
