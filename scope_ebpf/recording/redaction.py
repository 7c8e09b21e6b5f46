"""Masks payload heads, and texts of the user's probes, before they reach the disk.

What the grammar of a head's protocol needs is kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
import polars as pl
from numpy.typing import NDArray

from scope_ebpf.loaders.hits import HitKind
from scope_ebpf.protocols import sql
from scope_ebpf.protocols.contract import Kept, Protocol, Roles
from scope_ebpf.protocols.heads import Heads
from scope_ebpf.protocols.masking import mask, new_key
from scope_ebpf.protocols.registry import PROTOCOLS
from scope_ebpf.recording.calls import mask_arguments
from scope_ebpf.recording.hits import CUT, TEXT_TREATMENT, as_text, treatments

# What tells one connection from another, by table.
_CONNECTIONS: Final = {"messages": ("connection",), "tls": ("tgid", "ssl")}
_UNKNOWN: Final = -1

Rows = NDArray[np.intp]
Places = NDArray[np.int8]


class Redactor:
    """Redacts one recording's payloads; its key is made here and forgotten with it.

    A connection is known by the first of its heads that some protocol recognises. From then on only
    that protocol is asked about its heads: one that it does not recognise, such as a piece of a
    body, is masked wholly, and so is every head of a connection that is not known.
    """

    def __init__(
        self,
        unredacted: bool,
        protocols: Sequence[Protocol] = PROTOCOLS,
        hit_kinds: Sequence[HitKind] = (),
    ) -> None:
        """With `unredacted` nothing is masked; `hit_kinds` are those of the table hits."""
        self.unredacted = unredacted
        self._protocols = protocols
        self._key = new_key()
        self._known = {table: _Known() for table in _CONNECTIONS}
        self._numbers: dict[object, int] = {}
        self._treatments = treatments(hit_kinds)

    def redact_all(self, frames: dict[str, pl.DataFrame]) -> None:
        """Redact the tables that have payloads or arguments, in place."""
        for table in _CONNECTIONS:
            if table in frames:
                frames[table] = self.redact(frames[table], table)
        if "hits" in frames:
            frames["hits"] = self.redact_hits(frames["hits"])
        if "calls" in frames:
            calls = frames.pop("calls")
            if not self.unredacted:
                calls = mask_arguments(calls, self._key)
            hits = frames.get("hits", calls.clear())
            frames["hits"] = pl.concat([hits, calls]).sort("time_ns")

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
        some = frame.select(*_CONNECTIONS[table], "length_bytes", "payload")
        some = some if len(rows) == len(frame) else some[rows]
        masked, which = self._masked(some, table)
        if len(rows) < len(frame):
            places = np.full(len(frame), len(masked), np.int64)
            places[rows] = which
            masked, which = pl.concat([masked, pl.Series([None], dtype=pl.Binary)]), places
        return frame.with_columns(masked.gather(which).alias("payload"))

    def redact_hits(self, frame: pl.DataFrame) -> pl.DataFrame:
        """The same rows of hits with masked texts: literals in SQL, all of others but names."""
        if self.unredacted or self._treatments.is_empty():
            return frame
        rows = frame.select("probe", "arguments").with_row_index("row")
        single = (
            rows.explode("arguments", empty_as_null=True)
            .with_columns(place=pl.int_range(pl.len()).over("row").cast(pl.Int64))
            .join(self._treatments, on=["probe", "place"], how="left", maintain_order="left")
        )
        at = np.flatnonzero(
            single.select(
                pl.col("treatment").is_not_null() & pl.col("arguments").is_not_null()
            ).to_series().to_numpy()
        )  # fmt: skip
        if not len(at):
            return frame
        masked = self._masked_texts(
            single["arguments"].gather(at),
            single["treatment"].gather(at).to_numpy() == TEXT_TREATMENT,
        )
        lists = (
            single.with_columns(single["arguments"].scatter(at, masked))
            .group_by("row", maintain_order=True)
            .agg("arguments")["arguments"]
        )
        return frame.with_columns(
            pl.when(pl.col("arguments").list.len() > 0).then(lists).otherwise("arguments")
            .alias("arguments")
        )  # fmt: skip

    def _masked_texts(self, texts: pl.Series, wholly: NDArray[np.bool_]) -> pl.Series:
        """Texts of which some are SQL, and others are masked wholly; the sign of a cut stays."""
        data = texts.cast(pl.Binary)
        heads = Heads.of(data, np.zeros(len(data), np.int64))
        ends = heads.begins + heads.lengths
        cut = np.where(texts.str.ends_with(CUT).to_numpy(), len(CUT.encode()), 0)
        stops = np.where(wholly, heads.begins, ends - cut)
        kept = sql.visible(heads.data, heads.begins, stops, sql.POSTGRESQL)
        for back in range(1, len(CUT.encode()) + 1):
            kept[ends[cut > 0] - back] = True
        return as_text(mask(heads, kept, self._key).payloads())

    def _masked(self, frame: pl.DataFrame, table: str) -> tuple[pl.Series, Rows]:
        """The different masked heads, and which of them is each row's.

        Most heads come again: both ends of a connection tell the same bytes, and programs repeat
        themselves. Each is looked at once by each protocol that it may be of.
        """
        first, which = _distinct(frame.select("length_bytes", "payload"))
        heads = _Different(frame[first])
        connections = self._connections(frame, table)
        known = self._known[table]
        place_of = known.of(connections)
        result = np.full(len(frame), -1, np.intp)
        parts: list[tuple[Heads, Kept]] = []
        count = 0
        # one protocol after the other, each also about what those before it did not claim
        for place, protocol in enumerate(self._protocols):
            rows = np.flatnonzero((place_of == place) | (place_of == _UNKNOWN))
            if not len(rows):
                continue
            chosen, number = _chosen(which[rows], len(heads))
            some = heads.take(chosen)
            roles, kept = _look(protocol, some)
            if not roles.any():
                continue
            known.add(connections[rows[roles[number] > 0]], place)
            place_of = known.of(connections)
            mine = place_of[rows] == place
            used, number = _chosen(number[mine], len(some))
            if len(used) < len(some):
                # the others are of connections that this protocol did not claim
                wanted = np.zeros(len(some), np.bool_)
                wanted[used] = True
                kept = kept[np.flatnonzero(np.repeat(wanted, some.lengths))]
                some = heads.take(chosen[used])
            parts.append((some, kept))
            result[rows[mine]] = number + count
            count += len(some)
        rest = np.flatnonzero(result < 0)
        if len(rest):
            chosen, number = _chosen(which[rest], len(heads))
            some = heads.take(chosen)
            parts.append((some, np.zeros(len(some.data), np.bool_)))
            result[rest] = number + count
        return mask(*_joined(parts), self._key).payloads(), result

    def _connections(self, frame: pl.DataFrame, table: str) -> Rows:
        """A small number for each row's connection: the recorder counts them, those of TLS we do."""
        names = _CONNECTIONS[table]
        if len(names) == 1:
            return frame[names[0]].to_numpy().astype(np.intp)
        first, which = _distinct(frame.select(names))
        ids = self._numbers
        found = [ids.setdefault(key, len(ids)) for key in frame[first].select(names).iter_rows()]
        return np.array(found, np.intp)[which]


class _Known:
    """The protocols of connections, by their places; _UNKNOWN if no head told it yet."""

    def __init__(self) -> None:
        self._places: Places = np.full(1024, _UNKNOWN, np.int8)

    def of(self, connections: Rows) -> Places:
        """Of some connections."""
        more = int(connections.max(initial=0)) + 1 - len(self._places)
        if more > 0:
            room = np.full(max(more, len(self._places)), _UNKNOWN, np.int8)
            self._places = np.concatenate([self._places, room])
        places: Places = self._places[connections]
        return places

    def add(self, connections: Rows, place: int) -> None:
        """Some connections are of a protocol, from now on."""
        self._places[connections] = place


def _distinct(frame: pl.DataFrame) -> tuple[Rows, Rows]:
    """The first of each kind of rows, and for each row which kind it is."""
    names = frame.columns
    firsts = frame.with_row_index("row").select(pl.col("row").first().over(names))
    first_of = firsts["row"].to_numpy()
    first = np.flatnonzero(first_of == np.arange(len(frame)))
    number = np.zeros(len(frame), np.intp)
    number[first] = np.arange(len(first))
    return first, number[first_of]


def _chosen(numbers: Rows, count: int) -> tuple[Rows, Rows]:
    """The different ones of some numbers below a count, and which of them each is."""
    there = np.zeros(count, np.bool_)
    there[numbers] = True
    return np.flatnonzero(there), (np.cumsum(there) - 1)[numbers]


class _Different:
    """Heads, of which some are taken now and again."""

    def __init__(self, frame: pl.DataFrame) -> None:
        self._payloads: list[bytes] = frame["payload"].to_list()
        self._lengths = np.fromiter(map(len, self._payloads), np.int64, len(frame))
        self._totals = np.maximum(frame["length_bytes"].to_numpy().astype(np.int64), self._lengths)

    def __len__(self) -> int:
        return len(self._payloads)

    def take(self, rows: Rows) -> Heads:
        """Some of them."""
        payloads, lengths = self._payloads, self._lengths[rows]
        data = np.frombuffer(b"".join([payloads[row] for row in rows.tolist()]), np.uint8)
        return Heads(data, np.cumsum(lengths) - lengths, lengths, self._totals[rows])


def _look(protocol: Protocol, heads: Heads) -> tuple[Roles, Kept]:
    """The heads' roles, and what of them may be stored: nothing of those without a role."""
    if protocol.recognise_and_keep is not None:
        return protocol.recognise_and_keep(heads)
    roles = protocol.recognise(heads)
    if not roles.any():
        return roles, np.zeros(len(heads.data), np.bool_)
    return roles, protocol.keep(heads, roles) & np.repeat(roles > 0, heads.lengths)


def _joined(parts: list[tuple[Heads, Kept]]) -> tuple[Heads, Kept]:
    """Heads of several parts one after the other."""
    lengths = np.concatenate([heads.lengths for heads, _ in parts])
    return (
        Heads(
            np.concatenate([heads.data for heads, _ in parts]),
            np.cumsum(lengths) - lengths,
            lengths,
            np.concatenate([heads.totals for heads, _ in parts]),
        ),
        np.concatenate([kept for _, kept in parts]),
    )
