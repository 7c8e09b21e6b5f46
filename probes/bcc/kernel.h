/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * The kernel's types for BCC: from the headers of the running kernel, in place of ../kernel.h's own.
 *
 * The probes have one source for both loaders. A second one would be shorter for processes and system
 * calls, but the rows of messages are the same only if endpoints.h counts bytes in the same way, and that
 * is most of the code. BCC gives no type information to the verifier, so each field is read by a helper; it
 * knows no functions that are not inlined, and has maps and programs of its own form, into which
 * loaders/bcc_source.py brings the text. What it cannot have (task storage, iterators) is left out where
 * SCOPE_BCC is asked for.
 */
#ifndef SCOPE_BCC_KERNEL_H
#define SCOPE_BCC_KERNEL_H

#include <linux/sched.h>
#include <linux/sched/signal.h>
#include <linux/mm_types.h>
#include <linux/fs.h>
#include <linux/fdtable.h>
#include <linux/pipe_fs_i.h>
#include <linux/cgroup-defs.h>
#include <linux/kernfs.h>
#include <linux/skbuff.h>
#include <linux/net.h>
#include <linux/tcp.h>
#include <linux/version.h>
#include <net/sock.h>
#include <net/inet_sock.h>
#include <net/af_unix.h>
#include <net/net_namespace.h>

/* An enumerator of state.h; the kernel's macro has the same value. */
#undef TASK_RUNNING
/* Names that the kernel has for something else. */
#undef unix_peer
#define user_msghdr scope_msghdr
#define user_mmsghdr scope_mmsghdr
/* Not in headers that programs may include, or a macro in some versions. */
#ifndef SIGNAL_GROUP_EXIT
#define SIGNAL_GROUP_EXIT 4
#endif
#if LINUX_VERSION_CODE >= KERNEL_VERSION(6, 15, 0) /* commit 84960bf24031 */
struct unix_skb_parms {
	struct pid *pid;
	kuid_t uid;
	kgid_t gid;
	struct scm_fp_list *fp;
#ifdef CONFIG_SECURITY_NETWORK
	__u32 secid;
#endif
	__u32 consumed;
};
#endif

#define CACHE_LINE 64
#define GLOBAL static __always_inline
#define CURRENT_TASK() ((struct task_struct *)bpf_get_current_task())
#define RAW_ARGUMENT(context, number) ((context)->args[number])

#define READ_1(pointer, field)                                                    \
	({                                                                        \
		typeof((pointer)->field) value_;                                  \
		bpf_probe_read_kernel(&value_, sizeof(value_), &(pointer)->field); \
		value_;                                                           \
	})
#define READ_2(pointer, a, b) READ_1(READ_1(pointer, a), b)
#define READ_3(pointer, a, b, c) READ_1(READ_2(pointer, a, b), c)
#define READ_4(pointer, a, b, c, d) READ_1(READ_3(pointer, a, b, c), d)
#define READ_NTH(a, b, c, d, name, ...) name
#define BPF_CORE_READ(pointer, fields...) \
	READ_NTH(fields, READ_4, READ_3, READ_2, READ_1)(pointer, fields)
#define BPF_CORE_READ_INTO(to, pointer, field) \
	bpf_probe_read_kernel(to, sizeof(*(to)), &(pointer)->field)
#define ARG_FIELD(pointer, fields...) BPF_CORE_READ(pointer, fields)
#define FIELD(pointer, field) READ_1(pointer, field)
#define FIELD_OF(pointer, first, second) READ_2(pointer, first, second)
#define READ_FIELD(type, address, field) READ_1((type *)(address), field)
#define FIELD_OFFSET(type, field) __builtin_offsetof(type, field)
#define bpf_core_type_size(type) sizeof(type)

#if defined(CONFIG_X86)
#define __TARGET_ARCH_x86
#define SYSCALL_NUMBER(regs) ((long)READ_1(regs, orig_ax))
#define SYSCALL_ARG0(regs) READ_1(regs, di)
#define SYSCALL_ARG1(regs) READ_1(regs, si)
#define SYSCALL_ARG2(regs) READ_1(regs, dx)
#define SYSCALL_ARG3(regs) READ_1(regs, r10)
#define COMPAT_ARG0(regs) ((__u32)READ_1(regs, bx))
#define COMPAT_ARG1(regs) ((__u32)READ_1(regs, cx))
#define COMPAT_ARG2(regs) ((__u32)READ_1(regs, dx))
#elif defined(CONFIG_ARM64)
#define __TARGET_ARCH_arm64
#define SYSCALL_NUMBER(regs) ((long)READ_1(regs, syscallno))
#define SYSCALL_ARG0(regs) READ_1(regs, orig_x0)
#define SYSCALL_ARG1(regs) READ_1(regs, regs[1])
#define SYSCALL_ARG2(regs) READ_1(regs, regs[2])
#define SYSCALL_ARG3(regs) READ_1(regs, regs[3])
#define COMPAT_ARG0(regs) ((__u32)READ_1(regs, orig_x0))
#define COMPAT_ARG1(regs) ((__u32)READ_1(regs, regs[1]))
#define COMPAT_ARG2(regs) ((__u32)READ_1(regs, regs[2]))
#define TIF_32BIT_MASK (1UL << 22)
#else
#error "scope-ebpf: no register names for this architecture; add them above"
#endif

static __always_inline __u64 read_word(const void *address)
{
	__u64 word = 0;

	bpf_probe_read_kernel(&word, sizeof(word), address);
	return word;
}

static __always_inline __u32 task_state(struct task_struct *task)
{
#if LINUX_VERSION_CODE >= KERNEL_VERSION(5, 14, 0)
	return READ_1(task, __state);
#else
	return READ_1(task, state);
#endif
}

static __always_inline bool task_is_compat(__u64 task)
{
#if defined(CONFIG_X86)
	return READ_1((struct task_struct *)task, thread_info.status) & TS_COMPAT;
#else
	return READ_1((struct task_struct *)task, thread_info.flags) & TIF_32BIT_MASK;
#endif
}

#endif
