// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/*
 * Programs that do nothing, to find out what the kernel lets be attached: see loaders/extras.py. Opening an
 * inet6 socket's ioctl is rare, so that trying disturbs nobody.
 */
#pragma clang diagnostic ignored "-Wunused-parameter"

#include "kernel.h"

SEC("fentry/inet6_ioctl")
int BPF_PROG(try_fentry)
{
	return 0;
}

SEC("fexit/inet6_ioctl")
int BPF_PROG(try_fexit)
{
	return 0;
}

SEC("kprobe/inet6_ioctl")
int try_kprobe(struct pt_regs *ctx)
{
	return 0;
}

SEC("kretprobe/inet6_ioctl")
int try_kretprobe(struct pt_regs *ctx)
{
	return 0;
}

SEC("tp_btf/sock_send_length")
int BPF_PROG(try_tracepoint)
{
	return 0;
}

char LICENSE[] SEC("license") = "Dual BSD/GPL";
