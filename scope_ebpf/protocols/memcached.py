"""memcached's text protocol with its meta commands (doc/protocol.txt of memcached 1.6).

A command is a line; `set` and its like, and `ms`, bring a value of the length that the line tells.
A message may hold many commands. The binary protocol is another one and not claimed.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import polars as pl
from numpy.typing import NDArray

from scope_ebpf.protocols.contract import (
    REQUEST_SCHEMA,
    RESPONSE_SCHEMA,
    Kept,
    Protocol,
    Role,
    Roles,
)
from scope_ebpf.protocols.heads import Bytes, Heads, Numbers

# Keys have up to 250 bytes of anything but white space and control bytes; text() shows bytes that
# are not ASCII as DEL. Numbers of a masked head are as they were.
_KEY: Final = r"[!-\x7f]{1,250}"
_NOREPLY: Final = "(?: noreply)?"
_REQUEST: Final = (
    "^(?:"
    rf"gets?(?: {_KEY})+"
    rf"|gats? [0-9]+(?: {_KEY})+"
    rf"|(?:set|add|replace|append|prepend) {_KEY} [0-9]+ -?[0-9]+ [0-9]+{_NOREPLY}"
    rf"|cas {_KEY} [0-9]+ -?[0-9]+ [0-9]+ [0-9]+{_NOREPLY}"
    rf"|delete {_KEY}(?: 0)?{_NOREPLY}"
    rf"|(?:incr|decr) {_KEY} [!-~]{{1,30}}{_NOREPLY}"
    rf"|touch {_KEY} -?[0-9]+{_NOREPLY}"
    rf"|m[gdae] {_KEY}(?: [!-~]+)*"
    rf"|ms {_KEY} [0-9]+(?: [!-~]+)*"
    rf"|flush_all(?: -?[0-9]+)?{_NOREPLY}"
    rf"|verbosity [0-9]+{_NOREPLY}"
    "|stats(?: [a-z]+){0,3}|version|quit|mn"
    ") ?\r?\n"
)
# A command with many keys that is longer than the head.
_UNFINISHED: Final = rf"^(?:gets?|gats? [0-9]+|mg) {_KEY}(?: [!-\x7f]*)*$"
# The number that incr and decr answer is kept by its first digit only.
_RESPONSE: Final = (
    "^(?:"
    rf"VALUE {_KEY} [0-9]+ [0-9]+(?: [0-9]+)?"
    "|END|STORED|NOT_STORED|EXISTS|NOT_FOUND|DELETED|TOUCHED|OK|RESET|BUSY|ERROR"
    "|(?:CLIENT|SERVER)_ERROR(?: [ -~]*)?|VERSION [!-~]+|STAT [!-~]+ [ -~]*"
    r"|VA [0-9]+(?: [!-~]+)*|(?:HD|NS|EX|NF)(?: [!-~]+)*|EN|MN|ME [!-\x7f]+ [ -~]*"
    ")\r\n"
)
_NUMBER: Final = r"^[0-9](?:[0-9]{0,19}|\?[0-9A-Za-z]{0,18})[ ]*\r\n$"
_LONGEST_LINE: Final = 2048
_MOST_COMMANDS: Final = 512
_STORES: Final = ["set", "add", "replace", "append", "prepend", "cas"]
_KEYED = [*_STORES, "get", "gets", "delete", "incr", "decr", "touch"]
_KEYED += ["mg", "ms", "md", "ma", "me"]
_SEPARATORS: Final = np.frombuffer(b":./|", np.uint8)
_LONGEST_WORD: Final = 24  # a longer one is not a word that a programmer chose
_LOWER: Final = (0x61, 0x7A)


def _lines(heads: Heads, begins: Numbers, ends: Numbers) -> Heads:
    """The lines that begin at these places of `data`, with their newline, up to these ends."""
    newlines = np.flatnonzero(heads.data == 0x0A)
    stops = np.minimum(ends, begins + _LONGEST_LINE)
    if len(newlines):
        rank = np.searchsorted(newlines, begins)
        found = newlines[np.minimum(rank, len(newlines) - 1)] + 1
        stops = np.where((rank < len(newlines)) & (found < stops), found, stops)
    lengths = stops - begins
    return Heads(heads.data, begins, lengths, lengths).take(np.arange(len(begins)))


def _first_lines(heads: Heads) -> Heads:
    """The heads without what follows their first newline."""
    return _lines(heads, heads.begins, heads.begins + heads.lengths)


def recognise(heads: Heads) -> Roles:
    """Role of each head: by its first line, which must be whole, or a command with many keys."""
    roles = np.zeros(len(heads), np.uint8)
    start = heads.matrix(2)
    small = (start[:, 0] >= _LOWER[0]) & (start[:, 0] <= _LOWER[1])
    rows = np.flatnonzero(small & (start[:, 1] >= _LOWER[0]) & (start[:, 1] <= _LOWER[1]))
    if len(rows):
        text = _first_lines(heads.take(rows)).text()
        said = text.str.contains(_REQUEST).to_numpy()
        longer = heads.totals[rows] > heads.lengths[rows]
        said = said | (text.str.contains(_UNFINISHED).to_numpy() & longer)
        roles[rows[said]] = Role.REQUEST
    large = (start >= 0x41) & (start <= 0x5A)
    digit = (start[:, 0] >= 0x30) & (start[:, 0] <= 0x39)
    rows = np.flatnonzero(large.all(axis=1) | (digit & (heads.totals <= 24)))
    if len(rows):
        chosen = heads.take(rows)
        text = _first_lines(chosen).text()
        alone = (text.str.len_bytes().to_numpy() == chosen.lengths) & (
            chosen.lengths == chosen.totals
        )
        number = text.str.contains(_NUMBER).to_numpy() & alone
        roles[rows[text.str.contains(_RESPONSE).to_numpy() | number]] = Role.RESPONSE
    return roles


def _commands(heads: Heads) -> pl.DataFrame:
    """The commands of each head, in order.

    Columns: row (of the head), begin (of the line in `data`), line (without its CR LF), verb, and
    quiet (nothing is answered, or not always something).
    """
    ends = heads.begins + heads.lengths
    rows, begins = np.arange(len(heads)), heads.begins
    found: list[pl.DataFrame] = []
    line, verb = pl.col("line"), pl.col("verb")
    while len(rows) and len(found) < _MOST_COMMANDS:
        text = _lines(heads, begins, ends[rows]).text()
        frame = (
            pl.DataFrame({"row": rows, "begin": begins, "line": text})
            # The first one was recognised, perhaps without its end.
            .filter(line.str.contains(_REQUEST) | (len(found) == 0))
            .with_columns(verb=line.str.extract("^([a-z_]+)"))
            .with_columns(
                value_bytes=pl.when(verb.is_in(_STORES))
                .then(line.str.extract(r"^[a-z]+ \S+ [0-9]+ -?[0-9]+ ([0-9]{1,10})\s"))
                .when(verb == "ms")
                .then(line.str.extract(r"^ms \S+ ([0-9]{1,10})\s"))
                .cast(pl.Int64)
                + 2,
                # q: silent about what is usual. `mn` ends a batch of those and is always answered.
                quiet=pl.when(verb.str.contains("^m[gsda]$"))
                .then(line.str.contains(r" q(?:\s|$)"))
                .otherwise(line.str.contains(r" noreply ?\r?\n") | (verb == "quit"))
                .fill_null(False),
            )
        )
        found.append(
            frame.select("row", "begin", line.str.strip_chars_end("\r\n"), "verb", "quiet")
        )
        frame = frame.filter(line.str.ends_with("\n")).with_columns(
            begin=pl.col("begin") + line.str.len_bytes() + pl.col("value_bytes").fill_null(0)
        )
        rows, begins = frame["row"].to_numpy(), frame["begin"].to_numpy()
        on = begins < ends[rows]
        rows, begins = rows[on], begins[on]
    schema = {
        "row": pl.Int64,
        "begin": pl.Int64,
        "line": pl.String,
        "verb": pl.String,
        "quiet": pl.Boolean,
    }
    return pl.concat(found) if found else pl.DataFrame(schema=schema)


# Which fields of a line (its verb is field 0) are keys, which are values, and where the flags of a
# meta command begin, of which only the first letter is kept, and digits: an opaque token is `O…`.
_NONE: Final = 1 << 30
_FIELDS: Final = pl.DataFrame(
    [
        (("get", "gets"), 1, _NONE, _NONE, _NONE, _NONE),
        (("gat", "gats"), 2, _NONE, _NONE, _NONE, _NONE),
        ((*_STORES, "delete", "touch", "VALUE"), 1, 2, _NONE, _NONE, _NONE),
        (("incr", "decr"), 1, 2, 2, 3, _NONE),
        (("mg", "md", "ma", "me"), 1, 2, _NONE, _NONE, 2),
        (("ms",), 1, 2, _NONE, _NONE, 3),
        (("STAT",), _NONE, _NONE, 2, _NONE, _NONE),
        (("ME",), _NONE, _NONE, 1, _NONE, _NONE),
        (("VA",), _NONE, _NONE, _NONE, _NONE, 2),
        (("HD", "NS", "EX", "NF"), _NONE, _NONE, _NONE, _NONE, 1),
    ],
    schema=["verb", "key_from", "key_to", "value_from", "value_to", "flags_from"],
    orient="row",
).explode("verb", empty_as_null=True)


def keep(heads: Heads, roles: Roles) -> Kept:
    """Kept: commands, flags, times, lengths, and the first segment of a key if it is a word in small
    letters and more follows: `user` of `user:17`. Of responses their first line, likewise.

    Masked: the rest of keys, all values, and what incr and decr add, but for a result's first digit.
    """
    kept = np.zeros(len(heads.data), np.bool_)
    asked = np.flatnonzero(roles == Role.REQUEST)
    questions = heads.take(asked)
    commands = _commands(questions)
    rows = commands["row"].to_numpy()
    answered = np.flatnonzero(roles == Role.RESPONSE)
    answers = _first_lines(heads.take(answered))
    verbs = answers.text().str.extract("^([A-Z_]+)").rename("verb")
    begins = np.concatenate(
        [
            commands["begin"].to_numpy() - questions.begins[rows] + heads.begins[asked[rows]],
            heads.begins[answered],
        ]
    )
    lengths = np.concatenate(
        [commands["line"].str.len_bytes().to_numpy().astype(np.int64), answers.lengths]
    )
    # A line without a verb is a number: a value, whose first digit stays.
    fields = pl.concat([commands["verb"], verbs]).fill_null("").to_frame()
    fields = fields.join(_FIELDS, on="verb", how="left", maintain_order="left").with_columns(
        pl.when(pl.col("verb") == "").then(0).otherwise("flags_from").alias("flags_from")
    )
    limits = fields.drop("verb").fill_null(_NONE).to_numpy()

    lines = np.repeat(np.arange(len(begins)), lengths)
    starts = np.cumsum(lengths) - lengths
    places = np.arange(len(lines)) + (begins - starts)[lines]
    data = heads.data[places]
    first = np.zeros(len(data), np.bool_)
    first[starts[lengths > 0]] = True
    space = data == 0x20
    # Every space begins a field, and is its first byte; so does every line.
    field = np.cumsum(space | first) - 1
    field_begins = np.flatnonzero(space | first)
    before = field[starts[lengths > 0]] if len(data) else field
    line_fields = np.zeros(len(begins), np.int64)
    line_fields[lengths > 0] = before
    number = field - line_fields[lines]
    key_from, key_to, value_from, value_to, flags_from = limits[lines].T

    key = (number >= key_from) & (number < key_to)
    flags = number >= flags_from
    after = np.arange(len(data)) - field_begins[field] - (number > 0)  # place within the field
    digits = (data >= 0x30) & (data <= 0x39)
    kept[places] = ~key & ~((number >= value_from) & (number < value_to))
    kept[places[flags & (after > 0) & ~(digits & (flags_from > 0))]] = False
    kept[places[key]] = _first_words(data[key], np.diff(field[key], prepend=-1) != 0)
    return kept


def _first_words(data: Bytes, first: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Which bytes are of the first segment of a key (with the space before it) that may be shown."""
    field = np.cumsum(first) - 1
    count = int(field[-1]) + 1 if len(field) else 0
    place = np.arange(len(data)) - np.flatnonzero(first)[field]
    ends = np.full(count, _NONE)
    separators = np.flatnonzero(np.isin(data, _SEPARATORS))[::-1]
    ends[field[separators]] = place[separators]
    head = place < ends[field]
    word = (data >= _LOWER[0]) & (data <= _LOWER[1]) | (data == 0x5F) | (data == 0x2D)
    broken = np.bincount(field[head & ~word & (place > 0)], minlength=count) > 0
    shown = (ends < _LONGEST_WORD + 1) & ~broken
    right: NDArray[np.bool_] = head & shown[field]
    return right


def _fold(keys: pl.Series) -> pl.Series:
    """`user:?` of `user:17`: what is not a word in small letters may be different each time."""
    unique = pl.DataFrame({"key": keys}).unique().drop_nulls()
    segment = pl.element()
    fixed = segment.str.contains(r"^(?:[a-z]+(?:[_-][a-z]+)*|[:./|])?$") & (
        segment.str.len_bytes() <= _LONGEST_WORD
    )
    unique = unique.with_columns(
        folded=pl.col("key")
        .str.replace_all("([:./|])", "\x1f${1}\x1f")
        .str.split("\x1f")
        .list.eval(pl.when(fixed).then(segment).otherwise(pl.lit("?")))
        .list.join("")
    )
    return keys.to_frame("key").join(unique, on="key", how="left", maintain_order="left")["folded"]


def parse_requests(heads: Heads) -> pl.DataFrame:
    """Columns of REQUEST_SCHEMA: `get user:?` as operation, or `get user:? …` if it has more keys.

    Of several commands in one message, operation and detail are the first one's, and `requests`
    counts those that are answered, if any is.
    """
    commands = (
        _commands(heads)
        .group_by("row", maintain_order=True)
        .agg(
            detail=pl.col("line").first().str.replace_all("\x7f", "\ufffd", literal=True),
            verb=pl.col("verb").first(),
            loud=(~pl.col("quiet")).sum(),
            all=pl.len(),
        )
        .with_columns(
            key=pl.when(pl.col("verb").is_in(["gat", "gats"]))
            .then(pl.col("detail").str.extract(r"^\S+ \S+ (\S+)"))
            .when(pl.col("verb").is_in(_KEYED))
            .then(pl.col("detail").str.extract(r"^\S+ (\S+)")),
            more=pl.when(pl.col("verb").is_in(["get", "gets"]))
            .then(pl.col("detail").str.contains(r"^\S+ \S+ \S"))
            .when(pl.col("verb").is_in(["gat", "gats"]))
            .then(pl.col("detail").str.contains(r"^\S+ \S+ \S+ \S")),
        )
    )
    commands = commands.with_columns(key=_fold(commands["key"]))
    more = pl.when("more").then(pl.lit("…"))
    return commands.select(
        operation=pl.when(pl.col("verb").is_not_null()).then(
            pl.concat_str("verb", "key", more, separator=" ", ignore_nulls=True)
        ),
        detail="detail",
        requests=pl.when(pl.col("loud") > 0).then("loud").otherwise("all"),
        answered=pl.col("loud") > 0,
        waits=pl.lit(False),
        queue_action=pl.lit(None),
        queue=pl.lit(None),
        element=pl.lit(None),
        defines=pl.lit(None),
        uses=pl.lit(None),
    ).cast(REQUEST_SCHEMA)


def parse_responses(heads: Heads) -> pl.DataFrame:
    """Columns of RESPONSE_SCHEMA: `hit`, `miss`, or the word that the server says.

    A miss is what memcached counts as one: nothing found to get, touch, delete or add to.
    """
    text = _first_lines(heads).text().str.replace_all("\x7f", "\ufffd", literal=True)
    line, word = pl.col("line"), pl.col("word")
    return (
        pl.DataFrame({"line": text.str.strip_chars_end("\r\n")})
        .with_columns(word=line.str.extract("^([A-Z_]+)"))
        .select(
            status=pl.when(word.is_in(["VALUE", "VA"]))
            .then(pl.lit("hit"))
            .when(word.is_in(["END", "EN"]))
            .then(pl.lit("miss"))
            .when(word.is_null() & line.str.contains("^[0-9]"))
            .then(pl.lit("OK"))  # a number: what incr or decr made
            .otherwise(word),
            error=pl.when(word.is_in(["ERROR", "CLIENT_ERROR", "SERVER_ERROR"])).then(line),
            miss=word.is_in(["END", "EN", "NOT_FOUND", "NF"]).fill_null(False),
            interim=pl.lit(False),
            queue=pl.lit(None),
            element=pl.lit(None),
            defines=pl.lit(None),
            transaction=pl.lit(None),
        )
        .cast(RESPONSE_SCHEMA)
    )


PROTOCOL: Final = Protocol("memcached", recognise, keep, parse_requests, parse_responses)
