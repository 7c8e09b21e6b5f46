"""Redis's wire format, RESP2 and RESP3: the items of many heads, walked at once.

https://redis.io/docs/latest/develop/reference/protocol-spec/
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
import polars as pl
from numpy.typing import NDArray

from scope_ebpf.protocols.heads import NOT_ASCII, Heads, Numbers
from scope_ebpf.protocols.masking import eight_bytes

Rows = NDArray[np.intp]
Mask = NDArray[np.bool_]

# Items of one head that are looked at.
MAX_ITEMS: Final = 128
# The longest bulk string that Redis takes, and more elements than any reply has.
_MAX_NUMBER: Final = 1 << 31
_MAX_LINE: Final = 1024
_DIGITS: Final = 10

_LINE, _BULK, _AGGREGATE = 1, 2, 3
_SORTS: Final = np.zeros(256, np.uint8)
for _letters, _sort in ((b"+-:_,#(", _LINE), (b"$!=", _BULK), (b"*%~>|", _AGGREGATE)):
    _SORTS[list(_letters)] = _sort

BULK, ARRAY, PUSH, ATTRIBUTE = b"$*>|"
SIMPLE, ERROR, INTEGER, NULL, DOUBLE, BOOLEAN = b"+-:_,#"


@dataclass(frozen=True)
class Items:
    """Items of some heads, in their order; those of one head follow each other.

    - `head`: which head; `order`: its number there, from 0
    - `kind`: its type byte; `number`: the count or length that it begins with, -1 for a null
    - `at`: where it begins in the heads' data; `begin`, `end`: its content there, as far as it was
      captured: of a bulk string the string, of an aggregate nothing, of others their line
    - `whole`: all of its content was captured
    - `top`: it is a reply or request of its own, not a part of one
    """

    head: Rows
    order: Numbers
    kind: NDArray[np.uint8]
    number: Numbers
    at: Numbers
    begin: Numbers
    end: Numbers
    whole: Mask
    top: Mask

    def __len__(self) -> int:
        """How many items there are, of all heads."""
        return len(self.head)

    def take(self, rows: Rows | Mask) -> Items:
        """Some of them, in their order."""
        return Items(*(getattr(self, name)[rows] for name in self.__dataclass_fields__))


def walk(heads: Heads, rows: Rows, limit: int = MAX_ITEMS) -> tuple[Items, Mask, Numbers]:
    """The items of the chosen heads, at most `limit` of each.

    An item that is not well formed ends its head's items, and so does one that the head cuts before
    its line's end. Returned as well: for each of the chosen heads whether nothing was ill-formed, and
    where the items that are cut begin.
    """
    data = padded(heads)
    line_ends = _line_ends(data)
    at = heads.begins[rows]
    stop = at + heads.lengths[rows]
    waiting = np.zeros(len(rows), np.int64)
    sound = np.ones(len(rows), np.bool_)
    alive = np.flatnonzero(at < stop)
    steps: list[tuple[NDArray[np.generic], ...]] = []
    counts = np.zeros(len(rows), np.int64)
    cuts = [np.zeros(0, np.int64)]
    while len(alive) and len(steps) < limit:
        begin, last = at[alive], stop[alive]
        kind = data[begin]
        sort = _SORTS[kind]
        line = line_ends[np.searchsorted(line_ends, begin)]
        ended = line < last - 1
        bulk, aggregate, lined = sort == _BULK, sort == _AGGREGATE, sort == _LINE
        counted = bulk | aggregate
        number, good = _number(data, begin + 1, np.where(counted & ended, line, begin + 1))
        good &= counted & ended
        good |= lined & ended & (line - begin <= _MAX_LINE)
        # A line that the head cuts is no item, and nothing wrong either.
        wrong = ~good & (ended | (sort == 0))
        cuts.append(begin[~ended & (sort > 0)])
        content = np.where(lined, begin + 1, line + 2)
        length = np.where(bulk, np.maximum(number, 0), 0)
        end = np.where(lined, line, content + length)
        # what follows: another \r\n after a bulk string that is not null
        after = np.where(bulk & (number >= 0), end + 2, line + 2)
        whole = end <= last
        tail = bulk & (number >= 0) & (after <= last)
        wrong |= (
            good
            & tail
            & ((data[np.minimum(end, last)] != 13) | (data[np.minimum(end + 1, last)] != 10))
        )
        sound[alive[wrong]] = False
        good &= ~wrong
        top = waiting[alive] == 0
        inner = np.where(aggregate, np.maximum(number, 0), 0)
        inner <<= (kind == ord("%")) | (kind == ord("|"))
        waiting[alive] += inner - ~top
        going = np.flatnonzero(good)
        steps.append(
            (
                alive[going],
                np.full(len(going), len(steps)),
                kind[going],
                number[going],
                begin[going],
                np.minimum(content, last)[going],
                np.minimum(end, last)[going],
                whole[going],
                top[going],
            )
        )
        counts[alive[going]] += 1
        at[alive] = after
        alive = alive[going]
        alive = alive[at[alive] < stop[alive]]
    return _in_order(steps, counts, rows), sound, np.concatenate(cuts)


def _in_order(steps: list[tuple[NDArray[np.generic], ...]], counts: Numbers, rows: Rows) -> Items:
    """Items by head, from those by step."""
    if not steps:
        none = np.zeros(0, np.int64)
        return Items(
            none, none, none.astype(np.uint8), none, none, none, none,
            none.astype(np.bool_), none.astype(np.bool_),
        )  # fmt: skip
    columns = [np.concatenate(column) for column in zip(*steps, strict=True)]
    chosen, order = columns[0].astype(np.intp), columns[1].astype(np.int64)
    places = (np.cumsum(counts) - counts)[chosen] + order
    back = np.empty(len(places), np.intp)
    back[places] = np.arange(len(places))
    columns[0] = rows[chosen]
    return Items(*(column[back] for column in columns))


def _line_ends(data: NDArray[np.uint8]) -> Numbers:
    """Where each \\r\\n is, and one behind everything."""
    returns = np.flatnonzero(data == 13)
    returns = returns[:-1] if len(returns) and returns[-1] == len(data) - 1 else returns
    return np.append(returns[data[returns + 1] == 10], len(data))


def _number(data: NDArray[np.uint8], begin: Numbers, end: Numbers) -> tuple[Numbers, Mask]:
    """The number between two places, and whether it is one: up to 10 digits, or -1."""
    length = end - begin
    good = (length > 0) & (length <= _DIGITS)
    value = np.zeros(len(begin), np.int64)
    null = (length == 2) & (data[begin] == ord("-")) & (data[begin + 1] == ord("1"))
    active = np.flatnonzero(good)
    place = 0
    while len(active):
        digit = data[begin[active] + place].astype(np.int64) - ord("0")
        right = (digit >= 0) & (digit <= 9)
        good[active[~right]] = False
        value[active] = value[active] * 10 + digit
        place += 1
        active = active[right & (length[active] > place)]
    good &= value < _MAX_NUMBER
    return np.where(null, -1, np.where(good, value, 0)), good | null


class Names:
    """A set of words, looked up for many places of a buffer at once; letters of any case.

    Each word of up to 24 bytes is three words of 8 bytes, and those make a number that no other word
    of the set makes.
    """

    WIDTH: Final = 24

    def __init__(self, words: tuple[str, ...]) -> None:
        """A set; a word's id is its place in `words`."""
        self._words = words
        table = np.array([word.encode().upper() for word in words], f"S{self.WIDTH}")
        parts = table.view(np.uint64).reshape(len(words), 3)
        self._parts = [parts[:, place].copy() for place in range(3)]
        self._lengths = np.array([len(word) for word in words])
        random = np.random.default_rng(1)
        while True:
            self._factors = random.integers(1, 1 << 63, 3, np.uint64) | np.uint64(1)
            numbers = self._mix(self._parts)
            if len(np.unique(numbers)) == len(words):
                break
        self._ids = np.zeros(1 << 16, np.int64)
        self._ids[numbers] = np.arange(len(words))

    def find_word(self, word: str) -> int:
        """The id of one word of the set."""
        return self._words.index(word)

    def find(self, data: NDArray[np.uint8], begin: Numbers, end: Numbers) -> Numbers:
        """The id of the word between two places; -1 for none. `data` goes on 24 bytes behind."""
        length = np.clip(end - begin, 0, self.WIDTH)
        windows = eight_bytes(data)
        parts = []
        for place in range(3):
            inside = np.clip(length - 8 * place, 0, 8)
            word = windows[np.minimum(begin + 8 * place, len(windows) - 1)] & _INSIDE[inside]
            parts.append(np.take(_UPPER, word.view(np.uint8)).view(np.uint64))
        ids = self._ids[self._mix(parts)]
        same = end - begin == self._lengths[ids]
        for mine, theirs in zip(self._parts, parts, strict=True):
            same &= mine[ids] == theirs
        return np.where(same, ids, -1)

    def _mix(self, parts: list[NDArray[np.uint64]]) -> NDArray[np.intp]:
        mixed = np.zeros(len(parts[0]), np.uint64)
        for factor, part in zip(self._factors, parts, strict=True):
            mixed = (mixed ^ part) * factor
            mixed ^= mixed >> np.uint64(29)
        return (mixed >> np.uint64(48)).astype(np.intp)


_INSIDE: Final = np.array([(1 << 8 * count) - 1 for count in range(9)], np.uint64)
_UPPER: Final = np.array(
    [ord(chr(byte).upper()) if byte < 0x80 else byte for byte in range(256)], np.uint8
)


def ranges(begin: Numbers, length: Numbers) -> Numbers:
    """All places of some ranges, one range after the other."""
    order = np.cumsum(length) - length
    places: Numbers = np.arange(length.sum()) + np.repeat(begin - order, length)
    return places


def begins_item(letters: NDArray[np.uint8]) -> Mask:
    """Which bytes can begin an item."""
    begins: Mask = _SORTS[letters] > 0
    return begins


def padded(heads: Heads) -> NDArray[np.uint8]:
    """The heads' bytes, with room behind for whoever looks at some bytes at once."""
    return np.concatenate([heads.data, np.zeros(48, np.uint8)])


def ascii_text(data: NDArray[np.uint8]) -> str:
    """Bytes as text, a character for each; one that is not ASCII becomes DEL, as in Heads.text."""
    return np.where(data < 0x80, data, NOT_ASCII).tobytes().decode("ascii")


def nulls(count: int) -> pl.Series:
    """A String column without values."""
    return pl.Series([None], dtype=pl.String).new_from_index(0, count)


def pieces(text: str, items: Items, rows: Rows, there: Mask) -> pl.Series:
    """The content of some items, from the text of all heads; null where there is none."""
    if not len(items):
        return nulls(len(rows))
    begins, ends = items.begin[rows].tolist(), items.end[rows].tolist()
    content = [
        text[begin:end] if good else None
        for begin, end, good in zip(begins, ends, there.tolist(), strict=True)
    ]
    return pl.Series(content, dtype=pl.String)
