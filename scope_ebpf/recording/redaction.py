"""Masks payload heads before they reach the disk, but for what their protocol's grammar needs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final

import numpy as np
import polars as pl

from scope_ebpf.protocols.contract import Kept, Protocol
from scope_ebpf.protocols.heads import Heads
from scope_ebpf.protocols.masking import mask, new_key
from scope_ebpf.protocols.registry import PROTOCOLS

# What tells one connection from another, by table.
_CONNECTIONS: Final = {"messages": ("connection",), "tls": ("tgid", "ssl")}
_UNKNOWN: Final = -1

# A head's bytes, and the length of its message, too, where the head is only the begin of it.
Head = bytes | tuple[bytes, int]

# So many bytes of heads make a generation of what is remembered; there are two.
_GENERATION_BYTES: Final = 1 << 20
_BYTES_OF_ENTRY: Final = 200  # of objects and of the table, apart from the heads' bytes
_NOT_YET: Final = b""


class Redactor:
    """Redacts one recording's payloads; its key is made here and forgotten with it.

    A connection is known by the first of its heads that some protocol recognises. From then on only
    that protocol is asked about its heads: one that it does not recognise, such as a piece of a
    body, is masked wholly, and so is every head of a connection that is not known.

    Most heads come again: both ends of a connection tell the same bytes, and programs repeat
    themselves. So what became of a head is remembered for a while, and only new ones are looked at.
    """

    def __init__(self, unredacted: bool, protocols: Sequence[Protocol] = PROTOCOLS) -> None:
        """With `unredacted` nothing is masked."""
        self.unredacted = unredacted
        self._protocols = protocols
        self._key = new_key()
        self._known: dict[str, dict[object, int]] = {table: {} for table in _CONNECTIONS}
        # One for each protocol; the last one for what is masked wholly.
        self._memories = [_Memory() for _ in range(len(protocols) + 1)]
        self._fresh: list[_Fresh] = []

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
        there = frame["payload"].is_not_null()
        rows = np.flatnonzero(there.to_numpy())
        if not len(rows):
            return frame
        columns = [*_CONNECTIONS[table], "length_bytes", "payload"]
        some = frame.select(columns) if len(rows) == len(frame) else frame.select(columns)[rows]
        if sum(memory.size for memory in self._memories) > _GENERATION_BYTES:
            for memory in self._memories:
                memory.forget()
        masked = pl.Series("payload", self._masked(some, table), dtype=pl.Binary)
        if len(rows) < len(frame):
            places = np.full(len(frame), len(rows), np.int64)
            places[rows] = np.arange(len(rows))
            nothing = pl.Series("payload", [None], dtype=pl.Binary)
            masked = pl.concat([masked, nothing]).gather(places)
        return frame.with_columns(masked)

    def _masked(self, frame: pl.DataFrame, table: str) -> list[bytes | None]:
        """The masked payload of each row."""
        payloads: list[bytes] = frame["payload"].to_list()
        heads: list[Head] = list(payloads)
        lengths = frame["length_bytes"]
        for row in (lengths > frame["payload"].bin.size()).arg_true().to_list():
            heads[row] = (payloads[row], lengths[row])
        protocols = self._protocols_of(frame, table, heads)
        for place in sorted(set(protocols) - {_UNKNOWN}):
            self._learn(
                place, [head for head, of in zip(heads, protocols, strict=True) if of == place]
            )
        seen = [memory.seen for memory in self._memories]
        # None: not of its connection's protocol, or that is not known
        found = [seen[of].get(head) for head, of in zip(heads, protocols, strict=True)]
        rest = [row for row, result in enumerate(found) if result is None]
        self._learn(_UNKNOWN, [payloads[row] for row in rest])
        self._mask()
        found = [seen[of].get(head) for head, of in zip(heads, protocols, strict=True)]
        for row in rest:
            found[row] = seen[_UNKNOWN][payloads[row]]
        return found

    def _protocols_of(self, frame: pl.DataFrame, table: str, heads: list[Head]) -> list[int]:
        """The protocol of each row's connection, by its place; _UNKNOWN if no head told it yet."""
        known = self._known[table]
        columns = [frame[name].to_list() for name in _CONNECTIONS[table]]
        keys: list[object] = columns[0] if len(columns) == 1 else list(zip(*columns, strict=True))
        waiting = [row for row, key in enumerate(keys) if key not in known]
        # one protocol after the other, each about what those before it did not claim
        for place, memory in enumerate(self._memories[:-1]):
            if not waiting:
                break
            self._learn(place, [heads[row] for row in waiting])
            for row in waiting:
                if memory.seen[heads[row]] is not None:
                    known.setdefault(keys[row], place)
            waiting = [row for row in waiting if keys[row] not in known]
        return [known.get(key, _UNKNOWN) for key in keys]

    def _learn(self, place: int, heads: Iterable[Head]) -> None:
        """Look at those heads that are new to a protocol."""
        memory = self._memories[place]
        new = memory.missing(heads)
        if not new:
            return
        some = _heads(new)
        kept: Kept = np.zeros(len(some.data), np.bool_)
        if place != _UNKNOWN:
            protocol = self._protocols[place]
            if protocol.recognise_and_keep is not None:
                roles, kept = protocol.recognise_and_keep(some)
            else:
                roles = protocol.recognise(some)
                kept = protocol.keep(some, roles) if roles.any() else kept
            if not roles.all():
                # masked with those of nobody
                memory.seen.update(dict.fromkeys(new))
                chosen = np.flatnonzero(roles)
                kept = kept[np.repeat(roles > 0, some.lengths)]
                some = some.take(chosen)
                new = [new[row] for row in chosen.tolist()]
        memory.seen.update(dict.fromkeys(new, _NOT_YET))
        self._fresh.append((memory, new, some, kept))

    def _mask(self) -> None:
        """Mask the heads that are new in this batch, all at once."""
        if not self._fresh:
            return
        fresh, self._fresh = self._fresh, []
        data = np.concatenate([heads.data for _, _, heads, _ in fresh])
        lengths = np.concatenate([heads.lengths for _, _, heads, _ in fresh])
        begins = np.cumsum(lengths) - lengths
        kept = np.concatenate([kept for *_, kept in fresh])
        masked = mask(Heads(data, begins, lengths, lengths), kept, self._key).data.tobytes()
        ends = (begins + lengths).tolist()
        pieces = [masked[begin:end] for begin, end in zip(begins.tolist(), ends, strict=True)]
        first = 0
        for memory, heads, _, _ in fresh:
            memory.add(heads, pieces[first : first + len(heads)])
            first += len(heads)


class _Memory:
    """What became of the heads that were seen lately, by one reading of them.

    `seen`: head to masked head; None: not of this protocol.
    """

    def __init__(self) -> None:
        self.seen: dict[Head, bytes | None] = {}
        self.size = 0
        self._before: dict[Head, bytes | None] = {}

    def forget(self) -> None:
        """Begin a generation: only what is asked for again goes on to it."""
        self.seen, self._before, self.size = {}, self.seen, 0

    def missing(self, heads: Iterable[Head]) -> list[Head]:
        """Those of the heads, each once, that are in neither generation."""
        new = [head for head in dict.fromkeys(heads) if head not in self.seen]
        self.size += _BYTES_OF_ENTRY * len(new)
        if self._before:
            again = [head for head in new if head in self._before]
            self.seen.update((head, self._before[head]) for head in again)
            new = [head for head in new if head not in self.seen]
        return new

    def add(self, heads: list[Head], masked: list[bytes]) -> None:
        """Take what became of heads that were missing."""
        self.seen.update(zip(heads, masked, strict=True))
        self.size += 2 * sum(map(len, masked))


_Fresh = tuple[_Memory, list[Head], Heads, Kept]


def _heads(heads: list[Head]) -> Heads:
    values = [head if isinstance(head, bytes) else head[0] for head in heads]
    lengths = np.fromiter(map(len, values), np.int64, len(values))
    totals = lengths.copy()
    for row, head in enumerate(heads):
        if not isinstance(head, bytes):
            totals[row] = head[1]
    return Heads(
        np.frombuffer(b"".join(values), np.uint8), np.cumsum(lengths) - lengths, lengths, totals
    )
