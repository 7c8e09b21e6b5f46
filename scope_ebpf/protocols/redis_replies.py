"""Redis's replies and pushed messages, and the columns that tell of them."""

from __future__ import annotations

from typing import Final

import numpy as np
import polars as pl
from numpy.typing import NDArray

from scope_ebpf.protocols import resp
from scope_ebpf.protocols.contract import RESPONSE_SCHEMA
from scope_ebpf.protocols.heads import Heads, Numbers
from scope_ebpf.protocols.masking import TOKEN_PATTERN
from scope_ebpf.protocols.resp import Items, Rows, ascii_text, nulls, padded, pieces

_ITEMS: Final = 32
_MAX_ERROR: Final = 300
_CODE: Final = 20
_PUSHES: Final = resp.Names(
    ("message", "smessage", "pmessage", "subscribe", "psubscribe", "ssubscribe", "unsubscribe",
     "punsubscribe", "sunsubscribe", "invalidate", "pong")
)  # fmt: skip
# By place in _PUSHES. pmessage has the pattern before the channel; the last ones name no channel.
_LAST_MESSAGE = _PATTERN_MESSAGE = 2
_LAST_CHANNEL = 8
_SHAPES: Final = {ord(letter): letter for letter in "*%~>"}


def pushed(data: NDArray[np.uint8], items: Items) -> tuple[Rows, Numbers]:
    """Words that pushed messages begin with: their items, and which words they are."""
    after = np.flatnonzero(items.top & ((items.kind == resp.ARRAY) | (items.kind == resp.PUSH))) + 1
    after = after[after < len(items)]
    after = after[(items.kind[after] == resp.BULK) & ~items.top[after] & items.whole[after]]
    word = _PUSHES.find(data, items.begin[after], items.end[after])
    return after[word >= 0], word[word >= 0]


def channels_of(items: Items, word: Rows, kind: Numbers) -> Rows:
    """Items that are channels, or patterns of them, in pushed messages."""
    rows = np.append(
        _following(items, word[kind <= _LAST_CHANNEL], 1),
        _following(items, word[kind == _PATTERN_MESSAGE], 2),
    )
    return rows[rows >= 0]


def code_size(data: NDArray[np.uint8], begin: Numbers, size: Numbers) -> Numbers:
    """How long the code is that an error line begins with: capitals, up to 20."""
    window = data[begin[:, None] + np.arange(_CODE + 1)]
    capital = (window >= ord("A")) & (window <= ord("Z"))
    capital &= np.arange(_CODE + 1) < size[:, None]
    return np.where(capital.all(axis=1), 0, np.argmin(capital, axis=1))


def _following(items: Items, rows: Rows, place: int) -> Rows:
    """The bulk string so many items behind, in the same reply; -1: there is none, or not whole."""
    last = len(items) - 1
    after = np.minimum(rows + place, last)
    good = (items.head[after] == items.head[rows]) & (
        items.order[after] == items.order[rows] + place
    )
    for between in range(1, place + 1):
        good &= ~items.top[np.minimum(rows + between, last)]
    good &= (items.kind[after] == resp.BULK) & items.whole[after] & (items.number[after] >= 0)
    return np.where(good, after, -1)


def parse_responses(heads: Heads) -> pl.DataFrame:
    """Columns of RESPONSE_SCHEMA."""
    count = len(heads)
    items, _, _ = resp.walk(heads, np.arange(count), _ITEMS)
    data = padded(heads)
    text = ascii_text(data)
    columns = dict.fromkeys(RESPONSE_SCHEMA, nulls(count))
    columns["interim"] = columns["miss"] = pl.Series([False]).new_from_index(0, count)
    if len(items):
        columns |= _statuses(items, text, count)
        columns |= _elements(items, data, text, count)
    return pl.DataFrame(
        [columns[name].cast(dtype).alias(name) for name, dtype in RESPONSE_SCHEMA.items()]
    )


def _first_replies(items: Items, count: int) -> tuple[Rows, Numbers]:
    """The first reply of each head, or -1, and how many begin in it."""
    tops = np.flatnonzero(items.top & (items.kind != resp.ATTRIBUTE))
    first = np.full(count, -1, np.int64)
    first[items.head[tops][::-1]] = tops[::-1]
    return first, np.bincount(items.head[tops], minlength=count)


def _statuses(items: Items, text: str, count: int) -> dict[str, pl.Series]:
    """`status`, `error` and `miss`. An error anywhere among several replies is the status of all."""
    first, replies = _first_replies(items, count)
    there = first >= 0
    row = np.maximum(first, 0)
    kind, number = items.kind[row], items.number[row]
    lined = np.isin(kind, np.array([resp.SIMPLE, resp.INTEGER, resp.BOOLEAN], np.uint8))
    null = (kind == resp.NULL) | ((number < 0) & np.isin(kind, [resp.BULK, resp.ARRAY]))
    null &= there
    errors = np.flatnonzero(items.kind == resp.ERROR)[::-1]
    wrong = np.full(count, -1, np.int64)
    wrong[items.head[errors]] = errors
    error = pieces(text, items, np.maximum(wrong, 0), wrong >= 0).str.head(_MAX_ERROR)
    frame = pl.DataFrame(
        {
            "line": pieces(text, items, row, there & lined),
            "null": null,
            "kind": np.where(there, kind, 0),
            "number": number,
            "error": error,
        }
    )
    shape = pl.col("kind").replace_strict(_SHAPES, default=None, return_dtype=pl.String)
    code = pl.col("error").str.extract(r"^([A-Z]+)", 1).fill_null("ERR")
    status = (
        pl.when(pl.col("error").is_not_null())
        .then(code)
        .when("null")
        .then(pl.lit("nil"))
        .when(pl.col("line").is_not_null())
        .then(pl.col("line").str.replace_all(TOKEN_PATTERN, "?"))
        .otherwise(shape + pl.col("number").cast(pl.String))
    )
    # of a masked text only the code is left to read
    shown = (
        pl.when(pl.col("error").str.contains(rf" {TOKEN_PATTERN}"))
        .then(code + " (text redacted)")
        .otherwise("error")
    )
    return {
        "status": frame.select(status).to_series(),
        "error": frame.select(shown).to_series(),
        "miss": pl.Series(null & (replies == 1)),
    }


def _elements(items: Items, data: NDArray[np.uint8], text: str, count: int) -> dict[str, pl.Series]:
    """`queue` and `element`: of a message, or as a pop answers it.

    A pop's answer looks as that to another command: whether it was one is for the request to say.
    """
    first, replies = _first_replies(items, count)
    rows = np.flatnonzero((first >= 0) & (replies == 1))
    reply = first[rows]
    queue, element = np.full(count, -1, np.int64), np.full(count, -1, np.int64)
    kind, number = items.kind[reply], items.number[reply]
    alone = (kind == resp.BULK) & (number >= 0) & items.whole[reply]
    element[rows[alone]] = reply[alone]
    # BLPOP: the queue, the element. BZPOPMIN: and its score.
    shaped = (kind == resp.ARRAY) & ((number == 2) | (number == 3))
    # that a subscription began or ended is no element
    word, which = pushed(data, items)
    shaped &= ~np.isin(reply, word[which > _LAST_MESSAGE] - 1)
    name, value = _following(items, reply[shaped], 1), _following(items, reply[shaped], 2)
    both = (name >= 0) & (value >= 0)
    queue[rows[shaped][both]], element[rows[shaped][both]] = name[both], value[both]
    # several in one head: the first
    some = (which <= _LAST_MESSAGE) & np.isin(word - 1, first)
    word, skip = word[some], (which[some] == _PATTERN_MESSAGE).astype(np.int64)
    for place in (0, 1):
        mine = word[skip == place]
        queue[items.head[mine]] = _following(items, mine, 1 + place)
        element[items.head[mine]] = _following(items, mine, 2 + place)
    names = pieces(text, items, np.maximum(queue, 0), queue >= 0)
    masked = names.str.contains("?", literal=True).fill_null(True)
    return {
        # a masked name is no name: the request has it
        "queue": nulls(count).zip_with(masked, names),
        "element": pieces(text, items, np.maximum(element, 0), element >= 0),
    }
