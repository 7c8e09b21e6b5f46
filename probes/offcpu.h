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
 * Costs:  one program at every context switch (running.h) and every wakeup of the host; a record per
 *         interval of a recorded thread.
 */
#ifndef SCOPE_OFFCPU_H
#define SCOPE_OFFCPU_H

#include "state.h"

static __always_inline void write_offcpu(struct cpu_state *cpu, struct task_struct *task,
					 struct task_record *record, __u64 now)
{
	struct offcpu *offcpu;
	__u64 index;
	/* of a call that began before the recording all is known but its real start */
	bool in_call = record->in_flight ||
		       (record->left_status == STATUS_BEGAN_BEFORE && record->flight.start_ns);

	offcpu = hot_reserve(cpu, &index);
	if (!offcpu) {
		count_loss(cpu, LOSS_OFFCPU);
		return;
	}
	offcpu->kind = RECORD_OFFCPU;
	offcpu->flags = record->left_status;
	offcpu->start_ns = record->left_ns;
	offcpu->duration_ns = now - record->left_ns;
	offcpu->tgid = FIELD(task, tgid);
	offcpu->tid = FIELD(task, pid);
	offcpu->state = record->left_state;
	offcpu->waker_tgid = offcpu->waker_tid = 0;
	offcpu->waker_number = NO_SYSCALL;
	offcpu->reserved = 0;
	offcpu->runnable_ns = offcpu->duration_ns;
	if (record->left_state != TASK_RUNNING && !record->woken_ns) {
		offcpu->runnable_ns = UNKNOWN_NS;
	} else if (record->left_state != TASK_RUNNING) {
		/* the last wakeup is the one that counts; it may have come while the thread was leaving */
		if (record->woken_ns > record->left_ns)
			offcpu->runnable_ns = now - record->woken_ns;
		offcpu->waker_tgid = record->waker_tgid;
		offcpu->waker_tid = record->waker_tid;
		offcpu->waker_number = record->waker_number;
	}
	offcpu->number = in_call ? record->flight.number : NO_SYSCALL;
	offcpu->syscall_start_ns = in_call ? record->flight.start_ns : 0;
	commit(&offcpu->sequence, index);
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
	if (cpu->in_flight && cpu->in_flight == cpu->traced)
		record->waker_number = cpu->flight.number;
	record->woken_ns = bpf_ktime_get_ns();
	return 0;
}

#endif
