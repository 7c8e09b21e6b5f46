// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/*
 * The least that a tracer of system calls can cost: a program at each end that does nothing.
 *
 * Sees and misses everything. Costs the kernel's slow path for traced calls, and two program entries.
 */
#include "kernel.h"

SEC("tp_btf/sys_enter")
int empty_enter(void *context)
{
	return 0;
}

SEC("tp_btf/sys_exit")
int empty_exit(void *context)
{
	return 0;
}

char LICENSE[] SEC("license") = "Dual BSD/GPL";
