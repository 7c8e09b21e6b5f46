"""DNS datagrams, as dnspython writes them: what is recognised, told and stored."""

from __future__ import annotations

import dns.flags
import dns.message
import dns.rcode
import dns.rrset
import numpy as np
import polars as pl
import pytest

from scope_ebpf.protocols.contract import REQUEST_SCHEMA, RESPONSE_SCHEMA, Role
from scope_ebpf.protocols.dns import PROTOCOL
from scope_ebpf.protocols.heads import Heads
from scope_ebpf.protocols.masking import mask

pytestmark = pytest.mark.pure


def heads(*payloads: bytes, cut_bytes: int = 0) -> Heads:
    totals = np.array([len(payload) + cut_bytes for payload in payloads], np.int64)
    return Heads.of(pl.Series(payloads, dtype=pl.Binary), totals)


def masked(payload: bytes) -> bytes:
    """The payload as a redacted recording holds it."""
    head = heads(payload)
    stored = mask(head, PROTOCOL.keep(head, PROTOCOL.recognise(head)), bytes(16))
    return stored.data.tobytes()


def query(name: str, kind: str, edns: bool = False) -> bytes:
    return dns.message.make_query(name, kind, use_edns=edns, want_dnssec=edns).to_wire()


def answer(name: str, code: dns.rcode.Rcode, *records: str) -> bytes:
    message = dns.message.make_response(
        dns.message.make_query(name, "TXT"), recursion_available=True
    )
    message.set_rcode(code)
    if records:
        message.answer.append(dns.rrset.from_text(f"{name}.", 60, "IN", "TXT", *records))
    return message.to_wire()


@pytest.mark.parametrize(
    ("name", "kind", "operation"),
    [
        ("Www.Example.com", "A", "A www.example.com"),
        ("_http._tcp.example.com", "SRV", "SRV _http._tcp.example.com"),
        (".", "NS", "NS ."),
        ("7.0.0.127.in-addr.arpa", "PTR", "PTR {id}.in-addr.arpa"),
        ("a-1." * 50 + "example.com", "AAAA", "AAAA " + "a-1." * 50 + "example.com"),
    ],
)
def test_queries(name, kind, operation):
    for payload in (query(name, kind), query(name, kind, edns=True)):
        for form in (payload, masked(payload)):
            head = heads(form)
            assert PROTOCOL.recognise(head).tolist() == [Role.REQUEST]
            frame = PROTOCOL.parse_requests(head)
            assert frame.schema == REQUEST_SCHEMA
            assert frame["operation"].to_list() == [operation]
            assert frame["detail"].to_list() == [f"{kind} {name}"]
            assert frame["answered"].to_list() == [True]


@pytest.mark.parametrize(
    ("code", "records", "failed", "miss"),
    [
        (dns.rcode.NOERROR, ["a"], False, False),
        (dns.rcode.NOERROR, [], False, False),
        (dns.rcode.NXDOMAIN, [], False, True),
        (dns.rcode.SERVFAIL, [], True, False),
        (dns.rcode.REFUSED, [], True, False),
    ],
)
def test_responses(code, records, failed, miss):
    payload = answer("example.com", code, *records)
    for form in (payload, masked(payload)):
        head = heads(form)
        assert PROTOCOL.recognise(head).tolist() == [Role.RESPONSE]
        frame = PROTOCOL.parse_responses(head)
        assert frame.schema == RESPONSE_SCHEMA
        told = frame.row(0, named=True)
        assert told["status"] == dns.rcode.to_text(code)
        assert (told["error"] is not None, told["miss"]) == (failed, miss)
        assert told["error"] is None or told["error"].startswith(told["status"])


def test_records_are_not_kept_but_the_question_is():
    stored = masked(answer("shop.example.com", dns.rcode.NOERROR, "SECRET1", "SECRET2"))
    assert b"SECRET" not in stored
    assert b"\x04shop\x07example\x03com\x00\x00\x10\x00\x01" in stored


def test_a_question_that_is_cut_off():
    whole = query("www.example.com", "A")
    short = heads(whole[:20], cut_bytes=13)
    assert PROTOCOL.recognise(short).tolist() == [Role.REQUEST]
    assert PROTOCOL.parse_requests(short)["operation"].to_list() == [None]
    # Not cut off by the recorder: a datagram that breaks off is no query.
    assert PROTOCOL.recognise(heads(whole[:20])).tolist() == [Role.NONE]


@pytest.mark.parametrize(
    "change",
    [
        {5: 2},  # two questions
        {2: 0x28},  # an update
        {3: 0x40},  # the reserved bit
        {7: 1},  # a query with an answer
        {12: 0xC0},  # a pointer where the name begins
        {12: 64},  # a label that is too long
        {13: 0x20},  # a space in the name
        {-3: 200},  # a type that nobody asks for
        {-1: 9},  # a class that is not in use
    ],
)
def test_what_makes_no_sense_is_not_dns(change):
    payload = bytearray(query("www.example.com", "A"))
    assert PROTOCOL.recognise(heads(bytes(payload))).tolist() == [Role.REQUEST]
    for place, value in change.items():
        payload[place] = value
    assert PROTOCOL.recognise(heads(bytes(payload))).tolist() == [Role.NONE]
