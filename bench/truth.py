"""Compares the parents of spans with what the shop's services noted themselves.

Two sources, both independent of how parents are found: the random id that every request carries
through each hop, seen in the payloads; and the lines that the services write about what they do, in
which thread, and why (examples/shop/truth.py).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import polars as pl

from scope_ebpf.protocols.heads import Heads
from scope_ebpf.recording.reader import Recording

RID = r"([0-9a-f]{32})"
JOB_ID = r"([0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12})"
# span_id (null: there is no such span), expected_id (null: there is none to be right), what
EXPECTED = {"span_id": pl.UInt64, "expected_id": pl.UInt64, "what": pl.String}


@dataclass
class Compared:
    """Parents by what they are: right, wrong, or missing although the truth has one."""

    right: Counter[str] = field(default_factory=Counter)
    wrong: Counter[str] = field(default_factory=Counter)
    missing: Counter[str] = field(default_factory=Counter)
    guessed: Counter[str] = field(default_factory=Counter)
    exact_wrong: int = 0

    @property
    def expected(self) -> int:
        """How many parents the truth has, and how many are claimed beside these."""
        return self.right.total() + self.missing.total() + self.wrong.total()

    @property
    def precision(self) -> float:
        """Of the parents that are claimed, those that are right."""
        claimed = self.right.total() + self.wrong.total()
        return self.right.total() / claimed if claimed else 0.0

    @property
    def recall(self) -> float:
        """Of the parents that there are, those that are found."""
        return self.right.total() / self.expected if self.expected else 0.0


def compare(recording: Recording, truth: Sequence[dict[str, Any]]) -> Compared:
    """Compare every parent of a recording of the shop (recorded unredacted, with truth).

    Lines of the truth that began before the recording or ended after it do not count. A parent that
    is only guessed is no claim: it is missing. A parent that is claimed where the truth knows of
    none is wrong.
    """
    spans = recording.spans().collect().sort("start_ns")
    lines = pl.DataFrame(list(truth), infer_schema_length=None).with_columns(
        pl.col("tgid", "tid").cast(pl.UInt32)
    )
    ended_ns = recording.meta.ended_ns
    if ended_ns is None:
        raise RuntimeError(f"{recording.path.name} is not complete")
    # a worker that forks for its jobs notes nothing itself
    workers = spans.filter(pl.col("kind") == "consumer")["tgid"]
    services = pl.concat([lines["tgid"], workers]).unique()
    lines = lines.filter(
        pl.col("start_ns") >= recording.meta.started_ns, pl.col("end_ns") <= ended_ns
    ).sort("start_ns")
    handlers = find_handlers(spans, lines)
    rids = find_rids(spans, recording)
    expected = pl.concat(
        [
            _called(spans, lines, handlers, services),
            _handled(spans, lines, handlers, rids),
            _proxied(lines, rids),
            _at_servers(spans),
        ]
    )
    result = Compared()
    checked = _judge(expected, spans)
    for what, verdict, count in checked.group_by("what", "verdict").len().iter_rows():
        if verdict == "guessed":
            result.guessed[what] += count
            result.missing[what] += count
        elif verdict != "none":
            getattr(result, verdict)[what] += count
    wrong = checked.filter(pl.col("verdict") == "wrong")
    result.exact_wrong = wrong.filter(pl.col("evidence").cast(pl.String) == "exact").height
    return result


def _judge(expected: pl.DataFrame, spans: pl.DataFrame) -> pl.DataFrame:
    """With what the spans have: `verdict` right, wrong, missing, guessed, or none of either."""
    checked = expected.join(
        spans.select("span_id", "parent_id", "evidence", "service", "operation", "kind"),
        on="span_id",
        how="left",
    )
    parent, wanted = pl.col("parent_id"), pl.col("expected_id")
    guess = (pl.col("evidence").cast(pl.String) == "guess").fill_null(value=False)
    nothing = wanted.is_null() & ~pl.col("what").str.starts_with("call ")
    verdict = (
        pl.when(nothing & (parent.is_null() | guess))
        .then(pl.lit("none"))
        .when(parent.is_null())
        .then(pl.lit("missing"))
        .when(guess)
        .then(pl.lit("guessed"))
        .when((parent == wanted).fill_null(value=False))
        .then(pl.lit("right"))
        .otherwise(pl.lit("wrong"))
    )
    return checked.with_columns(verdict=verdict)


def find_handlers(spans: pl.DataFrame, lines: pl.DataFrame) -> pl.DataFrame:
    """The lines of requests and jobs, each with the span that it is: `expected_id`, or null."""
    servers = spans.filter((pl.col("kind") == "server") & (pl.col("protocol") == "http"))
    consumers = spans.filter(pl.col("kind") == "consumer")
    ends = pl.col("start_ns") + pl.col("duration_ns")
    found = []
    # a job may run in a fork of the worker, of which there is one; so it is found by time alone
    for kind, candidates, flow in (
        ("server", servers, ["tgid", "tid"]),
        ("job", consumers, []),
    ):
        found.append(
            lines.filter(pl.col("kind") == kind)
            .sort("start_ns")
            .join_asof(
                candidates.select(*flow, "start_ns", found_id="span_id", until_ns=ends),
                on="start_ns",
                by=flow or None,
                check_sortedness=False,
            )
            .with_columns(
                expected_id=pl.when(pl.col("start_ns") <= pl.col("until_ns")).then("found_id")
            )
            .drop("found_id", "until_ns")
        )
    return pl.concat(found)


def _called(
    spans: pl.DataFrame, lines: pl.DataFrame, handlers: pl.DataFrame, services: pl.Series
) -> pl.DataFrame:
    """What the services' threads asked of others, and in which request or job.

    All spans of a thread between the begin and end of a call that it noted are of that call, the
    setting up of a connection as well. What else it asked while it handled a request may be of that
    request, and of nothing else.
    """
    clients = (
        spans.filter((pl.col("kind") == "client") & pl.col("tgid").is_in(services.implode()))
        .select("span_id", "tgid", "tid", "start_ns", "detail", "service")
        .sort("start_ns")
    )
    calls = lines.filter(pl.col("kind") == "client").sort("start_ns")
    within = clients.join_asof(
        calls.select("tgid", "tid", "start_ns", "end_ns", "parent", call="id", noted="service"),
        on="start_ns",
        by=["tgid", "tid"],
        check_sortedness=False,
    ).filter(pl.col("start_ns") <= pl.col("end_ns"))
    causes = handlers.select("expected_id", parent="id")
    noted = within.join(causes, on="parent", how="left").select(
        "span_id", "expected_id", what=pl.format("call of {}", "noted")
    )
    # calls whose span is not there at all
    lost = calls.join(within, left_on="id", right_on="call", how="anti").select(
        pl.lit(None, pl.UInt64).alias("span_id"),
        pl.lit(None, pl.UInt64).alias("expected_id"),
        what=pl.format("call of {}", "service"),
    )
    rest = clients.join(within, on="span_id", how="anti")
    around = rest.join_asof(
        handlers.sort("start_ns").select("tgid", "tid", "start_ns", "end_ns", "expected_id"),
        on="start_ns",
        by=["tgid", "tid"],
        check_sortedness=False,
    ).with_columns(pl.when(pl.col("start_ns") <= pl.col("end_ns")).then("expected_id"))
    return pl.concat(
        [
            noted,
            lost,
            _beside(around, spans, handlers),
        ]
    ).cast(EXPECTED)  # type: ignore[arg-type]


def _beside(around: pl.DataFrame, spans: pl.DataFrame, handlers: pl.DataFrame) -> pl.DataFrame:
    """What was asked outside of noted calls.

    Of a service: in a request (`expected_id`), or in none. Of a worker: a process that did one job
    only is that job's; what carries a job's id, as what came from the queue does, is about that job;
    and what asks for the next job is in none. Of the rest nothing is known.
    """
    consumers = spans.filter(pl.col("kind") == "consumer")
    jobs = consumers.select(job_id="span_id", job=pl.col("detail").str.extract(JOB_ID))
    horses = handlers.filter(pl.col("kind") == "job").unique("tgid", keep="none")
    named = (
        around.with_columns(job=pl.col("detail").str.extract(JOB_ID))
        .join(jobs.drop_nulls().unique("job", keep="none"), on="job", how="left")
        .join(horses.select("tgid", horse_id="expected_id"), on="tgid", how="left")
    )
    of_worker = pl.col("service").is_in(consumers["service"].unique().implode())
    of_job = of_worker & pl.col("expected_id").is_null()
    asks = pl.col("detail").str.contains(r"^(BL|BR|LMOVE|LPOP|RPOP)")
    job = pl.coalesce("horse_id", pl.when(~asks).then("job_id"))
    return named.filter(~of_job | job.is_not_null() | asks).select(
        "span_id",
        pl.when(of_job).then(job).otherwise("expected_id").alias("expected_id"),
        what=pl.when(of_job & job.is_null())
        .then(pl.format("{} between jobs", "service"))
        .when(of_job)
        .then(pl.format("{} about a job", "service"))
        .when(pl.col("expected_id").is_null())
        .then(pl.format("{} outside of requests", "service"))
        .otherwise(pl.format("{} between calls", "service")),
    )


def _handled(
    spans: pl.DataFrame, lines: pl.DataFrame, handlers: pl.DataFrame, rids: pl.DataFrame
) -> pl.DataFrame:
    """What made a service work: the other service's call, the proxy's, or the queued job's."""
    calls = lines.filter(pl.col("kind") == "client").sort("end_ns")
    clients = spans.filter(
        (pl.col("kind") == "client") & pl.col("protocol").is_in(["http", "redis"])
    ).select("tgid", "tid", "protocol", "start_ns", caller_id="span_id", caller_ns="start_ns")
    # the last span that began within the call: a connection may have been set up before it
    spoken = pl.when(pl.col("target") == "redis").then(pl.lit("redis")).otherwise(pl.lit("http"))
    called = (
        calls.filter(pl.col("target") != "postgresql")
        .with_columns(protocol=spoken)
        .join_asof(
            clients.sort("start_ns"),
            left_on="end_ns",
            right_on="start_ns",
            by=["tgid", "tid", "protocol"],
            check_sortedness=False,
        )
        .filter(pl.col("caller_ns") >= pl.col("start_ns"))
        .select("caller_id", parent="id")
    )
    made = handlers.rename({"expected_id": "span_id"})
    inner = (
        made.filter(pl.col("parent").is_not_null())
        .join(lines.filter(pl.col("kind") == "client").select(parent="id"), on="parent", how="semi")
        .join(called, on="parent", how="left")
    )
    proxy = rids.filter((pl.col("kind") == "client") & (pl.col("service") == "nginx"))
    outer = made.filter((pl.col("kind") == "server") & pl.col("parent").is_null()).join(
        proxy.select("rid", caller_id="span_id"), on="rid", how="left"
    )
    both = pl.concat(
        frame.select("span_id", expected_id="caller_id", what=pl.format("work of {}", "service"))
        for frame in (inner, outer)
    )
    # a parent that is expected, of a span that is not known, is missing
    other = spans.filter(pl.col("kind") == "consumer").join(both, on="span_id", how="anti")
    return pl.concat(
        [
            both,
            other.filter(
                pl.col("start_ns") + pl.col("duration_ns") < pl.lit(lines["end_ns"].max())
            ).select(
                "span_id",
                pl.lit(None, pl.UInt64).alias("expected_id"),
                what=pl.lit("work that is no job"),
            ),
        ]
    ).cast(EXPECTED)  # type: ignore[arg-type]


def _proxied(lines: pl.DataFrame, rids: pl.DataFrame) -> pl.DataFrame:
    """What nginx passed on: the request with the same id."""
    handled = lines.filter((pl.col("kind") == "server") & pl.col("parent").is_null())
    nginx = rids.filter(pl.col("service") == "nginx")
    came = nginx.filter(pl.col("kind") == "server").select("rid", expected_id="span_id")
    passed = nginx.filter(pl.col("kind") == "client").select("rid", "span_id")
    return (
        handled.select("rid")
        .join(passed, on="rid", how="left")
        .join(came, on="rid", how="left")
        .select("span_id", "expected_id", what=pl.lit("passed on by nginx"))
    )


def _at_servers(spans: pl.DataFrame) -> pl.DataFrame:
    """Queries as PostgreSQL and Redis got them: those with the same text.

    The text holds the request's id, so that equal ones are of one request, which asks one after the
    other: the n-th that was asked is the n-th that was got.
    """
    asked = (
        spans.filter(
            pl.col("detail").str.contains(RID) & pl.col("protocol").is_in(["postgresql", "redis"])
        )
        .sort("start_ns")
        .with_columns(nth=pl.int_range(pl.len()).over("detail", "protocol", "kind"))
    )
    same = ["detail", "protocol", "nth"]
    clients = asked.filter(pl.col("kind") == "client")
    servers = asked.filter(pl.col("kind") == "server")
    return (
        clients.select(*same, expected_id="span_id")
        .join(servers.select(*same, "span_id"), on=same, how="left")
        .select("span_id", "expected_id", what=pl.format("query at {}", "protocol"))
    )


def find_rids(spans: pl.DataFrame, recording: Recording) -> pl.DataFrame:
    """The request id in the bytes with which each HTTP span began: span_id, kind, service, rid."""
    heads = (
        recording.messages.filter(pl.col("payload").is_not_null())
        .select(
            "connection",
            start_ns=pl.when(pl.col("direction") == "receive")
            .then(pl.col("start_ns") + pl.col("duration_ns"))
            .otherwise("start_ns"),
            payload="payload",
        )
        .collect()
        .sort("start_ns")
    )
    texts = Heads.of(heads["payload"], np.zeros(len(heads), np.int64)).text()
    heads = heads.select("connection", "start_ns", rid=texts.str.extract(RID)).drop_nulls("rid")
    http = spans.filter(pl.col("protocol") == "http").sort("start_ns")
    return http.join_asof(
        heads, on="start_ns", by="connection", strategy="forward", check_sortedness=False
    ).select("span_id", "kind", "service", "rid")
