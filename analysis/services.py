"""Names of services, and the map of which service talks to which."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

import polars as pl

from scope_ebpf.analysis.numbers import LifeOf, process_lives
from scope_ebpf.analysis.places import Place, place_of
from scope_ebpf.analysis.programs import Program, program_of

OUTSIDE: Final = "outside"
"""In the service map: a client that was not recorded."""
UNKNOWN: Final = "unknown"
"""In the service map: a server of which not even an address is known."""

SERVICE_NAMES: Final = pl.Schema({"tgid": pl.UInt32, "service": pl.String})

SERVICE_LIVES: Final = pl.Schema(
    {
        "tgid": pl.UInt32,
        "since_ns": pl.Int64,  # as in numbers.process_lives
        "service": pl.String,
        "place": pl.String,  # its unit or container, in a few words; null: in none, or not known
    }
)

SERVICE_MAP: Final = pl.Schema(
    {
        "client": pl.String,
        "server": pl.String,
        "protocol": pl.String,  # null: not recognised
        "kind": pl.String,  # call or queue
        "calls": pl.UInt32,
        "errors": pl.UInt32,
        "p50_ns": pl.Int64,  # these three exact, and of complete calls; null: there is none
        "p95_ns": pl.Int64,
        "p99_ns": pl.Int64,
        "total_ns": pl.Int64,  # of all, as far as they were recorded
        "bytes": pl.Int64,  # of requests and responses
    }
)


@dataclass(frozen=True)
class _Evidence:
    """What is known of a process that can name it."""

    program: Program | None
    place: Place
    comm: str | None


def service_names(processes: pl.DataFrame) -> pl.DataFrame:
    """A name for the service of each process.

    `processes` is that table of a recording (`Recording.processes`), in any order. Gives one row
    per tgid, with columns `tgid` and `service`, sorted by tgid. A process is named by its last
    command line, from the most to the least specific of:

    - what the command line says that it runs: the application of gunicorn, uvicorn and the like
      (`gunicorn shop.web:app` is web), also from the titles that setproctitle writes; celery, dramatiq
      and rq workers with that prefix (`celery:shop`, `rq:mail`); `python -m shop.jobs` is
      shop.jobs, `python worker.py` is worker; databases, caches and proxies by their program.
      Where the module or script is called app, main, wsgi, asgi or application, its folder counts
    - its systemd unit
    - its comm, with the beginning of its container's id if it has one

    Children that multiprocessing spawned have their parent's name, and so has what was forked and
    executed nothing. Of a tgid that was used again, it is the last process's name (see
    `service_lives`). Where two programs of the same
    name have different modules, paths or units, these tell them apart. What cannot tell: relative
    paths in different working directories, ports, and two servers of one database; such
    processes share a name.

    >>> rows = pl.DataFrame({"time_ns": 1, "event": "alive", "tgid": 7, "tid": 7, "parent_tgid": 1,
    ...     "comm": "gunicorn", "command_line": "gunicorn shop.web:app", "cgroup": "/"})
    >>> service_names(rows)["service"].to_list()
    ['web']
    """
    lives = service_lives(processes)
    last = lives.unique("tgid", keep="last", maintain_order=True)
    return last.select(SERVICE_NAMES.names())


def service_lives(processes: pl.DataFrame) -> pl.DataFrame:
    """Likewise one row per process, where numbers are used again: with the schema SERVICE_LIVES.

    Sorted by tgid and `since_ns`, from when on the number belongs to that process. `add_services`
    joins it.
    """
    lives = process_lives(processes)
    known = lives.select("command_line", "comm", "cgroup").unique(maintain_order=True)
    described = {
        row: _Evidence(program_of(row[0], row[1]), place_of(row[2]), row[1])
        for row in known.iter_rows()
    }
    evidence = [described[row] for row in lives.select(known.columns).iter_rows()]
    helpers = [at for at, found in enumerate(evidence) if found.program and found.program.inherits]
    if helpers:
        parents = lives["parent"].to_list()
        ancestors = {at: _ancestor(at, parents, evidence) for at in helpers}
        for at, found in ancestors.items():
            evidence[at] = found
    named = _told_apart(dict.fromkeys(evidence))
    tgids = lives["tgid"].to_list()
    names = [named[found] or f"tgid-{tgid}" for tgid, found in zip(tgids, evidence, strict=True)]
    places = [str(described[row].place) or None for row in lives.select(known.columns).iter_rows()]
    return lives.select(
        "tgid",
        "since_ns",
        pl.Series("service", names, pl.String),
        pl.Series("place", places, pl.String),
    ).cast(SERVICE_LIVES)


def add_services(rows: pl.DataFrame, lives: pl.DataFrame, time: str) -> pl.DataFrame:
    """`rows` with the `service` of the process `tgid` at the time in the column `time`, in their order.

    `lives` is what `service_lives` gives. Null: nothing is known of the process.
    """
    number = LifeOf(lives).expression(pl.col(time))
    return rows.with_columns(
        number.replace_strict(
            range(len(lives)), lives["service"], default=None, return_dtype=pl.String
        ).alias("service")
    )


def _ancestor(at: int, parents: Sequence[int | None], evidence: Sequence[_Evidence]) -> _Evidence:
    """The nearest ancestor that has a name of its own; the process itself if none is known."""
    seen = {at}
    above = parents[at]
    while above is not None and above not in seen:
        found = evidence[above]
        if not (found.program and found.program.inherits):
            return found
        seen.add(above)
        above = parents[above]
    return evidence[at]


def _name(found: _Evidence) -> str | None:
    program = found.program
    if program and program.name:
        return program.name
    if found.place.unit:
        return found.place.unit
    if program:
        return program.fallback
    container = found.place.container
    return f"{found.comm}@{container}" if found.comm and container else found.comm


def _told_apart(evidence: Iterable[_Evidence]) -> dict[_Evidence, str | None]:
    """Each one's name, longer where the same name stands for different programs."""
    sharing: dict[str | None, list[_Evidence]] = defaultdict(list)
    for found in evidence:
        sharing[_name(found)].append(found)
    names: dict[_Evidence, str | None] = {}
    for name, processes in sharing.items():
        programs = {each: each.program for each in processes if each.program}
        different = _different([each.identity for each in programs.values()])
        units = {each.place.unit for each in programs if each.program and each.program.identity}
        units -= {None}
        for each in processes:
            program = programs.get(each)
            names[each] = name
            if program is None or not program.identity:
                continue
            if len(different) > 1 and program.identity in different:
                names[each] = program.identity
            elif len(different) <= 1 and len(units) > 1 and each.place.unit not in (None, name):
                names[each] = f"{name}@{each.place.unit}"
    return names


def _different(identities: Sequence[str]) -> set[str]:
    """Those that certainly mean different programs: `worker.py` may well be /srv/shop/worker.py."""
    known = set(identities) - {""}
    endings = {one[match.end() :] for one in known for match in re.finditer(r"[/.]", one)}
    return known - endings


def service_map(spans: pl.LazyFrame) -> pl.DataFrame:
    """Who talks to whom: one row per client, server, protocol and kind, longest total first.

    `spans` has the columns of schema.SPANS. The result has those of SERVICE_MAP:

    - `call`: requests as their clients saw them. The server is a service, or the address of
      one that was not recorded. Requests of clients that were not recorded, as the servers
      saw them: their client is `outside`. A connect() that failed counts as a call with an error
    - `queue`: jobs, from who queued them (`outside` if that is not known) to who did them; times
      are those of the work. The commands by which they were queued and taken are calls as well

    Durations of calls that were not recorded as a whole, or never answered, are not in the
    quantiles. A call that waits on purpose (BLPOP) takes as long as it waited.
    """
    causes = spans.select(
        pl.col("span_id").alias("parent_id"), pl.col("service").alias("parent_service")
    )
    services = spans.select(
        pl.col("service").alias("peer"), pl.lit(True).alias("recorded")
    ).unique()
    kind, service, peer = pl.col("kind"), pl.col("service"), pl.col("peer")
    # A peer that is a service was recorded, and its client spans tell of its requests.
    unseen = (kind == "server") & pl.col("edge").ne_missing("calls") & pl.col("recorded").is_null()
    outgoing = kind == "client"
    other = pl.coalesce(peer, pl.lit(UNKNOWN))
    duration = pl.col("duration_ns").filter(pl.col("state").is_in(["complete", "one_way"]))
    quantiles = [
        # nearest: a duration that did occur
        duration.quantile(share / 100, "nearest").cast(pl.Int64).alias(f"p{share}_ns")
        for share in (50, 95, 99)
    ]
    return (
        spans.join(services, on="peer", how="left")
        .filter(outgoing | unseen | (kind == "consumer"))
        .join(causes, on="parent_id", how="left")
        .select(
            pl.when(outgoing).then(service)
            .when(kind == "consumer").then(pl.coalesce("parent_service", pl.lit(OUTSIDE)))
            .otherwise(pl.lit(OUTSIDE)).alias("client"),
            pl.when(outgoing).then(other).otherwise(service).alias("server"),
            "protocol",
            pl.when(kind == "consumer").then(pl.lit("queue")).otherwise(pl.lit("call")).alias("kind"),
            "error", "duration_ns", "state", "request_bytes", "response_bytes",
        )
        .group_by("client", "server", "protocol", "kind")
        .agg(
            pl.len().cast(pl.UInt32).alias("calls"),
            pl.col("error").count().cast(pl.UInt32).alias("errors"),
            *quantiles,
            pl.col("duration_ns").sum().alias("total_ns"),
            (pl.col("request_bytes").sum() + pl.col("response_bytes").sum()).alias("bytes"),
        )
        .sort("total_ns", "client", "server", "protocol", descending=[True, False, False, False])
        .collect()
        .cast(SERVICE_MAP)
        .select(SERVICE_MAP.names())
    )  # fmt: skip
