"""The framing of PostgreSQL's protocol 3: a type byte, a length of four bytes, a body.

https://www.postgresql.org/docs/current/protocol-message-formats.html
"""

from __future__ import annotations

from dataclasses import dataclass
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
        return self.take(np.isin(self.kinds, [ord(kind) for kind in kinds]))

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
    here = heads.begins[rows]
    found: list[tuple[NDArray[Any], ...]] = []
    for _ in range(MOST_MESSAGES):
        if not len(rows):
            break
        kinds = data[here]
        length = number_at(data, here + 1, 4)
        known = (length >= smallest[kinds]) & (length <= largest[kinds])
        tiled[rows[~known]] = False
        rows, here, kinds, length = rows[known], here[known], kinds[known], length[known]
        after = here + 1 + length
        end = ends[rows]
        found.append((rows, kinds.astype(np.int64), here + 5, np.minimum(after, end), after <= end))
        # The next header is torn only where the head is.
        cut = (after < end) & (after + 5 > end)
        torn = cut & (heads.totals[rows] - heads.lengths[rows] < after + 5 - end)
        tiled[rows[torn]] = False
        more = (after < end) & ~cut
        rows, here = rows[more], after[more]
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
        columns[1].astype(np.uint8),
        columns[2],
        columns[3],
        columns[4].astype(np.bool_),
        tiled,
    )


def number_at(data: Bytes, at: Numbers, size: int) -> Numbers:
    """Big-endian numbers of `size` bytes; zeros where the data have ended."""
    last = len(data) - 1
    value = np.zeros(len(at), np.int64)
    for byte in range(size):
        places = at + byte
        value = (value << 8) | np.where(places <= last, data[np.minimum(places, last)], 0)
    return value


class Strings:
    """Where the zero bytes are that end the protocol's strings."""

    def __init__(self, data: Bytes) -> None:
        self._zeros = np.append(np.flatnonzero(data == 0), len(data))

    def ends(self, begins: Numbers, stops: Numbers) -> Numbers:
        """Where the strings at `begins` end, without their zero byte; `stops` if they are cut."""
        begins = np.minimum(begins, stops)
        return np.asarray(np.minimum(self._zeros[np.searchsorted(self._zeros, begins)], stops))
