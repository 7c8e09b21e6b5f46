"""Redis, RESP2 and RESP3: https://redis.io/docs/latest/develop/reference/protocol-spec/

A request is an array of bulk strings whose first is a command that is known here; whatever else is
well formed is a response. In redacted heads the framing, commands, options, names of queues and the
leading words of keys are clear.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

from scope_ebpf.protocols import redis_commands as table
from scope_ebpf.protocols import redis_names, resp
from scope_ebpf.protocols.contract import Kept, Protocol, Role, Roles
from scope_ebpf.protocols.heads import Heads, Numbers
from scope_ebpf.protocols.redis_replies import (
    channels_of,
    code_size,
    parse_responses,
    pushed,
)
from scope_ebpf.protocols.redis_requests import is_key, parse_requests, read_requests
from scope_ebpf.protocols.resp import Items, Mask, Rows, padded

_INLINE_BYTES: Final = 256
# So many well-formed items are enough to know the protocol.
_ITEMS_TO_KNOW: Final = 3
# Words that replies and pushed messages begin with, and that tell nothing secret.
_REPLIES: Final = resp.Names(("OK", "QUEUED", "PONG", "NOKEY", "CONTINUE", "RESET"))


def recognise(heads: Heads) -> Roles:
    """REQUEST, RESPONSE or NONE for each head."""
    return _recognise(heads)[0]


def recognise_and_keep(heads: Heads) -> tuple[Roles, Kept]:
    """What both say, after one walk over the items."""
    roles, walked = _recognise(heads)
    return roles, _keep(heads, roles, walked)


def _recognise(heads: Heads) -> tuple[Roles, resp.Walked]:
    """Roles, and the items of the heads that may be made of items."""
    roles = np.zeros(len(heads), np.uint8)
    some = np.flatnonzero(heads.lengths >= 3)
    first = heads.data[heads.begins[some]]
    _inline(heads, some[(first | 0x20) - ord("a") < 26], roles)
    rows = some[resp.begins_item(first)]
    walked = resp.follow(heads, rows)
    if not len(rows):
        return roles, walked
    items = walked.items
    known = np.zeros(len(heads), np.bool_)
    known[rows] = walked.wrong_at >= _ITEMS_TO_KNOW
    data = padded(heads)
    leads = items.take(items.order == 0)
    good = known[leads.head]
    # lines are text, and errors begin with a code in capitals
    size = leads.end - leads.begin
    letter = data[leads.begin]
    good &= (leads.kind != resp.ERROR) | ((letter >= ord("A")) & (letter <= ord("Z")) & (size >= 2))
    integers = np.flatnonzero(leads.kind == resp.INTEGER)
    good[integers] &= _integers(data, leads.take(integers))
    good &= (leads.kind != resp.NULL) | (size == 0)
    good &= (leads.kind != resp.BOOLEAN) | ((size == 1) & ((letter == 0x74) | (letter == 0x66)))
    good &= (leads.kind != resp.DOUBLE) | ((size > 0) & (size <= 32))
    lines = np.flatnonzero(~_COUNTED[leads.kind])
    good[lines] &= _printable(data, leads.begin[lines], size[lines])
    roles[leads.head[good]] = Role.RESPONSE
    array = (leads.kind == resp.ARRAY) & (leads.number > 0) & good
    chosen = np.zeros(len(heads), np.bool_)
    chosen[leads.head[array]] = True
    names = (items.order == 1) & (items.kind == resp.BULK) & items.whole & chosen[items.head]
    asks = table.NAMES.find(data, items.begin[names], items.end[names]) >= 0
    roles[items.head[names][asks]] = Role.REQUEST
    return roles, walked


_COUNTED: Final = np.zeros(256, np.bool_)
_COUNTED[list(b"$!=*%~>|")] = True


def _integers(data: NDArray[np.uint8], items: Items) -> Mask:
    """Which lines are whole numbers: up to 20 characters, digits and a sign before them."""
    size = items.end - items.begin
    window = data[items.begin[:, None] + np.arange(20)]
    digit = (window >= ord("0")) & (window <= ord("9"))
    signed = (window[:, 0] == ord("-")) | (window[:, 0] == ord("+"))
    digit[:, 0] |= signed & (size > 1)
    outside = np.arange(20) >= size[:, None]
    good: Mask = (size > 0) & (size <= 20) & (digit | outside).all(axis=1)
    return good


def _printable(data: NDArray[np.uint8], begin: Numbers, size: Numbers) -> Mask:
    """Which lines hold no control bytes in their first 32."""
    window = data[begin[:, None] + np.arange(32)]
    outside = np.arange(32) >= size[:, None]
    good: Mask = ((window >= 0x20) & (window != 0x7F) | outside).all(axis=1)
    return good


def _inline(heads: Heads, rows: Rows, roles: Roles) -> None:
    """Mark commands that were typed: one line, whole, of a command that no other protocol has."""
    rows = rows[(heads.lengths[rows] <= _INLINE_BYTES) & (heads.totals[rows] <= _INLINE_BYTES)]
    begin = heads.begins[rows]
    last = begin + heads.lengths[rows] - 1
    ended = (heads.data[last] == 10) & (heads.data[np.maximum(last - 1, 0)] == 13)
    rows, begin, last = rows[ended], begin[ended], last[ended]
    if not len(rows):
        return
    data = padded(heads)
    window = data[begin[:, None] + np.arange(resp.Names.WIDTH)]
    size = np.argmax((window == 32) | (window == 13), axis=1)
    name = table.NAMES.find(data, begin, begin + size)
    good = (name >= 0) & table.INLINE[name]
    good &= _printable(data, begin, last - 1 - begin)
    roles[rows[good]] = Role.REQUEST


def keep(heads: Heads, roles: Roles) -> Kept:
    """Framing, commands, options, queue names, leading words of keys; status words of replies."""
    return _keep(heads, roles, resp.follow(heads, np.flatnonzero(roles)))


def _keep(heads: Heads, roles: Roles, walked: resp.Walked) -> Kept:
    kept = np.zeros(len(heads.data), np.bool_)
    kept[walked.cuts[roles[walked.cut_heads] > 0]] = True
    asked = np.flatnonzero(roles == Role.REQUEST)
    array = heads.data[heads.begins[asked]] == resp.ARRAY if len(asked) else asked > 0
    typed = heads.begins[asked[~array]]
    if len(typed):
        window = padded(heads)[typed[:, None] + np.arange(resp.Names.WIDTH)]
        size = np.argmax((window == 32) | (window == 13), axis=1)
        kept[resp.ranges(typed, size)] = True
    items = walked.items
    role = roles[items.head]
    _keep_requests(heads, items.take(role == Role.REQUEST), kept)
    _keep_responses(heads, items.take(role == Role.RESPONSE), kept)
    return kept


def _keep_requests(heads: Heads, items: Items, kept: Kept) -> None:
    if not len(items):
        return
    kept[resp.ranges(items.at, items.begin - items.at)] = True
    found = read_requests(heads, items)
    arguments, name = found.arguments, found.name[found.command]
    size = arguments.end - arguments.begin
    plain = (found.position == 0) & (name >= 0)
    option = found.options >= 0
    # the rest of HELLO's and AUTH's arguments are names and passwords
    plain |= option & (found.position > 0)
    counts = (found.position == table.COUNTS_KEYS_AT[name]) & (found.position > 0) & arguments.whole
    plain |= counts & (size <= 2)
    sha = np.flatnonzero(
        table.EVAL_SHA[name] & (found.position == 1) & (size == 40) & arguments.whole
    )
    if len(sha):
        window = found.data[arguments.begin[sha, None] + np.arange(40)]
        plain[sha[redis_names.is_hex(window).all(axis=1)]] = True
    kept[resp.ranges(arguments.begin[plain], size[plain])] = True
    keys = np.flatnonzero(is_key(found))
    queues = keys[(table.ACTION[name[keys]] > 0) & arguments.whole[keys]]
    good = redis_names.are_queues(found.data, arguments.begin[queues], size[queues])
    kept[resp.ranges(arguments.begin[queues[good]], size[queues[good]])] = True
    kept[redis_names.key_words(found.data, arguments.begin[keys], size[keys])] = True


def _keep_responses(heads: Heads, items: Items, kept: Kept) -> None:
    if not len(items):
        return
    data = padded(heads)
    size = items.end - items.begin
    counted = _COUNTED[items.kind]
    kept[resp.ranges(items.at[counted], (items.begin - items.at)[counted])] = True
    plain = (items.kind == resp.INTEGER) & items.top
    plain[plain] = _integers(data, items.take(plain))
    plain |= (items.kind == resp.BOOLEAN) | (items.kind == resp.NULL)
    lines = np.flatnonzero(items.kind == resp.SIMPLE)
    plain[lines[_REPLIES.find(data, items.begin[lines], items.end[lines]) >= 0]] = True
    signed = items.kind == resp.ERROR
    kept[items.at[signed | plain]] = True
    errors = np.flatnonzero(signed)
    if len(errors):
        code = code_size(data, items.begin[errors], size[errors])
        kept[resp.ranges(items.begin[errors], code)] = True
    # pushed messages: their word and channel
    word, kind = pushed(data, items)
    plain[word] = True
    row = channels_of(items, word, kind)
    plain[row[redis_names.are_queues(data, items.begin[row], size[row])]] = True
    kept[redis_names.key_words(data, items.begin[row], size[row])] = True
    kept[resp.ranges(items.begin[plain], size[plain])] = True


PROTOCOL: Final = Protocol(
    name="redis",
    recognise=recognise,
    keep=keep,
    parse_requests=parse_requests,
    parse_responses=parse_responses,
    recognise_and_keep=recognise_and_keep,
)
