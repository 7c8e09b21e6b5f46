/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Probes that the user chose: USDT probes, functions, and their returns, from uprobes anywhere in a file.
 *
 * One program serves all of them: the cookie of the link tells which place was hit, and `hit_probes` and
 * `hit_arguments`, which user space fills (loaders/hits.py), tell what to read there. Two places may be a
 * pair, such as a function and its return, or gc__start and gc__done: the end then has the duration.
 *
 * Sees:   each hit by a recorded thread, with up to eight arguments, of them four texts.
 * Misses: text and values that are not in memory at the moment (nothing may wait here), and arguments in
 *         vector registers. The end of a pair whose begin was not seen has no duration. A begin without an
 *         end (longjmp, an error that leaves the function) leaves nothing.
 * Costs:  a trap, and 0.2 us and more for the record: see README.md. Where the instruction is no nop, push
 *         or jump it is single-stepped, which takes many times as long.
 */
#ifndef SCOPE_HITS_H
#define SCOPE_HITS_H

#include "python.h"
#include "state.h"
#include "tls.h"

/* Set by user space between the beginning and the end of the recording. */
__u32 hits_wanted = 0;

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, HIT_PROBES);
	__type(key, __u32);
	__type(value, struct hit_probe);
} hit_probes SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, HIT_PROBES * HIT_ARGUMENTS);
	__type(key, __u32);
	__type(value, struct hit_argument);
} hit_arguments SEC(".maps");

struct hit_begin_key {
	__u64 thread;
	__u64 stack; /* 0: such pairs do not nest */
	__u64 pair;
};

struct hit_begin {
	__u64 start_ns;
	__u64 values[HIT_CARRIES];
	__u64 unread; /* bits */
};

struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, HIT_BEGINNINGS);
	__type(key, struct hit_begin_key);
	__type(value, struct hit_begin);
} hit_begins SEC(".maps");

static __always_inline bool is_hit_wanted(struct cpu_state *cpu, struct task_struct *task)
{
	return hits_wanted && is_recorded_thread(cpu, task);
}

static __always_inline __u64 stack_pointer(struct pt_regs *regs, __u8 role)
{
	__u64 stack = STACK_POINTER(regs);

#if defined(__TARGET_ARCH_x86)
	if (role & HIT_RETURNS)
		stack -= sizeof(stack); /* where the return address was */
#endif
	return stack;
}

/* The value of an argument that is no text, or the address of one. */
static __always_inline bool read_argument(struct pt_regs *regs, struct hit_argument *argument, __u64 *value)
{
	__u32 bytes = argument->bytes, unused;
	__u64 word = 0, address;

	if (argument->source == HIT_CONSTANT) {
		*value = argument->value;
		return true;
	}
	/* one comparison, which the verifier follows; none has zero bytes */
	if (bytes > sizeof(word))
		return false;
	if (argument->source == HIT_REGISTER) {
		word = read_word((void *)regs + argument->base);
	} else if (argument->source == HIT_MEMORY) {
		address = argument->value;
		if (argument->base != HIT_NO_REGISTER)
			address += read_word((void *)regs + argument->base);
		if (argument->index != HIT_NO_REGISTER)
			address += read_word((void *)regs + argument->index) << (argument->shift & 7);
		if (bpf_probe_read_user(&word, bytes, (void *)address))
			return false;
	} else {
		return false;
	}
	unused = 64 - 8 * bytes;
	word <<= unused & 63;
	*value = argument->flags & HIT_SIGNED ? (__u64)((__s64)word >> (unused & 63))
					      : word >> (unused & 63);
	return true;
}

static __always_inline bool read_text(struct hit *hit, struct hit_argument *argument, __u64 address,
				      __u64 *more)
{
	__u32 begin = argument->text_begin, size = argument->text_bytes;
	char beyond = 0;
	long length;

	/* what the verifier needs to know: either the first, or the others within their bounds */
	if (begin) {
		if (begin > HIT_TEXT_LAST || size > HIT_TEXT_MORE)
			return false;
	} else if (size > HIT_TEXT_BYTES) {
		return false;
	}
	length = bpf_probe_read_user_str(hit->text + begin, size, (void *)address);
	if (length <= 0)
		return false;
	if ((__u32)length == size)
		bpf_probe_read_user(&beyond, sizeof(beyond), (void *)(address + size - 1));
	hit->text_lengths[argument->text & (HIT_TEXTS - 1)] = length - 1;
	*more = beyond != 0;
	return true;
}

static __always_inline void remember_begin(struct pt_regs *regs, struct hit_begin_key *key, __u32 number)
{
	struct hit_begin begin = {};
	__u32 i, at;

	for (i = 0; i < HIT_CARRIES; i++) {
		struct hit_argument *argument;

		at = number * HIT_ARGUMENTS + i;
		argument = bpf_map_lookup_elem(&hit_arguments, &at);
		if (!argument || (argument->flags & HIT_TEXT) ||
		    !read_argument(regs, argument, &begin.values[i]))
			begin.unread |= 1 << i;
	}
	begin.start_ns = bpf_ktime_get_ns();
	bpf_map_update_elem(&hit_begins, key, &begin, BPF_ANY);
}

SEC("uprobe")
int WRITES_AT(LEVEL_TASK, on_hit, struct pt_regs *regs)
{
	struct task_struct *task = CURRENT_TASK();
	__u32 number = bpf_get_attach_cookie(regs), i, at;
	__u64 index, now, identity, value;
	struct cpu_state *cpu = this_cpu();
	struct hit_begin begin = {}, *found;
	struct hit_begin_key key = {};
	struct hit_probe *probe;
	struct hit *hit;
	__u8 role;

	if (!cpu || !is_hit_wanted(cpu, task))
		return 0;
	probe = bpf_map_lookup_elem(&hit_probes, &number);
	if (!probe)
		return 0;
	role = probe->role;
	now = bpf_ktime_get_ns();
	identity = bpf_get_current_pid_tgid();
	if (role & (HIT_BEGINS | HIT_ENDS)) {
		key.thread = identity;
		key.pair = probe->pair;
		if (role & HIT_NESTS)
			key.stack = stack_pointer(regs, role);
	}
	if (role & HIT_ENDS) {
		found = bpf_map_lookup_elem(&hit_begins, &key);
		if (found) {
			begin = *found;
			bpf_map_delete_elem(&hit_begins, &key);
		}
	}
	if (!(role & HIT_ROW))
		goto out;
	hit = wide_reserve(cpu, &index, wide_slots / 8);
	if (!hit) {
		count_loss(cpu, LOSS_HITS);
		goto out;
	}
	hit->probe = number;
	hit->kind = RECORD_HIT;
	hit->arguments = probe->arguments;
	hit->time_ns = begin.start_ns ?: now;
	hit->duration_ns = begin.start_ns ? now - begin.start_ns : 0;
	hit->tgid = identity >> 32;
	hit->tid = identity;
	hit->context = current_context(cpu, interpreter_at(interpreter_here(cpu, task)));
	hit->unread = 0;
	hit->began = begin.start_ns != 0;
	hit->reserved1[0] = 0;
	for (i = 0; i < HIT_TEXTS; i++)
		hit->text_lengths[i] = 0;
	for (i = 0; i < HIT_ARGUMENTS; i++) {
		struct hit_argument *argument;
		bool read = false;

		value = 0;
		at = number * HIT_ARGUMENTS + i;
		if (i < probe->arguments) {
			argument = bpf_map_lookup_elem(&hit_arguments, &at);
			if (!argument) {
				read = false;
			} else if (argument->source == HIT_CARRIED) {
				at = argument->value & (HIT_CARRIES - 1);
				value = at ? begin.values[1] : begin.values[0];
				read = begin.start_ns && !(begin.unread & (1 << at));
			} else {
				read = read_argument(regs, argument, &value);
				if (read && (argument->flags & HIT_TEXT))
					read = read_text(hit, argument, value, &value);
			}
			if (!read)
				hit->unread |= 1 << i;
		}
		hit->values[i] = value;
	}
	commit(&hit->sequence, index);
out:
	if (role & HIT_BEGINS)
		remember_begin(regs, &key, number);
	return 0;
}

#endif
