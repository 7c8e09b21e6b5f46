#include <uapi/linux/ptrace.h>

struct call {
    u64 ts;
    u32 tgid;
    u32 tid;
    long number;
    bool odd;
    char comm[16];
    u8 raw[4];
    s16 pair[2];
};
BPF_PERF_OUTPUT(calls);
BPF_RINGBUF_OUTPUT(rings, 64);

/* every getppid of a recorded process */
RAW_TRACEPOINT_PROBE(sys_enter)
{
    struct call call = {};
    u64 id = bpf_get_current_pid_tgid();

    if (ctx->args[1] != 110 || !scope_is_recorded())
        return 0;
    call.ts = bpf_ktime_get_ns();
    call.tgid = id >> 32;
    call.tid = id;
    call.number = ctx->args[1];
    call.odd = id & 1;
    call.raw[1] = 7;
    call.pair[0] = -3;
    bpf_get_current_comm(&call.comm, sizeof(call.comm));
    calls.perf_submit(ctx, &call, sizeof(call));
    rings.ringbuf_output(&call, sizeof(call), 0);
    return 0;
}
