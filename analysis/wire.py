"""The messages of a recording as arrays, in the order in which each connection saw them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from scope_ebpf.analysis.plaintext import tie_to_connections
from scope_ebpf.recording.reader import Recording

# Kinds of connections over which requests and responses go.
TALKING_KINDS = ("tcp", "mptcp", "unix", "unix-seqpacket", "udp")

_COLUMNS = ["connection", "fd", "tgid", "tid", "context", "start_ns", "duration_ns", "length_bytes"]
_COLUMNS += ["stream", "exact", "payload"]


@dataclass(frozen=True)
class Wire:
    """Messages sorted by connection, then by the time at which their bytes moved.

    All arrays have one element per message. Without peeks, which move nothing.

    - `connection`, `fd`, `tgid`, `tid`, `context`
    - `receive`: else it is a send
    - `start_ns`, `end_ns`: of the call
    - `moved_ns`: the end of a receive, the start of a send
    - `length`: bytes; 0 is the end of the stream
    - `stream`, `begin`: the first byte's stream and its position there; TCP: modulo 2**32
    - `exact`: `begin` is comparable with the other end's
    - `payload`: a Binary series, null where none was kept
    """

    connection: NDArray[np.uint32]
    fd: NDArray[np.uint32]
    tgid: NDArray[np.uint32]
    tid: NDArray[np.uint32]
    context: NDArray[np.uint64]
    receive: NDArray[np.bool_]
    start_ns: NDArray[np.int64]
    end_ns: NDArray[np.int64]
    moved_ns: NDArray[np.int64]
    length: NDArray[np.int64]
    stream: NDArray[np.uint64]
    begin: NDArray[np.uint64]
    exact: NDArray[np.bool_]
    payload: pl.Series

    def __len__(self) -> int:
        """How many messages there are."""
        return len(self.connection)


def read_wire(recording: Recording, connections: pl.DataFrame) -> Wire:
    """Read the messages of connections over which requests may go.

    Connections whose plain text was recorded (TLS) are read as that.

    `connections` has the columns `connection` and `kind` of the recording's table.
    """
    talking = connections.filter(pl.col("kind").is_in(TALKING_KINDS))
    rows = _selected(recording.messages.filter(~pl.col("peek")))
    frame = recording.collect(
        rows.join(talking.lazy().select("connection"), on="connection", how="semi")
    )
    plain = _plain_text(recording)
    if not plain.is_empty():
        frame = _in_plain_text(frame, plain)
    return to_wire(frame, connections)


def _selected(messages: pl.LazyFrame, *more: str) -> pl.LazyFrame:
    return messages.select(
        *_COLUMNS,
        *more,
        (pl.col("direction") == "receive").alias("receive"),
        begin=pl.col("stream_end") - pl.col("length_bytes"),
    )


def _plain_text(recording: Recording) -> pl.DataFrame:
    """What went over TLS, as messages; without what cannot be tied to a connection."""
    tls = recording.collect(recording.tls)
    if tls.is_empty():
        return pl.DataFrame()
    threads = tls.lazy().select("tgid", "tid").unique()
    messages = recording.messages.join(threads, on=["tgid", "tid"], how="semi")
    tied = tie_to_connections(tls, recording.collect(messages))
    return (
        _selected(tied.lazy().filter(pl.col("connection").is_not_null()), "stream_end")
        .with_columns(
            # Lengths of plain text say nothing of places in the ciphertext; the end of what carried
            # it does, and is the same at both ends.
            begin=pl.col("stream_end").fill_null(0),
            exact=pl.col("exact").fill_null(value=False) & pl.col("stream_end").is_not_null(),
        )
        .with_columns(pl.col("exact").fill_null(value=False))
        .collect()
    )


def _in_plain_text(messages: pl.DataFrame, plain: pl.DataFrame) -> pl.DataFrame:
    """The messages with the ciphertext of connections replaced by its plain text."""
    ends = pl.col("receive") & (pl.col("length_bytes") == 0)
    carried = plain["connection"].unique().implode()
    kept = messages.filter(~pl.col("connection").is_in(carried) | ends)
    plain = plain.with_columns(pl.col("fd").fill_null(0)).cast(messages.schema)
    return pl.concat([kept, plain.select(messages.columns)])


def to_wire(frame: pl.DataFrame, connections: pl.DataFrame) -> Wire:
    """The same from a DataFrame with the columns that `read_wire` reads."""

    def array(name: str) -> NDArray[Any]:
        return frame[name].to_numpy()

    start, receive = array("start_ns"), array("receive")
    end = start + array("duration_ns")
    moved = np.where(receive, end, start)
    order = np.lexsort((moved, array("connection")))
    length = array("length_bytes").astype(np.int64)
    begin = array("begin")
    sequenced = connections.filter(pl.col("kind").is_in(["tcp", "mptcp"]))["connection"].to_numpy()
    wraps = np.isin(array("connection"), sequenced)
    begin = np.where(wraps, begin & np.uint64(0xFFFFFFFF), begin)
    return Wire(
        connection=array("connection")[order],
        fd=array("fd")[order],
        tgid=array("tgid")[order],
        tid=array("tid")[order],
        context=array("context")[order],
        receive=receive[order],
        start_ns=start[order],
        end_ns=end[order],
        moved_ns=moved[order],
        length=length[order],
        stream=frame["stream"].fill_null(0).to_numpy()[order],
        begin=begin[order],
        exact=array("exact")[order],
        payload=frame["payload"].gather(order),
    )
