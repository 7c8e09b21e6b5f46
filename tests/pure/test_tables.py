"""Rows of tables from records as the probes write them: each kind, and payloads that come apart."""

from __future__ import annotations

import itertools
import shlex
import socket

import numpy as np
import polars as pl
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from scope_ebpf import records
from scope_ebpf.loaders.capture import hot_dtype, wide_dtype
from scope_ebpf.recording.connections import address_text, connections_frame, unix_path
from scope_ebpf.recording.python_tables import Descriptions
from scope_ebpf.recording.schema import SCHEMAS
from scope_ebpf.recording.tables import (
    INTERRUPTED,
    Payloads,
    command_line,
    hot_frames,
    process_row,
    rows_frame,
    wide_frames,
)
from scope_ebpf.records import CallStatus, ProcessEvent, RecordFlags, RecordKind

pytestmark = pytest.mark.pure

STRIDE = 576  # a header and 512 bytes of payload
NO_SYSCALL = int(records.RecordLimits.NO_SYSCALL)
READ, WRITE, FUTEX = 0, 1, 202
COMPAT_EXIT = 0x8001


def slots_of(dtype, rows):
    """Hot slots of one kind, from dicts."""
    array = np.zeros(len(rows), dtype)
    for place, row in enumerate(rows):
        for name, value in row.items():
            array[place][name] = value
    return array.view(hot_dtype())


def call(start_ns, **values):
    base = {"kind": RecordKind.RECORD_CALL, "start_ns": start_ns, "duration_ns": 5}
    return slots_of(records.CALL, [base | values])


def message(start_ns, *, kind=RecordKind.RECORD_MESSAGE, **values):
    return slots_of(records.MESSAGE, [{"kind": kind, "start_ns": start_ns} | values])


def offcpu(start_ns, **values):
    base = {"kind": RecordKind.RECORD_OFFCPU, "start_ns": start_ns, "number": NO_SYSCALL}
    base |= {"waker_number": NO_SYSCALL}
    return slots_of(records.OFFCPU, [base | values])


def wide(record, tail=b"", stride=STRIDE):
    """One wide slot that holds a record and, behind it, bytes; the rest is stale."""
    raw = record.tobytes() + tail
    return np.frombuffer(raw + b"\xee" * (stride - len(raw)), wide_dtype(stride))


def payload(hot_index, data, stride=STRIDE):
    record = np.zeros(1, records.PAYLOAD)
    record["kind"], record["hot_index"] = RecordKind.RECORD_PAYLOAD, hot_index
    record["length_bytes"] = len(data)
    return wide(record, data, stride)


def process(**values):
    record = np.zeros(1, records.PROCESS)
    record["kind"] = RecordKind.RECORD_PROCESS
    for name, value in values.items():
        record[name] = value
    return record


def no_path(identity):
    return None


def no_name(tgid, address):
    return None


def rows_of(frames, table):
    """The rows as dicts; their columns are the table's, whatever came."""
    assert frames[table].schema == SCHEMAS[table]
    return frames[table].to_dicts()


def hot(*runs, payloads=None):
    for _, first, slots in runs:
        slots["sequence"] = np.arange(first + 1, first + 1 + len(slots)).astype(np.uint32)
    return hot_frames(runs, payloads or Payloads(), no_name)


def test_calls():
    first = call(20, number=READ, tgid=7, tid=8, result=-11, arg0=2**64 - 1, arg1=1, arg2=2)
    second = call(10, number=COMPAT_EXIT, flags=CallStatus.STATUS_NO_RETURN, duration_ns=2**62)
    frames = hot((1, 0, first), (0, 0, second))
    assert frames.keys() == {"syscalls"}
    late, early = rows_of(frames, "syscalls")[::-1]  # sorted by their start
    assert early == {
        "start_ns": 10, "duration_ns": 2**62, "tgid": 0, "tid": 0, "number": COMPAT_EXIT,
        "result": 0, "arg0": 0, "arg1": 0, "arg2": 0, "status": 3, "cpu": 0,
    }  # fmt: skip
    assert late == {
        "start_ns": 20, "duration_ns": 5, "tgid": 7, "tid": 8, "number": READ, "result": -11,
        "arg0": 2**64 - 1, "arg1": 1, "arg2": 2, "status": 0, "cpu": 1,
    }  # fmt: skip


def test_calls_that_probes_make_are_left_out():
    slots = np.concatenate([call(1, number=334), call(2, number=335), call(3, number=336)])
    assert hot((0, 0, slots))["syscalls"]["number"].to_list() == [334]
    assert hot((0, 0, slots[1:])) == {}


@pytest.mark.parametrize(("number", "known"), [(334, 334), (335, None), (336, None)])
def test_off_the_cpu_in_a_call_that_a_probe_made(number, known):
    slot = offcpu(1, state=1, number=number, syscall_start_ns=5, waker_number=number)
    (row,) = rows_of(hot((0, 0, slot)), "offcpu")
    assert (row["number"], row["waker_number"]) == (known, known)
    assert row["syscall_start_ns"] == (5 if known else None)


def test_a_message_that_is_a_call_is_a_row_of_both():
    flags = RecordFlags.FLAG_RECEIVE | RecordFlags.FLAG_TURN | CallStatus.STATUS_BEGAN_BEFORE
    slot = message(
        10, kind=RecordKind.RECORD_MESSAGE_CALL, number=READ, flags=flags, duration_ns=3, tgid=7,
        tid=8, arg1=2**63, stream_end=2**33, length_bytes=2**32 - 1, connection=5, fd=6, arg2=4096,
    )  # fmt: skip
    frames = hot((3, 9, slot))
    assert rows_of(frames, "syscalls") == [
        {
            "start_ns": 10, "duration_ns": 3, "tgid": 7, "tid": 8, "number": READ,
            "result": 2**32 - 1, "arg0": 6, "arg1": 2**63, "arg2": 4096, "status": 1, "cpu": 3,
        }
    ]  # fmt: skip
    assert rows_of(frames, "messages") == [
        {
            "start_ns": 10, "duration_ns": 3, "tgid": 7, "tid": 8, "number": READ, "fd": 6,
            "receive": True, "peek": False, "turn": True, "exact": True,
            "length_bytes": 2**32 - 1, "stream_end": 2**33, "connection": 5, "payload": None,
            "status": 1, "cpu": 3,
        }
    ]  # fmt: skip


def test_a_message_alone_is_no_call():
    flags = RecordFlags.FLAG_PEEK | RecordFlags.FLAG_INEXACT
    frames = hot((0, 0, message(1, number=WRITE, flags=flags)))
    assert frames.keys() == {"messages"}
    (row,) = rows_of(frames, "messages")
    assert (row["receive"], row["peek"], row["turn"], row["exact"]) == (False, True, False, False)
    assert row["status"] == 0


def test_calls_beside_messages_that_are_calls_keep_what_is_theirs():
    """The two kinds keep their arguments in other places of the slot."""
    mixed = np.concatenate(
        [
            call(1, number=READ, result=-1, arg0=2**40, arg1=2, arg2=2**50),
            message(2, kind=RecordKind.RECORD_MESSAGE_CALL, length_bytes=3, fd=4, arg1=5, arg2=6),
        ]
    )
    rows = rows_of(hot((0, 0, mixed)), "syscalls")
    assert [(row["result"], row["arg0"], row["arg1"], row["arg2"]) for row in rows] == [
        (-1, 2**40, 2, 2**50),
        (3, 4, 5, 6),
    ]


def test_offcpu():
    waited = offcpu(
        10, duration_ns=9, runnable_ns=2, tgid=7, tid=8, state=1, number=FUTEX, syscall_start_ns=9,
        waker_tgid=70, waker_tid=80, waker_number=WRITE,
    )  # fmt: skip
    rows = rows_of(hot((2, 0, waited)), "offcpu")
    assert rows == [
        {
            "start_ns": 10, "duration_ns": 9, "runnable_ns": 2, "tgid": 7, "tid": 8, "state": 1,
            "number": FUTEX, "syscall_start_ns": 9, "waker_tgid": 70, "waker_tid": 80,
            "waker_number": WRITE, "status": 0, "cpu": 2,
        }
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("state", "status", "woken"),
    [
        (0, CallStatus.STATUS_COMPLETE, False),  # preempted
        (1, CallStatus.STATUS_OPEN, False),
        (1, CallStatus.STATUS_THROUGHOUT, False),
        (1, CallStatus.STATUS_COMPLETE, True),  # by the idle CPU's interrupt: waker 0 stays
        (1, CallStatus.STATUS_BEGAN_BEFORE, True),
    ],
)
def test_who_was_woken(state, status, woken):
    (row,) = rows_of(hot((0, 0, offcpu(1, state=state, flags=status))), "offcpu")
    nothing = None if not woken else 0
    assert (row["waker_tgid"], row["waker_tid"]) == (nothing, nothing)
    assert row["waker_number"] is row["number"] is row["syscall_start_ns"] is None


def test_system_call_0_is_a_call():
    """Number 0 is read on x86, and not the same as none."""
    slot = offcpu(1, state=1, number=READ, syscall_start_ns=5, waker_number=READ)
    (row,) = rows_of(hot((0, 0, slot)), "offcpu")
    assert (row["number"], row["waker_number"], row["syscall_start_ns"]) == (0, 0, 5)


def test_unknown_kinds_are_nobodys_rows():
    slot = call(1)
    slot["kind"] = 99
    assert hot((0, 0, slot)) == {}


# ---- payloads ------------------------------------------------------------------------------------

FLAGGED = RecordFlags.FLAG_TURN | RecordFlags.FLAG_PAYLOAD


def flagged(number):
    """A message with that time and a payload somewhere."""
    return message(number, flags=FLAGGED, connection=number)


def payloads_of(frames):
    return {row["start_ns"]: row["payload"] for row in rows_of(frames, "messages")}


def give(payloads, *runs):
    """What Store does first with a batch: the wide slots."""
    return wide_frames(runs, payloads, Descriptions(), no_path)


@given(st.lists(st.binary(max_size=512), min_size=1, max_size=20), st.integers(0, 2**40))
@example([b"", b"\0", b"\xff" * 512], 2**32 - 1)
@settings(deadline=None)
def test_each_payload_to_its_message(heads, first):
    payloads = Payloads()
    waiting = [payload(index, head) for index, head in enumerate(heads, start=first)]
    assert give(payloads, (0, 0, np.concatenate(waiting))) == {}
    slots = np.concatenate([flagged(number) for number in range(len(heads))])
    frames = hot((0, first, slots), payloads=payloads)
    assert payloads_of(frames) == dict(enumerate(heads))
    assert payloads._waiting == {}


def test_the_same_index_on_another_cpu_is_another_message():
    payloads = Payloads()
    give(payloads, (0, 0, payload(5, b"zero")), (1, 0, payload(5, b"one")))
    frames = hot((0, 5, flagged(10)), (1, 5, flagged(11)), payloads=payloads)
    assert payloads_of(frames) == {10: b"zero", 11: b"one"}


def test_messages_without_the_flag_have_none():
    payloads = Payloads()
    give(payloads, (0, 0, payload(1, b"x")))
    slots = np.concatenate([message(0), flagged(1), message(2, flags=RecordFlags.FLAG_TURN)])
    assert payloads_of(hot((0, 0, slots), payloads=payloads)) == {0: None, 1: b"x", 2: None}


def test_a_payload_that_never_came():
    assert payloads_of(hot((0, 0, np.concatenate([flagged(0), flagged(1)])))) == {0: None, 1: None}
    payloads = Payloads()
    give(payloads, (0, 0, payload(1, b"x")))
    slots = np.concatenate([flagged(0), flagged(1)])
    assert payloads_of(hot((0, 0, slots), payloads=payloads)) == {0: None, 1: b"x"}


@pytest.mark.parametrize("index", [0, 1, 7])
def test_a_payload_waits_for_its_message(index):
    """The hot ring is drained before the wide one: the payload may be there a batch earlier."""
    payloads = Payloads()
    give(payloads, (0, 0, payload(index, b"early")))
    if index:  # what was drained before it
        before = np.concatenate([message(number) for number in range(index)])
        assert set(payloads_of(hot((0, 0, before), payloads=payloads)).values()) == {None}
    # other kinds of slots, and messages of other CPUs, do not make it too old
    assert "messages" not in hot((0, index + 1, call(5)), payloads=payloads)
    assert payloads_of(hot((1, 50, flagged(6)), payloads=payloads)) == {6: None}
    assert payloads_of(hot((0, index, flagged(7)), payloads=payloads)) == {7: b"early"}
    assert payloads._waiting == {}


def test_payloads_over_several_batches():
    """Any cut of both rings that leaves no payload behind its message gives the same rows."""
    count = 6
    for cut_hot, cut_wide in itertools.product(range(1, count), range(1, count)):
        if cut_wide < cut_hot:
            continue  # then a message came without its payload, which drain() excludes
        payloads = Payloads()
        found: dict[int, bytes | None] = {}
        heads = [payload(index, b"head %d" % index) for index in range(count)]
        slots = [flagged(index) for index in range(count)]
        give(payloads, (0, 0, np.concatenate(heads[:cut_wide])))
        found |= payloads_of(hot((0, 0, np.concatenate(slots[:cut_hot])), payloads=payloads))
        if heads[cut_wide:]:
            give(payloads, (0, cut_wide, np.concatenate(heads[cut_wide:])))
        found |= payloads_of(hot((0, cut_hot, np.concatenate(slots[cut_hot:])), payloads=payloads))
        assert found == {index: b"head %d" % index for index in range(count)}
        assert payloads._waiting == {}


def test_payloads_of_lost_messages_do_not_pile_up():
    payloads = Payloads()
    for number in range(10 * INTERRUPTED):
        give(payloads, (0, number, payload(number, b"x")))
        hot((0, number + 1, flagged(number)), payloads=payloads)
    assert sum(len(part.owners) for part in payloads._waiting.get(0, [])) <= INTERRUPTED + 1


def test_indices_that_leave_some_out_and_come_late():
    """As in a perf buffer: payloads go by the sequence, also past an interrupt's record that came first."""
    payloads = Payloads()
    give(payloads, (0, 0, np.concatenate([payload(16, b"a"), payload(24, b"late")])))
    slots = np.concatenate([flagged(1), call(2)])
    slots["sequence"] = [17, 34]
    assert payloads_of(hot_frames([(0, 16, slots)], payloads, no_name)) == {1: b"a"}
    slots = np.concatenate([flagged(3), flagged(4)])
    slots["sequence"] = [25, 41]
    assert payloads_of(hot_frames([(0, 24, slots)], payloads, no_name)) == {3: b"late", 4: None}


def test_a_payload_as_long_as_the_slot():
    stride = 64 + 32768
    payloads = Payloads()
    head = bytes(range(256)) * 128
    give(payloads, (0, 0, payload(3, head, stride)))
    assert payloads_of(hot((0, 3, flagged(1)), payloads=payloads)) == {1: head}


# ---- processes -----------------------------------------------------------------------------------


def test_processes():
    arguments = b"python3\0-c\0print('a b')\0"
    record = process(
        event=ProcessEvent.PROCESS_EXEC, time_ns=10, tgid=7, tid=7, parent_tgid=1, parent_tid=6,
        cgroup=99, start_boottime_ns=5, comm=b"python3\0stale", command_line=arguments,
        command_line_bytes=len(arguments), command_line_total_bytes=5000,
    )  # fmt: skip
    frames = wide_frames([(0, 0, wide(record))], Payloads(), Descriptions(), {99: "/a"}.get)
    assert frames.keys() == {"processes"}
    assert rows_of(frames, "processes") == [
        {
            "time_ns": 10, "event": 3, "tgid": 7, "tid": 7, "parent_tgid": 1, "parent_tid": 6,
            "comm": "python3", "command_line": "python3 -c 'print('\"'\"'a b'\"'\"')'",
            "command_line_bytes": 5000, "cgroup": "/a", "cgroup_id": 99, "exit_code": None,
            "signal": None, "start_boottime_ns": 5,
        }
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("status", "code", "number"),
    [(0, 0, None), (3 << 8, 3, None), (255 << 8, 255, None), (9, None, 9), (11 | 0x80, None, 11)],
)
@pytest.mark.parametrize("event", [ProcessEvent.PROCESS_EXIT, ProcessEvent.PROCESS_THREAD_EXIT])
def test_how_it_ended(event, status, code, number):
    row = process_row(process(event=event, exit_code=status)[0], no_path)
    assert (row["exit_code"], row["signal"]) == (code, number)
    row = process_row(process(event=ProcessEvent.PROCESS_FORK, exit_code=status)[0], no_path)
    assert (row["exit_code"], row["signal"]) == (None, None)


def test_what_ran_before_has_its_whole_command_line():
    arguments = b"x" * 5000 + b"\0"
    row = process_row(process(event=ProcessEvent.PROCESS_ALIVE)[0], no_path, arguments)
    assert row["command_line"] == "x" * 5000
    assert row["command_line_bytes"] == 5001
    assert process_row(process()[0], no_path, b"")["command_line"] is None


@given(st.lists(st.binary(max_size=30).map(lambda data: data.replace(b"\0", b"")), min_size=1))
def test_command_lines_can_be_split_again(parts):
    line = command_line(b"".join(part + b"\0" for part in parts))
    while parts and not parts[-1]:
        parts = parts[:-1]  # zeros that are left of a longer title
    assert (line is None) == (not parts)
    found = shlex.split(line or "")
    assert found == [part.decode(errors="backslashreplace") for part in parts]


@given(st.binary(min_size=records.PROCESS.itemsize, max_size=records.PROCESS.itemsize))
@settings(deadline=None)
def test_any_process_record_is_a_row(data):
    """Whatever a program calls itself."""
    record = np.frombuffer(data, records.PROCESS).copy()
    record["kind"] = RecordKind.RECORD_PROCESS
    record["time_ns"] %= 2**63
    record["start_boottime_ns"] %= 2**63
    frames = wide_frames([(0, 0, wide(record))], Payloads(), Descriptions(), no_path)
    assert len(rows_of(frames, "processes")) == 1


def test_rows_are_sorted_and_nothing_is_nothing():
    assert wide_frames([], Payloads(), Descriptions(), no_path) == {}
    rows = [process_row(process(time_ns=time)[0], no_path) for time in (3, 1, 2)]
    assert rows_frame("processes", rows)["time_ns"].to_list() == [1, 2, 3]


# ---- connections ---------------------------------------------------------------------------------


def connection(**values):
    record = np.zeros(1, records.CONNECTION)
    record["kind"] = RecordKind.RECORD_CONNECTION
    for name, value in values.items():
        record[name] = value
    return record


def inet(identity, local, remote, *, mapped=False, kind=(1, 6), netns=1):
    """One end of an Internet connection; IPv4 as IPv4 or, on a dual-stack socket, within IPv6."""
    family = socket.AF_INET6 if mapped or ":" in local[0] else socket.AF_INET

    def packed(host):
        if family == socket.AF_INET:
            return socket.inet_pton(socket.AF_INET, host)
        return socket.inet_pton(socket.AF_INET6, f"::ffff:{host}" if mapped else host)

    return connection(
        connection=identity, family=family, type=kind[0], protocol=kind[1], netns=netns,
        local_address=packed(local[0]), local_port=local[1],
        remote_address=packed(remote[0]), remote_port=remote[1],
    )  # fmt: skip


def ends(*rows):
    frame = connections_frame(np.concatenate(rows))
    assert frame.schema == SCHEMAS["connections"]
    return frame.sort("connection").to_dicts()


def assert_pair(one, other):
    assert one["send_stream"] == other["receive_stream"]
    assert one["receive_stream"] == other["send_stream"]
    assert one["send_stream"] != one["receive_stream"]


A, B = ("10.0.0.1", 1234), ("10.0.0.2", 80)
SIX = (("2001:db8::1", 1234), ("2001:db8::2", 80))
LOOP4 = (("127.0.0.1", 1234), ("127.0.0.1", 80))
LOOP4_OTHER = (("127.0.0.1", 1234), ("127.99.0.1", 80))
LOOP6 = (("::1", 1234), ("::1", 80))


@pytest.mark.parametrize("pair", [(A, B), SIX, LOOP4, LOOP4_OTHER, LOOP6])
@pytest.mark.parametrize("kind", [(1, 6), (2, 17), (1, 132), (1, 262)])
def test_both_ends_compute_the_same_streams(pair, kind):
    here, there = pair
    assert_pair(*ends(inet(1, here, there, kind=kind), inet(2, there, here, kind=kind)))


@pytest.mark.parametrize("pair", [(A, B), LOOP4])
@pytest.mark.parametrize("mapped", [(True, False), (False, True), (True, True)])
def test_a_dual_stack_socket_is_at_the_same_stream(pair, mapped):
    here, there = pair
    client = inet(1, here, there, mapped=mapped[0])
    one, other = ends(client, inet(2, there, here, mapped=mapped[1]))
    assert_pair(one, other)
    assert one["local_address"] == here[0]
    assert other["remote_address"] == here[0]


@pytest.mark.parametrize(
    ("pair", "matters"),
    [((A, B), False), (SIX, False), (LOOP4, True), (LOOP4_OTHER, True), (LOOP6, True)],
)
def test_the_network_namespace_counts_for_loopback_only(pair, matters):
    """Containers talk over real addresses from one namespace to the other."""
    here, there = pair
    one, other = ends(inet(1, here, there, netns=5), inet(2, there, here, netns=6))
    assert (one["send_stream"] != other["receive_stream"]) is matters
    assert (one["netns"], other["netns"]) == (5, 6)


def test_what_differs_has_other_streams():
    """Each change of one part gives four new numbers."""
    rows = [
        inet(1, A, B),
        inet(2, A, (B[0], 81)),
        inet(3, (A[0], 1235), B),
        inet(4, ("10.0.0.3", A[1]), B),
        inet(5, A, B, kind=(2, 17)),
        inet(6, (A[0], B[1]), (B[0], A[1])),  # the ports the other way round
        inet(7, *SIX),
        inet(8, *LOOP4),
        inet(9, *LOOP4, netns=2),
        inet(10, *LOOP6),
    ]
    numbers = [row[f"{way}_stream"] for row in ends(*rows) for way in ("send", "receive")]
    assert len(set(numbers)) == len(numbers)


def test_a_connection_to_itself():
    """TCP's simultaneous open: one socket, both ends."""
    (row,) = ends(inet(1, LOOP4[0], LOOP4[0]))
    assert row["send_stream"] == row["receive_stream"]


def test_what_has_no_other_end():
    """An unconnected datagram socket: numbers of its own, and no remote address."""
    one, other = ends(
        inet(1, ("0.0.0.0", 53), ("0.0.0.0", 0), kind=(2, 17)),
        inet(2, ("0.0.0.0", 53), ("0.0.0.0", 0), kind=(2, 17)),
    )
    numbers = {row[f"{way}_stream"] for row in (one, other) for way in ("send", "receive")}
    assert len(numbers) == 4
    assert (one["local_address"], one["local_port"]) == ("0.0.0.0", 53)
    assert (one["remote_address"], one["remote_port"]) == (None, None)


def unix(identity, peer, **values):
    return connection(connection=identity, peer=peer, family=socket.AF_UNIX, type=1, **values)


def test_unix():
    client = unix(1, 2, inode=10, peer_inode=11, remote_path=b"/run/x.sock")
    server = unix(2, 1, inode=11, peer_inode=10, local_path=b"/run/x.sock")
    one, other = ends(client, server)
    assert_pair(one, other)
    assert (one["kind"], one["local_path"], one["remote_path"]) == ("unix", None, "/run/x.sock")
    assert (other["local_path"], other["remote_path"]) == ("/run/x.sock", None)
    assert one["local_address"] is one["local_port"] is one["netns"] is None


def test_unix_before_the_other_end_is_known():
    one, other = ends(unix(1, 0), unix(2, 1))
    assert one["send_stream"] == other["receive_stream"]
    assert one["receive_stream"] != other["send_stream"]
    assert one["peer_inode"] is None


def test_pipe():
    first, second = ends(connection(connection=1, inode=5), connection(connection=2, inode=6))
    assert first["kind"] == "pipe"
    assert first["send_stream"] == first["receive_stream"]
    assert first["send_stream"] != second["send_stream"]


def test_kinds_with_the_same_id_do_not_meet():
    frame = connections_frame(np.concatenate([connection(connection=1), unix(1, 0), inet(1, A, B)]))
    assert frame["kind"].to_list() == ["pipe", "unix", "tcp"]
    numbers = [*frame["send_stream"], *frame["receive_stream"]]
    assert len(set(numbers)) == len(numbers) - 1  # of the pipe both are one


def test_many_streams_are_all_different():
    rows = np.concatenate([inet(port, ("10.0.0.1", port), B) for port in range(1, 5000)])
    frame = connections_frame(rows)
    both = pl.concat([frame["send_stream"], frame["receive_stream"].rename("send_stream")])
    assert both.n_unique() == len(both)


@given(st.binary(max_size=112))
@example(b"")
@example(b"\0")
@example(b"\0abstract\0")
@example(b"/run/\xff\n\0stale")
def test_any_path(data):
    path = unix_path(data.ljust(112, b"\0"))
    if path is not None:
        assert path
        path.encode()
        assert path.startswith("@") == (data[:1] in (b"\0", b"@"))


@pytest.mark.parametrize(
    ("packed", "text"),
    [
        (bytes(10) + b"\xff\xff\x7f\0\0\1", "127.0.0.1"),
        (bytes(15) + b"\1", "::1"),
        (bytes(16), "::"),
        (bytes(12) + b"\x7f\0\0\1", "::7f00:1"),  # the old form, which is no IPv4 address
    ],
)
def test_addresses(packed, text):
    assert address_text(packed) == text


@given(
    st.lists(
        st.binary(min_size=records.CONNECTION.itemsize, max_size=records.CONNECTION.itemsize),
        min_size=1,
        max_size=4,
    )
)
@settings(deadline=None)
def test_any_connection_record_is_a_row(data):
    record = np.frombuffer(b"".join(data), records.CONNECTION).copy()
    record["kind"] = RecordKind.RECORD_CONNECTION
    record["time_ns"] %= 2**63
    slots = np.concatenate([wide(record[place : place + 1]) for place in range(len(record))])
    frames = wide_frames([(0, 0, slots)], Payloads(), Descriptions(), no_path)
    assert len(rows_of(frames, "connections")) == len(data)


# ---- tls -----------------------------------------------------------------------------------------


def tls(start_ns, **values):
    return slots_of(records.TLS, [{"kind": RecordKind.RECORD_TLS, "start_ns": start_ns} | values])


def test_plain_text_and_messages_get_their_own_payloads():
    flags = RecordFlags.FLAG_TURN | RecordFlags.FLAG_PAYLOAD
    payloads = Payloads()
    heads = np.concatenate([payload(0, b"GET"), payload(1, b"\x17\x03"), payload(3, b"200")])
    assert wide_frames([(2, 0, heads)], payloads, Descriptions(), no_path) == {}
    slots = np.concatenate(
        [
            tls(10, tgid=7, tid=8, ssl=2**47, duration_ns=3, length_bytes=5,
                flags=flags | RecordFlags.FLAG_RECEIVE),
            message(11, flags=flags),
            tls(12, ssl=2**64 - 1, length_bytes=2**32 - 1),
            tls(13, flags=flags),
        ]
    )  # fmt: skip
    frames = hot((2, 0, slots), payloads=payloads)
    first, second, third = rows_of(frames, "tls")
    assert first == {
        "start_ns": 10, "duration_ns": 3, "tgid": 7, "tid": 8, "ssl": 2**47, "receive": True,
        "turn": True, "length_bytes": 5, "payload": b"GET", "cpu": 2,
    }  # fmt: skip
    assert (second["ssl"], second["length_bytes"]) == (2**64 - 1, 2**32 - 1)
    assert (second["receive"], second["turn"], second["payload"]) == (False, False, None)
    assert third["payload"] == b"200"
    assert [row["payload"] for row in rows_of(frames, "messages")] == [b"\x17\x03"]


# ---- connects ------------------------------------------------------------------------------------


def connect(remote_family=0, address=b"", *, path=b"", **values):
    record = np.zeros(1, records.CONNECT)
    record["kind"] = RecordKind.RECORD_CONNECT
    record["family"] = values.pop("family", remote_family)
    record["remote_family"] = remote_family
    record["remote_address"] = np.void(address.ljust(16, b"\0"))
    record["remote_path"] = np.void(path.ljust(112, b"\0"))
    for name, value in values.items():
        record[name] = value
    return record


def connects(*rows, cpu=0):
    runs = [(cpu, 0, np.concatenate([wide(row) for row in rows]))]
    return rows_of(wide_frames(runs, Payloads(), Descriptions(), no_path), "connects")


def test_a_refused_connect():
    row = connect(
        socket.AF_INET, bytes([127, 0, 0, 1]), remote_port=80, type=1, protocol=6, result=-111,
        start_ns=10, duration_ns=3, tgid=7, tid=8, fd=9, inode=5, flags=CallStatus.STATUS_BEGAN_BEFORE,
    )  # fmt: skip
    assert connects(row, cpu=3) == [
        {
            "start_ns": 10, "duration_ns": 3, "tgid": 7, "tid": 8, "fd": 9, "kind": "tcp",
            "remote_address": "127.0.0.1", "remote_port": 80, "remote_path": None, "inode": 5,
            "result": -111, "status": 1, "cpu": 3,
        }
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("record", "kind", "place"),
    [
        (connect(socket.AF_INET6, bytes(15) + b"\1", type=1, protocol=6), "tcp", ("::1", 0, None)),
        # a dual-stack socket, and one whose other family the kernel refused
        (connect(socket.AF_INET6, bytes(10) + b"\xff\xff\x0a\0\0\1", type=2, protocol=17),
         "udp", ("10.0.0.1", 0, None)),
        (connect(socket.AF_UNIX, path=b"/run/s", family=socket.AF_INET, type=1, protocol=6),
         "tcp", (None, None, "/run/s")),
        (connect(socket.AF_UNIX, path=b"\0bus", type=1), "unix", (None, None, "@bus")),
        (connect(socket.AF_UNIX, path=b"l" * 108, type=2), "unix-datagram", (None, None, "l" * 108)),
        # AF_UNSPEC disconnects; an address that could not be read looks the same
        (connect(0, b"\x7f\0\0\1", family=socket.AF_INET, type=2, protocol=17), "udp",
         (None, None, None)),
    ],
)  # fmt: skip
def test_where_a_connect_went(record, kind, place):
    (row,) = connects(record)
    assert row["kind"] == kind
    assert (row["remote_address"], row["remote_port"], row["remote_path"]) == place


def test_connects_of_all_cpus_are_in_order():
    runs = [(cpu, 0, wide(connect(start_ns=9 - cpu))) for cpu in range(3)]
    frames = wide_frames(runs, Payloads(), Descriptions(), no_path)
    assert frames["connects"]["cpu"].to_list() == [2, 1, 0]
