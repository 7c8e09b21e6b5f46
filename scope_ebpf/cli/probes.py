"""`scope-ebpf probes`: the USDT probes of a file."""

from __future__ import annotations

import json
from pathlib import Path

import click

from scope_ebpf.cli import output
from scope_ebpf.errors import UsageError

EXAMPLES = """\b
Examples:
  scope-ebpf probes /usr/lib/postgresql/15/bin/postgres
  scope-ebpf probes /usr/bin/python3.11 --json | jq -r .probe
"""


@click.command(epilog=EXAMPLES)
@click.argument("file", metavar="FILE")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object per line.")
def probes(file: str, as_json: bool) -> None:
    """List the USDT probes that a program or library FILE has, and how to record them.

    Arguments are shown with the types that the file tells. It does not tell texts from numbers: where
    the program's documentation calls an argument a char *, write str in its place.
    """
    from scope_ebpf.loaders.hits import no_such_file
    from scope_ebpf.loaders.probed_files import ProbedFile
    from scope_ebpf.loaders.usdt import read_sites

    path = Path(file)
    if not path.is_file():
        raise UsageError(no_such_file(path))
    found: dict[str, list[list[str]]] = {}
    for site in read_sites(ProbedFile(path)):
        types = [operand.type_name for operand in site.operands]
        found.setdefault(f"{site.provider}:{site.name}", []).append(types)
    if not found:
        raise UsageError(
            f"{file} has no USDT probes; probe one of its functions with uprobe:{path.absolute()}:FUNCTION"
        )
    rows = [(name, sites[0], len(sites)) for name, sites in sorted(found.items())]
    with output.results():
        if as_json:
            for name, types, count in rows:
                click.echo(json.dumps({"probe": name, "arguments": types, "sites": count}))
            return
        width = max(len(name) for name, _, _ in rows)
        room = max(len(", ".join(types)) for _, types, _ in rows)
        click.echo(
            click.style(f"{'probe':{width}}  {'arguments':{max(room, 9)}}  sites", bold=True)
        )
        for name, types, count in rows:
            click.echo(f"{name:{width}}  {', '.join(types):{max(room, 9)}}  {count:5}")
    name, types, _ = max(rows, key=lambda row: "u64" in row[1])
    hint = ", ".join("str" if one == "u64" else one for one in types)
    click.echo(
        f"record one:  sudo scope-ebpf attach --pid PID --probe 'usdt:{path.absolute()}:{name}'",
        err=True,
    )
    if "u64" in types:
        click.echo(f"with texts:  --probe 'usdt:{path.absolute()}:{name}({hint})'", err=True)
