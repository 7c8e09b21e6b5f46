/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * The second way of records to user space: perf ring buffers, one per CPU for hot and one for wide records.
 *
 * bpf_perf_event_output() wants the program's context, which functions that are looked at by themselves
 * cannot be given. So records are staged in memory of this CPU, and each program sends what it has staged
 * when it ends. A stage belongs to one run of a program at a time, so that no record is torn:
 *   LEVEL_PROGRAM: tracepoints and traps from user mode. Nothing that they share a stage with can interrupt
 *                  them: the kernel runs them with preemption off, or they stay() themselves.
 *   LEVEL_CLOCK:   the sampling clock, which interrupts the others.
 *   LEVEL_TASK:    uprobes and iterators. From 6.0 on (commit 8c7dcb84e3b7) another task may run, and hit
 *                  a probe, before such a program ends: so there are a few stages, and each has an owner.
 * The first two end before what they interrupted goes on, so that this CPU's `level` tells whose turn it is.
 *
 * Without fetching atomics, which the verifier refuses before 5.12 even where they are never reached: a
 * claim is counted and then read, and who reads another number than one takes the claim back.
 *
 * Sees:   as rings.h. The order of records on a CPU is that in which their programs ended.
 * Misses: what does not fit into a ring is counted by kind, as there; a stack of which the description takes
 *         more than STAGED_WIDE records is told in parts, at its next sights.
 * Costs:  220 ns per recorded call on top of rings.h: a copy, and the kernel's own bookkeeping.
 */
#ifndef SCOPE_PERF_H
#define SCOPE_PERF_H

#include "state.h"

/* A level is the number of its stage; that of tasks has those before. */
enum {
	LEVEL_TASK = 0,
	TASK_STAGES = 4,
	LEVEL_PROGRAM = TASK_STAGES,
	LEVEL_CLOCK,
	STAGES,
	STAGE_NUMBERS = 8, /* a power of two from STAGES on */
	STAGED_HOT = 16,
	STAGED_WIDE = 256,
	STAGED_FEW = 8,
	/* of all stages of a CPU */
	STAGED_WIDE_IN_ALL = TASK_STAGES * STAGED_FEW + 2 * STAGED_WIDE,
};

/* Bytes of a wide record, set by user space. */
const volatile __u32 wide_bytes = 512;
const volatile __u32 possible_cpus = 1;
/* Which loss it is when a record of a kind cannot be sent. */
#ifdef SCOPE_BCC /* has no constants in memory: four bits for each kind, from 16 on in the second word */
#define LOSS_OF(kind, loss) ((__u64)(loss) << 4 * ((kind) & 15))

static __always_inline __u32 loss_of(__u8 kind)
{
	__u64 losses = LOSS_OF(RECORD_CALL, LOSS_SYSCALLS) | LOSS_OF(RECORD_MESSAGE, LOSS_MESSAGES) |
		       LOSS_OF(RECORD_MESSAGE_CALL, LOSS_MESSAGES) | LOSS_OF(RECORD_OFFCPU, LOSS_OFFCPU) |
		       LOSS_OF(RECORD_PROCESS, LOSS_PROCESSES) |
		       LOSS_OF(RECORD_CONNECTION, LOSS_CONNECTIONS) |
		       LOSS_OF(RECORD_PAYLOAD, LOSS_PAYLOADS) | LOSS_OF(RECORD_CONNECT, LOSS_CONNECTS);

	if (kind > 15)
		losses = LOSS_OF(RECORD_CGROUP, LOSS_PROCESSES);
	return losses >> 4 * (kind & 15) & 15;
}
#else
const volatile __u8 loss_of_kind[32] = {
	[RECORD_CALL] = LOSS_SYSCALLS,
	[RECORD_MESSAGE] = LOSS_MESSAGES,
	[RECORD_MESSAGE_CALL] = LOSS_MESSAGES, /* and LOSS_SYSCALLS */
	[RECORD_OFFCPU] = LOSS_OFFCPU,
	[RECORD_PROCESS] = LOSS_PROCESSES,
	[RECORD_CGROUP] = LOSS_PROCESSES,
	[RECORD_CONNECTION] = LOSS_CONNECTIONS,
	[RECORD_PAYLOAD] = LOSS_PAYLOADS,
	[RECORD_CONNECT] = LOSS_CONNECTS,
	[RECORD_TLS] = LOSS_TLS,
	[RECORD_SAMPLE] = LOSS_SAMPLES,
	[RECORD_FLOW] = LOSS_CONTEXTS,
	[RECORD_CONTEXT] = LOSS_CONTEXTS,
	[RECORD_HANDOFF] = LOSS_HANDOFFS,
	[RECORD_GIL] = LOSS_GIL,
	[RECORD_STACK] = LOSS_STACKS,
	[RECORD_CODE] = LOSS_STACKS,
	[RECORD_HIT] = LOSS_HITS,
	[RECORD_PYTHON_CALL] = LOSS_HITS,
};

static __always_inline __u32 loss_of(__u8 kind)
{
	return loss_of_kind[kind & 31];
}
#endif

/* What a run of a program has staged. */
struct stage {
	__u64 claims;
	__u64 owner; /* tgid and tid; 0: none */
	__u64 numbers; /* ever given here */
	__u64 number; /* its own: loaded, so that the verifier takes each for the same */
	__u32 hot;
	__u32 wide;
};

struct staging {
	__u64 level;
	/* records that were counted in the heads and could not be sent */
	__u64 hot_failed;
	__u64 wide_failed;
	struct stage stages[STAGES];
};

struct staged_hot {
	__u64 words[HOT_SLOT_BYTES / 8];
};

/* Per CPU; user space sets the counts. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct staging);
} stagings SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, STAGES * STAGED_HOT);
	__type(key, __u32);
	__type(value, struct staged_hot);
} staged_hot SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, STAGED_WIDE_IN_ALL);
	__uint(key_size, sizeof(__u32));
	__uint(value_size, 512); /* wide_bytes */
} staged_wide SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_PERF_EVENT_ARRAY);
	__uint(max_entries, 1);
	__uint(key_size, sizeof(__u32));
	__uint(value_size, sizeof(__u32));
} hot SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_PERF_EVENT_ARRAY);
	__uint(max_entries, 1);
	__uint(key_size, sizeof(__u32));
	__uint(value_size, sizeof(__u32));
} wide SEC(".maps");

static __always_inline struct staging *this_staging(void)
{
	__u32 cpu = bpf_get_smp_processor_id();

	return bpf_map_lookup_elem(&stagings, &cpu);
}

/* The stage of the program that runs now, STAGES: it has none. */
static __always_inline __u32 stage_here(struct staging *staging)
{
	__u32 level = staging->level, i;
	__u64 owner;

	if (level != LEVEL_TASK)
		return level;
	owner = bpf_get_current_pid_tgid();
#pragma clang loop unroll(full)
	for (i = 0; i < TASK_STAGES; i++)
		if (staging->stages[i].owner == owner)
			return staging->stages[i].number;
	return STAGES;
}

static __always_inline __u32 wide_room(__u32 stage)
{
	return stage < TASK_STAGES ? STAGED_FEW : STAGED_WIDE;
}

static __always_inline __u32 staged_wide_at(__u32 stage, __u32 number)
{
	__u32 first = stage * STAGED_FEW;

	if (stage >= TASK_STAGES)
		first = TASK_STAGES * STAGED_FEW + (stage - TASK_STAGES) * STAGED_WIDE;
	return bpf_get_smp_processor_id() * STAGED_WIDE_IN_ALL + first + number;
}

static __always_inline __u32 staged_hot_at(__u32 stage, __u32 number)
{
	return (bpf_get_smp_processor_id() * STAGES + stage) * STAGED_HOT + number;
}

/*
 * Room in the stage of the program that runs now: which record of it in the lower bits, and above them an
 * index that no other record has; those of a CPU grow, but not by one. 0: the reader is behind, or the stage
 * is full. Functions that are looked at by themselves: elsewhere each of their ways would double what the
 * verifier has to walk.
 */
__noinline __u64 claim_hot(void)
{
	struct staging *staging = this_staging();
	struct cpu_state *cpu = this_cpu();
	struct stage *stage;
	__u32 number;

	if (!cpu || !staging ||
	    cpu->hot_head - cpu->hot_tail - staging->hot_failed >= hot_slots - RING_MARGIN)
		return 0;
	number = stage_here(staging);
	if (number >= STAGES)
		return 0;
	stage = &staging->stages[number];
	if (stage->hot >= STAGED_HOT)
		return 0;
	__sync_fetch_and_add(&cpu->hot_head, 1);
	return (cpu->hot_head * STAGE_NUMBERS + number) * STAGED_HOT + stage->hot++;
}

/* Likewise for a wide record; the last `spare` slots are not taken. */
__noinline __u64 claim_wide(__u32 spare)
{
	struct staging *staging = this_staging();
	struct cpu_state *cpu = this_cpu();
	struct stage *stage;
	__u32 number;

	if (!cpu || !staging ||
	    cpu->wide_head - cpu->wide_tail - staging->wide_failed >= wide_slots - RING_MARGIN - spare)
		return 0;
	number = stage_here(staging);
	if (number >= STAGES)
		return 0;
	stage = &staging->stages[number];
	if (stage->wide >= wide_room(number))
		return 0;
	__sync_fetch_and_add(&cpu->wide_head, 1);
	return (cpu->wide_head * STAGE_NUMBERS + number) * STAGED_WIDE + stage->wide++;
}

/* Room for a hot record, or NULL. The caller fills it and ends with commit(). Its index is left in *index. */
static __always_inline void *hot_reserve(struct cpu_state *cpu, __u64 *index)
{
	__u64 claim = claim_hot();
	__u32 at;

	if (!claim)
		return NULL;
	*index = claim / STAGED_HOT;
	at = staged_hot_at(*index % STAGE_NUMBERS, claim % STAGED_HOT);
	return bpf_map_lookup_elem(&staged_hot, &at);
}

/* Likewise for a wide record. */
static __always_inline void *wide_reserve(struct cpu_state *cpu, __u64 *index, __u32 spare)
{
	__u64 claim = claim_wide(spare);
	__u32 at;

	if (!claim)
		return NULL;
	*index = claim / STAGED_WIDE;
	at = staged_wide_at(*index % STAGE_NUMBERS, claim % STAGED_WIDE);
	return bpf_map_lookup_elem(&staged_wide, &at);
}

/* User space learns the index from the sequence. */
static __always_inline void commit(__u32 *sequence, __u64 index)
{
	*sequence = (__u32)index + 1;
}

/* A record of a kind could not be sent. */
__noinline int count_unsent(__u32 kind)
{
	struct cpu_state *cpu = this_cpu();
	__u32 loss = loss_of(kind);

	if (!cpu)
		return 0;
	if (kind == RECORD_MESSAGE_CALL)
		count_loss(cpu, LOSS_SYSCALLS);
	if (loss < LOSS_KINDS)
		count_loss(cpu, loss);
	return 0;
}

/* Sends what a stage has. */
static __always_inline int send_up_to(__u32 limit, void *context, struct staging *staging, __u32 number)
{
	void *record;
	__u32 i, at;

	if (!staging || number >= STAGES)
		return 0;
	for (i = 0; i < limit && i < staging->stages[number].wide; i++) {
		at = staged_wide_at(number, i);
		record = bpf_map_lookup_elem(&staged_wide, &at);
		if (!record)
			break;
		if (bpf_perf_event_output(context, &wide, BPF_F_CURRENT_CPU, record, wide_bytes)) {
			__sync_fetch_and_add(&staging->wide_failed, 1);
			count_unsent(((struct call *)record)->kind);
		}
	}
	staging->stages[number].wide = 0;
	return 0;
}

static __noinline int send_many(void *context, struct staging *staging, __u32 number)
{
	return send_up_to(STAGED_WIDE, context, staging, number);
}

static __noinline int send_few(void *context, struct staging *staging, __u32 number)
{
	return send_up_to(STAGED_FEW, context, staging, number);
}

static __noinline int send_hot(void *context, struct staging *staging, __u32 number)
{
	void *record;
	__u32 i, at;

	if (!staging || number >= STAGES)
		return 0;
	for (i = 0; i < STAGED_HOT && i < staging->stages[number].hot; i++) {
		at = staged_hot_at(number, i);
		record = bpf_map_lookup_elem(&staged_hot, &at);
		if (!record)
			break;
		if (bpf_perf_event_output(context, &hot, BPF_F_CURRENT_CPU, record, HOT_SLOT_BYTES)) {
			__sync_fetch_and_add(&staging->hot_failed, 1);
			count_unsent(((struct call *)record)->kind);
		}
	}
	staging->stages[number].hot = 0;
	return 0;
}

/* A program begins: takes a stage. Returns the level to go back to. */
static __always_inline __u64 begin_level(__u64 level)
{
	struct staging *staging = this_staging();
	__u64 before;
	__u32 i;

	if (!staging)
		return level;
	before = staging->level;
	if (level != LEVEL_TASK) {
		staging->level = level;
		return before;
	}
	for (i = 0; i < TASK_STAGES; i++) {
		__sync_fetch_and_add(&staging->stages[i].claims, 1);
		barrier();
		if (*(volatile __u64 *)&staging->stages[i].claims == 1) {
			staging->stages[i].number = i;
			staging->stages[i].owner = bpf_get_current_pid_tgid();
			break;
		}
		__sync_fetch_and_add(&staging->stages[i].claims, -1);
	}
	return before;
}

/* The program ends. */
static __always_inline void end_level(void *context, __u64 level, __u64 before,
				      int (*send)(void *, struct staging *, __u32))
{
	struct staging *staging = this_staging();
	struct stage *stage;
	__u32 number;

	if (!staging)
		return;
	number = level == LEVEL_TASK ? stage_here(staging) : level;
	if (number >= STAGES)
		return;
	stage = &staging->stages[number];
	/* a payload before its message */
	if (stage->wide)
		send(context, staging, number);
	if (stage->hot)
		send_hot(context, staging, number);
	if (level != LEVEL_TASK) {
		staging->level = before;
		return;
	}
	stage->owner = 0;
	barrier();
	__sync_fetch_and_add(&stage->claims, -1);
}

/* A program that writes a few records, at a tracepoint: as BPF_PROG(). */
#define WRITES(name, args...) WRITES_UP_TO(few, name, ##args)
/* Here the same, see rings.h. */
#define WRITES_HOT(name, args...) WRITES_UP_TO(few, name, ##args)
/* Likewise, that may tell stacks. */
#define WRITES_HOT_MANY(name, args...) WRITES_UP_TO(many, name, ##args)

#define WRITES_UP_TO(count, name, args...)                                                      \
	name(unsigned long long *ctx);                                                          \
	static __always_inline typeof(name(0)) ____##name(unsigned long long *ctx, ##args);     \
	typeof(name(0)) name(unsigned long long *ctx)                                           \
	{                                                                                       \
		__u64 before;                                                                   \
                                                                                                \
		stay();                                                                         \
		before = begin_level(LEVEL_PROGRAM);                                            \
		_Pragma("GCC diagnostic push")                                                  \
		_Pragma("GCC diagnostic ignored \"-Wint-conversion\"")                          \
		____##name(___bpf_ctx_cast(args));                                              \
		_Pragma("GCC diagnostic pop")                                                   \
		end_level(ctx, LEVEL_PROGRAM, before, send_##count);                            \
		leave();                                                                        \
		return 0;                                                                       \
	}                                                                                       \
	static __always_inline typeof(name(0)) ____##name(unsigned long long *ctx, ##args)

/* Elsewhere, with what it gets. */
#define WRITES_AT(level, name, context)                                                         \
	name(void *ctx);                                                                        \
	static __always_inline typeof(name(0)) ____##name(context);                             \
	typeof(name(0)) name(void *ctx)                                                         \
	{                                                                                       \
		__u64 before = begin_level(level);                                              \
                                                                                                \
		____##name(ctx);                                                                \
		end_level(ctx, level, before, level == LEVEL_TASK ? send_few : send_many);      \
		return 0;                                                                       \
	}                                                                                       \
	static __always_inline typeof(name(0)) ____##name(context)

/*
 * Numbers that are given once. A stage is nobody else's, so it counts without atomics. A program that has
 * none takes the time: its records are counted as lost anyway.
 */
static __always_inline __u64 new_number(struct cpu_state *cpu) /* on this CPU */
{
	struct staging *staging = this_staging();
	__u32 number;

	if (!staging)
		return bpf_ktime_get_ns();
	number = stage_here(staging);
	if (number >= STAGES)
		return bpf_ktime_get_ns() << 3 | (STAGE_NUMBERS - 1);
	return ++staging->stages[number].numbers * STAGE_NUMBERS + number;
}

static __always_inline __u32 new_connection_number(void)
{
	__u32 number = new_number(NULL);

	return number * possible_cpus + bpf_get_smp_processor_id();
}

/*
 * Adds to what another CPU may add to; returns what it was before. That is not exact when two CPUs add in
 * the same instant: they may both get the later value.
 */
#define ADD_TO(place, number)                                            \
	({                                                               \
		__sync_fetch_and_add(place, number);                     \
		*(volatile typeof(*(place)) *)(place) - (number);        \
	})

#endif
