"""What may be shown of Redis's keys, queues and channels: names that programs give, not data."""

from __future__ import annotations

from typing import Final

import numpy as np
import polars as pl
from numpy.typing import NDArray

from scope_ebpf.protocols.heads import Numbers
from scope_ebpf.protocols.masking import TOKEN_PATTERN
from scope_ebpf.protocols.resp import Mask, ranges

_MAX_WORD: Final = 16
_MAX_QUEUE: Final = 64
_MAX_QUEUE_DIGITS: Final = 3


def _table(letters: bytes) -> NDArray[np.bool_]:
    table = np.zeros(256, np.bool_)
    table[list(letters)] = True
    return table


_LOWER: Final = b"abcdefghijklmnopqrstuvwxyz"
_IN_WORD: Final = _table(_LOWER + b"_")
_DIGIT: Final = _table(b"0123456789")
_BEGINS_NAME: Final = _table(_LOWER + _LOWER.upper() + b"_")
_IN_NAME: Final = _BEGINS_NAME | _DIGIT | _table(b".-*:")
_IN_HEX: Final = _DIGIT | _table(b"abcdef")
_COLON: Final = ord(":")


def is_hex(data: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Which bytes are hexadecimal digits."""
    return _IN_HEX[data]


def are_queues(data: NDArray[np.uint8], begin: Numbers, size: Numbers) -> Mask:
    """Which names may be shown whole, as those of queues and channels: `celery`, `rq:queue:default`.

    Segments between colons begin with a letter, and there are few digits: what has more is made for
    one job or user.
    """
    good = (size > 0) & (size <= _MAX_QUEUE)
    some = np.flatnonzero(good)
    if not len(some):
        return good
    text = data[ranges(begin[some], size[some])]
    starts = np.cumsum(size[some]) - size[some]
    wrong = ~_IN_NAME[text]
    heads = np.zeros(len(text), np.bool_)
    heads[1:] = text[:-1] == _COLON
    heads[starts] = True
    wrong |= heads & ~_BEGINS_NAME[text]
    digits = np.add.reduceat(_DIGIT[text].astype(np.int64), starts)
    good[some] = ~np.logical_or.reduceat(wrong, starts) & (digits <= _MAX_QUEUE_DIGITS)
    return good


def key_words(data: NDArray[np.uint8], begin: Numbers, size: Numbers) -> Numbers:
    """Places of the bytes of keys that may be shown: the leading words in front of what tells one
    key from another. Words are of lower-case letters and at most 16 long. A key that is one such
    word may be shown, too."""
    some = np.flatnonzero(size > 0)
    if not len(some):
        return np.zeros(0, np.int64)
    places = ranges(begin[some], size[some])
    text = data[places]
    starts = np.cumsum(size[some]) - size[some]
    colon = text == _COLON
    heads = np.zeros(len(text), np.bool_)
    heads[1:] = colon[:-1]
    heads[starts] = True
    segments = np.flatnonzero(heads)
    length = np.diff(np.append(segments, len(text)))
    key = np.searchsorted(starts, segments, side="right") - 1
    first = np.searchsorted(segments, starts)
    last = np.append(first[1:], len(segments)) - 1
    # a colon at the end begins an empty segment, which counts: that before it is not the last
    empty_end = colon[np.append(starts[1:], len(text)) - 1]
    wrong = np.logical_or.reduceat(~(_IN_WORD[text] | colon), segments)
    content = length - colon[segments + length - 1]
    wrong |= (content == 0) | (content > _MAX_WORD)
    wrongs = np.cumsum(wrong)
    before = wrongs[first] - wrong[first]
    leading = ~wrong & (wrongs == before[key])
    is_last = (np.arange(len(segments)) == last[key]) & ~empty_end[key]
    shown = leading & (~is_last | (first == last)[key])
    chosen: Numbers = places[np.repeat(shown, length)]
    return chosen


def fold(names: pl.Expr) -> pl.Expr:
    """Names of keys without what tells one key from another: `product:17` as `product:?`."""
    tokens = names.str.replace_all(TOKEN_PATTERN, "?")
    return tokens.str.replace_all(r"(^|:)[^:]*[^:a-z_][^:]*", "${1}?")
