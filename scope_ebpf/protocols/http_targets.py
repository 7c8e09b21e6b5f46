"""Targets of HTTP requests: folded into operations, and what of them must not be stored."""

from __future__ import annotations

from typing import Final

import numpy as np
import polars as pl
from numpy.typing import NDArray

from scope_ebpf.protocols.heads import Bytes, Numbers
from scope_ebpf.protocols.masking import TOKEN_PATTERN

LONG_SECRET_BYTES: Final = 20
"""A stretch of word bytes of a path that is this long and mixes letters and digits is masked."""

# Segments of a path that are one thing's id; an extension may follow: /orders/17, /invoices/17.pdf.
_IDS: Final = "^(?:{})((?:\\.[a-z][a-z0-9]{{0,4}})?)$".format(
    "|".join(
        [
            r"[+-]?[0-9]+(?:[.,:;_-][0-9]+)*",  # numbers, dates, lists of numbers, addresses
            r"[0-9a-fA-F]{8,}",  # in hexadecimal
            r"[0-9a-fA-F]{8}(?:-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}",  # UUID
            r"[^@/]+(?:@|%40)[^@/]+",  # e-mail addresses and the like
            r".*\x01.*",  # masked
        ]
    )
)
# A long token with digits. The regex engine cannot look ahead, so it takes two looks.
_LONG: Final = "^(?:[A-Za-z0-9_~-]|%2[BbFf]|%3[Dd]){16,}$"  # base64, too, with + / = escaped
_MIXED: Final = r"^[A-Za-z0-9_-]{10,15}$"  # shorter ones have small and capital letters and digits

# Masked parts of a path, which `secret_bytes` chose, for there are no others. A query's `?` looks
# alike, but a token follows it, which begins with `?`, or a mark that stays, such as `=`.
_ESCAPE: Final = "%[0-9A-Fa-f]{2}"
_MARK: Final = rf"(?:[.+:~!$&'()*,=]|{_ESCAPE})"
_MASKED: Final = (
    # e-mail addresses: /?ab.?abc@?abcdef.?ab
    rf"/{TOKEN_PATTERN}(?:{_MARK}+{TOKEN_PATTERN})*(?:@|%40){TOKEN_PATTERN}(?:\.{TOKEN_PATTERN})*"
    # long secrets with escaped bytes: /?abcdef%2B?abc
    rf"|/(?:{TOKEN_PATTERN}(?:{_ESCAPE})+)+\?[0-9A-Za-z]+"
    # long secrets
    rf"|[/.:~=+,]\?[0-9A-Za-z]{{{LONG_SECRET_BYTES - 1},}}"
)

# Parameters of a path, clear or masked: ;jsessionid=AB12, ;?abcdefghi=?abc
_PARAMETERS: Final = rf";(?:{TOKEN_PATTERN}(?:[.+:~!$&'()*,=]+{TOKEN_PATTERN})*|[^/?;]*)"


def operations(requests: pl.Series) -> pl.Series:
    """`GET /users/{id}` of `GET /users/17?full=1`: no query, and ids are folded.

    Takes `METHOD target`, clear or masked; null where it is not that.
    """
    line = pl.col("request")
    # First what leaves few different ones; the rest only looks at each of them once.
    short = (
        # http://user:password@host/path
        line.str.replace(r"^([A-Z-]+) [a-z][a-z0-9+.-]*://(?:[^/@]*@[^/]*|[^/?#]*)", "${1} ")
        .str.replace_all(_MASKED, "/\x01")
        .str.replace_all(_PARAMETERS, "")
        .str.splitn("?", 2)
        .struct.field("field_0")
        .str.replace_all(r"/[0-9]+(/|$)", "/{id}${1}")
        .alias("short")
    )
    frame = pl.DataFrame({"request": requests}).select(short)
    unique = frame.unique().with_columns(
        method=pl.col("short").str.extract(r"^(\S+) "),
        path=pl.col("short").str.extract(r"^\S+ ([^#]*)"),
    )
    connects = pl.col("method") == "CONNECT"
    path = pl.when(pl.col("path") == "").then(pl.lit("/")).otherwise("path")
    unique = unique.with_columns(path=pl.when(connects).then("path").otherwise(path))
    segments = (
        unique.filter(~connects)
        .select(pl.col("path").str.split("/").explode(empty_as_null=True).alias("segment"))
        .unique()
        .drop_nulls()
        .with_columns(folded=_fold(pl.col("segment")))
        .filter(pl.col("segment") != pl.col("folded"))
    )
    fold = pl.element().replace(segments["segment"], segments["folded"])
    folded = pl.col("path").str.split("/").list.eval(fold).list.join("/")
    unique = unique.select(
        "short",
        operation=pl.concat_str(
            "method", pl.when(connects).then("path").otherwise(folded), separator=" "
        ),
    )
    return frame.join(unique, on="short", how="left", maintain_order="left")["operation"]


def _fold(segment: pl.Expr) -> pl.Expr:
    """`{id}` in place of what is an id; other segments as they are."""
    digits = segment.str.contains("[0-9]")
    token = digits & (
        segment.str.contains(_LONG)
        | (
            segment.str.contains(_MIXED)
            & segment.str.contains("[a-z]")
            & segment.str.contains("[A-Z]")
        )
    )
    return pl.when(token).then(pl.lit("{id}")).otherwise(segment.str.replace(_IDS, "{id}${1}"))


def secret_bytes(targets: Bytes, begins: Numbers) -> NDArray[np.bool_]:
    """Which bytes of targets (one after the other, without their queries) must not be stored.

    User and password, segments with an `@`, parameters after a `;`, and long secrets: stretches of
    LONG_SECRET_BYTES and more that mix letters and digits. Escapes (`%40`) stay, so that the parser
    still sees what it was.
    """
    count = len(targets)
    if not count:
        return np.zeros(0, np.bool_)
    first = np.zeros(count, np.bool_)
    first[begins[begins < count]] = True
    small = targets | 0x20
    letter = ((small >= 0x61) & (small <= 0x7A)) | (targets >= 0x80)
    digit = (targets >= 0x30) & (targets <= 0x39)
    hexadecimal = digit | ((small >= 0x61) & (small <= 0x66))

    percent = targets == 0x25
    # An escape takes three bytes of the same target.
    whole = percent.copy()
    whole[-2:] = False
    whole[:-1] &= ~first[1:] & hexadecimal[1:]
    whole[:-2] &= ~first[2:] & hexadecimal[2:]
    escape = whole.copy()
    escape[1:] |= whole[:-1]
    escape[2:] |= whole[:-2]

    # Segments begin with their slash.
    segment = np.cumsum(first | (targets == 0x2F)) - 1
    segments = int(segment[-1]) + 1
    segment_begins = np.zeros(segments, np.int64)
    segment_begins[segment[::-1]] = np.arange(count - 1, -1, -1)
    at = targets == 0x40
    at_escape = whole.copy()
    at_escape[:-1] &= targets[1:] == 0x34
    at_escape[:-2] &= targets[2:] == 0x30
    # /@types/node names nobody: something must stand before it.
    slash = targets[segment_begins] == 0x2F
    named = np.flatnonzero(at | at_escape)
    named = named[named > segment_begins[segment[named]] + slash[segment[named]]]
    secret_segment = np.zeros(segments, np.bool_)
    secret_segment[segment[named]] = True
    secret = secret_segment[segment]

    semicolons = np.cumsum(targets == 0x3B)
    before = semicolons[segment_begins] - (targets[segment_begins] == 0x3B)
    secret |= semicolons > before[segment]

    word = letter | digit | (targets == 0x5F) | (targets == 0x2D) | escape
    begins_stretch = word & (first | ~np.concatenate(([False], word[:-1])))
    stretch = np.cumsum(begins_stretch)
    lengths = np.bincount(stretch[word], minlength=int(stretch[-1]) + 1)
    letters = np.bincount(stretch[letter & ~escape], minlength=len(lengths))
    digits = np.bincount(stretch[digit & ~escape], minlength=len(lengths))
    long = (lengths >= LONG_SECRET_BYTES) & (letters > 0) & (digits > 0)
    secret |= word & long[stretch]
    masked: NDArray[np.bool_] = secret & ~escape
    return masked
