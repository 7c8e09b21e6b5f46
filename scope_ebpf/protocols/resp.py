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

# Items of one head that are looked at; a power of two.
MAX_ITEMS: Final = 128
# So many heads at a time that what numpy makes of them stays in a CPU's cache.
_BLOCK: Final = 4096
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
        if rows.dtype == np.bool_:
            rows = np.flatnonzero(rows)
        return Items(*(getattr(self, name)[rows] for name in self.__dataclass_fields__))


@dataclass(frozen=True)
class Walked:
    """The items of some heads, and how each head's items end.

    - `wrong_at`: of each of the chosen heads: the number of its first ill-formed item, or `MAX_ITEMS`
    - `cuts`, `cut_heads`: where the items begin that the head cuts before their line's end, and
      which heads these are
    """

    items: Items
    wrong_at: Numbers
    cuts: Numbers
    cut_heads: Rows


def walk(heads: Heads, rows: Rows, limit: int = MAX_ITEMS) -> tuple[Items, Mask, Numbers]:
    """The items of the chosen heads (ascending), at most `limit` of each.

    Returned as well: for each of the chosen heads whether none of these was ill-formed, and where
    the items that are cut begin.
    """
    found = follow(heads, rows)
    items = found.items
    if limit < MAX_ITEMS:
        items = items.take(items.order < limit)
    return items, found.wrong_at >= limit, found.cuts


def follow(heads: Heads, rows: Rows) -> Walked:
    """The items of the chosen heads (ascending), at most `MAX_ITEMS` of each.

    An item that is not well formed ends its head's items, and so does one that the head cuts before
    its line's end.
    """
    blocks = [_follow(heads, rows[at : at + _BLOCK]) for at in range(0, len(rows), _BLOCK)]
    if len(blocks) == 1:
        return blocks[0]
    if not blocks:
        nothing = _no_items()
        return Walked(nothing, nothing.at, nothing.at, nothing.head)
    columns = [
        np.concatenate([getattr(block.items, name) for block in blocks])
        for name in Items.__dataclass_fields__
    ]
    return Walked(
        Items(*columns),
        np.concatenate([block.wrong_at for block in blocks]),
        np.concatenate([block.cuts for block in blocks]),
        np.concatenate([block.cut_heads for block in blocks]),
    )


def _no_items() -> Items:
    none = np.zeros(0, np.int64)
    flags = none.astype(np.bool_)
    return Items(none, none, none.astype(np.uint8), none, none, none, none, flags, flags)


def _follow(heads: Heads, rows: Rows) -> Walked:
    """Look at each line as if an item began there, then follow the items from each head's begin.

    What is after an item is the begin of a line, so no item begins anywhere else.
    """
    wrong_at = np.full(len(rows), MAX_ITEMS, np.int64)
    filled = np.flatnonzero(heads.lengths[rows])
    if not len(filled):
        nothing = _no_items()
        return Walked(nothing, wrong_at, nothing.at, nothing.head)
    head_begins = heads.begins[rows[filled]]
    head_stops = head_begins + heads.lengths[rows[filled]]
    first, last = int(head_begins[0]), int(head_stops[-1])
    data = np.zeros(last - first + 48, np.uint8)
    data[: last - first] = heads.data[first:last]
    head_begins, head_stops = head_begins - first, head_stops - first
    line_ends = _line_ends(data)
    begin = _possible_begins(data, line_ends, head_begins, head_stops)
    of = np.searchsorted(head_begins, begin, "right") - 1
    stop = head_stops[of]
    kind = data[begin]
    sort = _SORTS[kind]
    line = line_ends[np.searchsorted(line_ends, begin)]
    ended = line < stop - 1
    bulk, aggregate, lined = sort == _BULK, sort == _AGGREGATE, sort == _LINE
    counted = (bulk | aggregate) & ended
    number, good = np.zeros(len(begin), np.int64), lined & ended & (line - begin <= _MAX_LINE)
    some = np.flatnonzero(counted)
    number[some], good[some] = _number(data, begin[some] + 1, line[some])
    # A line that the head cuts is no item, and nothing wrong either.
    wrong = ~good & (ended | (sort == 0))
    content = np.where(lined, begin + 1, line + 2)
    # a null has nothing behind its line
    sized = bulk & (number >= 0)
    end = np.where(sized, content + number, np.where(lined, line, content))
    after = np.where(sized, end + 2, line + 2)
    some = np.flatnonzero(good & sized & (after <= stop))
    some = some[(data[end[some]] != 13) | (data[end[some] + 1] != 10)]
    wrong[some], good[some] = True, False
    count = len(begin)
    goes_on = good & (after < stop)
    follows = np.where(goes_on, np.searchsorted(begin, after), count)
    # where nothing can begin, what follows is wrong
    lost = goes_on & (np.append(begin, -1)[follows] != after)
    follows[lost] = count
    reached = np.flatnonzero(_reached(follows, np.searchsorted(begin, head_begins)))
    heads_of = of[reached]
    starts = np.searchsorted(heads_of, np.arange(len(filled)))
    number_of = np.arange(len(reached)) - starts[heads_of]
    wrong_at[filled[heads_of]] = np.where(
        wrong[reached], number_of, np.where(lost[reached], number_of + 1, MAX_ITEMS)
    )
    fine = good[reached]
    cut = reached[np.flatnonzero(~fine)]
    cut = cut[~ended[cut] & (sort[cut] > 0)]
    places = np.flatnonzero(fine)
    chosen, number_of = reached[places], number_of[places]
    of_chosen = of[chosen]
    inner = np.where(aggregate[chosen], np.maximum(number[chosen], 0), 0)
    inner <<= (kind[chosen] == ord("%")) | (kind[chosen] == ord("|"))
    stop = stop[chosen]
    end = end[chosen]
    items = Items(
        rows[filled[of_chosen]],
        number_of,
        kind[chosen],
        number[chosen],
        begin[chosen] + first,
        np.minimum(content[chosen], stop) + first,
        np.minimum(end, stop) + first,
        end <= stop,
        _tops(inner, of_chosen),
    )
    return Walked(items, wrong_at, begin[cut] + first, rows[filled[of[cut]]])


def _possible_begins(
    data: NDArray[np.uint8], line_ends: Numbers, head_begins: Numbers, head_stops: Numbers
) -> Numbers:
    """Where heads begin, and lines of them that look like an item: sorted."""
    behind = line_ends[:-1] + 2
    behind = behind[_SORTS[data[behind]] > 0]
    at = np.searchsorted(head_begins, behind, "right") - 1
    inside = (at >= 0) & (behind < head_stops[at]) & (behind != head_begins[at])
    return np.sort(np.concatenate([head_begins, behind[inside]]), kind="stable")


def _reached(follows: NDArray[np.intp], begins: NDArray[np.intp]) -> Mask:
    """Which places are among the first MAX_ITEMS of a chain; `follows`: the next one, or the end."""
    count = len(follows)
    reached = np.zeros(count + 1, np.bool_)
    reached[begins] = True
    jump = np.append(follows, count)
    for _ in range(MAX_ITEMS.bit_length() - 1):
        reached[jump[np.flatnonzero(reached)]] = True
        jump = jump[jump]
        if jump.min() == count:
            break
    return reached[:count]


def _tops(inner: Numbers, heads: Rows) -> Mask:
    """Which items are no part of another; `inner`: how many each says that are its parts."""
    # So many items are still to come as parts: it falls to a new low when all are there.
    open_parts = np.cumsum(inner - 1) - (inner - 1)
    starts = np.ones(len(heads), np.bool_)
    starts[1:] = heads[1:] != heads[:-1]
    number = np.cumsum(starts) - 1
    open_parts -= open_parts[starts][number]
    # Each head lower than those before it.
    open_parts -= number << 40
    lowest = np.minimum.accumulate(open_parts)
    starts[1:] |= open_parts[1:] < lowest[:-1]
    return starts


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
