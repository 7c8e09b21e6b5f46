"""Where messages, lines and headers of HTTP/1 begin and end (RFC 9112), in many heads at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from scope_ebpf.protocols.contract import Role, Roles
from scope_ebpf.protocols.heads import Bytes, Heads, Numbers

# IANA's registry of methods, 2024, without PRI (HTTP/2's preface), and QUERY (a draft in use).
METHODS: Final = (
    "ACL|BASELINE-CONTROL|BIND|CHECKIN|CHECKOUT|CONNECT|COPY|DELETE|GET|HEAD|LABEL|LINK|LOCK|MERGE|"
    "MKACTIVITY|MKCALENDAR|MKCOL|MKREDIRECTREF|MKWORKSPACE|MOVE|OPTIONS|ORDERPATCH|PATCH|POST|"
    "PROPFIND|PROPPATCH|PUT|QUERY|REBIND|REPORT|SEARCH|TRACE|UNBIND|UNCHECKOUT|UNLINK|UNLOCK|"
    "UPDATE|UPDATEREDIRECTREF|VERSION-CONTROL"
)
# A request line that is longer than the head, perhaps masked: `GET /a?b=` or `GET /a?b HTT`.
_UNFINISHED: Final = (
    rf"^(?:(?:{METHODS}) (?:/|\*|https?://)|CONNECT [\w\[?])[^\x00-\x20]*(?: [!-~]{{0,9}}\r?)?$"
)
LONGEST_METHOD: Final = 20

# Headers whose values are kept: they tell how the message is framed and what kind of thing it is.
KEPT_HEADERS: Final = (
    b"content-length",
    b"transfer-encoding",
    b"connection",
    b"upgrade",
    b"host",
    b"content-type",
    b"expect",
    b"server",
)
_CONTENT_LENGTH, _TRANSFER_ENCODING = 1, 2  # places in KEPT_HEADERS, from 1
_LONGEST_NAME: Final = max(map(len, KEPT_HEADERS))
# The only one of KEPT_HEADERS, from 1, that has a length and a first letter; and all their bytes.
_CANDIDATES: Final = np.zeros((_LONGEST_NAME + 2, 256), np.uint8)
_NAMES: Final = np.zeros((len(KEPT_HEADERS) + 1, _LONGEST_NAME), np.uint8)
for _number, _name in enumerate(KEPT_HEADERS, 1):
    _CANDIDATES[len(_name), _name[0]] = _number
    _NAMES[_number, : len(_name)] = list(_name)

# Requests of one head beyond this are not looked at; 512 bytes hold 28 of the shortest.
_MOST_MESSAGES: Final = 256
_UNKNOWN: Final = 1 << 60  # a length that nobody can tell
_ROOM: Final = 64

_CR, LF, SPACE, _COLON = 0x0D, 0x0A, 0x20, 0x3A
_VERSION: Final = np.frombuffer(b"HTTP/1.", np.uint8)
_TOKEN, QUERY, ODD = 1, 2, 4  # kinds of bytes, as bits; few have more than the first


def _kinds() -> bytes:
    """Kinds of each byte: of a token (RFC 9110, 5.6.2), begins a query or fragment, odd in a path."""
    kinds = bytearray(256)
    for byte in b"!#$%&'*+-.^_`|~0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ":
        kinds[byte] |= _TOKEN
    for byte in b"?#":
        kinds[byte] |= QUERY
    for byte in b"@%;":
        kinds[byte] |= ODD
    return bytes(kinds)


_KINDS: Final = _kinds()


def kinds_of(data: Bytes) -> Bytes:
    """Kinds of all bytes; translate() does it several times faster than indexing does."""
    return np.frombuffer(data.tobytes().translate(_KINDS), np.uint8)


def next_place(places: Numbers, after: Numbers, limit: Numbers) -> Numbers:
    """The first of the sorted `places` at or after each `after`; `limit` where it is not before it."""
    if not len(places):
        return limit.copy()
    rank = np.searchsorted(places, after)
    found = places[np.minimum(rank, len(places) - 1)]
    nearest: Numbers = np.where((rank < len(places)) & (found < limit), found, limit)
    return nearest


def padded(data: Bytes) -> Bytes:
    """The data and zeros, so that every place near to them may be looked at: before them, too,
    since a negative place counts from the end."""
    return np.concatenate([data, np.zeros(_ROOM, np.uint8)])


def _says_version(data: Bytes, places: Numbers) -> NDArray[np.bool_]:
    """Whether `HTTP/1.0` or `HTTP/1.1` stands at each place."""
    seen = data[places + 7]
    right: NDArray[np.bool_] = (seen == 0x30) | (seen == 0x31)
    for column, byte in enumerate(_VERSION):
        right &= data[places + column] == byte
    return right


def line_ends_of(data: Bytes, newlines: Numbers, begins: Numbers, ends: Numbers) -> Numbers:
    """Where the text of each line ends: before its CR LF or LF, or where the head ends."""
    stops = next_place(newlines, begins, ends)
    cut = (stops < ends) & (stops > begins) & (data[stops - 1] == _CR)
    text_ends: Numbers = stops - cut
    return text_ends


def request_lines(
    data: Bytes, newlines: Numbers, begins: Numbers, ends: Numbers
) -> tuple[NDArray[np.bool_], Numbers]:
    """Whether a whole line `METHOD target HTTP/1.x` begins at each place, and where its target ends."""
    line_ends = line_ends_of(data, newlines, begins, ends)
    whole = next_place(newlines, begins, ends) < ends
    rows = np.flatnonzero(whole & (line_ends - begins >= len("A / HTTP/1.1")))
    rows = rows[_says_version(data, line_ends[rows] - 8)]
    rows = rows[data[line_ends[rows] - 9] == SPACE]
    start = data[begins[rows, None] + np.arange(LONGEST_METHOD + 1)]
    spaces = start == SPACE
    method = np.where(spaces.any(axis=1), spaces.argmax(axis=1), LONGEST_METHOD + 1)
    letters = ((start >= 0x41) & (start <= 0x5A)) | (start == 0x2D)
    tokens = np.where(letters.all(axis=1), LONGEST_METHOD + 1, (~letters).argmax(axis=1))
    target_bytes = line_ends[rows] - 9 - (begins[rows] + method + 1)
    good = (method > 0) & (method == tokens) & (target_bytes > 0) & (start[:, 0] != 0x2D)
    right = np.zeros(len(begins), np.bool_)
    right[rows[good & (method <= LONGEST_METHOD)]] = True
    return right, np.where(right, line_ends - 9, line_ends)


def status_lines(data: Bytes, begins: Numbers, ends: Numbers) -> NDArray[np.bool_]:
    """Whether a status line begins at each place: `HTTP/1.1 200`, with or without a reason."""
    right: NDArray[np.bool_] = (
        (ends - begins >= 12) & _says_version(data, begins) & (data[begins + 8] == SPACE)
    )
    first = data[begins + 9]
    right &= (first >= 0x31) & (first <= 0x39)
    for column in (10, 11):
        digit = data[begins + column]
        right &= (digit >= 0x30) & (digit <= 0x39)
    after = data[begins + 12]
    right &= (ends - begins == 12) | (after == SPACE) | (after == _CR) | (after == LF)
    return right


def cut_off(data: Bytes, newlines: Numbers, begins: Numbers, ends: Numbers) -> NDArray[np.bool_]:
    """Whether a request line begins at each place and the head ends before the line does."""
    right = np.zeros(len(begins), np.bool_)
    rows = np.flatnonzero(next_place(newlines, begins, ends) == ends)
    # Few heads are cut off there, so the rest may cost more: but first see that there is a space.
    start = data[begins[rows, None] + np.arange(LONGEST_METHOD)]
    rows = rows[(start == SPACE).any(axis=1)]
    if len(rows):
        lines = Heads(data, begins[rows], (ends - begins)[rows], (ends - begins)[rows])
        right[rows] = lines.take(np.arange(len(rows))).text().str.contains(_UNFINISHED).to_numpy()
    return right


@dataclass(frozen=True)
class Part:
    """Messages of one step of `walk`, one per head that has so many, and their header lines."""

    rows: NDArray[np.intp]  # of the heads
    begins: Numbers
    line_ends: Numbers
    ends: Numbers  # of their headers with the empty line; the head's end where it is not there
    header_begins: Numbers
    colons: Numbers  # of header lines; -1: it has none, it goes on a line before, it is broken
    header_ends: Numbers
    header_names: Numbers  # from 1: KEPT_HEADERS; 0: another


def _before_empty_lines(data: Bytes, newlines: Numbers) -> NDArray[np.intp]:
    """Which newlines are followed by an empty line, if the next newline is in the same head."""
    gaps = np.diff(newlines)
    return np.flatnonzero((gaps == 1) | ((gaps == 2) & (data[newlines[:-1] + 1] == _CR)))


def walk(heads: Heads, roles: Roles, data: Bytes, kinds: Bytes, newlines: Numbers) -> list[Part]:
    """Steps through messages: all first ones, all second ones, as far as it is sure that they are.

    `data` are the heads' data, padded; `kinds` those of their bytes, `newlines` where these stand.
    """
    head_ends = heads.begins + heads.lengths
    # An empty line follows the newlines at these places in `newlines`.
    empty = _before_empty_lines(data, newlines)
    others = np.flatnonzero((kinds & _TOKEN) == 0)  # bytes that end a header's name
    rows = np.flatnonzero(roles)
    begins = heads.begins[rows]
    parts: list[Part] = []
    while len(rows) and len(parts) < _MOST_MESSAGES:
        limits = head_ends[rows]
        first = np.searchsorted(newlines, begins)
        last = np.searchsorted(newlines, limits)
        rank = np.searchsorted(empty, first)
        found = np.append(empty, len(newlines))[rank]
        # The newline of the empty line itself must be in this head, too.
        ended = found + 1 < last
        stop = (
            np.where(ended, newlines[np.minimum(found + 1, len(newlines) - 1)] + 1, limits)
            if (len(newlines))
            else limits
        )
        # Header lines: those that end with newline first+1 to found, and one cut off by the head.
        counts = np.where(ended, found - first, np.maximum(last - first, 0))
        message = np.repeat(np.arange(len(rows)), counts)
        nth = np.arange(len(message)) - np.repeat(np.cumsum(counts) - counts, counts)
        before = first[message] + nth
        line_begins = newlines[before] + 1
        line_ends = np.append(newlines, len(data))[before + 1]
        line_ends = np.minimum(line_ends, limits[message])
        colons = next_place(others, line_begins, line_ends)
        named = (colons > line_begins) & (colons < line_ends) & (data[colons] == _COLON)
        colons = np.where(named, colons, -1)
        part = Part(
            rows=rows,
            begins=begins,
            line_ends=line_ends_of(data, newlines, begins, limits),
            ends=stop,
            header_begins=line_begins,
            colons=colons,
            header_ends=line_ends,
            header_names=_names(data, line_begins, colons),
        )
        parts.append(part)
        # What comes next? Only heads with more bytes after the empty line are of interest.
        goes = ended & (stop < limits)
        if not goes.any():
            break
        body = _body_lengths(data, part, message)
        response = roles[rows] == Role.RESPONSE
        status = data[begins[:, None] + np.arange(9, 12)] - 0x30
        interim = (status[:, 0] == 1) & ~((status[:, 1] == 0) & (status[:, 2] == 1))
        body = np.where(response, np.where(interim, 0, _UNKNOWN), body)
        after = stop + body
        go = ended & (after < limits)
        rows, begins, limits, response = rows[go], after[go], limits[go], response[go]
        right, _ = request_lines(data, newlines, begins, limits)
        right |= cut_off(data, newlines, begins, limits)
        go = np.where(response, status_lines(data, begins, limits), right)
        rows, begins = rows[go], begins[go]
    return parts


def _names(data: Bytes, begins: Numbers, colons: Numbers) -> Numbers:
    """Which of KEPT_HEADERS each header line is, from 1; 0: another."""
    lengths = np.clip(colons - begins, 0, _LONGEST_NAME + 1)
    names: Numbers = _CANDIDATES[lengths, data[begins] | 0x20].astype(np.int64)
    lines = np.flatnonzero(names)
    # All bytes are of a token, among which | 0x20 makes small letters and changes no hyphen.
    said = data[begins[lines, None] + np.arange(_LONGEST_NAME)] | 0x20
    wanted = _NAMES[names[lines]]
    names[lines[((said != wanted) & (wanted > 0)).any(axis=1)]] = 0
    return names


def _body_lengths(data: Bytes, part: Part, message: NDArray[np.intp]) -> Numbers:
    """How long each request's body is by its headers: 0 without any, _UNKNOWN if that is not sure."""
    lengths = np.zeros(len(part.rows), np.int64)
    lines = np.flatnonzero(part.header_names == _CONTENT_LENGTH)
    places = part.colons[lines, None] + np.arange(1, 21)
    byte = np.where(places < part.header_ends[lines, None], data[places], _CR)
    digit = (byte >= 0x30) & (byte <= 0x39)
    digits = digit.sum(axis=1)
    blank = (byte == SPACE) | (byte == 0x09) | (byte == _CR)
    sure = (digit | blank).all(axis=1) & (digits > 0) & (digits < 17)
    power = np.where(digit, digits[:, None] - np.cumsum(digit, axis=1), 0)[sure]
    values = np.full(len(lines), _UNKNOWN)
    figures = np.where(digit, byte - 0x30, 0)[sure].astype(np.int64)
    values[sure] = (figures * 10**power).sum(axis=1)
    np.maximum.at(lengths, message[lines], values)
    lengths[message[part.header_names == _TRANSFER_ENCODING]] = _UNKNOWN
    return lengths


def goes_on(heads: Heads) -> NDArray[np.bool_]:
    """Whether anything follows the first empty line of each head."""
    ends = heads.begins + heads.lengths
    data = padded(heads.data)
    newlines = np.flatnonzero(data == LF)
    empty = _before_empty_lines(data, newlines)
    # Of an empty line, its own newline is the next one.
    longer: NDArray[np.bool_] = next_place(newlines[empty + 1], heads.begins, ends) + 1 < ends
    return longer
