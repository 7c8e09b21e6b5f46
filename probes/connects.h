/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Connects: calls of connect() by recorded threads, from the exit of the system call.
 *
 * Sees:   every call on an internet or Unix socket that returned, with the address that the program
 *         passed: of a connection that was refused nothing else remains.
 * Misses: io_uring (but see sockets.h), 32-bit calls, sendto() and TCP Fast Open that connect by themselves,
 *         calls on what is no such socket (they are in syscalls), an address that is not in memory any more.
 *         What becomes of a connection in progress (EINPROGRESS) is not told here: the program learns it
 *         later, from SO_ERROR, another connect() or its first message.
 * Costs:  nothing for other calls; one wide slot and a dozen kernel reads per connect().
 */
#ifndef SCOPE_CONNECTS_H
#define SCOPE_CONNECTS_H

#include "endpoints.h"
#include "state.h"

enum {
	PATH_MASK = 127, /* for the verifier: what follows remote_path in the slot has room for the rest */
};

/* Whose a row is: of the call in flight, or what stands for one (sockets.h). */
struct mover {
	const struct flight *flight;
	struct transfer *transfer; /* NULL: it is the call in flight */
	__u32 tgid;
	__u32 tid;
	__u32 fd;
	__u32 reserved;
};

#define READ_REMOTE(to, length, address) \
	(in_kernel ? bpf_probe_read_kernel(to, length, address) : bpf_probe_read_user(to, length, address))

/* What user space passed, by its own length: a path need not end in zero, and may fill the array. */
static __always_inline void read_remote(struct connect *connect, __u64 address, __u32 length,
					bool in_kernel)
{
	struct user_sockaddr_in6 six = {};
	struct user_sockaddr_in four = {};
	__u16 family = 0;

	if (length < sizeof(family) || READ_REMOTE(&family, sizeof(family), (void *)address))
		return;
	if (family == AF_INET && length >= sizeof(four)) {
		if (READ_REMOTE(&four, sizeof(four), (void *)address))
			return;
		connect->remote_port = __builtin_bswap16(four.port);
		__builtin_memcpy(connect->remote_address, four.address, sizeof(four.address));
	} else if (family == AF_INET6 && length >= sizeof(six)) {
		if (READ_REMOTE(&six, sizeof(six), (void *)address))
			return;
		connect->remote_port = __builtin_bswap16(six.port);
		__builtin_memcpy(connect->remote_address, six.address, sizeof(six.address));
	} else if (family == AF_UNIX) {
		length -= sizeof(family);
		if (length > sizeof(((struct sockaddr_un *)0)->sun_path))
			return; /* longer than the kernel takes */
		/* hides the comparison from the compiler, as in class_of() */
		asm volatile("" : "+r"(length));
		length &= PATH_MASK;
		if (READ_REMOTE(connect->remote_path, length, (void *)(address + sizeof(family))))
			return;
	} else {
		return; /* AF_UNSPEC: it disconnects */
	}
	connect->remote_family = family;
}

#undef READ_REMOTE

/* A row of connects for one end; `flight` has where the address is as arg1, and its length as arg2. */
static __always_inline int write_connected(struct cpu_state *cpu, struct target_end *end,
					   const struct mover *mover, __s32 result, __u64 duration_ns,
					   __u32 status)
{
	struct sock *sk = (struct sock *)end->key;
	struct connect *connect;
	__u16 family;
	__u64 index;

	family = READ_FIELD(struct sock, sk, __sk_common.skc_family);
	if (family != AF_INET && family != AF_INET6 && family != AF_UNIX)
		return 0;
	connect = wide_reserve(cpu, &index, 0);
	if (!connect) {
		count_loss(cpu, LOSS_CONNECTS);
		return 0;
	}
	__builtin_memset((void *)connect + sizeof(__u32), 0, sizeof(*connect) - sizeof(__u32));
	connect->kind = RECORD_CONNECT;
	connect->flags = status;
	connect->start_ns = mover->flight->start_ns;
	connect->duration_ns = duration_ns;
	connect->tgid = mover->tgid;
	connect->tid = mover->tid;
	connect->fd = mover->fd;
	connect->result = result;
	connect->inode = end->inode;
	connect->family = family;
	connect->type = BPF_CORE_READ(sk, sk_socket, type);
	connect->protocol = READ_FIELD(struct sock, sk, sk_protocol);
	read_remote(connect, mover->flight->arg1, mover->flight->arg2, mover->transfer != NULL);
	commit(&connect->sequence, index);
	return 0;
}

/* The same for the call in flight. */
__noinline int write_connect(OF_CPU __s32 result, __u64 duration_ns, __u32 status)
{
	FIND_CPU();
	struct task_struct *task = CURRENT_TASK();
	struct mover mover = {};
	struct target_end end;

	if (!cpu || !resolve(task, cpu->flight.arg0, &end) || end.is_pipe)
		return 0;
	mover.flight = &cpu->flight;
	mover.tgid = cpu->tgid;
	mover.tid = cpu->tid;
	mover.fd = cpu->flight.arg0;
	return write_connected(cpu, &end, &mover, result, duration_ns, status);
}

#endif
