"""`scope-ebpf export`: a recording's spans for OpenTelemetry and Perfetto."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import click

from scope_ebpf.cli import output
from scope_ebpf.cli.files import check_free, created
from scope_ebpf.cli.units import printable
from scope_ebpf.errors import ScopeError, UsageError

if TYPE_CHECKING:
    from scope_ebpf.analysis.export.selection import Selection, Traced

FORMATS = ("otlp-json", "otlp", "perfetto")
STDOUT = "-"
EXAMPLES = """\b
Examples:
  scope-ebpf export shop.scope --to perfetto -o shop.perfetto-trace
  scope-ebpf export shop.scope --to otlp --endpoint http://localhost:4318
  scope-ebpf export shop.scope --to otlp-json -o shop.jsonl
  scope-ebpf export shop.scope --to otlp-json -o - --request 3f09 | jq .resourceSpans
"""
HEADER = re.compile(r"([!#$%&'*+.^_`|~0-9A-Za-z-]+)\s*[:=]\s*([\x20-\x7e]*)")


@click.command(epilog=EXAMPLES)
@click.argument("recording", metavar="REC")
@click.option("--to", "form", type=click.Choice(FORMATS), required=True, help="The format.")
@click.option("-o", "--output", "file", metavar="FILE", help="Write to FILE; - is stdout.")
@click.option("--force", is_flag=True, help="Overwrite FILE if it is there.")
@click.option(
    "--endpoint", metavar="URL", help="Send to an OTLP/HTTP receiver; without a path: /v1/traces."
)
@click.option(
    "--header",
    "headers",
    multiple=True,
    metavar="NAME:VALUE",
    help="Send this header to the endpoint, such as a key; may be given several times.",
)
@click.option("--request", metavar="ID", help="Only the spans of this request's tree.")
@click.option("--no-offcpu", is_flag=True, help="Perfetto: leave the off-CPU intervals out.")
def export(
    recording: str,
    form: str,
    file: str | None,
    force: bool,
    endpoint: str | None,
    headers: tuple[str, ...],
    request: str | None,
    no_offcpu: bool,
) -> None:
    """Write the spans of the recording REC in the format of another tool.

    perfetto: a trace for ui.perfetto.dev, with threads as tracks, off-CPU time and arrows from cause
    to effect. otlp: OpenTelemetry's binary protobuf; a file holds one TracesData message, which can
    be posted to a collector as it is. otlp-json: its JSON form, with a message of up to 2,000 spans
    in each line.

    A parent that is only guessed becomes a link of the span (otlp) or stays a note (perfetto), and
    the span begins a trace of its own: these tools would show it as a fact.

    Redacted text stays redacted. FILE is readable for you only, as the recording is.
    """
    target = _target(form, file, endpoint, headers)
    if no_offcpu and form != "perfetto":
        raise UsageError("--no-offcpu is for --to perfetto; the other formats have no off-CPU time")
    if force and file in (None, STDOUT):
        raise UsageError("--force is for -o FILE; nothing else can be overwritten")
    from scope_ebpf.analysis.export.selection import select_spans
    from scope_ebpf.recording.reader import open_recording

    if target == STDOUT and form != "otlp-json" and sys.stdout.isatty():
        raise UsageError(f"--to {form} is binary and would garble the terminal; give -o FILE")
    if endpoint is not None:
        from scope_ebpf.analysis.export.otlp_http import traces_url

        target = traces_url(endpoint)  # tells what is wrong with it before the work begins
    elif target != STDOUT:
        check_free(Path(target), force=force)
    sent_headers = _headers(headers)
    opened = open_recording(recording)
    selection = select_spans(opened, request)
    if endpoint is not None:
        _send(target, sent_headers, opened, selection)
        return
    chunks = _chunks(form, opened, selection, offcpu=not no_offcpu)
    if target == STDOUT:
        with output.results():
            spans = _write(chunks, sys.stdout.buffer)
            sys.stdout.buffer.flush()
    else:
        with created(Path(target), force=force) as stream:
            spans = _write(chunks, stream)
    where = "stdout" if target == STDOUT else target
    click.echo(f"wrote {_count(spans, selection)} to {printable(where)}", err=True)


def _target(form: str, file: str | None, endpoint: str | None, headers: tuple[str, ...]) -> str:
    if endpoint is None:
        if file is None:
            other = " or --endpoint URL" if form == "otlp" else ""
            raise UsageError(f"export where to? give -o FILE{other}; -o - is stdout")
        if headers:
            raise UsageError("--header is for --endpoint; a file gets none")
        return file
    if file is not None:
        raise UsageError("-o and --endpoint exclude each other; give one of them")
    if form != "otlp":
        raise UsageError(f"--endpoint takes --to otlp, not {form}")
    return endpoint


def _headers(given: tuple[str, ...]) -> dict[str, str]:
    headers = {}
    for text in given:
        match = HEADER.fullmatch(text)
        if match is None:  # the text may hold a key: it is not repeated
            raise UsageError("--header is no header; write it like 'Authorization: Bearer KEY'")
        headers[match[1]] = match[2].strip()
    return headers


def _chunks(
    form: str, recording: Traced, selection: Selection, *, offcpu: bool
) -> Iterator[tuple[bytes, int]]:
    if form == "perfetto":
        from scope_ebpf.analysis.export.perfetto import perfetto_chunks

        return perfetto_chunks(recording, selection, offcpu=offcpu)
    from scope_ebpf.analysis.export import otlp

    if form == "otlp":
        return otlp.protobuf_messages(recording, selection)
    return otlp.json_lines(recording, selection)


def _write(chunks: Iterator[tuple[bytes, int]], stream: BinaryIO) -> int:
    spans = 0
    for data, count in chunks:
        stream.write(data)
        spans += count
    return spans


def _send(endpoint: str, headers: dict[str, str], recording: Traced, selection: Selection) -> None:
    from scope_ebpf.analysis.export import otlp, otlp_http

    messages = otlp.protobuf_messages(recording, selection)
    sent = otlp_http.send(endpoint, messages, headers=headers)
    said = printable("; ".join(sent.messages))
    if sent.rejected:
        raise ScopeError(
            f"the endpoint rejected {sent.rejected:,} of {sent.spans:,} spans"
            f"{f' ({said})' if said else ''}; it took the others"
        )
    click.echo(f"sent {_count(sent.spans, selection)}", err=True)
    if said:
        click.echo(f"the endpoint says: {said}", err=True)


def _count(spans: int, selection: Selection) -> str:
    traces = selection.traces
    return (
        f"{spans:,} {'span' if spans == 1 else 'spans'} of "
        f"{traces:,} {'trace' if traces == 1 else 'traces'}"
    )
