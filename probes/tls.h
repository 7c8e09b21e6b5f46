/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * TLS: the plain text that recorded threads read and write through OpenSSL, from uprobes on libssl.
 *
 * User space chooses the places (loaders/tls.py): SSL_read, SSL_write and their _ex forms, or better the
 * one function inside of libssl that both forms call. At the entry the arguments are remembered for the
 * thread, at the return one record is written.
 *
 * Sees:   each call that moved plain text: how much, which way, for which SSL object, and the head of the
 *         bytes at each turn.
 * Misses: SSL_peek, SSL_sendfile, early data; OpenSSL that is linked into a program, and other libraries;
 *         the first attempts of a write that had to be repeated. A call inside of another one of the same
 *         thread (TLS within TLS, by BIO callbacks) hides the outer one.
 * Costs:  two traps per call: 1.8 us where the first instruction can be emulated (a push), 11.5 us where
 *         it must be single-stepped (virtual machine, Linux 6.18). A thread that is not recorded pays
 *         0.3 us less, if its process has the same file mapped.
 */
#ifndef SCOPE_TLS_H
#define SCOPE_TLS_H

#include "payloads.h"
#include "state.h"

/* Set by user space between the beginning and the end of the recording. */
__u32 tls_wanted = 0;

#define UNKNOWN_LENGTH 0xffffffffffffffffULL

struct tls_session_key {
	__u64 ssl;
	__u64 tgid;
};

struct tls_session {
	__u64 last_send_ns;
	__u64 last_receive_ns;
	__u64 received_last;
};

struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, TLS_SESSIONS);
	__type(key, struct tls_session_key);
	__type(value, struct tls_session);
} tls_sessions SEC(".maps");

/* Whether the current thread is recorded. The CPU mostly knows, which saves the look-up. */
static __always_inline bool is_recorded_thread(struct cpu_state *cpu, struct task_struct *task)
{
	struct task_record *record;

	if (cpu->task == (__u64)task)
		return cpu->recorded;
	record = record_of(task);
	return record && record->phase != PHASE_DORMANT;
}

static __always_inline bool is_recorded(struct cpu_state *cpu, struct task_struct *task)
{
	return tls_wanted && is_recorded_thread(cpu, task);
}

static __always_inline int begin_tls(struct pt_regs *regs, __u64 length_at, __u64 flags)
{
	struct task_struct *task = CURRENT_TASK();
	struct cpu_state *cpu = this_cpu();
	struct tls_call *call;

	if (!cpu || !is_recorded(cpu, task))
		return 0;
	call = new_tls_call_of(task);
	if (!call) {
		count_loss(cpu, LOSS_TLS);
		return 0;
	}
	call->ssl = FUNCTION_ARG0(regs);
	call->buffer = FUNCTION_ARG1(regs);
	call->size = FUNCTION_ARG2(regs);
	call->length_at = length_at;
	call->flags = flags;
	call->start_ns = bpf_ktime_get_ns();
	return 0;
}

SEC("uprobe")
int on_tls_read(struct pt_regs *regs)
{
	return begin_tls(regs, 0, FLAG_RECEIVE);
}

SEC("uprobe")
int on_tls_write(struct pt_regs *regs)
{
	return begin_tls(regs, 0, 0);
}

/* (ssl, buffer, size, *length) */
SEC("uprobe")
int on_tls_read_ex(struct pt_regs *regs)
{
	return begin_tls(regs, FUNCTION_ARG3(regs), FLAG_RECEIVE);
}

SEC("uprobe")
int on_tls_write_ex(struct pt_regs *regs)
{
	return begin_tls(regs, FUNCTION_ARG3(regs), 0);
}

/* (ssl, buffer, size, flags, *length), from OpenSSL 3.3 on */
SEC("uprobe")
int on_tls_write_flags(struct pt_regs *regs)
{
	return begin_tls(regs, FUNCTION_ARG4(regs), 0);
}

static __always_inline bool starts_tls_turn(__u32 tgid, struct tls_call *call)
{
	struct tls_session_key key = {.ssl = call->ssl, .tgid = tgid};
	struct tls_session *session = bpf_map_lookup_elem(&tls_sessions, &key), fresh = {};
	bool receive = call->flags & FLAG_RECEIVE, turn = true;

	if (session) {
		turn = call->start_ns - (receive ? session->last_receive_ns : session->last_send_ns) >
			       TURN_GAP_NS ||
		       session->received_last != receive;
	} else {
		session = &fresh;
	}
	session->received_last = receive;
	if (receive)
		session->last_receive_ns = call->start_ns;
	else
		session->last_send_ns = call->start_ns;
	if (session == &fresh)
		bpf_map_update_elem(&tls_sessions, &key, &fresh, BPF_ANY);
	return turn;
}

GLOBAL int write_plain_text(struct cpu_state *cpu, __u64 hot_index, __u64 buffer, __u32 length)
{
	struct payload *payload;
	__u64 index;

	if (!cpu)
		return false;
	payload = reserve_payload(cpu, hot_index, &index);
	if (!payload)
		return false;
	payload->length_bytes = copy_buffer(payload, buffer, length);
	commit(&payload->sequence, index);
	return true;
}

SEC("uretprobe")
int WRITES_AT(LEVEL_TASK, on_tls_return, struct pt_regs *regs)
{
	struct task_struct *task = CURRENT_TASK();
	__u64 index, duration_ns, length, now, identity;
	struct cpu_state *cpu = this_cpu();
	struct tls_call *call;
	__s32 result = FUNCTION_RESULT(regs);
	struct tls *tls;
	__u8 flags;

	if (!cpu || !is_recorded(cpu, task))
		return 0;
	call = tls_call_of(task);
	if (!call || !call->start_ns)
		return 0;
	now = bpf_ktime_get_ns();
	duration_ns = now - call->start_ns;
	if (result <= 0) {
		call->start_ns = 0;
		return 0;
	}
	length = result;
	if (call->length_at &&
	    bpf_probe_read_user(&length, sizeof(length), (void *)call->length_at))
		length = UNKNOWN_LENGTH;
	identity = bpf_get_current_pid_tgid();
	flags = call->flags;
	if (starts_tls_turn(identity >> 32, call))
		flags |= FLAG_TURN;
	/* a length that cannot be means that the arguments are not what user space took them for */
	tls = length <= call->size ? hot_reserve(cpu, &index) : NULL;
	if (!tls) {
		count_loss(cpu, LOSS_TLS);
		call->start_ns = 0;
		return 0;
	}
	if ((flags & FLAG_TURN) && payload_limit && length &&
	    write_plain_text(cpu, index, call->buffer, length))
		flags |= FLAG_PAYLOAD;
	tls->reserved0 = 0;
	tls->kind = RECORD_TLS;
	tls->flags = flags;
	tls->start_ns = call->start_ns;
	tls->duration_ns = duration_ns;
	tls->tgid = identity >> 32;
	tls->tid = identity;
	tls->ssl = call->ssl;
	tls->length_bytes = length;
	tls->reserved1 = 0;
	tls->reserved2[0] = tls->reserved2[1] = 0;
	commit(&tls->sequence, index);
	call->start_ns = 0;
	return 0;
}

#endif
