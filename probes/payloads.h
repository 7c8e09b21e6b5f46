/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Payload heads: the first bytes of a message, into a wide slot of the same CPU.
 *
 * Sees:   up to payload_limit bytes, from the buffer or the first MAX_VECTORS pieces of the call in flight.
 * Misses: bytes that are not in memory at the moment (nothing may wait here), and those of sendfile and
 *         splice, which were never in the process's memory.
 * Costs:  one copy per turn of a connection, two where the bytes are in pieces.
 */
#ifndef SCOPE_PAYLOADS_H
#define SCOPE_PAYLOADS_H

#include "state.h"

enum {
	MAX_VECTORS = 8,
};

/*
 * Where the pieces of a payload are put together, per CPU: two payload_limits long (set by user space),
 * so that the verifier can see that no piece runs over the end.
 */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__uint(key_size, sizeof(__u32));
	__uint(value_size, 64);
} gathered SEC(".maps");

/*
 * At most payload_limit. In one piece, so that what is used is what was compared, and not a copy of it that
 * the compiler kept elsewhere: older verifiers would not know its bound.
 */
static __always_inline __u64 within_limit(__u64 bytes)
{
	asm volatile("if %0 <= %1 goto +1\n\t%0 = %1" : "+r"(bytes) : "r"((__u64)payload_limit));
	return bytes;
}

/* Copies the head of what moved behind the header of a wide slot; returns how many bytes. */
static __always_inline __u32 copy_buffer(struct payload *payload, __u64 base, __u64 length)
{
	length = within_limit(length);
	/* not in memory now: nothing is copied, and the record says so */
	return bpf_probe_read_user(payload + 1, length, (void *)base) ? 0 : length;
}

/* Likewise from up to MAX_VECTORS pieces. */
static __always_inline __u32 copy_vectors(struct cpu_state *state, struct payload *payload, __u64 vectors,
					 __u64 count, __u64 length)
{
	__u32 cpu = bpf_get_smp_processor_id();
	__u64 copied = 0, part, i; /* as wide as registers: no extension parts them from their bounds */
	char *bytes = bpf_map_lookup_elem(&gathered, &cpu);
	struct user_iovec piece;

	if (!bytes)
		return 0;
	length = within_limit(length);
	for (i = 0; i < MAX_VECTORS && i < count && copied < length; i++) {
		KEEP_COUNT(i);
		if (bpf_probe_read_user(&piece, sizeof(piece), (void *)(vectors + i * sizeof(piece))))
			break;
		part = within_limit(piece.length);
		copied = within_limit(copied); /* it is; up to 5.10 the verifier wants to be told */
		if (bpf_probe_read_user(bytes + copied, part, (void *)piece.base))
			break; /* what is copied so far is right */
		/* BCC: what was compared with `length` before would leave the verifier bounds that cross */
		copied = UNKNOWN_TO_VERIFIER(state, copied + part);
	}
	if (copied > length)
		copied = length;
	copied = within_limit(copied);
	return bpf_probe_read_kernel(payload + 1, copied, bytes) ? 0 : copied;
}

/* Where the bytes of a call lie, from its arguments. */
static __always_inline void find_payload(struct flight *flight, __u8 shape, __u64 *vectors, __u64 *count,
					 __u64 *base)
{
	struct user_msghdr header = {};

	*vectors = *count = *base = 0;
	if (shape == MESSAGE_BUFFER) {
		*base = flight->arg1;
	} else if (shape == MESSAGE_VECTOR) {
		*vectors = flight->arg1;
		*count = flight->arg2;
	} else if (shape == MESSAGE_HEADER || shape == MESSAGE_HEADERS) {
		/* the first message of several; both layouts begin with the msghdr */
		if (!bpf_probe_read_user(&header, sizeof(header), (void *)flight->arg1)) {
			*vectors = header.iov;
			*count = header.iov_count;
		}
	}
}

/* A wide slot for the payload of a hot record, or NULL: then it is counted as lost. */
static __always_inline struct payload *reserve_payload(struct cpu_state *cpu, __u64 hot_index, __u64 *index)
{
	struct payload *payload = wide_reserve(cpu, index, wide_slots / 8);

	if (!payload) {
		count_loss(cpu, LOSS_PAYLOADS);
		return NULL;
	}
	payload->kind = RECORD_PAYLOAD;
	payload->flags = 0;
	payload->hot_index = hot_index;
	return payload;
}

__noinline int write_payload(OF_CPU __u64 hot_index, __u32 length, __u8 shape)
{
	FIND_CPU();
	__u64 vectors, count, base, index;
	struct payload *payload;

	if (!cpu)
		return false;
	find_payload(&cpu->flight, shape, &vectors, &count, &base);
	vectors = UNKNOWN_TO_VERIFIER(cpu, vectors);
	count = UNKNOWN_TO_VERIFIER(cpu, count);
	base = UNKNOWN_TO_VERIFIER(cpu, base);
	if (!vectors && !base)
		return false; /* sendfile and splice: the bytes were never in the process's memory */
	payload = reserve_payload(cpu, hot_index, &index);
	if (!payload)
		return false;
	payload->length_bytes = base ? copy_buffer(payload, base, length)
				     : copy_vectors(cpu, payload, vectors, count, length);
	commit(&payload->sequence, index);
	return true;
}

#endif
