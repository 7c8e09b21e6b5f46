"""The tables that analysis makes of a recording: spans, requests, edges."""

from __future__ import annotations

from typing import Final

import polars as pl

SPAN_KIND: Final = pl.Enum(["server", "client", "consumer", "fault"])
EDGE: Final = pl.Enum(
    ["calls", "continues", "queued_by", "triggered_by", "woken_by", "forked_by", "caused_by"]
)
EVIDENCE: Final = pl.Enum(["exact", "derived", "guess"])
SPAN_STATE: Final = pl.Enum(["complete", "began_before", "open", "no_response", "one_way"])

# One row per span: one side of one exchange (request and response), a job, or a fault.
SPANS: Final = pl.Schema(
    {
        "span_id": pl.UInt64(),  # unique in the recording, and the same at each analysis of it
        "parent_id": pl.UInt64(),  # span_id; null: none is known
        "edge": EDGE,  # what the parent did to bring it about; null: no parent
        "evidence": EVIDENCE,  # null: no parent
        "request_id": pl.UInt64(),  # span_id of the root of its tree, perhaps itself
        # server: it handled a request. client: it made one. consumer: it worked on a job or message.
        # fault: something broke (a process died, nobody listened).
        "kind": SPAN_KIND,
        "service": pl.String(),  # name of the process's service
        "tgid": pl.UInt32(),
        "tid": pl.UInt32(),
        "context": pl.UInt64(),  # logical context within the thread, 0: the thread itself
        "protocol": pl.String(),  # http, postgresql, redis, …; null: not recognised
        "operation": pl.String(),  # folded: GET /users/{id}
        "detail": pl.String(),  # as it was sent, redacted unless recorded with --unredacted
        "start_ns": pl.Int64(),  # CLOCK_MONOTONIC
        "duration_ns": pl.Int64(),
        "status": pl.String(),  # as the protocol says it: 200, OK, nil, a SQLSTATE; null: not known
        "error": pl.String(),  # why it failed; null: it did not, as far as is known
        "miss": pl.Boolean(),  # a cache had nothing
        "peer": pl.String(),  # the other end: its service, or its address if it was not recorded
        "connection": pl.UInt32(),  # id in connections; null: none was made
        "request_bytes": pl.Int64(),
        "response_bytes": pl.Int64(),
        # complete; began_before: its request came before the recording; open: it went on when the
        # recording ended; no_response: the connection ended first; one_way: none was expected
        "state": SPAN_STATE,
    }
)

# Where the time of a request's handling thread went; the parts and `other_ns` add up to duration_ns.
PARTS: Final = pl.List(
    pl.Struct({"peer": pl.String(), "protocol": pl.String(), "wait_ns": pl.Int64()})
)

# One row per request that a traced server handled, and per job that a worker did.
REQUESTS: Final = pl.Schema(
    {
        "span_id": pl.UInt64(),
        "request_id": pl.UInt64(),  # of the tree it belongs to; equal to span_id where it is the root
        "kind": SPAN_KIND,  # server or consumer
        "entry": pl.Boolean(),  # no request or job that was recorded is known to have caused it
        "start_ns": pl.Int64(),
        "duration_ns": pl.Int64(),
        "service": pl.String(),
        "tgid": pl.UInt32(),
        "tid": pl.UInt32(),
        "protocol": pl.String(),
        "operation": pl.String(),
        "detail": pl.String(),
        "status": pl.String(),
        "error": pl.String(),
        "state": SPAN_STATE,
        "spans": pl.UInt32(),  # downstream spans, all levels
        "cpu_ns": pl.Int64(),  # the handling thread ran; these five and waits add up to duration_ns
        "runqueue_ns": pl.Int64(),  # it was ready to run, waiting for a CPU
        "disk_ns": pl.Int64(),
        "lock_ns": pl.Int64(),  # futex: locks, the GIL, condition variables
        "other_ns": pl.Int64(),  # not understood, or not recorded
        "waits": PARTS,  # waiting for each kind of peer, longest first
    }
)
# In an event loop the thread's time is not one request's: there only `waits` is known, from the calls
# that the request made, and the rest is `other_ns`.

# One row per causal edge: every parent of `spans`, and what else is known to have led to a span.
EDGES: Final = pl.Schema(
    {
        "cause_id": pl.UInt64(),
        "effect_id": pl.UInt64(),
        "edge": EDGE,
        "evidence": EVIDENCE,
        "reason": pl.String(),  # what proves it, in a few words
        "parent": pl.Boolean(),  # it is the effect's parent in spans
    }
)

# One row per overlap of a send with a receive of the same stream, and per message without any.
MATCHED: Final = pl.Schema(
    {
        "stream": pl.UInt64(),
        "length_bytes": pl.Int64(),  # that both moved; of an unmatched message: its own
        "send_start_ns": pl.Int64(),
        "send_duration_ns": pl.Int64(),
        "send_tgid": pl.UInt32(),
        "send_tid": pl.UInt32(),
        "send_context": pl.UInt64(),
        "send_connection": pl.UInt32(),
        "receive_start_ns": pl.Int64(),
        "receive_duration_ns": pl.Int64(),
        "receive_tgid": pl.UInt32(),
        "receive_tid": pl.UInt32(),
        "receive_context": pl.UInt64(),
        "receive_connection": pl.UInt32(),
        # null: matched. Else why not: `peer not traced`, `before the recording`, `lost`, `inexact`,
        # `never received`
        "unmatched": pl.String(),
    }
)


def span_text(span_id: int) -> str:
    """A span's id as users see and copy it: 16 hexadecimal digits; any unique beginning will do."""
    return f"{span_id:016x}"
