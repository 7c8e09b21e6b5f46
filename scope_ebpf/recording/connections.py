"""Connections: who is at both ends, numbers that both ends of a stream compute alike, and connect()."""

import ipaddress

import numpy as np
import polars as pl
from numpy.typing import NDArray

from scope_ebpf.recording.schema import frame
from scope_ebpf.records import RecordFlags, RecordLimits

Records = NDArray[np.void]
Words = NDArray[np.uint64]

# Address families and protocols by number: include/linux/socket.h, include/uapi/linux/in.h.
PIPE, AF_UNIX, AF_INET, AF_INET6 = 0, 1, 2, 10
FAMILY_NAMES = {16: "netlink", 17: "packet", 38: "alg", 40: "vsock"}
INET_KINDS = {(1, 6): "tcp", (1, 262): "mptcp", (1, 132): "sctp", (2, 17): "udp"}
UNIX_KINDS = {1: "unix", 2: "unix-datagram", 5: "unix-seqpacket"}

# What a stream's number is made of besides its ends, so that kinds cannot meet.
OWN_SEND, OWN_RECEIVE, UNIX_FROM, PIPE_BOTH, INET = range(1, 6)


def connections_frame(rows: Records) -> pl.DataFrame:
    """Rows of connections, from records.CONNECTION."""
    family = rows["family"]
    inet = (family == AF_INET) | (family == AF_INET6)
    connected = inet & (rows["remote_port"] != 0)
    local = mapped_addresses(rows["local_address"], family)
    remote = mapped_addresses(rows["remote_address"], family)
    send, receive = streams(rows, inet & connected, local, remote)
    columns = frame(
        "connections",
        {
            "time_ns": rows["time_ns"],
            "connection": rows["connection"],
            "kind": kind_names(rows),
            "tgid": rows["tgid"],
            "local_address": address_texts(local, inet),
            "local_port": rows["local_port"],
            "remote_address": address_texts(remote, connected),
            "remote_port": rows["remote_port"],
            "local_path": paths(rows["local_path"], family),
            "remote_path": paths(rows["remote_path"], family),
            "inode": rows["inode"],
            "peer_inode": rows["peer_inode"],
            "netns": rows["netns"],
            "send_stream": send,
            "receive_stream": receive,
        },
    )
    return columns.with_columns(
        pl.when(pl.Series(inet)).then("local_port"),
        pl.when(pl.Series(connected)).then("remote_port"),
        pl.when(pl.col("peer_inode") != 0).then("peer_inode"),
        pl.when(pl.col("netns") != 0).then("netns"),
    ).sort("time_ns")


def connects_frame(rows: Records, cpus: NDArray[np.uint16]) -> pl.DataFrame:
    """Rows of connects, from records.CONNECT and the CPU of each."""
    family = rows["remote_family"]
    inet = (family == AF_INET) | (family == AF_INET6)
    columns = frame(
        "connects",
        {
            "start_ns": rows["start_ns"],
            "duration_ns": rows["duration_ns"],
            "tgid": rows["tgid"],
            "tid": rows["tid"],
            "fd": rows["fd"],
            "kind": kind_names(rows),
            "remote_address": address_texts(mapped_addresses(rows["remote_address"], family), inet),
            "remote_port": rows["remote_port"],
            "remote_path": paths(rows["remote_path"], family),
            "inode": rows["inode"],
            "result": rows["result"],
            "status": rows["flags"] & RecordFlags.FLAG_STATUS,
            "cpu": cpus,
        },
    )
    return columns.with_columns(
        pl.when(pl.Series(inet)).then("remote_port"),
        pl.when(pl.col("fd") != RecordLimits.NO_DESCRIPTOR).then("fd"),
    ).sort("start_ns")


def kind_names(rows: Records) -> list[str]:
    """What each socket is; each different combination is named once."""
    packed = (
        rows["family"].astype(np.uint64) << np.uint64(32)
        | rows["type"].astype(np.uint64) << np.uint64(16)
        | rows["protocol"].astype(np.uint64)
    )
    different, which = np.unique(packed, return_inverse=True)
    names = [kind_name(n >> 32, (n >> 16) & 0xFFFF, n & 0xFFFF) for n in different.tolist()]
    return [names[number] for number in which.tolist()]


def kind_name(family: int, kind: int, protocol: int) -> str:
    """What a socket is, by its family, type and protocol: tcp, udp, unix, pipe, …"""
    if family == PIPE:
        return "pipe"
    if family == AF_UNIX:
        return UNIX_KINDS.get(kind, f"unix-{kind}")
    if family in (AF_INET, AF_INET6):
        return INET_KINDS.get((kind, protocol), f"inet-{kind}")
    return FAMILY_NAMES.get(family, f"family-{family}")


def mapped_addresses(addresses: Records, family: NDArray[np.uint16]) -> NDArray[np.uint8]:
    """Addresses as 16 bytes each, IPv4 ones mapped into IPv6, so that both forms are equal."""
    raw = np.ascontiguousarray(addresses).view(np.uint8).reshape(len(addresses), 16)
    mapped = raw.copy()
    four = family == AF_INET
    mapped[four, :10] = 0
    mapped[four, 10:12] = 0xFF
    mapped[four, 12:] = raw[four, :4]
    return mapped


def address_texts(addresses: NDArray[np.uint8], wanted: NDArray[np.bool_]) -> list[str | None]:
    """Addresses as text, None where none is wanted; each different one is formatted once."""
    halves = np.stack(words(addresses), axis=1).view([("high", "<u8"), ("low", "<u8")]).ravel()
    different, which = np.unique(halves, return_inverse=True)
    texts = [address_text(address.tobytes()) for address in different]
    which[~wanted] = len(texts)
    texts_or_none = [*texts, None]
    return [texts_or_none[number] for number in which.tolist()]


def address_text(address: bytes) -> str:
    """An IPv6 address; an IPv4 address inside of one is shown as IPv4."""
    parsed = ipaddress.IPv6Address(address)
    return str(parsed.ipv4_mapped or parsed)


def paths(data: Records, family: NDArray[np.uint16]) -> list[str | None]:
    """Paths of Unix sockets."""
    texts: list[str | None] = [None] * len(data)
    for row in np.flatnonzero(family == AF_UNIX).tolist():
        texts[row] = unix_path(bytes(data[row]))
    return texts


def unix_path(data: bytes) -> str | None:
    """A Unix socket's path; an abstract one begins with @, as in /proc/net/unix."""
    if data[:1] == b"\0":
        name = data[1:].rstrip(b"\0")
        return "@" + name.decode(errors="backslashreplace") if name else None
    return data.split(b"\0", 1)[0].decode(errors="backslashreplace") or None


def streams(
    rows: Records,
    connected: NDArray[np.bool_],
    local: NDArray[np.uint8],
    remote: NDArray[np.uint8],
) -> tuple[Words, Words]:
    """The numbers of the bytes that each end sends and receives.

    Internet sockets: a hash of protocol, both addresses and ports, and for loopback addresses of the
    network namespace, in which alone they mean something. Unix sockets: of the sending end's id. Pipes: of
    the pipe's. What has no known other end gets numbers of its own.
    """
    identity = rows["connection"].astype(np.uint64)
    send, receive = mix(OWN_SEND, identity), mix(OWN_RECEIVE, identity)
    pipe, unix = rows["family"] == PIPE, rows["family"] == AF_UNIX
    send[pipe] = receive[pipe] = mix(PIPE_BOTH, identity[pipe])
    send[unix] = mix(UNIX_FROM, identity[unix])
    paired = unix & (rows["peer"] != 0)
    receive[paired] = mix(UNIX_FROM, rows["peer"][paired].astype(np.uint64))
    loopback = is_loopback(local) | is_loopback(remote)
    place = np.where(loopback, rows["netns"], 0).astype(np.uint64)
    protocol = rows["protocol"].astype(np.uint64)
    here = (*words(local), rows["local_port"].astype(np.uint64))
    there = (*words(remote), rows["remote_port"].astype(np.uint64))
    send[connected] = mix(INET, protocol, place, *here, *there)[connected]
    receive[connected] = mix(INET, protocol, place, *there, *here)[connected]
    return send, receive


def words(addresses: NDArray[np.uint8]) -> tuple[Words, Words]:
    """16-byte addresses as two 64-bit words."""
    both = np.ascontiguousarray(addresses).view("<u8").reshape(len(addresses), 2)
    return both[:, 0], both[:, 1]


def is_loopback(addresses: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Whether addresses are in 127.0.0.0/8 or ::1."""
    high, low = words(addresses)
    mapped = (high == 0) & (addresses[:, 10] == 0xFF) & (addresses[:, 11] == 0xFF)
    one = np.frombuffer(ipaddress.IPv6Address("::1").packed, "<u8")
    four: NDArray[np.bool_] = mapped & (addresses[:, 12] == 127)
    six: NDArray[np.bool_] = (high == one[0]) & (low == one[1])
    return np.logical_or(four, six)


def mix(*parts: int | Words) -> Words:
    """A 64-bit hash of some words, row by row: the finaliser of SplitMix64 over a running sum."""
    state = np.zeros(1, np.uint64)
    for part in parts:
        state = state + np.uint64(0x9E3779B97F4A7C15) + np.asarray(part, dtype=np.uint64)
        state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        state = state ^ (state >> np.uint64(31))
    return state
