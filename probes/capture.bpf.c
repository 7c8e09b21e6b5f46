// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/*
 * The capture spine: processes, system calls, messages, TLS plain text, off-CPU time and the user's own
 * probes of recorded threads. Each header opens with what its probes see, miss and cost.
 */
/* BPF_PROG() names the raw context in every program, needed or not. */
#pragma clang diagnostic ignored "-Wunused-parameter"

#include "state.h"
#include "processes.h"
#include "tls.h"
#include "hits.h"
#include "calls.h"
#include "sockets.h"

char LICENSE[] SEC("license") = "Dual BSD/GPL";
