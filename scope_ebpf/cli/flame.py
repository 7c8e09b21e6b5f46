"""`scope-ebpf flame`: where time went by Python stack, as a flame graph."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from scope_ebpf.cli import output, units
from scope_ebpf.cli.export import STDOUT
from scope_ebpf.cli.files import check_free, created
from scope_ebpf.errors import ScopeError, UsageError

if TYPE_CHECKING:
    from scope_ebpf.analysis.stacks.profile import Profile
    from scope_ebpf.recording.reader import Recording

# By the end of the file's name; the longest that fits counts.
SUFFIXES = {".svg": "svg", ".speedscope.json": "speedscope", ".folded": "folded"}
FORMATS = tuple(SUFFIXES.values())
EXAMPLES = """\b
Examples:
  scope-ebpf flame shop.scope -o shop.svg
  scope-ebpf flame shop.scope --offcpu --service web -o waits.svg
  scope-ebpf flame shop.scope --gil --lines -o gil.speedscope.json
  scope-ebpf flame shop.scope --request 3f2a91c0 -o slow.svg
  scope-ebpf flame shop.scope -o - --format folded | grep checkout
  scope-ebpf flame shop.scope --json | jq -c '[.weight_ns, .frames[-1].name]'
"""


@click.command(epilog=EXAMPLES)
@click.argument("recording", metavar="REC")
@click.option("--oncpu", is_flag=True, help="What threads ran, by samples.  [default]")
@click.option("--offcpu", is_flag=True, help="What threads waited in.")
@click.option("--gil", is_flag=True, help="Who waited for the GIL, and who held it.")
@click.option("--request", metavar="ID", help="Running and waiting of the request ID, as in chain.")
@click.option("--service", metavar="NAME", help="Only processes of this service.")
@click.option("--tgid", type=click.IntRange(min=1), metavar="PID", help="Only this process.")
@click.option("--lines", is_flag=True, help="Tell lines of a function apart.")
@click.option("--threads", "by_thread", is_flag=True, help="Tell threads of one name apart.")
@click.option("-o", "--output", "file", metavar="FILE", help="Write to FILE; - is stdout.")
@click.option(
    "--format",
    "form",
    type=click.Choice(FORMATS),
    help="The format, where the name of FILE does not tell it.",
)
@click.option("--force", is_flag=True, help="Overwrite FILE if it is there.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object per stack.")
def flame(
    recording: str,
    oncpu: bool,
    offcpu: bool,
    gil: bool,
    request: str | None,
    service: str | None,
    tgid: int | None,
    lines: bool,
    by_thread: bool,
    file: str | None,
    form: str | None,
    force: bool,
    as_json: bool,
) -> None:
    """Draw the time of threads in the recording REC by Python stack, as a flame graph.

    FILE.svg is a picture for the browser: a click zooms, / searches, Esc shows all.
    FILE.speedscope.json is for speedscope.app, FILE.folded for flamegraph.pl and its like. Weights
    are nanoseconds; frames are `function (file:line)` with the line where the function begins, or
    with --lines the one where it stood.

    --oncpu weighs each sample with the time between two of them. --offcpu adds up to the off-CPU
    time that was recorded: the call that was waited in is innermost, and waits that are too short for
    a stack are `[shorter waits]`. --gil ends in who held the GIL when the wait was over. --request
    shows what the threads that handled a request did meanwhile, running and waiting, for each
    service. In event loops, it shows what the request's tasks ran, and the stacks that sent its calls,
    with the time until each response and the server's part in it; that and what is left add up
    to the request's duration.
    """
    views = {"--oncpu": oncpu, "--offcpu": offcpu, "--gil": gil, "--request": request is not None}
    chosen = [name for name, given in views.items() if given]
    if len(chosen) > 1:
        raise UsageError(f"{' and '.join(chosen)} exclude each other; give one of them")
    view = chosen[0] if chosen else "--oncpu"
    if view == "--request" and (service is not None or tgid is not None):
        raise UsageError("--request shows all that handled it; leave --service and --tgid out")
    form = _format(file, form, as_json=as_json)
    if force and file in (None, STDOUT):
        raise UsageError("--force is for -o FILE; nothing else can be overwritten")
    if file is not None and file != STDOUT:
        check_free(Path(file), force=force)
    from scope_ebpf.recording.reader import open_recording

    opened = open_recording(recording)
    profile = _profile(opened, view, request, service, tgid, lines=lines, by_thread=by_thread)
    for note in profile.notes:
        click.echo(units.printable(note), err=True)
    if profile.empty is not None:
        if not as_json:
            raise ScopeError(f"there is nothing to draw: {profile.empty}")
        click.echo(units.printable(profile.empty), err=True)
        return
    text = _json_lines(profile) if as_json else _written(profile, form)
    if as_json or file == STDOUT:
        with output.results():
            for part in text:
                sys.stdout.buffer.write(part.encode("utf-8", "backslashreplace"))
            sys.stdout.buffer.flush()
        return
    assert file is not None  # _format has seen to that
    with created(Path(file), force=force) as stream:
        for part in text:
            stream.write(part.encode("utf-8", "backslashreplace"))
    stacks = len(profile.shown_stacks())
    click.echo(
        f"wrote {units.duration(profile.total_ns)} in {stacks:,} "
        f"{'stack' if stacks == 1 else 'stacks'} to {units.printable(file)}",
        err=True,
    )


def _format(file: str | None, form: str | None, *, as_json: bool) -> str:
    if as_json:
        if file is not None or form is not None:
            raise UsageError(
                "--json prints to stdout in a format of its own; leave -o and --format out"
            )
        return "json"
    if file is None:
        raise UsageError("draw where to? give -o FILE.svg; -o - --format folded is stdout")
    if form is not None:
        return form
    for suffix in sorted(SUFFIXES, key=len, reverse=True):
        if file.lower().endswith(suffix):
            return SUFFIXES[suffix]
    raise UsageError(
        f"{units.printable(file)} does not tell the format; let it end with {', '.join(SUFFIXES)}, "
        f"or give --format {'|'.join(FORMATS)}"
    )


def _profile(
    opened: Recording, view: str, request: str | None, service: str | None, tgid: int | None,
    *, lines: bool, by_thread: bool,
) -> Profile:  # fmt: skip
    from scope_ebpf.analysis.names import processes_of
    from scope_ebpf.analysis.stacks import whole as analysis

    if request is not None:
        return _of_request(opened, request, lines=lines, by_thread=by_thread)
    tgids = processes_of(opened, service, tgid)
    profiles = {
        "--oncpu": analysis.on_cpu, "--offcpu": analysis.off_cpu, "--gil": analysis.gil_waits,
    }  # fmt: skip
    profile = profiles[view](opened, tgids, by_line=lines, by_thread=by_thread)
    of = [opened.path.name, service, None if tgid is None else f"process {tgid}"]
    return replace(profile, title=f"{profile.title}: {', '.join(filter(None, of))}")


def _of_request(opened: Recording, request: str, *, lines: bool, by_thread: bool) -> Profile:
    from scope_ebpf.analysis.chain import find_span
    from scope_ebpf.analysis.stacks.request import of_request

    spans = opened.collect(opened.spans())
    if spans.is_empty():
        from scope_ebpf.cli.empty import why_empty

        raise ScopeError(f"there are no requests: {why_empty(opened)}")
    return of_request(opened, find_span(spans, request), by_line=lines, by_thread=by_thread)


def _written(profile: Profile, form: str) -> Iterator[str]:
    if form == "svg":
        from scope_ebpf.analysis.export.flamegraph import flamegraph_svg

        return flamegraph_svg(profile)
    if form == "speedscope":
        from scope_ebpf.analysis.export.speedscope import speedscope_json

        return iter([speedscope_json(profile)])
    from scope_ebpf.analysis.export.folded import folded_lines

    return folded_lines(profile)


def _json_lines(profile: Profile) -> Iterator[str]:
    """Stacks, the heaviest first; frames outermost first."""
    _, frames = profile.shown_frames()
    stacks = sorted(profile.shown_stacks().items(), key=lambda stack: (-stack[1][0], stack[0]))
    for path, (weight_ns, samples) in stacks:
        shown = [frames[number] for number in path]
        row = {
            "weight_ns": weight_ns,
            "samples": samples,
            "frames": [
                {
                    "name": frame.name,
                    "kind": frame.kind,
                    "file": frame.file,
                    "line": frame.line or frame.first_line,
                }
                for frame in shown
            ],
        }
        yield json.dumps(row) + "\n"
