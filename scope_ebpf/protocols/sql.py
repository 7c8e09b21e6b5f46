"""SQL in payload heads: which bytes are literals, and statements with the literals folded away."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np
import polars as pl
from numpy.typing import NDArray

from scope_ebpf.protocols.contract import QUEUE_ACTION
from scope_ebpf.protocols.heads import Bytes, Heads, Numbers

OPERATION_CHARACTERS: Final = 200
"""An operation is a name, to be read in a table and to group by; the rest is in `detail`."""

# More quotes and comments in one head than this are not told apart: the rest counts as a literal.
_MOST_QUOTES = 64

# Statements that are looked at together.
_CHUNK = 4096
RECOGNISED_CHUNK: Final = 1 << 13
PARSED_CHUNK: Final = 1 << 15

# Classes of bytes.
_WORD, _NUMBER, _MARK = 1, 2, 4

# What a quoted piece is.
_SINGLE, _DOUBLE, _BACKTICK, _LINE, _BLOCK, _DOLLARS, _TAGGED = range(1, 8)

# What a literal is; only a comment is dropped where SQL is folded, the others become `?`.
STRING, NUMBER, COMMENT, CHANNEL = range(4)


@dataclass(frozen=True)
class Dialect:
    """Where the two databases disagree about what a literal is.

    PostgreSQL: "double quotes" hold identifiers, a backslash escapes in E'' only, $tag$ quotes.
    MySQL: "double quotes" hold strings, a backslash escapes, `#` begins a comment, `--` needs a
    blank after it. With sql_mode NO_BACKSLASH_ESCAPES, which is rare, a backslash right before a
    closing quote would be misread.
    """

    classes: Bytes
    quoted_identifier: int
    backslash_escapes: bool
    line_ends: bytes


def _dialect(
    marks: bytes, identifier: int, *, backslash_escapes: bool, line_ends: bytes
) -> Dialect:
    classes = np.zeros(256, np.uint8)
    letters = [byte for byte in range(128) if chr(byte).isalnum()]
    # A masked literal begins with `?`; 0x7f is what Heads.text makes of bytes from 0x80 on.
    classes[[*letters, *b"_$?", *range(0x7F, 0x100)]] |= _WORD
    classes[[*b"0123456789?"]] |= _NUMBER
    classes[[*marks]] |= _MARK
    return Dialect(classes, identifier, backslash_escapes, line_ends)


POSTGRESQL: Final = _dialect(b"'\"-/$", _DOUBLE, backslash_escapes=False, line_ends=b"\n\r")
MYSQL: Final = _dialect(b"'\"-/#`", _BACKTICK, backslash_escapes=True, line_ends=b"\n")


@dataclass(frozen=True)
class Literals:
    """The literals and comments of some statements; places are offsets in the data.

    - `rows`: the statement, `kinds`: STRING, NUMBER, COMMENT or CHANNEL (of pg_notify)
    - `begins`, `afters`: with what encloses it, `inners`, `ends`: without quotes, dashes, tags
    """

    rows: Numbers
    kinds: Numbers
    begins: Numbers
    inners: Numbers
    ends: Numbers
    afters: Numbers


def literals(data: Bytes, begins: Numbers, stops: Numbers, dialect: Dialect) -> Literals:
    """Find what must not be stored in statements at `begins` to `stops` (ascending, apart).

    Robust rather than exact: what is not closed reaches to the end of the statement, and so does
    what may be read in two ways (a backslash before a closing quote, a comment in a comment).
    Masked literals (`?` and letters) are numbers here.
    """
    nothing = np.empty(0, np.int64)
    if not len(begins) or not len(data):
        return Literals(*[nothing] * 6)
    # bytes.translate is several times as fast as an index with bytes.
    flags = np.frombuffer(data.tobytes().translate(dialect.classes.tobytes()), np.uint8)
    found = _quoted(data, flags, begins, stops, dialect)
    order = np.argsort(found.begins, kind="stable")
    quoted = _take(found, order)
    firsts, afters, rows = _numbers(flags, begins, stops)
    if len(quoted.begins):
        # Numbers within quotes are no numbers of their own.
        near = np.searchsorted(quoted.begins, firsts, "right") - 1
        apart = (near < 0) | (firsts >= quoted.afters[near])
        firsts, afters, rows = firsts[apart], afters[apart], rows[apart]
        # A dollar is part of a word, and `$$` may begin a literal within one: 1$$.
        after = np.append(quoted.begins, len(data))
        afters = np.minimum(afters, after[np.searchsorted(quoted.begins, firsts, "right")])
    kinds = np.full(len(firsts), NUMBER)
    hidden = _take(quoted, quoted.kinds >= 0)
    return Literals(
        np.concatenate([hidden.rows, rows]),
        np.concatenate([hidden.kinds, kinds]),
        np.concatenate([hidden.begins, firsts]),
        np.concatenate([hidden.inners, firsts]),
        np.concatenate([hidden.ends, afters]),
        np.concatenate([hidden.afters, afters]),
    )


def between(size: int, ranges: list[tuple[Numbers, Numbers, int]]) -> NDArray[np.bool_]:
    """Which of `size` bytes lie in more ranges (begins, stops, weight) of +1 than of -1."""
    steps = np.zeros(size + 1, np.int8)
    if not ranges:
        return steps[:-1] > 0
    begins = np.concatenate([begin for begin, _, _ in ranges])
    stops = np.concatenate([stop for _, stop, _ in ranges])
    weights = np.repeat(
        np.array([weight for *_, weight in ranges], np.int8), [len(begin) for begin, *_ in ranges]
    )
    some = begins < stops
    begins, stops, weights = begins[some], stops[some], weights[some]
    np.add.at(steps, begins, weights)
    np.subtract.at(steps, stops, weights)
    return np.cumsum(steps[:-1], dtype=np.int8) > 0


def chunks(heads: Heads, size: int) -> Iterator[Heads]:
    """Some heads at a time: what stays in the processor's caches is looked at twice as fast."""
    for at in range(0, len(heads), size):
        begins, lengths = heads.begins[at : at + size], heads.lengths[at : at + size]
        first, last = int(begins[0]), int(begins[-1] + lengths[-1])
        yield Heads(heads.data[first:last], begins - first, lengths, heads.totals[at : at + size])


def texts(data: Bytes, begins: Numbers, stops: Numbers) -> pl.Series:
    """Pieces of the data as strings."""
    lengths = np.maximum(stops - begins, 0)
    total = int(lengths.sum())
    if total < len(data) // 2:
        # Small pieces: only their bytes are made text.
        packed = np.cumsum(lengths) - lengths
        data = data[np.repeat(begins - packed, lengths) + np.arange(total)]
        begins = packed
    return Heads(data, begins, lengths, lengths).text()


def visible(data: Bytes, begins: Numbers, stops: Numbers, dialect: Dialect) -> NDArray[np.bool_]:
    """Which bytes are SQL of these statements, but no literal."""
    found = literals(data, begins, stops, dialect)
    hide = found.kinds != CHANNEL
    return between(len(data), [(begins, stops, 1), (found.inners[hide], found.ends[hide], -1)])


def fold(data: Bytes, begins: Numbers, stops: Numbers, dialect: Dialect) -> pl.DataFrame:
    """Fold statements: what differs from one execution to the next becomes `?`.

    One row per statement: `operation` (null: no statement), and `queue_action` and `queue` as far
    as the statement itself tells them.
    """
    places = range(0, len(begins), _CHUNK)
    texts = [
        _folded(data, begins[at : at + _CHUNK], stops[at : at + _CHUNK], dialect) for at in places
    ]
    statements = pl.DataFrame(
        {"text": pl.concat(texts) if texts else pl.Series([], dtype=pl.String)}
    )
    distinct = statements.unique().lazy().with_columns(operation=_tidied(pl.col("text")))
    return (
        statements.join(
            distinct.with_columns(*_queues(pl.col("operation")))
            .with_columns(
                pl.when(pl.col("operation") != "")
                .then(pl.col("operation").str.slice(0, OPERATION_CHARACTERS))
                .alias("operation")
            )
            .collect(),
            on="text",
            how="left",
            maintain_order="left",
        )
    ).drop("text")


def _folded(data: Bytes, begins: Numbers, stops: Numbers, dialect: Dialect) -> pl.Series:
    """The statements as text, each literal a `?`, each comment a blank."""
    first, last = int(begins.min()), int(stops.max(initial=0))
    last = max(first, last)
    data, begins, stops = data[first:last], begins - first, stops - first
    found = literals(data, begins, stops, dialect)
    folded = data.copy()
    folded[found.begins] = np.where(found.kinds == COMMENT, ord(" "), ord("?"))
    kept = between(len(data), [(begins, stops, 1), (found.begins + 1, found.afters, -1)])
    dropped = np.bincount(found.rows, found.afters - found.begins - 1, len(begins))
    lengths = np.maximum(stops - begins, 0) - dropped.astype(np.int64)
    return Heads(folded[kept], np.cumsum(lengths) - lengths, lengths, lengths).text()


def _take(found: Literals, rows: NDArray[np.intp] | NDArray[np.bool_]) -> Literals:
    return Literals(
        found.rows[rows],
        found.kinds[rows],
        found.begins[rows],
        found.inners[rows],
        found.ends[rows],
        found.afters[rows],
    )


def _numbers(flags: Bytes, begins: Numbers, stops: Numbers) -> tuple[Numbers, Numbers, Numbers]:
    """Words that begin with a digit, or with the `?` of a masked word: begins, ends, statements."""
    word = (flags & _WORD) != 0
    first = (flags & _NUMBER) != 0
    starts = first.copy()
    starts[1:] &= ~word[:-1]
    some = begins[begins < stops]
    starts[some] = first[some]  # whatever stands before the statement
    firsts = np.flatnonzero(starts)
    rows = np.searchsorted(begins, firsts, "right") - 1
    inside = (rows >= 0) & (firsts < stops[rows])
    firsts, rows = firsts[inside], rows[inside]
    ends = np.append(np.flatnonzero(word[:-1] & ~word[1:]) + 1, len(flags))
    afters = np.minimum(ends[np.searchsorted(ends, firsts, "right")], stops[rows])
    return firsts, afters, rows


class _Marks:
    """Where quotes and comments may begin and end."""

    def __init__(self, data: Bytes, flags: Bytes, begins: Numbers, dialect: Dialect) -> None:
        self.data, self.flags, self.begins, self.dialect = data, flags, begins, dialect
        self.never = len(data) + 1
        at = np.flatnonzero((flags & _MARK) != 0)
        byte = data[at]
        follows = np.where(at + 1 < len(data), data[np.minimum(at + 1, len(data) - 1)], 0)
        kinds = np.zeros(len(at), np.int64)
        kinds[byte == ord("'")] = _SINGLE
        kinds[byte == ord('"')] = _DOUBLE
        kinds[byte == ord("`")] = _BACKTICK
        kinds[byte == ord("#")] = _LINE
        # To MySQL, `5--3` is a sum.
        dashes = (byte == ord("-")) & (follows == ord("-"))
        if dialect.backslash_escapes:
            third = np.where(at + 2 < len(data), data[np.minimum(at + 2, len(data) - 1)], 0)
            dashes &= third <= ord(" ")
        kinds[dashes] = _LINE
        kinds[(byte == ord("/")) & (follows == ord("*"))] = _BLOCK
        kinds[(byte == ord("$")) & (follows == ord("$"))] = _DOLLARS
        inners = at + np.where(np.isin(kinds, (_LINE, _BLOCK, _DOLLARS)), 2, 1)
        inners[(kinds == _LINE) & (byte == ord("#"))] -= 1
        self._tags(at, kinds, inners, np.flatnonzero((byte == ord("$")) & (kinds == 0)))
        opens = kinds > 0
        self.opens = np.append(at[opens], self.never)
        self.kinds = np.append(kinds[opens], 0)
        self.inners = np.append(inners[opens], self.never)
        self._escaped: dict[int, NDArray[np.bool_]] = {}
        self._places: dict[bytes, Numbers] = {}

    def _tags(
        self, at: Numbers, kinds: Numbers, inners: Numbers, dollars: NDArray[np.intp]
    ) -> None:
        """Find `$tag$`; what follows it is not looked at for its end: it is all a literal."""
        before = np.maximum(at[dollars] - 1, 0)
        within = ((self.flags[before] & _WORD) != 0) & (at[dollars] > 0)
        within &= ~np.isin(at[dollars], self.begins)
        follows = self.flags[np.minimum(at[dollars] + 1, len(self.data) - 1)]
        likely = dollars[~within & ((follows & _WORD) != 0) & ((follows & _NUMBER) == 0)]
        if not len(likely):
            return
        letters = (self.flags & _WORD) != 0
        letters &= (self.data != ord("$")) & (self.data != ord("?"))
        others = np.append(np.flatnonzero(~letters), len(self.data))
        ends = others[np.searchsorted(others, at[likely] + 1)]
        whole = (ends < len(self.data)) & (
            self.data[np.minimum(ends, len(self.data) - 1)] == ord("$")
        )
        kinds[likely[whole]] = _TAGGED
        inners[likely[whole]] = ends[whole] + 1

    def places(self, pattern: bytes) -> Numbers:
        """Where one or two bytes stand, and a last place after everything."""
        if pattern not in self._places:
            here = self.data == pattern[0]
            if len(pattern) > 1:
                here[:-1] &= self.data[1:] == pattern[1]
                here[-1:] = False
            self._places[pattern] = np.append(np.flatnonzero(here), self.never)
        return self._places[pattern]

    def escaped(self, quote: bytes) -> NDArray[np.bool_]:
        """Which places of a quote follow an odd number of backslashes."""
        at = self.places(quote)
        if quote[0] not in self._escaped:
            escaped = np.zeros(len(at), np.bool_)
            slashes = self.places(b"\\")[:-1]
            follow = np.flatnonzero(self.data[np.maximum(at[:-1] - 1, 0)] == ord("\\"))
            if len(slashes) and len(follow):
                apart = np.diff(slashes, prepend=-2) != 1
                number = np.arange(len(slashes))
                nth = number - np.maximum.accumulate(np.where(apart, number, 0)) + 1
                escaped[follow] = nth[np.searchsorted(slashes, at[follow] - 1)] % 2 == 1
            self._escaped[quote[0]] = escaped
        return self._escaped[quote[0]]

    def ends(
        self, kind: int, opens: Numbers, inners: Numbers, stops: Numbers, begins: Numbers
    ) -> Numbers:
        """Where the quoted pieces of one kind end; their statement's end if they are not closed."""
        if kind == _TAGGED:
            return stops
        if kind in (_SINGLE, _DOUBLE, _BACKTICK):
            quote = {_SINGLE: b"'", _DOUBLE: b'"', _BACKTICK: b"`"}[kind]
            at = self.places(quote)
            if kind == self.dialect.quoted_identifier:
                return np.asarray(np.minimum(at[np.searchsorted(at, inners)], stops))
            escaped = self.escaped(quote)
            plain = at[~escaped]
            escapes = np.full(len(opens), self.dialect.backslash_escapes) | (
                self._extended(opens) & (opens > begins)
            )
            any_quote = np.searchsorted(at, inners)
            return np.asarray(
                np.minimum(
                    np.where(
                        escapes,
                        plain[np.searchsorted(plain, inners)],
                        # Escaped only with standard_conforming_strings off, which nobody told us.
                        np.where(escaped[any_quote], stops, at[any_quote]),
                    ),
                    stops,
                )
            )
        if kind == _LINE:
            breaks = [self.places(bytes([byte])) for byte in self.dialect.line_ends]
            nearest = [at[np.searchsorted(at, inners)] for at in breaks]
            return np.asarray(np.minimum.reduce([*nearest, stops]))
        closing = self.places(b"*/" if kind == _BLOCK else b"$$")
        ends: Numbers = np.minimum(closing[np.searchsorted(closing, inners)], stops)
        if kind == _BLOCK:
            again = self.places(b"/*")
            ends = np.where(again[np.searchsorted(again, inners)] < ends, stops, ends)
        return np.asarray(ends)

    def _extended(self, opens: Numbers) -> NDArray[np.bool_]:
        """Whether the quote belongs to an E'' string."""
        one, two = np.maximum(opens - 1, 0), np.maximum(opens - 2, 0)
        alone = (self.flags[two] & _WORD) == 0
        return np.asarray(((self.data[one] | 0x20) == ord("e")) & alone)


_CLOSING_BYTES: Final = np.array([0, 1, 1, 1, 0, 2, 2, 0])
_NOTIFY: Final = np.frombuffer(b"pg_notify(", np.uint8)


def _quoted(
    data: Bytes, flags: Bytes, begins: Numbers, stops: Numbers, dialect: Dialect
) -> Literals:
    """Strings, comments and (kind -1) quoted identifiers, by a walk over all statements at once."""
    marks = _Marks(data, flags, begins, dialect)
    rows = np.flatnonzero(begins < stops)
    here = begins[rows]
    pieces: list[NDArray[np.int64]] = []
    for _ in range(_MOST_QUOTES):
        at = np.searchsorted(marks.opens, here)
        more = marks.inners[at] <= stops[rows]  # a mark that is cut has nothing behind it
        rows, at = rows[more], at[more]
        if not len(rows):
            break
        opens, marked, limit = marks.opens[at], marks.kinds[at], stops[rows]
        inners = np.minimum(marks.inners[at], limit)
        ends = limit.copy()
        for kind in np.unique(marked).tolist():
            of = marked == kind
            ends[of] = marks.ends(kind, opens[of], inners[of], limit[of], begins[rows[of]])
        here = np.minimum(ends + _CLOSING_BYTES[marked], limit)
        kinds = np.where(np.isin(marked, (_LINE, _BLOCK)), COMMENT, STRING)
        kinds[(marked == dialect.quoted_identifier) & (ends < limit)] = -1
        pieces.append(np.stack([rows, kinds, opens, inners, ends, here]))
    else:
        rest = [rows, np.full(len(rows), STRING), here, here, stops[rows], stops[rows]]
        left = here < stops[rows]
        pieces.append(np.stack([column[left] for column in rest]))
    if not pieces:
        return Literals(*[np.empty(0, np.int64)] * 6)
    found = Literals(*np.concatenate(pieces, axis=1))
    _name_channels(data, found)
    return found


def _name_channels(data: Bytes, found: Literals) -> None:
    """The first argument of pg_notify is the name of a channel."""
    strings = np.flatnonzero((found.kinds == STRING) & (found.begins >= len(_NOTIFY)))
    strings = strings[data[found.begins[strings] - 1] == ord("(")]
    before = data[found.begins[strings][:, None] + np.arange(-len(_NOTIFY), 0)]
    named = ((before | 0x20) == (_NOTIFY | 0x20)).all(axis=1)
    found.kinds[strings[named]] = CHANNEL


_ROW: Final = r"\((?:[^()]|\([^()]*\))*\)"
_ITEMS: Final = r"\?(?: ?, ?\?)*"
_NAME: Final = r"((?:[\w\x7f.]|\"[^\"]*\"|`[^`]*`)+)"


def _tidied(text: pl.Expr) -> pl.Expr:
    """White space, parameters and lists of statements whose literals are already folded."""
    return (
        text.str.replace_all(r"\s+", " ")
        .str.strip_chars(" ;\0")
        .str.replace_all(r"(^|[^\w$])\$\d+", "${1}?")
        .str.replace_all(r"(?i)(^|[^\w$])(?:[EBXN]|U&|_utf8(?:mb[34])?|_binary ?)\?", "${1}?")
        .str.replace_all(r"\?(?:\.?\?)+", "?")
        .str.replace_all(r"([=(,<>] ?)[-+]\?", "${1}?")
        .str.replace_all(rf"(?i)\b(IN ?|VALUES? ?)\({_ITEMS}(\)|(?: ?,)? ?$)", "${1}(?${2}")
        .str.replace_all(rf"(?i)\b(ARRAY ?)\[{_ITEMS}\]", "${1}[?]")
        .str.replace_all(rf"(?i)\b(VALUES ?{_ROW})(?: ?, ?{_ROW})*(?: ?, ?(?:\([^;]*)?$)?", "$1")
        .str.replace_all(r"(?i)\b(IN ?|VALUES? ?)\(\?[ ,]*$", "${1}(?")
    )


def _queues(text: pl.Expr) -> list[pl.Expr]:
    """What a statement does to a channel, or to a table that may be a job queue."""
    listen = text.str.extract(r'(?i)^LISTEN ("[^"]+"|[^"; ]+)')
    notify = text.str.extract(r'(?i)^NOTIFY ("[^"]+"|[^",; ]+)')
    calls_notify = text.str.contains(r"(?i)\bpg_notify ?\(")
    skips = text.str.contains(r"(?i)\bSKIP LOCKED\b")
    pop = text.str.extract(rf"(?i)\b(?:FROM|UPDATE) (?:ONLY )?{_NAME}")
    push = text.str.extract(rf"(?i)^INSERT (?:IGNORE )?INTO {_NAME}")
    cases: list[tuple[pl.Expr, str, pl.Expr]] = [
        (listen.is_not_null(), "subscribe", _identifier(listen)),
        (notify.is_not_null(), "publish", _identifier(notify)),
        (calls_notify, "publish", pl.lit(None, pl.String)),
        (skips & pop.is_not_null(), "pop", pop.str.replace_all(r"[\"`]", "")),
        (push.is_not_null(), "push", push.str.replace_all(r"[\"`]", "")),
    ]
    return [
        pl.coalesce(pl.when(when).then(pl.lit(action)) for when, action, _ in cases)
        .cast(QUEUE_ACTION)
        .alias("queue_action"),
        pl.coalesce(pl.when(when).then(name) for when, _, name in cases).alias("queue"),
    ]


def _identifier(name: pl.Expr) -> pl.Expr:
    """An identifier as PostgreSQL takes it: lower case unless it is quoted."""
    return (
        pl.when(name.str.starts_with('"'))
        .then(name.str.strip_chars('"'))
        .otherwise(name.str.to_lowercase())
    )
