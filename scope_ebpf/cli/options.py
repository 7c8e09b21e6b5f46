"""Options that the recording commands share."""

import functools
import re
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from scope_ebpf.families import BCC_FAMILIES, EXTRA_FAMILIES, FAMILIES
from scope_ebpf.probe_specs import ProbeSpec, parse_probe

Function = Callable[..., Any]

MAX_PAYLOAD_BYTES = 32768
MAX_SAMPLE_HZ = 4999
TRANSPORTS = ("auto", "rings", "perf")
UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
SIZE_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kKmMgGtT]?)(?:i?[bB])?")
# With less, what is needed to read the rest would be most of it.
LEAST_KEPT = 8 << 20
LEAST_KEPT_SECONDS = 5.0
PART = re.compile(r"(\d+(?:\.\d+)?)(ms|s|m|h|d)")


class Duration(click.ParamType[float]):
    """A time such as 500ms, 30s, 5m, 1h30m; a bare number means seconds."""

    name = "duration"

    def __init__(self, least: float = 0.0) -> None:
        """Any time longer than nothing, and as long as `least` seconds."""
        self.least = least

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
        if seconds < self.least:
            self.fail(f"{value!r} is too short; give {self.least:g}s or more", param, ctx)
        return seconds


class Size(click.ParamType[int]):
    """A size such as 500M or 2G; powers of 1024."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Bytes."""
        match = SIZE.fullmatch(str(value).strip())
        if match is None:
            self.fail(f"{value!r} is no size; write it like 500M or 2G", param, ctx)
        size = round(float(match[1]) * SIZE_UNITS[match[2].upper()])
        if not LEAST_KEPT <= size < 1 << 60:
            self.fail(
                f"{value!r} is no room for a recording; give {LEAST_KEPT >> 20}M or more",
                param,
                ctx,
            )
        return size


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


@dataclass(frozen=True)
class Choices:
    """What the user chose of the options that every recording command has."""

    output: str | None
    duration: float | None
    families: tuple[str, ...]
    probes: tuple[ProbeSpec, ...]
    bcc_probes: tuple[str, ...]
    loader: str
    payload_bytes: int
    unredacted: bool
    sample_hz: int
    stacks_over: float
    transport: str
    keep: int | None
    keep_for: float | None

    def capture(self) -> dict[str, Any]:
        """The same as arguments of loaders.capture.CaptureOptions."""
        return {
            "families": self.families,
            "probes": self.probes,
            "loader": self.loader,
            "bcc_probes": tuple(Path(file).absolute() for file in self.bcc_probes),
            "payload_bytes": self.payload_bytes,
            "sample_hz": self.sample_hz,
            "long_wait_ns": round(self.stacks_over * 1e9),
            "transport": self.transport,
        }


def with_families_of(choices: Choices) -> Choices:
    """Without the families that the loader does not have, for a user who chose none."""
    from scope_ebpf.loaders.choice import choose_loader

    if choose_loader(choices.loader) != "bcc":
        return choices
    return replace(choices, loader="bcc", families=BCC_FAMILIES)


def recording_options(function: Function) -> Function:
    """Give a command the options of every command that records, as one argument `choices`."""
    names = [field.name for field in fields(Choices)]

    @functools.wraps(function)
    def command(**arguments: Any) -> Any:
        choices = Choices(**{name: arguments.pop(name) for name in names})
        source = click.get_current_context().get_parameter_source("families")
        if source is ParameterSource.DEFAULT:
            choices = with_families_of(choices)
        return function(**arguments, choices=choices)

    for option in (
        click.option(
            "--transport",
            type=click.Choice(TRANSPORTS),
            default="auto",
            show_default=True,
            help="How records come out of the kernel: rings in mapped memory, or perf ring buffers, which"
            " cost more and work on kernels before 5.13, too.",
        ),
        click.option(
            "--stacks-over",
            type=Duration(),
            default="1ms",
            show_default=True,
            metavar="TIME",
            help="Take the Python stack of each wait in a system call that is at least as long.",
        ),
        click.option(
            "--sample-hz",
            type=click.IntRange(1, MAX_SAMPLE_HZ),
            default=99,
            show_default=True,
            metavar="N",
            help="Take the Python stack of running threads so many times a second.",
        ),
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
            help=f"What to record, with commas between: {', '.join(FAMILIES)} (all by default) and"
            f" {', '.join(EXTRA_FAMILIES)}; +{EXTRA_FAMILIES[0]} adds to the default ones.",
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
            "--bcc-probe",
            "bcc_probes",
            multiple=True,
            metavar="FILE.c",
            help="Compile a BCC program of your own, and record what it submits, in tables named after the"
            " file and its maps; may be given more than once. Needs python3-bpfcc and the kernel's headers.",
        ),
        click.option(
            "--loader",
            type=click.Choice(["auto", "libbpf", "bcc"]),
            default="auto",
            show_default=True,
            help="How the probes get into the kernel: libbpf needs its type information (BTF); bcc compiles"
            f" them against its headers, for {', '.join(BCC_FAMILIES)}.",
        ),
        click.option(
            "--duration", type=Duration(), metavar="TIME", help="Stop after 30s, 5m, 1h30m, …"
        ),
        click.option(
            "--keep-for",
            type=Duration(LEAST_KEPT_SECONDS),
            metavar="TIME",
            help="Likewise what is older than 10m, 24h, 7d, …",
        ),
        click.option(
            "--keep",
            type=Size(),
            metavar="SIZE",
            help="Keep so much at most, such as 2G: the oldest rows of all tables are dropped, and the"
            " summary says so.",
        ),
        click.option(
            "-o",
            "--output",
            metavar="NAME.scope",
            help="The recording's directory; named after the target and the time by default.",
        ),
    ):
        command = option(command)
    return command
