"""DNS over UDP (RFC 1035), from the header and the question of each datagram.

A query and its response both hold the question, so either tells what was asked. Recognised is what
resolvers and servers of today send: one question of a usual type and class. Multicast DNS, which
asks several questions at once and answers without one, is not. Over TCP, where a length comes first,
it is not looked at.
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

_HEADER_BYTES: Final = 12
_MOST_NAME_BYTES: Final = 255
# Record types that are asked for (IANA, Resource Record TYPEs).
TYPES: Final = {
    1: "A", 2: "NS", 5: "CNAME", 6: "SOA", 10: "NULL", 12: "PTR", 13: "HINFO", 15: "MX", 16: "TXT",
    17: "RP", 18: "AFSDB", 25: "KEY", 28: "AAAA", 29: "LOC", 33: "SRV", 35: "NAPTR", 36: "KX",
    37: "CERT", 39: "DNAME", 43: "DS", 44: "SSHFP", 46: "RRSIG", 47: "NSEC", 48: "DNSKEY",
    50: "NSEC3", 51: "NSEC3PARAM", 52: "TLSA", 53: "SMIMEA", 59: "CDS", 60: "CDNSKEY",
    61: "OPENPGPKEY", 64: "SVCB", 65: "HTTPS", 99: "SPF", 249: "TKEY", 250: "TSIG", 251: "IXFR",
    252: "AXFR", 255: "ANY", 256: "URI", 257: "CAA",
}  # fmt: skip
_CLASSES: Final = (1, 3, 4, 255)  # Internet, Chaos, Hesiod, any
# Response codes of a header (IANA, DNS RCODEs), and what the failures among them mean.
RESPONSE_CODES: Final = {
    0: "NOERROR", 1: "FORMERR", 2: "SERVFAIL", 3: "NXDOMAIN", 4: "NOTIMP", 5: "REFUSED",
    6: "YXDOMAIN", 7: "YXRRSET", 8: "NXRRSET", 9: "NOTAUTH", 10: "NOTZONE",
}  # fmt: skip
_FAILURES: Final = {
    "FORMERR": "FORMERR: the server could not read the query",
    "SERVFAIL": "SERVFAIL: the server could not find out",
    "NOTIMP": "NOTIMP: the server does not answer such queries",
    "REFUSED": "REFUSED: the server refuses to answer",
    "NOTAUTH": "NOTAUTH: the server is not responsible for the zone",
}


def _number(matrix: Bytes, column: int) -> Numbers:
    """Two bytes as a number, most significant first."""
    number: Numbers = matrix[:, column].astype(np.int64) << 8 | matrix[:, column + 1]
    return number


def _byte(heads: Heads, rows: NDArray[np.intp], places: Numbers) -> Bytes:
    """The byte at a place of each of these heads; zero behind the end."""
    inside = places < heads.lengths[rows]
    if not inside.any():
        return np.zeros(len(rows), np.uint8)
    found = heads.data[np.where(inside, heads.begins[rows] + places, 0)]
    return np.where(inside, found, 0).astype(np.uint8)


def _name_ends(heads: Heads, rows: NDArray[np.intp]) -> Numbers:
    """Where the question's name ends in each of these heads: behind its empty label.

    -1: it is no name. -2: it is one as far as the head goes, which ends before the name does.
    """
    ends = np.full(len(rows), -1, np.int64)
    active = np.arange(len(rows))
    places = np.full(len(rows), _HEADER_BYTES, np.int64)
    # Each step goes behind one label, of at least two bytes.
    while len(active):
        at = places[active]
        length = _byte(heads, rows[active], at).astype(np.int64)
        over = at >= heads.lengths[rows[active]]
        ends[active[over]] = -2
        done = ~over & (length == 0)
        ends[active[done]] = at[done] + 1
        # 64 and more would be a pointer, which has nowhere to point to from the first name.
        on = ~over & (length > 0) & (length < 64)
        on &= at + length - _HEADER_BYTES < _MOST_NAME_BYTES
        active = active[on]
        places[active] += length[on] + 1
    return ends


def _printable(heads: Heads, rows: NDArray[np.intp], ends: Numbers) -> NDArray[np.bool_]:
    """Whether names hold nothing but what host and service names do, apart from label lengths."""
    name = heads.take(rows)
    lengths = np.maximum(np.minimum(ends, name.lengths) - _HEADER_BYTES, 0)
    begins = np.cumsum(lengths) - lengths
    places = np.repeat(name.begins + _HEADER_BYTES - begins, lengths) + np.arange(lengths.sum())
    data = name.data[places]
    # A length is below 64, which is also where digits and hyphens are: only what is neither counts.
    strange = (data == 0x20) | (data == 0x22) | ((data >= 0x5B) & (data < 0x5F)) | (data == 0x60)
    strange |= data >= 0x7B
    sums = np.concatenate(([0], np.cumsum(strange)))
    plain: NDArray[np.bool_] = sums[begins + lengths] == sums[begins]
    return plain


def recognise(heads: Heads) -> Roles:
    """Role of each datagram, by its flags, its counts, and a question that makes sense."""
    roles = np.zeros(len(heads), np.uint8)
    header = heads.matrix(_HEADER_BYTES)
    high, low = header[:, 2], header[:, 3]
    response = high >= 0x80
    good = (heads.lengths >= _HEADER_BYTES + 5) & (_number(header, 4) == 1)
    good &= (high & 0x78) == 0  # a standard query
    good &= (low & 0x40) == 0  # reserved
    good &= (low & 0x0F) <= 10
    answers, authorities, extras = (_number(header, place) for place in (6, 8, 10))
    records = answers + authorities + extras
    # A query brings no records but EDNS options and a signature, and no results: AA, TC, RA, code.
    asks = (answers == 0) & (authorities == 0) & (extras <= 2)
    asks &= ((high & 0x06) == 0) & ((low & 0x8F) == 0)
    # A record takes 11 bytes at the least.
    answer = records * 11 <= heads.totals - (_HEADER_BYTES + 5)
    good &= np.where(response, answer, asks)
    rows = np.flatnonzero(good)
    if not len(rows):
        return roles
    ends = _name_ends(heads, rows)
    whole = ends >= 0
    kind = (_byte(heads, rows, ends).astype(np.int64) << 8) | _byte(heads, rows, ends + 1)
    group = (_byte(heads, rows, ends + 2).astype(np.int64) << 8) | _byte(heads, rows, ends + 3)
    asked = whole & (ends + 4 <= heads.lengths[rows])
    asked &= np.isin(kind, list(TYPES)) & np.isin(group, _CLASSES)
    # The head may end within the question only if the datagram did not.
    cut = heads.totals[rows] > heads.lengths[rows]
    cut &= (ends == -2) | (whole & (ends + 4 > heads.lengths[rows]))
    fine = asked | cut
    rows, ends = rows[fine], np.where(ends >= 0, ends, _HEADER_BYTES + _MOST_NAME_BYTES)[fine]
    rows = rows[_printable(heads, rows, ends)]
    roles[rows] = np.where(response[rows], Role.RESPONSE, Role.REQUEST)
    return roles


def keep(heads: Heads, roles: Roles) -> Kept:
    """Kept: the header and the question, of queries and of responses.

    Masked: all records. Nothing here reads them, and a TXT record may hold a token, an address of
    the inside network, or EDNS the address of a client.
    """
    kept = np.zeros(len(heads.data), np.bool_)
    rows = np.flatnonzero(roles)
    ends = _name_ends(heads, rows)
    lengths = heads.lengths[rows]
    lengths = np.where(ends == -1, 0, np.where(ends == -2, lengths, np.minimum(ends + 4, lengths)))
    begins = np.cumsum(lengths) - lengths
    kept[np.repeat(heads.begins[rows] - begins, lengths) + np.arange(lengths.sum())] = True
    return kept


def _questions(heads: Heads) -> pl.DataFrame:
    """Columns `type` and `name` of each head's question; null where the head does not tell."""
    rows = np.arange(len(heads))
    ends = _name_ends(heads, rows)
    name_ends = np.where(ends >= 0, np.minimum(ends - 1, heads.lengths), heads.lengths)
    begins = np.minimum(heads.begins + _HEADER_BYTES, len(heads.data))
    lengths = np.maximum(name_ends - _HEADER_BYTES, 0)
    lengths[ends == -1] = 0
    # Write dots over the lengths of labels, in a copy of the names.
    names = Heads(heads.data, begins, lengths, heads.totals).take(rows)
    data = names.data.copy()
    active = np.flatnonzero(lengths > 0)
    places = names.begins[active]
    last = (names.begins + names.lengths)[active]
    while len(places):
        length = data[places].astype(np.int64)
        data[places] = ord(".")
        places = places + length + 1
        on = (places < last) & (length > 0)
        places, last = places[on], last[on]
    text = Heads(data, names.begins, names.lengths, names.lengths).text()
    ends = np.maximum(ends, 0)
    kind = (_byte(heads, rows, ends).astype(np.int64) << 8) | _byte(heads, rows, ends + 1)
    told = (ends > 0) & (ends + 2 <= heads.lengths)
    number = pl.col("number")
    return pl.DataFrame({"name": text, "number": kind, "told": told, "whole": ends > 0}).select(
        name=pl.when("whole")
        .then(
            pl.when(pl.col("name") == "")
            .then(pl.lit("."))
            .otherwise(pl.col("name").str.slice(1).str.replace_all("\x7f", "\ufffd", literal=True))
        )
        .otherwise(None),
        type=pl.when("told").then(
            number.replace_strict(
                TYPES,
                default=pl.concat_str(pl.lit("TYPE"), number.cast(pl.String)),
                return_dtype=pl.String,
            )
        ),
    )


def parse_requests(heads: Heads) -> pl.DataFrame:
    """Columns of REQUEST_SCHEMA: `A example.com` as operation, the name in small letters.

    Names of addresses (reverse lookups) are folded: `PTR {id}.in-addr.arpa`.
    """
    name = (
        pl.col("name")
        .str.to_lowercase()  # resolvers mix large and small letters to tell forged answers
        .str.replace(r"^(?:[0-9a-f]+[.])+(in-addr|ip6)[.]arpa$", "{id}.${1}.arpa")
    )
    return (
        _questions(heads)
        .select(
            operation=pl.concat_str("type", name, separator=" "),
            detail=pl.concat_str("type", "name", separator=" "),
            requests=pl.lit(1),
            answered=pl.lit(True),
            waits=pl.lit(False),
            queue_action=pl.lit(None),
            queue=pl.lit(None),
            element=pl.lit(None),
            defines=pl.lit(None),
            uses=pl.lit(None),
        )
        .cast(REQUEST_SCHEMA)
    )


def parse_responses(heads: Heads) -> pl.DataFrame:
    """Columns of RESPONSE_SCHEMA. NXDOMAIN is a miss, no error; a name without such records neither."""
    codes = pl.DataFrame({"code": heads.matrix(4)[:, 3] & 0x0F})
    return (
        codes.select(
            status=pl.col("code")
            .cast(pl.Int64)
            .replace_strict(
                RESPONSE_CODES,
                default=pl.concat_str(pl.lit("RCODE"), pl.col("code").cast(pl.String)),
                return_dtype=pl.String,
            )
        )
        .with_columns(
            error=pl.col("status").replace_strict(_FAILURES, default=None, return_dtype=pl.String),
            miss=pl.col("status") == "NXDOMAIN",
            interim=pl.lit(False),
            queue=pl.lit(None),
            element=pl.lit(None),
            defines=pl.lit(None),
            transaction=pl.lit(None),
        )
        .cast(RESPONSE_SCHEMA)
    )


PROTOCOL: Final = Protocol(
    "dns",
    recognise,
    keep,
    parse_requests,
    parse_responses,
    datagrams=True,
)
