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
	LOSS_KINDS = 12,
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
	__u16 reserved[3];
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
	__u64 reserved0[5];
	/* producers */
	__u64 hot_head; /* slots ever reserved */
	__u64 wide_head;
	__u64 lost[LOSS_KINDS];
	__u64 reserved1[2];
	/* user space */
	__u64 hot_tail; /* slots ever given back */
	__u64 wide_tail;
	__u64 reserved2[6];
};

#endif
