/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * The first way of records to user space: rings in mapped memory.
 *
 * They are arrays that user space maps: slots of a fixed size, one run of slots per CPU, a head that only
 * producers move and a tail that only the reader moves. Against BPF_MAP_TYPE_RINGBUF that saves two
 * helper calls and a lock per record (22 ns of 250 ns per recorded call, measured). Atomic fetch-and-add,
 * since 5.12 (commit 5ca419f2864a), lets programs that interrupt each other take slots.
 */
#ifndef SCOPE_RINGS_H
#define SCOPE_RINGS_H

#include "state.h"

struct hot_slot {
	__u64 words[HOT_SLOT_BYTES / 8];
};

/* Element counts of the arrays are set by user space to fit the host. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct hot_slot);
} hot SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, 1);
	__uint(key_size, sizeof(__u32));
	__uint(value_size, 512); /* set by user space: header and payload_limit */
} wide SEC(".maps");

/* A program that writes records, at a tracepoint: as BPF_PROG(). It stays on its CPU. */
#ifdef SCOPE_BCC
#define WRITES(name, args...) BPF_PROG(name, ##args)
#else
#define WRITES(name, args...)                                                                   \
	name(unsigned long long *ctx);                                                          \
	static __always_inline typeof(name(0)) ____##name(unsigned long long *ctx, ##args);     \
	typeof(name(0)) name(unsigned long long *ctx)                                           \
	{                                                                                       \
		stay();                                                                         \
		_Pragma("GCC diagnostic push")                                                  \
		_Pragma("GCC diagnostic ignored \"-Wint-conversion\"")                          \
		____##name(___bpf_ctx_cast(args));                                              \
		_Pragma("GCC diagnostic pop")                                                   \
		leave();                                                                        \
		return 0;                                                                       \
	}                                                                                       \
	static __always_inline typeof(name(0)) ____##name(unsigned long long *ctx, ##args)
#endif
/* Likewise where each nanosecond counts: it says itself when it stays. */
#define WRITES_HOT(name, args...) BPF_PROG(name, ##args)
/* Likewise, that may tell stacks. */
#define WRITES_HOT_MANY(name, args...) BPF_PROG(name, ##args)
#define WRITES_AT(level, name, context) name(context)

/*
 * A slot of this CPU's hot ring, or NULL when the reader is behind. The caller fills it and ends with
 * commit(). Its index is left in *index.
 */
static __always_inline void *hot_reserve(struct cpu_state *cpu, __u64 *index)
{
	__u32 slot;

	if (cpu->hot_head - cpu->hot_tail >= hot_slots - RING_MARGIN)
		return NULL;
	*index = __sync_fetch_and_add(&cpu->hot_head, 1);
	slot = bpf_get_smp_processor_id() * hot_slots + ((__u32)*index & (hot_slots - 1));
	return bpf_map_lookup_elem(&hot, &slot);
}

/* Likewise for the wide ring; the last `spare` slots are not taken. */
static __always_inline void *wide_reserve(struct cpu_state *cpu, __u64 *index, __u32 spare)
{
	__u32 slot;

	if (cpu->wide_head - cpu->wide_tail >= wide_slots - RING_MARGIN - spare)
		return NULL;
	*index = __sync_fetch_and_add(&cpu->wide_head, 1);
	slot = bpf_get_smp_processor_id() * wide_slots + ((__u32)*index & (wide_slots - 1));
	return bpf_map_lookup_elem(&wide, &slot);
}

/*
 * The sequence goes in last; the reader takes a slot only when it holds the value for its index. Stores
 * keep their order on x86; elsewhere an atomic exchange orders them.
 */
static __always_inline void commit(__u32 *sequence, __u64 index)
{
	barrier();
#if defined(__TARGET_ARCH_x86)
	*(volatile __u32 *)sequence = (__u32)index + 1;
#else
	__sync_lock_test_and_set(sequence, (__u32)index + 1);
#endif
}

/* Numbers that are given once. */
__u32 last_connection = 0;

static __always_inline __u32 new_connection_number(void)
{
	return __sync_fetch_and_add(&last_connection, 1) + 1;
}

static __always_inline __u64 new_number(struct cpu_state *cpu) /* on this CPU */
{
	return __sync_fetch_and_add(&cpu->contexts_made, 1) + 1;
}

/* Adds to what another CPU may add to; returns what it was before. */
#define ADD_TO(place, number) __sync_fetch_and_add(place, number)

#endif
