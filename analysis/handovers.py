"""Jobs that a worker's main process took from a queue and passed on to its children over pipes."""

from __future__ import annotations

import numpy as np
import polars as pl

from scope_ebpf.analysis.asof import NONE, first_after, group_numbers, latest_before
from scope_ebpf.analysis.drafts import DRAFT
from scope_ebpf.analysis.links import link
from scope_ebpf.analysis.queues import ids_in
from scope_ebpf.protocols.heads import Heads
from scope_ebpf.recording.reader import Recording
from scope_ebpf.records import RecordLimits


def read_pipes(recording: Recording) -> pl.DataFrame:
    """What went over pipes, without lengths that were sent by themselves.

    `connection`, `tgid`, `tid`, `context`, `receive`, `start_ns`, `moved_ns` (end of a receive, start
    of a send), `length_bytes`, `stream_end`, `payload`.
    """
    receive = pl.col("direction") == "receive"
    return recording.collect(
        recording.messages.filter(
            (pl.col("kind") == "pipe")
            & ~pl.col("peek")
            & (pl.col("length_bytes") > RecordLimits.PREFIX_BYTES)
        ).select(
            "connection",
            "tgid",
            "tid",
            "context",
            "start_ns",
            "length_bytes",
            "stream_end",
            "payload",
            receive=receive,
            moved_ns=pl.when(receive)
            .then(pl.col("start_ns") + pl.col("duration_ns"))
            .otherwise("start_ns"),
        )
    )


def hand_over(
    jobs: pl.DataFrame, texts: pl.Series, pipes: pl.DataFrame, *, first_row: int, ended_ns: int
) -> tuple[pl.DataFrame, pl.DataFrame]:
    """The work that other processes did on jobs which reached them over a pipe.

    `jobs`: drafts of consumers, and `texts` what each took from its queue. A process works on a job
    if it received an id over a pipe that only this job has, from the process that took the job, after
    it had. It does so until the last that it sends over a pipe before it receives the next.

    Returns drafts of more consumers, whose rows begin at `first_row`, and links from the jobs.
    """
    found = _received(jobs, texts, pipes)
    flow = ["tgid", "tid", "context"]
    own = group_numbers(*((pipes[name].to_numpy(), found[name].to_numpy()) for name in flow))
    receives = pipes["receive"].to_numpy()
    moved, started = pipes["moved_ns"].to_numpy(), pipes["start_ns"].to_numpy()
    begin = found["moved_ns"].to_numpy()
    following = first_after(own[0][receives], moved[receives], own[1], begin, strictly=True)
    limit = np.full(len(found), ended_ns)
    if receives.any():
        limit = np.where(following == NONE, ended_ns, started[receives][np.maximum(following, 0)])
    limit = np.maximum(limit, begin)
    last = latest_before(own[0][~receives], moved[~receives], own[1], limit)
    until = limit
    if (~receives).any():
        sent = moved[~receives][np.maximum(last, 0)]
        until = np.where((last != NONE) & (sent > begin), sent, limit)
    work = (
        found.drop("start_ns")
        .join(
            jobs.drop(*flow, "start_ns", "sent_ns", "end_ns", "until_ns", "state"),
            left_on="job",
            right_on="row",
            how="left",
            maintain_order="left",
        )
        .with_columns(
            row=pl.int_range(first_row, first_row + pl.len(), dtype=pl.Int64),
            start_ns="moved_ns",
            sent_ns="moved_ns",
            asked_ns="moved_ns",
            end_ns=pl.Series(until),
            until_ns=pl.Series(until),
            state=pl.Series(np.where(until >= ended_ns, "open", "complete"), dtype=pl.String),
            connection="connection_pipe",
            request_bytes=pl.col("length_bytes").cast(pl.Int64),
        )
    )
    drafts = work.select(pl.col(name).cast(dtype) for name, dtype in DRAFT.items())
    links = link(
        work.select(cause="job", effect="row"),
        "continues",
        "derived",
        "its id in what its process was sent over a pipe",
    )
    return drafts, links


def _received(jobs: pl.DataFrame, texts: pl.Series, pipes: pl.DataFrame) -> pl.DataFrame:
    """The receives that brought jobs: with `job` (its row), sorted by when they came."""
    taken = jobs.select(pl.col("row").cast(pl.UInt32), "tgid", "start_ns").with_columns(text=texts)
    own = ids_in(taken.filter(pl.col("text").is_not_null()), pl.col("text"))
    own = own.unique("id", keep="none").rename({"row": "job"})
    came = pipes.filter(pl.col("receive") & pl.col("payload").is_not_null()).with_row_index("row")
    heads = Heads.of(came["payload"], came["length_bytes"].cast(pl.Int64).to_numpy())
    ids = ids_in(came.select("row").with_columns(text=heads.text()), pl.col("text"))
    pairs = ids.join(own, on="id").select("row", "job").unique()
    # what holds the ids of several jobs is about all of them
    pairs = pairs.unique("row", keep="none")
    sends = (
        pipes.filter(~pl.col("receive"))
        .select("connection", "stream_end", "length_bytes", sender="tgid", sent_ns="moved_ns")
        .sort("stream_end")
    )
    return (
        came.join(pairs, on="row")
        .sort("stream_end")
        .join_asof(
            sends,
            on="stream_end",
            by="connection",
            strategy="forward",
            suffix="_sent",
            coalesce=False,
            check_sortedness=False,
        )
        .filter(
            pl.col("stream_end_sent") - pl.col("length_bytes_sent") < pl.col("stream_end"),
            pl.col("sender") != pl.col("tgid"),
        )
        .join(taken.select(job="row", taker="tgid", taken_ns="start_ns"), on="job")
        .filter(
            pl.col("sender") == pl.col("taker"),
            pl.col("sent_ns") >= pl.col("taken_ns"),
        )
        .with_columns(job=pl.col("job").cast(pl.Int64), connection_pipe="connection")
        .select(
            "job",
            "tgid",
            "tid",
            "context",
            "start_ns",
            "moved_ns",
            "length_bytes",
            "connection_pipe",
        )
        .sort("moved_ns")
    )
