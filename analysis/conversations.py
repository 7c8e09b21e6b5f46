"""What each connection speaks, and which end asks: told from bytes, not from ports."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from scope_ebpf.analysis.wire import Wire
from scope_ebpf.protocols.contract import Protocol, Role
from scope_ebpf.protocols.heads import Heads

# So many heads of each connection are shown to every protocol; the rest only to the one that was
# recognised, if any.
_SAMPLED_HEADS = 6
# After so many votes for one protocol the others are not asked any more.
_SETTLED_VOTES = 2

UNKNOWN = -1


@dataclass(frozen=True)
class Conversations:
    """What the connections of a wire speak.

    - `protocol`: for each message, an index into `protocols`; -1: none was recognised
    - `client`: for each message, whether its end of the connection is the one that asks
    - `role`: for each message, what its head was recognised as, `Role.NONE` without a head
    """

    protocols: Sequence[Protocol]
    protocol: NDArray[np.int8]
    client: NDArray[np.bool_]
    role: NDArray[np.uint8]


def recognise(
    wire: Wire,
    heads: Heads,
    rows: NDArray[np.intp],
    protocols: Sequence[Protocol],
    datagrams: NDArray[np.bool_],
) -> Conversations:
    """Tell the protocol and the asking end of each connection.

    `heads` are those of the messages `rows`. `datagrams` tells for each message whether its
    connection is one of datagrams. A connection speaks the protocol that most of its first heads
    are recognised as. Where no head tells which end asks, the end that spoke first does, if the
    recording saw the connection's beginning.
    """
    number, begins = _numbered(wire.connection)
    count = len(begins)
    of_head = number[rows]
    nth = _rank_within(of_head)
    sampled = np.flatnonzero(nth < _SAMPLED_HEADS)
    votes = np.zeros((len(protocols), count), np.int32)
    asks = np.zeros((len(protocols), count), np.int32)
    role = np.zeros(len(rows), np.uint8)
    claimed = np.full(len(rows), UNKNOWN, np.int8)
    for index, protocol in enumerate(protocols):
        fits = datagrams[rows[sampled]] == protocol.datagrams
        # one head may look like another protocol's by chance, two do not
        settled = votes.max(axis=0, initial=0) >= _SETTLED_VOTES
        asked = sampled[fits & ~settled[of_head[sampled]]]
        roles = protocol.recognise(heads.take(asked))
        told = np.flatnonzero(roles)
        places = asked[told]
        np.add.at(votes[index], of_head[places], 1)
        sign = _asking(roles[told], wire.receive[rows[places]])
        np.add.at(asks[index], of_head[places], sign)
        fresh = claimed[places] == UNKNOWN
        claimed[places[fresh]] = index
        role[places[fresh]] = roles[told][fresh]
    best = np.argmax(votes, axis=0)
    spoken = np.where(votes[best, np.arange(count)] > 0, best, UNKNOWN).astype(np.int8)
    # what the samples said in another protocol's words is not this connection's
    role[claimed != spoken[of_head]] = Role.NONE
    later = nth >= _SAMPLED_HEADS
    balance = np.where(spoken >= 0, asks[best, np.arange(count)], 0)
    for index, protocol in enumerate(protocols):
        mine = np.flatnonzero((spoken[of_head] == index) & (later | (claimed != index)))
        if len(mine):
            roles = protocol.recognise(heads.take(mine))
            role[mine] = roles
            told = np.flatnonzero(roles)
            sign = _asking(roles[told], wire.receive[rows[mine[told]]])
            np.add.at(balance, of_head[mine[told]], sign)
    # An unknown protocol, or one whose recognised heads contradict each other.
    first_sends = ~wire.receive[begins]
    client = np.where(balance != 0, balance > 0, first_sends)
    whole = np.zeros(len(wire), np.uint8)
    whole[rows] = role
    return Conversations(protocols, spoken[number], client[number], whole)


def _asking(roles: NDArray[np.uint8], receive: NDArray[np.bool_]) -> NDArray[np.int32]:
    """+1 where a message says that its own end asks, -1 where it says that the other one does."""
    return np.where((roles == Role.REQUEST) != receive, 1, -1).astype(np.int32)


def _numbered(connection: NDArray[np.uint32]) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """A running number of each connection for each message, and where each begins."""
    if not len(connection):
        return np.zeros(0, np.intp), np.zeros(0, np.intp)
    fresh = np.r_[True, connection[1:] != connection[:-1]]
    return np.cumsum(fresh) - 1, np.flatnonzero(fresh)


def _rank_within(groups: NDArray[np.intp]) -> NDArray[np.intp]:
    """Position of each element within its run of equal neighbours."""
    if not len(groups):
        return np.zeros(0, np.intp)
    fresh = np.r_[True, groups[1:] != groups[:-1]]
    begins = np.flatnonzero(fresh)
    rank: NDArray[np.intp] = np.arange(len(groups)) - begins[np.cumsum(fresh) - 1]
    return rank
