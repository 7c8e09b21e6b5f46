/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Stands before all that BCC compiles, so that headers of kernels that are newer than BCC compile, too.
 *
 * BCC has a copy of uapi/linux/bpf.h, as old as BCC is, in place of the kernel's, and newer kernels'
 * linux/bpf.h asks for what is not in it. Macros, since a copy may have these: the names are others then, and
 * nobody here uses what linux/bpf.h does with them.
 */
struct scope_not_used {
	__u64 words[2];
};
#define bpf_rb_root scope_not_used
#define bpf_rb_node scope_not_used
#define bpf_refcount scope_not_used
#define bpf_wq scope_not_used
#define bpf_task_work scope_not_used
#define BPF_TRACE_FENTRY_MULTI 0xf001
#define BPF_TRACE_FEXIT_MULTI 0xf002
#define BPF_TRACE_FSESSION 0xf003
#define BPF_TRACE_FSESSION_MULTI 0xf004
#define BPF_F_CPU 0
#define BPF_F_ALL_CPUS 0
