/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Calls of chosen Python functions, from hardware breakpoints on data: the CPU's debug registers watch the
 * addresses that only these functions touch (loaders/python/calls.py chooses them), and nothing else in the
 * process gets slower.
 *
 * A call begins when the interpreter reads the first instruction of the function's bytecode. It ends when
 * the frame gives its reference to the code object back, which writes to the reference count; at that moment
 * the thread's current frame is the caller's again. Whatever else touches these addresses (f.__code__,
 * tracebacks) does so while another frame is the current one. Where an exception keeps the frame alive:
 *   3.12+: taking the frame over for the traceback writes to the reference count, too;
 *   3.11:  it reads _co_firsttraceable (_PyFrame_IsIncomplete in take_ownership, Python/frame.c);
 *   3.8-3.10: the line of the traceback is looked up, which reads co_lnotab or co_linetable. If no block of
 *          the frame handles the exception, the call ends there; but a warning that the function gives looks
 *          the same. So the call is told when its frame goes, or at the thread's next call; its last
 *          instruction says whether it returned.
 *
 * Sees:   every call in every thread and forked worker of the processes that were watched, with its duration
 *         and the values of its arguments at the begin.
 * Misses: calls that had begun when the recording did; what generator functions and coroutines do after they
 *         were called: only their call is told (up to 3.10: their first step). Functions beyond the debug
 *         registers: four per thread. Up to 3.10 the duration of a call that raises an exception again
 *         (`raise`, the end of `with` and `finally`), a call whose exception is kept for good and after which
 *         the thread makes no other call, and arguments that inner functions use, which are in cells.
 * Costs:  one trap for the begin, two for the end of a call (one is the reference that its frame takes), one
 *         or two more when an exception passes through it (up to 3.11): 9.4 us each in a quiet virtual
 *         machine whose hypervisor takes part, 17 to 30 us in a busy one; 1 us of that are these programs.
 *         Other functions: nothing. A switch to another thread loads the debug registers, below 1 us.
 */
#ifndef SCOPE_CALLS_H
#define SCOPE_CALLS_H

#include "python.h"
#include "state.h"
#include "tls.h"

/* Set by user space between the beginning and the end of the recording. */
__u32 calls_wanted = 0;

/*
 * What a program at a perf event gets, struct bpf_perf_event_data, is user space's ABI: pt_regs, the sample
 * period, the address.
 */
#if defined(__TARGET_ARCH_x86)
#define WATCHED_ADDRESS(words) ((words)[22])
#else
#define WATCHED_ADDRESS(words) ((words)[35])
#endif

enum {
	MAX_BLOCKS = 20,      /* CO_MAXBLOCKS */
	RETURN_VALUE = 83,   /* opcodes of 3.8 to 3.10 (Include/opcode.h) */
	SETUP_FINALLY = 122, /* and the type of a block that handles exceptions */
	STACK_REF_TAGS = 7,  /* from 3.14 on references in frames have tags (pycore_stackref.h) */
	TYPE_NAME = 24,	     /* tp_name in a type */
};

struct call_watch_key {
	__u64 address;
	__u64 tgid; /* 0: forked from a process that was watched */
};

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, CALL_WATCHES);
	__type(key, struct call_watch_key);
	__type(value, struct call_watch);
} call_watches SEC(".maps");

/* A frame has one callee at a time, so this names a call while it lasts. */
struct open_call_key {
	__u64 caller; /* frame, 0: the thread's first */
	__u64 code;
	__u64 thread; /* tgid and tid */
};

struct open_call {
	__u64 frame;
	__u64 unwound_ns; /* up to 3.10: when an exception seemed to leave it; 0: none, or it was handled */
	struct python_call told;
};

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, OPEN_CALLS);
	__type(key, struct open_call_key);
	__type(value, struct open_call);
} open_calls SEC(".maps");

/* Up to 3.10: the call of a thread that an exception was in last. */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, OPEN_CALLS);
	__type(key, __u64); /* tgid and tid */
	__type(value, struct open_call_key);
} unwound_calls SEC(".maps");

const struct open_call no_call = {};

static __always_inline __u64 user_word(__u64 address)
{
	__u64 word = 0;

	bpf_probe_read_user(&word, sizeof(word), (void *)address);
	return word;
}

static __always_inline __u64 current_frame(struct call_watch *watch, __u64 state)
{
	if (!state)
		return 0;
	if (watch->flags & CALL_CFRAME)
		return user_word(user_word(state + watch->tstate_frame) + watch->cframe_frame);
	return user_word(state + watch->tstate_frame);
}

static __always_inline bool is_frame_of(struct call_watch *watch, __u64 frame)
{
	return (user_word(frame + watch->frame_code) & ~(__u64)STACK_REF_TAGS) == watch->code;
}

/* ---- values ---------------------------------------------------------------------------------------- */

/* The head of an object: reference count, type, and what most types have behind them. */
struct object_head {
	__u64 references;
	__u64 type;
	__u64 size;
	__u64 digits; /* of an int: two of 30 bits */
	__u32 state;  /* of a str; of an int: the third digit */
	__u32 reserved;
};

static __always_inline __u8 read_int(struct call_watch *watch, struct object_head *head, __u64 *value)
{
	__u64 digits = head->size;
	bool negative = false;

	if (watch->flags & CALL_INT_TAG) {
		negative = (digits & 3) == 2;
		digits >>= 3;
	} else if ((__s64)digits < 0) {
		negative = true;
		digits = -digits;
	}
	*value = digits;
	if (digits > 3 || (digits == 3 && head->state >= 8))
		return VALUE_LONG_INT;
	*value = digits ? (__u32)head->digits : 0;
	if (digits > 1)
		*value |= head->digits >> 32 << 30;
	if (digits > 2)
		*value |= (__u64)head->state << 60;
	if (negative)
		*value = -*value;
	return VALUE_INT;
}

/* Copies up to ARGUMENT_BYTES behind the texts that are there. */
static __always_inline void add_text(struct python_call *hit, __u32 *texts, __u64 address, __u64 bytes)
{
	__u32 at = hit->text_bytes, length = bytes < ARGUMENT_BYTES ? bytes : ARGUMENT_BYTES;
	__u32 number = *texts;

	if (number >= 4 || at > HIT_TEXT_BYTES - ARGUMENT_BYTES)
		return;
	*texts = number + 1;
	if (bpf_probe_read_user(&hit->text[at], length, (void *)address))
		length = 0;
	hit->text_lengths[number & 3] = length;
	hit->text_bytes = at + length;
}

/* Describes an object as the next argument; returns its value_kind. */
static __always_inline __u8 read_value(struct call_watch *watch, struct python_call *hit, __u32 *texts,
				       __u64 object, __u64 *value)
{
	struct object_head head;
	__u8 width;

	object &= ~(__u64)STACK_REF_TAGS;
	if (!object)
		return VALUE_UNBOUND;
	if (object == watch->none)
		return VALUE_NONE;
	/* the smallest objects are shorter, but few stand at the end of a page */
	if (bpf_probe_read_user(&head, sizeof(head), (void *)object) &&
	    bpf_probe_read_user(&head, 3 * sizeof(__u64), (void *)object))
		return VALUE_UNREADABLE;
	if (head.type == watch->int_type)
		return read_int(watch, &head, value);
	if (head.type == watch->bool_type) {
		read_int(watch, &head, value);
		return VALUE_BOOL;
	}
	*value = head.size;
	if (head.type == watch->float_type)
		return VALUE_FLOAT;
	if (head.type == watch->bytes_type) {
		add_text(hit, texts, object + watch->bytes_data, head.size);
		return VALUE_BYTES;
	}
	if (head.type == watch->str_type) {
		width = head.state >> 2 & 7;
		if (width != 1 && width != 2 && width != 4)
			return VALUE_UNREADABLE;
		/* bits 5 and 6: compact and ascii */
		add_text(hit, texts,
			 object + (head.state & 64 ? watch->unicode_ascii : watch->unicode_compact),
			 head.size * width);
		return width == 1 ? VALUE_LATIN1 : width == 2 ? VALUE_UCS2 : VALUE_UCS4;
	}
	*value = 0;
	add_text(hit, texts, user_word(head.type + TYPE_NAME), ARGUMENT_BYTES);
	return VALUE_OBJECT;
}

/* Reads the arguments of the frame, which has run nothing yet, into a record. */
static __noinline int read_arguments(struct call_watch *watch, struct python_call *hit, __u64 frame)
{
	__u64 locals[HIT_ARGUMENTS] = {}, kinds = 0;
	__u32 texts = 0, i;

	bpf_probe_read_user(locals, sizeof(locals), (void *)(frame + watch->frame_locals));
#pragma clang loop unroll(disable)
	for (i = 0; i < HIT_ARGUMENTS; i++) {
		if (i >= watch->arguments)
			break;
		kinds |= (__u64)read_value(watch, hit, &texts, locals[i], &hit->values[i]) << 8 * i;
	}
	hit->kinds = kinds;
	hit->arguments = i;
	return 0;
}

/* ---- calls ----------------------------------------------------------------------------------------- */

static __noinline int write_hit(struct cpu_state *cpu, struct python_call *hit, __u64 duration_ns)
{
	struct python_call *slot;
	__u64 index;

	if (!cpu || !hit)
		return 0;
	slot = wide_reserve(cpu, &index, wide_slots / 8);
	if (!slot) {
		count_loss(cpu, LOSS_HITS);
		return 0;
	}
	hit->duration_ns = duration_ns;
	/* but for the sequence, which goes in last */
	__builtin_memcpy((__u32 *)slot + 1, (__u32 *)hit + 1, sizeof(*hit) - sizeof(__u32));
	commit(&slot->sequence, index);
	return 0;
}

/* Up to 3.10: whether a frame that is still there runs no more. */
static __always_inline bool is_finished(struct call_watch *watch, __u64 frame)
{
	__s8 state = 0;

	if (bpf_probe_read_user(&state, 1, (void *)(frame + watch->frame_state)))
		return true;
	return watch->flags & CALL_FRAME_STATE ? state > 0 : state == 0;
}

/* Up to 3.10: when a call ended whose frame runs no more. */
static __always_inline __u64 end_of(struct call_watch *watch, struct open_call *call)
{
	__s32 last = 0;
	__u8 opcode = 0;

	bpf_probe_read_user(&last, sizeof(last), (void *)(call->frame + watch->frame_instruction));
	if (watch->flags & CALL_FRAME_STATE)
		last *= 2; /* 3.10 counts instructions */
	bpf_probe_read_user(&opcode, sizeof(opcode), (void *)(watch->first_instruction + last));
	if (opcode == RETURN_VALUE)
		return bpf_ktime_get_ns();
	/* left by an exception; one that was raised again did not look its line up again */
	return call->unwound_ns ?: UNKNOWN_NS;
}

static __always_inline void finish_call(struct cpu_state *cpu, struct open_call_key *key,
					struct open_call *call, __u64 end_ns)
{
	write_hit(cpu, &call->told, end_ns == UNKNOWN_NS ? UNKNOWN_NS : end_ns - call->told.time_ns);
	bpf_map_delete_elem(&open_calls, key);
}

/* Up to 3.10: tells the call that an exception was in last, if it is over; `frame` begins anew, if any. */
static __noinline int settle_unwound(struct cpu_state *cpu, struct call_watch *watch, __u64 thread,
				     __u64 frame)
{
	struct open_call_key *last, key;
	struct open_call *call;

	if (!cpu || !watch)
		return 0;
	last = bpf_map_lookup_elem(&unwound_calls, &thread);
	if (!last || last->code != watch->code)
		return 0;
	key = *last;
	call = bpf_map_lookup_elem(&open_calls, &key);
	if (call) {
		if (call->frame == frame)
			finish_call(cpu, &key, call, call->unwound_ns ?: UNKNOWN_NS);
		else if (is_finished(watch, call->frame))
			finish_call(cpu, &key, call, end_of(watch, call));
		else
			return 0;
	}
	bpf_map_delete_elem(&unwound_calls, &thread);
	return 0;
}

static __always_inline void begin_call(struct cpu_state *cpu, struct call_watch *watch,
				       struct open_call_key *key, __u64 frame)
{
	struct open_call *call = bpf_map_lookup_elem(&open_calls, key);

	/* read again: by the interpreter when it replaces the instruction, or by a loop to it */
	if (call && call->frame == frame && !(watch->flags & CALL_NO_END))
		return;
	if (call) /* its end was not seen */
		write_hit(cpu, &call->told, UNKNOWN_NS);
	call = NULL;
	if (!bpf_map_update_elem(&open_calls, key, &no_call, BPF_ANY))
		call = bpf_map_lookup_elem(&open_calls, key);
	if (!call) {
		count_loss(cpu, LOSS_HITS);
		return;
	}
	call->frame = frame;
	call->told.probe = watch->probe;
	call->told.kind = RECORD_PYTHON_CALL;
	call->told.tgid = key->thread >> 32;
	call->told.tid = key->thread;
	call->told.context = current_context(
		cpu, interpreter_at(interpreter_here(cpu, CURRENT_TASK())));
	read_arguments(watch, &call->told, frame);
	call->told.time_ns = bpf_ktime_get_ns();
	if (watch->flags & CALL_NO_END) {
		write_hit(cpu, &call->told, UNKNOWN_NS);
		bpf_map_delete_elem(&open_calls, key);
	}
}

static __always_inline void end_call(struct cpu_state *cpu, struct call_watch *watch,
				     struct open_call_key *key)
{
	struct open_call *call = bpf_map_lookup_elem(&open_calls, key);

	if (call)
		finish_call(cpu, key, call,
			    watch->flags & CALL_HEAP_FRAMES ? end_of(watch, call) : bpf_ktime_get_ns());
}

struct try_block {
	__s32 type;
	__s32 handler;
	__s32 level;
};

/* Up to 3.10: whether a block of the frame would take an exception. */
static __noinline bool handles_exceptions(struct call_watch *watch, __u64 frame)
{
	struct try_block blocks[MAX_BLOCKS];
	__s32 count = 0;
	int i;

	bpf_probe_read_user(&count, sizeof(count), (void *)(frame + watch->frame_blocks));
	if (bpf_probe_read_user(blocks, sizeof(blocks), (void *)(frame + watch->frame_block_stack)))
		return true;
#pragma clang loop unroll(disable)
	for (i = 0; i < MAX_BLOCKS; i++) {
		if (i < count && blocks[i].type == SETUP_FINALLY)
			return true;
	}
	return false;
}

SEC("perf_event")
int WRITES_AT(LEVEL_PROGRAM, on_call_watch, __u64 *words)
{
	struct task_struct *task = CURRENT_TASK();
	__u64 thread = bpf_get_current_pid_tgid(), state, frame;
	struct call_watch_key where = {.address = WATCHED_ADDRESS(words), .tgid = thread >> 32};
	struct open_call_key key = {.thread = thread};
	struct cpu_state *cpu = this_cpu();
	struct call_watch *watch;
	struct open_call *call;

	if (!cpu || !calls_wanted || !is_recorded_thread(cpu, task))
		return 0;
	watch = bpf_map_lookup_elem(&call_watches, &where);
	if (!watch) {
		where.tgid = 0;
		watch = bpf_map_lookup_elem(&call_watches, &where);
	}
	if (!watch)
		return 0;
	state = user_word(THREAD_POINTER(task) + watch->tss);
	frame = current_frame(watch, state);
	key.code = watch->code;
	if (watch->role == WATCH_END) {
		/* the caller's frame is the current one again */
		key.caller = frame;
		end_call(cpu, watch, &key);
		if (watch->flags & CALL_HEAP_FRAMES)
			settle_unwound(cpu, watch, thread, 0);
		return 0;
	}
	if (is_frame_of(watch, frame)) {
		key.caller = user_word(frame + watch->frame_previous);
	} else {
		/*
		 * Nobody's call: a debugger, or a line that is looked up by another function. Or the compiler
		 * has moved the instruction that makes the new frame the current one behind the reading of
		 * its first instruction (Debian's 3.14): it is the last one on the data stack.
		 */
		key.caller = frame;
		frame = user_word(state + watch->tstate_datastack_top) - 8ULL * watch->frame_words;
		if (watch->role != WATCH_BEGIN || !watch->frame_words || !is_frame_of(watch, frame))
			return 0;
	}
	if (watch->role == WATCH_BEGIN) {
		/* when code is specialised (3.11) all of it is read, also by a later step of a generator */
		if (!(watch->flags & CALL_HEAP_FRAMES) &&
		    user_word(frame + watch->frame_instruction) > watch->first_instruction)
			return 0;
		if (watch->flags & CALL_HEAP_FRAMES)
			settle_unwound(cpu, watch, thread, frame);
		begin_call(cpu, watch, &key, frame);
		return 0;
	}
	call = bpf_map_lookup_elem(&open_calls, &key);
	if (call && call->frame == frame) {
		settle_unwound(cpu, watch, thread, 0);
		call->unwound_ns = handles_exceptions(watch, frame) ? 0 : bpf_ktime_get_ns();
		bpf_map_update_elem(&unwound_calls, &thread, &key, BPF_ANY);
	}
	return 0;
}

#endif
