/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Processes and threads: who is recorded, and their births, programs and deaths.
 *
 * Sees:   fork, thread creation, exec with its command line, exit with its code or signal; membership of
 *         the recording is inherited at fork, in the kernel, before the child can do anything.
 * Misses: command lines over 384 bytes are cut (their full length is kept); a process that was detached
 *         from its ancestors before the recording began is not found as their descendant.
 * Costs:  nothing per event but these rare ones.
 *
 * The iterators run when user space asks: on_mark_tasks takes up what runs already, on_list_calls hands
 * out what is still in flight at the end.
 */
#ifndef SCOPE_PROCESSES_H
#define SCOPE_PROCESSES_H

#include "state.h"
#include "running.h"
#include "syscalls.h"

enum {
	MAX_ANCESTORS = 64,
};

static __always_inline struct process *process_reserve(struct cpu_state *cpu, struct task_struct *task,
						       __u8 event, __u64 *index)
{
	struct process *process = wide_reserve(cpu, index, 0);

	if (!process) {
		count_loss(cpu, LOSS_PROCESSES);
		return NULL;
	}
	process->kind = RECORD_PROCESS;
	process->event = event;
	process->time_ns = bpf_ktime_get_ns();
	process->tgid = ARG_FIELD(task, tgid);
	process->tid = ARG_FIELD(task, pid);
	process->parent_tgid = ARG_FIELD(task, real_parent, tgid);
	process->parent_tid = 0;
	process->cgroup = cgroup_of(task);
	process->start_boottime_ns = start_boottime_of(task);
	process->exit_code = 0;
	process->command_line_bytes = 0;
	process->command_line_total_bytes = 0;
	bpf_probe_read_kernel(process->comm, sizeof(process->comm), task->comm);
	return process;
}

/* A fork has all at the same addresses. */
static __always_inline void inherit_interpreter(__u32 parent, __u32 child)
{
	__u32 *known = bpf_map_lookup_elem(&pythons, &parent), index;

	if (!known)
		return;
	index = *known;
	bpf_map_update_elem(&pythons, &child, &index, BPF_ANY);
}

SEC("tp_btf/sched_process_fork")
int WRITES(on_fork, struct task_struct *parent, struct task_struct *child)
{
	struct cpu_state *cpu = this_cpu();
	bool thread = ARG_FIELD(parent, tgid) == ARG_FIELD(child, tgid);
	struct task_record *record, fresh = {};
	struct process *process;
	__u64 index;

	if (!cpu)
		return 0;
	forget_before(child);
	record = record_of(parent);
	if (record ? record->phase == PHASE_DORMANT || (!thread && !follow_children)
		   : !record_everything || ARG_FIELD(parent, tgid) == recorder_tgid ||
			     ARG_FIELD(child, flags) & PF_KTHREAD)
		return 0;
	fresh.phase = PHASE_NEWBORN;
	fresh.left_ns = bpf_ktime_get_ns();
	fresh.left_state = TASK_RUNNING;
	if (!new_record_of(child, &fresh)) {
		count_loss(cpu, LOSS_TASKS);
		return 0;
	}
	if (!thread)
		inherit_interpreter(ARG_FIELD(parent, tgid), ARG_FIELD(child, tgid));
	process = process_reserve(cpu, child, thread ? PROCESS_THREAD : PROCESS_FORK, &index);
	if (!process)
		return 0;
	process->parent_tgid = ARG_FIELD(parent, tgid);
	process->parent_tid = ARG_FIELD(parent, pid);
	commit(&process->sequence, index);
	return 0;
}

static __always_inline void forget_interpreter(__u32 tgid)
{
	if (bpf_map_lookup_elem(&pythons, &tgid))
		bpf_map_delete_elem(&pythons, &tgid);
}

static __always_inline int executed(struct task_struct *task, int old_tid)
{
	struct cpu_state *cpu = this_cpu();
	struct task_record *record, fresh = {.phase = PHASE_NEWBORN};
	struct process *process;
	__u64 index, start, length;

	move_record(old_tid, ARG_FIELD(task, pid));
	record = record_of(task);
	/* a helper of the kernel: up to 5.18 it is one of its threads until now */
	if (!record && record_everything && ARG_FIELD(task, tgid) != recorder_tgid)
		record = new_record_of(task, &fresh);
	if (!cpu || !record)
		return 0;
	if (record->phase == PHASE_DORMANT) {
		/* from here on; the exit of this execve, whose entry was not recorded, is skipped */
		record->phase = PHASE_NEWBORN;
		cpu->running = 0;
	}
	/* a thread that executes a program takes its leader's id over */
	cpu->tid = ARG_FIELD(task, pid);
	if (cpu->interpreter) {
		if (cpu->context)
			write_flow(cpu, 0);
		cpu->interpreter = record->interpreter = 0;
	}
	forget_interpreter(ARG_FIELD(task, tgid));
	process = process_reserve(cpu, task, PROCESS_EXEC, &index);
	if (!process)
		return 0;
	process->parent_tid = old_tid;
	start = ARG_FIELD(task, mm, arg_start);
	length = ARG_FIELD(task, mm, arg_end) - start;
	process->command_line_total_bytes = length;
	if (length > COMMAND_LINE_BYTES)
		length = COMMAND_LINE_BYTES;
	if (!bpf_probe_read_user(process->command_line, length, (void *)start))
		process->command_line_bytes = length;
	commit(&process->sequence, index);
	return 0;
}

SEC("tp_btf/sched_process_exec")
int WRITES(on_exec, struct task_struct *task, int old_tid, struct linux_binprm *bprm)
{
	return executed(task, old_tid);
}

#ifndef SCOPE_BCC
/* Instead of on_exec and on_exit where these are preempted, and left out for others: see syscalls.h. */
SEC("tp/sched/sched_process_exec")
int WRITES_AT(LEVEL_PROGRAM, on_exec_event, __u32 *words)
{
	/* behind the common fields and where the file name is: pid, old_pid */
	return executed(bpf_get_current_task_btf(), words[4]);
}
#endif

/*
 * Whether this is the end of the process. do_exit() has counted this thread off already; of threads that
 * did so in the same instant each finds that none is left, and the first one here tells it.
 */
static __always_inline bool ends_process(struct task_struct *task)
{
	return !ARG_FIELD(task, signal, live.counter) && is_first_to_end(ARG_FIELD(task, group_leader));
}

/* What the parent gets from wait: as wait_task_zombie() finds it. */
static __always_inline int wait_status(struct task_struct *task)
{
	if (ARG_FIELD(task, signal, flags) & SIGNAL_GROUP_EXIT)
		return ARG_FIELD(task, signal, group_exit_code);
	return ARG_FIELD(task, group_leader, exit_code);
}

static __always_inline int exited(struct task_struct *task)
{
	struct cpu_state *cpu = this_cpu();
	struct task_record *record = record_of(task);
	struct process *process;
	bool last;
	__u64 index;

	if (!cpu || !record || record->phase == PHASE_DORMANT)
		return 0;
	if (cpu->task == (__u64)task && cpu->in_flight) {
		if (record_syscalls)
			write_call(cpu, &cpu->flight, bpf_ktime_get_ns() - cpu->flight.start_ns, 0,
				   STATUS_NO_RETURN);
		cpu->in_flight = 0;
	}
	last = ends_process(task);
	if (last)
		forget_interpreter(ARG_FIELD(task, tgid));
	process = process_reserve(cpu, task, last ? PROCESS_EXIT : PROCESS_THREAD_EXIT, &index);
	forget_ended(task);
	if (!process)
		return 0;
	process->exit_code = last ? wait_status(task) : ARG_FIELD(task, exit_code);
	commit(&process->sequence, index);
	return 0;
}

SEC("tp_btf/sched_process_exit")
int WRITES(on_exit, struct task_struct *task)
{
	return exited(task);
}

#ifndef SCOPE_BCC
SEC("tp/sched/sched_process_exit")
int WRITES_AT(LEVEL_PROGRAM, on_exit_event, void *context)
{
	return exited(bpf_get_current_task_btf());
}
#endif

/* It may be gone before user space can look for it: what a container runs may take a moment only. */
static __always_inline void write_cgroup(struct cgroup *cgroup, const char *path)
{
	struct cpu_state *cpu = this_cpu();
	struct process *process;
	__u64 index;
	long length;

	if (!cpu)
		return;
	/* who made it does not matter */
	process = wide_reserve(cpu, &index, 0);
	if (!process) {
		count_loss(cpu, LOSS_PROCESSES);
		return;
	}
	process->kind = RECORD_CGROUP;
	process->event = PROCESS_ALIVE;
	process->time_ns = bpf_ktime_get_ns();
	process->cgroup = ARG_FIELD(cgroup, kn, id);
	process->command_line_bytes = 0;
	process->command_line_total_bytes = 0;
	length = bpf_probe_read_kernel_str(process->command_line, COMMAND_LINE_BYTES, path);
	/* with the zero at its end; one that does not fit is looked for */
	if (length > 1 && length < COMMAND_LINE_BYTES)
		process->command_line_bytes = length - 1;
	commit(&process->sequence, index);
}

/* A cgroup below a recorded one belongs to it. */
SEC("tp_btf/cgroup_mkdir")
int WRITES(on_cgroup_mkdir, struct cgroup *cgroup, const char *path)
{
	__u64 parent, id = ARG_FIELD(cgroup, kn, id);
	__u32 *kind;

	if (ARG_FIELD(cgroup, root, hierarchy_id))
		return 0;
	if (record_everything) {
		write_cgroup(cgroup, path);
		return 0;
	}
	parent = ARG_FIELD(cgroup, self.parent, cgroup, kn, id);
	kind = bpf_map_lookup_elem(&cgroups, &parent);
	if (kind) {
		bpf_map_update_elem(&cgroups, &id, kind, BPF_ANY);
		write_cgroup(cgroup, path);
	}
	return 0;
}

/*
 * A process was moved: into a recorded cgroup, then user space marks its threads; or out of it, then
 * they stay recorded, as their children are.
 */
SEC("tp_btf/cgroup_attach_task")
int WRITES(on_cgroup_attach, struct cgroup *cgroup, const char *path, struct task_struct *task,
	     bool threadgroup)
{
	__u64 id = ARG_FIELD(cgroup, kn, id), index;
	struct cpu_state *cpu = this_cpu();
	struct task_record *record;
	struct process *process;

	if (!cpu || ARG_FIELD(cgroup, root, hierarchy_id))
		return 0;
	record = record_of(task);
	if (!record) {
		if (bpf_map_lookup_elem(&cgroups, &id))
			__sync_fetch_and_add(&marks_wanted, 1);
		return 0;
	}
	if (record->phase == PHASE_DORMANT)
		return 0;
	process = process_reserve(cpu, task, PROCESS_MOVED, &index);
	if (!process)
		return 0;
	process->cgroup = id;
	commit(&process->sequence, index);
	return 0;
}

#ifndef SCOPE_BCC /* it has no iterators: loaders/bcc_life.py reads /proc */

static __always_inline __u32 wanted(struct task_struct *task)
{
	struct task_struct *ancestor = task->group_leader;
	__u32 tgid, *kind;
	int i;

	if (task->flags & PF_KTHREAD || task->tgid == recorder_tgid)
		return 0;
	if (record_everything)
		return TARGET_NOW;
	if (seek_cgroups) {
		__u64 cgroup = cgroup_of(task);

		return bpf_map_lookup_elem(&cgroups, &cgroup) ? TARGET_NOW : 0;
	}
	for (i = 0; i < MAX_ANCESTORS; i++) {
		tgid = BPF_CORE_READ(ancestor, tgid);
		kind = bpf_map_lookup_elem(&targets, &tgid);
		if (kind)
			return *kind;
		if (!follow_children || tgid <= 1)
			break;
		ancestor = BPF_CORE_READ(ancestor, real_parent, group_leader);
	}
	return 0;
}

/*
 * Whether it has the name of one of io_uring's own threads: iou-wrk-TID or iou-sqp-TID. These make no calls:
 * what looks like one is left of the thread that made them.
 */
static __always_inline bool is_named_worker(struct task_struct *task)
{
	return FIELD(task, comm[0]) == 'i' && FIELD(task, comm[2]) == 'u' && FIELD(task, comm[3]) == '-' &&
	       FIELD(task, comm[7]) == '-';
}

#ifdef OLD_KERNELS
enum { KERNEL_STACK_BYTES = 16384 }; /* 4 pages; kernels with KASAN have more, and there no call is found */

static __always_inline void find_call_in_stack(struct task_struct *task, struct flight *flight, __u64 since)
{
	void *end = task->stack + KERNEL_STACK_BYTES;
	struct pt_regs *regs = (struct pt_regs *)(end - bpf_core_type_size(struct pt_regs));
	long number = SAVED(regs, SYSCALL_NUMBER_FIELD);

	if (!task->stack || !SAVED_IN_USER_MODE(regs) || number < 0)
		return;
	flight->number = number;
	flight->arg0 = SAVED(regs, SYSCALL_ARG0_FIELD);
	flight->arg1 = SAVED(regs, SYSCALL_ARG1_FIELD);
	flight->arg2 = SAVED(regs, SYSCALL_ARG2_FIELD);
	flight->start_ns = since;
}
#endif

/* The call that a sleeping thread is inside of, whose entry was not seen; start_ns stays 0 for none. */
static __always_inline void find_call(struct task_struct *task, struct flight *flight, __u64 since)
{
	struct pt_regs *regs;

	if (is_named_worker(task))
		return; /* it waits for work */
#ifdef OLD_KERNELS
	/* before 5.15 (commit dd6e10fbd9fb): they are at the end of the kernel stack */
	if (!bpf_core_enum_value_exists(enum bpf_func_id, BPF_FUNC_task_pt_regs)) {
		find_call_in_stack(task, flight, since);
		return;
	}
#endif
	regs = (struct pt_regs *)bpf_task_pt_regs(task);
	if (SYSCALL_NUMBER(regs) < 0)
		return; /* it waits for a page */
	take_arguments(flight, (__u64)task, regs, SYSCALL_NUMBER(regs));
	flight->start_ns = since;
}

/* Marks every running task that is a target and writes one marked_task for it. */
SEC("iter/task")
int on_mark_tasks(struct bpf_iter__task *ctx)
{
	struct task_struct *task = ctx->task;
	struct marked_task marked = {};
	struct task_record *record, fresh = {};
	__u32 kind;

	/* of a process that ended, what is left waits for its parent */
	if (!task || !task->signal->live.counter)
		return 0;
	kind = wanted(task);
	if (!kind)
		return 0;
	if (record_messages && bpf_core_field_exists(task->io_uring) && task->io_uring)
		rings_met = rings_met ?: RING_MET;
	record = record_of(task);
	/* what does not fit into one read of user space is thrown away, and the task comes again at the next */
	marked.seen_before = record && !record->untold;
	if (!record) {
		fresh.untold = 1;
		fresh.marked_ns = bpf_ktime_get_ns();
		fresh.phase = kind == TARGET_AFTER_EXEC ? PHASE_DORMANT : PHASE_ATTACHED;
		if (!task->on_cpu && fresh.phase == PHASE_ATTACHED) {
			fresh.left_ns = fresh.marked_ns;
			fresh.left_state = task_state(task);
			fresh.left_status = STATUS_BEGAN_BEFORE;
			if (fresh.left_state != TASK_RUNNING)
				find_call(task, &fresh.flight, fresh.marked_ns);
		}
		record = new_record_of(task, &fresh);
		if (!record) {
			struct cpu_state *cpu = this_cpu();

			if (cpu)
				count_loss(cpu, LOSS_TASKS);
			return 0;
		}
	}
	marked.tgid = task->tgid;
	marked.tid = task->pid;
	marked.parent_tgid = task->real_parent->tgid;
	marked.cgroup = cgroup_of(task);
	marked.start_boottime_ns = task->start_boottime;
	bpf_probe_read_kernel(marked.comm, sizeof(marked.comm), task->comm);
	if (!bpf_seq_write(ctx->meta->seq, &marked, sizeof(marked)))
		record->untold = 0;
	return 0;
}

/* Writes one call per call in flight and one offcpu per thread off the CPU: run at the end. */
SEC("iter/task")
int on_list_open(struct bpf_iter__task *ctx)
{
	struct task_struct *task = ctx->task;
	struct task_record *record;
	struct offcpu offcpu = {};
	struct call call = {};
	struct flight *flight = NULL;
	__u8 status = STATUS_OPEN;
	struct cpu_state *cpu;
	__u64 now;
	__u32 number;

	if (!task)
		return 0;
	record = record_of(task);
	if (!record || record->phase == PHASE_DORMANT || task->exit_state)
		return 0;
	now = bpf_ktime_get_ns();
	if (record->in_flight) {
		flight = &record->flight;
	} else if (record->phase == PHASE_ATTACHED && record->flight.start_ns) {
		flight = &record->flight;
		status = STATUS_THROUGHOUT;
	} else {
		number = task_cpu(task);
		cpu = bpf_map_lookup_elem(&cpus, &number);
		if (cpu && cpu->task == (__u64)task && cpu->in_flight)
			flight = &cpu->flight;
	}
	if (flight && record_syscalls) {
		call.number = flight->number;
		call.kind = RECORD_CALL;
		call.flags = status;
		call.start_ns = flight->start_ns;
		call.duration_ns = now - flight->start_ns;
		call.tgid = task->tgid;
		call.tid = task->pid;
		call.arg0 = flight->arg0;
		call.arg1 = flight->arg1;
		call.arg2 = flight->arg2;
		bpf_seq_write(ctx->meta->seq, &call, sizeof(call));
	}
	if (record->left_ns && record_offcpu) {
		offcpu.waker_number = NO_SYSCALL;
		offcpu.number = flight ? flight->number : NO_SYSCALL;
		offcpu.kind = RECORD_OFFCPU;
		offcpu.flags = record->left_status == STATUS_BEGAN_BEFORE ? STATUS_THROUGHOUT : STATUS_OPEN;
		offcpu.start_ns = record->left_ns;
		offcpu.duration_ns = now - record->left_ns;
		offcpu.tgid = task->tgid;
		offcpu.tid = task->pid;
		offcpu.state = record->left_state;
		offcpu.runnable_ns = UNKNOWN_NS;
		if (record->left_state == TASK_RUNNING)
			offcpu.runnable_ns = offcpu.duration_ns;
		else if (!record->woken_ns && record->left_status == STATUS_COMPLETE)
			offcpu.runnable_ns = 0;
		offcpu.syscall_start_ns = flight ? flight->start_ns : 0;
		bpf_seq_write(ctx->meta->seq, &offcpu, sizeof(offcpu));
	}
	return 0;
}

#endif

#endif
