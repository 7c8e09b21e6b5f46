/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * System calls of recorded threads: one record per call, written at its exit.
 *
 * Sees:   every call of a recorded thread, 32-bit ones on a 64-bit kernel among them; calls that never
 *         return; calls that seccomp or a tracer refused; calls in flight when recording began or ended.
 * Misses: the vDSO (clock_gettime and friends do not enter the kernel), io_uring's operations, what
 *         pointers in the arguments point to, arguments after the third.
 * Costs:  two tracepoint programs per call of a recorded thread, one cache line of ring; every other
 *         thread of the host pays the kernel's slow path for traced calls and two short programs.
 */
#ifndef SCOPE_SYSCALLS_H
#define SCOPE_SYSCALLS_H

#include "running.h"
#include "state.h"

static __always_inline void write_call(struct cpu_state *cpu, struct flight *flight, __u64 duration_ns,
				       __s64 result, __u8 status)
{
	struct call *call;
	__u64 index;

	call = hot_reserve(cpu, &index);
	if (!call) {
		count_loss(cpu, LOSS_SYSCALLS);
		return;
	}
	call->number = flight->number;
	call->kind = RECORD_CALL;
	call->flags = status;
	call->start_ns = flight->start_ns;
	call->duration_ns = duration_ns;
	call->tgid = cpu->tgid;
	call->tid = cpu->tid;
	call->result = result;
	call->arg0 = flight->arg0;
	call->arg1 = flight->arg1;
	call->arg2 = flight->arg2;
	commit(&call->sequence, index);
}

static __always_inline void take_arguments(struct flight *flight, __u64 task, struct pt_regs *regs,
					   long number)
{
	if (task_is_compat(task)) {
		flight->number = (__u16)number | COMPAT_SYSCALL;
		flight->arg0 = COMPAT_ARG0(regs);
		flight->arg1 = COMPAT_ARG1(regs);
		flight->arg2 = COMPAT_ARG2(regs);
	} else {
		flight->number = number;
		flight->arg0 = SYSCALL_ARG0(regs);
		flight->arg1 = SYSCALL_ARG1(regs);
		flight->arg2 = SYSCALL_ARG2(regs);
	}
}

#include "messages.h"
#include "python.h"

enum {
	NOT_KNOWN = -1,
};

/* The call in flight is lost. */
static __always_inline void count_call(struct cpu_state *cpu)
{
	if (record_syscalls)
		count_loss(cpu, LOSS_SYSCALLS);
	if (record_messages && class_of(cpu->flight.number))
		count_loss(cpu, LOSS_MESSAGES);
}

/* Its context could not be told, so that it would seem to be of another one. */
static __always_inline bool refused(struct cpu_state *cpu)
{
	if (!cpu->flight.refused)
		return false;
	count_call(cpu);
	return true;
}

/* The rows of the call in flight, which has returned. */
static __always_inline void write_rows(struct cpu_state *cpu, struct pt_regs *regs, __s64 result,
				       __u64 duration_ns, __u32 status)
{
	bool python = cpu->interpreter;

	if (python && refused(cpu))
		return;
	if (!(record_messages && write_message(cpu, regs, result, duration_ns, status)) && record_syscalls)
		write_call(cpu, &cpu->flight, duration_ns, result, status);
	if (python && (cpu->waited_ns || cpu->turned || cpu->flight.number == munmap_number))
		after_call(WITH_CPU duration_ns, status);
}

/* From now on on_sched_switch takes `flight` away with the thread, and brings it back. */
static __always_inline void claim_flight(struct cpu_state *cpu, __u64 thread)
{
	if (programs_are_preempted) {
		cpu->in_flight = thread;
		barrier();
	}
}

static __always_inline void tell_context(struct cpu_state *cpu)
{
	stay();
	follow_context(cpu);
	leave();
}

/* look_up_running() for a program that may be preempted. */
static __always_inline enum found find_thread(struct cpu_state *cpu, __u64 thread, __u64 *since)
{
	enum found found;

	stay();
	found = look_up_running(cpu, thread, since);
	leave();
	return found;
}

static __always_inline int enter_call(struct pt_regs *regs, long number)
{
	struct cpu_state *cpu = this_cpu();
	__u64 thread = (__u64)regs, since;

	if (!cpu)
		return 0;
	if (cpu->traced != thread &&
	    (cpu->running == thread || find_thread(cpu, thread, &since) == FOUND_NOTHING))
		return 0;
	/* the end of the call before was not seen: the program for it was left out */
	if (programs_are_preempted && cpu->in_flight == thread)
		count_call(cpu);
	claim_flight(cpu, thread);
	take_arguments(&cpu->flight, cpu->task, regs, number);
	cpu->flight.refused = 0;
	if (record_contexts && cpu->interpreter)
		tell_context(cpu);
	cpu->in_flight = thread;
	cpu->flight.start_ns = bpf_ktime_get_ns();
	return 0;
}

SEC("tp_btf/sys_enter")
int WRITES_HOT(on_sys_enter, struct pt_regs *regs, long number)
{
	return enter_call(regs, number);
}

/*
 * Takes up a call whose entry was not seen: its number and arguments are still in the registers. Returns its
 * status, or NOT_KNOWN.
 */
static __noinline int take_missed_entry(struct cpu_state *cpu, struct pt_regs *regs, enum found found,
					__u64 since)
{
	struct flight *flight;

	if (!cpu)
		return NOT_KNOWN;
	flight = &cpu->flight;
	if (SYSCALL_NUMBER(regs) < 0)
		return NOT_KNOWN; /* a signal's return rewrote the registers */
	claim_flight(cpu, (__u64)regs);
	take_arguments(flight, cpu->task, regs, SYSCALL_NUMBER(regs));
	flight->refused = 0;
	if (record_contexts && cpu->interpreter)
		tell_context(cpu);
	if (found == FOUND_ATTACHED) {
		flight->start_ns = since;
		return STATUS_BEGAN_BEFORE;
	}
	flight->start_ns = bpf_ktime_get_ns();
	return STATUS_REFUSED;
}

static __always_inline int leave_call(void *ctx __attribute__((unused)), struct pt_regs *regs, long result)
{
	struct cpu_state *cpu = this_cpu();
	enum found found = FOUND_TRACED;
	__u64 duration_ns = 0, thread = (__u64)regs, since = 0;
	int status = STATUS_COMPLETE;

	if (!cpu)
		return 0;
	if (cpu->in_flight != thread) {
		if (cpu->traced != thread) {
			if (cpu->running == thread || !entries_seen)
				return 0;
			found = find_thread(cpu, thread, &since);
			if (found == FOUND_NOTHING || found == FOUND_NEWBORN)
				return 0;
		}
		if (cpu->in_flight != thread) {
			status = take_missed_entry(cpu, regs, found, since);
			if (status == NOT_KNOWN)
				return 0;
		}
	}
	if (status != STATUS_REFUSED)
		duration_ns = bpf_ktime_get_ns() - cpu->flight.start_ns;
	if (programs_are_preempted && !class_of(cpu->flight.number) && !cpu->interpreter) {
		if (record_syscalls)
			write_call(cpu, &cpu->flight, duration_ns, result, status);
		barrier();
		cpu->in_flight = 0;
		return 0;
	}
	stay();
	cpu->in_flight = 0;
#ifdef SCOPE_BCC
	if (record_messages && class_of(cpu->flight.number)) {
		cpu->reserved2[HANDED_DURATION] = duration_ns;
		cpu->reserved2[HANDED_STATUS] = status;
		if (result >= 0)
			meet_ends(cpu, class_of(cpu->flight.number), regs, result);
		stages.call(ctx, 0);
		count_loss(cpu, LOSS_MESSAGES);
		count_loss(cpu, LOSS_SYSCALLS);
	} else if (record_syscalls) {
		write_call(cpu, &cpu->flight, duration_ns, result, status);
	}
#else
	write_rows(cpu, regs, result, duration_ns, status);
#endif
	leave();
	return 0;
}

SEC("tp_btf/sys_exit")
int WRITES_HOT_MANY(on_sys_exit, struct pt_regs *regs, long result)
{
	return leave_call(ctx, regs, result);
}

#ifndef SCOPE_BCC
/*
 * Instead of these two where programs are preempted (see stay() in state.h), as programs of perf's events.
 * While a program at a tracepoint waits for its CPU, the kernel takes each other run of it there for a
 * recursion and leaves it out: a preempted thread costs the others their calls until it goes on. That a
 * program stays does not help, for it is preempted when it leaves. Perf's part of a tracepoint runs with
 * preemption disabled up to its end (commit 16718274ee75).
 *
 * Costs: 55 ns more per program, also for other threads (measured on 6.18). No sample is taken by a tick of
 * the sampling clock that interrupts these.
 */
SEC("tp/raw_syscalls/sys_enter")
int WRITES_AT(LEVEL_PROGRAM, on_sys_enter_event, __u64 *words)
{
	return enter_call((struct pt_regs *)bpf_task_pt_regs(bpf_get_current_task_btf()), words[1]);
}

SEC("tp/raw_syscalls/sys_exit")
int WRITES_AT(LEVEL_PROGRAM, on_sys_exit_event, __u64 *words)
{
	return leave_call(words, (struct pt_regs *)bpf_task_pt_regs(bpf_get_current_task_btf()), words[2]);
}
#endif

#ifdef SCOPE_BCC
/* The rest of on_sys_exit for calls that may move messages. */
SEC("tp_btf/")
int WRITES(on_message, struct pt_regs *regs, long result)
{
	struct cpu_state *cpu = this_cpu();

	if (cpu)
		write_rows(cpu, regs, result, cpu->reserved2[HANDED_DURATION],
			   cpu->reserved2[HANDED_STATUS]);
	return 0;
}
#endif

#endif
