/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Connects: calls of connect() by recorded threads, from the exit of the system call.
 *
 * Sees:   every call on an internet or Unix socket that returned, with the address that the program
 *         passed: of a connection that was refused nothing else remains.
 * Misses: io_uring, 32-bit calls, sendto() and TCP Fast Open that connect by themselves, calls on what is
 *         no such socket (they are in syscalls), an address that is not in memory any more. What becomes
 *         of a connection in progress (EINPROGRESS) is not told here: the program learns it later, from
 *         SO_ERROR, another connect() or its first message.
 * Costs:  nothing for other calls; one wide slot and a dozen kernel reads per connect().
 */
#ifndef SCOPE_CONNECTS_H
#define SCOPE_CONNECTS_H

#include "endpoints.h"
#include "state.h"

enum {
	PATH_MASK = 127, /* for the verifier: what follows remote_path in the slot has room for the rest */
};

/* What user space passed, by its own length: a path need not end in zero, and may fill the array. */
static __always_inline void read_remote(struct connect *connect, __u64 address, __u32 length)
{
	struct user_sockaddr_in6 six = {};
	struct user_sockaddr_in four = {};
	__u16 family = 0;

	if (length < sizeof(family) || bpf_probe_read_user(&family, sizeof(family), (void *)address))
		return;
	if (family == AF_INET && length >= sizeof(four)) {
		if (bpf_probe_read_user(&four, sizeof(four), (void *)address))
			return;
		connect->remote_port = __builtin_bswap16(four.port);
		__builtin_memcpy(connect->remote_address, four.address, sizeof(four.address));
	} else if (family == AF_INET6 && length >= sizeof(six)) {
		if (bpf_probe_read_user(&six, sizeof(six), (void *)address))
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
		if (bpf_probe_read_user(connect->remote_path, length, (void *)(address + sizeof(family))))
			return;
	} else {
		return; /* AF_UNSPEC: it disconnects */
	}
	connect->remote_family = family;
}

/* A row of connects for the call in flight. */
__noinline int write_connect(OF_CPU __s32 result, __u64 duration_ns, __u32 status)
{
	FIND_CPU();
	struct task_struct *task = CURRENT_TASK();
	struct connect *connect;
	struct target_end end;
	struct sock *sk;
	__u16 family;
	__u64 index;

	if (!cpu || !resolve(task, cpu->flight.arg0, &end) || end.is_pipe)
		return 0;
	sk = (struct sock *)end.key;
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
	connect->start_ns = cpu->flight.start_ns;
	connect->duration_ns = duration_ns;
	connect->tgid = cpu->tgid;
	connect->tid = cpu->tid;
	connect->fd = cpu->flight.arg0;
	connect->result = result;
	connect->inode = end.inode;
	connect->family = family;
	connect->type = BPF_CORE_READ(sk, sk_socket, type);
	connect->protocol = READ_FIELD(struct sock, sk, sk_protocol);
	read_remote(connect, cpu->flight.arg1, cpu->flight.arg2);
	commit(&connect->sequence, index);
	return 0;
}

#endif
