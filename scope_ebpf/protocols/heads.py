"""Payload heads as one flat buffer, so that a protocol looks at all of them at once."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import polars as pl
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]
Numbers = NDArray[np.int64]

# What `text` puts in place of a byte that is not ASCII: DEL, which no protocol here sends itself.
NOT_ASCII = 0x7F
_ASCII = bytes(byte if byte < 0x80 else NOT_ASCII for byte in range(256))


@dataclass(frozen=True)
class Heads:
    """The first bytes of some messages.

    - `data`: the captured bytes, one head after the other, without gaps
    - `begins`: where each head begins in `data`
    - `lengths`: how many bytes of it were captured
    - `totals`: how long the whole message was: at least `lengths`, more for a truncated head
    """

    data: Bytes
    begins: Numbers
    lengths: Numbers
    totals: Numbers

    def __len__(self) -> int:
        """How many heads there are."""
        return len(self.begins)

    @staticmethod
    def of(payloads: pl.Series, totals: Numbers) -> Heads:
        """From a Binary series and the length of each whole message; a null is an empty head."""
        values = [value or b"" for value in payloads.to_list()]
        data = np.frombuffer(b"".join(values), np.uint8)
        lengths = np.fromiter(map(len, values), np.int64, len(values))
        return Heads(data, np.cumsum(lengths) - lengths, lengths, np.maximum(totals, lengths))

    def take(self, rows: NDArray[np.intp] | NDArray[np.bool_]) -> Heads:
        """Some of them, by position or mask."""
        if rows.dtype == np.bool_:
            rows = np.flatnonzero(rows)
        lengths, first = self.lengths[rows], self.begins[rows]
        # slices of bytes: an index for each byte would take ten times as long
        whole = self.data.data
        ends = (first + lengths).tolist()
        pieces = [whole[begin:end] for begin, end in zip(first.tolist(), ends, strict=True)]
        data = np.frombuffer(b"".join(pieces), np.uint8)
        return Heads(data, np.cumsum(lengths) - lengths, lengths, self.totals[rows])

    def matrix(self, width: int, skip: int = 0) -> Bytes:
        """`width` bytes of each head, from `skip` on: shape (n, width), zero where there are none."""
        columns = np.arange(skip, skip + width)
        inside = columns < self.lengths[:, None]
        places = np.where(inside, self.begins[:, None] + columns, 0)
        if not len(self.data):
            return np.zeros(inside.shape, np.uint8)
        return np.where(inside, self.data[places], 0).astype(np.uint8)

    def text(self) -> pl.Series:
        """The heads as a String series; each byte that is not ASCII becomes DEL, so lengths stay."""
        whole = self.data.tobytes().translate(_ASCII).decode("ascii")
        ends = (self.begins + self.lengths).tolist()
        pieces = [whole[begin:end] for begin, end in zip(self.begins.tolist(), ends, strict=True)]
        return pl.Series("text", pieces, dtype=pl.String)

    def payloads(self) -> pl.Series:
        """The heads as a Binary series."""
        whole = self.data.tobytes()
        ends = (self.begins + self.lengths).tolist()
        pieces = [whole[begin:end] for begin, end in zip(self.begins.tolist(), ends, strict=True)]
        return pl.Series("payload", pieces, dtype=pl.Binary)
