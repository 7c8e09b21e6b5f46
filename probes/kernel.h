/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * The few kernel types that the probes read, instead of a generated vmlinux.h.
 *
 * Each struct lists only the fields that are used; preserve_access_index makes libbpf find their real
 * offsets in the running kernel's BTF (CO-RE). So building needs neither a kernel, nor its headers, nor
 * bpftool, and the same source compiles for every architecture. A triple underscore names the form that
 * a field had in other kernel versions.
 */
#ifndef SCOPE_KERNEL_H
#define SCOPE_KERNEL_H

/* BCC compiles against the running kernel's own headers: the same names as below are in there. */
#ifdef SCOPE_BCC
#include "bcc/kernel.h"
#else

typedef unsigned char __u8;
typedef signed char __s8;
typedef unsigned short __u16;
typedef short __s16;
typedef unsigned int __u32;
typedef int __s32;
typedef unsigned long long __u64;
typedef long long __s64;
typedef __u16 __be16;
typedef __u32 __be32;
typedef __u32 __wsum;

typedef _Bool bool;
enum { false, true };

#define NULL ((void *)0)

/* include/uapi/linux/bpf.h */
enum bpf_map_type {
	BPF_MAP_TYPE_HASH = 1,
	BPF_MAP_TYPE_ARRAY = 2,
	BPF_MAP_TYPE_PERF_EVENT_ARRAY = 4,
	BPF_MAP_TYPE_LRU_HASH = 9,
	BPF_MAP_TYPE_TASK_STORAGE = 29,
};
enum {
	BPF_ANY = 0,
	BPF_NOEXIST = 1,
	BPF_F_NO_PREALLOC = 1U << 0,
	BPF_F_MMAPABLE = 1U << 10,
	BPF_LOCAL_STORAGE_GET_F_CREATE = 1U << 0,
};
enum {
	BPF_F_CURRENT_CPU = 0xffffffffULL,
};

/* What the running kernel's BTF is asked for: whether it has a helper. */
enum bpf_func_id {
	BPF_FUNC_task_pt_regs = 175,
};

#include <bpf/bpf_helpers.h>
#include <bpf/bpf_core_read.h>
#include <bpf/bpf_tracing.h>

/* Newer than libbpf 0.5, whose headers Ubuntu 22.04 has. */
#ifndef barrier
#define barrier() asm volatile("" ::: "memory")
#endif
#define FIELD_OFFSET(type, field) \
	__builtin_preserve_field_info(((type *)0)->field, BPF_FIELD_BYTE_OFFSET)

#define KERNEL_TYPE __attribute__((preserve_access_index))

/*
 * The current task, and a field of it or of what it points to. Before 5.11 (commit 3ca1032ab7ab) it is only
 * an address, whose fields are read by a helper; an argument of a tracepoint is a pointer on all kernels.
 *
 * A function that is not static is looked at by itself, once, for any arguments; before 5.13 (commit
 * e5069b9c23b3) these may only be numbers.
 */
#ifdef OLD_KERNELS
#define CURRENT_TASK() ((struct task_struct *)bpf_get_current_task())
#define FIELD(pointer, field) BPF_CORE_READ(pointer, field)
#define FIELD_OF(pointer, first, second) BPF_CORE_READ(pointer, first, second)
#define GLOBAL static __noinline
#else
#define CURRENT_TASK() bpf_get_current_task_btf()
#define FIELD(pointer, field) (pointer)->field
#define FIELD_OF(pointer, first, second) (pointer)->first->second
#define GLOBAL __noinline
#endif
/* A field of a tracepoint's argument, or of what that points to: ARG_FIELD(task, mm, arg_start). */
#define ARG_FIELD(pointer, fields...) ___arrow(pointer, ##fields)
#define RAW_ARGUMENT(context, number) ((context)[number])
#define CACHE_LINE 64

/* The compiler's idea of these layouts is replaced at load, so their holes mean nothing. */
#pragma clang diagnostic push
#pragma clang diagnostic ignored "-Wpadded"

/* ---- registers of a system call ------------------------------------------------------------------ */

#if defined(__TARGET_ARCH_x86)
struct pt_regs {
	unsigned long bx, cx, dx, si, di, ax, r8, r10, orig_ax, sp, cs;
} KERNEL_TYPE;
#define SYSCALL_NUMBER(regs) ((long)(regs)->orig_ax)
#define SYSCALL_ARG0(regs) ((regs)->di)
#define SYSCALL_ARG1(regs) ((regs)->si)
#define SYSCALL_ARG2(regs) ((regs)->dx)
#define SYSCALL_ARG3(regs) ((regs)->r10)
/* The same of registers that are not an argument of a program. */
#define SAVED(regs, field) BPF_CORE_READ(regs, field)
#define SAVED_IN_USER_MODE(regs) ((SAVED(regs, cs) & 3) == 3)
#define SYSCALL_NUMBER_FIELD orig_ax
#define SYSCALL_ARG0_FIELD di
#define SYSCALL_ARG1_FIELD si
#define SYSCALL_ARG2_FIELD dx
/* 32-bit calls on a 64-bit kernel have their arguments elsewhere (arch/x86/include/asm/syscall.h). */
#define COMPAT_ARG0(regs) ((__u32)(regs)->bx)
#define COMPAT_ARG1(regs) ((__u32)(regs)->cx)
#define COMPAT_ARG2(regs) ((__u32)(regs)->dx)
#define TS_COMPAT 0x0002
/* Registers at the entry of a function, and its result at the return. */
#define FUNCTION_ARG0(regs) ((regs)->di)
#define FUNCTION_ARG1(regs) ((regs)->si)
#define FUNCTION_ARG2(regs) ((regs)->dx)
#define FUNCTION_ARG3(regs) ((regs)->cx)
#define FUNCTION_ARG4(regs) ((regs)->r8)
#define FUNCTION_RESULT(regs) ((regs)->ax)
/* What a program at a perf event gets is user space's ABI: words of its pt_regs. */
#define TICK_INSTRUCTION(words) ((words)[16])
#define TICK_IN_USER_MODE(words) ((words)[17] & 3) /* cs */
#define STACK_POINTER(regs) ((regs)->sp)
#elif defined(__TARGET_ARCH_arm64)
struct pt_regs {
	__u64 regs[31];
	__u64 sp;
	__u64 pstate;
	__u64 orig_x0;
	__s32 syscallno;
} KERNEL_TYPE;
#define SYSCALL_NUMBER(regs) ((long)(regs)->syscallno)
#define SYSCALL_ARG0(regs) ((regs)->orig_x0) /* regs[0] carries the result at the exit */
#define SYSCALL_ARG1(regs) ((regs)->regs[1])
#define SYSCALL_ARG2(regs) ((regs)->regs[2])
#define SYSCALL_ARG3(regs) ((regs)->regs[3])
#define SAVED(regs, field) BPF_CORE_READ(regs, field)
#define SAVED_IN_USER_MODE(regs) ((SAVED(regs, pstate) & 15) == 0)
#define SYSCALL_NUMBER_FIELD syscallno
#define SYSCALL_ARG0_FIELD orig_x0
#define SYSCALL_ARG1_FIELD regs[1]
#define SYSCALL_ARG2_FIELD regs[2]
#define COMPAT_ARG0(regs) ((__u32)(regs)->orig_x0)
#define COMPAT_ARG1(regs) ((__u32)(regs)->regs[1])
#define COMPAT_ARG2(regs) ((__u32)(regs)->regs[2])
#define TIF_32BIT_MASK (1UL << 22)
#define FUNCTION_ARG0(registers) ((registers)->regs[0])
#define FUNCTION_ARG1(registers) ((registers)->regs[1])
#define FUNCTION_ARG2(registers) ((registers)->regs[2])
#define FUNCTION_ARG3(registers) ((registers)->regs[3])
#define FUNCTION_ARG4(registers) ((registers)->regs[4])
#define FUNCTION_RESULT(registers) ((registers)->regs[0])
#define TICK_INSTRUCTION(words) ((words)[32])
#define TICK_IN_USER_MODE(words) (((words)[33] & 15) == 0) /* pstate */
#define STACK_POINTER(regs) ((regs)->sp)
#else
#error "scope-ebpf: no register names for this architecture; add them above"
#endif

/* ---- tasks --------------------------------------------------------------------------------------- */

struct thread_info {
	unsigned long flags;
	__u32 status;
	__u32 cpu;
} KERNEL_TYPE;

struct kernfs_node {
	__u64 id;
} KERNEL_TYPE;

struct cgroup;
struct cgroup_subsys_state {
	struct cgroup *cgroup;
	struct cgroup_subsys_state *parent;
} KERNEL_TYPE;

struct cgroup_root {
	int hierarchy_id; /* 0: the unified hierarchy */
} KERNEL_TYPE;

struct cgroup {
	struct cgroup_subsys_state self;
	struct kernfs_node *kn;
	struct cgroup_root *root;
} KERNEL_TYPE;

struct css_set {
	struct cgroup *dfl_cgrp;
} KERNEL_TYPE;

struct mm_struct {
	unsigned long arg_start, arg_end;
} KERNEL_TYPE;

typedef struct {
	int counter;
} atomic_t;

struct signal_struct {
	atomic_t live;
	int group_exit_code;
	unsigned int flags;
} KERNEL_TYPE;

enum { SIGNAL_GROUP_EXIT = 4 }; /* include/linux/sched/signal.h: group_exit_code holds */

/* Any struct that begins with 64 bits serves to load a word from an address. */
struct timespec64 {
	__s64 tv_sec;
} KERNEL_TYPE;

struct fdtable {
	unsigned int max_fds;
	struct file **fd;
} KERNEL_TYPE;

struct files_struct {
	struct fdtable *fdt;
} KERNEL_TYPE;

#if defined(__TARGET_ARCH_x86)
struct thread_struct {
	unsigned long fsbase;
} KERNEL_TYPE;
#define THREAD_POINTER(task) FIELD(task, thread.fsbase)
#else
struct thread_uw {
	unsigned long tp_value;
} KERNEL_TYPE;
struct thread_struct {
	struct thread_uw uw;
} KERNEL_TYPE;
#define THREAD_POINTER(task) FIELD(task, thread.uw.tp_value)
#endif

struct task_struct {
	void *stack;
	struct thread_struct thread;
	struct thread_info thread_info;
	unsigned int __state;
	unsigned int flags;
	unsigned int on_cpu; /* a byte from 7.x on: libbpf narrows the load only of what has no sign */
	unsigned int cpu; /* before 5.16 without THREAD_INFO_IN_TASK; see task_cpu() */
	struct mm_struct *mm;
	int exit_state; /* not 0: it has ended, and waits for its parent */
	int exit_code;
	__u32 pid;
	__u32 tgid;
	struct task_struct *real_parent;
	struct task_struct *group_leader;
	__u64 start_boottime;
	char comm[16];
	struct files_struct *files;
	struct signal_struct *signal;
	struct css_set *cgroups;
	void *io_uring; /* set when it makes or enters one */
	void *worker_private; /* of a worker of io_uring: its struct io_worker */
} KERNEL_TYPE;

/* worker_private by its name before 5.17 (commit e32cf5dfbe22). */
struct task_struct___before_5_17 {
	void *pf_io_worker;
} KERNEL_TYPE;

/* __state was `volatile long state` before 5.14 (commit 2f064a59a11f). */
struct task_struct___before_5_14 {
	volatile long state;
} KERNEL_TYPE;

enum { PF_KTHREAD = 0x00200000 };

struct linux_binprm {
	const char *filename;
} KERNEL_TYPE;

struct seq_file;
struct file;
struct bpf_iter_meta {
	struct seq_file *seq;
} KERNEL_TYPE;

struct bpf_iter__task {
	struct bpf_iter_meta *meta;
	struct task_struct *task;
} KERNEL_TYPE;

struct bpf_iter__task_file {
	struct bpf_iter_meta *meta;
	struct task_struct *task;
	__u32 fd;
	struct file *file;
} KERNEL_TYPE;

/* ---- files, sockets, pipes ----------------------------------------------------------------------- */

struct inode {
	unsigned short i_mode;
	unsigned long i_ino;
} KERNEL_TYPE;

struct file {
	struct inode *f_inode;
	void *private_data;
} KERNEL_TYPE;

struct socket {
	short type;
	struct file *file;
	struct sock *sk;
} KERNEL_TYPE;

struct in6_addr {
	__u8 in6_u[16];
};

struct ns_common {
	unsigned int inum;
} KERNEL_TYPE;

struct net {
	struct ns_common ns;
} KERNEL_TYPE;

typedef struct {
	struct net *net;
} possible_net_t;

struct sock_common {
	__be32 skc_daddr;
	__be32 skc_rcv_saddr;
	__be16 skc_dport;
	__u16 skc_num;
	unsigned short skc_family;
	unsigned long skc_flags;
	possible_net_t skc_net;
	struct in6_addr skc_v6_daddr;
	struct in6_addr skc_v6_rcv_saddr;
} KERNEL_TYPE;

struct sk_buff {
	struct sk_buff *next;
	unsigned int len;
	char cb[48];
} KERNEL_TYPE;

struct sk_buff_head {
	struct sk_buff *next;
} KERNEL_TYPE;

struct sock {
	struct sock_common __sk_common;
	struct sk_buff_head sk_receive_queue;
	unsigned long sk_flags;
	__u16 sk_protocol;
	struct socket *sk_socket;
} KERNEL_TYPE;

struct inet_sock {
	__be16 inet_sport;
} KERNEL_TYPE;

struct tcp_sock {
	__u32 rcv_nxt;
	__u32 copied_seq;
	__u32 write_seq;
} KERNEL_TYPE;

struct sockaddr_un {
	unsigned short sun_family;
	char sun_path[108];
};

struct unix_address {
	int len;
	struct sockaddr_un name[0];
} KERNEL_TYPE;

struct unix_sock {
	struct unix_address *addr;
	struct sock *peer;
} KERNEL_TYPE;

struct unix_skb_parms {
	__u32 consumed;
} KERNEL_TYPE;

struct pipe_buffer {
	unsigned int len;
} KERNEL_TYPE;

struct pipe_inode_info {
	unsigned int head;
	unsigned int tail;
	unsigned int ring_size;
	struct pipe_buffer *bufs;
} KERNEL_TYPE;

/* What a transfer is told of where the bytes are: user space's memory in one piece, in several, or else. */
enum iter_type {
	ITER_UBUF, /* since 6.0 (commit fcb14cb1bdac) */
	ITER_IOVEC,
};

struct iov_iter {
	__u8 iter_type;
	unsigned long iov_offset;
	const void *__iov;
	void *ubuf;
	unsigned long count;
	unsigned long nr_segs;
} KERNEL_TYPE;

struct iov_iter___before_5_14 {
	unsigned int type;
} KERNEL_TYPE;

struct iov_iter___before_6_4 {
	const void *iov;
} KERNEL_TYPE;

struct msghdr {
	struct iov_iter msg_iter;
	unsigned int msg_flags;
} KERNEL_TYPE;

struct kiocb {
	struct file *ki_filp;
} KERNEL_TYPE;

/* head and tail moved into a union of 16- or 32-bit halves in 6.14; both names stay visible in BTF. */

enum {
	S_IFMT = 0170000,
	S_IFSOCK = 0140000,
	S_IFIFO = 0010000,
	AF_UNIX = 1,
	AF_INET = 2,
	AF_INET6 = 10,
	IPPROTO_TCP = 6,
	SOCK_STREAM = 1,
	SOCK_DONE = 1, /* a bit number in skc_flags: a FIN was received */
	MSG_OOB = 0x1,
	MSG_PEEK = 0x2,
	MSG_ERRQUEUE = 0x2000,
};

#pragma clang diagnostic pop

#endif

/* User space's ABI: these do not move. */
struct user_sockaddr_in {
	__u16 family;
	__be16 port;
	__u8 address[4];
};

struct user_sockaddr_in6 {
	__u16 family;
	__be16 port;
	__u32 flow;
	__u8 address[16];
};

struct user_iovec {
	__u64 base;
	__u64 length;
};

struct user_msghdr {
	__u64 name;
	__u32 name_length;
	__u32 padding;
	__u64 iov;
	__u64 iov_count;
	__u64 control;
	__u64 control_length;
	__u32 flags;
	__u32 padding2;
};

struct user_mmsghdr {
	struct user_msghdr header;
	__u32 length;
	__u32 padding;
};

#ifndef SCOPE_BCC

/*
 * Since 6.2 (commit 541c3bad8dc5) any address can be given a kernel type, and its fields be loaded without
 * calling a helper; the verifier turns the cast into nothing. Before, each field is a helper call.
 */
extern void *bpf_rdonly_cast(const void *address, __u32 type) __ksym __weak;
#define AS(type, address) ((type *)bpf_rdonly_cast(address, bpf_core_type_id_kernel(type)))
#define READ_FIELD(type, address, field) \
	(bpf_rdonly_cast ? AS(type, address)->field : BPF_CORE_READ((type *)(address), field))

/* A pointer as a number: what the verifier knows as a pointer cannot be a map's key or be stored. */
static __always_inline __u64 read_word(const void *address)
{
	__u64 word = 0;

	if (bpf_rdonly_cast)
		return AS(struct timespec64, address)->tv_sec;
	bpf_probe_read_kernel(&word, sizeof(word), address);
	return word;
}

/* ---- access that differs by version or architecture ------------------------------------------------ */

static __always_inline __u32 task_state(struct task_struct *task)
{
	if (bpf_core_field_exists(task->__state))
		return task->__state;
	return BPF_CORE_READ((struct task_struct___before_5_14 *)task, state);
}

static __always_inline __u32 task_cpu(struct task_struct *task)
{
	if (bpf_core_field_exists(task->thread_info.cpu))
		return task->thread_info.cpu;
	if (bpf_core_field_exists(task->cpu))
		return task->cpu;
	return 0;
}

static __always_inline bool task_is_compat(__u64 task)
{
#if defined(__TARGET_ARCH_x86)
	return READ_FIELD(struct task_struct, (void *)task, thread_info.status) & TS_COMPAT;
#else
	return READ_FIELD(struct task_struct, (void *)task, thread_info.flags) & TIF_32BIT_MASK;
#endif
}

#endif

#endif
