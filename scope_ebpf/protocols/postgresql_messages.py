"""The framing of PostgreSQL's protocol 3: a type byte, a length of four bytes, a body.

https://www.postgresql.org/docs/current/protocol-message-formats.html
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from scope_ebpf.protocols.heads import Bytes, Heads, Numbers

# Further messages of one head are not looked at, and not stored while payloads are redacted.
MOST_MESSAGES = 32

_MOST_LENGTH = 1 << 30  # PostgreSQL's own limit for one message
_ANY = _MOST_LENGTH

# Type -> length field: smallest and largest.
_LENGTHS_OF_REQUESTS: Final = {
    "Q": (5, _ANY),  # simple query
    "P": (8, _ANY),  # Parse
    "B": (12, _ANY),  # Bind
    "D": (6, 4096),  # Describe
    "C": (6, 4096),  # Close
    "E": (9, 4096),  # Execute
    "H": (4, 4),  # Flush
    "S": (4, 4),  # Sync
    "X": (4, 4),  # Terminate
    "F": (14, _ANY),  # function call
    "d": (4, _ANY),  # COPY data
    "c": (4, 4),  # COPY done
    "f": (5, _ANY),  # COPY failed
    "p": (5, 1 << 16),  # password, SASL
}
_LENGTHS_OF_RESPONSES: Final = {
    "R": (8, 1 << 16),  # authentication
    "K": (12, 264),  # key for cancelling
    "S": (6, 1 << 16),  # ParameterStatus
    "Z": (5, 5),  # ReadyForQuery
    "1": (4, 4),  # ParseComplete
    "2": (4, 4),  # BindComplete
    "3": (4, 4),  # CloseComplete
    "n": (4, 4),  # NoData
    "s": (4, 4),  # PortalSuspended
    "I": (4, 4),  # EmptyQueryResponse
    "t": (6, 1 << 18),  # ParameterDescription
    "T": (6, _ANY),  # RowDescription
    "D": (6, _ANY),  # DataRow
    "C": (6, 4096),  # CommandComplete
    "E": (6, _ANY),  # ErrorResponse
    "N": (6, _ANY),  # NoticeResponse
    "A": (10, 1 << 16),  # NotificationResponse
    "G": (7, 1 << 14),  # CopyInResponse
    "H": (7, 1 << 14),  # CopyOutResponse
    "W": (7, 1 << 14),  # CopyBothResponse
    "d": (4, _ANY),
    "c": (4, 4),
    "v": (12, 1 << 16),  # NegotiateProtocolVersion
    "V": (8, _ANY),  # result of a function call
}


def _limits(lengths: dict[str, tuple[int, int]]) -> tuple[Numbers, Numbers]:
    smallest, largest = np.ones(256, np.int64), np.zeros(256, np.int64)
    for name, (low, high) in lengths.items():
        smallest[ord(name)], largest[ord(name)] = low, high
    return smallest, largest


FROM_CLIENT: Final = _limits(_LENGTHS_OF_REQUESTS)
FROM_SERVER: Final = _limits(_LENGTHS_OF_RESPONSES)


@dataclass(frozen=True)
class Messages:
    """The messages of some heads, in the order of the data, as far as they were captured.

    - `rows`: the head, `kinds`: the type byte
    - `bodies`: where the body begins, `stops`: where the message ends, at most the head's end
    - `whole`: whether all of it was captured
    - `tiled`: one per head: it is made of messages of known types and lengths, as far as it was
      captured and MOST_MESSAGES goes; the last one may go on behind it, since a server sends
      whenever it has 8 KiB
    """

    rows: Numbers
    kinds: Bytes
    bodies: Numbers
    stops: Numbers
    whole: NDArray[np.bool_]
    tiled: NDArray[np.bool_]

    def take(self, rows: NDArray[np.intp] | NDArray[np.bool_]) -> Messages:
        """Some of them."""
        if rows.dtype == np.bool_:
            rows = np.flatnonzero(rows)
        return Messages(
            self.rows[rows],
            self.kinds[rows],
            self.bodies[rows],
            self.stops[rows],
            self.whole[rows],
            self.tiled,
        )

    def of(self, *kinds: str) -> Messages:
        """Those of some types."""
        return self.take(bytes_among("".join(kinds))[self.kinds])

    def first(self) -> Messages:
        """The first one of each head that has one."""
        if not len(self.rows):
            return self
        return self.take(np.append(True, self.rows[1:] != self.rows[:-1]))


def messages(heads: Heads, limits: tuple[Numbers, Numbers], allowed: NDArray[np.bool_]) -> Messages:
    """Split the `allowed` heads into messages; one walk over all of them at once."""
    smallest, largest = limits
    data, ends = heads.data, heads.begins + heads.lengths
    tiled = allowed & (heads.lengths >= 5)
    rows = np.flatnonzero(tiled)
    here, end = heads.begins[rows], ends[rows]
    numbers = _four_bytes(data)
    found: list[tuple[NDArray[Any], ...]] = []
    for _ in range(MOST_MESSAGES):
        if not len(rows):
            break
        kinds = data[here]
        length = numbers[here + 1].astype(np.int64)
        known = (length >= smallest[kinds]) & (length <= largest[kinds])
        if not known.all():
            tiled[rows[~known]] = False
            rows, here, end = rows[known], here[known], end[known]
            kinds, length = kinds[known], length[known]
        after = here + 1 + length
        found.append((rows, kinds, here + 5, np.minimum(after, end), after <= end))
        more = np.flatnonzero(after < end)
        rows, here, end = rows[more], after[more], end[more]
        # The next header is torn only where the head is.
        cut = here + 5 > end
        if cut.any():
            torn = cut & (heads.totals[rows] - heads.lengths[rows] < here + 5 - end)
            tiled[rows[torn]] = False
            rows, here, end = rows[~cut], here[~cut], end[~cut]
    if not found:
        nothing = np.empty(0, np.int64)
        return Messages(
            nothing, nothing.astype(np.uint8), nothing, nothing, nothing.astype(np.bool_), tiled
        )
    columns = [np.concatenate(column) for column in zip(*found, strict=True)]
    if len(found) > 1:
        order = np.argsort(columns[2], kind="stable")
        columns = [column[order] for column in columns]
    return Messages(
        columns[0],
        columns[1],
        columns[2],
        columns[3],
        columns[4],
        tiled,
    )


def _four_bytes(data: Bytes) -> NDArray[np.uint32]:
    """The big-endian number of 4 bytes from each place on, and from just behind the last one."""
    room = np.zeros(len(data) + 8, np.uint8)
    room[: len(data)] = data
    return np.ndarray(len(data) + 5, ">u4", room.data, strides=(1,))


def number_at(data: Bytes, at: Numbers, size: int) -> Numbers:
    """Big-endian numbers of `size` bytes, at most 4; zeros where the data have ended."""
    numbers = _four_bytes(data)
    value = numbers[np.minimum(at, len(data))].astype(np.int64)
    return value >> (8 * (4 - size))


@lru_cache(maxsize=64)
def bytes_among(letters: str) -> NDArray[np.bool_]:
    """Which bytes are these letters, as a table to look up many bytes in."""
    table = np.zeros(256, np.bool_)
    table[[ord(letter) for letter in letters]] = True
    return table


class Strings:
    """Where the zero bytes are that end the protocol's strings."""

    def __init__(self, data: Bytes) -> None:
        self._zeros = np.append(np.flatnonzero(data == 0), len(data))

    def ends(self, begins: Numbers, stops: Numbers) -> Numbers:
        """Where the strings at `begins` end, without their zero byte; `stops` if they are cut."""
        begins = np.minimum(begins, stops)
        return np.asarray(np.minimum(self._zeros[np.searchsorted(self._zeros, begins)], stops))
