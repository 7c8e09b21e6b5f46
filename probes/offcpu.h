/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Off-CPU intervals of recorded threads: one record when the thread is back on a CPU.
 *
 * Sees:   when it left and came back, how much of that it was ready to run, the state it left in, the
 *         system call it was in, and which thread ran where the wakeup came from, in which call.
 * Misses: time that the hypervisor took from the CPU (steal), and a wakeup that found the thread still
 *         running: it never left. Whether a wakeup came from an interrupt is not told: the thread that
 *         ran there may only have stood by (the preemption counter cannot be read from tracepoints on
 *         kernels whose symbol table leaves per-CPU data out). A waker in a call is evidence, no proof.
 * Costs:  one program at every context switch and every wakeup of the host; a record per interval of a
 *         recorded thread. The switch program also carries the per-CPU state that makes the system call
 *         programs cheap, so it is attached for them, too.
 */
#ifndef SCOPE_OFFCPU_H
#define SCOPE_OFFCPU_H

#include "state.h"

enum {
	TASK_RUNNING = 0,
	TASK_WAKING = 0x200,
};

static __always_inline void write_offcpu(struct cpu_state *cpu, struct task_struct *task,
					 struct task_record *record, __u64 now)
{
	struct offcpu *offcpu;
	__u64 index, runnable_since = record->left_ns;

	offcpu = hot_reserve(cpu, &index);
	if (!offcpu) {
		count_loss(cpu, LOSS_OFFCPU);
		return;
	}
	offcpu->kind = RECORD_OFFCPU;
	offcpu->flags = record->left_status;
	offcpu->start_ns = record->left_ns;
	offcpu->duration_ns = now - record->left_ns;
	offcpu->tgid = task->tgid;
	offcpu->tid = task->pid;
	offcpu->state = record->left_state;
	offcpu->waker_tgid = offcpu->waker_tid = 0;
	offcpu->waker_number = NO_SYSCALL;
	offcpu->reserved = 0;
	if (record->left_state != TASK_RUNNING && record->woken_ns) {
		/* the last wakeup is the one that counts; it may have come while the thread was leaving */
		if (record->woken_ns > runnable_since)
			runnable_since = record->woken_ns;
		offcpu->waker_tgid = record->waker_tgid;
		offcpu->waker_tid = record->waker_tid;
		offcpu->waker_number = record->waker_number;
	}
	offcpu->runnable_ns = now - runnable_since;
	offcpu->number = record->in_flight ? record->flight.number : NO_SYSCALL;
	offcpu->syscall_start_ns = record->in_flight ? record->flight.start_ns : 0;
	commit(&offcpu->sequence, index);
}

static __always_inline void switch_out(struct cpu_state *cpu, struct task_struct *task, bool preempted,
				       __u32 state, __u64 now)
{
	struct task_record *record = record_of(task);

	if (!record)
		return;
	if (cpu->flight_task == (__u64)task) {
		record->flight = cpu->flight;
		record->in_flight = 1;
	}
	record->left_ns = now;
	record->left_state = preempted ? TASK_RUNNING : state;
	record->left_status = STATUS_COMPLETE;
}

static __always_inline void switch_in(struct cpu_state *cpu, struct task_struct *task, __u64 now)
{
	struct task_record *record = record_of(task);

	if (!record) {
		/* in a whole-host recording a thread is taken up at its next call */
		cpu->recheck = record_everything;
		return;
	}
	if (record->phase == PHASE_DORMANT)
		return;
	if (record_offcpu && record->left_ns)
		write_offcpu(cpu, task, record, now ?: bpf_ktime_get_ns());
	record->left_ns = record->woken_ns = 0;
	if (record->phase != PHASE_NORMAL) {
		/* the call programs find out what the phase means; without them it means nothing */
		cpu->recheck = record_syscalls || record_messages;
		if (cpu->recheck)
			return;
		record->phase = PHASE_NORMAL;
	}
	cpu->traced = (__u64)task;
	if (record->in_flight) {
		cpu->flight = record->flight;
		cpu->flight_task = (__u64)task;
		record->in_flight = 0;
	}
}

SEC("tp_btf/sched_switch")
int BPF_PROG(on_sched_switch, bool preempted, struct task_struct *previous, struct task_struct *next)
{
	struct cpu_state *cpu = this_cpu();
	__u32 state = 0;
	__u64 now = 0;

	if (!cpu)
		return 0;
	if (cpu->traced == (__u64)previous) {
		now = bpf_ktime_get_ns();
		/* a waker may already have set TASK_WAKING in the task (commit fa2c3254d7cf added the
		 * argument for that) */
		if (switch_tells_state)
			state = ctx[3];
		else
			state = task_state(previous);
		switch_out(cpu, previous, preempted, state, now);
	}
	cpu->traced = 0;
	cpu->flight_task = 0;
	cpu->recheck = 0;
	if (next->pid)
		switch_in(cpu, next, now);
	return 0;
}

SEC("tp_btf/sched_waking")
int BPF_PROG(on_sched_waking, struct task_struct *task)
{
	struct task_record *record = record_of(task);
	struct cpu_state *cpu = this_cpu();
	__u64 waker;

	if (!cpu || !record || record->phase == PHASE_DORMANT)
		return 0;
	waker = bpf_get_current_pid_tgid();
	record->waker_tgid = waker >> 32;
	record->waker_tid = waker;
	record->waker_number = NO_SYSCALL;
	if (cpu->flight_task == bpf_get_current_task())
		record->waker_number = cpu->flight.number;
	record->woken_ns = bpf_ktime_get_ns();
	return 0;
}

#endif
