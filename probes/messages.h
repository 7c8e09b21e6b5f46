/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Messages: reads and writes of recorded threads on sockets and pipes, from the exit of the system call.
 *
 * Sees:   what moved, over which connection, which bytes of the stream, and the head of the payload at
 *         each turn. TCP: the socket's own sequence numbers. Unix streams and pipes: bytes are counted
 *         per end, from a common origin: what was sent is what was received plus what is in the queue.
 *         That holds only while nobody is about to move bytes, so the origin is fixed when a connection
 *         is made or, for those that exist already, when the recording begins.
 * Misses: io_uring, sockets used by the kernel itself, kernel TLS's and MPTCP's byte ranges (marked
 *         inexact), the peers of unconnected datagrams. Two threads that write to one stream in the same
 *         instant may have their ranges swapped; a descriptor that another thread closes and reuses
 *         during a call is taken for the new one.
 * Costs:  about eight kernel reads and one hash look-up per message; a payload head is copied once per
 *         turn of a connection.
 */
#ifndef SCOPE_MESSAGES_H
#define SCOPE_MESSAGES_H

#include "state.h"

/*
 * The functions that are not static are so for the verifier: it looks at each of them once, for any
 * arguments, and not again at every place that calls them.
 */
enum endpoint_kind {
	ENDPOINT_OTHER, /* datagrams and protocols without a known position: this end's bytes are counted */
	ENDPOINT_TCP,
	ENDPOINT_UNIX, /* stream */
	ENDPOINT_PIPE,
};

enum {
	/* counters start here, so that a range that began before the first sight does not go below 0 */
	STREAM_ORIGIN = 1 << 30,
	/* so much goes into a queue in one piece, or not at all (PIPE_BUF) */
	UNDIVIDED_BYTES = 4096,
	MAX_QUEUED_BUFFERS = 256,
	MAX_VECTORS = 8,
	MAX_HEADERS = 1024, /* UIO_MAXIOV, the kernel's own limit for sendmmsg and recvmmsg */
};

/* One end of a connection, or both ends of a pipe. The key is the address of the socket or pipe. */
struct endpoint {
	__u64 inode;
	__u64 sent;
	__u64 received;
	__u64 sent_measured_ns; /* when the counter was set from the queue */
	__u64 received_measured_ns;
	__u64 last_send_ns;
	__u64 last_receive_ns;
	__u32 connection;
	__u32 peer_connection;
	__u32 ports;
	__u8 kind;
	__u8 received_last;
	__u8 announced;
	__u8 inexact;
	__u8 met_idle; /* measured while no call moved its bytes, as far as one can tell */
	__u8 reserved[7];
};

struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, ENDPOINTS);
	__type(key, __u64);
	__type(value, struct endpoint);
} endpoints SEC(".maps");

__u32 last_connection = 0;

/* What a descriptor leads to. */
struct target_end {
	__u64 key;
	__u64 inode;
	bool is_pipe;
	__u8 reserved[7];
};

static __always_inline bool resolve_file(void *file, struct target_end *end)
{
	struct inode *inode = READ_FIELD(struct file, file, f_inode);
	__u16 mode = READ_FIELD(struct inode, inode, i_mode) & S_IFMT;
	__u64 private;

	if (mode != S_IFSOCK && mode != S_IFIFO)
		return false;
	private = read_word(file + FIELD_OFFSET(struct file, private_data));
	end->is_pipe = mode == S_IFIFO;
	end->key = end->is_pipe ? private
				: read_word((void *)private + FIELD_OFFSET(struct socket, sk));
	end->inode = READ_FIELD(struct inode, inode, i_ino);
	return end->key;
}

static __always_inline bool resolve(struct task_struct *task, __u32 fd, struct target_end *end)
{
	struct fdtable *table = task->files->fdt;
	void *file;

	if (fd >= table->max_fds)
		return false;
	file = (void *)read_word(table->fd + fd);
	return file && resolve_file(file, end);
}

/* Bytes that wait in a Unix stream socket's queue; false if the queue is too long to walk. */
__noinline int queued_in_socket(__u64 key, __u64 *bytes)
{
	struct sock *sk = (struct sock *)key;
	struct sk_buff *head, *skb;
	__u64 total = 0;
	int i;

	if (!bytes)
		return false;
	head = (struct sk_buff *)((void *)sk + FIELD_OFFSET(struct sock, sk_receive_queue));
	skb = BPF_CORE_READ(sk, sk_receive_queue.next);
	for (i = 0; i < MAX_QUEUED_BUFFERS; i++) {
		__u32 consumed = 0;

		if (skb == head || !skb) {
			*bytes = total;
			return true;
		}
		bpf_probe_read_kernel(&consumed, sizeof(consumed),
				      (void *)skb + FIELD_OFFSET(struct sk_buff, cb) +
					      FIELD_OFFSET(struct unix_skb_parms, consumed));
		total += BPF_CORE_READ(skb, len) - consumed;
		skb = BPF_CORE_READ(skb, next);
	}
	return false;
}

__noinline int queued_in_pipe(__u64 key, __u64 *bytes)
{
	struct pipe_inode_info *pipe = (struct pipe_inode_info *)key;
	__u32 head = BPF_CORE_READ(pipe, head), tail = BPF_CORE_READ(pipe, tail);
	__u32 mask = BPF_CORE_READ(pipe, ring_size) - 1;
	struct pipe_buffer *buffers = BPF_CORE_READ(pipe, bufs);
	__u32 size = bpf_core_type_size(struct pipe_buffer);
	__u64 total = 0;
	int i;

	if (!bytes)
		return false;
	for (i = 0; i < MAX_QUEUED_BUFFERS; i++, tail++) {
		if (tail == head) {
			*bytes = total;
			return true;
		}
		total += BPF_CORE_READ((struct pipe_buffer *)((void *)buffers + (tail & mask) * size), len);
	}
	return false;
}

static __always_inline __u64 unix_peer(__u64 key)
{
	return (__u64)BPF_CORE_READ((struct unix_sock *)key, peer);
}

static __always_inline __u64 socket_inode(struct sock *sk)
{
	return BPF_CORE_READ(sk, sk_socket, file, f_inode, i_ino);
}

static __always_inline __u32 inet_ports(__u64 key)
{
	void *sk = (void *)key;

	/* not skc_num, which a TCP socket loses when both directions are closed: it can still be read */
	return READ_FIELD(struct inet_sock, sk, inet_sport) |
	       (__u32)READ_FIELD(struct sock, sk, __sk_common.skc_dport) << 16;
}

/*
 * Whether an entry of another inode is still that of the end: it was made while the socket was not
 * accepted and had no inode. Else it is of a freed socket at the same address.
 */
__noinline int accepted_meanwhile(struct target_end *end, struct endpoint *known)
{
	struct endpoint *peer;
	__u64 peer_key;

	if (!end || !known || known->inode || end->is_pipe)
		return false;
	peer_key = unix_peer(end->key);
	peer = bpf_map_lookup_elem(&endpoints, &peer_key);
	if (!peer || peer->connection != known->peer_connection ||
	    peer->peer_connection != known->connection ||
	    peer->inode != socket_inode((struct sock *)peer_key))
		return false;
	known->inode = end->inode;
	return true;
}

static __always_inline bool is_current(struct target_end *end, struct endpoint *known)
{
	if (known->inode != end->inode && !accepted_meanwhile(end, known))
		return false;
	return !known->ports || known->ports == inet_ports(end->key);
}

/* Measures a new end of a Unix stream, and its peer if that is not known: into *other. */
static __always_inline void measure_unix(__u64 key, struct endpoint *fresh, __u64 peer_key,
					 struct endpoint *other)
{
	__u64 incoming = 0, outgoing = 0, inode = socket_inode((struct sock *)peer_key);
	struct endpoint *peer;

	if (!peer_key || !queued_in_socket(key, &incoming) || !queued_in_socket(peer_key, &outgoing)) {
		fresh->inexact = 1;
		return;
	}
	peer = bpf_map_lookup_elem(&endpoints, &peer_key);
	if (peer && (!inode || peer->inode != inode)) {
		/* a new connection at an old address */
		bpf_map_delete_elem(&endpoints, &peer_key);
		peer = NULL;
	}
	if (peer) {
		fresh->sent = peer->received + outgoing;
		fresh->received = peer->sent - incoming;
		fresh->peer_connection = peer->connection;
		return;
	}
	fresh->sent += outgoing;
	*other = *fresh;
	other->inode = inode;
	other->sent = STREAM_ORIGIN + incoming;
	other->connection = __sync_fetch_and_add(&last_connection, 1) + 1;
	other->peer_connection = fresh->connection;
	fresh->peer_connection = other->connection;
}

/* Tells both ends of a Unix stream of each other, whoever made their entries. */
static __always_inline void link_unix(struct endpoint *end, __u64 peer_key, struct endpoint *other)
{
	struct endpoint *peer;

	if (other->connection)
		bpf_map_update_elem(&endpoints, &peer_key, other, BPF_NOEXIST);
	peer = bpf_map_lookup_elem(&endpoints, &peer_key);
	if (!peer)
		return;
	peer->peer_connection = end->connection;
	end->peer_connection = peer->connection;
}

/*
 * Makes an end known and fixes where its bytes are counted from; for a Unix stream the other end, too.
 * Returns whether it was this call that did so.
 */
__noinline int meet(struct target_end *end, bool idle)
{
	struct endpoint fresh = {}, other = {}, *found;
	__u64 key, queued, peer_key = 0;
	__u16 family, type;
	struct sock *sk;

	if (!end)
		return false;
	key = end->key;
	sk = (struct sock *)key;
	found = bpf_map_lookup_elem(&endpoints, &key);
	if (found && is_current(end, found))
		return false;
	if (found)
		bpf_map_delete_elem(&endpoints, &key);
	fresh.inode = end->inode;
	fresh.sent = fresh.received = STREAM_ORIGIN;
	fresh.met_idle = idle;
	fresh.connection = __sync_fetch_and_add(&last_connection, 1) + 1;
	fresh.sent_measured_ns = fresh.received_measured_ns = bpf_ktime_get_ns();
	if (end->is_pipe) {
		fresh.kind = ENDPOINT_PIPE;
		if (queued_in_pipe(key, &queued))
			fresh.sent += queued;
		else
			fresh.inexact = 1;
	} else {
		family = BPF_CORE_READ(sk, __sk_common.skc_family);
		type = BPF_CORE_READ(sk, sk_socket, type);
		if (family == AF_INET || family == AF_INET6) {
			fresh.ports = inet_ports(key);
			if (type == SOCK_STREAM && BPF_CORE_READ(sk, sk_protocol) == IPPROTO_TCP)
				fresh.kind = ENDPOINT_TCP;
		} else if (family == AF_UNIX && type == SOCK_STREAM) {
			fresh.kind = ENDPOINT_UNIX;
			peer_key = unix_peer(key);
			measure_unix(key, &fresh, peer_key, &other);
		}
		if (fresh.kind == ENDPOINT_OTHER)
			fresh.inexact = 1;
	}
	/* another CPU may have been quicker: then its entry counts */
	if (bpf_map_update_elem(&endpoints, &key, &fresh, BPF_NOEXIST))
		return false;
	found = bpf_map_lookup_elem(&endpoints, &key);
	if (found && peer_key)
		link_unix(found, peer_key, &other);
	return true;
}

/* Whether an end's bytes have to be counted, since the kernel does not. */
static __always_inline bool counts_bytes(struct target_end *end)
{
	struct sock *sk = (struct sock *)end->key;

	return end->is_pipe || (BPF_CORE_READ(sk, __sk_common.skc_family) == AF_UNIX &&
				BPF_CORE_READ(sk, sk_socket, type) == SOCK_STREAM);
}

/* Sets the counter of one direction from the other end's and the queue, after a call. */
__noinline int measure_again(__u64 key, struct endpoint *end, bool receive, __u32 length)
{
	__u64 peer_key = key, queue = key, queued = 0, before, after;
	struct endpoint *peer = end;

	if (!end)
		return 0;
	if (end->kind == ENDPOINT_UNIX) {
		peer_key = unix_peer(key);
		peer = bpf_map_lookup_elem(&endpoints, &peer_key);
		if (!receive)
			queue = peer_key;
	}
	if (!peer || !(end->kind == ENDPOINT_UNIX ? queued_in_socket(queue, &queued)
						  : queued_in_pipe(queue, &queued))) {
		end->inexact = 1;
		return 0;
	}
	if (receive) {
		end->received_measured_ns = bpf_ktime_get_ns();
		end->received = peer->sent - queued;
		return 0;
	}
	before = end->sent;
	after = peer->received + queued;
	/* A part of it was counted when the recording began, and a receive may be under way now: how
	 * large each is cannot be told. */
	if (end->met_idle && before + length != after)
		end->inexact = 1;
	end->sent_measured_ns = bpf_ktime_get_ns();
	end->sent = after;
	return 0;
}

static __always_inline void read_unix_path(struct sock *sk, char *path)
{
	struct unix_address *address = BPF_CORE_READ((struct unix_sock *)sk, addr);
	int length = BPF_CORE_READ(address, len) - 2;

	if (length <= 0 || length >= PATH_BYTES)
		return;
	bpf_probe_read_kernel(path, length,
			      (void *)address + FIELD_OFFSET(struct unix_address, name) + 2);
}

/* Tells user space what a connection is. Tried again at the next message if there is no room. */
__noinline int announce(struct cpu_state *cpu, struct target_end *end, struct endpoint *known)
{
	struct connection *connection;
	struct sock *sk;
	__u64 index;

	if (!cpu || !end || !known)
		return 0;
	sk = (struct sock *)end->key;
	connection = wide_reserve(cpu, &index, 0);
	if (!connection)
		return 0;
	__builtin_memset((void *)connection + sizeof(__u32), 0, sizeof(*connection) - sizeof(__u32));
	connection->kind = RECORD_CONNECTION;
	connection->time_ns = bpf_ktime_get_ns();
	connection->connection = known->connection;
	connection->peer = known->peer_connection;
	connection->tgid = bpf_get_current_pid_tgid() >> 32;
	connection->inode = end->inode;
	if (!end->is_pipe) {
		connection->family = READ_FIELD(struct sock, sk, __sk_common.skc_family);
		connection->type = BPF_CORE_READ(sk, sk_socket, type);
		connection->protocol = READ_FIELD(struct sock, sk, sk_protocol);
		connection->netns = BPF_CORE_READ(sk, __sk_common.skc_net.net, ns.inum);
		if (connection->family == AF_INET || connection->family == AF_INET6) {
			connection->local_port =
				__builtin_bswap16(READ_FIELD(struct inet_sock, sk, inet_sport));
			connection->remote_port =
				__builtin_bswap16(READ_FIELD(struct sock, sk, __sk_common.skc_dport));
		}
		if (connection->family == AF_INET) {
			*(__u32 *)connection->local_address =
				READ_FIELD(struct sock, sk, __sk_common.skc_rcv_saddr);
			*(__u32 *)connection->remote_address =
				READ_FIELD(struct sock, sk, __sk_common.skc_daddr);
		} else if (connection->family == AF_INET6) {
			BPF_CORE_READ_INTO((struct in6_addr *)connection->local_address, sk,
					   __sk_common.skc_v6_rcv_saddr);
			BPF_CORE_READ_INTO((struct in6_addr *)connection->remote_address, sk,
					   __sk_common.skc_v6_daddr);
		} else if (connection->family == AF_UNIX) {
			struct sock *peer = (struct sock *)unix_peer(end->key);

			read_unix_path(sk, connection->local_path);
			if (peer) {
				connection->peer_inode = socket_inode(peer);
				read_unix_path(peer, connection->remote_path);
			}
		}
	}
	commit(&connection->sequence, index);
	known->announced = 1;
	return 0;
}

/*
 * Where the pieces of a payload are put together, per CPU: two payload_limits long (set by user space),
 * so that the verifier can see that no piece runs over the end.
 */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__uint(key_size, sizeof(__u32));
	__uint(value_size, 64);
} gathered SEC(".maps");

/* Copies the head of what moved behind the header of a wide slot; returns how many bytes. */
static __always_inline __u32 copy_buffer(struct payload *payload, __u64 base, __u32 length)
{
	if (length > payload_limit)
		length = payload_limit;
	/* not in memory now: nothing is copied, and the record says so */
	return bpf_probe_read_user(payload + 1, length, (void *)base) ? 0 : length;
}

/* Likewise from up to MAX_VECTORS pieces. */
static __always_inline __u32 copy_vectors(struct payload *payload, __u64 vectors, __u64 count, __u32 length)
{
	__u32 copied = 0, part, i, cpu = bpf_get_smp_processor_id();
	char *bytes = bpf_map_lookup_elem(&gathered, &cpu);
	struct user_iovec piece;

	if (!bytes)
		return 0;
	if (length > payload_limit)
		length = payload_limit;
	for (i = 0; i < MAX_VECTORS && i < count && copied < length; i++) {
		if (copied >= payload_limit ||
		    bpf_probe_read_user(&piece, sizeof(piece), (void *)(vectors + i * sizeof(piece))))
			break;
		part = piece.length < payload_limit ? piece.length : payload_limit;
		if (bpf_probe_read_user(bytes + copied, part, (void *)piece.base))
			break; /* what is copied so far is right */
		copied += part;
	}
	if (copied > length)
		copied = length;
	if (copied > payload_limit)
		copied = payload_limit;
	return bpf_probe_read_kernel(payload + 1, copied, bytes) ? 0 : copied;
}

/* Where the bytes of a call lie, from its arguments. */
static __always_inline void find_payload(struct flight *flight, __u8 shape, __u64 *vectors, __u64 *count,
					 __u64 *base)
{
	struct user_msghdr header = {};

	*vectors = *count = *base = 0;
	if (shape == MESSAGE_BUFFER) {
		*base = flight->arg1;
	} else if (shape == MESSAGE_VECTOR) {
		*vectors = flight->arg1;
		*count = flight->arg2;
	} else if (shape == MESSAGE_HEADER || shape == MESSAGE_HEADERS) {
		/* the first message of several; both layouts begin with the msghdr */
		if (!bpf_probe_read_user(&header, sizeof(header), (void *)flight->arg1)) {
			*vectors = header.iov;
			*count = header.iov_count;
		}
	}
}

__noinline int write_payload(struct cpu_state *cpu, __u64 hot_index, __u32 length, __u8 shape)
{
	__u64 vectors, count, base, index;
	struct payload *payload;

	if (!cpu)
		return false;
	find_payload(&cpu->flight, shape, &vectors, &count, &base);
	if (!vectors && !base)
		return false; /* sendfile and splice: the bytes were never in the process's memory */
	payload = wide_reserve(cpu, &index, wide_slots / 8);
	if (!payload) {
		count_loss(cpu, LOSS_PAYLOADS);
		return false;
	}
	payload->kind = RECORD_PAYLOAD;
	payload->flags = 0;
	payload->hot_index = hot_index;
	payload->length_bytes = base ? copy_buffer(payload, base, length)
				     : copy_vectors(payload, vectors, count, length);
	commit(&payload->sequence, index);
	return true;
}

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

	if (known->kind == ENDPOINT_TCP) {
		if (receive)
			return (__u32)(tcp_received(end->key) + (peek ? length : 0));
		return READ_FIELD(struct tcp_sock, (void *)end->key, write_seq);
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
		return __sync_fetch_and_add(&known->received, length) + length;
	return __sync_fetch_and_add(&known->sent, length) + length;
}

static __always_inline bool starts_turn(struct endpoint *known, bool receive, __u64 start_ns)
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
	return turn;
}

enum {
	ALSO_CALL = 1 << 8, /* in write_end's `flags`: let the record be the row of syscalls, too */
};

/*
 * One row of messages for one descriptor of the call in flight. Returns whether a record was written or
 * counted as lost.
 */
__noinline int write_end(struct cpu_state *cpu, __u32 fd, __u32 length, __u64 duration_ns,
				 __u32 flags_and_class)
{
	struct task_struct *task = bpf_get_current_task_btf();
	bool receive = flags_and_class & FLAG_RECEIVE, fresh = false;
	__u8 shape = flags_and_class >> 16;
	struct target_end end;
	struct message *message;
	struct endpoint *known;
	__u64 index, stream_end, start_ns;
	__u8 flags = flags_and_class;

	if (!cpu || !resolve(task, fd, &end))
		return false;
	known = bpf_map_lookup_elem(&endpoints, &end.key);
	if (!known || !is_current(&end, known)) {
		fresh = meet(&end, false);
		known = bpf_map_lookup_elem(&endpoints, &end.key);
		if (!known) {
			count_loss(cpu, LOSS_MESSAGES);
			if (flags_and_class & ALSO_CALL)
				count_loss(cpu, LOSS_SYSCALLS);
			return true;
		}
	}
	start_ns = cpu->flight.start_ns;
	stream_end = advance(&end, known, fresh, receive, flags & FLAG_PEEK, length, start_ns);
	if (!known->announced)
		announce(cpu, &end, known);
	if (known->inexact)
		flags |= FLAG_INEXACT;
	if (!(flags & FLAG_PEEK) && starts_turn(known, receive, start_ns))
		flags |= FLAG_TURN;
	message = hot_reserve(cpu, &index);
	if (!message) {
		count_loss(cpu, LOSS_MESSAGES);
		if (flags_and_class & ALSO_CALL)
			count_loss(cpu, LOSS_SYSCALLS);
		return true;
	}
	if ((flags & FLAG_TURN) && payload_limit && length && write_payload(cpu, index, length, shape))
		flags |= FLAG_PAYLOAD;
	message->number = cpu->flight.number;
	message->kind = flags_and_class & ALSO_CALL ? RECORD_MESSAGE_CALL : RECORD_MESSAGE;
	message->flags = flags;
	message->start_ns = start_ns;
	message->duration_ns = duration_ns;
	message->tgid = cpu->tgid;
	message->tid = cpu->tid;
	message->arg1 = cpu->flight.arg1;
	message->stream_end = stream_end;
	message->length_bytes = length;
	message->connection = known->connection;
	message->fd = fd;
	message->arg2 = cpu->flight.arg2;
	commit(&message->sequence, index);
	return true;
}

/* Bytes of all messages of a sendmmsg or recvmmsg. */
__noinline int sum_headers(__u64 headers, __u32 count)
{
	__u32 length, total = 0, i;

	for (i = 0; i < MAX_HEADERS && i < count; i++) {
		length = 0;
		bpf_probe_read_user(&length, sizeof(length),
				    (void *)(headers + i * sizeof(struct user_mmsghdr) +
					     __builtin_offsetof(struct user_mmsghdr, length)));
		total += length;
	}
	return total;
}

/* Meets what a call made, before anything can move over it. */
__noinline int meet_new(struct cpu_state *cpu, __u32 class, __u32 result, __u64 fourth)
{
	struct task_struct *task = bpf_get_current_task_btf();
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

	if (index >= sizeof(message_classes))
		return MESSAGE_NONE;
	/* hides the comparison from the compiler, which would drop the mask that the verifier needs */
	asm volatile("" : "+r"(index));
	return message_classes[index & (sizeof(message_classes) - 1)];
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
	__u32 length = result, message_flags = 0;
	__u64 arg3;

	if (!class || result < 0)
		return false;
	/* the compiler would merge this load with one of `flight`; the verifier wants them apart */
	arg3 = SYSCALL_ARG3(regs);
	asm volatile("" : "+r"(arg3));
	if (class >= MESSAGE_BIRTH_RESULT) {
		meet_new(cpu, class, result, arg3);
		return false;
	}
	if (shape == MESSAGE_SPLICE) {
		write_end(cpu, flight->arg0, length, duration_ns, flags | FLAG_RECEIVE);
		write_end(cpu, flight->arg2, length, duration_ns, flags);
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
	if (record_syscalls && length == result && !(flight->arg0 >> 32) && !(flight->arg2 >> 32))
		flags |= ALSO_CALL;
	return write_end(cpu, flight->arg0, length, duration_ns, flags) && flags & ALSO_CALL;
}

/* Meets what recorded processes have open, so that it is known before their next call. */
SEC("iter/task_file")
int on_list_files(struct bpf_iter__task_file *ctx)
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
