/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Endpoints: which socket or pipe a descriptor leads to, and where its bytes are counted from.
 *
 * TCP has sequence numbers. For Unix streams and pipes bytes are counted per end, from a common origin:
 * what was sent is what was received plus what is in the queue. That holds only while nobody is about to
 * move bytes, so the origin is fixed when a connection is made or, for those that exist already, when the
 * recording begins.
 *
 * Sees:   sockets and pipes by the address of the kernel's object, told apart from a later one at the same
 *         address by the inode and, for internet sockets, the ports.
 * Misses: a descriptor that another thread closes and reuses during a call is taken for the new one; of
 *         more than ENDPOINTS at once the least recently used one is forgotten, and met anew.
 * Costs:  five loads and a hash look-up per message; a few dozen kernel reads at the first sight.
 */
#ifndef SCOPE_ENDPOINTS_H
#define SCOPE_ENDPOINTS_H

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
};

#define QUEUE_TOO_LONG 0xffffffffffffffffULL

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
	__u8 announced; /* in which telling */
	__u8 inexact;
	__u8 met_idle; /* measured while no call moved its bytes, as far as one can tell */
	__u8 sent_prefix; /* the last send was short, as a length that announces what follows is */
	__u8 received_prefix;
	__u8 reserved[5];
};

/* In `announced`; 0 is none. */
#define THIS_TELLING ((__u8)((tellings & 127) + 1))

struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, ENDPOINTS);
	__type(key, __u64);
	__type(value, struct endpoint);
} endpoints SEC(".maps");

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
	struct fdtable *table = FIELD_OF(task, files, fdt);
	void *file;

	if (fd >= FIELD(table, max_fds))
		return false;
	file = (void *)read_word(FIELD(table, fd) + fd);
	return file && resolve_file(file, end);
}

/* Bytes that wait in a Unix stream socket's queue; QUEUE_TOO_LONG if it is too long to walk. */
__noinline __u64 queued_in_socket(__u64 key)
{
	struct sock *sk = (struct sock *)key;
	struct sk_buff *head, *skb;
	__u64 total = 0, i;

	head = (struct sk_buff *)((void *)sk + FIELD_OFFSET(struct sock, sk_receive_queue));
	skb = BPF_CORE_READ(sk, sk_receive_queue.next);
	for (i = 0; i < MAX_QUEUED_BUFFERS; i++) {
		__u32 consumed = 0;

		KEEP_COUNT(i);
		if (skb == head || !skb)
			return FORGET_BOUNDS(total);
		bpf_probe_read_kernel(&consumed, sizeof(consumed),
				      (void *)skb + FIELD_OFFSET(struct sk_buff, cb) +
					      FIELD_OFFSET(struct unix_skb_parms, consumed));
		total += BPF_CORE_READ(skb, len) - consumed;
		skb = BPF_CORE_READ(skb, next);
	}
	return QUEUE_TOO_LONG;
}

__noinline __u64 queued_in_pipe(__u64 key)
{
	struct pipe_inode_info *pipe = (struct pipe_inode_info *)key;
	__u32 head = BPF_CORE_READ(pipe, head), tail = BPF_CORE_READ(pipe, tail);
	__u32 mask = BPF_CORE_READ(pipe, ring_size) - 1;
	struct pipe_buffer *buffers = BPF_CORE_READ(pipe, bufs);
	__u32 size = bpf_core_type_size(struct pipe_buffer);
	__u64 total = 0, i;

	for (i = 0; i < MAX_QUEUED_BUFFERS; i++, tail++) {
		KEEP_COUNT(i);
		if (tail == head)
			return FORGET_BOUNDS(total);
		total += BPF_CORE_READ((struct pipe_buffer *)((void *)buffers + (tail & mask) * size), len);
	}
	return QUEUE_TOO_LONG;
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
GLOBAL int accepted_meanwhile(struct target_end *end, struct endpoint *known)
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
	__u64 incoming = QUEUE_TOO_LONG, outgoing = QUEUE_TOO_LONG;
	__u64 inode = socket_inode((struct sock *)peer_key);
	struct endpoint *peer;

	if (peer_key) {
		incoming = queued_in_socket(key);
		outgoing = queued_in_socket(peer_key);
	}
	if (incoming == QUEUE_TOO_LONG || outgoing == QUEUE_TOO_LONG) {
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
	other->connection = new_connection_number();
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
GLOBAL int meet(struct target_end *end, bool idle)
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
	fresh.connection = new_connection_number();
	fresh.sent_measured_ns = fresh.received_measured_ns = bpf_ktime_get_ns();
	if (end->is_pipe) {
		fresh.kind = ENDPOINT_PIPE;
		queued = queued_in_pipe(key);
		if (queued != QUEUE_TOO_LONG)
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
GLOBAL int measure_again(__u64 key, struct endpoint *end, bool receive, __u32 length)
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
	if (peer)
		queued = end->kind == ENDPOINT_UNIX ? queued_in_socket(queue) : queued_in_pipe(queue);
	if (!peer || queued == QUEUE_TOO_LONG) {
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
	__u64 length = BPF_CORE_READ(address, len) - 2;

	if (length - 1 >= PATH_BYTES - 1)
		return;
	/* hides the comparison from the compiler, as in class_of(); the slot has room for the mask's bytes */
	asm volatile("" : "+r"(length));
	length &= 127;
	bpf_probe_read_kernel(path, length,
			      (void *)address + FIELD_OFFSET(struct unix_address, name) + 2);
}

/* Tells user space what a connection is. Tried again at the next message if there is no room. */
GLOBAL int announce(struct cpu_state *cpu, struct target_end *end, struct endpoint *known)
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
	known->announced = THIS_TELLING;
	return 0;
}

#endif
