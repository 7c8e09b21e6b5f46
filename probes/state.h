/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * State that the probes share: who is recorded, and what each thread and CPU is doing. How records get
 * to user space: rings.h or perf.h; what is remembered of a thread: tasks.h.
 *
 * The hot path (sys_enter, sys_exit) calls no helper but the clock: what it needs lies in this CPU's
 * element of `cpus`, which sched_switch keeps up to date. Array look-ups, the CPU number and the current
 * task are inlined by the JIT; each helper call that is saved is worth 10 to 20 ns where return thunks
 * and retpolines are on. A thread's own storage is touched only when it leaves or enters a CPU.
 */
#ifndef SCOPE_STATE_H
#define SCOPE_STATE_H

#include "kernel.h"
#include "events.h"

/* Switches, set by user space before loading. */
const volatile bool record_syscalls = false;
const volatile bool record_messages = false;
const volatile bool record_offcpu = false;
const volatile bool record_samples = false;
const volatile bool record_contexts = false;
const volatile bool record_gil = false;
const volatile bool record_everything = false; /* the whole host but the recorder */
const volatile bool follow_children = false;
const volatile bool seek_cgroups = false; /* membership is by `cgroups`, not by `targets` */
const volatile bool switch_tells_state = false; /* sched_switch has prev_state (5.18) */
const volatile bool programs_are_preempted = false; /* at tracepoints, see stay() */
const volatile __u32 recorder_tgid = 0;
const volatile __u32 hot_slots = 1; /* per CPU; in rings.h a power of two */
const volatile __u32 wide_slots = 1;
const volatile __u32 payload_limit = 0; /* bytes of a payload head; 0: none */
const volatile __u64 long_wait_ns = 0; /* from this on a wait in a call gets a stack */
const volatile __u32 futex_number = 0;
const volatile __u32 munmap_number = 0;
#ifdef SCOPE_BCC /* has no constants in memory */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 512);
	__type(key, __u32);
	__type(value, __u8);
} message_class_table SEC(".maps");
#else
const volatile __u8 message_classes[512] = {};
#endif

/* Whether calls are followed from their entry to their exit. */
#define CALLS_ARE_FOLLOWED \
	(record_syscalls || record_messages || record_samples || record_contexts || record_gil)

#ifndef SCOPE_BCC
/* Puts the layouts of the records into this object's BTF, where user space compares them at load. */
const volatile struct record_layouts {
	struct call call;
	struct message message;
	struct offcpu offcpu;
	struct tls tls;
	struct payload payload;
	struct process process;
	struct connection connection;
	struct connect connect;
	struct marked_task marked_task;
	struct sample sample;
	struct flow flow;
	struct context context;
	struct handoff handoff;
	struct gil gil;
	struct frame frame;
	struct stack_part stack_part;
	struct code_part code_part;
	struct hit hit;
	struct python_call python_call;
	struct hit_probe hit_probe;
	struct hit_argument hit_argument;
	struct interpreter interpreter;
	struct call_watch call_watch;
} record_layouts = {};
#endif

enum {
	TASK_RUNNING = 0,
	/* slots kept free, since producers that interrupt each other check before they take */
	RING_MARGIN = 16,
};

/* In `context` of a thread: what was told last is not known. */
#define UNKNOWN_CONTEXT 0xffffffffffffffffULL

enum task_phase {
	PHASE_NORMAL = 0,
	PHASE_ATTACHED = 1, /* marked while it ran: it may be inside a call whose entry was not seen */
	PHASE_NEWBORN = 2,  /* its first exit is that of its parent's fork */
	PHASE_DORMANT = 3,  /* not recorded before it executes another program */
};

/* What is remembered of a recorded thread while it is not on a CPU. */
struct task_record {
	struct flight flight;
	__u64 left_ns; /* when it left the CPU, or 0 */
	__u64 woken_ns;
	__u64 marked_ns;
	__u64 registers; /* where its user registers are saved, 0: not known yet */
	__u64 context;	 /* as in cpu_state */
	__u64 waited_ns; /* as in cpu_state */
	__u64 home; /* the data stack that it was first seen on, which is no greenlet's; 0: none was yet */
	__u32 interpreter; /* as in cpu_state, as it was at that number of changes */
	__u32 interpreter_changes;
	__u32 waker_tgid;
	__u32 waker_tid;
	__u32 left_state;
	__u16 waker_number;
	__u8 phase;
	__u8 in_flight;
	__u8 left_status; /* call_status of the interval */
	__u8 untold; /* it was marked, and user space was not told yet */
	__u8 reserved[2];
	__u32 ended; /* of a process's first thread: the end of the process was told */
#ifdef SCOPE_BCC
	__u64 start_boottime_ns; /* of what was marked: /proc tells it to the tick, and all rows say the same */
#endif
};

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 65536);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, __u32);   /* tgid */
	__type(value, __u32); /* target_kind */
} targets SEC(".maps");

/* Ids of the cgroups whose members are recorded, with those below them. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 65536);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, __u64);
	__type(value, __u32);
} cgroups SEC(".maps");

#include "tasks.h"

/* Set by user space when entries are seen, too: an exit without one means something only then. */
__u32 entries_seen = 0;

/* How often `pythons` was changed by user space: a record that knows another count asks again. */
__u32 interpreter_changes = 0;

/* How often the kernel found something that on_mark_tasks has to take up. */
__u64 marks_wanted = 0;

/* How often user space asked for what is told once to be told again: connections, stacks, code objects. */
__u32 tellings = 0;

/* Element counts of the arrays are set by user space to fit the host. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct cpu_state);
} cpus SEC(".maps");

/* Which element of `interpreters` a process's is; forks share it. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 65536);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, __u32); /* tgid */
	__type(value, __u32);
} pythons SEC(".maps");

static __always_inline struct cpu_state *this_cpu(void)
{
	__u32 cpu = bpf_get_smp_processor_id();

	return bpf_map_lookup_elem(&cpus, &cpu);
}

/*
 * Functions that are looked at by themselves get this CPU's state, or look it up again where they may only be
 * given numbers: see GLOBAL.
 */
#ifdef OLD_KERNELS
#define OF_CPU
#define WITH_CPU
#define FIND_CPU() struct cpu_state *cpu = this_cpu()
#else
#define OF_CPU struct cpu_state *cpu,
#define WITH_CPU cpu,
#define FIND_CPU()
#endif

#ifdef SCOPE_BCC
/*
 * The same number, by way of memory: so ways that came to it with different values are one to the verifier,
 * which else follows each to the end. Where functions are looked at by themselves their arguments are so.
 */
static __always_inline __u64 through_memory(struct cpu_state *cpu, __u64 number)
{
	*(volatile __u64 *)&cpu->reserved2[5] = number;
	return *(volatile __u64 *)&cpu->reserved2[5];
}
#define UNKNOWN_TO_VERIFIER(cpu, number) through_memory(cpu, number)
/* Keeps a loop's own count: BCC's compiler would count down one whose bounds the verifier does not see. */
#define KEEP_COUNT(count) asm volatile("" : "+r"(count))
/* As UNKNOWN_TO_VERIFIER, slower: for what is rarely done. */
#define FORGET_BOUNDS(number)               \
	({                                  \
		__u64 word_ = (number);     \
		read_word(&word_);          \
	})
#else
#define UNKNOWN_TO_VERIFIER(cpu, number) (number)
#define KEEP_COUNT(count) ((void)0)
#define FORGET_BOUNDS(number) (number)
#endif

/*
 * From 7.0 on (commits a46023d5616e and f7d327654b88) another task may run on this CPU before a program at a
 * tracepoint has ended, and hit the same tracepoints; it does not go on on another CPU. What is per CPU and
 * no thread's is one program's at a time: it stays while it uses that. The verifier drops the calls where
 * they are not needed; it takes functions that are looked at by themselves between them from 6.15 on (commit
 * e2d8f560d178).
 */
#ifdef SCOPE_BCC
static __always_inline void stay(void)
{
}

static __always_inline void leave(void)
{
}
#else
extern void bpf_preempt_disable(void) __ksym __weak;
extern void bpf_preempt_enable(void) __ksym __weak;

static __always_inline void stay(void)
{
	if (programs_are_preempted)
		bpf_preempt_disable();
}

static __always_inline void leave(void)
{
	if (programs_are_preempted)
		bpf_preempt_enable();
}
#endif

static __always_inline void count_loss(struct cpu_state *cpu, enum loss_kind kind)
{
	__sync_fetch_and_add(&cpu->lost[kind], 1);
}

#ifdef PERF_TRANSPORT
#include "perf.h"
#else
#include "rings.h"
#endif

/* Tells `task` of the CPU to be in another context from now on. Returns whether that could be told. */
static __always_inline bool write_flow(struct cpu_state *cpu, __u64 context)
{
	struct flow *flow;
	__u64 index;

	flow = hot_reserve(cpu, &index);
	if (!flow) {
		count_loss(cpu, LOSS_CONTEXTS);
		return false;
	}
	flow->reserved0 = 0;
	flow->kind = RECORD_FLOW;
	flow->reserved1 = 0;
	flow->start_ns = bpf_ktime_get_ns();
	flow->tgid = cpu->tgid;
	flow->tid = cpu->tid;
	flow->context = context;
	flow->reserved2[0] = flow->reserved2[1] = flow->reserved2[2] = flow->reserved2[3] = 0;
	commit(&flow->sequence, index);
	cpu->context = context;
	return true;
}

static __always_inline __u64 cgroup_of(struct task_struct *task)
{
	return ARG_FIELD(task, cgroups, dfl_cgrp, kn, id);
}

#endif
