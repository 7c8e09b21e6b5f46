/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Messages: reads and writes of recorded threads on sockets and pipes, from the exit of the system call.
 *
 * Sees:   what moved, over which connection, which bytes of the stream, and the head of the payload at
 *         each turn. How bytes are counted: endpoints.h; what is kept of them: payloads.h.
 * Misses: io_uring (but see sockets.h), 32-bit calls, tee(), TCP's urgent bytes, sockets used by the kernel
 *         itself, kernel TLS's and MPTCP's byte ranges (marked inexact), the peers of unconnected datagrams.
 *         Two threads that write to one stream in the same instant may have their ranges swapped.
 * Costs:  30 ns on top of the call's own record, 75 ns with a payload head (kernels before 6.2: 350 and
 *         450 ns, since each field of a kernel struct is a helper call there).
 */
#ifndef SCOPE_MESSAGES_H
#define SCOPE_MESSAGES_H

#include "state.h"
#include "connects.h"
#include "endpoints.h"
#include "payloads.h"

enum {
	MAX_HEADERS = 1024, /* UIO_MAXIOV, the kernel's own limit for sendmmsg and recvmmsg */
};

/* Where a TCP socket's receiver stands. A FIN has a number, too: it is not a byte of the stream. */
static __always_inline __u32 tcp_received(__u64 key)
{
	void *sk = (void *)key;
	__u32 copied = READ_FIELD(struct tcp_sock, sk, copied_seq);

	if (READ_FIELD(struct sock, sk, __sk_common.skc_flags) & 1 << SOCK_DONE &&
	    copied == READ_FIELD(struct tcp_sock, sk, rcv_nxt))
		copied--;
	return copied;
}

/* Moves the endpoint's counters on; returns where the message ends in its stream. */
static __always_inline __u64 advance(struct target_end *end, struct endpoint *known, bool fresh,
				     bool receive, bool peek, __u32 length, __u64 start_ns)
{
	__u64 measured_ns = receive ? known->received_measured_ns : known->sent_measured_ns;
	void *tcp = (void *)end->key; /* READ_FIELD's address must not look like a kernel's field itself */

	if (known->kind == ENDPOINT_TCP) {
		if (receive)
			return (__u32)(tcp_received(end->key) + (peek ? length : 0));
		return READ_FIELD(struct tcp_sock, tcp, write_seq);
	}
	if (peek)
		return known->received + length;
	if (fresh && !known->inexact)
		return receive ? known->received : known->sent;
	/*
	 * The call was under way when the counter was set. A connection that was met idle: a receive had
	 * waited, and a short send, too, and nothing of them was in the counter. Else it may have been.
	 */
	if (start_ns < measured_ns && !known->inexact &&
	    !(known->met_idle && (receive || length <= UNDIVIDED_BYTES))) {
		measure_again(end->key, known, receive, length);
		return receive ? known->received : known->sent;
	}
	if (receive)
		return ADD_TO(&known->received, length) + length;
	return ADD_TO(&known->sent, length) + length;
}

static __always_inline bool starts_turn(struct endpoint *known, bool receive, __u64 start_ns,
					__u32 length)
{
	__u64 last_ns = receive ? known->last_receive_ns : known->last_send_ns;
	bool turn = start_ns - last_ns > TURN_GAP_NS;

	if (known->kind != ENDPOINT_PIPE)
		turn |= known->received_last != receive;
	known->received_last = receive;
	if (receive)
		known->last_receive_ns = start_ns;
	else
		known->last_send_ns = start_ns;
	if (known->kind == ENDPOINT_TCP)
		return turn;
	/* processes of one program often send a length by itself: what follows is what was meant */
	if (receive) {
		turn |= known->received_prefix && length > PREFIX_BYTES;
		known->received_prefix = length <= PREFIX_BYTES;
	} else {
		turn |= known->sent_prefix && length > PREFIX_BYTES;
		known->sent_prefix = length <= PREFIX_BYTES;
	}
	return turn;
}

enum {
	ALSO_CALL = 1 << 8, /* in write_end's `flags`: let the record be the row of syscalls, too */
};

#ifdef SCOPE_BCC
/*
 * In `reserved2` of the CPU's state: what on_sys_exit hands over to on_message. All of it in one program is
 * more than the verifier looks at, since BCC has no functions that it could look at by themselves.
 */
enum handed {
	HANDED_DURATION,
	HANDED_STATUS,
	HANDED_FRESH, /* bits of ends that were met just now: 1 of a receive, 2 of a send */
};

BPF_PROG_ARRAY(stages, 1);

/* Meets the ends of the call in flight, so that on_message finds them. */
static __always_inline void meet_ends(struct cpu_state *cpu, __u8 class, struct pt_regs *regs, __s64 result)
{
	bool idle = class >= MESSAGE_BIRTH_RESULT, receive = class & MESSAGE_RECEIVE;
	struct task_struct *task = CURRENT_TASK();
	__u64 met = 0, first = cpu->flight.arg0, second = -1, i;
	struct target_end end;
	int fds[2];

	cpu->reserved2[HANDED_FRESH] = 0;
	if (class == MESSAGE_BIRTH_RESULT) {
		first = result;
	} else if (class == MESSAGE_BIRTH_PAIR || class == MESSAGE_BIRTH_FOURTH) {
		if (bpf_probe_read_user(fds, sizeof(fds),
					(void *)(class == MESSAGE_BIRTH_PAIR ? cpu->flight.arg0
									     : SYSCALL_ARG3(regs))))
			return;
		first = fds[0];
		second = fds[1];
	} else if (class == MESSAGE_SPLICE) {
		second = cpu->flight.arg2;
		receive = true;
	}
	first = UNKNOWN_TO_VERIFIER(cpu, first);
	second = UNKNOWN_TO_VERIFIER(cpu, second);
	receive = UNKNOWN_TO_VERIFIER(cpu, receive);
	idle = UNKNOWN_TO_VERIFIER(cpu, idle);
#pragma clang loop unroll(disable)
	for (i = 0; i < 2; i++) {
		if (!resolve(task, i ? second : first, &end))
			continue;
		if ((!idle || counts_bytes(&end)) && meet(&end, idle))
			met |= i || !receive ? 2 : 1;
	}
	cpu->reserved2[HANDED_FRESH] = idle ? 0 : met;
}
#else
/* What is known of recorded threads' io_urings: then user space attaches the programs of sockets.h. */
enum {
	RING_MET = 1,
	RING_USED = 2, /* something may have moved before these were attached */
};

enum {
	SETUP_SQPOLL = 2, /* IORING_SETUP_SQPOLL in the `flags` of struct io_uring_params */
	PARAMETERS_FLAGS = 8, /* where these are in it */
};

__u32 rings_met = 0;
/* Set by user space from when all of these programs are attached up to the end of the recording. */
__u32 transfers_wanted = 0;
/* When that was, if it was later than the beginning. */
__u64 transfers_since = 0;
const volatile __u32 ring_number = 0; /* of io_uring_enter */

/* A call that makes or enters an io_uring has returned. */
static __always_inline void meet_ring(struct flight *flight)
{
	__u32 flags = 0;

	if (rings_met == RING_USED || (transfers_wanted && flight->start_ns >= transfers_since))
		return;
	rings_met = flight->number == ring_number ? RING_USED : rings_met ?: RING_MET;
	if (rings_met == RING_MET &&
	    !bpf_probe_read_user(&flags, sizeof(flags), (void *)(flight->arg1 + PARAMETERS_FLAGS)) &&
	    flags & SETUP_SQPOLL)
		rings_met = RING_USED; /* it needs no call to be used */
}

/* An end whose bytes are counted may have moved some that were not seen: its position is not told then. */
static __always_inline void doubt(struct target_end *end, struct endpoint *known)
{
	struct endpoint *peer;
	__u64 peer_key;

	if (rings_met != RING_USED || known->inexact || known->kind == ENDPOINT_TCP ||
	    known->sent_measured_ns >= transfers_since)
		return;
	known->inexact = 1;
	if (known->kind != ENDPOINT_UNIX)
		return;
	peer_key = unix_peer(end->key);
	peer = bpf_map_lookup_elem(&endpoints, &peer_key);
	if (peer)
		peer->inexact = 1;
}

static __always_inline int write_pieces(struct cpu_state *cpu, __u64 hot_index, __u32 length,
					struct transfer *transfer);
#endif

/* One row of messages for one end. Returns whether a record was written or counted as lost. */
static __always_inline int write_moved(struct cpu_state *cpu, struct target_end *end, struct mover *mover,
				       __u32 length, __u64 duration_ns, __u32 flags_and_class)
{
	bool receive = flags_and_class & FLAG_RECEIVE, fresh = false;
	__u8 shape = flags_and_class >> 16;
	struct message *message;
	struct endpoint *known;
	__u64 index, stream_end, start_ns;
	__u8 flags = flags_and_class;

	known = bpf_map_lookup_elem(&endpoints, &end->key);
#ifdef SCOPE_BCC
	fresh = cpu->reserved2[HANDED_FRESH] & (receive ? 1 : 2);
	if (known && !is_current(end, known))
		known = NULL;
#endif
	if (!known || !is_current(end, known)) {
#ifndef SCOPE_BCC
		fresh = meet(end, false);
		known = bpf_map_lookup_elem(&endpoints, &end->key);
#endif
		if (!known) {
			count_loss(cpu, LOSS_MESSAGES);
			if (flags_and_class & ALSO_CALL)
				count_loss(cpu, LOSS_SYSCALLS);
			return true;
		}
	}
#ifndef SCOPE_BCC
	if (mover->transfer)
		doubt(end, known);
#endif
	start_ns = mover->flight->start_ns;
	stream_end = advance(end, known, fresh, receive, flags & FLAG_PEEK, length, start_ns);
	if (known->announced != THIS_TELLING)
		announce(cpu, end, known);
	if (known->inexact)
		flags |= FLAG_INEXACT;
	if (!(flags & FLAG_PEEK) && starts_turn(known, receive, start_ns, length)) {
		flags |= FLAG_TURN;
		if (!mover->transfer)
			cpu->turned = cpu->interpreter != 0;
	}
	flags = UNKNOWN_TO_VERIFIER(cpu, flags);
	stream_end = UNKNOWN_TO_VERIFIER(cpu, stream_end);
	message = hot_reserve(cpu, &index);
	if (!message) {
		count_loss(cpu, LOSS_MESSAGES);
		if (flags_and_class & ALSO_CALL)
			count_loss(cpu, LOSS_SYSCALLS);
		return true;
	}
#ifndef SCOPE_BCC
	if (mover->transfer) {
		if ((flags & FLAG_TURN) && payload_limit && length &&
		    write_pieces(cpu, index, length, mover->transfer))
			flags |= FLAG_PAYLOAD;
	} else
#endif
	if ((flags & FLAG_TURN) && payload_limit && length && write_payload(WITH_CPU index, length, shape))
		flags |= FLAG_PAYLOAD;
	message->number = mover->flight->number;
	message->kind = flags_and_class & ALSO_CALL ? RECORD_MESSAGE_CALL : RECORD_MESSAGE;
	message->flags = flags;
	message->start_ns = start_ns;
	message->duration_ns = duration_ns;
	message->tgid = mover->tgid;
	message->tid = mover->tid;
	message->arg1 = mover->flight->arg1;
	message->stream_end = stream_end;
	message->length_bytes = length;
	message->connection = known->connection;
	message->fd = mover->fd;
	message->arg2 = mover->flight->arg2;
	commit(&message->sequence, index);
	return true;
}

/* The same for one descriptor of the call in flight. */
__noinline int write_end(OF_CPU __u32 fd, __u32 length, __u64 duration_ns, __u32 flags_and_class)
{
	FIND_CPU();
	struct task_struct *task = CURRENT_TASK();
	struct mover mover = { .fd = fd };
	struct target_end end;

	if (!cpu || !resolve(task, fd, &end))
		return false;
	mover.flight = &cpu->flight;
	mover.tgid = cpu->tgid;
	mover.tid = cpu->tid;
	return write_moved(cpu, &end, &mover, length, duration_ns, flags_and_class);
}

/* Bytes of all messages of a sendmmsg or recvmmsg. */
__noinline int sum_headers(__u64 headers, __u32 count)
{
	__u32 length, total = 0;
	__u64 i; /* as wide as registers, as in payloads.h */

	for (i = 0; i < MAX_HEADERS && i < count; i++) {
		KEEP_COUNT(i);
		length = 0;
		bpf_probe_read_user(&length, sizeof(length),
				    (void *)(headers + i * sizeof(struct user_mmsghdr) +
					     __builtin_offsetof(struct user_mmsghdr, length)));
		total += length;
	}
	return FORGET_BOUNDS(total);
}

/* Meets what a call made, before anything can move over it. */
__noinline int meet_new(OF_CPU __u32 class, __u32 result, __u64 fourth)
{
	FIND_CPU();
	struct task_struct *task = CURRENT_TASK();
	struct target_end end;
	int fds[2] = {};

	if (!cpu)
		return 0;
	if (class == MESSAGE_BIRTH_RESULT)
		fds[0] = result;
	else if (class == MESSAGE_BIRTH_FIRST)
		fds[0] = cpu->flight.arg0;
	else if (bpf_probe_read_user(fds, sizeof(fds),
				     (void *)(class == MESSAGE_BIRTH_PAIR ? cpu->flight.arg0 : fourth)))
		return 0;
	/* the second descriptor leads to the same pipe, or to the peer: that is met with the first */
	if (resolve(task, fds[0], &end) && counts_bytes(&end))
		meet(&end, true);
	return 0;
}

static __always_inline __u8 class_of(__u16 number)
{
	__u32 index = number;

#ifdef SCOPE_BCC
	__u8 *class = bpf_map_lookup_elem(&message_class_table, &index);

	return class ? *class : MESSAGE_NONE;
#else
	if (index >= sizeof(message_classes))
		return MESSAGE_NONE;
	/* hides the comparison from the compiler, which would drop the mask that the verifier needs */
	asm volatile("" : "+r"(index));
	return message_classes[index & (sizeof(message_classes) - 1)];
#endif
}

/*
 * The rows of messages for the call in flight, if it is one that moves messages. Returns whether the row
 * of syscalls is done with that, too.
 */
static __always_inline bool write_message(struct cpu_state *cpu, struct pt_regs *regs, __s64 result,
					  __u64 duration_ns, __u32 status)
{
	struct flight *flight = &cpu->flight;
	__u8 class = class_of(flight->number), shape = class & MESSAGE_SHAPE;
	__u32 flags = status | (class & MESSAGE_RECEIVE ? FLAG_RECEIVE : 0) | shape << 16;
	__u32 length = result, message_flags = 0, fd;
	bool done = false;
	__u64 arg3, i;

	if (!class)
		return false;
	/* each function is called in one place: BCC puts all of it there */
	if (class == MESSAGE_BIRTH_FIRST)
		write_connect(WITH_CPU result, duration_ns, status);
	if (result < 0)
		return false;
	/* the compiler would merge this load with one of `flight`; the verifier wants them apart */
	arg3 = SYSCALL_ARG3(regs);
	asm volatile("" : "+r"(arg3));
#ifndef SCOPE_BCC
	if (class == MESSAGE_RING) {
		meet_ring(flight);
		return false;
	}
#endif
	if (class >= MESSAGE_BIRTH_RESULT) {
#ifndef SCOPE_BCC
		meet_new(WITH_CPU class, result, arg3);
#endif
		return false;
	}
	if (shape == MESSAGE_HEADERS)
		length = sum_headers(flight->arg1, result);
	if (shape == MESSAGE_HEADER)
		message_flags = flight->arg2;
	else if (class & MESSAGE_FLAGS || shape == MESSAGE_HEADERS)
		message_flags = arg3;
	if (message_flags & (MSG_OOB | MSG_ERRQUEUE))
		return false; /* not part of the stream */
	if (message_flags & MSG_PEEK && class & MESSAGE_RECEIVE)
		flags |= FLAG_PEEK;
	/* one record for both rows, if it can hold all of the call */
	if (record_syscalls && shape != MESSAGE_SPLICE && length == result && !(flight->arg0 >> 32) &&
	    !(flight->arg2 >> 32))
		flags |= ALSO_CALL;
	fd = flight->arg0;
	if (shape == MESSAGE_SPLICE)
		flags |= FLAG_RECEIVE;
	flags = UNKNOWN_TO_VERIFIER(cpu, flags);
	length = UNKNOWN_TO_VERIFIER(cpu, length);
	shape = UNKNOWN_TO_VERIFIER(cpu, shape);
#pragma clang loop unroll(disable)
	for (i = 0; i < 2; i++) {
		done = write_end(WITH_CPU fd, length, duration_ns, flags) && flags & ALSO_CALL;
		if (shape != MESSAGE_SPLICE)
			break;
		/* from one end into the other */
		fd = flight->arg2;
		flags &= ~FLAG_RECEIVE;
	}
	return done;
}

#ifndef SCOPE_BCC
/* Meets what recorded processes have open, so that it is known before their next call. */
SEC("iter/task_file")
int WRITES_AT(LEVEL_TASK, on_list_files, struct bpf_iter__task_file *ctx)
{
	struct task_struct *task = ctx->task;
	struct file *file = ctx->file;
	struct task_record *record;
	struct target_end end;

	if (!task || !file)
		return 0;
	record = record_of(task);
	if (record && record->phase != PHASE_DORMANT && resolve_file(file, &end) && counts_bytes(&end))
		meet(&end, true);
	return 0;
}

#endif

#endif
