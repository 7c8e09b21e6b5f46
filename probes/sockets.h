/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Messages and connects outside of their system calls: through io_uring (and libaio's io_submit), from
 * the kernel's own functions that every way to a socket or pipe leads through.
 *
 * User space chooses how these functions are reached, by trying (loaders/extras.py): fentry and fexit, else
 * the tracepoints sock_send_length and sock_recv_length, else kprobes.
 *
 * Sees:   each transfer on TCP, UDP and Unix sockets and pipes, and each connect, by whomever the kernel has
 *         it done: the thread that asked, inside of io_uring_enter or on its way back to user space; a
 *         worker (iou-wrk); the thread that polls the submission queue (iou-sqp). The row has the tid of the
 *         thread that asked for it, the number of io_uring_enter, no descriptor, and the times of the
 *         transfer itself. A connect that may not wait is told to be in progress; some kernels call the
 *         function once more when it is done, and then there is another row.
 * Misses: accept (what is accepted is met with its first message), splice and tee through io_uring; other
 *         families of sockets; the payload's head where the bytes are in registered buffers. The tracepoints
 *         know neither connects, nor pipes, nor where the bytes are, nor when a transfer began. The kprobes
 *         miss what returns while as many calls of the function as there are CPUs (newer kernels: twice as
 *         many, at least ten) wait on the host: that is counted as lost. What moves between the first
 *         io_uring_setup of the recorded processes and the moment when user space has attached these programs
 *         (0.1 s); Unix streams and pipes on which that may have been are inexact.
 * Costs:  nothing while no recorded process has an io_uring. From then on two short programs for each
 *         read and write on a socket or pipe, of the whole host; for its row what a message costs.
 */
#ifndef SCOPE_SOCKETS_H
#define SCOPE_SOCKETS_H

#include "messages.h"
#include "processes.h"
#include "state.h"

const volatile __u32 aio_number = 0;  /* of io_submit; 0: this machine has none */

enum {
	TRANSFERS = 4096, /* at once */
	EMPLOYER_STEPS = 3,
	NAME_PREFIX = 8, /* of the names of io_uring's threads, before the tid that they work for */
};

/* A transfer under way, by the address of the task that does it. */
struct transfer {
	struct flight flight; /* its number and start */
	__u64 file;
	__u32 tgid;
	__u32 tid;
	__u32 flags; /* record_flags */
	__u32 count;
	struct user_iovec pieces[MAX_VECTORS]; /* where the bytes are, in the process's memory */
};

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, TRANSFERS);
	__type(key, __u64);
	__type(value, struct transfer);
} transfers SEC(".maps");

/*
 * Where the pieces of a payload are put together, per CPU: behind the address of the task that does, two
 * payload_limits (set by user space). These programs can be preempted, others cannot.
 */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__uint(key_size, sizeof(__u32));
	__uint(value_size, 128);
} pieced_heads SEC(".maps");

struct pieced {
	__u64 task;
	char bytes[];
};

/*
 * The way from a worker of io_uring (struct io_worker) to whose work it does: offsets of pointers, each in
 * what the one before points to, with 16 bits for each and the first one lowest; 0: it is not known. User
 * space sets them, from the kernel's types. Not libbpf: kernels have different structs there, some none of
 * them, and what vmlinux lacks libbpf looks up in the modules, which only CAP_SYS_ADMIN may.
 */
__u64 employer_path = 0;

/* Whose work a worker of io_uring does; NULL if that is not known. */
static __always_inline struct task_struct *employer(struct task_struct *task)
{
	__u64 path = employer_path;
	const void *place;
	__u32 i;

	if (bpf_core_field_exists(task->worker_private))
		place = BPF_CORE_READ(task, worker_private);
	else
		place = BPF_CORE_READ((struct task_struct___before_5_17 *)task, pf_io_worker);
	if (!path)
		return NULL;
#pragma unroll
	for (i = 0; i < EMPLOYER_STEPS; i++, path >>= 16) {
		if (path && bpf_probe_read_kernel(&place, sizeof(place), place + (path & 0xffff)))
			return NULL;
	}
	return (struct task_struct *)place;
}

/*
 * For which thread the current one works, if it is one of io_uring's own: they are threads of the process
 * that made the ring. That of iou-sqp is in its name; a worker may do the work of such a one. Else 0.
 */
static __always_inline __u32 asked_by(struct task_struct *task)
{
	struct task_struct *other;
	char name[COMM_BYTES];
	__u32 tid = 0, i;

	if (!is_named_worker(task))
		return 0;
	if (FIELD(task, comm[4]) == 'w') {
		other = employer(task);
		if (other && (BPF_CORE_READ(other, comm[4]) != 's' || BPF_CORE_READ(other, comm[3]) != '-'))
			return BPF_CORE_READ(other, pid);
		if (other)
			task = other;
	}
	if (bpf_core_read(name, sizeof(name), &task->comm))
		return 0;
#pragma unroll
	for (i = NAME_PREFIX; i < COMM_BYTES - 1; i++) {
		if (name[i] < '0' || name[i] > '9')
			break;
		tid = tid * 10 + (name[i] - '0');
	}
	return tid;
}

/* Whether the call in flight moves what it was told of elsewhere. */
static __always_inline bool is_for_others(struct cpu_state *cpu)
{
	__u16 number = cpu->flight.number;

	return (number & ~COMPAT_SYSCALL) == ring_number || (aio_number && number == aio_number);
}

/* What can be told without looking anything up: that what the thread moves is nothing for these programs. */
static __always_inline bool is_passed_over(struct cpu_state *cpu, struct task_struct *task)
{
	if (!transfers_wanted)
		return true;
	if (cpu->task != (__u64)task)
		return false;
	if (cpu->recorded)
		return cpu->in_flight && !is_for_others(cpu);
	return !is_named_worker(task);
}

/*
 * Whether what the current thread moves is to be told here: it is recorded, or works for one that is, and is
 * in no call that is told as a message by itself.
 */
static __always_inline bool moves_unseen(struct cpu_state *cpu, struct task_struct *task,
					 struct transfer *transfer)
{
	bool recorded = cpu->recorded, in_call = cpu->in_flight;
	struct task_record *record;
	__u32 asker;

	if (cpu->task != (__u64)task) {
		/* user space has it looked up again, or its switch to this CPU was not seen */
		record = record_of(task);
		recorded = record && record->phase != PHASE_DORMANT;
		in_call = recorded && cpu->in_flight && cpu->in_flight == record->registers;
	}
	if (recorded && in_call && !is_for_others(cpu))
		return false;
	transfer->flight.number = ring_number;
	transfer->tgid = FIELD(task, tgid);
	transfer->tid = FIELD(task, pid);
	if (recorded && in_call) {
		transfer->flight.number = cpu->flight.number & ~COMPAT_SYSCALL;
		return true;
	}
	asker = asked_by(task);
	if (!asker)
		return recorded; /* on its way back to user space, io_uring's work is done */
	transfer->tid = asker;
	if (recorded)
		return true;
	record = record_of(FIELD(task, group_leader));
	if (record)
		return record->phase != PHASE_DORMANT;
	return record_everything && transfer->tgid != recorder_tgid;
}

/* Where the bytes will lie, as far as that is in user space's memory. */
static __always_inline void note_pieces(struct transfer *transfer, struct iov_iter *iter)
{
	__u64 offset = BPF_CORE_READ(iter, iov_offset), vectors, count;
	__u32 type;

	if (bpf_core_field_exists(iter->iter_type))
		type = BPF_CORE_READ(iter, iter_type);
	else /* before 5.14 (commit 8cd54c1c8480), with the direction in the lowest bit */
		type = BPF_CORE_READ((struct iov_iter___before_5_14 *)iter, type) & ~1;
	if (bpf_core_enum_value_exists(enum iter_type, ITER_UBUF) &&
	    type == bpf_core_enum_value(enum iter_type, ITER_UBUF)) {
		transfer->pieces[0].base = (__u64)BPF_CORE_READ(iter, ubuf) + offset;
		transfer->pieces[0].length = BPF_CORE_READ(iter, count);
		transfer->count = 1;
		return;
	}
	if (type != bpf_core_enum_value(enum iter_type, ITER_IOVEC))
		return;
	if (bpf_core_field_exists(iter->__iov))
		vectors = (__u64)BPF_CORE_READ(iter, __iov);
	else /* before 6.4 (commit de4f5fed3f23) */
		vectors = (__u64)BPF_CORE_READ((struct iov_iter___before_6_4 *)iter, iov);
	count = BPF_CORE_READ(iter, nr_segs);
	if (count > MAX_VECTORS)
		count = MAX_VECTORS;
	bpf_probe_read_kernel(transfer->pieces, count * sizeof(struct user_iovec), (void *)vectors);
	transfer->pieces[0].base += offset;
	transfer->pieces[0].length -= offset;
	transfer->count = count;
}

/* Remembers what is under way; returns whether it is to be told. */
static __always_inline bool keep_transfer(struct cpu_state *cpu, __u64 key, struct transfer *transfer)
{
	/* the return of the one before was not seen: kretprobes give up where too many calls wait */
	if (bpf_map_lookup_elem(&transfers, &key))
		count_loss(cpu, LOSS_MESSAGES);
	transfer->flight.start_ns = bpf_ktime_get_ns();
	if (!bpf_map_update_elem(&transfers, &key, transfer, BPF_ANY))
		return true;
	count_loss(cpu, LOSS_MESSAGES);
	return false;
}

/* Returns whether the transfer is one to be told. */
static __noinline bool begin_transfer(struct file *file, struct iov_iter *iter, bool receive,
					   __u32 message_flags)
{
	struct task_struct *task = CURRENT_TASK();
	struct cpu_state *cpu = this_cpu();
	struct transfer transfer = {};
	__u64 key = (__u64)task;

	if (!cpu || is_passed_over(cpu, task) || !moves_unseen(cpu, task, &transfer))
		return false;
	if (!file || message_flags & (MSG_OOB | MSG_ERRQUEUE))
		return false; /* a socket of the kernel's own; not part of the stream */
	transfer.file = (__u64)file;
	if (receive)
		transfer.flags = FLAG_RECEIVE | (message_flags & MSG_PEEK ? FLAG_PEEK : 0);
	if (payload_limit && iter)
		note_pieces(&transfer, iter);
	return keep_transfer(cpu, key, &transfer);
}

/* A connect(): the address lies in the kernel's memory already. */
static __always_inline int begin_connect(struct file *file, __u64 address, __u32 length)
{
	struct task_struct *task = CURRENT_TASK();
	struct cpu_state *cpu = this_cpu();
	struct transfer transfer = {};

	if (!cpu || is_passed_over(cpu, task) || !moves_unseen(cpu, task, &transfer))
		return 0;
	transfer.file = (__u64)file;
	transfer.flight.arg1 = address;
	transfer.flight.arg2 = length;
	keep_transfer(cpu, (__u64)task, &transfer);
	return 0;
}

static __always_inline int begin_on_socket(struct socket *socket, struct msghdr *message, bool receive,
					   __u32 message_flags)
{
	if (!receive)
		message_flags = BPF_CORE_READ(message, msg_flags);
	begin_transfer(BPF_CORE_READ(socket, file),
		       (void *)message + FIELD_OFFSET(struct msghdr, msg_iter), receive, message_flags);
	return 0;
}

static __always_inline int begin_on_pipe(struct kiocb *operation, struct iov_iter *iter, bool receive)
{
	begin_transfer(BPF_CORE_READ(operation, ki_filp), iter, receive, 0);
	return 0;
}

/* What finish_transfer() leaves to this: a row for a transfer of so many bytes. */
GLOBAL int write_transfer(struct cpu_state *cpu, struct transfer *transfer, __u32 length,
			  __u64 duration_ns)
{
	struct mover mover = { .fd = NO_DESCRIPTOR };
	struct target_end end;

	if (!cpu || !transfer || !resolve_file((void *)transfer->file, &end))
		return 0;
	mover.flight = &transfer->flight;
	mover.transfer = transfer;
	mover.tgid = transfer->tgid;
	mover.tid = transfer->tid;
	write_moved(cpu, &end, &mover, length, duration_ns, transfer->flags);
	return 0;
}

static __always_inline int finish_transfer(struct cpu_state *cpu, __u64 key, __s64 result, bool timed)
{
	struct transfer *transfer = bpf_map_lookup_elem(&transfers, &key);
	__u64 duration_ns = 0;

	if (!transfer)
		return 0;
	if (timed)
		duration_ns = bpf_ktime_get_ns() - transfer->flight.start_ns;
	if (result >= 0)
		write_transfer(cpu, transfer, result, duration_ns);
	bpf_map_delete_elem(&transfers, &key);
	return 0;
}

static __always_inline int end_transfer(__s64 result)
{
	struct task_struct *task = CURRENT_TASK();
	struct cpu_state *cpu = this_cpu();
	__u64 key = (__u64)task;

	if (!cpu || is_passed_over(cpu, task))
		return 0;
	return finish_transfer(cpu, key, result, true);
}

GLOBAL int write_ring_connect(struct cpu_state *cpu, struct transfer *transfer, __s32 result)
{
	struct mover mover = { .fd = NO_DESCRIPTOR };
	struct target_end end;

	if (!cpu || !transfer || !resolve_file((void *)transfer->file, &end) || end.is_pipe)
		return 0;
	mover.flight = &transfer->flight;
	mover.transfer = transfer;
	mover.tgid = transfer->tgid;
	mover.tid = transfer->tid;
	return write_connected(cpu, &end, &mover, result,
			       bpf_ktime_get_ns() - transfer->flight.start_ns, STATUS_COMPLETE);
}

static __always_inline int end_connect(__s32 result)
{
	struct task_struct *task = CURRENT_TASK();
	struct cpu_state *cpu = this_cpu();
	struct transfer *transfer;
	__u64 key = (__u64)task;

	if (!cpu || is_passed_over(cpu, task))
		return 0;
	transfer = bpf_map_lookup_elem(&transfers, &key);
	if (!transfer)
		return 0;
	write_ring_connect(cpu, transfer, result);
	bpf_map_delete_elem(&transfers, &key);
	return 0;
}

/* The head of a transfer's bytes, into a wide slot. */
static __always_inline __u32 copy_pieces(struct payload *payload, struct transfer *transfer, __u32 length)
{
	__u32 copied = 0, part, i, cpu = bpf_get_smp_processor_id();
	struct pieced *pieced = bpf_map_lookup_elem(&pieced_heads, &cpu);
	__u64 task = (__u64)CURRENT_TASK();

	if (!pieced)
		return 0;
	pieced->task = task;
	barrier();
	for (i = 0; i < MAX_VECTORS && i < transfer->count && copied < length; i++) {
		__u64 wanted = transfer->pieces[i].length;

		if (copied >= payload_limit)
			break;
		part = wanted < payload_limit ? wanted : payload_limit;
		if (bpf_probe_read_user(pieced->bytes + copied, part, (void *)transfer->pieces[i].base))
			break; /* what is copied so far is right */
		copied += part;
	}
	if (copied > length)
		copied = length;
	if (copied > payload_limit)
		copied = payload_limit;
	if (bpf_probe_read_kernel(payload + 1, copied, pieced->bytes))
		return 0;
	barrier();
	/* another one was here meanwhile: a head that may be wrong is none */
	return *(volatile __u64 *)&pieced->task == task ? copied : 0;
}

static __always_inline int write_pieces(struct cpu_state *cpu, __u64 hot_index, __u32 length,
					struct transfer *transfer)
{
	struct payload *payload;
	__u64 index;

	if (!transfer->count)
		return false;
	payload = reserve_payload(cpu, hot_index, &index);
	if (!payload)
		return false;
	if (length > payload_limit)
		length = payload_limit;
	payload->length_bytes = transfer->count == 1
					? copy_buffer(payload, transfer->pieces[0].base, length)
					: copy_pieces(payload, transfer, length);
	commit(&payload->sequence, index);
	return true;
}

/* ---- fentry and fexit: two programs per function; the result is behind the arguments ------------------- */

#define ON_SEND(function)                                                                                   \
	SEC("fentry/" #function)                                                                            \
	int BPF_PROG(begin_##function, struct socket *socket, struct msghdr *message)                       \
	{                                                                                                   \
		return begin_on_socket(socket, message, false, 0);                                          \
	}                                                                                                   \
	SEC("fexit/" #function)                                                                             \
	int WRITES_AT(LEVEL_TASK, end_##function, unsigned long long *ctx)                                  \
	{                                                                                                   \
		return end_transfer((__s32)ctx[3]);                                                         \
	}

#define ON_RECEIVE(function)                                                                                \
	SEC("fentry/" #function)                                                                            \
	int BPF_PROG(begin_##function, struct socket *socket, struct msghdr *message, unsigned long size,   \
		     int flags)                                                                             \
	{                                                                                                   \
		return begin_on_socket(socket, message, true, flags);                                       \
	}                                                                                                   \
	SEC("fexit/" #function)                                                                             \
	int WRITES_AT(LEVEL_TASK, end_##function, unsigned long long *ctx)                                  \
	{                                                                                                   \
		return end_transfer((__s32)ctx[4]);                                                         \
	}

#define ON_PIPE(function, receive)                                                                          \
	SEC("fentry/" #function)                                                                            \
	int BPF_PROG(begin_##function, struct kiocb *operation, struct iov_iter *iter)                      \
	{                                                                                                   \
		return begin_on_pipe(operation, iter, receive);                                             \
	}                                                                                                   \
	SEC("fexit/" #function)                                                                             \
	int WRITES_AT(LEVEL_TASK, end_##function, unsigned long long *ctx)                                  \
	{                                                                                                   \
		return end_transfer(ctx[2]);                                                                \
	}

SEC("fentry/__sys_connect_file")
int BPF_PROG(begin___sys_connect_file, struct file *file, void *address, int length)
{
	return begin_connect(file, (__u64)address, length);
}

SEC("fexit/__sys_connect_file")
int WRITES_AT(LEVEL_TASK, end___sys_connect_file, unsigned long long *ctx)
{
	return end_connect((__s32)ctx[4]);
}

ON_SEND(inet_sendmsg)
ON_SEND(inet6_sendmsg)
ON_SEND(unix_stream_sendmsg)
ON_SEND(unix_dgram_sendmsg)
ON_RECEIVE(inet_recvmsg)
ON_RECEIVE(inet6_recvmsg)
ON_RECEIVE(unix_stream_recvmsg)
ON_RECEIVE(unix_dgram_recvmsg)
ON_PIPE(pipe_write, false)
ON_PIPE(pipe_read, true)
/* since 6.15 (commit 16eccfff1a0d); those for named pipes call these */
ON_PIPE(anon_pipe_write, false)
ON_PIPE(anon_pipe_read, true)

/* ---- kprobes: one program per kind of function ------------------------------------------------------- */

SEC("kprobe")
int on_socket_send(struct pt_regs *ctx)
{
	return begin_on_socket((void *)FUNCTION_ARG0(ctx), (void *)FUNCTION_ARG1(ctx), false, 0);
}

SEC("kprobe")
int on_socket_receive(struct pt_regs *ctx)
{
	return begin_on_socket((void *)FUNCTION_ARG0(ctx), (void *)FUNCTION_ARG1(ctx), true,
			       FUNCTION_ARG3(ctx));
}

SEC("kprobe")
int on_pipe_write(struct pt_regs *ctx)
{
	return begin_on_pipe((void *)FUNCTION_ARG0(ctx), (void *)FUNCTION_ARG1(ctx), false);
}

SEC("kprobe")
int on_pipe_read(struct pt_regs *ctx)
{
	return begin_on_pipe((void *)FUNCTION_ARG0(ctx), (void *)FUNCTION_ARG1(ctx), true);
}

SEC("kprobe")
int on_connect(struct pt_regs *ctx)
{
	return begin_connect((void *)FUNCTION_ARG0(ctx), FUNCTION_ARG1(ctx), FUNCTION_ARG2(ctx));
}

SEC("kretprobe")
int WRITES_AT(LEVEL_PROGRAM, on_connect_return, struct pt_regs *ctx)
{
	return end_connect((__s32)FUNCTION_RESULT(ctx));
}

/* An int comes back in half of the register. */
SEC("kretprobe")
int WRITES_AT(LEVEL_PROGRAM, on_socket_return, struct pt_regs *ctx)
{
	return end_transfer((__s32)FUNCTION_RESULT(ctx));
}

SEC("kretprobe")
int WRITES_AT(LEVEL_PROGRAM, on_pipe_return, struct pt_regs *ctx)
{
	return end_transfer(FUNCTION_RESULT(ctx));
}

/* ---- tracepoints, since 6.3 (commit 6e6eda44b939): sockets only --------------------------------------- */

static __always_inline int at_once(struct sock *sk, __s32 result, __u32 message_flags, bool receive)
{
	struct file *file = BPF_CORE_READ(sk, sk_socket, file);
	struct cpu_state *cpu = this_cpu();

	if (!cpu || result < 0 || !begin_transfer(file, NULL, receive, message_flags))
		return 0;
	return finish_transfer(cpu, (__u64)CURRENT_TASK(), result, false);
}

SEC("tp_btf/sock_send_length")
int WRITES(on_sock_sent, struct sock *sk, int result, int flags)
{
	return at_once(sk, result, 0, false);
}

SEC("tp_btf/sock_recv_length")
int WRITES(on_sock_received, struct sock *sk, int result, int flags)
{
	return at_once(sk, result, flags, true);
}

#endif
