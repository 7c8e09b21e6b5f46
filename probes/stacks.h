/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Python stacks: walked by the layout that user space left in `interpreters`.
 *
 * From 3.11 on most frames lie in the thread's data stack, of which up to 8 KiB are copied in one read and
 * walked in the copy; frames of generators lie elsewhere and are read one by one, and so is every frame up
 * to 3.10. A stack is known by a hash of its frames (code object, instruction) and its process. What a hash
 * means is told once, with a record per code object that was not met before: its name, file and line table.
 * The address of a code object that is freed may be another's soon: on_code_freed then changes the hashes
 * of that process.
 *
 * Sees:   the innermost 128 frames of Python functions.
 * Misses: frames of C functions between them; stacks of which a part is paged out (the sample says none).
 * Costs:  0.6 us at a depth of 20; 10 to 100 us for a stack that was not met before.
 */
#ifndef SCOPE_STACKS_H
#define SCOPE_STACKS_H

#include "python.h"

enum {
	COPIED_BYTES = 8192,
	FRAME_READ_BYTES = 128,
	STATE_BYTES = 256, /* of a PyThreadState, from its frame on: all that a walk needs of it */
	EPOCHS = 4096,
	/* two walks may be under way on a CPU: the sampling clock interrupts programs */
	WALKS = 2,
	STACK_PARTS = (STACK_FRAMES + STACK_PART_FRAMES - 1) / STACK_PART_FRAMES,
};

/* A str in the process's memory. */
struct text {
	__u64 data;
	__u32 length; /* characters */
	__u32 width;  /* bytes per character */
};

struct walk {
	__u64 hash;
	__u64 time_ns;
	__u64 next; /* frame to take, 0: none is left */
	__u64 copied_from;
	__u32 copied; /* bytes */
	__u32 tgid;
	__u32 born; /* of the process: its number may be another's later */
	__u32 taken; /* frames */
	__u32 truncated;
	__u32 interpreter; /* its element */
	__u32 number; /* of this walk */
	__u32 reserved;
	/* of the code object that is being told: where its line table, name and file are */
	__u64 lines;
	struct text name;
	struct text file;
	struct code_part code;
	struct frame frames[STACK_FRAMES];
	char state[STATE_BYTES];
	char one[FRAME_READ_BYTES];
	char copy[COPIED_BYTES + FRAME_READ_BYTES];
};

/* Per CPU and nesting; user space sets the count. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct walk);
} walks SEC(".maps");

/* Hashes of stacks that were told. */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 65536);
	__type(key, __u64);
	__type(value, __u32);
} stacks_told SEC(".maps");

struct code_key {
	__u64 code;
	__u32 tgid;
	__u32 born;
};

struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 65536);
	__type(key, struct code_key);
	__type(value, __u32);
} codes_told SEC(".maps");

/* How often a code object that had been told was freed, by process (modulo). */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, EPOCHS);
	__type(key, __u32);
	__type(value, __u64);
} epochs SEC(".maps");

static __always_inline __u64 epoch_of(__u32 tgid)
{
	__u32 index = tgid & (EPOCHS - 1);
	__u64 *epoch = bpf_map_lookup_elem(&epochs, &index);

	return epoch ? *epoch : 0;
}

static __always_inline __u32 birth_of(struct task_struct *task)
{
	return FIELD_OF(task, group_leader, start_boottime) >> 10;
}

/*
 * What the functions get that are called for each frame. Where they may only be given numbers (see GLOBAL)
 * they look the rest up again: else the verifier would look at them for each frame.
 */
#ifdef OLD_KERNELS
#define WALK_ARGUMENTS walk->number
#define WALK_PARAMETERS __u32 walk_number
#define FIND_WALK()                                                                             \
	struct walk *walk = bpf_map_lookup_elem(&walks, &walk_number);                          \
	struct interpreter *python = walk ? interpreter_at(walk->interpreter) : NULL;           \
	struct cpu_state *cpu __attribute__((unused)) = this_cpu()
#else
#define WALK_ARGUMENTS cpu, walk, python
#define WALK_PARAMETERS struct cpu_state *cpu, struct walk *walk, struct interpreter *python
#define FIND_WALK()
#endif

/* ---- walking --------------------------------------------------------------------------------------- */

/* Where a frame can be read: within the copy, or in `one` after a read of its own. NULL: it cannot. */
static __always_inline char *reach_frame(struct walk *walk, struct interpreter *python, __u64 frame)
{
	__u64 distance = frame - walk->copied_from;

	if (distance < walk->copied && distance + python->frame_bytes <= walk->copied)
		return walk->copy + (distance & (COPIED_BYTES - 8));
	if (bpf_probe_read_user(walk->one, python->frame_bytes & (FRAME_READ_BYTES - 1), (void *)frame))
		return NULL;
	return walk->one;
}

#define FIELD_MASK (FRAME_READ_BYTES - 8)

/* A field of the thread state; it lies behind that of the frame. */
static __always_inline __u64 state_field(struct walk *walk, struct interpreter *python, __u16 offset)
{
	return *(__u64 *)(walk->state + ((offset - python->tstate_frame) & (STATE_BYTES - 8)));
}

static __always_inline void copy_data_stack(struct walk *walk, struct interpreter *python)
{
	__u64 top, chunk, size;

	walk->copied = 0;
	if (python->flags & INTERPRETER_HEAP_FRAMES)
		return;
	top = state_field(walk, python, python->tstate_datastack_top);
	chunk = state_field(walk, python, python->tstate_datastack_chunk);
	size = top - chunk;
	if (!chunk || size > 1 << 30)
		return;
	if (size > COPIED_BYTES)
		size = COPIED_BYTES;
	walk->copied_from = top - size;
	if (!bpf_probe_read_user(walk->copy, size, (void *)walk->copied_from))
		walk->copied = size;
}

static __always_inline __u64 mix_hash(__u64 hash, __u64 word)
{
	hash = (hash ^ word) * 0xff51afd7ed558ccdULL;
	return hash ^ hash >> 32;
}

static __always_inline __u64 first_frame(struct walk *walk, struct interpreter *python)
{
	__u64 frame = state_field(walk, python, python->tstate_frame);

	if (python->flags & INTERPRETER_CFRAME && frame)
		frame = read_user_word(frame + python->cframe_frame);
	return frame;
}

/*
 * Takes the frame at walk->next and goes on to the one further out. Returns whether that could be read.
 *
 * A function of its own, whose state is all in memory: the verifier looks at it once, instead of once per
 * frame and way through it.
 */
__noinline int take_frame(WALK_PARAMETERS)
{
	FIND_WALK();
	__u64 code, instruction;
	__u32 count, offset;
	char *at;

	if (!walk || !python)
		return false;
	at = reach_frame(walk, python, walk->next);
	if (!at)
		return false;
	code = *(__u64 *)(at + (python->frame_code & FIELD_MASK)) & ~7ULL;
	walk->next = *(__u64 *)(at + (python->frame_previous & FIELD_MASK));
	if (python->first_shim != 0xff &&
	    *(__u8 *)(at + (python->frame_owner & (FRAME_READ_BYTES - 1))) >= python->first_shim)
		return true;
	if (!code)
		return false;
	if (python->flags & INTERPRETER_HEAP_FRAMES) {
		offset = *(__u32 *)(at + (python->frame_instruction & (FRAME_READ_BYTES - 4)));
	} else {
		instruction = *(__u64 *)(at + (python->frame_instruction & FIELD_MASK));
		offset = instruction - code;
	}
	count = walk->taken;
	if (count >= STACK_FRAMES) {
		walk->truncated = 1;
		walk->next = 0;
		return true;
	}
	walk->frames[count].code = code;
	walk->frames[count].offset = offset;
	walk->taken = count + 1;
	walk->hash = mix_hash(walk->hash, code ^ (__u64)offset << 48 ^ offset);
	return true;
}

/* From walk->state fills walk->frames and walk->hash; returns how many frames. */
GLOBAL int walk_frames(struct cpu_state *cpu, struct walk *walk, struct interpreter *python)
{
	__u32 i;

	if (!cpu || !walk || !python)
		return 0;
	walk->next = first_frame(walk, python);
	walk->truncated = walk->taken = 0;
	copy_data_stack(walk, python);
	/* shims are passed over, so that there may be more frames than are kept */
	for (i = 0; i < 2 * STACK_FRAMES && walk->next; i++)
		if (!take_frame(WALK_ARGUMENTS))
			return 0;
	if (walk->next)
		walk->truncated = 1;
	walk->hash = mix_hash(walk->hash, walk->taken) | 1;
	return walk->taken;
}

/* ---- telling what was not met before --------------------------------------------------------------- */

/* In a form that the verifier follows to the read that it bounds. */
static __always_inline __u64 at_most(__u64 bytes, __u64 limit)
{
	asm volatile("" : "+r"(bytes));
	return bytes > limit ? limit : bytes;
}

static __always_inline void find_text(struct interpreter *python, __u64 object, struct text *text)
{
	__u8 state = 0, kind;

	text->data = text->length = text->width = 0;
	if (!object)
		return;
	text->length = read_user_word(object + python->unicode_length);
	bpf_probe_read_user(&state, sizeof(state), (void *)(object + python->unicode_state));
	kind = state >> python->unicode_kind_shift;
	text->width = kind & 7;
	/* kind has 3 bits, then come compact and ascii */
	if (kind & 16)
		text->data = object + python->unicode_ascii;
	else
		text->data = object + python->unicode_compact;
}

/* One of the further slots of a long line table; walk->code has the first. Returns whether it is told. */
GLOBAL int write_lines(struct cpu_state *cpu, struct walk *walk, __u32 part)
{
	struct code_part *more;
	__u64 index, rest;
	__u32 done;

	if (!cpu || !walk)
		return false;
	done = CODE_PART_BYTES + (part - 1) * CODE_MORE_BYTES;
	rest = at_most(walk->code.lines_total - done, CODE_MORE_BYTES);
	more = wide_reserve(cpu, &index, wide_slots / 8);
	if (!more)
		return false;
	/* the sequence goes in last */
	__builtin_memcpy((__u32 *)more + 1, (__u32 *)&walk->code + 1, sizeof(*more) - sizeof(__u32));
	more->part = part;
	more->line_bytes = bpf_probe_read_user(more + 1, rest, (void *)(walk->lines + done)) ? 0 : rest;
	commit(&more->sequence, index);
	return true;
}

static __always_inline int write_code(struct cpu_state *cpu, struct walk *walk, struct interpreter *python,
				     __u64 code)
{
	struct code_part *part;
	struct code_part *head;
	struct text *name, *file;
	__u64 index, lines, bytes;
	__u32 whole, number, first_line = 0;
	char *at;

	if (!cpu || !walk || !python)
		return 0;
	head = &walk->code;
	name = &walk->name;
	file = &walk->file;
	find_text(python, read_user_word(code + python->code_name), name);
	find_text(python, read_user_word(code + python->code_file), file);
	lines = read_user_word(code + python->code_lines);
	bpf_probe_read_user(&first_line, sizeof(first_line), (void *)(code + python->code_first_line));
	part = wide_reserve(cpu, &index, wide_slots / 8);
	if (!part)
		return 0;
	head->kind = RECORD_CODE;
	head->part = 0;
	head->line_bytes = 0;
	head->time_ns = walk->time_ns;
	head->code = code;
	head->tgid = walk->tgid;
	head->first_line = first_line;
	head->lines_total = read_user_word(lines + python->bytes_size);
	head->version = python->version;
	head->first_instruction = python->code_instructions;
	head->name_length = name->length;
	head->file_length = file->length;
	head->name_width = name->width;
	head->file_width = file->width;
	walk->lines = lines + python->bytes_data;
	at = (char *)(part + 1);
	bytes = at_most(name->length * name->width, CODE_NAME_BYTES);
	if (bpf_probe_read_user(at, bytes, (void *)name->data))
		head->name_width = 0;
	/* of a long path the end tells more */
	whole = file->length * file->width;
	bytes = at_most(whole, CODE_FILE_BYTES);
	if (bpf_probe_read_user(at + CODE_NAME_BYTES, bytes, (void *)(file->data + whole - bytes)))
		head->file_width = 0;
	bytes = at_most(head->lines_total, CODE_PART_BYTES);
	if (!bpf_probe_read_user(at + CODE_NAME_BYTES + CODE_FILE_BYTES, bytes, (void *)walk->lines))
		head->line_bytes = bytes;
	__builtin_memcpy((__u32 *)part + 1, (__u32 *)head + 1, sizeof(*part) - sizeof(__u32));
	commit(&part->sequence, index);
	for (number = 1; number < CODE_PARTS; number++) {
		if (CODE_PART_BYTES + (number - 1) * CODE_MORE_BYTES >= walk->code.lines_total)
			break;
		if (!write_lines(cpu, walk, number))
			return 0;
	}
	return 1;
}

/* Tells the code object of a frame, if it was not told before. Returns whether it is told. */
__noinline int tell_code(WALK_PARAMETERS, __u32 number)
{
	FIND_WALK();
	struct code_key key = {};
	__u32 told = tellings, *before;

	if (!cpu || !walk || !python || number >= STACK_FRAMES)
		return false;
	key.tgid = walk->tgid;
	key.born = walk->born;
	key.code = walk->frames[number].code;
	before = bpf_map_lookup_elem(&codes_told, &key);
	if (before && *before == told)
		return true;
	if (!write_code(cpu, walk, python, key.code))
		return false;
	bpf_map_update_elem(&codes_told, &key, &told, BPF_ANY);
	return true;
}

/* One slot of a stack's frames. Returns whether it is told. */
GLOBAL int write_part(struct cpu_state *cpu, struct walk *walk, __u32 number)
{
	struct stack_part *part;
	__u32 first, frames;
	__u64 index;

	if (!cpu || !walk || number >= STACK_PARTS)
		return false;
	first = number * STACK_PART_FRAMES;
	frames = walk->taken - first;
	if (frames > STACK_PART_FRAMES)
		frames = STACK_PART_FRAMES;
	part = wide_reserve(cpu, &index, wide_slots / 8);
	if (!part)
		return false;
	part->frames = frames;
	part->kind = RECORD_STACK;
	part->part = number;
	part->time_ns = walk->time_ns;
	part->stack = walk->hash;
	part->tgid = walk->tgid;
	part->total = walk->taken;
	part->truncated = walk->truncated;
	part->reserved[0] = part->reserved[1] = part->reserved[2] = part->reserved[3] = 0;
	/* what lies beyond those taken is not looked at */
	bpf_probe_read_kernel(part + 1, STACK_PART_FRAMES * sizeof(struct frame), &walk->frames[first]);
	commit(&part->sequence, index);
	return true;
}

/* The record of a stack, with those of its code objects that were not told before. */
GLOBAL int tell_stack(struct cpu_state *cpu, struct walk *walk, struct interpreter *python)
{
	__u32 number, told = tellings;
	__u64 hash;

	if (!cpu || !walk || !python)
		return 0;
	for (number = 0; number < STACK_FRAMES && number < walk->taken; number++)
		if (!tell_code(WALK_ARGUMENTS, number))
			goto lost;
	for (number = 0; number < STACK_PARTS && number * STACK_PART_FRAMES < walk->taken; number++)
		if (!write_part(cpu, walk, number))
			goto lost;
	/* a copy: before 6.2 what a global function was given is no key of a map */
	hash = walk->hash;
	bpf_map_update_elem(&stacks_told, &hash, &told, BPF_ANY);
	return 1;
lost:
	count_loss(cpu, LOSS_STACKS);
	return 0;
}

/* ---- samples --------------------------------------------------------------------------------------- */

/* Reads the current thread's PyThreadState into walk->state; returns its address, 0: it has none. */
static __noinline __u64 read_state(struct cpu_state *cpu, struct walk *walk, struct interpreter *python,
				   struct task_struct *task)
{
	__u64 state;
	int i;

	for (i = 0; i < 2; i++) {
		state = thread_state(cpu, python, task);
		if (!state)
			return 0;
		if (!bpf_probe_read_user(walk->state, STATE_BYTES, (void *)(state + python->tstate_frame)) &&
		    state_field(walk, python, python->tstate_thread_id) == THREAD_POINTER(task))
			return state;
		cpu->thread_state = 0;
	}
	return 0;
}

/* What a sample tells; 0: there is none, or it could not be read. */
struct taken {
	__u64 context;
	__u64 stack;
};

/* The current thread's Python stack and context. */
GLOBAL int take_stack(struct cpu_state *cpu, struct taken *taken, __u32 interrupt)
{
	__u32 index = bpf_get_smp_processor_id() * WALKS + (interrupt & 1), element;
	struct task_struct *task = CURRENT_TASK();
	struct interpreter *python;
	struct walk *walk;
	__u32 *told;
	__u64 state;
	int count;

	if (!cpu || !taken)
		return 0;
	walk = bpf_map_lookup_elem(&walks, &index);
	element = interpreter_here(cpu, task);
	python = interpreter_at(element);
	if (!walk || !python || !(python->flags & INTERPRETER_STACKS))
		return 0;
#ifdef OLD_KERNELS
	walk->number = index;
	walk->interpreter = element;
#endif
	state = read_state(cpu, walk, python, task);
	if (!state)
		return 0;
	taken->context =
		number_context(cpu, python, state, state_field(walk, python, python->tstate_context));
	walk->tgid = FIELD(task, tgid);
	walk->born = birth_of(task);
	walk->hash = mix_hash(epoch_of(walk->tgid), (__u64)walk->tgid << 32 | walk->born);
	count = walk_frames(cpu, walk, python);
	if (count <= 0)
		return 0;
	told = bpf_map_lookup_elem(&stacks_told, &walk->hash);
	if (!told || *told != tellings) {
		/* not the time of the sample: that may be before its code objects were freed and made anew */
		walk->time_ns = bpf_ktime_get_ns();
		tell_stack(cpu, walk, python);
	}
	taken->stack = walk->hash;
	return 0;
}

/* `instruction`: where the clock interrupted user space, 0: the kernel. */
__noinline int take_sample(OF_CPU __u32 reason, __u64 time_ns, __u64 duration_ns,
			   __u64 instruction)
{
	FIND_CPU();
	__u64 identity = bpf_get_current_pid_tgid(), index;
	struct taken taken = {};
	struct sample *sample;

	if (!cpu)
		return 0;
	take_stack(cpu, &taken, reason == SAMPLE_CPU);
	sample = hot_reserve(cpu, &index);
	if (!sample) {
		count_loss(cpu, LOSS_SAMPLES);
		return 0;
	}
	sample->reserved0 = 0;
	sample->kind = RECORD_SAMPLE;
	sample->flags = reason;
	sample->time_ns = time_ns;
	sample->tgid = identity >> 32;
	sample->tid = identity;
	sample->context = taken.context;
	sample->stack = taken.stack;
	sample->instruction = instruction;
	sample->duration_ns = duration_ns;
	sample->in_kernel = reason == SAMPLE_CPU && !instruction;
	commit(&sample->sequence, index);
	return 0;
}

/* The sampling clock ticked. */
SEC("perf_event")
int WRITES_AT(LEVEL_CLOCK, on_tick, __u64 *words)
{
	struct task_struct *task = CURRENT_TASK();
	struct cpu_state *cpu = this_cpu();
	struct task_record *record;
	__u64 instruction = TICK_IN_USER_MODE(words) ? TICK_INSTRUCTION(words) : 0;

	if (!cpu || !python_wanted || !FIELD(task, pid))
		return 0;
	if (cpu->task == (__u64)task) {
		if (!cpu->recorded)
			return 0;
	} else {
		record = record_of(task);
		if (!record || record->phase == PHASE_DORMANT)
			return 0;
	}
	take_sample(WITH_CPU SAMPLE_CPU, bpf_ktime_get_ns(), 0, instruction);
	return 0;
}

/* (code object) */
SEC("uprobe")
int on_code_freed(struct pt_regs *regs)
{
	struct task_struct *task = CURRENT_TASK();
	struct cpu_state *cpu = this_cpu();
	struct code_key key = {.code = FUNCTION_ARG0(regs), .tgid = FIELD(task, tgid), .born = birth_of(task)};
	__u32 index = key.tgid & (EPOCHS - 1);
	__u64 *epoch;

	if (!cpu || !interpreter_here(cpu, task) || !bpf_map_lookup_elem(&codes_told, &key))
		return 0;
	bpf_map_delete_elem(&codes_told, &key);
	epoch = bpf_map_lookup_elem(&epochs, &index);
	if (epoch)
		__sync_fetch_and_add(epoch, 1);
	return 0;
}

#endif
