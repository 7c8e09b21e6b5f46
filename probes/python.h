/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * CPython processes: which one a thread belongs to, its thread state, and its logical context.
 *
 * User space looks into a process once and leaves the offsets in `interpreters`; forks share their
 * parent's. From a thread to its PyThreadState it goes by the slot of the thread-specific storage that
 * CPython keeps it in (gilstate.autoTSSkey): the variables that hold the current thread state are empty
 * whenever the GIL is released, which is in every blocking call.
 *
 * A logical context is a PyContext that was entered (Context.run(): every asyncio task and callback, every
 * trio task, to_thread), or a greenlet's data stack. Addresses are reused at once, so each gets a number: a
 * context when it is made (uretprobes on PyContext_CopyCurrent and its like), a greenlet's stack when it is
 * met first, until its memory is unmapped; but the stack that a thread is first seen on is the thread's. The
 * context that a thread makes for itself is never entered: it is 0, the thread itself.
 *
 * Sees:   the context of a thread at each of its calls, and who made a context.
 * Misses: which context woke which; tasks that share a context on purpose (create_task(context=...)).
 * Costs:  nothing for processes that are no Python or make no contexts; else 60 ns at each call of a
 *         thread, and a slot of the ring when its context changed; 1 to 1.5 us per context that is made.
 */
#ifndef SCOPE_PYTHON_H
#define SCOPE_PYTHON_H

#include "state.h"

enum {
	MAX_CHUNKS = 16, /* of a data stack: each holds 16 KiB or more */
	GONE = 1, /* no address of a data stack */
	STATE_WORDS = 16, /* of a PyThreadState that are read at once */
	CONTEXT_ID_BITS = 40, /* of the count of contexts that a CPU made; the rest is the CPU's number */
};

/* Elements are filled by user space before `pythons` names them; 0 is none. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, INTERPRETERS);
	__type(key, __u32);
	__type(value, struct interpreter);
} interpreters SEC(".maps");

struct context_key {
	__u64 address; /* of the PyContext, or of the first chunk of a data stack, plus 1 */
	__u64 tgid;
};

struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 262144);
	__type(key, struct context_key);
	__type(value, __u64); /* number */
} contexts SEC(".maps");

/* Set by user space between the beginning and the end of the recording. */
__u32 python_wanted = 0;

static __always_inline struct interpreter *interpreter_at(__u32 index)
{
	if (!index)
		return NULL;
	return bpf_map_lookup_elem(&interpreters, &index);
}

static __always_inline __u64 read_user_word(__u64 address)
{
	__u64 word = 0;

	bpf_probe_read_user(&word, sizeof(word), (void *)address);
	return word;
}

/*
 * The current thread's PyThreadState, 0: it has none (yet). Once found it is kept until the thread leaves the
 * CPU: who reads it checks that it is still this thread's.
 */
static __always_inline __u64 thread_state(struct cpu_state *cpu, struct interpreter *python,
					  struct task_struct *task)
{
	bool here = cpu->task == (__u64)task;
	__u64 state;

	if (here && cpu->thread_state)
		return cpu->thread_state;
	state = read_user_word(THREAD_POINTER(task) + python->tss);
	if (here)
		cpu->thread_state = state;
	return state;
}

/*
 * Words of the current thread's PyThreadState from thread_id to context, in one read: each read costs 50 ns
 * and more. A state that was freed since is another thread's now, has no context any more, or cannot be read.
 */
static __always_inline __u64 context_address(struct cpu_state *cpu, struct interpreter *python,
					     struct task_struct *task, __u64 *state)
{
	__u64 words[STATE_WORDS] = {}, place = python->tstate_context - python->tstate_thread_id;
	int i;

	for (i = 0; i < 2; i++) {
		*state = thread_state(cpu, python, task);
		if (!*state)
			return 0;
		if (!bpf_probe_read_user(words, sizeof(words), (void *)(*state + python->tstate_thread_id)) &&
		    words[0] == THREAD_POINTER(task))
			return words[(place / 8) & (STATE_WORDS - 1)];
		cpu->thread_state = 0;
	}
	*state = 0;
	return 0;
}

static __always_inline bool write_context(struct cpu_state *cpu, __u64 context, __u64 parent, __u8 kind)
{
	__u64 index, identity = bpf_get_current_pid_tgid();
	struct context *made = hot_reserve(cpu, &index);

	if (!made) {
		count_loss(cpu, LOSS_CONTEXTS);
		return false;
	}
	made->reserved0 = 0;
	made->kind = RECORD_CONTEXT;
	made->flags = kind;
	made->time_ns = bpf_ktime_get_ns();
	made->tgid = identity >> 32;
	made->tid = identity;
	made->context = context;
	made->parent = parent;
	made->reserved1[0] = made->reserved1[1] = made->reserved1[2] = 0;
	commit(&made->sequence, index);
	return true;
}

static __always_inline __u64 new_context_number(struct cpu_state *cpu)
{
	__u64 count = new_number(cpu);

	return (__u64)bpf_get_smp_processor_id() << CONTEXT_ID_BITS | count;
}

/* The number of what is at an address, a new one if it was not met before; 0: it could not be told. */
static __always_inline __u64 number_of(struct cpu_state *cpu, __u64 address, __u8 kind)
{
	struct context_key key = {.address = address, .tgid = bpf_get_current_pid_tgid() >> 32};
	__u64 *known = bpf_map_lookup_elem(&contexts, &key), fresh;

	if (known)
		return *known;
	fresh = new_context_number(cpu);
	if (bpf_map_update_elem(&contexts, &key, &fresh, BPF_ANY))
		return 0;
	write_context(cpu, fresh, 0, kind);
	return fresh;
}

/* The first chunk of the current data stack: greenlets have one each (Linux maps it for them alone). */
static __always_inline __u64 data_stack(struct interpreter *python, __u64 state)
{
	__u64 chunk = read_user_word(state + python->tstate_datastack_chunk), previous;
	int i;

	for (i = 0; i < MAX_CHUNKS && chunk; i++) {
		previous = read_user_word(chunk + python->chunk_previous);
		if (!previous)
			return chunk;
		chunk = previous;
	}
	return 0;
}

/*
 * Whether a data stack is that of the thread itself: the one that it was first seen on. In most programs that
 * import greenlet it is the only one; in one that gevent drives it is mostly that of the hub, which waits.
 */
static __always_inline bool is_home(__u64 address)
{
	struct task_record *record = record_of(CURRENT_TASK());

	if (!record)
		return false;
	if (!record->home)
		record->home = address;
	return record->home == address;
}

/* The number of the context that a thread state names; 0: the thread itself. */
GLOBAL __u64 number_context(struct cpu_state *cpu, struct interpreter *python, __u64 state, __u64 address)
{
	__u32 entered = 0;

	if (!cpu || !python || !state)
		return 0;
	if (address && python->flags & INTERPRETER_CONTEXTS) {
		bpf_probe_read_user(&entered, sizeof(entered), (void *)(address + python->context_entered));
		if (entered)
			return number_of(cpu, address, CONTEXT_MET);
	}
	if (python->flags & INTERPRETER_GREENLETS) {
		address = data_stack(python, state);
		if (address && !is_home(address))
			return number_of(cpu, address + 1, CONTEXT_GREENLET);
	}
	return 0;
}

/* The logical context that the current thread runs in. */
GLOBAL __u64 current_context(struct cpu_state *cpu, struct interpreter *python)
{
	__u64 state, address;

	if (!cpu || !python)
		return 0;
	address = context_address(cpu, python, CURRENT_TASK(), &state);
	return number_context(cpu, python, state, address);
}

/*
 * At the entry of a call: tell the context that it is in, if it is not that of the call before. If that
 * cannot be told, the call may not be recorded either.
 */
GLOBAL int follow_context(struct cpu_state *cpu)
{
	struct interpreter *python;
	__u64 context;

	if (!cpu)
		return 0;
	python = interpreter_at(cpu->interpreter);
	if (!python || !(python->flags & (INTERPRETER_CONTEXTS | INTERPRETER_GREENLETS)))
		return 0;
	context = current_context(cpu, python);
	if (context != cpu->context && !write_flow(cpu, context))
		cpu->flight.refused = 1;
	return 0;
}

/* Of the current thread's process, also where the CPU does not know it; 0: it is no recorded Python. */
static __always_inline __u32 interpreter_here(struct cpu_state *cpu, struct task_struct *task)
{
	struct task_record *record;

	if (!python_wanted)
		return 0;
	if (cpu->task == (__u64)task)
		return cpu->recorded ? cpu->interpreter : 0;
	record = record_of(task);
	return record && record->phase != PHASE_DORMANT ? record->interpreter : 0;
}

static __always_inline int made_context(struct pt_regs *regs, __u8 kind)
{
	struct task_struct *task = CURRENT_TASK();
	struct context_key key = {.address = FUNCTION_RESULT(regs), .tgid = FIELD(task, tgid)};
	struct cpu_state *cpu = this_cpu();
	struct interpreter *python;
	__u64 context, parent;

	if (!cpu || !key.address)
		return 0;
	python = interpreter_at(interpreter_here(cpu, task));
	if (!python)
		return 0;
	parent = current_context(cpu, python);
	python->flags |= INTERPRETER_CONTEXTS;
	context = new_context_number(cpu);
	/* without a row of its own it is still another one than what had that address */
	bpf_map_update_elem(&contexts, &key, &context, BPF_ANY);
	write_context(cpu, context, parent, kind);
	return 0;
}

SEC("uretprobe")
int WRITES_AT(LEVEL_TASK, on_context_copied, struct pt_regs *regs)
{
	return made_context(regs, CONTEXT_COPIED);
}

SEC("uretprobe")
int WRITES_AT(LEVEL_TASK, on_context_made, struct pt_regs *regs)
{
	return made_context(regs, CONTEXT_NEW);
}

/* ---- work items ------------------------------------------------------------------------------------ */

static __always_inline int write_handoff(struct pt_regs *regs, __u64 item, __u64 queue, bool put)
{
	struct task_struct *task = CURRENT_TASK();
	struct cpu_state *cpu = this_cpu();
	struct interpreter *python;
	struct handoff *handoff;
	__u64 index, context;

	if (!cpu || !item)
		return 0;
	python = interpreter_at(interpreter_here(cpu, task));
	if (!python)
		return 0;
	context = current_context(cpu, python);
	handoff = hot_reserve(cpu, &index);
	if (!handoff) {
		count_loss(cpu, LOSS_HANDOFFS);
		return 0;
	}
	handoff->reserved0 = 0;
	handoff->kind = RECORD_HANDOFF;
	handoff->flags = put;
	handoff->time_ns = bpf_ktime_get_ns();
	handoff->tgid = FIELD(task, tgid);
	handoff->tid = FIELD(task, pid);
	handoff->context = context;
	handoff->item = item;
	handoff->queue = queue;
	handoff->reserved1[0] = handoff->reserved1[1] = 0;
	commit(&handoff->sequence, index);
	return 0;
}

/* (queue, item, ...) */
SEC("uprobe")
int WRITES_AT(LEVEL_TASK, on_put, struct pt_regs *regs)
{
	return write_handoff(regs, FUNCTION_ARG1(regs), FUNCTION_ARG0(regs), true);
}

/* (queue, arguments, ...): the item is the first of an array */
SEC("uprobe")
int WRITES_AT(LEVEL_TASK, on_put_array, struct pt_regs *regs)
{
	return write_handoff(regs, read_user_word(FUNCTION_ARG1(regs)), FUNCTION_ARG0(regs), true);
}

SEC("uretprobe")
int WRITES_AT(LEVEL_TASK, on_got, struct pt_regs *regs)
{
	return write_handoff(regs, FUNCTION_RESULT(regs), 0, false);
}

/* ---- the GIL --------------------------------------------------------------------------------------- */

/*
 * A call of futex that waited for the GIL: its address lies within the struct that holds it. Whoever
 * gave the GIL up last stands in that struct.
 */
static __noinline int write_gil(struct cpu_state *cpu, struct interpreter *python, __u64 duration_ns,
				__u8 status)
{
	__u64 index, holder = read_user_word(python->gil + python->gil_holder), thread;
	struct gil *gil;
	__u32 tid = 0;

	if (holder && python->tstate_native_thread_id) {
		bpf_probe_read_user(&tid, sizeof(tid), (void *)(holder + python->tstate_native_thread_id));
	} else if (holder && python->thread_tid) {
		thread = read_user_word(holder + python->tstate_thread_id);
		if (thread)
			bpf_probe_read_user(&tid, sizeof(tid), (void *)(thread + python->thread_tid));
	}
	gil = hot_reserve(cpu, &index);
	if (!gil) {
		count_loss(cpu, LOSS_GIL);
		return 0;
	}
	gil->reserved0 = 0;
	gil->kind = RECORD_GIL;
	gil->flags = status;
	gil->start_ns = cpu->flight.start_ns;
	gil->duration_ns = duration_ns;
	gil->tgid = cpu->tgid;
	gil->tid = cpu->tid;
	gil->holder_tid = tid;
	gil->reserved1 = 0;
	gil->reserved2[0] = gil->reserved2[1] = gil->reserved2[2] = 0;
	commit(&gil->sequence, index);
	return 0;
}

/* A call of munmap: what was at that address is no greenlet's stack any more, nor the thread's. */
static __noinline int end_greenlet(struct cpu_state *cpu, struct interpreter *python)
{
	struct context_key key = {.address = cpu->flight.arg0 + 1, .tgid = cpu->tgid};
	struct task_record *record;

	if (!(python->flags & INTERPRETER_GREENLETS))
		return 0;
	bpf_map_delete_elem(&contexts, &key);
	record = record_of(CURRENT_TASK());
	if (record && record->home == cpu->flight.arg0)
		record->home = GONE;
	return 0;
}

#include "stacks.h"

/* After a call of a Python thread: what else there is to tell of it. */
__noinline int after_call(OF_CPU __u64 duration_ns, __u32 status)
{
	FIND_CPU();
	struct interpreter *python;
	__u64 waited_ns;

	if (!cpu)
		return 0;
	python = interpreter_at(cpu->interpreter);
	waited_ns = cpu->waited_ns;
	cpu->waited_ns = 0;
	if (!python)
		return 0;
	if (record_gil && cpu->flight.number == futex_number && python->flags & INTERPRETER_GIL &&
	    cpu->flight.arg0 - python->gil < python->gil_bytes)
		write_gil(cpu, python, duration_ns, status);
	if (cpu->flight.number == munmap_number)
		end_greenlet(cpu, python);
	if (record_samples && waited_ns >= long_wait_ns)
		take_sample(WITH_CPU SAMPLE_WAIT, cpu->flight.start_ns, waited_ns, 0);
	else if (record_samples && cpu->turned)
		take_sample(WITH_CPU SAMPLE_MESSAGE, cpu->flight.start_ns, duration_ns, 0);
	cpu->turned = 0;
	return 0;
}

#endif
