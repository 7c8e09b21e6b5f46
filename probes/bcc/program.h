/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Stands before every program that a user gives with --bcc-probe; BCC compiles both as one text.
 *
 * Sees:   each record that the program submits and that does not fit, so that none is lost silently: BCC
 *         turns perf_submit() and the like into calls of the kernel's helpers, which the macros below catch
 *         when the result is compiled. Which processes are recorded, for scope_is_recorded().
 * Misses: what ringbuf_output() with a dynptr cannot place.
 * Costs:  a comparison per record. With scope_is_recorded(): three programs at each fork, exec and exit of
 *         the host, and a look-up per question.
 *
 * Set by user space: SCOPE_CPUS, SCOPE_OUTPUTS; SCOPE_FOLLOWS if the program asks scope_is_recorded(), then
 * SCOPE_EVERYTHING, SCOPE_CHILDREN and SCOPE_RECORDER. Functions that are here must be static or begin with
 * scope_: every other one is a program of the user's.
 */

/* ---- what was lost ------------------------------------------------------------------------------- */

/* By output and CPU. BCC numbers a program's maps -1, -2, …: this one is the first. */
BPF_F_TABLE("array", u32, u64, scope_lost, SCOPE_OUTPUTS * SCOPE_CPUS, BPF_F_MMAPABLE);

static inline void scope_count(int map)
{
	u32 place = (u32)(-2 - map) * SCOPE_CPUS + bpf_get_smp_processor_id();
	u64 *count = scope_lost.lookup(&place);

	if (count)
		__sync_fetch_and_add(count, 1);
}

static inline long scope_sent(long result, int map)
{
	if (result < 0)
		scope_count(map);
	return result;
}

static inline void *scope_reserved(void *room, int map)
{
	if (!room)
		scope_count(map);
	return room;
}

/* BCC writes `(void *)bpf_pseudo_fd(1, -3)` for a map: the cast goes, and the number is taken out. */
#define SCOPE_NO_CAST(cast)
#define SCOPE_MAP_bpf_pseudo_fd(kind, number) (number)
#define SCOPE_PERF(context, map, ...) \
	scope_sent(bpf_perf_event_output(context, (void *)map, __VA_ARGS__), SCOPE_MAP_##map)
#define SCOPE_PERF_PLAIN(context, map, ...) SCOPE_PERF(context, map, __VA_ARGS__)
#define bpf_perf_event_output(context, map, ...) \
	SCOPE_PERF_PLAIN(context, SCOPE_NO_CAST map, __VA_ARGS__)
#define SCOPE_RING(map, ...) \
	scope_sent(bpf_ringbuf_output((void *)map, __VA_ARGS__), SCOPE_MAP_##map)
#define SCOPE_RING_PLAIN(map, ...) SCOPE_RING(map, __VA_ARGS__)
#define bpf_ringbuf_output(map, ...) SCOPE_RING_PLAIN(SCOPE_NO_CAST map, __VA_ARGS__)
#define SCOPE_ROOM(map, ...) \
	scope_reserved(bpf_ringbuf_reserve((void *)map, __VA_ARGS__), SCOPE_MAP_##map)
#define SCOPE_ROOM_PLAIN(map, ...) SCOPE_ROOM(map, __VA_ARGS__)
#define bpf_ringbuf_reserve(map, ...) SCOPE_ROOM_PLAIN(SCOPE_NO_CAST map, __VA_ARGS__)

/* ---- where its functions go, beside BCC's own conventions ----------------------------------------- */

/* Read by user space from the source; the compiler sees nothing. */
#define SCOPE_USDT(file, provider, name, function)
#define SCOPE_UPROBE(file, symbol, function)
#define SCOPE_URETPROBE(file, symbol, function)

/* ---- who is recorded ------------------------------------------------------------------------------- */

#ifdef SCOPE_FOLLOWS
#include <linux/sched.h>
#include <linux/sched/signal.h>

/* tgid: 1, or 2 if it counts only once it has executed another program */
BPF_HASH(scope_processes, u32, u32, 65536);

/* Whether the current process is recorded: a target, or a child of one if children are followed. */
static inline bool scope_is_recorded(void)
{
	u32 tgid = bpf_get_current_pid_tgid() >> 32;
	u32 *known;

	if (SCOPE_EVERYTHING)
		return tgid != SCOPE_RECORDER;
	known = scope_processes.lookup(&tgid);
	return known && *known == 1;
}

int scope_on_fork(struct bpf_raw_tracepoint_args *ctx)
{
	struct task_struct *task = (struct task_struct *)ctx->args[1];
	u32 parent = bpf_get_current_pid_tgid() >> 32, child = 0, *known;

	bpf_probe_read_kernel(&child, sizeof(child), &task->tgid);
	known = scope_processes.lookup(&parent);
	if (SCOPE_CHILDREN && known && *known == 1 && child != parent)
		scope_processes.update(&child, known);
	return 0;
}

int scope_on_exec(struct bpf_raw_tracepoint_args *ctx)
{
	u32 tgid = bpf_get_current_pid_tgid() >> 32, *known = scope_processes.lookup(&tgid);

	if (known)
		*known = 1;
	return 0;
}

int scope_on_exit(struct bpf_raw_tracepoint_args *ctx)
{
	struct task_struct *task = (struct task_struct *)ctx->args[0];
	u32 tgid = bpf_get_current_pid_tgid() >> 32;
	struct signal_struct *signal = NULL;
	int live = 1;

	bpf_probe_read_kernel(&signal, sizeof(signal), &task->signal);
	bpf_probe_read_kernel(&live, sizeof(live), &signal->live.counter);
	if (!live)
		scope_processes.delete(&tgid);
	return 0;
}
#endif
