/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * What is remembered of threads: in their own storage, or by their address where the kernel has no task
 * storage for tracing programs (before 5.13, commit a10787e6d58c).
 *
 * An address may be another thread's later. So an entry is deleted when its task is freed, and once more
 * when a task is made at that address. Not the pid with the time of birth: a thread that executes a program
 * takes both over from its leader.
 *
 * Under BCC by tid, since user space marks what runs already, and knows no addresses. Entries go when their
 * thread ends; that of a thread that executes a program moves.
 */
#ifndef SCOPE_TASKS_H
#define SCOPE_TASKS_H

#include "state.h"

/* A call of OpenSSL in flight (tls.h); all zero: none. */
struct tls_call {
	__u64 start_ns;
	__u64 ssl;
	__u64 buffer;
	__u64 size;	 /* of the buffer: no more can move */
	__u64 length_at; /* where the callee leaves the length; 0: it is the result */
	__u64 flags;	 /* FLAG_RECEIVE or 0 */
};

#ifdef SCOPE_BCC

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 32768);
	__type(key, __u32); /* tid */
	__type(value, struct task_record);
} tasks SEC(".maps");

/* A process: its tgid may be another one's later. */
struct process_key {
	__u64 tgid;
	__u64 made_ns;
};

/* Those whose end was told. */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 8192);
	__type(key, struct process_key);
	__type(value, __u32);
} ended SEC(".maps");

static __always_inline struct task_record *record_of(struct task_struct *task)
{
	__u32 key = FIELD(task, pid);

	return bpf_map_lookup_elem(&tasks, &key);
}

static __always_inline struct task_record *new_record_of(struct task_struct *task,
							 struct task_record *content)
{
	__u32 key = FIELD(task, pid);

	/* there may be one meanwhile, as with task storage: then that counts */
	bpf_map_update_elem(&tasks, &key, content, BPF_NOEXIST);
	return bpf_map_lookup_elem(&tasks, &key);
}

/* Nothing is left of a thread that had the same tid. */
static __always_inline void forget_before(struct task_struct *fresh)
{
	__u32 key = FIELD(fresh, pid);

	bpf_map_delete_elem(&tasks, &key);
}

static __always_inline void forget_ended(struct task_struct *task)
{
	__u32 key = FIELD(task, pid);

	bpf_map_delete_elem(&tasks, &key);
}

static __always_inline __u64 start_boottime_of(struct task_struct *task)
{
	struct task_record *record = record_of(task);

	if (record && record->start_boottime_ns)
		return record->start_boottime_ns;
	return FIELD(task, start_boottime);
}

/* The thread took its leader's tid over. */
static __always_inline void move_record(__u32 old_tid, __u32 tid)
{
	struct task_record *record;

	if (old_tid == tid)
		return;
	record = bpf_map_lookup_elem(&tasks, &old_tid);
	if (!record)
		return;
	bpf_map_update_elem(&tasks, &tid, record, BPF_ANY);
	bpf_map_delete_elem(&tasks, &old_tid);
}

static __always_inline bool is_first_to_end(struct task_struct *leader)
{
	struct process_key key = {.tgid = FIELD(leader, tgid), .made_ns = FIELD(leader, start_boottime)};
	__u32 told = 1;

	return !bpf_map_update_elem(&ended, &key, &told, BPF_NOEXIST);
}

#else
#ifndef OLD_KERNELS

struct {
	__uint(type, BPF_MAP_TYPE_TASK_STORAGE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, int);
	__type(value, struct task_record);
} tasks SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_TASK_STORAGE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, int);
	__type(value, struct tls_call);
} tls_calls SEC(".maps");

static __always_inline struct task_record *record_of(struct task_struct *task)
{
	return bpf_task_storage_get(&tasks, task, NULL, 0);
}

/* With its content from the first moment on: the task may be switched in on another CPU at once. */
static __always_inline struct task_record *new_record_of(struct task_struct *task,
							 struct task_record *content)
{
	return bpf_task_storage_get(&tasks, task, content, BPF_LOCAL_STORAGE_GET_F_CREATE);
}

static __always_inline struct tls_call *tls_call_of(struct task_struct *task)
{
	return bpf_task_storage_get(&tls_calls, task, NULL, 0);
}

static __always_inline struct tls_call *new_tls_call_of(struct task_struct *task)
{
	return bpf_task_storage_get(&tls_calls, task, NULL, BPF_LOCAL_STORAGE_GET_F_CREATE);
}

/* Nothing is left of a task that was at the same address. */
static __always_inline void forget_before(struct task_struct *fresh)
{
}

/* Of threads that end in the same instant the first one gets true. */
static __always_inline bool is_first_to_end(struct task_struct *leader)
{
	struct task_record *record = record_of(leader);

	return !record || !__sync_lock_test_and_set(&record->ended, 1);
}

#else

/* Preallocated: programs of perf events take no other hash before 6.1. User space sets the count. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 32768);
	__type(key, __u64); /* address of the task_struct */
	__type(value, struct task_record);
} tasks SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 8192);
	__type(key, __u64);
	__type(value, struct tls_call);
} tls_calls SEC(".maps");

const struct tls_call no_tls_call = {};

/* First threads of processes whose end was told. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 32768);
	__type(key, __u64);
	__type(value, __u32);
} ended SEC(".maps");

static __always_inline struct task_record *record_of(struct task_struct *task)
{
	__u64 key = (__u64)task;

	return bpf_map_lookup_elem(&tasks, &key);
}

static __always_inline struct task_record *new_record_of(struct task_struct *task,
							 struct task_record *content)
{
	__u64 key = (__u64)task;

	/* there may be one meanwhile, as with task storage: then that counts */
	bpf_map_update_elem(&tasks, &key, content, BPF_NOEXIST);
	return bpf_map_lookup_elem(&tasks, &key);
}

static __always_inline struct tls_call *tls_call_of(struct task_struct *task)
{
	__u64 key = (__u64)task;

	return bpf_map_lookup_elem(&tls_calls, &key);
}

static __always_inline struct tls_call *new_tls_call_of(struct task_struct *task)
{
	__u64 key = (__u64)task;

	bpf_map_update_elem(&tls_calls, &key, &no_tls_call, BPF_NOEXIST);
	return bpf_map_lookup_elem(&tls_calls, &key);
}

static __always_inline void forget(__u64 key)
{
	if (!bpf_map_lookup_elem(&tasks, &key))
		return;
	bpf_map_delete_elem(&tasks, &key);
	bpf_map_delete_elem(&ended, &key);
	bpf_map_delete_elem(&tls_calls, &key);
}

static __always_inline void forget_before(struct task_struct *fresh)
{
	forget((__u64)fresh);
}

static __always_inline bool is_first_to_end(struct task_struct *leader)
{
	__u64 key = (__u64)leader;
	__u32 told = 1;

	/* without a record nobody would delete the entry */
	return !bpf_map_lookup_elem(&tasks, &key) ||
	       !bpf_map_update_elem(&ended, &key, &told, BPF_NOEXIST);
}

/* Nobody uses the task any more. */
SEC("tp_btf/sched_process_free")
int BPF_PROG(on_free, struct task_struct *task)
{
	forget((__u64)task);
	return 0;
}

#endif

static __always_inline void forget_ended(struct task_struct *task)
{
}

static __always_inline __u64 start_boottime_of(struct task_struct *task)
{
	return ARG_FIELD(task, start_boottime);
}

static __always_inline void move_record(__u32 old_tid, __u32 tid)
{
}

#endif

#endif
