"""Records and constants that the probes and Python share.

Generated from probes/events.h by `make generate`; do not edit. The meaning of every field stands there.
"""

from enum import IntEnum, IntFlag
from typing import Any

import numpy as np


class RecordLimits(IntEnum):
    """enum record_limits of events.h."""

    COMM_BYTES = 16
    ADDRESS_BYTES = 16
    PATH_BYTES = 112
    HOT_SLOT_BYTES = 64
    WIDE_HEADER_BYTES = 64
    COMMAND_LINE_BYTES = 384
    ENDPOINTS = 65536
    TLS_SESSIONS = 16384
    TURN_GAP_NS = 10000000
    PREFIX_BYTES = 8
    NO_SYSCALL = 65535
    COMPAT_SYSCALL = 32768
    NO_DESCRIPTOR = 4294967295


class RecordKind(IntEnum):
    """enum record_kind of events.h."""

    RECORD_CALL = 1
    RECORD_MESSAGE = 2
    RECORD_MESSAGE_CALL = 3
    RECORD_OFFCPU = 4
    RECORD_PROCESS = 5
    RECORD_CONNECTION = 6
    RECORD_PAYLOAD = 7
    RECORD_CONNECT = 8
    RECORD_TLS = 9
    RECORD_SAMPLE = 10
    RECORD_FLOW = 11
    RECORD_CONTEXT = 12
    RECORD_HANDOFF = 13
    RECORD_GIL = 14
    RECORD_STACK = 15
    RECORD_CODE = 16
    RECORD_HIT = 17
    RECORD_PYTHON_CALL = 18
    RECORD_CGROUP = 19


class LossKind(IntEnum):
    """enum loss_kind of events.h."""

    LOSS_SYSCALLS = 0
    LOSS_MESSAGES = 1
    LOSS_OFFCPU = 2
    LOSS_PROCESSES = 3
    LOSS_CONNECTIONS = 4
    LOSS_PAYLOADS = 5
    LOSS_TASKS = 6
    LOSS_CONNECTS = 7
    LOSS_TLS = 8
    LOSS_SAMPLES = 9
    LOSS_STACKS = 10
    LOSS_CONTEXTS = 11
    LOSS_HANDOFFS = 12
    LOSS_GIL = 13
    LOSS_HITS = 14
    LOSS_KINDS = 22


class CallStatus(IntEnum):
    """enum call_status of events.h."""

    STATUS_COMPLETE = 0
    STATUS_BEGAN_BEFORE = 1
    STATUS_OPEN = 2
    STATUS_NO_RETURN = 3
    STATUS_THROUGHOUT = 5
    STATUS_END_LATE = 6
    STATUS_REFUSED = 4


class RecordFlags(IntFlag):
    """enum record_flags of events.h."""

    FLAG_STATUS = 7
    FLAG_RECEIVE = 8
    FLAG_PEEK = 16
    FLAG_TURN = 32
    FLAG_PAYLOAD = 64
    FLAG_INEXACT = 128


class ProcessEvent(IntEnum):
    """enum process_event of events.h."""

    PROCESS_ALIVE = 0
    PROCESS_FORK = 1
    PROCESS_THREAD = 2
    PROCESS_EXEC = 3
    PROCESS_EXIT = 4
    PROCESS_THREAD_EXIT = 5
    PROCESS_MOVED = 6
    PROCESS_STILL = 7


class MessageClass(IntEnum):
    """enum message_class of events.h."""

    MESSAGE_NONE = 0
    MESSAGE_BUFFER = 1
    MESSAGE_VECTOR = 2
    MESSAGE_HEADER = 3
    MESSAGE_HEADERS = 4
    MESSAGE_SENDFILE = 5
    MESSAGE_SPLICE = 6
    MESSAGE_SHAPE = 7
    MESSAGE_RECEIVE = 8
    MESSAGE_FLAGS = 16
    MESSAGE_BIRTH_RESULT = 32
    MESSAGE_BIRTH_FIRST = 33
    MESSAGE_BIRTH_PAIR = 34
    MESSAGE_BIRTH_FOURTH = 35
    MESSAGE_RING = 36


class TargetKind(IntEnum):
    """enum target_kind of events.h."""

    TARGET_NOW = 1
    TARGET_AFTER_EXEC = 2


class SampleReason(IntEnum):
    """enum sample_reason of events.h."""

    SAMPLE_CPU = 1
    SAMPLE_WAIT = 2
    SAMPLE_MESSAGE = 3
    SAMPLE_FAULT = 4


class ContextKind(IntEnum):
    """enum context_kind of events.h."""

    CONTEXT_COPIED = 1
    CONTEXT_NEW = 2
    CONTEXT_MET = 3
    CONTEXT_GREENLET = 4


class InterpreterFlags(IntFlag):
    """enum interpreter_flags of events.h."""

    INTERPRETER_STACKS = 1
    INTERPRETER_CONTEXTS = 2
    INTERPRETER_GREENLETS = 4
    INTERPRETER_GIL = 8
    INTERPRETER_HEAP_FRAMES = 16
    INTERPRETER_CFRAME = 32


class PythonLimits(IntEnum):
    """enum python_limits of events.h."""

    INTERPRETERS = 4096
    STACK_FRAMES = 128
    STACK_PART_FRAMES = 28
    CODE_NAME_BYTES = 128
    CODE_FILE_BYTES = 192
    CODE_PART_BYTES = 128
    CODE_MORE_BYTES = 448
    CODE_PARTS = 8
    HIT_ARGUMENTS = 8
    HIT_TEXTS = 4
    HIT_TEXT_BYTES = 320
    ARGUMENT_BYTES = 80
    CALL_WATCHES = 1024
    OPEN_CALLS = 8192


class HitSource(IntEnum):
    """enum hit_source of events.h."""

    HIT_NOWHERE = 0
    HIT_CONSTANT = 1
    HIT_REGISTER = 2
    HIT_MEMORY = 3
    HIT_CARRIED = 4


class HitFlags(IntFlag):
    """enum hit_flags of events.h."""

    HIT_ROW = 1
    HIT_BEGINS = 2
    HIT_ENDS = 4
    HIT_NESTS = 8
    HIT_RETURNS = 16
    HIT_SIGNED = 32
    HIT_TEXT = 64


class HitLimits(IntEnum):
    """enum hit_limits of events.h."""

    HIT_PROBES = 2048
    HIT_BEGINNINGS = 16384
    HIT_TEXT_LAST = 240
    HIT_TEXT_MORE = 104
    HIT_CARRIES = 2
    HIT_NO_REGISTER = 65535


class ValueKind(IntEnum):
    """enum value_kind of events.h."""

    VALUE_UNBOUND = 0
    VALUE_NONE = 1
    VALUE_BOOL = 2
    VALUE_INT = 3
    VALUE_LONG_INT = 4
    VALUE_FLOAT = 5
    VALUE_BYTES = 6
    VALUE_LATIN1 = 7
    VALUE_UCS2 = 8
    VALUE_UCS4 = 9
    VALUE_OBJECT = 10
    VALUE_UNREADABLE = 11


class CallWatchRole(IntEnum):
    """enum call_watch_role of events.h."""

    WATCH_BEGIN = 1
    WATCH_END = 2
    WATCH_UNWIND = 3


class CallWatchFlags(IntEnum):
    """enum call_watch_flags of events.h."""

    CALL_NO_END = 1
    CALL_HEAP_FRAMES = 2
    CALL_CFRAME = 4
    CALL_INT_TAG = 8
    CALL_FRAME_STATE = 16


FLIGHT: np.dtype[Any] = np.dtype(
    [
        ("start_ns", "<u8"),
        ("arg0", "<u8"),
        ("arg1", "<u8"),
        ("arg2", "<u8"),
        ("number", "<u2"),
        ("refused", "<u2"),
        ("reserved", ("<u2", (2,))),
    ]
)
CALL: np.dtype[Any] = np.dtype(
    [
        ("sequence", "<u4"),
        ("number", "<u2"),
        ("kind", "|u1"),
        ("flags", "|u1"),
        ("start_ns", "<u8"),
        ("duration_ns", "<u8"),
        ("tgid", "<u4"),
        ("tid", "<u4"),
        ("result", "<i8"),
        ("arg0", "<u8"),
        ("arg1", "<u8"),
        ("arg2", "<u8"),
    ]
)
MESSAGE: np.dtype[Any] = np.dtype(
    [
        ("sequence", "<u4"),
        ("number", "<u2"),
        ("kind", "|u1"),
        ("flags", "|u1"),
        ("start_ns", "<u8"),
        ("duration_ns", "<u8"),
        ("tgid", "<u4"),
        ("tid", "<u4"),
        ("arg1", "<u8"),
        ("stream_end", "<u8"),
        ("length_bytes", "<u4"),
        ("connection", "<u4"),
        ("fd", "<u4"),
        ("arg2", "<u4"),
    ]
)
OFFCPU: np.dtype[Any] = np.dtype(
    [
        ("sequence", "<u4"),
        ("number", "<u2"),
        ("kind", "|u1"),
        ("flags", "|u1"),
        ("start_ns", "<u8"),
        ("duration_ns", "<u8"),
        ("tgid", "<u4"),
        ("tid", "<u4"),
        ("runnable_ns", "<u8"),
        ("syscall_start_ns", "<u8"),
        ("waker_tgid", "<u4"),
        ("waker_tid", "<u4"),
        ("state", "<u4"),
        ("waker_number", "<u2"),
        ("reserved", "<u2"),
    ]
)
TLS: np.dtype[Any] = np.dtype(
    [
        ("sequence", "<u4"),
        ("reserved0", "<u2"),
        ("kind", "|u1"),
        ("flags", "|u1"),
        ("start_ns", "<u8"),
        ("duration_ns", "<u8"),
        ("tgid", "<u4"),
        ("tid", "<u4"),
        ("ssl", "<u8"),
        ("length_bytes", "<u4"),
        ("reserved1", "<u4"),
        ("reserved2", ("<u8", (2,))),
    ]
)
PAYLOAD: np.dtype[Any] = np.dtype(
    [
        ("sequence", "<u4"),
        ("length_bytes", "<u2"),
        ("kind", "|u1"),
        ("flags", "|u1"),
        ("hot_index", "<u8"),
        ("reserved", ("<u8", (6,))),
    ]
)
PROCESS: np.dtype[Any] = np.dtype(
    [
        ("sequence", "<u4"),
        ("command_line_bytes", "<u2"),
        ("kind", "|u1"),
        ("event", "|u1"),
        ("time_ns", "<u8"),
        ("tgid", "<u4"),
        ("tid", "<u4"),
        ("parent_tgid", "<u4"),
        ("parent_tid", "<u4"),
        ("cgroup", "<u8"),
        ("start_boottime_ns", "<u8"),
        ("exit_code", "<i4"),
        ("command_line_total_bytes", "<u4"),
        ("comm", "|V16"),
        ("command_line", "|V384"),
    ]
)
CONNECTION: np.dtype[Any] = np.dtype(
    [
        ("sequence", "<u4"),
        ("family", "<u2"),
        ("kind", "|u1"),
        ("reserved", "|u1"),
        ("time_ns", "<u8"),
        ("connection", "<u4"),
        ("peer", "<u4"),
        ("tgid", "<u4"),
        ("type", "<u2"),
        ("protocol", "<u2"),
        ("inode", "<u8"),
        ("peer_inode", "<u8"),
        ("netns", "<u4"),
        ("local_port", "<u2"),
        ("remote_port", "<u2"),
        ("local_address", "|V16"),
        ("remote_address", "|V16"),
        ("local_path", "|V112"),
        ("remote_path", "|V112"),
    ]
)
CONNECT: np.dtype[Any] = np.dtype(
    [
        ("sequence", "<u4"),
        ("family", "<u2"),
        ("kind", "|u1"),
        ("flags", "|u1"),
        ("start_ns", "<u8"),
        ("duration_ns", "<u8"),
        ("tgid", "<u4"),
        ("tid", "<u4"),
        ("fd", "<u4"),
        ("result", "<i4"),
        ("inode", "<u8"),
        ("type", "<u2"),
        ("protocol", "<u2"),
        ("remote_family", "<u2"),
        ("remote_port", "<u2"),
        ("remote_address", "|V16"),
        ("remote_path", "|V112"),
    ]
)
MARKED_TASK: np.dtype[Any] = np.dtype(
    [
        ("tgid", "<u4"),
        ("tid", "<u4"),
        ("parent_tgid", "<u4"),
        ("seen_before", "<u4"),
        ("cgroup", "<u8"),
        ("start_boottime_ns", "<u8"),
        ("comm", "|V16"),
    ]
)
SAMPLE: np.dtype[Any] = np.dtype(
    [
        ("sequence", "<u4"),
        ("reserved0", "<u2"),
        ("kind", "|u1"),
        ("flags", "|u1"),
        ("time_ns", "<u8"),
        ("tgid", "<u4"),
        ("tid", "<u4"),
        ("context", "<u8"),
        ("stack", "<u8"),
        ("instruction", "<u8"),
        ("duration_ns", "<u8"),
        ("in_kernel", "<u8"),
    ]
)
FLOW: np.dtype[Any] = np.dtype(
    [
        ("sequence", "<u4"),
        ("reserved0", "<u2"),
        ("kind", "|u1"),
        ("reserved1", "|u1"),
        ("start_ns", "<u8"),
        ("tgid", "<u4"),
        ("tid", "<u4"),
        ("context", "<u8"),
        ("reserved2", ("<u8", (4,))),
    ]
)
CONTEXT: np.dtype[Any] = np.dtype(
    [
        ("sequence", "<u4"),
        ("reserved0", "<u2"),
        ("kind", "|u1"),
        ("flags", "|u1"),
        ("time_ns", "<u8"),
        ("tgid", "<u4"),
        ("tid", "<u4"),
        ("context", "<u8"),
        ("parent", "<u8"),
        ("reserved1", ("<u8", (3,))),
    ]
)
HANDOFF: np.dtype[Any] = np.dtype(
    [
        ("sequence", "<u4"),
        ("reserved0", "<u2"),
        ("kind", "|u1"),
        ("flags", "|u1"),
        ("time_ns", "<u8"),
        ("tgid", "<u4"),
        ("tid", "<u4"),
        ("context", "<u8"),
        ("item", "<u8"),
        ("queue", "<u8"),
        ("reserved1", ("<u8", (2,))),
    ]
)
GIL: np.dtype[Any] = np.dtype(
    [
        ("sequence", "<u4"),
        ("reserved0", "<u2"),
        ("kind", "|u1"),
        ("flags", "|u1"),
        ("start_ns", "<u8"),
        ("duration_ns", "<u8"),
        ("tgid", "<u4"),
        ("tid", "<u4"),
        ("holder_tid", "<u4"),
        ("reserved1", "<u4"),
        ("reserved2", ("<u8", (3,))),
    ]
)
FRAME: np.dtype[Any] = np.dtype(
    [
        ("code", "<u8"),
        ("offset", "<u4"),
        ("reserved", "<u4"),
    ]
)
STACK_PART: np.dtype[Any] = np.dtype(
    [
        ("sequence", "<u4"),
        ("frames", "<u2"),
        ("kind", "|u1"),
        ("part", "|u1"),
        ("time_ns", "<u8"),
        ("stack", "<u8"),
        ("tgid", "<u4"),
        ("total", "<u2"),
        ("truncated", "<u2"),
        ("reserved", ("<u8", (4,))),
    ]
)
CODE_PART: np.dtype[Any] = np.dtype(
    [
        ("sequence", "<u4"),
        ("line_bytes", "<u2"),
        ("kind", "|u1"),
        ("part", "|u1"),
        ("time_ns", "<u8"),
        ("code", "<u8"),
        ("tgid", "<u4"),
        ("first_line", "<u4"),
        ("lines_total", "<u4"),
        ("version", "<u2"),
        ("first_instruction", "<u2"),
        ("name_length", "<u4"),
        ("file_length", "<u4"),
        ("name_width", "|u1"),
        ("file_width", "|u1"),
        ("reserved0", "<u2"),
        ("reserved1", "<u4"),
        ("reserved2", ("<u8", (1,))),
    ]
)
HIT: np.dtype[Any] = np.dtype(
    [
        ("sequence", "<u4"),
        ("probe", "<u2"),
        ("kind", "|u1"),
        ("arguments", "|u1"),
        ("time_ns", "<u8"),
        ("duration_ns", "<u8"),
        ("tgid", "<u4"),
        ("tid", "<u4"),
        ("context", "<u8"),
        ("unread", "<u4"),
        ("text_lengths", ("<u2", (4,))),
        ("began", "<u4"),
        ("reserved1", ("<u8", (1,))),
        ("values", ("<u8", (8,))),
        ("text", "|V320"),
    ]
)
PYTHON_CALL: np.dtype[Any] = np.dtype(
    [
        ("sequence", "<u4"),
        ("probe", "<u2"),
        ("kind", "|u1"),
        ("arguments", "|u1"),
        ("time_ns", "<u8"),
        ("duration_ns", "<u8"),
        ("tgid", "<u4"),
        ("tid", "<u4"),
        ("context", "<u8"),
        ("text_bytes", "<u4"),
        ("text_lengths", ("<u2", (4,))),
        ("reserved", "<u4"),
        ("kinds", "<u8"),
        ("values", ("<u8", (8,))),
        ("text", "|V320"),
    ]
)
HIT_PROBE: np.dtype[Any] = np.dtype(
    [
        ("pair", "<u4"),
        ("role", "|u1"),
        ("arguments", "|u1"),
        ("reserved", "<u2"),
    ]
)
HIT_ARGUMENT: np.dtype[Any] = np.dtype(
    [
        ("value", "<u8"),
        ("base", "<u2"),
        ("index", "<u2"),
        ("source", "|u1"),
        ("bytes", "|u1"),
        ("shift", "|u1"),
        ("flags", "|u1"),
        ("text_begin", "<u2"),
        ("text_bytes", "<u2"),
        ("text", "<u4"),
    ]
)
INTERPRETER: np.dtype[Any] = np.dtype(
    [
        ("gil", "<u8"),
        ("gil_bytes", "<u4"),
        ("flags", "<u4"),
        ("tss", "<i4"),
        ("version", "<u2"),
        ("gil_holder", "<u2"),
        ("tstate_frame", "<u2"),
        ("tstate_context", "<u2"),
        ("tstate_datastack_chunk", "<u2"),
        ("tstate_datastack_top", "<u2"),
        ("tstate_thread_id", "<u2"),
        ("tstate_native_thread_id", "<u2"),
        ("cframe_frame", "<u2"),
        ("thread_tid", "<u2"),
        ("frame_bytes", "<u2"),
        ("frame_code", "<u2"),
        ("frame_previous", "<u2"),
        ("frame_instruction", "<u2"),
        ("frame_owner", "<u2"),
        ("first_shim", "|u1"),
        ("unicode_kind_shift", "|u1"),
        ("code_name", "<u2"),
        ("code_file", "<u2"),
        ("code_first_line", "<u2"),
        ("code_lines", "<u2"),
        ("code_instructions", "<u2"),
        ("unicode_length", "<u2"),
        ("unicode_state", "<u2"),
        ("unicode_ascii", "<u2"),
        ("unicode_compact", "<u2"),
        ("bytes_size", "<u2"),
        ("bytes_data", "<u2"),
        ("context_entered", "<u2"),
        ("chunk_previous", "<u2"),
        ("reserved", ("<u2", (5,))),
    ]
)
CALL_WATCH: np.dtype[Any] = np.dtype(
    [
        ("code", "<u8"),
        ("none", "<u8"),
        ("bool_type", "<u8"),
        ("int_type", "<u8"),
        ("float_type", "<u8"),
        ("str_type", "<u8"),
        ("bytes_type", "<u8"),
        ("first_instruction", "<u8"),
        ("tss", "<i4"),
        ("probe", "<u2"),
        ("role", "|u1"),
        ("flags", "|u1"),
        ("tstate_frame", "<u2"),
        ("cframe_frame", "<u2"),
        ("frame_code", "<u2"),
        ("frame_previous", "<u2"),
        ("frame_locals", "<u2"),
        ("frame_blocks", "<u2"),
        ("frame_block_stack", "<u2"),
        ("frame_state", "<u2"),
        ("frame_instruction", "<u2"),
        ("unicode_ascii", "<u2"),
        ("unicode_compact", "<u2"),
        ("bytes_data", "<u2"),
        ("arguments", "|u1"),
        ("reserved0", "|u1"),
        ("tstate_datastack_top", "<u2"),
        ("frame_words", "<u4"),
    ]
)
CPU_STATE: np.dtype[Any] = np.dtype(
    [
        ("running", "<u8"),
        ("traced", "<u8"),
        ("in_flight", "<u8"),
        ("flight", FLIGHT),
        ("task", "<u8"),
        ("tgid", "<u4"),
        ("tid", "<u4"),
        ("recorded", "<u8"),
        ("interpreter", "<u4"),
        ("turned", "<u4"),
        ("context", "<u8"),
        ("waited_ns", "<u8"),
        ("contexts_made", "<u8"),
        ("thread_state", "<u8"),
        ("hot_head", "<u8"),
        ("wide_head", "<u8"),
        ("lost", ("<u8", (22,))),
        ("hot_tail", "<u8"),
        ("wide_tail", "<u8"),
        ("reserved2", ("<u8", (6,))),
    ]
)
