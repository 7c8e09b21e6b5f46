/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * The one definition of every record that crosses from the kernel to user space, and of the constants
 * that both sides use. scope_ebpf/records.py is generated from the BTF of this file.
 *
 * Records are flat and without holes (-Wpadded -Werror: a hole would hand out stale ring memory).
 * All times are CLOCK_MONOTONIC nanoseconds.
 */
#ifndef SCOPE_EVENTS_H
#define SCOPE_EVENTS_H

#define UNKNOWN_NS 0xffffffffffffffffULL /* a time that was not seen */

enum record_limits {
	COMM_BYTES = 16,
	ADDRESS_BYTES = 16,
	PATH_BYTES = 112,
	HOT_SLOT_BYTES = 64,
	WIDE_HEADER_BYTES = 64,
	COMMAND_LINE_BYTES = 384,
	/* sockets and pipes that are remembered at once; the least recently used one goes first */
	ENDPOINTS = 65536,
	/* sessions of OpenSSL whose turns are remembered at once */
	TLS_SESSIONS = 16384,
	/* a pause after which a message starts a new turn although the direction did not change */
	TURN_GAP_NS = 10000000,
	/* on pipes and Unix sockets: what follows a message of so few bytes starts a turn, too */
	PREFIX_BYTES = 8,
	NO_SYSCALL = 0xffff,
	/* set in `number` of a 32-bit call on a 64-bit kernel: the number is from the other table */
	COMPAT_SYSCALL = 0x8000,
	/* in `fd` of a message: it was not moved by way of a descriptor */
	NO_DESCRIPTOR = 0xffffffff,
};

/* What a slot holds. */
enum record_kind {
	RECORD_CALL = 1,	 /* hot: a row of syscalls */
	RECORD_MESSAGE = 2,	 /* hot: a row of messages */
	RECORD_MESSAGE_CALL = 3, /* hot: a row of messages that is a row of syscalls, too */
	RECORD_OFFCPU = 4,	 /* hot: a row of offcpu */
	RECORD_PROCESS = 5,	 /* wide: a row of processes */
	RECORD_CONNECTION = 6,	 /* wide: a row of connections */
	RECORD_PAYLOAD = 7,	 /* wide: the payload of the hot record with the same index */
	RECORD_CONNECT = 8,	 /* wide: a row of connects */
	RECORD_TLS = 9,		 /* hot: a row of tls */
	RECORD_SAMPLE = 10,	 /* hot: a row of samples */
	RECORD_FLOW = 11,	 /* hot: a row of flows */
	RECORD_CONTEXT = 12,	 /* hot: a row of contexts */
	RECORD_HANDOFF = 13,	 /* hot: a row of handoffs */
	RECORD_GIL = 14,	 /* hot: a row of gil */
	RECORD_STACK = 15,	 /* wide: a part of a row of stacks */
	RECORD_CODE = 16,	 /* wide: a part of a row of codes */
	RECORD_HIT = 17,	 /* wide: a row of hits */
	RECORD_PYTHON_CALL = 18, /* wide: a row of hits, of a Python function */
	RECORD_CGROUP = 19,	 /* wide: a process record that holds a new cgroup and, as command line, its path */
};

/* What can be lost, counted per CPU. */
enum loss_kind {
	LOSS_SYSCALLS = 0,
	LOSS_MESSAGES = 1,
	LOSS_OFFCPU = 2,
	LOSS_PROCESSES = 3,
	LOSS_CONNECTIONS = 4,
	LOSS_PAYLOADS = 5,
	LOSS_TASKS = 6, /* a thread that could not be remembered, so nothing of it is recorded */
	LOSS_CONNECTS = 7,
	LOSS_TLS = 8,
	LOSS_SAMPLES = 9,
	LOSS_STACKS = 10, /* a stack or a function that could not be described: tried again at its next sight */
	LOSS_CONTEXTS = 11, /* with the call whose context it was: no row has another one's */
	LOSS_HANDOFFS = 12,
	LOSS_GIL = 13,
	LOSS_HITS = 14,
	LOSS_KINDS = 22,
};

/* How much of a call or interval was seen. */
enum call_status {
	STATUS_COMPLETE = 0,
	STATUS_BEGAN_BEFORE = 1, /* it ran when the recording began: start is when it was first seen */
	STATUS_OPEN = 2,	 /* it still ran when the recording ended: duration is up to there */
	STATUS_NO_RETURN = 3,	 /* the thread ended inside it */
	STATUS_THROUGHOUT = 5,	 /* both: it ran from before the recording to after its end */
	STATUS_END_LATE = 6,	 /* offcpu: its end was not seen; the duration is up to the next call */
	STATUS_REFUSED = 4,	 /* seccomp or a tracer refused it before it began: no duration */
};

/* Bits of a hot record's `flags` above the low three, which are a call_status. */
enum record_flags {
	FLAG_STATUS = 7,
	FLAG_RECEIVE = 1 << 3,	   /* else: send */
	FLAG_PEEK = 1 << 4,	   /* a receive that left the bytes in the queue */
	FLAG_TURN = 1 << 5,	   /* the first message of a turn */
	FLAG_PAYLOAD = 1 << 6,	   /* a payload record with this index was written */
	FLAG_INEXACT = 1 << 7,	   /* stream_end counts this end's own bytes only */
};

enum process_event {
	PROCESS_ALIVE = 0,	 /* a process or thread that ran already when the recording began */
	PROCESS_FORK = 1,	 /* a new process */
	PROCESS_THREAD = 2,	 /* a new thread of a process */
	PROCESS_EXEC = 3,
	PROCESS_EXIT = 4,	 /* the last thread of a process ended */
	PROCESS_THREAD_EXIT = 5,
	PROCESS_MOVED = 6, /* to another cgroup */
	PROCESS_STILL = 7, /* told again, so that what was told before can go: see loaders/capture.py */
};

/* How user space finds a message's bytes: what each syscall number is for messages. */
enum message_class {
	MESSAGE_NONE = 0,
	MESSAGE_BUFFER = 1,   /* (fd, buffer, length, flags) */
	MESSAGE_VECTOR = 2,   /* (fd, iovec, count) */
	MESSAGE_HEADER = 3,   /* (fd, msghdr, flags) */
	MESSAGE_HEADERS = 4,  /* (fd, mmsghdr, count, flags) */
	MESSAGE_SENDFILE = 5, /* (out fd, in fd) */
	MESSAGE_SPLICE = 6,   /* (in fd, offset, out fd) */
	MESSAGE_SHAPE = 7,
	MESSAGE_RECEIVE = 8,  /* a bit beside the shape; else: send */
	MESSAGE_FLAGS = 16,   /* a bit: BUFFER calls that have flags as fourth argument */
	/* calls that make a connection, by where its descriptors are when they return: */
	MESSAGE_BIRTH_RESULT = 32, /* the result */
	MESSAGE_BIRTH_FIRST = 33,  /* the first argument */
	MESSAGE_BIRTH_PAIR = 34,   /* two, where the first argument points to */
	MESSAGE_BIRTH_FOURTH = 35, /* two, where the fourth argument points to */
	MESSAGE_RING = 36,	   /* a call that makes or enters an io_uring, see sockets.h */
};

/* One completed system call. 64 bytes, one cache line. */
struct call {
	__u32 sequence; /* commit mark: the low half of the slot's index, plus one */
	__u16 number;	/* system call, perhaps with COMPAT_SYSCALL */
	__u8 kind;	/* record_kind */
	__u8 flags;	/* call_status */
	__u64 start_ns;
	__u64 duration_ns;
	__u32 tgid;
	__u32 tid;
	__s64 result; /* as the kernel returned it: -errno on errors */
	__u64 arg0;
	__u64 arg1;
	__u64 arg2;
};

/* One read or write on a socket or pipe; for RECORD_MESSAGE_CALL also the call: result is length. */
struct message {
	__u32 sequence;
	__u16 number;
	__u8 kind;
	__u8 flags; /* call_status and record_flags */
	__u64 start_ns;
	__u64 duration_ns;
	__u32 tgid;
	__u32 tid;
	__u64 arg1;
	__u64 stream_end; /* where its last byte ends in the stream; TCP: the sequence number */
	__u32 length_bytes;
	__u32 connection; /* id of a connection record */
	__u32 fd;	  /* also arg0 of the call */
	__u32 arg2;
};

/* One interval that a thread was off the CPU. */
struct offcpu {
	__u32 sequence;
	__u16 number; /* the system call that it was in, or NO_SYSCALL */
	__u8 kind;
	__u8 flags; /* call_status */
	__u64 start_ns;
	__u64 duration_ns; /* waiting and runnable */
	__u32 tgid;
	__u32 tid;
	__u64 runnable_ns;	/* of duration_ns: ready to run, waiting for a CPU; or UNKNOWN_NS */
	__u64 syscall_start_ns; /* start_ns of that call in syscalls, or 0 */
	__u32 waker_tgid;
	__u32 waker_tid;
	__u32 state; /* task state bits when it left the CPU; 0: it was preempted */
	__u16 waker_number; /* the system call that the waker was in, or NO_SYSCALL */
	__u16 reserved;
};

/* One call that moved plain text through OpenSSL. */
struct tls {
	__u32 sequence;
	__u16 reserved0;
	__u8 kind;
	__u8 flags; /* record_flags */
	__u64 start_ns;
	__u64 duration_ns;
	__u32 tgid;
	__u32 tid;
	__u64 ssl;	    /* address of the SSL object in the process */
	__u32 length_bytes; /* of plain text */
	__u32 reserved1;
	__u64 reserved2[2];
};

/* Head of every wide slot. */
struct payload {
	__u32 sequence;
	__u16 length_bytes; /* captured bytes, which follow this header */
	__u8 kind;
	__u8 flags;
	__u64 hot_index; /* index of the message's slot in the same CPU's hot ring */
	__u64 reserved[6];
};

/* One event in a process's or thread's life. */
struct process {
	__u32 sequence;
	__u16 command_line_bytes; /* captured bytes of the command line */
	__u8 kind;
	__u8 event; /* process_event */
	__u64 time_ns;
	__u32 tgid;
	__u32 tid;
	__u32 parent_tgid;
	__u32 parent_tid;     /* fork and thread: the thread that made it; exec: the tid before it */
	__u64 cgroup;	      /* id in the unified hierarchy: the inode of its directory */
	__u64 start_boottime_ns; /* when the task was created, on CLOCK_BOOTTIME */
	__s32 exit_code;      /* wait status: code << 8 | signal */
	__u32 command_line_total_bytes;
	char comm[COMM_BYTES];
	char command_line[COMMAND_LINE_BYTES]; /* arguments, each ended by a zero byte */
};

/* One end of a connection at its first message. */
struct connection {
	__u32 sequence;
	__u16 family; /* AF_*; 0 for a pipe */
	__u8 kind;
	__u8 reserved;
	__u64 time_ns;
	__u32 connection;
	__u32 peer; /* Unix: connection id of the other end, or 0 */
	__u32 tgid;
	__u16 type;	/* SOCK_* */
	__u16 protocol; /* IPPROTO_* */
	__u64 inode;
	__u64 peer_inode; /* Unix: 0 while the other end is not accepted */
	__u32 netns;
	__u16 local_port;
	__u16 remote_port;
	__u8 local_address[ADDRESS_BYTES];
	__u8 remote_address[ADDRESS_BYTES];
	char local_path[PATH_BYTES];
	char remote_path[PATH_BYTES];
};

/* One call of connect() on an internet or Unix socket, whatever came of it. */
struct connect {
	__u32 sequence;
	__u16 family; /* AF_* of the socket */
	__u8 kind;
	__u8 flags; /* call_status */
	__u64 start_ns;
	__u64 duration_ns;
	__u32 tgid;
	__u32 tid;
	__u32 fd;
	__s32 result; /* 0 or -errno */
	__u64 inode;  /* of the socket */
	__u16 type;	/* SOCK_* */
	__u16 protocol; /* IPPROTO_* */
	__u16 remote_family; /* AF_* of the address that was passed; 0: none, or not readable */
	__u16 remote_port;
	__u8 remote_address[ADDRESS_BYTES];
	char remote_path[PATH_BYTES];
};

/* Why a thread's Python stack was taken. */
enum sample_reason {
	SAMPLE_CPU = 1,	    /* it ran when the sampling clock ticked */
	SAMPLE_WAIT = 2,    /* it was off the CPU in a system call for longer than a threshold */
	SAMPLE_MESSAGE = 3, /* it sent or received the first message of a turn */
	SAMPLE_FAULT = 4,   /* it left the CPU in no system call and not runnable: it waits for a page */
};

/* How a logical context came about. */
enum context_kind {
	CONTEXT_COPIED = 1,   /* a copy of the context that made it: a task, a callback */
	CONTEXT_NEW = 2,      /* made empty, or copied from one that did not run */
	CONTEXT_MET = 3,      /* it existed when its process was met */
	CONTEXT_GREENLET = 4, /* a greenlet's stack */
};

/* What is known of an interpreter, in `flags` of an interpreter. */
enum interpreter_flags {
	INTERPRETER_STACKS = 1,	   /* frames can be walked */
	INTERPRETER_CONTEXTS = 2,  /* contexts are made in this process */
	INTERPRETER_GREENLETS = 4, /* greenlets switch its data stacks */
	INTERPRETER_GIL = 8,	   /* `gil` is known */
	INTERPRETER_HEAP_FRAMES = 16, /* up to 3.10: frames are objects, linked by f_back */
	INTERPRETER_CFRAME = 32,   /* 3.11, 3.12: the current frame is in tstate->cframe */
};

enum python_limits {
	INTERPRETERS = 4096, /* processes with different layouts or addresses; forks share */
	STACK_FRAMES = 128, /* the innermost ones of a deeper stack are taken */
	STACK_PART_FRAMES = 28, /* in one wide slot */
	CODE_NAME_BYTES = 128,
	CODE_FILE_BYTES = 192,
	CODE_PART_BYTES = 128, /* of the line table beside the names */
	CODE_MORE_BYTES = 448, /* of the line table in each further slot */
	CODE_PARTS = 8,
	HIT_ARGUMENTS = 8,
	HIT_TEXTS = 4,
	HIT_TEXT_BYTES = 320,
	ARGUMENT_BYTES = 80, /* of the text of a function's argument */
	CALL_WATCHES = 1024,
	OPEN_CALLS = 8192, /* of watched functions, at once */
};

/* A thread's Python stack at a moment. */
struct sample {
	__u32 sequence;
	__u16 reserved0;
	__u8 kind;
	__u8 flags; /* sample_reason */
	__u64 time_ns; /* of a call or interval: its start_ns */
	__u32 tgid;
	__u32 tid;
	__u64 context;
	__u64 stack;	   /* hash of the stack, as in stack_part; 0: none could be read */
	__u64 instruction; /* user instruction pointer, at a tick of the clock; else 0 */
	__u64 duration_ns; /* of the call or interval; at a tick: 0 */
	__u64 in_kernel;   /* 1: the tick came while the thread was in the kernel */
};

/* From this call on the thread's calls are in another logical context. */
struct flow {
	__u32 sequence;
	__u16 reserved0;
	__u8 kind;
	__u8 reserved1;
	__u64 start_ns; /* of the first call in it */
	__u32 tgid;
	__u32 tid;
	__u64 context; /* 0: the thread itself */
	__u64 reserved2[4];
};

/* A logical context was made, or met. */
struct context {
	__u32 sequence;
	__u16 reserved0;
	__u8 kind;
	__u8 flags; /* context_kind */
	__u64 time_ns;
	__u32 tgid;
	__u32 tid;
	__u64 context;
	__u64 parent; /* the one that made it; 0: the thread itself, or not known */
	__u64 reserved1[3];
};

/* A work item was put into a queue, or taken out. */
struct handoff {
	__u32 sequence;
	__u16 reserved0;
	__u8 kind;
	__u8 flags; /* 1: put, 0: got */
	__u64 time_ns;
	__u32 tgid;
	__u32 tid;
	__u64 context; /* of the thread that put or got it, at that moment */
	__u64 item;    /* address of the object */
	__u64 queue;   /* address of the queue; of what was got: 0 */
	__u64 reserved1[2];
};

/* One futex call that waited for the GIL. */
struct gil {
	__u32 sequence;
	__u16 reserved0;
	__u8 kind;
	__u8 flags; /* call_status */
	__u64 start_ns; /* as in syscalls */
	__u64 duration_ns;
	__u32 tgid;
	__u32 tid;
	__u32 holder_tid; /* who held it when the call ended; 0: not known */
	__u32 reserved1;
	__u64 reserved2[3];
};

/* One frame of a stack. */
struct frame {
	__u64 code;   /* address of the code object */
	__u32 offset; /* of the instruction, from the code object; up to 3.10: its f_lasti */
	__u32 reserved;
};

/* Some frames of a stack that was seen for the first time. The innermost frame is the first. */
struct stack_part {
	__u32 sequence;
	__u16 frames; /* in this slot; they follow this header */
	__u8 kind;
	__u8 part; /* from 0 on */
	__u64 time_ns;
	__u64 stack; /* hash of process, frames and what is known to have changed among its code objects */
	__u32 tgid;
	__u16 total; /* frames of all parts */
	__u16 truncated; /* 1: there are more frames further out */
	__u64 reserved[4];
};

/* A code object that was seen for the first time, or the rest of its line table. */
struct code_part {
	__u32 sequence;
	__u16 line_bytes; /* of the line table in this slot, behind the names */
	__u8 kind;
	__u8 part; /* from 0 on; 0 has the names */
	__u64 time_ns;
	__u64 code; /* its address */
	__u32 tgid;
	__u32 first_line;
	__u32 lines_total; /* bytes of the whole line table */
	__u16 version; /* of CPython: 0x030b is 3.11 */
	__u16 first_instruction; /* offset of the bytecode in the code object */
	__u32 name_length; /* of the whole name, in characters */
	__u32 file_length;
	__u8 name_width; /* bytes per character */
	__u8 file_width;
	__u16 reserved0;
	__u32 reserved1;
	__u64 reserved2[1];
};

/* What an argument of a Python function was. */
enum value_kind {
	VALUE_UNBOUND = 0, /* nothing was there, or it is in a cell (up to 3.10) */
	VALUE_NONE = 1,
	VALUE_BOOL = 2,
	VALUE_INT = 3,
	VALUE_LONG_INT = 4, /* of more than 63 bits: its value is how many digits of 30 bits it has */
	VALUE_FLOAT = 5,    /* its value has the bits of the double */
	VALUE_BYTES = 6,
	VALUE_LATIN1 = 7, /* a str, by the bytes per character */
	VALUE_UCS2 = 8,
	VALUE_UCS4 = 9,
	VALUE_OBJECT = 10, /* of another type: its text is the type's name */
	VALUE_UNREADABLE = 11,
};

/* What a watched address tells of a function, see calls.h. */
enum call_watch_role {
	WATCH_BEGIN = 1,  /* its first instruction is read */
	WATCH_END = 2,	  /* something is touched that is touched when one of its frames goes */
	WATCH_UNWIND = 3, /* its table of lines is looked at (up to 3.10) */
};

enum call_watch_flags {
	CALL_NO_END = 1,      /* a call makes a generator or coroutine */
	CALL_HEAP_FRAMES = 2, /* up to 3.10 */
	CALL_CFRAME = 4,      /* 3.11, 3.12 */
	CALL_INT_TAG = 8,     /* from 3.12 on the sign of an int is in its lowest bits */
	CALL_FRAME_STATE = 16, /* 3.10: frame_state is f_state, else f_executing */
};

/* A watched address: what user space knows of the function and of the interpreter. */
struct call_watch {
	__u64 code; /* address of its code object */
	__u64 none; /* addresses of None and of types */
	__u64 bool_type;
	__u64 int_type;
	__u64 float_type;
	__u64 str_type;
	__u64 bytes_type;
	__u64 first_instruction; /* its address */
	__s32 tss; /* this and the offsets below: as in struct interpreter */
	__u16 probe;
	__u8 role;  /* call_watch_role */
	__u8 flags; /* call_watch_flags */
	__u16 tstate_frame;
	__u16 cframe_frame;
	__u16 frame_code;
	__u16 frame_previous;
	__u16 frame_locals;
	__u16 frame_blocks; /* f_iblock */
	__u16 frame_block_stack;
	__u16 frame_state;
	__u16 frame_instruction;
	__u16 unicode_ascii;
	__u16 unicode_compact;
	__u16 bytes_data;
	__u8 arguments;
	__u8 reserved0;
	__u16 tstate_datastack_top;
	__u32 frame_words; /* 8 bytes each, that a frame of this function has on the data stack */
};

/* A probe that the user chose was hit. */
struct hit {
	__u32 sequence;
	__u16 probe; /* its number in the recording */
	__u8 kind;
	__u8 arguments;
	__u64 time_ns;
	__u64 duration_ns; /* of a call of a function; else 0 */
	__u32 tgid;
	__u32 tid;
	__u64 context;
	__u32 unread; /* a bit per argument that could not be read: its value means nothing */
	__u16 text_lengths[HIT_TEXTS]; /* captured bytes of each text, without the zero at its end */
	__u32 began; /* 1: duration_ns is from the begin to the end of a pair, and time_ns is the begin */
	__u64 reserved1[1];
	__u64 values[HIT_ARGUMENTS]; /* of a text: 1 if there is more of it than was captured */
	char text[HIT_TEXT_BYTES]; /* each where its hit_argument says */
};

/* A Python function that the user chose was called. */
struct python_call {
	__u32 sequence;
	__u16 probe; /* its number among those that were chosen */
	__u8 kind;
	__u8 arguments;
	__u64 time_ns;
	__u64 duration_ns; /* UNKNOWN_NS: its end was not seen */
	__u32 tgid;
	__u32 tid;
	__u64 context;
	__u32 text_bytes; /* captured bytes of all texts, one after the other */
	__u16 text_lengths[HIT_TEXTS]; /* captured bytes of each */
	__u32 reserved;
	__u64 kinds; /* a value_kind in each byte, the first argument in the lowest */
	__u64 values[HIT_ARGUMENTS]; /* of a text: its length in all */
	char text[HIT_TEXT_BYTES];
};

/* Where an argument of a probe comes from. */
enum hit_source {
	HIT_NOWHERE = 0, /* it cannot be read: a vector register, an unknown symbol */
	HIT_CONSTANT = 1,
	HIT_REGISTER = 2,
	HIT_MEMORY = 3,
	HIT_CARRIED = 4, /* the begin of the pair left it */
};

/* What a hit of a probe does, in `role` of a hit_probe; `flags` of a hit_argument. */
enum hit_flags {
	HIT_ROW = 1,	   /* write a record */
	HIT_BEGINS = 2,	   /* remember when, for the end of the pair */
	HIT_ENDS = 4,
	HIT_NESTS = 8,	   /* begin and end see the same stack pointer, which tells nested pairs apart */
	HIT_RETURNS = 16,  /* the return of a function: its address was taken from the stack */
	HIT_SIGNED = 32,   /* of an argument */
	HIT_TEXT = 64,	   /* of an argument: the address of a zero-ended string */
};

enum hit_limits {
	HIT_PROBES = 2048, /* places at once */
	HIT_BEGINNINGS = 16384, /* pairs that are open at once; the least recently begun goes first */
	HIT_TEXT_LAST = 240, /* the second and later texts begin here at the latest, */
	HIT_TEXT_MORE = 104, /* and are at most so long */
	HIT_CARRIES = 2, /* arguments that the begin of a pair leaves for its end */
	HIT_NO_REGISTER = 0xffff,
};

/* A place that the user's probes are at: element of the map `hit_probes`, told by the link's cookie. */
struct hit_probe {
	__u32 pair; /* begin and end of a pair have the same number */
	__u8 role; /* hit_flags */
	__u8 arguments;
	__u16 reserved;
};

/* An argument of such a place: HIT_ARGUMENTS elements of `hit_arguments` for each. */
struct hit_argument {
	__u64 value; /* the constant; what is added to the address; which one is carried */
	__u16 base; /* where the register is in struct pt_regs, or HIT_NO_REGISTER */
	__u16 index;
	__u8 source; /* hit_source */
	__u8 bytes;
	__u8 shift; /* of the index register */
	__u8 flags; /* hit_flags */
	__u16 text_begin; /* in `text` of a hit */
	__u16 text_bytes;
	__u32 text; /* which of the texts it is */
};

/*
 * Where things are in a CPython process: offsets in bytes within the structs, as scope_ebpf.cpython
 * knows them for its version. Elements of the map `interpreters`; `pythons` says which one is a
 * process's.
 */
struct interpreter {
	__u64 gil; /* address of the struct that holds the GIL */
	__u32 gil_bytes;
	__u32 flags; /* interpreter_flags */
	__s32 tss; /* of the thread state, from the thread pointer (fs base) */
	__u16 version;
	__u16 gil_holder;
	/* PyThreadState */
	__u16 tstate_frame; /* current_frame; with INTERPRETER_CFRAME: cframe; with HEAP_FRAMES: frame */
	__u16 tstate_context;
	__u16 tstate_datastack_chunk;
	__u16 tstate_datastack_top;
	__u16 tstate_thread_id;
	__u16 tstate_native_thread_id; /* 0: there is none */
	__u16 cframe_frame; /* current_frame in a _PyCFrame */
	__u16 thread_tid; /* offset of the kernel's tid from pthread_self, where there is no native id; 0: none */
	/* _PyInterpreterFrame, or PyFrameObject */
	__u16 frame_bytes; /* as much as has all of these */
	__u16 frame_code;
	__u16 frame_previous;
	__u16 frame_instruction; /* prev_instr, instr_ptr; with HEAP_FRAMES: f_lasti */
	__u16 frame_owner;
	__u8 first_shim; /* owners from this number on are no Python frames; 0xff: none */
	__u8 unicode_kind_shift; /* in the byte at unicode_state; the kind has 3 bits */
	/* PyCodeObject */
	__u16 code_name; /* co_qualname; up to 3.10: co_name */
	__u16 code_file;
	__u16 code_first_line;
	__u16 code_lines; /* co_linetable, co_lnotab */
	__u16 code_instructions; /* co_code_adaptive; up to 3.10: 0 */
	/* objects */
	__u16 unicode_length;
	__u16 unicode_state; /* the byte with kind, compact and ascii, which follow each other */
	__u16 unicode_ascii; /* bytes of a PyASCIIObject: where an ASCII string's characters begin */
	__u16 unicode_compact; /* of a PyCompactUnicodeObject: where others' begin */
	__u16 bytes_size;
	__u16 bytes_data;
	__u16 context_entered; /* in a PyContext */
	__u16 chunk_previous; /* in a _PyStackChunk */
	__u16 reserved[5];
};

/* A task that was marked by on_mark_tasks, as that iterator writes it. */
struct marked_task {
	__u32 tgid;
	__u32 tid;
	__u32 parent_tgid;
	__u32 seen_before; /* it was marked by an earlier pass */
	__u64 cgroup;
	__u64 start_boottime_ns;
	char comm[COMM_BYTES];
};

/* How a target's entry in `targets` is to be understood. */
enum target_kind {
	TARGET_NOW = 1,
	TARGET_AFTER_EXEC = 2, /* nothing is recorded until it executes another program */
};

/* A call in flight. */
struct flight {
	__u64 start_ns;
	__u64 arg0;
	__u64 arg1;
	__u64 arg2;
	__u16 number;
	__u16 refused; /* the change of context before it could not be recorded: nor may it be */
	__u16 reserved[2];
};

/*
 * What a CPU knows, one element of the map `cpus`. User space maps it, too: it reads the heads and the
 * losses, and writes the tails and, to have the running thread looked up again, 0 into `running` and
 * `task`.
 */
struct cpu_state {
	/* the running thread; a thread's identity is the address of its user registers, see running.h */
	__u64 running;	/* thread that is known to run here, 0: none is */
	__u64 traced;	/* the same if it is recorded, else 0 */
	__u64 in_flight; /* whose call `flight` is, or 0 */
	struct flight flight;
	__u64 task; /* task_struct that was switched in last, 0: look the running one up */
	__u32 tgid; /* of `task`, if it is recorded */
	__u32 tid;
	__u64 recorded; /* whether `task` has a record */
	__u32 interpreter; /* of `task`: its element in `interpreters`, 0: it is no Python */
	__u32 turned;	   /* the call in flight began a turn of a connection */
	__u64 context;	   /* of `task`: the logical context that the last flow record told */
	__u64 waited_ns;   /* of `task`: how long it was off the CPU in the call in flight */
	__u64 contexts_made; /* on this CPU: ids are made of it */
	__u64 thread_state; /* of `task`: its PyThreadState, 0: ask again */
	/* producers */
	__u64 hot_head; /* slots ever reserved */
	__u64 wide_head;
	__u64 lost[LOSS_KINDS];
	/* user space */
	__u64 hot_tail; /* slots ever given back */
	__u64 wide_tail;
	__u64 reserved2[6];
};

#endif
