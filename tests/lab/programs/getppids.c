/* What a user might write: each getppid() of a recorded process, through both kinds of output. */
#include <uapi/linux/ptrace.h>

struct call {
	u64 ts;
	u32 tgid;
	u32 tid;
	long number;
	bool leader;
	char comm[16];
	u8 bytes[4];
	s16 pair[2];
};

BPF_PERF_OUTPUT(calls);
BPF_RINGBUF_OUTPUT(ring, 64);

TRACEPOINT_PROBE(syscalls, sys_enter_getppid)
{
	u64 id = bpf_get_current_pid_tgid();
	struct call call = {}, *room;

	if (!scope_is_recorded())
		return 0;
	call.ts = bpf_ktime_get_ns();
	call.tgid = id >> 32;
	call.tid = id;
	call.number = args->__syscall_nr;
	call.leader = call.tgid == call.tid;
	call.bytes[1] = 7;
	call.pair[0] = -3;
	bpf_get_current_comm(&call.comm, sizeof(call.comm));
	calls.perf_submit(args, &call, sizeof(call));
	room = ring.ringbuf_reserve(sizeof(struct call));
	if (room) {
		*room = call;
		ring.ringbuf_submit(room, 0);
	}
	return 0;
}
