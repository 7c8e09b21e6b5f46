"""Masks payload heads before they reach the disk, but for what their protocol's grammar needs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
import polars as pl
from numpy.typing import NDArray

from scope_ebpf.protocols.contract import Kept, Protocol
from scope_ebpf.protocols.heads import Heads
from scope_ebpf.protocols.masking import mask, new_key
from scope_ebpf.protocols.registry import PROTOCOLS

# What tells one connection from another, by table.
_CONNECTIONS: Final = {"messages": ("connection",), "tls": ("tgid", "ssl")}
_UNKNOWN: Final = -1

Ids = NDArray[np.int64]


class Redactor:
    """Redacts one recording's payloads; its key is made here and forgotten with it.

    A connection is known by the first of its heads that some protocol recognises. From then on only
    that protocol is asked about its heads: one that it does not recognise, such as a piece of a
    body, is masked wholly, and so is every head of a connection that is not known.
    """

    def __init__(self, unredacted: bool, protocols: Sequence[Protocol] = PROTOCOLS) -> None:
        """With `unredacted` nothing is masked."""
        self.unredacted = unredacted
        self._protocols = protocols
        self._key = new_key()
        self._known: dict[str, dict[object, int]] = {}

    def redact_all(self, frames: dict[str, pl.DataFrame]) -> None:
        """Redact the tables that have payloads, in place."""
        for table in _CONNECTIONS:
            if table in frames:
                frames[table] = self.redact(frames[table], table)

    def redact(self, frame: pl.DataFrame, table: str = "messages") -> pl.DataFrame:
        """The same rows with masked payloads.

        Columns: those that tell the connection (`connection`, or `tgid` and `ssl` in `tls`),
        `length_bytes` and `payload`; the others are not looked at. Rows are sorted by time.
        """
        if self.unredacted:
            return frame
        rows = np.flatnonzero(frame["payload"].is_not_null().to_numpy())
        if not len(rows):
            return frame
        some = frame.select(*_CONNECTIONS[table], "length_bytes", "payload")[rows]
        # Heads of one protocol next to each other: then none of them has to be copied for it.
        protocols = self._protocols_of(some, table)
        order = np.argsort(protocols, kind="stable")
        heads = _heads(some[order])
        kept: Kept = np.zeros(len(heads.data), np.bool_)
        ends = np.searchsorted(protocols[order], np.arange(_UNKNOWN, len(self._protocols)), "right")
        for protocol, begin, end in zip(self._protocols, ends[:-1], ends[1:], strict=True):
            if begin < end:
                _keep(heads, int(begin), int(end), protocol, kept)
        masked = mask(heads, kept, self._key).payloads()
        places = np.full(len(frame), len(rows), np.int64)
        places[rows[order]] = np.arange(len(rows))
        nothing = pl.Series("payload", [None], dtype=pl.Binary)
        return frame.with_columns(pl.concat([masked, nothing]).gather(places))

    def _protocols_of(self, frame: pl.DataFrame, table: str) -> Ids:
        """The protocol of each row's connection, by its place; _UNKNOWN if no head told it yet."""
        known = self._known.setdefault(table, {})
        columns = [frame[name].to_list() for name in _CONNECTIONS[table]]
        keys: list[object] = columns[0] if len(columns) == 1 else list(zip(*columns, strict=True))
        found = np.array([known.get(key, _UNKNOWN) for key in keys], np.int64)
        fresh = np.flatnonzero(found == _UNKNOWN)
        if not len(fresh):
            return found
        heads = _heads(frame[fresh])
        waiting = np.arange(len(fresh))
        # one protocol after the other, each about what those before it did not claim
        for place, protocol in enumerate(self._protocols):
            claimed = protocol.recognise(heads.take(waiting)) > 0
            known.update((keys[row], place) for row in fresh[waiting[claimed]].tolist())
            waiting = waiting[[keys[row] not in known for row in fresh[waiting].tolist()]]
            if not len(waiting):
                break
        found[fresh] = [known.get(keys[row], _UNKNOWN) for row in fresh.tolist()]
        return found


def _heads(frame: pl.DataFrame) -> Heads:
    return Heads.of(frame["payload"], frame["length_bytes"].to_numpy().astype(np.int64))


def _keep(heads: Heads, begin: int, end: int, protocol: Protocol, kept: Kept) -> None:
    """Mark what a protocol keeps of the heads from one to another."""
    first, lengths = int(heads.begins[begin]), heads.lengths[begin:end]
    bytes_of = slice(first, first + int(lengths.sum()))
    some = Heads(
        heads.data[bytes_of], heads.begins[begin:end] - first, lengths, heads.totals[begin:end]
    )
    roles = protocol.recognise(some)
    kept[bytes_of] = protocol.keep(some, roles)
    if not roles.all():
        # what is not recognised is masked, whatever the protocol says of it
        kept[bytes_of] &= np.repeat(roles > 0, lengths)
