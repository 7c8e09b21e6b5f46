/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Which thread runs on this CPU, and what it was doing: kept at every context switch, so that the system
 * call programs find it without a look-up.
 *
 * A thread is told by the address of its user registers, which the call programs get as an argument: asking
 * for the current task would be one more helper call in each of them. The switch program learns a recorded
 * thread's address from its record; it does not know other threads', so their first call after a switch
 * looks them up.
 *
 * Sees:   every context switch of the host.
 * Misses: some kernels run no BPF program in the context of chosen threads (seen on a cloud provider's
 *         guest kernel, with the threads of its own agent), so that a switch away from one of them is not
 *         seen. Then `running` is not the current task; whoever notices looks the task up, and the
 *         interval off the CPU ends late (STATUS_END_LATE).
 * Costs:  one program per switch; for recorded threads the clock and one or two look-ups.
 */
#ifndef SCOPE_RUNNING_H
#define SCOPE_RUNNING_H

#include "state.h"
#include "offcpu.h"
#include "python.h"

enum found {
	FOUND_NOTHING,
	FOUND_TRACED,	/* recorded; its call in flight, if any, is in place */
	FOUND_NEWBORN,	/* it is leaving its parent's fork */
	FOUND_ATTACHED, /* it was marked while it ran; *since says when */
};

/* Whether the thread's process is a Python that user space has looked into. */
static __always_inline void ask_for_interpreter(struct task_record *record, __u32 tgid)
{
	__u32 *index = bpf_map_lookup_elem(&pythons, &tgid);

	record->interpreter = index ? *index : 0;
	record->interpreter_changes = interpreter_changes;
}

/* A recorded thread is on this CPU again: end its interval and put its call in place. */
static __always_inline void take_up(struct cpu_state *cpu, struct task_struct *task,
				    struct task_record *record, __u64 now)
{
	if (record->interpreter_changes != interpreter_changes)
		ask_for_interpreter(record, FIELD(task, tgid));
	if (record->left_ns && (record_offcpu || ((record_samples || record_gil) && record->interpreter))) {
		now = now ?: bpf_ktime_get_ns();
		if (record_offcpu)
			write_offcpu(cpu, task, record, now);
		if (record->in_flight)
			record->waited_ns += now - record->left_ns;
	}
	cpu->interpreter = record->interpreter;
	cpu->context = record->context;
	cpu->waited_ns = record->waited_ns;
	record->waited_ns = 0;
	record->left_ns = record->woken_ns = 0;
	cpu->task = (__u64)task;
	cpu->recorded = 1;
	cpu->tgid = FIELD(task, tgid);
	cpu->tid = FIELD(task, pid);
	if (record->in_flight) {
		cpu->flight = record->flight;
		cpu->in_flight = record->registers;
		record->in_flight = 0;
	}
}

/*
 * The slow way, when it is not known who runs: is the current thread, whose registers are at that address,
 * recorded, and since when?
 */
static __noinline int look_up_running(struct cpu_state *cpu, __u64 registers, __u64 *since)
{
	struct task_struct *task = CURRENT_TASK();
	struct task_record *record, fresh = {};
	__u8 phase;

	if (!cpu || !since)
		return FOUND_NOTHING;
	cpu->running = registers;
	cpu->traced = cpu->in_flight = cpu->recorded = 0;
	cpu->interpreter = 0;
	cpu->thread_state = 0;
	cpu->task = (__u64)task;
	record = record_of(task);
	if (!record && record_everything && FIELD(task, tgid) != recorder_tgid) {
		record = new_record_of(task, &fresh);
		if (!record)
			count_loss(cpu, LOSS_TASKS);
	}
	if (!record || record->phase == PHASE_DORMANT)
		return FOUND_NOTHING;
	cpu->traced = record->registers = registers;
	phase = record->phase;
	if (record->left_ns && phase == PHASE_NORMAL)
		record->left_status = STATUS_END_LATE;
	take_up(cpu, task, record, 0);
	cpu->context = UNKNOWN_CONTEXT;
	record->phase = PHASE_NORMAL;
	*since = record->marked_ns;
	if (phase == PHASE_NEWBORN)
		return FOUND_NEWBORN;
	return phase == PHASE_ATTACHED ? FOUND_ATTACHED : FOUND_TRACED;
}

static __always_inline void switch_out(struct cpu_state *cpu, struct task_struct *task, bool preempted,
				       __u32 state, __u64 now)
{
	struct task_record *record = record_of(task);

	if (!record || record->phase == PHASE_DORMANT)
		return;
	if (record->left_ns) {
		/* its switch to this CPU was not seen, and it made no call since */
		record->left_status = STATUS_END_LATE;
		take_up(cpu, task, record, now);
	}
	if (cpu->in_flight && cpu->in_flight == record->registers) {
		record->flight = cpu->flight;
		record->in_flight = 1;
		record->waited_ns = cpu->waited_ns;
	}
	/* not known any more: the next call tells it again */
	record->context = cpu->task == (__u64)task ? cpu->context : UNKNOWN_CONTEXT;
	record->left_ns = now;
	record->left_state = preempted ? TASK_RUNNING : state;
	record->left_status = STATUS_COMPLETE;
	/* it waits for a page: how long is told by the row of offcpu that begins now */
	if (record_samples && cpu->interpreter && !record->in_flight && record->left_state != TASK_RUNNING)
		take_sample(WITH_CPU SAMPLE_FAULT, now, 0, 0);
}

static __always_inline void switch_in(struct cpu_state *cpu, struct task_struct *task, __u64 now)
{
	struct task_record *record = record_of(task);

	if (!record || record->phase == PHASE_DORMANT)
		return;
	take_up(cpu, task, record, now);
	if (record->phase != PHASE_NORMAL) {
		/* the call programs find out what the phase means; without them it means nothing */
		if (CALLS_ARE_FOLLOWED)
			return;
		record->phase = PHASE_NORMAL;
	}
	cpu->running = cpu->traced = record->registers;
}

SEC("tp_btf/sched_switch")
int WRITES_HOT_MANY(on_sched_switch, bool preempted, struct task_struct *previous, struct task_struct *next)
{
	struct cpu_state *cpu = this_cpu();
	__u32 state = 0;
	__u64 now = 0;

	if (!cpu)
		return 0;
	/* it is recorded, or it is not the one that was seen to be switched in */
	if (cpu->recorded || (cpu->task != (__u64)previous && ARG_FIELD(previous, pid))) {
		now = bpf_ktime_get_ns();
		/* a waker may already have set TASK_WAKING in the task (commit fa2c3254d7cf added the
		 * argument for that) */
		if (switch_tells_state)
			state = RAW_ARGUMENT(ctx, 3);
		else
			state = task_state(previous);
		switch_out(cpu, previous, preempted, state, now);
	}
	cpu->running = cpu->traced = cpu->in_flight = cpu->recorded = 0;
	cpu->interpreter = 0;
	cpu->thread_state = 0;
	cpu->task = (__u64)next;
	if (ARG_FIELD(next, pid))
		switch_in(cpu, next, now);
	return 0;
}

#endif
