"""From the messages of a recording to its spans and the edges between them."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import polars as pl
from numpy.typing import NDArray

from scope_ebpf.analysis import faults, jobs
from scope_ebpf.analysis.asof import NONE
from scope_ebpf.analysis.attempts import read_connects
from scope_ebpf.analysis.contexts import Lineage, own_requests, read_lineage
from scope_ebpf.analysis.conversations import recognise
from scope_ebpf.analysis.drafts import draft_spans, resolve_statements
from scope_ebpf.analysis.exchanges import find_exchanges, find_turns
from scope_ebpf.analysis.handovers import read_pipes
from scope_ebpf.analysis.links import link
from scope_ebpf.analysis.nesting import read_loops
from scope_ebpf.analysis.peers import known_servers, name_peers
from scope_ebpf.analysis.schema import EDGE, EDGES, EVIDENCE, SPAN_KIND, SPANS
from scope_ebpf.analysis.services import service_lives
from scope_ebpf.analysis.silence import explain_silence
from scope_ebpf.analysis.upgrades import name_upgraded
from scope_ebpf.analysis.wire import read_wire
from scope_ebpf.protocols.heads import Heads
from scope_ebpf.protocols.registry import PROTOCOLS
from scope_ebpf.recording.connections import mix
from scope_ebpf.recording.reader import Recording

Rows = NDArray[np.intp]


@dataclass(frozen=True)
class Chains:
    """What a recording's messages tell: frames with the schemas SPANS and EDGES.

    `loops`: as nesting.read_loops gives it.
    """

    spans: pl.DataFrame
    edges: pl.DataFrame
    loops: pl.DataFrame | None


def build_chains(recording: Recording) -> Chains:
    """Find the spans of a recording, and what caused each."""
    connections = recording.collect(recording.connections)
    processes = recording.collect(recording.processes)
    ended_ns = _end(recording)
    services = service_lives(processes)
    loops = read_loops(recording)
    lineage = read_lineage(recording)
    drafts, heads, owned = _exchanges(recording, connections, services, ended_ns, loops, lineage)
    connects = read_connects(recording)
    drafts = faults.begin_with_connects(drafts, connects, connections)
    drafts = pl.concat([drafts, faults.refused_connects(drafts, connects, services)])
    drafts = explain_silence(recording, drafts)
    matched = match_ends(drafts)
    drafts = _as_the_other_end_says(_end_before_peer(drafts, matched), matched)
    links = [link(matched, "calls", "exact", "same bytes on the connection")]
    drafts, nested = jobs.work_on(
        drafts, owned, heads, loops, lineage, processes, lambda: read_pipes(recording), ended_ns
    )
    links += nested
    servers = known_servers(drafts, connections)
    drafts, broken = faults.find_faults(drafts, matched, processes, servers, services, connections)
    links.append(broken)
    drafts = name_peers(drafts, matched, connections, servers)
    found = pl.concat(links)
    spans, edges = _finish(recording, drafts, pl.concat([found, faults.blame(drafts, found)]))
    return Chains(spans, edges, loops)


def _end(recording: Recording) -> int:
    if recording.meta.ended_ns is not None:
        return recording.meta.ended_ns
    last = pl.col("start_ns") + pl.col("duration_ns")
    ends = [
        recording.collect(recording.table(name).select(last.max())).item()
        for name in ("messages", "syscalls", "offcpu")
    ]
    return max(int(end) for end in [*ends, recording.meta.started_ns] if end is not None)


def _exchanges(
    recording: Recording,
    connections: pl.DataFrame,
    services: pl.DataFrame,
    ended_ns: int,
    loops: pl.DataFrame | None,
    lineage: Lineage | None,
) -> tuple[pl.DataFrame, Heads, pl.DataFrame]:
    """The exchanges of a recording as drafts of spans; the heads and the OWNED that they refer to."""
    wire = read_wire(recording, connections)
    rows = np.flatnonzero((wire.payload.is_not_null().to_numpy()) & (wire.length > 0))
    heads = Heads.of(wire.payload.gather(rows), wire.length[rows])
    udp = connections.filter(pl.col("kind") == "udp")["connection"].to_numpy()
    spoken = recognise(wire, heads, rows, PROTOCOLS, np.isin(wire.connection, udp))
    turns = find_turns(wire, spoken, heads, rows)
    exchanges, request_row, response_row = find_exchanges(wire, spoken, turns)
    exchanges, owned = own_requests(exchanges, lineage, loops)
    drafts = draft_spans(
        exchanges,
        turns.requests.select(pl.all().gather(request_row)),
        turns.responses.select(pl.all().gather(response_row)),
        connections,
        services,
        [protocol.name for protocol in PROTOCOLS],
        ended_ns,
    )
    return resolve_statements(name_upgraded(drafts, heads)), heads, owned


def match_ends(drafts: pl.DataFrame) -> pl.DataFrame:
    """Pair the client spans with the server spans that got the same bytes: `cause`, `effect`.

    First those whose requests begin at the same byte; then a server span whose request begins
    inside the bytes of the client span that was the latest on that stream.
    """
    usable = drafts.filter(pl.col("exact") & pl.col("connection").is_not_null())
    columns = ["row", "stream", "begin", "start_ns", "request_bytes", "end_ns"]
    clients = usable.filter(pl.col("kind") == "client").select(columns)
    servers = usable.filter(pl.col("kind") == "server").select(columns)
    aligned = servers.join(
        clients.unique(["stream", "begin"], keep="none"), on=["stream", "begin"], suffix="_client"
    )
    # the same four addresses and ports may come again later, from any position
    in_time = pl.col("start_ns_client") <= pl.col("start_ns")
    aligned = aligned.filter(in_time).select("row", "row_client")
    rest = servers.join(aligned, on="row", how="anti").sort("start_ns")
    shifted = (
        rest.join_asof(
            clients.sort("start_ns"),
            on="start_ns",
            by="stream",
            suffix="_client",
            check_sortedness=False,
        )
        .drop_nulls("row_client")
        .filter(
            ((pl.col("begin") - pl.col("begin_client")) % 2**32) < pl.col("request_bytes_client"),
            # nothing of a connection with the same addresses before
            pl.col("end_ns_client").is_null() | (pl.col("start_ns") <= pl.col("end_ns_client")),
        )
        .select("row", "row_client")
    )
    both = pl.concat([aligned, shifted])
    return both.select(cause="row_client", effect="row")


def _end_before_peer(drafts: pl.DataFrame, matched: pl.DataFrame) -> pl.DataFrame:
    """A response that was received had been sent: a server's span ends no later than its client's.

    The call that sends may return after the other end has the bytes already.
    """
    client = drafts.select(cause="row", client_end_ns="end_ns").filter(
        pl.col("client_end_ns").is_not_null()
    )
    ends = matched.join(client, on="cause").select(row="effect", client_end_ns="client_end_ns")
    return (
        drafts.join(ends, on="row", how="left", maintain_order="left")
        .with_columns(
            pl.when(pl.col("client_end_ns") < pl.col("end_ns"))
            .then("client_end_ns")
            .otherwise(name)
            .alias(name)
            for name in ("end_ns", "until_ns")
        )
        # the client may have had it before the call that received the request returned
        .with_columns(
            pl.when(pl.col(name).is_not_null()).then(pl.max_horizontal(name, "start_ns"))
            for name in ("end_ns", "until_ns")
        )
        .drop("client_end_ns")
    )


def _as_the_other_end_says(drafts: pl.DataFrame, matched: pl.DataFrame) -> pl.DataFrame:
    """What one end's heads did not tell, the other end's do: they are of the same bytes."""
    told = ["operation", "detail", "status", "error"]
    about = drafts.select("row", *(pl.col(name).alias(f"{name}_there") for name in told))
    ends = pl.concat(
        [matched.select(row="cause", other="effect"), matched.select(row="effect", other="cause")]
    ).unique("row", keep="none")
    untold = pl.col("operation").is_null() & pl.col("operation_there").is_not_null()
    return (
        drafts.join(ends, on="row", how="left", maintain_order="left")
        .join(about.rename({"row": "other"}), on="other", how="left", maintain_order="left")
        .with_columns(
            pl.when(untold).then(pl.coalesce(name, f"{name}_there")).otherwise(name).alias(name)
            for name in told
        )
        .select(drafts.columns)
    )


def _finish(
    recording: Recording, drafts: pl.DataFrame, links: pl.DataFrame
) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Give spans their ids, parents and requests, and the frames their schemas."""
    drafts = drafts.sort("row")
    identity = _identities(recording, drafts)
    # a span has one parent: what its own bytes or items tell goes before everything else
    grade = pl.col("evidence").cast(EVIDENCE).to_physical()
    parents = (
        links.filter("parent")
        .sort(grade, maintain_order=True)
        .unique("effect", keep="first", maintain_order=True)
    )
    parent = np.full(len(drafts), NONE, np.intp)
    parent[parents["effect"].to_numpy()] = parents["cause"].to_numpy()
    root = _roots(parent)
    spans = (
        drafts.with_columns(
            span_id=pl.Series(identity),
            parent_id=pl.Series(np.where(parent == NONE, 0, identity[np.maximum(parent, 0)])),
            request_id=pl.Series(identity[root] if len(root) else identity),
            kind=pl.col("kind").cast(SPAN_KIND),
            duration_ns=pl.col("until_ns") - pl.col("start_ns"),
        )
        .join(
            parents.select(row="effect", edge="edge", evidence="evidence"),
            on="row",
            how="left",
            maintain_order="left",
        )
        .with_columns(
            pl.when(pl.col("parent_id") != 0).then("parent_id"),
            pl.col("edge").cast(EDGE),
            pl.col("evidence").cast(EVIDENCE),
        )
        .select(pl.col(name).cast(dtype) for name, dtype in SPANS.items())
        .sort("start_ns")
    )
    chosen = parents.select("cause", "effect", chosen=pl.lit(value=True))
    edges = (
        links.join(chosen, on=["cause", "effect"], how="left", maintain_order="left")
        .with_columns(
            cause_id=pl.Series(identity[links["cause"].to_numpy()]),
            effect_id=pl.Series(identity[links["effect"].to_numpy()]),
            parent=pl.col("chosen").fill_null(value=False) & pl.col("parent"),
            edge=pl.col("edge").cast(EDGE),
            evidence=pl.col("evidence").cast(EVIDENCE),
        )
        .select(pl.col(name).cast(dtype) for name, dtype in EDGES.items())
    )
    return spans, edges


def _identities(recording: Recording, drafts: pl.DataFrame) -> NDArray[np.uint64]:
    """An id for each span that every analysis of the recording gives it again; never 0."""
    boot_id = recording.meta.host.boot_id.encode()
    boot = int.from_bytes(hashlib.blake2b(boot_id, digest_size=8).digest(), "little")

    def words(name: str) -> NDArray[np.uint64]:
        return drafts[name].fill_null(0).to_numpy().astype(np.uint64)

    kind = drafts["kind"].cast(SPAN_KIND).to_physical().to_numpy().astype(np.uint64)
    parts = [words(name) for name in ("tgid", "tid", "start_ns", "connection", "begin")]
    identity = mix(boot, kind, *parts)
    return np.maximum(identity, 1)


def _roots(parent: Rows) -> Rows:
    """The root of each span's tree, by doubling the distance that is followed."""
    root = np.where(parent == NONE, np.arange(len(parent)), parent)
    # 2**40 generations: a circle, which nothing here makes, would end the loop, too
    for _ in range(40):
        further = root[root]
        if np.array_equal(further, root):
            break
        root = further
    return root
