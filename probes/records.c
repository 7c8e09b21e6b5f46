/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Never loaded: compiled so that its BTF holds every record and constant of events.h, from which
 * scripts/generate_records.py writes scope_ebpf/records.py. A type is in the BTF only if a global
 * variable has it, so each has one here.
 */
#include "kernel.h"
#include "events.h"

struct call anchor_call;
struct message anchor_message;
struct offcpu anchor_offcpu;
struct tls anchor_tls;
struct payload anchor_payload;
struct process anchor_process;
struct connection anchor_connection;
struct connect anchor_connect;
struct marked_task anchor_marked_task;
struct sample anchor_sample;
struct flow anchor_flow;
struct context anchor_context;
struct handoff anchor_handoff;
struct gil anchor_gil;
struct frame anchor_frame;
struct stack_part anchor_stack_part;
struct code_part anchor_code_part;
struct hit anchor_hit;
struct python_call anchor_python_call;
struct hit_probe anchor_hit_probe;
struct hit_argument anchor_hit_argument;
struct interpreter anchor_interpreter;
struct call_watch anchor_call_watch;
struct flight anchor_flight;
struct cpu_state anchor_cpu_state;
enum record_limits anchor_record_limits;
enum record_kind anchor_record_kind;
enum loss_kind anchor_loss_kind;
enum call_status anchor_call_status;
enum record_flags anchor_record_flags;
enum process_event anchor_process_event;
enum message_class anchor_message_class;
enum target_kind anchor_target_kind;
enum sample_reason anchor_sample_reason;
enum context_kind anchor_context_kind;
enum interpreter_flags anchor_interpreter_flags;
enum python_limits anchor_python_limits;
enum hit_source anchor_hit_source;
enum hit_flags anchor_hit_flags;
enum hit_limits anchor_hit_limits;
enum value_kind anchor_value_kind;
enum call_watch_role anchor_call_watch_role;
enum call_watch_flags anchor_call_watch_flags;
